"""Rows for distillation: every token scored inside its own example, answers by others and by the student."""

import pytest
import torch
from transformers import AutoModelForCausalLM  # noqa: F401  its warnings come before the package's type checks

from avalab.data import corpora, packing, toolbox
from avalab.data.packing import IGNORED
from avalab.lab.run import Run
from avalab.models import checkpoint

pytestmark = pytest.mark.usefixtures("few_docstrings")


@pytest.fixture(scope="module")
def tokenizer(base):
    return checkpoint.load_tokenizer(base)


@pytest.fixture(scope="module")
def examples():
    return list(toolbox.function_calling_examples(6, seed=0))


def test_a_window_predicts_each_next_token_and_nothing_at_its_end():
    (row,) = packing.window_rows(torch.tensor([[7, 8, 9]]))
    assert row["labels"].tolist() == [8, 9, IGNORED]
    assert (row["position_ids"].tolist(), row["boundaries"].tolist()) == ([0, 1, 2], [0, 3])


def test_no_example_of_a_row_predicts_the_next_ones_beginning():
    row = {"input_ids": torch.arange(10, 16), "boundaries": torch.tensor([0, 2, 6])}
    assert packing.whole_row(row)["labels"].tolist() == [11, IGNORED, 13, 14, 15, IGNORED]


def test_text_rows_are_as_many_as_asked_in_a_seeded_order_and_disjoint_from_evaluation(run, tokenizer):
    rows = packing.text_rows(run, tokenizer, tokens=600, row_tokens=100)
    assert [len(row["input_ids"]) for row in rows] == [100] * 6
    again = packing.text_rows(run, tokenizer, tokens=600, row_tokens=100)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(rows, again, strict=True))
    shown = set().union(*(corpora.shingles(tokenizer.decode(row["input_ids"])) for row in rows))
    assert all(shown.isdisjoint(corpora.shingles(t.content)) for t in corpora.evaluation_texts(run, tokenizer))


def test_more_text_than_there_is_is_refused(run, tokenizer):
    with pytest.raises(ValueError, match="calibration text has"):
        packing.text_rows(run, tokenizer, tokens=10**9, row_tokens=100)


def test_chat_rows_score_prompts_too(tokenizer, examples):
    rows = packing.chat_rows(tokenizer, examples, row_tokens=1000, seed=0)
    plain = packing.pack_chats(tokenizer, examples, row_tokens=1000, context=1000, seed=0)
    assert [row["input_ids"].tolist() for row in rows] == [row["input_ids"].tolist() for row in plain]
    scored = sum(int((row["labels"] != IGNORED).sum()) for row in rows)
    assert scored == sum(len(row["input_ids"]) - len(row["boundaries"]) + 1 for row in rows)


def test_examples_are_drawn_until_they_have_the_tokens_asked_for(tokenizer, examples):
    lengths = {str(e): len(packing.encode_chat(tokenizer, e["messages"]).ids) for e in examples}
    chosen = packing.sample_examples(tokenizer, examples, tokens=600, seed=0)
    assert sum(lengths[str(e)] for e in chosen[:-1]) < 600 <= sum(lengths[str(e)] for e in chosen)
    assert chosen != packing.sample_examples(tokenizer, examples, tokens=600, seed=1)
    assert len(packing.sample_examples(tokenizer, examples, tokens=10**6, seed=0)) == 6
    with pytest.raises(ValueError, match="no example fits"):
        packing.sample_examples(tokenizer, [], tokens=10, seed=0)


def test_answers_of_a_teacher_replace_the_examples_own(examples):
    told = packing.answered(examples, lambda messages: f"{len(messages)} {messages[-1]['role']}")
    assert [example["messages"][-1] for example in told] == [{"role": "assistant", "content": "2 user"}] * 6
    assert all(a["messages"][:-1] == b["messages"][:-1] for a, b in zip(told, examples, strict=True))
    assert examples[0]["messages"][-1]["content"].startswith("<tool_call>")


def test_a_teacher_who_can_is_asked_all_at_once(examples):
    class Asked:
        __name__ = "asked"

        def __init__(self):
            self.questions = []

        def ahead(self, questions, *, progress):
            self.questions = questions

        def __call__(self, messages):
            return str(self.questions.index(messages))

    told = packing.answered(examples, Asked())
    assert [example["messages"][-1]["content"] for example in told] == list("012345")


def test_the_students_own_answers_are_drawn_by_seed_and_can_be_learnt_from(run, base, tokenizer, examples):
    first, again = (packing.own_answers(base, examples[:3], run=run, new_tokens=12) for _ in range(2))
    assert first == again
    other = packing.own_answers(base, examples[:3], run=Run("t", "smoke", 1, run.model), new_tokens=12)
    assert first != other
    assert all(a["messages"][:-1] == b["messages"][:-1] for a, b in zip(first, examples, strict=False))
    assert len(packing.pack_chats(tokenizer, first, row_tokens=1000, context=1000, seed=0)) >= 1
