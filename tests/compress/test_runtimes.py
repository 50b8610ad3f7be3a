"""Quantisers of inference engines: what they are asked for, what they are fed, and what is refused."""

import importlib.util
import subprocess

import pytest
import torch

from avalab import engines
from avalab.compress import libraries, quantize
from avalab.compress.libraries import Job
from avalab.models import checkpoint

has_llama_cpp = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is missing")


def test_onnx_runtimes_builder_is_asked_for_k_quant_and_its_failure_has_a_reason(base, run, monkeypatch):
    asked = []
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="first\nno such layer")
    monkeypatch.setattr(engines, "require", lambda *arguments: None)
    monkeypatch.setattr(subprocess, "run", lambda command, **options: asked.append(command) or failed)
    with pytest.raises(RuntimeError, match="the ONNX model builder failed on tiny-llama: no such layer"):
        libraries.onnx_k_quant(Job(base.path, "cpu", {}, [], None, out=run.artifacts_dir))
    assert asked[0][-2:] == ["algo_config=k_quant", "is_symmetric=false"]


def test_a_window_is_what_the_stateful_graph_reads():
    inputs = libraries._inputs(torch.tensor([5, 6, 7]))
    assert inputs["input_ids"].tolist() == [[5, 6, 7]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1]]
    assert inputs["beam_idx"].tolist() == [0]


@has_llama_cpp
def test_llama_cpp_writes_a_mixture_that_torch_reads(base, run):
    artifact = quantize.compress_artifact(base, "gguf-q4_k_m", run=run)
    assert artifact.card["measured"]["formats"]["q5_0"] > 0  # 256 does not divide the tiny model's rows
    weights = [checkpoint.load_model(a).get_submodule("model.layers.0.mlp.up_proj").weight for a in (base, artifact)]
    assert (weights[1] - weights[0]).norm() < 0.15 * weights[0].norm()


def test_a_layer_cannot_be_kept_out_of_an_engines_own_quantiser(base, run):
    with pytest.raises(ValueError, match="'nncf-int4' keeps no single layer in bf16; leave out skip"):
        quantize.compress_artifact(base, "nncf-int4", run=run, skip=("*.down_proj",))
