"""Arms of the comparison hold equal tokens and disjoint draws; gains are paired by draw."""

import pytest
from transformers import AutoTokenizer  # before the package, whose type checks would meet its warnings

from avalab.data import packing
from avalab.lab.errors import InputError
from avalab.lab.run import ROOT, Run
from avalab.measure.calling import comparison


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "data" / "tiny-llama")


def chats(word, count):
    return [
        {"messages": [{"role": "user", "content": f"{word} {i}"}, {"role": "assistant", "content": "Done."}]}
        for i in range(count)
    ]


def sized(tokenizer, examples):
    return sum(len(packing.encode_chat(tokenizer, example["messages"]).ids) for example in examples)


def test_every_arm_has_the_same_tokens_and_no_draw_shares_an_example(tokenizer):
    old, new = chats("old", 60), chats("new", 60)
    longest = max(sized(tokenizer, [example]) for example in old + new)
    seen = []
    for draw in range(2):
        arms = comparison.arm_examples(tokenizer, old, new, draw=draw, draws=2, tokens=300)
        assert all(300 <= sized(tokenizer, chosen) < 300 + 2 * longest for chosen in arms.values())
        words = {m["messages"][0]["content"].split()[0] for m in arms["both"]}
        assert words == {"old", "new"}
        seen.append({e["messages"][0]["content"] for chosen in arms.values() for e in chosen})
    assert seen[0].isdisjoint(seen[1])


def test_a_part_that_holds_too_few_tokens_is_refused_with_both_numbers(tokenizer):
    with pytest.raises(InputError, match="of 5000: fewer draws"):
        comparison.arm_examples(tokenizer, chats("old", 4), chats("new", 4), draw=0, draws=2, tokens=5000)


def test_a_gain_is_the_mean_difference_of_the_draws():
    run = Run("calls_comparison", "smoke")
    comparison.record_arms(run, {"templates": [0.5, 0.4], "sources": [0.6, 0.6], "both": [0.5, 0.4]})
    gains = {row.subject: row.value for row in run.records if row.metric == "call_accuracy_grammar_gain"}
    assert gains["sources"] == pytest.approx(0.15)
    assert gains["both"] == 0
