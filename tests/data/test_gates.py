"""The gates: what each rejects, what it lets through, and that the committed data passes them all."""

import inspect
import random
from pathlib import Path

import pytest

from avalab.data import gates, phrasing, repeats, synthesize, toolbox
from avalab.data.arguments import kind_of

DATA = Path(__file__).resolve().parents[2] / "data" / "synthetic_datasets"
TOOL = {
    "name": "book_table",
    "description": "Book a table.",
    "parameters": {
        "type": "object",
        "properties": {
            "guests": {"type": "integer", "description": "How many."},
            "date": {"type": "string", "description": "The day."},
            "outdoor": {"type": "boolean", "description": "Outside?"},
            "rate": {"type": "number", "description": "A fraction."},
        },
        "required": ["guests"],
    },
}


def example(request: str, arguments: dict, name: str = "book_table", tools: list | None = None) -> dict:
    call = {"name": name, "arguments": arguments}
    messages = [{"role": "user", "content": request}, {"role": "assistant", "content": toolbox.call_text([call])}]
    return {"kind": "single_call", "tools": [TOOL] if tools is None else tools, "messages": messages, "calls": [call]}


@pytest.mark.parametrize(
    ("request_text", "arguments"),
    [
        ("A table for 4, please", {"guests": 4}),
        ("A table for four, please", {"guests": 4}),
        ("A table for 1,200 people", {"guests": 1200}),
        ("For 2 on March 5, 2026", {"guests": 2, "date": "2026-03-05"}),
        ("For 2 on 5 March 2026", {"guests": 2, "date": "2026-03-05"}),
        ("For 2, outdoor seats", {"guests": 2, "outdoor": True}),
        ("For 2 at 7.5% service", {"guests": 2, "rate": 0.075}),
        ("For four, costing 3.4 million", {"guests": "4", "price": 3_400_000}),
        ("For 2, outside", {"guests": 2, "outdoor": True}),
    ],
)
def test_a_value_is_grounded_in_any_of_its_spellings(request_text, arguments):
    assert gates.grounded(example(request_text, arguments)) == ""


@pytest.mark.parametrize(
    ("request_text", "arguments", "named"),
    [
        ("A table for 4, please", {"guests": 5}, "guests=5"),
        ("A table for 14, please", {"guests": 4}, "guests=4"),
        ("For 2 on March 6, 2026", {"guests": 2, "date": "2026-03-05"}, "date='2026-03-05'"),
        ("For 2 please", {"guests": 2, "outdoor": True}, "outdoor=True"),
        ("For 2 please", {"guests": 2, "outdoor": False}, "outdoor=False"),
        ("For 2 please", {"guests": "3"}, "guests='3'"),
        ("For 2 please", {"guests": [2, 3]}, "guests=3"),
    ],
)
def test_a_value_that_the_request_does_not_say_is_named(request_text, arguments, named):
    assert named in gates.grounded(example(request_text, arguments))


def test_schema_validity_accepts_a_fitting_call():
    assert gates.schema_validity(example("For 2", {"guests": 2})) == ""


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [({"guests": "2"}, "is not of type 'integer'"), ({}, "'guests' is a required"), ({"guests": 2, "x": 1}, "'x'")],
)
def test_schema_validity_names_what_does_not_fit(arguments, reason):
    assert reason in gates.schema_validity(example("For 2", arguments))


def test_schema_validity_rejects_an_unknown_function_and_an_answer_that_says_something_else():
    assert "not among the tools book_table" in gates.schema_validity(example("For 2", {"guests": 2}, "other"))
    changed = example("For 2", {"guests": 2})
    changed["messages"][1]["content"] = "Gladly!"
    assert "does not hold" in gates.schema_validity(changed)


def test_schema_validity_rejects_the_same_call_twice():
    twice = example("For 2", {"guests": 2})
    assert gates.schema_validity({**twice, "calls": twice["calls"] * 2}) == "the same call stands twice"


@pytest.mark.parametrize("parameters", [{"type": "objekt"}, {"type": "object", "properties": 3}, None])
def test_a_schema_that_is_not_json_schema_is_refused_with_the_tools_name(parameters):
    broken = {**TOOL, "parameters": parameters}
    with pytest.raises(ValueError, match=r"book_table.*not valid JSON Schema"):
        gates.checked_schema(broken)
    assert "not valid" in gates.schema_validity(example("For 2", {"guests": 2}, tools=[broken]))


def test_pure_functions_are_executed_and_their_failure_is_the_reason():
    assert gates.execute("math.comb", {"n": 5, "k": 2}) == 10
    assert gates.execution(example("x", {"p": [1, 2], "q": [1, 2, 3]}, "math.dist")).startswith("math.dist fails")
    stated = {"calls": [], "checks": [{"name": "math.gcd", "arguments": {"a": 4, "b": 6}, "result": "3"}]}
    assert gates.execution(stated) == "math.gcd gives 2, the example says 3"


@pytest.mark.parametrize(
    "name", ["os.system", "subprocess.run", "re.match", "builtins.eval", "eval", "math.sub.x", "posixpath.exists"]
)
def test_nothing_but_whitelisted_functions_is_executed(name):
    with pytest.raises(ValueError, match=r"is not executed"):
        gates.execute(name, {"x": "1"})
    assert gates.execution(example("x", {"x": "1"}, name)) == ""


def test_an_argument_that_would_run_for_hours_is_refused():
    with pytest.raises(ValueError, match=r"larger than"):
        gates.execute("math.factorial", {"n": 10**9})
    with pytest.raises(ValueError, match=r"larger than"):
        gates.execute("math.prod", {"iterable": [2, 10**9]})


@pytest.mark.parametrize(
    "text", ["Hi", "un deux trois quatre", "a " * 700, "für Ähnlichkeit äöüß ÄÖÜ ßßß the", "for {city} in the"]
)
def test_language_and_length_reject(text):
    assert gates.language_and_length(example(text, {"guests": 2}))


def test_the_perplexity_band_names_the_value():
    gate = gates.perplexity_band(lambda text: float(len(text)), 5, 10)
    assert gate(example("A table", {})) == ""
    assert gate(example("A table for two", {})) == "perplexity 15.0 is outside 5 to 10"


def test_the_band_of_a_hundred_values_leaves_out_one_at_each_end():
    assert gates.perplexity_interval([float(v) for v in range(101)], share=0.98) == (1.0, 99.0)
    assert gates.perplexity_interval([3.0, 1.0, 2.0], share=1.0) == (1.0, 3.0)


@pytest.mark.parametrize(("values", "share"), [([], 0.9), ([1.0], 0), ([1.0], 1.5)])
def test_a_band_of_nothing_is_refused(values, share):
    with pytest.raises(ValueError, match=r"needs values, and a share in \(0, 1\]"):
        gates.perplexity_interval(values, share)


def said_to_be(words: str) -> dict:
    return example(f"Book it for {words}", {"guests": 2})


def test_survivors_pass_every_gate_but_the_one_left_out():
    row = {
        "even": lambda e: "" if len(e["messages"][0]["content"]) % 2 == 0 else "odd",
        "long": lambda e: "" if len(e["messages"][0]["content"]) > 14 else "short",
    }
    texts = [said_to_be(words) for words in ("us", "two", "three", "four men")]  # 14, 15, 17 and 20 characters
    assert gates.survivors(texts, row) == texts[3:]
    assert gates.survivors(texts, row, without="even") == texts[1:]
    assert gates.survivors(texts, row, without="long") == [texts[0], texts[3]]
    with pytest.raises(ValueError, match=r"no gate 'odd' in the row; it has even, long"):
        gates.survivors(texts, row, without="odd")


def test_more_gates_stand_before_those_that_remember():
    row = gates.standard_gates([], {"perplexity_band": lambda example: ""})
    assert list(row)[:4] == list(gates.STANDARD)
    assert list(row)[-3:] == ["perplexity_band", "diversity", "near_duplicates"]


def test_more_than_two_hundred_and_fifty_tools_in_more_than_twenty_domains_have_valid_schemas():
    tools, rng = phrasing.tools(), random.Random(0)
    assert len({tool.name for tool in tools}) > 250
    assert len({tool.domain for tool in tools}) > 20
    for tool in tools:
        gates.checked_schema(phrasing.describe(tool, phrasing.dressed(tool, rng)))


def test_the_parameters_of_library_tools_are_those_of_their_signatures():
    checked = 0
    for tool in phrasing.tools():
        if not tool.in_library:
            continue
        try:
            real = inspect.signature(toolbox.resolve(tool.name)).parameters
        except ValueError:  # a built-in that does not say
            continue
        if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in real.values()):
            continue
        assert {p.name for p in tool.parameters} <= real.keys(), tool.name
        needed = {name for name, p in real.items() if p.default is p.empty}
        assert needed <= {p.name for p in tool.parameters if not p.optional}, tool.name
        checked += 1
    assert checked > 20


def test_every_sentence_of_every_tool_can_be_said_with_and_without_its_optional_arguments():
    rng = random.Random(0)
    for tool in phrasing.tools():
        full = {p.name: kind_of(p.kind).sample(rng) for p in tool.parameters}
        for arguments in (full, {p.name: full[p.name] for p in tool.parameters if not p.optional}):
            for frame, sentence in tool.sentences:
                said = phrasing.phrase(*phrasing.core(tool, arguments, rng, sentence), rng)
                assert not set("[{}") & set(said.replace("[", "", said.count("[") * said.count("]"))), (frame, said)


def test_an_unknown_kind_of_argument_is_refused():
    with pytest.raises(ValueError, match=r"unknown kind 'colour'"):
        kind_of("colour")


@pytest.fixture(scope="module")
def committed():
    return synthesize.load_examples(DATA)


@pytest.fixture(scope="module")
def sets():
    return repeats.evaluation_sets()


def test_the_committed_examples_share_nothing_with_the_evaluation_sets(committed, sets):
    gate = repeats.overlap_gate(sets)
    assert [reason for e in committed if (reason := gate(e))] == []
    if "bfcl-v4" not in {known.name for known in sets}:
        pytest.skip("the asset bfcl-v4 is not in data/cache; the data card names the hash that was checked")


def test_the_data_card_names_the_evaluation_set_that_was_compared(sets):
    card = (DATA / "README.md").read_text(encoding="utf-8")
    assert "| bfcl-v4 | `" in card
    known = next((s for s in sets if s.name == "bfcl-v4"), None)
    if known is None:
        pytest.skip("the asset bfcl-v4 is not in data/cache, so its hash cannot be computed here")
    assert known.sha256 in card


def test_the_committed_examples_are_many_small_and_pass_the_gates_again(committed):
    assert len(committed) >= 3000
    assert sum(file.stat().st_size for file in DATA.glob("*")) <= 5_000_000
    assert [found for e in committed[::10] if (found := gates.verdict(e, gates.STANDARD))[0]] == []
