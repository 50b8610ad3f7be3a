"""8-bit ONNX graphs and llama.cpp's K types: agreement with the dense model, what is stored, and what is refused.

The model is the tiny one's first block. Tolerances: a graph in float32 differs by the order of additions (1e-4). 8-bit
products move it by less than 0.01 nats a token where each input finds its own scale, and by less than 0.1 where scales
are fixed: one outlier of the calibration text then costs every token resolution. Rounded weights of at least 4 bits
move it by less than 0.05.
"""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from avalab import engines
from avalab.engines import gguf as gguf_file
from avalab.engines import llamacpp
from avalab.engines import onnxruntime as onnxruntime_engine
from avalab.lab import artifacts
from avalab.models import checkpoint, predict

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "data" / "tiny-llama"
CPUINFO = "processor\t: 0\nflags\t\t: fpu {}\nbugs\t\t: none\n"


def needs(*modules: str, extra: str):
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{missing} not installed: pip install -e '.[{extra}]'")


onnx = needs("onnx", "onnxscript", "onnxruntime", extra="onnx")
needs_llamacpp = needs("llama_cpp", extra="llamacpp")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> artifacts.Artifact:
    """An artefact of the tiny model's first block, with embedding and head."""
    model = checkpoint.load_model(TINY)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1

    def save(folder: Path) -> None:
        checkpoint.save_model(model, checkpoint.load_tokenizer(TINY), folder)

    about = {"base": {"name": "x", "sha256": "y"}, "recipe": [], "format": "bf16", "licence": ""}
    return artifacts.write_artifact("small", tmp_path_factory.mktemp("int8"), save, **about)


@pytest.fixture(scope="module")
def graph(small):
    """Its ONNX graph in float32, traced once for all tests."""
    return onnxruntime_engine.graph(checkpoint.load_model(small, dtype=torch.float32))


@pytest.fixture
def traced(graph, monkeypatch):
    """Exports take a copy of that graph instead of tracing again."""

    def copy(model) -> object:
        found = type(graph)()
        found.CopyFrom(graph)
        return found

    monkeypatch.setattr(onnxruntime_engine, "graph", copy)


@pytest.fixture(scope="module")
def text() -> list[int]:
    """Tokens of Python source, read by every engine."""
    return checkpoint.load_tokenizer(TINY)((ROOT / "avalab" / "artifacts.py").read_text()).input_ids[:128]


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    """Calibration tokens: another file of Python source."""
    ids = checkpoint.load_tokenizer(TINY)((ROOT / "avalab" / "models.py").read_text()).input_ids
    return torch.tensor(ids[:256]).view(4, 64)


def divergence(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float(predict.kl_divergence(theirs.log_softmax(-1), ours.log_softmax(-1)).mean())


def reference(folder) -> engines.Engine:
    return engines.load("torch", folder, dtype=torch.float32)


# --- ONNX Runtime ------------------------------------------------------------------------------------------------


@onnx
@pytest.mark.usefixtures("traced")
def test_a_plain_graph_has_the_logits_and_greedy_tokens_of_transformers(small, text, tmp_path):
    """In float32, weights stored in bf16 as they were: 1e-4. Each token reads all tokens again."""
    made = onnxruntime_engine.write(small, tmp_path / "plain")
    ours, theirs = engines.load("onnxruntime", made, threads=1), reference(small)
    torch.testing.assert_close(ours.logits(text), theirs.logits(text), atol=1e-4, rtol=0)
    assert ours.generate(text, 12, past_end=True) == theirs.generate(text, 12, past_end=True)


@onnx
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(("mode", "allowed"), [("dynamic", 0.01), ("static", 0.1)])
def test_an_8_bit_graph_is_close_to_its_dense_model(mode, allowed, small, text, windows):
    made = onnxruntime_engine.write_int8(small, mode, windows=windows if mode == "static" else None)
    assert (made.name, made.card["engines"]) == (f"small+onnx-int8-{mode}", ["onnxruntime"])
    if mode == "dynamic":  # static keeps embedding and head in 32 bits, which are most of one block's model
        assert made.bytes < small.bytes
    engine = engines.load("onnxruntime", made, threads=1)
    assert divergence(engine.logits(text), reference(small).logits(text)) < allowed
    assert engine.generate(text, 2, past_end=True)[0] == int(engine.logits(text)[-1].argmax())


@onnx
@pytest.mark.usefixtures("traced")
def test_8_bit_products_are_stored_as_whole_numbers_and_the_head_is_one_of_them(small, tmp_path):
    import onnx

    onnxruntime_engine.export_int8(small.path, tmp_path, "dynamic")
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    assert sum(node.op_type == "MatMulInteger" for node in nodes) == 7 + 1


@onnx
def test_untying_stores_a_transposed_weight_and_leaves_no_node_behind():
    """A head that multiplies with the transposed embedding [[1, 2], [3, 4]]."""
    from onnx import helper, numpy_helper

    weight = numpy_helper.from_array(np.array([[1.0, 2.0], [3.0, 4.0]], np.float32), "embedding")
    node = helper.make_node("Transpose", ["embedding"], ["turned"], perm=[1, 0])
    proto = helper.make_model(helper.make_graph([node], "g", [], [], [weight]))
    onnxruntime_engine.untie(proto)
    assert [n.op_type for n in proto.graph.node] == []
    assert numpy_helper.to_array(proto.graph.initializer[1]).tolist() == [[1, 3], [2, 4]]


@onnx
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


# --- llama.cpp's quantiser ---------------------------------------------------------------------------------------


def test_the_importance_of_a_column_is_its_mean_square_under_the_files_name(small, windows):
    """The gate's inputs are the up projection's; the oracle is a hook on the layer."""
    found = llamacpp.importance(small, windows)
    model, seen = checkpoint.load_model(small), []
    layer = model.model.layers[0].mlp.gate_proj
    layer.register_forward_hook(lambda module, given, output: seen.append(given[0].float().square()))
    with torch.inference_mode():
        model(windows)
    expected = seen[0].flatten(0, 1).mean(0)
    torch.testing.assert_close(torch.from_numpy(found["blk.0.ffn_gate.weight"]), expected, atol=0, rtol=0.02)  # bf16
    assert np.array_equal(found["blk.0.ffn_gate.weight"], found["blk.0.ffn_up.weight"])
    assert len(found) == 7
    assert all(column.flags.c_contiguous for column in found.values())


@needs_llamacpp
@pytest.mark.parametrize("mixture", llamacpp.MIXTURES)
def test_a_k_mixture_computes_the_same_in_llamacpp_and_transformers(mixture, small, text):
    """Rows of 128 are no multiple of 256: llama.cpp takes blocks of 32 for them, and says which."""
    made = llamacpp.write(small, mixture)
    ours, theirs = (engines.load(name, made, threads=1).logits(text) for name in ("llamacpp", "torch"))
    assert divergence(ours, theirs) < 0.005
    assert divergence(ours, reference(small).logits(text)) < 0.05
    assert set(made.card["measured"]["formats"]) <= {"f32", "q8_0", "q5_1", "q5_0", "q4_0"}
    assert (made.path / "Modelfile").read_text().startswith(f"FROM ./small.{mixture}.gguf\n")


@needs_llamacpp
def test_rows_that_256_divides_become_k_blocks(tmp_path):
    config = LlamaConfig(hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
                         vocab_size=1024, max_position_embeddings=64)  # fmt: skip

    def save(folder: Path) -> None:
        checkpoint.save_model(LlamaForCausalLM(config).bfloat16(), checkpoint.load_tokenizer(TINY), folder)

    about = {"base": {"name": "x", "sha256": "y"}, "recipe": [], "format": "bf16"}
    made = llamacpp.write(artifacts.write_artifact("wide", tmp_path, save, **about), "q4_k_m")
    assert set(made.card["measured"]["formats"]) == {"f32", "q4_k", "q6_k"}
    assert engines.load("llamacpp", made, threads=1).logits([5, 6]).isfinite().all()


@needs_llamacpp
def test_an_importance_matrix_changes_the_weights_for_the_better(small, text, windows):
    """Same bytes, weighted rounding: closer to the dense model on other text of the same kind."""
    plain = llamacpp.write(small, "q5_k_m")
    weighted = llamacpp.write(small, "q5_k_m", windows=windows, out=small.path.parent / "weighted")
    assert plain.bytes == weighted.bytes
    dense = reference(small).logits(text)
    assert divergence(reference(weighted).logits(text), dense) < divergence(reference(plain).logits(text), dense)


def test_a_missing_quantiser_is_named_with_the_way_to_get_it(small, monkeypatch):
    here = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *rest: None if n == "llama_cpp" else here(n, *rest))
    with pytest.raises(
        engines.EngineUnavailable, match=r"needs the package llama_cpp; install it: make setup-llamacpp"
    ):
        llamacpp.write(small, "q4_k_m")
    with pytest.raises(ValueError, match=r"no weights 'q7_k' for llama\.cpp's quantiser; choose one of q6_k, q5_k_m"):
        llamacpp.write(small, "q7_k")
    with pytest.raises(ValueError, match=r"no block type 'q4_k_m' is written.*\(K types: llamacpp\)"):
        gguf_file.export(small.path, small.path / "x.gguf", "q4_k_m")


# --- llama.cpp's build -------------------------------------------------------------------------------------------


def test_a_processor_gets_the_instruction_sets_that_it_lists_and_no_others():
    found = llamacpp.build_flags(CPUINFO.format("sse4_2 avx avx2 fma f16c bmi2"))
    assert found[:3] == ["-DGGML_NATIVE=OFF", "-DGGML_SSE42=ON", "-DGGML_AVX=ON"]
    assert "-DGGML_BMI2=ON" in found
    assert {"-DGGML_AVX512=OFF", "-DGGML_AVX_VNNI=OFF"} <= set(found)
    assert not [flag for flag in found if "AMX" in flag]


def test_avx512_needs_all_its_parts_and_vbmi_goes_by_two_names():
    parts = "avx512f avx512cd avx512vl avx512dq"
    assert "-DGGML_AVX512=OFF" in llamacpp.build_flags(CPUINFO.format(parts))
    found = llamacpp.build_flags(CPUINFO.format(f"{parts} avx512bw avx512vbmi"))
    assert {"-DGGML_AVX512=ON", "-DGGML_AVX512_VBMI=ON", "-DGGML_AVX512_VNNI=OFF"} <= set(found)


def test_a_processor_that_lists_no_flags_builds_natively():
    assert llamacpp.build_flags("Features\t: fp asimd\n") == ["-DGGML_NATIVE=ON"]


def test_a_missing_compiler_for_llamacpp_is_named(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert llamacpp.missing_compiler().startswith("no C++ compiler (c++, g++ or clang++); install one")
