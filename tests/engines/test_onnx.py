"""ONNX Runtime GenAI: folders of its own builder against transformers in float32, and what is refused."""

import json
import subprocess

import pytest
import torch

from avalab import engines
from avalab.engines import onnx as genai_folder
from avalab.engines.engine import TINY
from avalab.lab.run import ROOT
from avalab.models.stops import stop_tokens


@pytest.mark.needs("onnxruntime_genai")
def test_onnx_in_float32_has_the_tokens_and_logits_of_transformers(made, prompt, reference):
    """Same weights, 32 bits throughout: logits within 1e-3, tokens equal."""
    ours, theirs = engines.load("onnx", made("onnx-fp32"), threads=1), reference(TINY)
    torch.testing.assert_close(ours.logits(prompt), theirs.logits(prompt), atol=1e-3, rtol=0)
    assert ours.generate(prompt, 32, past_end=True) == theirs.generate(prompt, 32, past_end=True)


@pytest.mark.needs("onnxruntime_genai")
def test_onnx_int8_is_close_to_its_dense_model(made, prompt, divergence, reference):
    engine = engines.load("onnx", made("onnx-int8"), threads=1)
    assert divergence(engine.logits(prompt), reference(TINY).logits(prompt)) < 0.005


@pytest.mark.needs("onnxruntime_genai")
def test_a_graph_says_of_its_producer_the_installed_release_and_nothing_of_where_it_was_made(made):
    """The builder asks git for the revision of whatever repository it is installed below."""
    import onnx
    import onnxruntime_genai

    here = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout[:7] or "none"
    version = onnx.load(made("onnx-fp32") / "model.onnx", load_external_data=False).producer_version
    assert version.startswith(onnxruntime_genai.__version__)
    assert here not in version


@pytest.mark.needs("onnxruntime_genai")
@pytest.mark.needs("onnxruntime_genai")
def test_a_folder_of_genai_stops_where_the_lab_stops(made):
    told = json.loads((made("onnx-fp32") / "genai_config.json").read_text())["model"]
    assert told["eos_token_id"] == list(stop_tokens(made("onnx-fp32")))


def test_onnx_refuses_a_graph_that_is_damaged(made, tmp_path):
    for path in made("onnx-fp32").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:5000] if path.suffix == ".onnx" else path.read_bytes())
    with pytest.raises(ValueError, match="ONNX Runtime cannot read"):
        engines.load("onnx", tmp_path)


def test_unknown_weights_for_an_export_are_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"no weights 'int3' for ONNX Runtime GenAI; choose one of fp32, int8, int4"):
        genai_folder.export(TINY, tmp_path, "int3")
