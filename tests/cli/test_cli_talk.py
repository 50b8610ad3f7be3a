"""`avalab ensemble`: every method answers, and what is wrong is one line."""

import json
import re

import pytest
from transformers import AutoModelForCausalLM  # noqa: F401  its warnings come before the package's type checks

from avalab.compress import quantize
from avalab.lab import artifacts
from avalab.lab.run import Run
from avalab.models import checkpoint

pytestmark = pytest.mark.usefixtures("few_docstrings")  # all of them take seconds to compare


@pytest.fixture(scope="module")
def folders(run, base):
    return [
        base.path,
        quantize.compress_artifact(base, "nf4", run=run).path,
        quantize.compress_artifact(base, "rtn", run=run, group_size=32).path,
    ]


@pytest.fixture
def answer(monkeypatch, avalab, tmp_path):
    """Exit code, standard output and standard error of `avalab ensemble ARGUMENTS`."""
    monkeypatch.setattr(Run, "artifacts_dir", tmp_path)
    asked = ("--prompt", "What is a list?", "--profile", "smoke", "--max-new-tokens", "8")
    return lambda *arguments: avalab("ensemble", *asked, *arguments)


@pytest.mark.parametrize("method", ["mean", "logits", "weighted", "vote"])
def test_three_models_answer_together(method, answer, folders):
    code, text, error = answer("--models", *folders, "--method", method)
    assert code == 0, error
    total = sum(artifacts.load_artifact(folder).bytes for folder in folders) / 1e6
    assert f"{method} of {', '.join(f.name for f in folders)}: {total:.1f} MB" in text
    shares = [float(s) for s in re.findall(r"\d\.\d{3}", text.split(";")[-1])]
    assert method == "vote" or sum(shares) == pytest.approx(1, abs=0.002)


def test_given_weights_are_taken(answer, folders):
    code, text, error = answer("--models", *folders[:2], "--method", "weighted", "--weights", "0.25,0.75")
    assert code == 0, error
    assert text.strip().endswith("weights 0.250, 0.750")


def test_a_model_votes_with_its_own_draws(answer, folders):
    code, text, error = answer("--models", folders[1], "--method", "self-consistency", "--samples", "3")
    assert code == 0, error
    assert re.search(r"\d+% of 3 answers agree", text)


@pytest.mark.parametrize(("threshold", "says"), [("0", "was sure enough"), ("1.1", "so rtn|nf4|\\+.* answered")])
def test_the_second_model_is_asked_only_below_the_threshold(threshold, says, answer, folders):
    code, text, error = answer("--models", *folders[:2], "--method", "answer-cascade", "--threshold", threshold)
    assert code == 0, error
    assert re.search(says, text)


@pytest.mark.parametrize(
    ("count", "arguments", "says"),
    [
        (2, ["--method", "median"], "unknown method 'median'"),
        (2, ["--method", "self-consistency"], "draws from one model, got 2"),
        (3, ["--method", "answer-cascade"], "a small and a large model, got 3"),
        (2, ["--method", "cascade"], "use --method answer-cascade"),
        (2, ["--method", "weighted", "--weights", "0.9,0.9"], "sum to 1"),
        (1, ["--method", "self-consistency", "--temperature", "0"], "both must be positive"),
        (
            1,
            ["--weights", "half", "--method", "weighted"],
            "numbers with commas, such as 0.7,0.3; got 'half'",
        ),
        (1, ["--prompt", ""], "the prompt is empty"),
        (1, ["--prompt", "   "], "the prompt is empty"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(count, arguments, says, answer, folders):
    code, _, error = answer("--models", *folders[:count], *arguments)
    assert (code, says in error, error.strip().count("\n")) == (2, True, 0), error


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers_before_a_model_is_loaded(
    answer, folders, base, monkeypatch
):
    monkeypatch.setattr(checkpoint, "load_model", lambda *_: pytest.fail("a model was loaded"))
    tokenizer, context = checkpoint.load_tokenizer(base), json.loads((base.path / "config.json").read_text())
    prompt = "garden " * context["max_position_embeddings"]
    length = len(tokenizer(prompt).input_ids)
    code, _, error = answer("--models", *folders[:2], "--prompt", prompt)
    said = re.search(r"the prompt takes ([\d,]+) tokens and the context of \S+ holds ([\d,]+)", error)
    assert (code, error.strip().count("\n")) == (2, 0)
    found, holds = (int(number.replace(",", "")) for number in said.groups())
    assert (holds, length <= found <= length + 40) == (context["max_position_embeddings"], True)


def test_an_answer_that_is_cut_off_says_so(answer, folders):
    code, text, _ = answer("--models", *folders[:2], "--max-new-tokens", "1")
    assert code == 0
    assert "(cut off after 1 tokens: --max-new-tokens allows more)" in text


def test_a_folder_that_is_no_artefact_and_another_tokenizer_are_refused(answer, folders, base, tmp_path):
    code, _, error = answer("--models", tmp_path / "nothing")
    assert (code, "no artefact at" in error) == (2, True)

    def save(folder):
        tokenizer = checkpoint.load_tokenizer(base)
        tokenizer.add_tokens(["a-word-of-its-own"])
        tokenizer.save_pretrained(folder)

    about = {"base": {"name": "b", "sha256": ""}, "recipe": [], "format": "bf16"}
    stranger = artifacts.write_artifact("stranger", tmp_path, save, **about)
    code, _, error = answer("--models", folders[0], stranger.path)
    assert (code, "and stranger have different tokenizers" in error, error.strip().count("\n")) == (2, True, 0)
