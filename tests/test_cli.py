"""The command line: sizes, exit codes and one-line errors, on the committed tiny model."""

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
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, says, monkeypatch, capsys):
    code, _, error = run(arguments, monkeypatch, capsys)
    assert code == 2
    assert says in error
    assert error.count("\n") == 1
