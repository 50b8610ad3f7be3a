"""Packed rows: every example once, labels where they predict, nothing seen across boundaries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from avalab.data import packing
from avalab.data.packing import IGNORED, Encoded
from avalab.lab.run import ROOT
from avalab.models import attention, checkpoint

TINY = ROOT / "data" / "tiny-llama"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


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
    batch = packing.collate([row])
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


def test_a_window_shorter_than_an_example_is_refused():
    q = torch.randn(1, 2, 6, 4)
    with pytest.raises(ValueError, match="no window below 6"):
        attention.packed_attention(torch.nn.Module(), q, q, q, None, sliding_window=4)


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
        packing.collate([{}, {}])


def heads(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=dtype).requires_grad_()


def test_attention_gradients_agree_with_finite_differences_in_float64():
    q, k, v = heads(4, 5, 3), heads(2, 5, 3), heads(2, 5, 3)
    assert torch.autograd.gradcheck(lambda *t: attention.attend(*t, 0.7), (q, k, v))


@given(tokens=st.integers(1, 40), kv=st.integers(1, 3), group=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_attention_and_its_gradients_are_those_of_torchs_own(tokens, kv, group):
    q, k, v = heads(kv * group, tokens, 8), heads(kv, tokens, 8), heads(kv, tokens, 8)
    ours = attention.attend(q, k, v, 0.3)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        q[None], *(t[None].repeat_interleave(group, 1) for t in (k, v)), is_causal=True, scale=0.3
    )[0]
    torch.testing.assert_close(ours, theirs)
    weight = torch.arange(ours.numel(), dtype=torch.float64).view_as(ours)
    gradients = [torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_long_examples_go_through_the_fused_kernel_with_the_same_result(monkeypatch):
    q, k, v = heads(1, 4, 9, 8), heads(1, 2, 9, 8), heads(1, 2, 9, 8)
    short, _ = attention.packed_attention(torch.nn.Module(), q, k, v, None)
    monkeypatch.setattr(attention, "LONGEST", 8)
    long, _ = attention.packed_attention(torch.nn.Module(), q, k, v, None)
    torch.testing.assert_close(short, long)
