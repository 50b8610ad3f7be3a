"""The command line: sizes, exit codes and one-line errors, on the committed tiny model."""

import io
import json
import re
import subprocess
import sys
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avalab.cli import compress, options
from avalab.data import sources, synthesize
from avalab.lab import run as lab_run
from avalab.lab.errors import InputError
from avalab.measure import answers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao's syntax warnings at its first import are not this file's question
    from avalab import engines
    from avalab.compress import ava, ava_targets, equivalence, patterns, quantize, saliency
    from avalab.engines import aot, executorch, gguf, llamacpp, onnx, onnxruntime, openvino, tensorrt
    from avalab.models import checkpoint
    from avalab.serve import chat, ensemble

ROOT = lab_run.ROOT
CHATS = ROOT / "data" / "synthetic_datasets" / "instruction.jsonl"  # the smallest of the lab's own files
DISTILL = ["distill", "--teacher", "x", "--student", "y", "--out", "z"]
FINETUNE = ["finetune", "--out", "x", "--profile", "smoke"]


@pytest.mark.parametrize(("size", "count"), [("80MB", 80_000_000), ("64MiB", 67_108_864), ("1.5kB", 1500), ("7", 7)])
def test_a_size_is_read_with_decimal_and_binary_units(size, count):
    assert compress.byte_count(size) == count


@pytest.mark.parametrize("size", ["", "MB", "80 elephants", "1.2.3MB"])
def test_what_is_no_size_is_refused_with_an_example(size):
    with pytest.raises(ValueError, match="write it like 80MB"):
        compress.byte_count(size)


UNITS = {"": 1, "B": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3, "KiB": 1024, "MiB": 1024**2, "gib": 1024**3}


@given(count=st.integers(1, 10**6), unit=st.sampled_from(sorted(UNITS)))
def test_whole_numbers_of_every_unit_are_counted_exactly(count, unit):
    assert compress.byte_count(f"{count}{unit}") == count * UNITS[unit]


@given(size=st.text(max_size=12) | st.from_regex(r"[-+.0-9e]{1,8}[KMGiB]{0,3}", fullmatch=True))
def test_any_text_is_a_positive_number_of_bytes_or_refused_in_one_line(size):
    try:
        found, said = compress.byte_count(size, 1), ""
    except InputError as error:
        found, said = 1, str(error)
    assert found >= 1
    assert len(said.splitlines()) <= 1


def test_a_model_is_compressed_and_shown(tmp_path, monkeypatch, avalab):
    monkeypatch.setattr(lab_run.Run, "artifacts_dir", tmp_path / "artifacts")
    out = tmp_path / "small"
    code, text, _ = avalab("quantize", "--method", "nf4", "--profile", "smoke", "--out", out)
    assert code == 0
    assert "smaller than tiny-llama" in text
    code, text, _ = avalab("show", out)
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
        (["synthesize", "--out", "x", "--kinds", "poem"], "choose one of single_call"),
        (["synthesize", "--out", "x", "--overlap", "some"], "choose here, all or none"),
        (["synthesize", "--out", "x", "--teacher-model", "m"], "--teacher-model m is of no teacher"),
        (["synthesize", "--out", ROOT / "README.md"], "is a file; name a folder"),
        (["synthesize", "--out", ROOT], "holds README.md that this command did not make"),
        (["synthesize", "--out", "x", "--teacher", "nothing/here"], "no artefact at"),
        (["synthesize", "--out", "x", "--teacher", "http://127.0.0.1:9/v1"], "needs --teacher-model"),
        (["prune", "--out", "x", "--method", "guess", "--profile", "smoke"], "sparsegpt"),
        (["prune", "--out", "x", "--method", "wanda", "--sparsity", "1", "--profile", "smoke"], "[0, 1)"),
        (["export", "nothing/here", "--to", "onnx", "--out", "x"], "no artefact at"),
        (["finetune", "--out", "x", "--method", "full"], "choose lora or qlora"),
        ([*FINETUNE, "--data", CHATS, "--target-modules", "experts"], "matches no linear layer"),
        ([*FINETUNE, "--data", CHATS, "--row-tokens", "8"], "no example fits into a row"),
        (["finetune", "--out", "x", "--data", "nothing/here"], "nothing/here"),
        ([*FINETUNE, "--rank", "0"], "rank is 0; it has to be 1 or more"),
        ([*FINETUNE, "--epochs", "0"], "number of epochs is 0; it has to be above 0"),
        ([*FINETUNE, "--epochs", "nan"], "number of epochs is nan"),
        ([*FINETUNE, "--alpha", "0"], "alpha is 0; it has to be above 0"),
        ([*FINETUNE, "--dropout", "1"], "dropout is 1; it has to be 0 or more and below 1"),
        ([*FINETUNE, "--learning-rate", "1e9"], "learning rate is 1e+09; it has to be above 0 and at most 1"),
        ([*FINETUNE, "--learning-rate", "-1"], "learning rate is -1"),
        ([*FINETUNE, "--learning-rate", "nan"], "learning rate is nan"),
        ([*FINETUNE, "--row-tokens", "0"], "number of tokens in a row is 0"),
        ([*FINETUNE, "--rehearsal", "nan"], "rehearsal is nan; it has to be 0 or more and at most 1"),
        ([*FINETUNE, "--limit", "-1"], "limit is -1"),
        ([*FINETUNE, "--target-modules", ""], "no target modules"),
        ([*DISTILL, "--temperature", "0"], "temperature is 0; it has to be above 0"),
        ([*DISTILL, "--temperature", "inf"], "temperature is inf"),
        ([*DISTILL, "--hidden", "-1"], "weights of kl, cross_entropy, hidden and attention are 1, 0, -1, 0"),
        ([*DISTILL, "--count", "256"], "number of entries a token is 256"),
        ([*DISTILL, "--targets", "topk", "--reverse", "0.5"], "'topk' targets know forward divergence only"),
        ([*DISTILL, "--data", "nothing/here"], "no examples at nothing/here"),
        (["recover", "nothing/here", "--out", "x", "--learning-rate", "2"], "learning rate is 2"),
        (["finetune", "--out", "tests", "--profile", "smoke"], "is not an artefact; name a new folder"),
        (["eval", "nothing/here"], "no artefact at"),
        (["chat", "nothing/here"], "no artefact at"),
        (["chat", "nothing/here", "--tools", "LICENSE"], "LICENSE is not JSON"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, says, avalab):
    code, _, error = avalab(*arguments)
    assert code == 2
    assert says in error
    assert error.count("\n") == 1


QUICK = [
    ["--help"],
    ["quantize", "--help"],
    ["quantize", "--method", "foo", "--out", "x"],
    ["quantize", "--method", "rtn", "--bits", "9", "--out", "x"],
    ["quantize", "--method", "rtn", "--out", "x", "--profile", "desk"],
    ["quantize", "--method", "rtn", "--out", "x", "--model", "nosuch"],
    ["prune", "--method", "guess", "--out", "x"],
    ["prune", "--method", "wanda", "--sparsity", "1", "--out", "x"],
    ["recover", "nothing/here", "--out", "x"],
    ["recover", "nothing/here", "--out", "x", "--kind", "luck"],
    ["export", "nothing/here", "--to", "rtf", "--out", "x"],
    ["export", "nothing/here", "--to", "gguf", "--weights", "int3", "--out", "x"],
    ["compile", "--out", "x", "--weights", "int3"],
    ["tensorrt", "--precision", "fp12"],
    ["show", "nothing/here"],
    ["bench", "nothing/here"],
    ["bench", "nothing/here", "--engine", "steam"],
    ["eval", "nothing/here", "--mode", "mumble"],
    ["compare", "nothing/here", "nothing/there", "--task", "looks"],
    ["synthesize", "--out", "x", "--kinds", "poem"],
    *(["finetune", "--out", "x", *wrong] for wrong in (["--rank", "0"], ["--epochs", "0"], ["--learning-rate", "1e9"])),
    ["finetune", "--out", "x", "--data", "nothing/here"],
    *(["align", "--out", "x", *wrong] for wrong in (["--loss", "kto"], ["--beta", "0"], ["--data", "nothing/here"])),
    ["align", "--out", "x", "--data", "README.md", "--ratings", "tests"],
    ["align", "--out", "x", "--ratings", "tests", "--criterion", "charm"],
    ["distill", "--teacher", "http://127.0.0.1:9/v1", "--student", "x", "--out", "y"],
    ["ensemble", "--models", "nothing/here", "--prompt", "hello", "--method", "shout"],
    ["ensemble", "--models", "nothing/here", "--prompt", " "],
    ["ensemble", "--models", "nothing/here", "--prompt", "hello", "--method", "weighted", "--weights", "half"],
    ["chat", "nothing/here"],
    ["chat", "data/tiny-llama", "--mode", "forced"],
    ["chat", "LICENSE"],
    ["bench", "tests"],
    ["bench", "data/tiny-lama"],
    ["bench", "data/tiny-llama", "--engine", "warpdrive"],
    ["bench", "data/tiny-llama", "--profile", "desk"],
    ["bench", "data/tiny-llama", "--threads", "many"],
    ["eval", "data/tiny-llama", "--tasks", "bfcll"],
    ["eval", "data/tiny-llama", "--tasks", ","],
    ["eval", "data/tiny-llama", "--engine", "steam"],
    ["compare", "data/tiny-llama", "data/tiny-lama"],
    ["compare", "data/tiny-llama", "data/tiny-llama", "--mode", "loud"],
    ["compare", "data/tiny-llama", "data/tiny-llama", "--task", "speed", "--engine", "steam"],
    ["export", "data/tiny-llama", "--to", "onnx", "--weights", "int3", "--out", "x"],
    ["quantize", "--model", "data/tiny-lama", "--method", "rtn", "--out", "x"],
    ["quantise", "--method", "rtn"],
    ["bench"],
    ["bench", "--engin", "torch"],
]
IMPORTED = """import contextlib, io, json, sys, time
from avalab import cli
found = []
for arguments in json.loads(sys.argv[1]):
    sys.argv, told, said, started = ["avalab", *arguments], io.StringIO(), io.StringIO(), time.process_time()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(told):
        try:
            cli.main()
        except SystemExit as stopped:
            code = stopped.code or 0
    heavy = [name for name in ("torch", "transformers", "matplotlib", "scipy", "pandas") if name in sys.modules]
    found.append([code, told.getvalue(), said.getvalue(), heavy, time.process_time() - started])
print(json.dumps(found))"""


def test_help_and_refusals_that_need_no_model_are_one_quick_line_without_torch():
    """In one process, one after the other: what an earlier command imported would show in the later ones."""
    done = subprocess.run([sys.executable, "-c", IMPORTED, json.dumps(QUICK)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for arguments, (code, told, said, heavy, seconds) in zip(QUICK, json.loads(done.stdout), strict=True):
        shown = f"avalab {' '.join(arguments)}: {said}"
        assert not heavy, f"{shown} imports {', '.join(heavy)}"
        assert seconds < 3, f"{shown} takes {seconds:.1f} s of the processor"
        if "--help" in arguments:
            assert (code, said) == (0, "")
        else:
            assert (code, told, said[:8], said.count("\n"), said[-1]) == (2, "", "avalab: ", 1, "\n"), shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bench", "data/tiny-lama"], "did you mean 'tiny-llama'?"),
        (["quantize", "--model", "data/tiny-lama", "--method", "rtn", "--out", "x"], "did you mean 'tiny-llama'?"),
        (["quantize", "--method", "gptk", "--out", "x"], "did you mean 'gptq'?"),
        (["bench", "data/tiny-llama", "--engine", "openvin"], "did you mean 'openvino'?"),
        (["eval", "data/tiny-llama", "--tasks", "bfcll"], "choose of bfcl, humaneval; did you mean 'bfcl'?"),
        (["benhc"], "Did you mean 'bench'?"),
        (["bench", "data/tiny-llama", "--engin", "torch"], "--engine"),
    ],
)
def test_what_is_misspelt_is_answered_with_the_name_that_was_meant(arguments, says, avalab, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, _, error = avalab(*arguments)
    assert (code, error.count("\n")) == (2, 1)
    assert says in error


def test_names_that_are_refused_without_torch_are_those_of_the_tables():
    assert {name: tuple(row.defaults) for name, row in quantize.METHODS.items()} == options.METHODS
    assert {name: tuple(values) for name, values in quantize.CHOICES.items()} == options.CHOICES
    assert {name: set(values) for name, values in options.AVA_CHOICES.items()} == {
        "format": ava_targets.TARGETS.keys(),
        "embedding": set(ava.EMBEDDINGS),
        "engine": ava_targets.GGUF_TYPES.keys(),
        "transform": set(equivalence.TRANSFORMS),
    }
    assert set(options.SCORES) == saliency.SCORES.keys()
    assert set(options.PATTERNS) == patterns.PATTERNS.keys()
    assert set(options.ENGINES) == engines.ENGINES.keys()
    assert set(options.CALL_MODES) == answers.MODES.keys()
    assert options.CHAT_MODES == chat.MODES
    assert (options.POOLS, options.VOTES) == (ensemble.POOLS, ensemble.VOTES)
    assert options.KINDS == synthesize.ALL_KINDS
    assert tuple(sources.SOURCES) == options.SOURCES
    assert options.SET_MAKER == synthesize.MAKER
    assert options.EMBEDDED == checkpoint.EMBEDDED


def test_weights_that_an_export_takes_are_those_of_its_engine():
    rows = {name: set(row.weights) for name, row in compress.EXPORTERS.items()}
    assert rows["onnx"] == {*onnxruntime.WEIGHTS, "int8", onnx.KEPT}
    assert rows["onnx-genai"] == {*onnx.WEIGHTS, onnx.KEPT}
    assert rows["gguf"] == {*gguf.BLOCKS, gguf.KEPT, *llamacpp.MIXTURES}
    assert rows["openvino"] == set(openvino.WEIGHTS)
    assert rows["executorch"] == set(executorch.WEIGHTS)
    assert rows["aot"] == aot.DTYPES.keys()
    assert set(compress.PRECISIONS) == tensorrt.PRECISIONS.keys()


def test_examples_are_made_and_counted(tmp_path, avalab):
    arguments = ["synthesize", "--count", "8", "--kinds", "single_call", "--overlap", "none", "--out", tmp_path]
    code, text, _ = avalab(*arguments)
    assert code == 0
    assert text.split()[:2] == ["accepted", "8"]
    assert "single_call.jsonl: 8 examples" in text
    assert "compared with no evaluation set" in text


def test_a_model_is_tuned_on_a_file_of_chats_and_merged(tmp_path, monkeypatch, avalab):
    monkeypatch.setattr(lab_run.Run, "artifacts_dir", tmp_path / "artifacts")
    line = {"kind": "instruction", "tools": [], "calls": []}
    chats = [[{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": str(n)}] for n in range(12)]
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(line | {"messages": chat}) + "\n" for chat in chats))
    arguments = ["finetune", "--profile", "smoke", "--data", data, "--out", tmp_path / "tuned", "--rank", "2"]
    code, text, _ = avalab(*arguments)
    assert code == 0
    assert (tmp_path / "tuned" / "model.safetensors").is_file()
    examples, rehearsed = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:tokens of|of rehearsal)", text))
    assert rehearsed == int(0.25 * examples)
    code, text, _ = avalab(*arguments[:-4], "--out", tmp_path / "bare", "--rehearsal", "0")
    assert code == 0
    assert " 0 of rehearsal" in text
    recipes = [json.loads((tmp_path / name / "card.json").read_text())["recipe"] for name in ("tuned", "bare")]
    assert [recipe[-2]["rehearsal_tokens"] for recipe in recipes] == [rehearsed, 0]


@pytest.fixture
def tiny(base):
    """The folder of the tiny model's artefact; commands put their own beside it."""
    return base.path


def test_an_artefact_is_asked_and_its_errors_and_speed_are_recorded(tiny, avalab):
    arguments = ["eval", tiny, "--tasks", "bfcl,humaneval", "--profile", "smoke", "--limit", "2", "--json"]
    code, text, _ = avalab(*arguments)
    assert code == 0
    records = {record["metric"]: record for record in json.loads(text)}
    assert records["call_accuracy_grammar:toolbox_multiple"]["n"] == 2
    assert records["call_accuracy_grammar:toolbox_multiple"]["details"]["items_per_s"] > 0
    assert {"irrelevance_accuracy:toolbox_irrelevance", "pass_at_1"} <= records.keys()


def test_an_artefact_is_not_distinguishable_from_itself(tiny, avalab):
    code, text, _ = avalab("compare", tiny, tiny, "--profile", "smoke", "--limit", "2")
    assert code == 0
    assert text.splitlines()[-1].startswith("all")
    assert all("not distinguishable: 0 of" in line for line in text.splitlines())


def test_a_chat_in_the_terminal_answers_and_ends_with_quit(tiny, tmp_path, monkeypatch, avalab):
    tool = {"name": "ways", "description": "Ways to choose.", "callable": "math:comb"}
    tool["parameters"] = {"type": "object", "properties": {"n": {"type": "integer"}, "k": {"type": "integer"}}}
    (tmp_path / "tools.json").write_text(json.dumps([tool]))
    monkeypatch.setattr("sys.stdin", io.StringIO("How many ways are there to choose 2 of 5?\n/quit\n"))
    code, text, _ = avalab("chat", tiny, "--tools", tmp_path / "tools.json")
    assert code == 0
    assert "with ways. /quit or Ctrl-D ends." in text


def test_a_model_is_pruned_scored_and_timed(tmp_path, monkeypatch, avalab):
    monkeypatch.setattr(lab_run.Run, "artifacts_dir", tmp_path / "artifacts")
    arguments = ["prune", "--method", "magnitude", "--profile", "smoke", "--out", tmp_path / "sparse", "--benchmark"]
    code, text, _ = avalab(*arguments)
    assert code == 0
    assert "50.0% of the linear weights gone" in text
    assert "in the compressed layout" in text
    assert "predicted" in text
    assert "times the best dense one's time" in text


def test_a_pruned_model_without_a_folder_is_named_by_its_recipe(tmp_path, monkeypatch, avalab):
    monkeypatch.setattr(lab_run.Run, "artifacts_dir", tmp_path)
    recipe = ("--method", "magnitude", "--pattern", "2:4", "--target-modules", "mlp", "--target-modules", "q_proj")
    code, _, _ = avalab("prune", "--model", "data/tiny-llama", "--profile", "smoke", *recipe)
    assert code == 0
    assert len(list(tmp_path.glob("tiny-llama+magnitude-2of4-only16.*"))) == 1


def test_an_artefact_is_exported_by_its_formats_row_in_the_table(tmp_path, monkeypatch, avalab):
    monkeypatch.setattr(lab_run.Run, "artifacts_dir", tmp_path)
    base = checkpoint.base_artifact(lab_run.Run("t", "smoke"))
    row = compress.Exporter("{0.name} to {1.name} as {2}".format, ("packed",))
    monkeypatch.setitem(compress.EXPORTERS, "other", row)
    arguments = ["export", base.path, "--to", "other", "--out", tmp_path / "there", "--weights", "packed"]
    assert avalab(*arguments)[:2] == (0, "tiny-llama to there as packed\n")
    code, _, error = avalab("export", base.path, "--to", "rtf", "--out", "x")
    assert code == 2
    assert "unknown format 'rtf'; choose one of onnx" in error
