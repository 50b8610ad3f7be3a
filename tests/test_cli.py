"""The command line: sizes, exit codes and one-line errors, on the committed tiny model."""

import json
import warnings

import pytest

from avalab import cli, experiment

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao's syntax warnings at its first import are not this file's question
    from avalab import quantize  # noqa: F401


@pytest.mark.parametrize(("size", "count"), [("80MB", 80_000_000), ("64MiB", 67_108_864), ("1.5kB", 1500), ("7", 7)])
def test_a_size_is_read_with_decimal_and_binary_units(size, count):
    assert cli.byte_count(size) == count


@pytest.mark.parametrize("size", ["", "MB", "80 elephants", "1.2.3MB"])
def test_what_is_no_size_is_refused_with_an_example(size):
    with pytest.raises(ValueError, match="write it like 80MB"):
        cli.byte_count(size)


def run(arguments, monkeypatch, capsys) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `avalab ARGUMENTS`."""
    monkeypatch.setattr("sys.argv", ["avalab", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return (stopped.value.code or 0, *capsys.readouterr())


def test_a_model_is_compressed_and_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment.Run, "artifacts_dir", tmp_path / "artifacts")
    out = tmp_path / "small"
    code, text, _ = run(["quantize", "--method", "nf4", "--profile", "smoke", "--out", out], monkeypatch, capsys)
    assert code == 0
    assert "smaller than tiny-llama" in text
    code, text, _ = run(["show", out], monkeypatch, capsys)
    assert code == 0
    assert "bitsandbytes" in text
    assert "embedding" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["quantize", "--method", "foo", "--out", "x"], "choose one of nf4"),
        (["quantize", "--method", "nf4", "--out", "x", "--profile", "desk"], "choose one of smoke"),
        (["quantize", "--method", "ava", "--bytes", "many", "--out", "x", "--profile", "smoke"], "80MB"),
        (["quantize", "--method", "rtn", "--out", "x", "--profile", "smoke", "--model", "nosuch"], "unknown model"),
        (["show", "nothing/here"], "no artefact at"),
        (["assets", "nosuch"], "nosuch"),
        (["synthesize", "--out", "x", "--kinds", "poem"], "choose of single_call"),
        (["synthesize", "--out", "x", "--overlap", "some"], "choose here, all or none"),
        (["synthesize", "--out", "x", "--teacher", "nothing/here"], "no artefact at"),
        (["synthesize", "--out", "x", "--teacher", "http://127.0.0.1:9/v1"], "needs --teacher-model"),
        (["prune", "--out", "x", "--method", "guess", "--profile", "smoke"], "sparsegpt"),
        (["prune", "--out", "x", "--method", "wanda", "--sparsity", "1", "--profile", "smoke"], "[0, 1)"),
        (["finetune", "--out", "x", "--method", "full"], "choose lora or qlora"),
        (["finetune", "--out", "x", "--profile", "smoke", "--target-modules", "experts"], "matches no linear layer"),
        (["finetune", "--out", "x", "--profile", "smoke", "--row-tokens", "8"], "no example fits into a row"),
        (["finetune", "--out", "x", "--data", "nothing/here"], "nothing/here"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, says, monkeypatch, capsys):
    code, _, error = run(arguments, monkeypatch, capsys)
    assert code == 2
    assert says in error
    assert error.count("\n") == 1


def test_examples_are_made_and_counted(tmp_path, monkeypatch, capsys):
    arguments = ["synthesize", "--count", "8", "--kinds", "single_call", "--overlap", "none", "--out", tmp_path]
    code, text, _ = run(arguments, monkeypatch, capsys)
    assert code == 0
    assert text.split()[:2] == ["accepted", "8"]
    assert "single_call.jsonl: 8 examples" in text
    assert "compared with no evaluation set" in text


def test_a_model_is_tuned_on_a_file_of_chats_and_merged(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment.Run, "artifacts_dir", tmp_path / "artifacts")
    line = {"kind": "instruction", "tools": [], "calls": []}
    chats = [[{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": str(n)}] for n in range(12)]
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(line | {"messages": chat}) + "\n" for chat in chats))
    arguments = ["finetune", "--profile", "smoke", "--data", data, "--out", tmp_path / "tuned", "--rank", "2"]
    code, text, _ = run(arguments, monkeypatch, capsys)
    assert code == 0
    assert "0 of 12 examples exceed" in text
    assert (tmp_path / "tuned" / "model.safetensors").is_file()


def test_a_model_is_pruned_scored_and_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment.Run, "artifacts_dir", tmp_path / "artifacts")
    arguments = ["prune", "--method", "magnitude", "--profile", "smoke", "--out", tmp_path / "sparse", "--benchmark"]
    code, text, _ = run(arguments, monkeypatch, capsys)
    assert code == 0
    assert "50.0% of the linear weights gone" in text
    assert "in the compressed layout" in text
    assert "predicted" in text
