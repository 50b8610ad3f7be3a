"""What the command prints when it cannot go on: one line, whatever was raised."""

import pytest

from avalab import cli
from avalab.lab.errors import InputError, MissingFile, ProcessFailed, Unavailable


@pytest.fixture
def raising(monkeypatch):
    """Make the command raise an exception."""

    def prepare(error: BaseException) -> None:
        def stand_in(**_):
            raise error

        monkeypatch.setattr(cli, "app", stand_in)

    return prepare


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("bits is 9;\n it has to be 8 at most"), 2, "avalab: bits is 9; it has to be 8 at most"),
        (MissingFile("no artefact at x"), 2, "avalab: no artefact at x"),
        (Unavailable("engine y needs z"), 2, "avalab: engine y needs z"),
        (ProcessFailed("it died"), 1, "avalab: it died"),
        (PermissionError(13, "Permission denied", "closed/x"), 2, "avalab: [Errno 13] Permission denied: 'closed/x'"),
        (KeyboardInterrupt(), 130, "avalab: stopped; what was finished is kept"),
        (MemoryError(), 1, "avalab: out of memory"),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(raising, capsys, error, code, line):
    raising(error)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == code
    assert capsys.readouterr().err.startswith(line)


def test_a_defect_is_one_line_too_and_its_traceback_is_in_a_file(raising, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    raising(KeyError("hidden_sizes"))
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err
    assert end.value.code == 1
    assert said.count("\n") == 1
    assert "a defect of avalab" in said
    assert "KeyError" in said
    (file,) = tmp_path.iterdir()
    assert str(file) in said
    assert "stand_in" in file.read_text()
