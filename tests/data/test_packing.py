"""Rows: every example once, labels where they predict, nothing seen across boundaries, answers by others."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avalab.data import corpora, packing, toolbox
from avalab.data.packing import IGNORED, Encoded
from avalab.lab.run import ROOT, Run
from avalab.models import attention, checkpoint

TINY = ROOT / "data" / "tiny-llama"


def chat(question="What is 2 + 2?", answer="4"):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_a_label_stands_where_its_token_is_predicted_and_only_the_answer_counts(tokenizer):
    encoded = packing.encode_chat(tokenizer, chat())
    predicted = [(i, label) for i, label in enumerate(encoded.labels) if label != IGNORED]
    assert all(encoded.ids[i + 1] == label for i, label in predicted)
    assert tokenizer.decode([label for _, label in predicted]) == "4<|im_end|>"


def test_the_tokens_before_the_answer_are_those_of_generation(tokenizer):
    prompt = tokenizer.apply_chat_template(chat()[:1], tokenize=False, add_generation_prompt=True)
    before = tokenizer(prompt, add_special_tokens=False).input_ids
    assert packing.encode_chat(tokenizer, chat()).ids[: len(before)] == before


def test_every_answer_of_a_dialogue_counts_and_nothing_else(tokenizer):
    messages = chat() + chat("And 3 + 3?", "6")
    encoded = packing.encode_chat(tokenizer, messages)
    assert tokenizer.decode([label for label in encoded.labels if label != IGNORED]) == "4<|im_end|>6<|im_end|>"
    whole = tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
    assert encoded.ids == tokenizer(whole, add_special_tokens=False).input_ids


@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=40), seed=st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_every_example_is_in_exactly_one_row_and_no_row_is_too_long(lengths, seed):
    examples = [Encoded([number] * length, [number] * length) for number, length in enumerate(lengths)]
    rows = packing.pack_rows(examples, row_tokens=32, seed=seed)
    found = [tuple(row["input_ids"][a:b].tolist()) for row in rows for a, b in pairs(row["boundaries"])]
    assert sorted(found) == [tuple(e.ids) for e in examples]
    assert all(len(row["input_ids"]) <= 32 for row in rows)
    assert len(rows) <= 2 * -(-sum(lengths) // 32)


def pairs(boundaries):
    return list(zip(boundaries[:-1].tolist(), boundaries[1:].tolist(), strict=True))


def test_positions_start_again_in_every_example():
    (row,) = packing.pack_rows([Encoded([1, 2, 3], [2, 3, IGNORED])] * 2, row_tokens=8, seed=0)
    assert row["position_ids"].tolist() == [0, 1, 2, 0, 1, 2]


def test_packed_examples_are_scored_as_if_alone(tokenizer):
    model = checkpoint.load_model(TINY, dtype=torch.float32)
    examples = [packing.encode_chat(tokenizer, chat(f"Say {word}", word)) for word in ("river", "a", "stone bridge")]
    alone = [model(torch.tensor([example.ids])).logits[0] for example in examples]
    attention.apply_packed_attention(model)
    (row,) = packing.pack_rows(examples, row_tokens=500, seed=3)
    batch = packing.one_row_batch([row])
    together = model(**{k: batch[k] for k in ("input_ids", "position_ids", "boundaries")}).logits[0]
    for start, end in pairs(row["boundaries"]):
        ids = row["input_ids"][start:end].tolist()
        expected = next(a for a, e in zip(alone, examples, strict=True) if e.ids == ids)
        torch.testing.assert_close(together[start:end], expected, rtol=1e-4, atol=1e-4)


def test_what_an_example_says_changes_nothing_in_its_neighbours():
    model = checkpoint.load_model(TINY, dtype=torch.float32)
    attention.apply_packed_attention(model)
    outputs = []
    for first in ([5, 6, 7], [9, 9, 9]):
        row = packing.pack_rows([Encoded(first, first)], row_tokens=3, seed=0)[0]
        other = packing.pack_rows([Encoded([11, 12], [12, IGNORED])], row_tokens=3, seed=0)[0]
        joined = {k: torch.cat([row[k], other[k]]) for k in ("input_ids", "position_ids")}
        boundaries = torch.tensor([0, 3, 5])
        hidden = model.model(**{k: v[None] for k, v in joined.items()}, boundaries=boundaries).last_hidden_state
        outputs.append(hidden[0, 3:])
    assert torch.equal(*outputs)


def test_too_long_an_example_is_named_with_the_way_out(tokenizer):
    short, long = {"messages": chat()}, {"messages": chat("word " * 200)}
    with pytest.raises(ValueError, match=r"example 1 has \d+ tokens, a row 64; raise row_tokens"):
        packing.pack_chats(tokenizer, [short, long], row_tokens=64, context=1000, seed=0)
    with pytest.raises(ValueError, match="model's context 64"):
        packing.pack_chats(tokenizer, [short, long], row_tokens=640, context=64, seed=0)


def test_what_fits_is_kept_in_its_order(tokenizer):
    short, long = {"messages": chat()}, {"messages": chat("word " * 200)}
    assert packing.fitting(tokenizer, [short, long, short], 64) == [short, short]


def test_a_chat_without_an_answer_is_refused(tokenizer):
    with pytest.raises(ValueError, match="ends with an assistant's answer, this one has user"):
        packing.encode_chat(tokenizer, chat()[:1])


def test_several_rows_in_a_batch_are_refused():
    with pytest.raises(ValueError, match="one packed row, got 2"):
        packing.one_row_batch([{}, {}])


# --- rows for distillation: every token scored inside its own example


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


@pytest.mark.usefixtures("few_docstrings")
def test_text_rows_are_as_many_as_asked_in_a_seeded_order_and_disjoint_from_evaluation(run, tokenizer):
    rows = packing.text_rows(run, tokenizer, tokens=600, row_tokens=100)
    assert [len(row["input_ids"]) for row in rows] == [100] * 6
    again = packing.text_rows(run, tokenizer, tokens=600, row_tokens=100)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(rows, again, strict=True))
    shown = set().union(*(corpora.shingles(tokenizer.decode(row["input_ids"])) for row in rows))
    assert all(shown.isdisjoint(corpora.shingles(t.content)) for t in corpora.evaluation_texts(run, tokenizer))


@pytest.mark.usefixtures("few_docstrings")
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
    told = packing.with_answers_of(examples, lambda messages: f"{len(messages)} {messages[-1]['role']}")
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

    told = packing.with_answers_of(examples, Asked())
    assert [example["messages"][-1]["content"] for example in told] == list("012345")


def test_the_students_own_answers_are_drawn_by_seed_and_can_be_learnt_from(run, base, tokenizer, examples):
    first = packing.own_answers(base, examples[:3], run=run, new_tokens=12)
    (kept,) = (run.artifacts_dir / "cache").glob("own-*.jsonl")
    before = kept.read_text()
    kept.unlink()
    assert packing.own_answers(base, examples[:3], run=run, new_tokens=12) == first  # drawn again
    assert [json.loads(line)["text"] for line in before.splitlines()] == [e["messages"][-1]["content"] for e in first]
    other = packing.own_answers(base, examples[:3], run=Run("t", "smoke", 1, run.model), new_tokens=12)
    assert first != other
    assert all(a["messages"][:-1] == b["messages"][:-1] for a, b in zip(first, examples, strict=False))
    assert len(packing.pack_chats(tokenizer, first, row_tokens=1000, context=1000, seed=0)) >= 1


def test_own_answers_that_are_kept_are_not_drawn_again_and_a_killed_run_goes_on(run, base, examples, monkeypatch):
    """Batches of two: the first is there, the second is drawn."""
    how = {"run": run, "new_tokens": 6, "batch_size": 2}
    whole = packing.own_answers(base, examples[:4], **how)
    kept = next(path for path in (run.artifacts_dir / "cache").glob("own-*.jsonl") if "tokens6" in path.name)
    kept.write_text("".join(f"{line}\n" for line in kept.read_text().splitlines()[:2]))
    drawn, seen = packing.drawn_answers, []
    monkeypatch.setattr(packing, "drawn_answers", lambda *a, **k: seen.append(len(a[2])) or drawn(*a, **k))
    monkeypatch.setattr(packing, "code_of", lambda _: kept.name.split("-")[2])
    assert packing.own_answers(base, examples[:4], **how) == whole
    assert seen == [2]
