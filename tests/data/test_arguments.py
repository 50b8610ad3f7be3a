"""Values by kind and how they are said: shares, amounts, numbers in words, tables, records, paths."""

import random
import re

import jsonschema
import pytest

from avalab.data import gates, phrasing, toolbox
from avalab.data.arguments import kind_of, read_packaged, say_value, ways_to_say

FIGURES = "figures.txt"
KINDS = ["%", "%5..60", "$1000..900000", "$1000000..90000000000", "100000..900000000", "-60000..-10000", "-9.5..-1.5"]
KINDS += ["#f_days", "#f_coin", "#f_deck", "[-90000..-10000,2000..40000]", "[[13..90]]", "[%]", "[&f_rule]"]
KINDS += ["&f_holding", "f_data_file", "f_predictor", "[f_predictor]"]


def figure_tools() -> list[toolbox.Tool]:
    return list(phrasing.parse_domain(read_packaged("domains", FIGURES)))


def said_and_grounded(value: object, said: str) -> bool:
    return gates.first_unsaid(value, "", f"Take {said} for it.") is None


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_drawn_fits_its_schema_and_is_grounded_however_it_is_said(kind):
    rng = random.Random(1)
    for _ in range(60):
        value = kind_of(kind).sample(rng)
        jsonschema.validate(value, kind_of(kind).schema)
        said = say_value(value, rng, kind)
        assert said_and_grounded(value, said), (value, said)


def test_a_share_is_said_in_per_cent_and_passed_as_a_fraction():
    assert set(ways_to_say(0.05, "%1..10")) == {"5%", "5 percent", "5 per cent"}
    assert set(ways_to_say(0.0725, "%")) == {"7.25%", "7.25 percent", "7.25 per cent"}
    drawn = {kind_of("%80..99").sample(random.Random(seed)) for seed in range(60)}
    assert drawn == {0.8, 0.9, 0.95, 0.99}


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        (10_000_000, "$1000000..90000000", {"$10,000,000", "10 million dollars", "$10 million"}),
        (2_500_000_000, "$1000000..9000000000", {"$2.5 billion", "2.5 billion dollars", "$2,500,000,000"}),
        (40_000, "$100..90000", {"$40k", "40 thousand dollars", "$40,000"}),
        (40_000, "10000..90000", {"40 thousand", "40,000", "40000"}),
        (1_470_000, "100000..9000000", {"1.47 million", "1,470,000"}),
        (-3_400_000, "-9000000..-1000000", {"-3.4 million", "-3,400,000"}),
    ],
)
def test_a_large_amount_is_said_in_thousands_millions_and_billions(value, kind, said):
    assert said <= set(ways_to_say(value, kind))
    assert all(said_and_grounded(value, form) for form in ways_to_say(value, kind))


def test_an_amount_that_words_would_round_is_said_in_digits():
    assert not [form for form in ways_to_say(1_234_567) if re.search(r"[a-z]", form)]


def test_a_large_amount_is_drawn_round():
    drawn = [kind_of("1000000..900000000").sample(random.Random(seed)) for seed in range(200)]
    assert all(1_000_000 <= value <= 900_000_000 for value in drawn)
    assert max(len(str(value).rstrip("0")) for value in drawn) <= 3
    assert sum(value < 30_000_000 for value in drawn) > 60  # every size, not mostly the largest


def test_a_number_is_said_by_what_has_so_many():
    assert "a fortnight" in ways_to_say(14, "#f_days")
    assert "six-sided" in ways_to_say(6, "#f_die")
    assert kind_of("#f_days").schema == {"type": "integer"}
    assert kind_of("#f_coin").schema == {"type": "number"}


@pytest.mark.parametrize(
    ("said", "value", "other"),
    [
        ("over a fortnight", 14, 15),
        ("with a fair coin", 0.5, 0.4),
        ("half an hour of it", 30, 31),
        ("weeklong", None, 7),
    ],
)
def test_a_number_in_words_grounds_that_number_only(said, value, other):
    assert value is None or gates.says_number(value, said)
    assert not gates.says_number(other, said)


def test_the_first_entry_of_a_list_may_be_drawn_otherwise_and_is_said_with_its_sign():
    flows = kind_of("[-90000..-10000,2000..40000]").sample(random.Random(2))
    assert flows[0] < 0 < min(flows[1:])
    assert str(flows[0]) in say_value(flows, random.Random(0), "").replace(",", "")


def test_the_rows_of_a_table_have_one_length_and_stand_once():
    for seed in range(20):
        rows = kind_of("[[1..99]]").sample(random.Random(seed))
        assert len({len(row) for row in rows}) == 1
        said = say_value(rows, random.Random(seed), "[[1..99]]")
        assert [int(n) for n in re.findall(r"\d+", said)] == [cell for row in rows for cell in row]


def test_a_record_is_said_by_its_sentence_and_stands_once_by_its_first_field():
    rule = {"field": "unit_price", "operation": "gte", "value": 30}
    said = {say_value(rule, random.Random(seed), "&f_rule") for seed in range(40)}
    assert {"unit price at least 30", "unit_price is no less than 30"} <= said
    for seed in range(40):
        fields = [rule["field"] for rule in kind_of("[&f_rule]").sample(random.Random(seed))]
        assert len(fields) == len(set(fields))


def test_a_path_is_made_of_pools_and_said_in_full():
    paths = {kind_of("f_data_file").sample(random.Random(seed)) for seed in range(200)}
    assert len(paths) > 120
    assert all(ways_to_say(path) == [path] and "<" not in path for path in paths)


def test_most_figure_tools_take_a_bare_share_and_some_say_per_cent():
    tools = figure_tools()
    bare = [p for t in tools for p in t.parameters if p.kind.startswith("%")]
    assert len({t.name for t in tools if any(p.kind.startswith("%") for p in t.parameters)}) >= 50
    assert not [p for p in bare if re.search(r"percent|per cent|fraction", p.name + p.description)]
    as_is = [p for t in tools for p in t.parameters if re.search(r"_percent$", p.name)]
    assert len(as_is) >= 10
    assert all(re.search(r"percent|per cent", p.description) and ".." in p.kind for p in as_is)


def test_every_sentence_of_every_figure_tool_is_grounded():
    rng, missed = random.Random(3), []
    for tool in figure_tools():
        for _, sentence in tool.sentences:
            arguments = phrasing.sample(tool, rng)
            request = phrasing.phrase(*phrasing.core(tool, arguments, rng, sentence), rng)
            call = {"name": tool.name, "arguments": arguments}
            offered = phrasing.describe(tool, phrasing.Dress())
            example = {"messages": [{"role": "user", "content": request}], "tools": [offered], "calls": [call]}
            missed += [reason for reason in [gates.grounded(example)] if reason]
    assert missed == []


def test_an_unknown_kind_inside_a_list_is_refused():
    with pytest.raises(ValueError, match=r"unknown kind 'colour'; a range, an enumeration, %"):
        kind_of("[colour]")
