"""ONNX files: every layout of zeros is executed to the model's logits, weighs what it should, or is refused."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from avalab.compress import prune
from avalab.engines import EngineUnavailable
from avalab.engines import onnxruntime as onnxruntime_engine
from avalab.lab import artifacts
from avalab.lab.artifacts import Artifact
from avalab.models import checkpoint

missing = [name for name in onnxruntime_engine.PACKAGES if importlib.util.find_spec(name) is None]
with_onnx = pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}: pip install 'avalab[onnx]'")
TOKENS = torch.arange(21).view(3, 7)


@pytest.fixture(scope="module")
def pruned(run, base) -> Artifact:
    """The tiny base with half of its linear weights gone."""
    return prune.prune_artifact(base, "magnitude", run=run, sparsity=0.5)


@pytest.fixture(scope="module")
def model(pruned) -> PreTrainedModel:
    return checkpoint.load_model(pruned, dtype=torch.float32)


@pytest.fixture(scope="module")
def traced(model):
    """The traced graph; tracing takes the longest, so it is done once and copied."""
    return onnxruntime_engine.graph(model)


@pytest.fixture(scope="module")
def files(traced, tmp_path_factory) -> dict[str, Path]:
    """The same graph, stored in each way."""
    import onnx

    folder = tmp_path_factory.mktemp("onnx")
    for weights in onnxruntime_engine.WEIGHTS:
        proto = copy.deepcopy(traced)
        onnxruntime_engine.store(proto, weights)
        onnx.checker.check_model(proto)
        onnx.save_model(proto, folder / f"{weights}.onnx")
    return {weights: folder / f"{weights}.onnx" for weights in onnxruntime_engine.WEIGHTS}


@with_onnx
@pytest.mark.parametrize("weights", onnxruntime_engine.WEIGHTS)
def test_every_layout_gives_the_models_logits_for_any_number_of_rows_and_tokens(weights, files, model):
    for tokens in (TOKENS, TOKENS[:1], torch.arange(40).view(1, 40)):
        found = onnxruntime_engine.difference(model, files[weights], tokens)
        assert found["logit_difference"] < 1e-5
        assert found["top1_agreement"] == 1


@with_onnx
def test_a_bitmask_costs_a_bit_a_weight_and_coordinates_eight_bytes_a_non_zero(files, model):
    weights = torch.cat([layer.weight.flatten() for layer in checkpoint.linear_layers(model).values()])
    total, kept = weights.numel(), int(weights.count_nonzero())
    dense, sparse, bitmask = (files[weights].stat().st_size for weights in onnxruntime_engine.WEIGHTS)
    overhead = {"abs": 1500 * len(checkpoint.linear_layers(model))}  # names, and the nodes that unpack
    assert sparse - dense == pytest.approx(10 * kept - 2 * total, **overhead)
    assert bitmask - dense == pytest.approx(2 * kept + total / 8 - 2 * total, **overhead)


@with_onnx
def test_a_file_says_nothing_of_the_machine_that_made_it(files):
    assert b"site-packages" not in files["dense"].read_bytes()
    assert b".py" not in files["dense"].read_bytes()


@with_onnx
@pytest.mark.parametrize("sparse", [False, True])
def test_a_single_product_is_the_linear_layers(sparse):
    weight, rows = torch.randn(5, 12).masked_fill(torch.rand(5, 12) < 0.5, 0), torch.randn(3, 12)
    torch.testing.assert_close(onnxruntime_engine.product(weight, sparse=sparse)(rows), F.linear(rows, weight))


@with_onnx
@pytest.mark.parametrize(("weights", "limit"), [("bitmask", onnxruntime_engine.FILE_BYTES), ("dense", 0)])
def test_an_artefact_becomes_one_whose_check_is_in_its_card(weights, limit, pruned, traced, tmp_path, monkeypatch):
    monkeypatch.setattr(onnxruntime_engine, "graph", lambda model: copy.deepcopy(traced))
    monkeypatch.setattr(onnxruntime_engine, "FILE_BYTES", limit)  # 0: as if it were a large model
    made = artifacts.load_artifact(onnxruntime_engine.write(pruned, tmp_path / "out", weights=weights).path)
    assert (made.format, made.card["base"]["sha256"]) == ("onnx", pruned.sha256)
    assert [step["step"] for step in made.card["recipe"]][-2:] == ["prune", "onnx"]
    assert made.card["measured"]["logit_difference"] < onnxruntime_engine.TOLERANCE
    assert 0.5 * pruned.bytes < made.card["measured"]["onnx_bytes"] < (0.7 if limit else 1.1) * pruned.bytes
    assert (made.path / "model.onnx.data").exists() == (limit == 0)


@with_onnx
def test_coordinates_of_a_large_model_are_refused(pruned, traced, tmp_path, monkeypatch):
    monkeypatch.setattr(onnxruntime_engine, "graph", lambda model: copy.deepcopy(traced))
    monkeypatch.setattr(onnxruntime_engine, "FILE_BYTES", 0)
    with pytest.raises(ValueError, match="a file with sparse tensors ends at 0"):
        onnxruntime_engine.write(pruned, tmp_path / "out", weights="sparse")


@with_onnx
def test_a_file_whose_logits_differ_is_not_kept(pruned, traced, tmp_path, monkeypatch):
    wrong = copy.deepcopy(traced)
    next(t for t in wrong.graph.initializer if t.name.endswith("norm.weight")).raw_data = bytes(4 * 128)
    monkeypatch.setattr(onnxruntime_engine, "graph", lambda model: wrong)
    with pytest.raises(RuntimeError, match=r"logits differ by .* of the largest one"):
        onnxruntime_engine.write(pruned, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_unknown_weights_and_quantised_artefacts_are_refused(pruned, tmp_path):
    with pytest.raises(ValueError, match="unknown weights 'csr'; choose one of dense, sparse, bitmask"):
        onnxruntime_engine.write(pruned, tmp_path / "out", weights="csr")
    packed = Artifact(pruned.path, pruned.card | {"format": "bitsandbytes"})
    with pytest.raises(ValueError, match="format 'bitsandbytes'; only bf16 artefacts become ONNX files"):
        onnxruntime_engine.write(packed, tmp_path / "out")


def test_without_the_packages_the_error_says_how_to_install_them(pruned, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineUnavailable, match=r"needs onnx, onnxscript, onnxruntime; .*pip install 'avalab\[onnx\]'"):
        onnxruntime_engine.write(pruned, tmp_path / "out")
