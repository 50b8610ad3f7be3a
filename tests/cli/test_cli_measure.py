"""The comparison of two artefacts on a command line: verdicts by pencil, rounds in turn, and one-line errors."""

import json
import random
import re
from pathlib import Path

import pytest
from transformers import PreTrainedModel  # noqa: F401  (before what reaches torchao)

from avalab.cli import measure
from avalab.engines.engine import Engine, Facts
from avalab.lab import artifacts
from avalab.lab.run import ROOT, Run
from avalab.measure import cell, families, quality
from avalab.models import checkpoint


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "artifacts_dir", tmp_path / "artifacts")
    return checkpoint.base_artifact(Run("x", "smoke")).path


def test_every_ratio_below_one_is_better_and_above_it_worse():
    """Eleven rounds at 0.5, 0.51, ... of the other's time: the sixth is the median, 2nd and 10th its interval."""
    theirs = [2.0] * 11
    ours = [1.0 + 0.02 * i for i in range(11)]
    shown = "better: 0.550 [0.510, 0.590] of the other's time, 11 rounds"
    assert measure.speed_verdict(ours, theirs) == shown
    assert measure.speed_verdict(theirs, ours).startswith("worse: 1.818 [1.695, 1.961]")


def test_an_interval_that_holds_one_distinguishes_nothing_and_few_rounds_have_none():
    around = [0.9, 1.1] * 5
    assert measure.speed_verdict(around, [1.0] * 10).startswith("not distinguishable: 1.000 [0.900, 1.100]")
    few = measure.speed_verdict([1.0, 1.0], [2.0, 2.0])
    assert few == "not distinguishable: 0.500 (too few rounds for an interval) of the other's time, 2 rounds"


def test_both_read_the_same_prompts_and_take_turns_in_going_first(monkeypatch):
    """Seconds 1, 2, 3, ...: a generation of three tokens takes 1 s to the first, 1 s each for the further ones."""
    seen = []

    def timed(engine: Engine, prompt: list[int], new_tokens: int) -> list[float]:
        seen.append((engine.name, tuple(prompt)))
        return [float(n + 1) for n in range(new_tokens)]

    monkeypatch.setattr(cell, "time_tokens", timed)
    pair = [Engine(name, Path("x"), Facts(100, 10, ()), {"model": 1}, list, None) for name in ("ours", "theirs")]
    found = measure.paired_timings(*pair, sizes=(4, 3), rounds=2, seed=0)
    assert found == {"time to first token": ([1, 1], [1, 1]), "time a token": ([1, 1], [1, 1])}
    assert [name for name, _ in seen] == ["theirs", "ours", "ours", "theirs", "theirs", "ours"]
    prompts = [prompt for _, prompt in seen]
    assert prompts[::2] == prompts[1::2]
    assert len(set(prompts)) == 3
    draw = random.Random(0)
    assert prompts[0] == tuple(draw.randrange(10) for _ in range(4))


def test_one_new_token_is_too_few_to_time():
    engine = Engine("x", Path("x"), Facts(100, 10, ()), {"model": 1}, list, None)
    with pytest.raises(ValueError, match="at least 2 new tokens to time one, got 1"):
        measure.paired_timings(engine, engine, sizes=(4, 1), rounds=2, seed=0)


def test_a_model_takes_as_long_as_itself(tiny, avalab):
    arguments = ["compare", tiny, tiny, "--task", "speed", "--profile", "smoke", "--limit", "7", "--threads", "1"]
    code, text, _ = avalab(*arguments)
    assert code == 0
    first, further = text.splitlines()
    assert first.startswith("time to first token, torch")
    assert further.startswith("time a token, torch")
    assert all("of the other's time, 7 rounds" in line for line in (first, further))


def test_text_compares_the_loss_on_the_same_windows(tiny, avalab):
    arguments = ["compare", tiny, tiny, "--task", "text", "--profile", "smoke", "--limit", "2"]
    code, text, _ = avalab(*arguments)
    assert code == 0
    assert all("not distinguishable: +0.0000" in line for line in text.splitlines())


def test_all_modes_stand_in_one_table_with_intervals_and_a_line_that_reads_it(tiny, avalab):
    code, text, error = avalab("eval", tiny, "--profile", "smoke", "--limit", "2")
    assert code == 0, error
    header, simple, _, irrelevance, every, reading = text.splitlines()
    assert header.split() == ["right", "answers", "free", "grammar", "forced"]
    assert len(re.findall(r"\d+ \[\d+, \d+\] %", simple)) == 3
    assert irrelevance.split()[-1] == "-", "a call that is forced cannot be none"
    assert every.startswith("all that need a call")
    assert re.search(r"right when a call is forced \d+%, in free form \d+% .* it calls in \d of 4 cases", reading)


def test_a_model_folder_is_measured_as_an_artefact_is(avalab, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "artifacts_dir", tmp_path / "artifacts")
    code, text, error = avalab(
        "eval", ROOT / "data" / "tiny-llama", "--profile", "smoke", "--limit", "1", "--mode", "free"
    )
    assert code == 0, error
    assert text.startswith("tiny-llama")


@pytest.fixture
def gguf(tiny):
    from avalab.engines import gguf as gguf_file

    return gguf_file.write(artifacts.load_artifact(tiny), "q8_0").path


def test_an_artefact_is_compared_with_its_own_gguf_file_in_8_bits(tiny, gguf, avalab):
    """The same weights but for rounding to 8 bits: the loss moves by less than a hundredth of a nat."""
    code, text, error = avalab("compare", gguf, tiny, "--task", "text", "--profile", "smoke", "--limit", "2")
    assert code == 0, error
    gaps = [float(gap) for gap in re.findall(r"(?:better|worse|distinguishable): ([+-][\d.]+)", text)]
    assert len(gaps) == 2
    assert max(map(abs, gaps)) < 0.01


@pytest.fixture
def stranger(tmp_path):
    """A random model that is not the tiny one, with its tokenizer."""
    return families.make_model("llama", tmp_path / "stranger")


@pytest.mark.parametrize("task", ["text", "bfcl"])
def test_models_of_different_bases_are_compared(stranger, tiny, avalab, task):
    code, text, error = avalab("compare", stranger, tiny, "--task", task, "--profile", "smoke", "--limit", "2")
    assert code == 0, error
    assert all(re.search(r"(better|worse|not distinguishable): [+\d-]", line) for line in text.splitlines()), text


def test_other_tokenizers_are_refused_by_name_before_anything_is_scored(stranger, tiny, avalab, monkeypatch):
    """Two letters have each other's number: the same vocabulary size, another vocabulary."""
    monkeypatch.setattr(quality, "score_artifact", lambda *_, **__: pytest.fail("scored"))
    file = stranger / "tokenizer.json"
    described = json.loads(file.read_text())
    numbers = described["model"]["vocab"]
    numbers["a"], numbers["b"] = numbers["b"], numbers["a"]
    file.write_text(json.dumps(described))
    code, _, error = avalab("compare", stranger, tiny, "--task", "text", "--profile", "smoke")
    assert (code, error.strip().count("\n")) == (2, 0), error
    assert re.search(r"stranger \(1,024 words\) and tiny-llama \(1,024\) have different tokenizers, from 'a'", error)


def test_two_artefacts_that_torch_cannot_load_have_no_common_loss(avalab, tmp_path):
    about = {"base": {"name": "b", "sha256": ""}, "recipe": [], "format": "openvino", "engines": ["openvino"]}
    pair = [artifacts.write_artifact(name, tmp_path, lambda folder: None, **about).path for name in "ab"]
    code, _, error = avalab("compare", *pair, "--task", "text", "--profile", "smoke")
    assert (code, error.strip().count("\n")) == (2, 0), error
    assert "a (openvino) and b (openvino) do not" in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--task", "taste"], "unknown task 'taste'; choose one of bfcl, text, speed"),
        (["--task", "speed", "--engine", "abacus"], "unknown engine 'abacus'"),
        (["--task", "speed", "--engine", "llamacpp"], "llamacpp cannot load tiny-llama"),
    ],
)
def test_what_cannot_be_compared_is_one_line_and_exit_code_2(tiny, arguments, says, avalab):
    code, _, error = avalab("compare", tiny, tiny, "--profile", "smoke", *arguments)
    assert (code, len(error.splitlines())) == (2, 1)
    assert says in error
