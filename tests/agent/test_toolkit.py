"""The agent's tools: sums, dates, units, files, Python, and what each refuses."""

import math

import pytest

from avalab.agent import toolkit
from avalab.agent.retrieval.index import Index
from avalab.data.calls import Call
from avalab.lab.errors import InputError


@pytest.mark.parametrize(
    ("expression", "value"),
    [("24 * 37", "888"), ("mean(4.1, 3.9, 4.4, 4.0, 4.6)", "4.2"), ("2 ** 24", "16777216"), ("-7 // 2", "-4"),
     ("sqrt(5329)", "73"), ("sum([1, 2, 3])", "6"), ("10 % 4 + round(2.6)", "5")],
)  # fmt: skip
def test_a_sum_is_worked_out(expression, value):
    assert toolkit.calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["__import__('os')", "(1).__class__", "9 ** 9 ** 9", "factorial(10000)", "1 / 0", "x + 1", "", "'a' * 9",
     "1 if 1 else 2",     "(-8) ** 0.5", "True + 1", "open('/etc/passwd')", "[1, 2", "10 ** 400 * 1.0"],
)  # fmt: skip
def test_what_is_no_sum_is_refused_in_one_line(expression):
    with pytest.raises(InputError) as refused:
        toolkit.calculate(expression)
    assert "\n" not in str(refused.value)


def test_dates_follow_the_calendar():
    """2024 is a leap year; the first landing on the moon was on a Sunday."""
    assert toolkit.days_between("2024-02-20", "2024-03-20") == "29"
    assert toolkit.add_days("2024-12-31", 1) == "2025-01-01"
    assert toolkit.weekday("1969-07-20") == "Sunday"
    for wrong in ("2023-02-29", "tomorrow"):
        with pytest.raises(InputError, match="is no date"):
            toolkit.weekday(wrong)
    with pytest.raises(InputError, match="no date that a calendar has"):
        toolkit.add_days("2024-01-01", 10**9)


def test_units_are_converted_and_kinds_are_kept_apart():
    pytest.importorskip("pint", reason="units need the extra `agent`")
    value = float(toolkit.convert_units(26.2, "mile", "km").split()[0])
    assert math.isclose(value, 26.2 * 1.609344)
    assert float(toolkit.convert_units(98.6, "degF", "degC").split()[0]) == pytest.approx(37)
    for source, target in (("kg", "m"), ("blorp", "m"), ("m", ")(")):
        with pytest.raises(InputError):
            toolkit.convert_units(1, source, target)


@pytest.fixture
def workspace(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "a.txt").write_text("hello")
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    return folder


@pytest.mark.parametrize("path", ["../secret.txt", "/etc/passwd", "link.txt", "a/../../secret.txt", "", ".", "a\0b"])
def test_no_path_leaves_the_workspace(workspace, path):
    tools = toolkit.file_tools(workspace)
    for call in (Call("read_file", {"path": path}), Call("write_file", {"path": path, "text": "x"})):
        assert toolkit.perform(tools, call, confirm=lambda *_: True).failed
    assert (workspace.parent / "secret.txt").read_text() == "secret"


def test_files_are_listed_read_and_written_after_a_confirmation(workspace):
    tools = toolkit.file_tools(workspace)
    assert toolkit.perform(tools, Call("list_files", {})).text == '1 files, with their bytes: {"a.txt": 5}'
    assert toolkit.perform(tools, Call("read_file", {"path": "a.txt"})).text == "hello"
    write = Call("write_file", {"path": "b.txt", "text": "new"})
    assert "does not allow" in toolkit.perform(tools, write).text
    assert not (workspace / "b.txt").exists()
    assert not toolkit.perform(tools, write, confirm=lambda *_: True).failed
    assert (workspace / "b.txt").read_text() == "new"


def test_a_wrong_call_says_what_is_wrong_with_it(workspace):
    tools = toolkit.file_tools(workspace)
    assert "there is no tool 'rm'" in toolkit.perform(tools, Call("rm", {})).text
    assert "required" in toolkit.perform(tools, Call("read_file", {})).text
    assert "unexpected" in toolkit.perform(tools, Call("list_files", {"path": "."})).text
    assert "there are a.txt" in toolkit.perform(tools, Call("read_file", {"path": "c.txt"})).text


def test_a_program_sees_a_copy_of_the_files_and_changes_nothing(workspace):
    tool = toolkit.python_tool(workspace)
    code = "print(open('a.txt').read().upper()); open('a.txt', 'w').write('gone')"
    assert toolkit.perform([tool], Call("python", {"code": code})).text == "HELLO"
    assert (workspace / "a.txt").read_text() == "hello"
    assert "ZeroDivisionError" in toolkit.perform([tool], Call("python", {"code": "1/0"})).text


def test_documents_are_searched(tmp_path):
    page = tmp_path / "tea.md"
    page.write_text("# Tea\nGreen tea is brewed at 80 degrees.\n")
    index = Index(tmp_path / "i.sqlite")
    index.build(page)
    found = toolkit.perform([toolkit.document_tool(index)], Call("search_documents", {"question": "green tea"}))
    assert found.text == "[tea.md:0] Green tea is brewed at 80 degrees."
