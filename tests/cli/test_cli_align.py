"""`avalab align`: pairs from a file, from people's scores and from own mistakes, and one line for what is wrong."""

import json

import pytest
from transformers import AutoModelForCausalLM  # noqa: F401  its warnings come before the package's type checks

from avalab.cli import align as command
from avalab.lab import artifacts
from avalab.lab import run as lab_run
from avalab.measure import people

TINY = lab_run.ROOT / "data" / "tiny-llama"
SMALL = ["--profile", "smoke", "--rank", "2", "--row-tokens", "256"]


@pytest.fixture
def run(monkeypatch, avalab, tmp_path):
    """Exit code, standard output and standard error of `avalab align ARGUMENTS`."""
    monkeypatch.setattr(lab_run.Run, "artifacts_dir", tmp_path / "artifacts")
    return lambda *arguments: avalab("align", "--model", TINY, *SMALL, *arguments)


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Say {n}", "chosen": f"It is {n}.", "rejected": "No."} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("loss", ["dpo", "ipo", "cdpo"])
def test_pairs_of_a_file_make_a_merged_model_and_say_what_was_learned(run, pairs, tmp_path, loss):
    code, text, error = run("--data", pairs, "--loss", loss, "--out", tmp_path / "better")
    assert code == 0, error
    found = artifacts.load_artifact(tmp_path / "better")
    assert found.format == "bf16"
    assert found.card["recipe"][-2]["step"] == "align"
    assert "18 pairs to learn from, 2 held out" in text
    assert "pairs ranked right" in text
    assert "nats/pair" in text


def test_scores_of_people_are_pairs(run, tmp_path):
    asked = people.load_prompts(2)
    texts = {"a": ["good", "fine"], "b": ["bad", "poor"]}
    sheet = people.make_sheet(tmp_path / "form", asked, texts, {})
    for prompt in sheet["prompts"]:
        scores = {}
        for answer, text in prompt["answers"].items():
            value = 5 if text in texts["a"] else 2
            scores[answer] = dict.fromkeys(people.criteria_of(prompt), value)
        people.store_preference(tmp_path / "form", prompt, "me", scores)
    code, text, error = run("--ratings", tmp_path / "form", "--row-tokens", "600", "--out", tmp_path / "better")
    assert code == 0, error
    assert "2 pairs to learn from, 0 held out" in text


def test_criteria_are_those_of_the_review_form():
    assert tuple(people.CRITERIA) == command.CRITERIA


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "hi", "chosen": "a", "rejected": "a"}', "equal"),
        ('{"prompt": "hi", "chosen": "a<|eot_id|>", "rejected": "b"}', "another tokenizer"),
        ('{"prompt": "' + "word " * 400 + '", "chosen": "a", "rejected": "b"}', "none of 1 pairs fits"),
        ("{", "not JSON"),
    ],
)
def test_a_bad_pair_ends_with_one_line(run, tmp_path, line, said):
    (tmp_path / "bad.jsonl").write_text(line + "\n")
    code, _, error = run("--data", tmp_path / "bad.jsonl", "--out", tmp_path / "better")
    assert (code, said in error, error.strip().splitlines()[-1].startswith("avalab: ")) == (2, True, True), error
    assert not (tmp_path / "better").exists()


def test_a_folder_without_a_sheet_is_no_review_form(run, tmp_path):
    code, _, error = run("--ratings", tmp_path, "--out", tmp_path / "better")
    assert (code, "holds no sheet.json" in error) == (2, True), error
