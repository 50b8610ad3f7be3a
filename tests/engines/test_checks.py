"""Exports compared with their source: numbers by pencil, and exports that compute another model keep nothing."""

import importlib.util
import json

import pytest
import torch

from avalab import engines
from avalab.engines import EngineUnavailable, checks, gguf, llamacpp, onnxruntime, openvino
from avalab.engines.checks import Check
from avalab.engines.engine import TINY
from avalab.lab import artifacts
from avalab.lab.errors import ProcessFailed
from avalab.measure import families
from avalab.models import checkpoint


def artifact_of(name: str, folder) -> artifacts.Artifact:
    """A tiny random family as an artefact."""
    about = {"base": {"name": "x", "sha256": "y"}, "recipe": [], "format": "bf16"}
    return artifacts.write_artifact(name, folder, lambda target: families.make_model(name, target) and None, **about)


def test_a_difference_is_measured_in_the_logits_own_spread():
    """Spread of (-1, 1) is 1; (-1.1, 1.1) is a tenth of it away, whatever is added to both."""
    expected, found = torch.tensor([[-1.0, 1.0]]), torch.tensor([[-1.1, 1.1]]) + 5
    assert checks.difference(found, expected) == pytest.approx(0.1, rel=1e-4)
    assert checks.difference(expected, expected) == 0


def test_a_token_that_the_tolerance_explains_is_counted_and_another_one_refused():
    """Logits 1 and 0.99 apart by less than 6 x 0.1 x their spread; 1 and -1 by more."""
    expected = torch.tensor([[1.0, 0.99, -1.0]])
    assert checks.agreeing(expected, [0], 0.1, name="x") == 1
    assert checks.agreeing(expected, [1], 0.1, name="x") == 0
    with pytest.raises(ProcessFailed, match=r"export of x computes another model: greedy token 1 is 2 and not 0"):
        checks.agreeing(expected, [2], 0.1, name="x")


def test_a_prompt_goes_past_the_original_context_where_positions_are_scaled(tmp_path):
    tokenizer = checkpoint.load_tokenizer(TINY)
    plain = checkpoint.load_model(families.make_model("llama", tmp_path / "plain"))
    scaled = checkpoint.load_model(families.make_model("llama-rope-yarn", tmp_path / "scaled"))
    scaled.config.rope_parameters["original_max_position_embeddings"] = 500
    assert len(checks.long_prompt(plain, tokenizer, 1000)) == checks.PROMPT
    assert len(checks.long_prompt(scaled, tokenizer, 1000)) == 500 + checks.TAIL
    assert len(checks.long_prompt(plain, tokenizer, 9)) == 9


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("llama-rope-yarn", "f16"),
        ("gemma3", "q4_0"),
        ("granite", "q8_0"),
        ("mistral-sliding", "q4_1"),
        ("gpt2", "q5_0"),
    ],
)
def test_a_gguf_file_of_a_family_is_checked_when_it_is_written(name, block, tmp_path):
    """With the source's numbers rounded in the same way nothing is left but the order of additions."""
    measured = gguf.write(artifact_of(name, tmp_path), block).card["measured"]
    assert measured["checked_in"] in ("torch", "llamacpp")
    if measured["checked_in"] == "torch":
        assert measured["logit_difference"] <= measured["logit_tolerance"] == checks.FLOOR


def turned_wrongly(name, tensor, config):
    return tensor


@pytest.mark.parametrize("block", ["f16", "q4_0"])
def test_an_export_whose_rows_are_in_another_order_keeps_nothing(block, tiny_artifact, monkeypatch):
    monkeypatch.setattr(gguf.gguf_layout, "file_value", turned_wrongly)
    with pytest.raises(ProcessFailed, match=r"the export of tiny computes another model: in .*nothing was kept"):
        gguf.write(tiny_artifact, block)
    assert [path.name for path in tiny_artifact.path.parent.iterdir() if "gguf" in path.name] == []


def test_an_export_with_a_matrix_left_out_keeps_nothing(tiny_artifact, monkeypatch, tmp_path):
    original = onnxruntime.trace_graph

    def spoilt(model):
        model.model.layers[0].mlp.down_proj.weight.data.zero_()
        return original(model)

    monkeypatch.setattr(onnxruntime, "trace_graph", spoilt)
    monkeypatch.setattr(onnxruntime, "TOLERANCE", float("inf"))
    with pytest.raises(ProcessFailed, match="computes another model: in onnxruntime its logits differ by"):
        onnxruntime.write_int8(tiny_artifact, "dynamic", out=tmp_path / "there")
    assert not (tmp_path / "there").exists()


def absent(folder, **options):
    raise EngineUnavailable("not here")


def test_an_engine_that_is_not_installed_leaves_the_check_to_the_next(tiny_artifact, made, monkeypatch):
    monkeypatch.setattr(llamacpp, "load", absent)
    model, tokenizer = checks.exact_model(tiny_artifact), checkpoint.load_tokenizer(TINY)
    found = checks.compare(model, tokenizer, made("gguf-f16"), Check({"llamacpp": "", "torch": ""}), name="tiny")
    assert found["checked_in"] == "torch"
    with pytest.raises(EngineUnavailable, match="not here"):
        checks.compare(model, tokenizer, made("gguf-f16"), Check({"llamacpp": ""}), name="tiny")


def test_every_exporter_says_in_the_card_what_its_check_found(tiny_artifact, tmp_path):
    """Of those whose libraries are here and fast."""
    wrote = [gguf.write(tiny_artifact, "q8_0")]
    if importlib.util.find_spec("openvino_genai"):
        wrote.append(openvino.write(tiny_artifact, "f16"))
    for artifact in wrote:
        told = json.loads((artifact.path / artifacts.CARD).read_text())["measured"]
        assert told["checked_in"] in engines.ENGINES
        assert told["logit_difference"] <= told["logit_tolerance"]
        assert told["checked_tokens"] == checks.PROMPT
        assert told["greedy_tokens"].endswith(f" of {checks.GREEDY}")
