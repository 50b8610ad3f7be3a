"""ONNX Runtime: every layout of zeros gives the model's logits and weighs what it should, 8-bit graphs come close.

8-bit products move the tiny model's first block by less than 0.01 nats a token where each input finds its own scale,
and by less than 0.1 where scales are fixed: one outlier of the calibration text then costs every token resolution.
"""

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from avalab import engines
from avalab.compress import prune
from avalab.engines import onnxruntime as onnxruntime_engine
from avalab.engines.engine import TINY
from avalab.lab import artifacts
from avalab.lab.artifacts import Artifact
from avalab.lab.run import ROOT
from avalab.models import checkpoint, walk

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
    return onnxruntime_engine.trace_graph(model)


@pytest.fixture(scope="module")
def files(traced, tmp_path_factory) -> dict[str, Path]:
    """The same graph, stored in each way."""
    import onnx

    folder = tmp_path_factory.mktemp("onnx")
    for weights in onnxruntime_engine.WEIGHTS:
        proto = copy.deepcopy(traced)
        onnxruntime_engine.replace_tensors(proto, weights)
        onnx.checker.check_model(proto)
        onnx.save_model(proto, folder / f"{weights}.onnx")
    return {weights: folder / f"{weights}.onnx" for weights in onnxruntime_engine.WEIGHTS}


@pytest.mark.needs("onnx", "onnxscript", "onnxruntime")
@pytest.mark.parametrize("weights", onnxruntime_engine.WEIGHTS)
def test_every_layout_gives_the_models_logits_for_any_number_of_rows_and_tokens(weights, files, model):
    for tokens in (TOKENS, TOKENS[:1], torch.arange(40).view(1, 40)):
        found = onnxruntime_engine.difference(model, files[weights], tokens)
        assert found["logit_difference"] < 1e-5
        assert found["top1_agreement"] == 1


@pytest.mark.needs("onnx", "onnxscript", "onnxruntime")
def test_a_bitmask_costs_a_bit_a_weight_and_coordinates_eight_bytes_a_non_zero(files, model):
    weights = torch.cat([layer.weight.flatten() for layer in walk.linear_layers(model).values()])
    total, kept = weights.numel(), int(weights.count_nonzero())
    dense, sparse, bitmask = (files[weights].stat().st_size for weights in onnxruntime_engine.WEIGHTS)
    overhead = {"abs": 1500 * len(walk.linear_layers(model))}  # names, and the nodes that unpack
    assert sparse - dense == pytest.approx(10 * kept - 2 * total, **overhead)
    assert bitmask - dense == pytest.approx(2 * kept + total / 8 - 2 * total, **overhead)


@pytest.mark.needs("onnx", "onnxscript", "onnxruntime")
def test_a_file_says_nothing_of_the_machine_that_made_it(files):
    assert b"site-packages" not in files["dense"].read_bytes()
    assert b".py" not in files["dense"].read_bytes()


@pytest.mark.needs("onnx", "onnxscript", "onnxruntime")
@pytest.mark.parametrize("sparse", [False, True])
def test_a_single_product_is_the_linear_layers(sparse):
    weight, rows = torch.randn(5, 12).masked_fill(torch.rand(5, 12) < 0.5, 0), torch.randn(3, 12)
    torch.testing.assert_close(onnxruntime_engine.runtime_product(weight, sparse=sparse)(rows), F.linear(rows, weight))


@pytest.mark.needs("onnx", "onnxscript", "onnxruntime")
@pytest.mark.parametrize(("weights", "limit"), [("bitmask", onnxruntime_engine.FILE_BYTES), ("dense", 0)])
def test_an_artefact_becomes_one_whose_check_is_in_its_card(weights, limit, pruned, traced, tmp_path, monkeypatch):
    monkeypatch.setattr(onnxruntime_engine, "trace_graph", lambda model: copy.deepcopy(traced))
    monkeypatch.setattr(onnxruntime_engine, "FILE_BYTES", limit)  # 0: as if it were a large model
    made = artifacts.load_artifact(onnxruntime_engine.write(pruned, tmp_path / "out", weights=weights).path)
    assert (made.format, made.card["base"]["sha256"]) == ("onnx", pruned.sha256)
    assert [step["step"] for step in made.card["recipe"]][-2:] == ["prune", "onnx"]
    assert made.card["measured"]["logit_difference"] < onnxruntime_engine.TOLERANCE
    assert 0.5 * pruned.bytes < made.card["measured"]["onnx_bytes"] < (0.7 if limit else 1.1) * pruned.bytes
    assert (made.path / "model.onnx.data").exists() == (limit == 0)


@pytest.mark.needs("onnx", "onnxscript", "onnxruntime")
def test_coordinates_of_a_large_model_are_refused(pruned, traced, tmp_path, monkeypatch):
    monkeypatch.setattr(onnxruntime_engine, "trace_graph", lambda model: copy.deepcopy(traced))
    monkeypatch.setattr(onnxruntime_engine, "FILE_BYTES", 0)
    with pytest.raises(ValueError, match="a file with sparse tensors ends at 0"):
        onnxruntime_engine.write(pruned, tmp_path / "out", weights="sparse")


@pytest.mark.needs("onnx", "onnxscript", "onnxruntime")
def test_a_file_whose_logits_differ_is_not_kept(pruned, traced, tmp_path, monkeypatch):
    wrong = copy.deepcopy(traced)
    next(t for t in wrong.graph.initializer if t.name.endswith("norm.weight")).raw_data = bytes(4 * 128)
    monkeypatch.setattr(onnxruntime_engine, "trace_graph", lambda model: wrong)
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
    with pytest.raises(
        engines.EngineUnavailable, match=r"needs the package onnx, onnxscript, onnxruntime; install it: pip"
    ):
        onnxruntime_engine.write(pruned, tmp_path / "out")


# --- the engine, and 8-bit products ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_graph(small):
    """The graph of the first block in float32, traced once for all tests."""
    return onnxruntime_engine.trace_graph(checkpoint.load_model(small, dtype=torch.float32, packed=False))


@pytest.fixture
def small_traced(small_graph, monkeypatch):
    """Exports take a copy of that graph instead of tracing again."""
    monkeypatch.setattr(onnxruntime_engine, "trace_graph", lambda model: copy.deepcopy(small_graph))


@pytest.fixture(scope="module")
def text() -> list[int]:
    """Tokens of Python source, read by every engine."""
    return checkpoint.load_tokenizer(TINY)((ROOT / "avalab" / "lab" / "artifacts.py").read_text()).input_ids[:128]


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    """Calibration tokens: another file of Python source."""
    ids = checkpoint.load_tokenizer(TINY)((ROOT / "avalab" / "models" / "checkpoint.py").read_text()).input_ids
    return torch.tensor(ids[:256]).view(4, 64)


@pytest.mark.needs("onnx", "onnxscript", "onnxruntime")
@pytest.mark.usefixtures("small_traced")
def test_a_plain_graph_has_the_logits_and_greedy_tokens_of_transformers(small, text, tmp_path, reference):
    """In float32, weights stored in bf16 as they were: 1e-4. Each token reads all tokens again."""
    made = onnxruntime_engine.write(small, tmp_path / "plain")
    ours, theirs = engines.load("onnxruntime", made, threads=1), reference(small)
    torch.testing.assert_close(ours.logits(text), theirs.logits(text), atol=1e-4, rtol=0)
    assert ours.generate(text, 12, past_end=True) == theirs.generate(text, 12, past_end=True)


@pytest.mark.needs("onnx", "onnxscript", "onnxruntime")
@pytest.mark.usefixtures("small_traced")
@pytest.mark.parametrize(("mode", "allowed"), [("dynamic", 0.01), ("static", 0.1)])
def test_an_8_bit_graph_is_close_to_its_dense_model(mode, allowed, small, text, windows, divergence, reference):
    made = onnxruntime_engine.write_int8(small, mode, windows=windows if mode == "static" else None)
    assert (made.name, made.card["engines"]) == (f"small+onnx-int8-{mode}", ["onnxruntime"])
    if mode == "dynamic":  # static keeps embedding and head in 32 bits, which are most of one block's model
        assert made.bytes < small.bytes
    engine = engines.load("onnxruntime", made, threads=1)
    assert divergence(engine.logits(text), reference(small).logits(text)) < allowed
    assert engine.generate(text, 2, past_end=True)[0] == int(engine.logits(text)[-1].argmax())


@pytest.mark.needs("onnx", "onnxscript", "onnxruntime")
@pytest.mark.usefixtures("small_traced")
def test_8_bit_products_are_stored_as_whole_numbers_and_the_head_is_one_of_them(small, tmp_path):
    import onnx

    onnxruntime_engine.export_int8(small.path, tmp_path, "dynamic")
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    assert sum(node.op_type == "MatMulInteger" for node in nodes) == 7 + 1


@pytest.mark.needs("onnx", "onnxscript", "onnxruntime")
def test_untying_stores_a_transposed_weight_and_leaves_no_node_behind():
    """A head that multiplies with the transposed embedding [[1, 2], [3, 4]]."""
    from onnx import helper, numpy_helper

    weight = numpy_helper.from_array(np.array([[1.0, 2.0], [3.0, 4.0]], np.float32), "embedding")
    node = helper.make_node("Transpose", ["embedding"], ["turned"], perm=[1, 0])
    proto = helper.make_model(helper.make_graph([node], "g", [], [], [weight]))
    onnxruntime_engine.untie(proto)
    assert [n.op_type for n in proto.graph.node] == []
    assert numpy_helper.to_array(proto.graph.initializer[1]).tolist() == [[1, 3], [2, 4]]


@pytest.mark.needs("onnx", "onnxscript", "onnxruntime")
def test_a_graph_that_is_damaged_or_takes_other_inputs_is_refused(tmp_path):
    import onnx
    from onnx import TensorProto, helper

    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ValueError, match=r"ONNX Runtime cannot read .*model\.onnx"):
        engines.load("onnxruntime", tmp_path)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("speed", "logits")]
    graph = helper.make_graph([helper.make_node("Identity", ["speed"], ["logits"])], "g", ends[:1], ends[1:])
    how = {
        "ir_version": onnxruntime_engine.IR_VERSION,
        "opset_imports": [helper.make_opsetid("", onnxruntime_engine.OPSET)],
    }
    onnx.save_model(helper.make_model(graph, **how), tmp_path / "model.onnx")
    with pytest.raises(engines.NotSupported, match="takes speed; onnxruntime runs graphs of input_ids alone"):
        engines.load("onnxruntime", tmp_path)


def test_an_8_bit_graph_of_an_unknown_mode_or_without_its_text_is_refused(small, tmp_path):
    with pytest.raises(ValueError, match="no weights 'int3' for 8-bit ONNX; choose one of dynamic, static"):
        onnxruntime_engine.export_int8(small.path, tmp_path, "int3")
    with pytest.raises(ValueError, match="static 8-bit ONNX needs windows of calibration tokens"):
        onnxruntime_engine.export_int8(small.path, tmp_path, "static")


def test_a_family_that_cannot_be_traced_is_refused_in_one_line(monkeypatch):
    def fails(*arguments, **options):
        raise torch.onnx.OnnxExporterError("a page of advice") from RuntimeError("no operator grouped_mm\nat line 1")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(ValueError, match=r"^llama models cannot be traced into an ONNX graph: no operator grouped_mm;"):
        onnxruntime_engine.trace_graph(checkpoint.load_model(TINY))
