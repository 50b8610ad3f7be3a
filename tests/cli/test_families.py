"""The matrix: what counts as which outcome, what survives a crash, when a cell is run again, and the table's form."""

import json
from types import SimpleNamespace

import pytest
import torch

from avalab.cli import families, family_cells
from avalab.cli.family_cells import VERBS, Differs, Subject, Verb, divergence
from avalab.engines import EngineUnavailable
from avalab.lab.errors import InputError, ProcessFailed
from avalab.measure.families import FAMILIES

BROKEN = """
import os, signal, time
from avalab.cli.family_cells import Verb

def works(subject): return f"{subject.family} in {subject.folder.name}"
def dies(subject): os.kill(os.getpid(), signal.SIGKILL)
def sleeps(subject): time.sleep(60)
def raises(subject): raise KeyError("no such layer")

TABLE = {f.__name__: Verb("use", f, (), 2) for f in (works, dies, sleeps, raises)} | {"after": Verb("use", works)}
"""


def raising(error):
    def run(subject):
        raise error

    return run


@pytest.mark.parametrize(
    ("run", "outcome", "line"),
    [
        (lambda subject: "KL 0", "works", "KL 0"),
        (raising(InputError("rwkv has no\n attention")), "refused", "rwkv has no attention"),
        (raising(EngineUnavailable("vllm is not installed")), "not here", "vllm is not installed"),
        (
            raising(ProcessFailed("export failed: exit status 1")),
            "defect",
            "ProcessFailed: export failed: exit status 1",
        ),
        (raising(KeyError("x")), "defect", "KeyError: 'x'"),
        (raising(FileNotFoundError("no config")), "defect", "FileNotFoundError: no config"),
        (raising(Differs("1.2 nats")), "defect", "Differs: 1.2 nats"),
    ],
)
def test_an_error_of_the_labs_own_is_a_refusal_and_any_other_is_a_defect(run, outcome, line, tmp_path):
    found = families.outcome(Verb("use", run), Subject("rwkv", tmp_path, tmp_path))
    assert (found["outcome"], found["line"]) == (outcome, line)


def test_a_line_holds_no_path_of_this_machine(tmp_path):
    verb = Verb("use", raising(InputError(f"{tmp_path}/model is odd, see {families.ROOT}/README.md")))
    assert families.outcome(verb, Subject("x", tmp_path, tmp_path))["line"] == "model is odd, see README.md"


def test_a_cell_that_is_killed_or_too_late_is_a_defect_and_the_rest_goes_on(tmp_path, monkeypatch):
    (tmp_path / "broken_verbs.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    found = {}
    names = ["works", "dies", "sleeps", "raises", "after"]
    families.run_family("llama", names, found.__setitem__, table="broken_verbs:TABLE")
    assert list(found) == names
    assert {name: cell["outcome"] for name, cell in found.items()} == {
        **{"works": "works", "dies": "defect", "sleeps": "defect", "raises": "defect", "after": "works"}
    }
    assert found["after"]["line"] == "llama in model"
    assert "SIGKILL" in found["dies"]["line"]
    assert found["sleeps"]["line"] == "took longer than 2 s"
    assert found["raises"]["line"] == "KeyError: 'no such layer'"


def test_only_what_is_missing_changed_or_was_not_here_is_run_again(tmp_path, monkeypatch):
    ran = []

    def run_family(name, verbs, keep):
        ran.append((name, list(verbs)))
        for verb in verbs:
            keep(verb, {"outcome": "not here" if verb == "vllm" else "works", "line": "", "seconds": 1.0})

    codes = {"load": "a", "chat": "a", "vllm": "a"}
    monkeypatch.setattr(families, "run_family", run_family)
    monkeypatch.setattr(families, "code_key", lambda name, verb: codes[verb])
    for _ in range(2):
        families.run_matrix(["llama"], list(codes), tmp_path, say=lambda line: None)
    codes["chat"] = "b"
    families.run_matrix(["llama"], list(codes), tmp_path, say=lambda line: None)
    assert [verbs for _, verbs in ran] == [["load", "chat", "vllm"], ["vllm"], ["chat", "vllm"]]
    kept = json.loads((tmp_path / "llama.json").read_text())
    assert list(kept["cells"]) == ["load", "chat", "vllm"]
    assert kept["cells"]["chat"] == {"outcome": "works", "line": "", "seconds": 1.0, "code": "b"}


def test_a_row_takes_over_the_slow_cells_of_the_row_whose_weights_it_has(tmp_path, monkeypatch):
    ran = []

    def run_family(name, verbs, keep):
        for verb in verbs:
            ran.append((name, verb))
            keep(verb, {"outcome": "works", "line": "KL 0", "seconds": 9.0})

    monkeypatch.setattr(families, "run_family", run_family)
    monkeypatch.setattr(families, "code_key", lambda name, verb: f"{name} {verb}")
    families.run_matrix(["llama", "folder-of-links"], ["load", "aot"], tmp_path, say=lambda line: None)
    assert ran == [("llama", "load"), ("llama", "aot"), ("folder-of-links", "load")]
    taken = json.loads((tmp_path / "folder-of-links.json").read_text())["cells"]["aot"]
    assert taken["line"] == "KL 0; taken over from llama, whose weights are the same"
    assert taken["code"] == "folder-of-links aot"
    monkeypatch.setattr(families, "code_key", lambda name, verb: f"{name} {verb} changed")
    families.run_matrix(["folder-of-links"], ["aot"], tmp_path, say=lambda line: None)
    assert ran[-1] == ("folder-of-links", "aot"), "what is stale is not taken over"


@pytest.mark.parametrize("name", [name for name, row in FAMILIES.items() if row.same_weights_as])
def test_the_base_of_such_a_row_has_the_other_rows_tensors(name, family_model, tmp_path, monkeypatch):
    monkeypatch.setenv("AVALAB_ARTIFACTS", str(tmp_path))
    rows = (name, FAMILIES[name].same_weights_as)
    one, other = (Subject(row, family_model(row), tmp_path).base.path / "model.safetensors" for row in rows)
    assert one.read_bytes() == other.read_bytes()


def test_a_cells_key_depends_on_its_row_and_its_parameters():
    keys = [
        families.code_key(*pair) for pair in (("llama", "prune 2:4"), ("qwen2", "prune 2:4"), ("llama", "prune 4:8"))
    ]
    assert len(set(keys)) == 3


def test_globs_choose_families_and_verbs_and_an_unknown_one_is_refused():
    assert families.chosen("") == (list(families.FAMILIES), list(VERBS))
    assert families.chosen("gemma*, prune ?:?") == (["gemma2", "gemma3"], ["prune 2:4", "prune 4:8"])
    assert families.chosen("gguf q8_0 openvino")[1] == ["gguf q8_0, openvino"]
    with pytest.raises(ValueError, match=r"'warp' fits no family \(llama, .* and no verb \(load; "):
        families.chosen("llama,warp")


def test_the_table_counts_outcomes_and_quotes_each_line_once():
    refused = {"outcome": "refused", "line": "no *such* layer"}
    cells = {
        "llama": {"load": {"outcome": "works", "line": "KL 0; context 32"}, "chat": refused},
        "gpt2": {"load": refused, "chat": {"outcome": "defect", "line": "KeyError: 'x'"}},
    }
    lines = families.table(cells, {"torch": "2.0"}).splitlines()
    assert "| Load, evaluate, chat, train | 1 | 2 | 0 | 1 |" in lines
    assert "| family | load | eval | chat | finetune | finetune qlora | distill |" in lines
    assert "| llama | works 1 |  | refused 2 |  |  |  |" in lines
    assert "| gpt2 | refused 2 |  | **defect** 3 |  |  |  |" in lines
    assert lines[-3:] == ["1. works: context 32", "2. refused: no \\*such\\* layer", "3. defect: KeyError: 'x'"]
    assert "With torch 2.0." in lines


def test_a_divergence_is_that_of_the_shared_words_and_refuses_what_is_not_finite():
    reference = torch.tensor([[0.0, 0.0]])
    assert divergence(reference, torch.tensor([[0.0, 0.0, 9.0]])) == 0
    # p = 1/2, 1/2; q = 3/4, 1/4: KL = ln(2/3)/2 + ln(2)/2
    found = divergence(reference, torch.log(torch.tensor([[0.75, 0.25]])))
    assert found == pytest.approx(0.14384, abs=1e-5)
    with pytest.raises(Differs, match="not finite"):
        divergence(reference, torch.tensor([[0.0, float("nan")]]))


def test_a_greedy_token_far_behind_the_references_best_is_a_defect(monkeypatch, tmp_path):
    """One token of 12 is 2 logits behind the best, of logits whose deviation is 2 * sqrt(1023) / 1024."""
    subject = Subject("x", tmp_path, tmp_path)
    logits = torch.zeros(len(subject.prompt) + 12, 1024)
    logits[:, 7] = 2.0
    monkeypatch.setattr(Subject, "reference", lambda self, tokens: logits)

    def opened(tokens):
        facts = SimpleNamespace(context=512)
        engine = SimpleNamespace(generate=lambda *_, **__: tokens, all_logits=None, close=lambda: None, facts=facts)
        return lambda *_: engine

    monkeypatch.setattr(family_cells.engines, "load", opened([7] * 12))
    assert family_cells._in_engine(subject, tmp_path, "torch", 0.01) == "12 tokens"
    monkeypatch.setattr(family_cells.engines, "load", opened([7] * 4 + [8] + [7] * 7))
    with pytest.raises(Differs, match=r"greedy token 5 is 32 deviations behind"):
        family_cells._in_engine(subject, tmp_path, "torch", 0.01)


FEW = ("load", "eval", "chat", "gguf q8_0, openvino", "quantize nf4", "quantize rtn", "prune 2:4")


@pytest.mark.filterwarnings("ignore")  # other people's, of every library that a verb meets
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_a_family_goes_through_the_verbs(family, family_model, tmp_path, monkeypatch):
    monkeypatch.setenv("AVALAB_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.setenv("AVALAB_DEVICE", "cpu")
    subject = Subject(family, family_model(family), tmp_path)
    cells = {name: families.outcome(VERBS[name], subject) for name in FEW}
    assert {name: cell for name, cell in cells.items() if cell["outcome"] == "defect"} == {}
    assert [name for name in ("load", "eval", "chat", "quantize nf4") if cells[name]["outcome"] != "works"] == []
