"""The benchmark against trl: pairs without a model, batches as trl has them, and a step of either arm."""

import pytest
import torch

from avalab.models import checkpoint
from avalab.train.preferences import bench, pairs


def test_a_wrong_call_answers_another_request():
    found = bench.wrong_calls(5)
    assert len(found) >= 4
    assert all(each["chosen"] != each["rejected"] for each in found)


def test_tokens_are_counted_with_each_prompt_twice(base):
    tokenizer, batch = checkpoint.load_tokenizer(base), bench.wrong_calls(3)
    parts = [pairs.encode_pair(tokenizer, pair, 0) for pair in batch]
    wanted = sum(2 * len(prompt) + sum(map(len, answers)) for prompt, answers in parts)
    assert bench.tokens_of(tokenizer, batch) == wanted


def test_what_stands_in_for_trls_kernel_is_the_log_probability_of_the_labels():
    hidden, weight, targets = torch.randn(3, 4), torch.randn(7, 4), torch.tensor([0, 6, 2])
    found, *rest = bench.PlainLogProbabilities.apply(hidden, weight, None, targets, 1.0)
    torch.testing.assert_close(found, (hidden @ weight.T).softmax(-1)[torch.arange(3), targets].log())
    assert len(rest) == 4


def test_a_step_of_ours_trains_and_says_what_it_read(base):
    batches = [bench.wrong_calls(2)]
    read, before = bench.our_step(base, batches, "cpu")(0)
    assert read == bench.tokens_of(checkpoint.load_tokenizer(base), batches[0])
    assert before > 0


def test_a_step_of_trl_reads_the_same_tokens(base, monkeypatch):
    pytest.importorskip("trl", reason="the peer is trl")
    from trl.trainer import utils

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", utils._ChunkedLogProbFunction)  # put back behind the test
    batches = [bench.wrong_calls(2)]
    read, _ = bench.trl_step(base, batches, "cpu")(0)
    assert read == bench.tokens_of(checkpoint.load_tokenizer(base), batches[0])
