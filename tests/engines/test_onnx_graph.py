"""Packed artefacts and ava's own blocks in ONNX Runtime, on the tiny model: steps, tokens, bytes, refusals."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from avalab import cli, engines
from avalab.compress import ava_targets, equivalence, quantize, rounding
from avalab.data import corpora
from avalab.engines import onnx_graph
from avalab.engines.onnx import write as write_onnx
from avalab.kernels import block_types, formats
from avalab.kernels.block_types import Steps
from avalab.kernels.formats import Grid
from avalab.lab import artifacts
from avalab.lab.artifacts import Artifact
from avalab.lab.run import ROOT, Run
from avalab.measure import families
from avalab.models import checkpoint, packed, predict, walk

onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install -e '.[onnx]'")
pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed: pip install -e '.[onnx]'")

TINY = ROOT / "data" / "tiny-llama"
PROMPT = "def add(a, b):\n    return a + b\n\nThe list of names in the file is written with"
GRIDS = ("w2g64", "w3g64", "w4g32", "w4g64-sym", "w5g128", "w7g64", "w8g128")
EMBEDDING = "model.embed_tokens"
ORIGINAL = onnx_graph.run_builder


@pytest.fixture(scope="module", autouse=True)
def built(tmp_path_factory) -> Path:
    """The library's builder runs once; later calls get the base's graph, which no method used here changes else."""
    made, original = tmp_path_factory.mktemp("graph"), onnx_graph.run_builder
    original(TINY, made, "fp32", options=onnx_graph.OPTIONS)

    def copied(folder: Path, out: Path, precision: str, *, options=()) -> None:
        assert (precision, tuple(options)) == ("fp32", onnx_graph.OPTIONS)
        shutil.copytree(made, out, dirs_exist_ok=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_graph, "run_builder", copied)
        yield made


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifacts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "artifacts_dir", property(lambda self: folder))
        run = Run("test_onnx_mixed", "smoke")
        samples = corpora.calibration_windows(run, checkpoint.load_tokenizer(checkpoint.base_artifact(run)))
        patch.setattr(corpora, "calibration_windows", lambda *arguments: samples)
        yield run


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return checkpoint.load_tokenizer(TINY)(PROMPT).input_ids


def rounded(weight: torch.Tensor, grid: Grid) -> formats.Rounded:
    return rounding.round_weight(weight, rounding.rounding_problem(torch.eye(weight.shape[1])), grid, repairs=0)


def packed_artifact(run: Run, base: Artifact, name: str, grids: tuple[str, ...], table: str) -> Artifact:
    """The base with these grids in turn, its embedding in int8 rows, on a grid, or as it is."""
    model = checkpoint.load_model(base)
    layers = walk.linear_layers(model)
    with torch.no_grad():
        parts = {
            layer: rounded(module.weight.float(), formats.grid_named(grids[at % len(grids)]))
            for at, (layer, module) in enumerate(layers.items())
            if at < len(layers) - 1  # the last one stays bf16
        }
        if table not in ("", packed.INT8_ROWS):
            parts[EMBEDDING] = rounded(model.get_input_embeddings().weight.float(), formats.grid_named(table))

    def save(folder: Path) -> None:
        rows = EMBEDDING if table == packed.INT8_ROWS else ""
        packed.pack_model(model, parts, int8_rows_of=rows, measured={}).save_pretrained(folder)
        checkpoint.load_tokenizer(base).save_pretrained(folder)

    about = {"base": {"name": base.name, "sha256": base.sha256}, "recipe": [{"step": name}]}
    return artifacts.write_artifact(name, run.artifacts_dir, save, format="compressed-tensors", **about)


@pytest.fixture(scope="module")
def mixed(run, base) -> Artifact:
    return packed_artifact(run, base, "mixed", GRIDS, packed.INT8_ROWS)


@pytest.fixture(scope="module")
def kept(mixed) -> Artifact:
    return write_onnx(mixed, "kept", inputs="float32")


def nodes(folder: Path, kind: str) -> list[dict]:
    graph = onnx.load(folder / onnx_graph.FILE, load_external_data=False).graph
    return [{a.name: onnx.helper.get_attribute_value(a) for a in n.attribute} for n in graph.node if n.op_type == kind]


# --- blocks ------------------------------------------------------------------------------------------------------


def test_the_smallest_container_is_the_one_that_a_person_would_take():
    scales = torch.ones(1, 1)

    def of(*steps: int) -> tuple[int, bool]:
        row = torch.tensor([list(steps) + [0] * (32 - len(steps))], dtype=torch.int32)
        made = block_types.smallest_blocks(Steps(row, scales))
        return made.bits, made.zeros is not None

    assert of(-2, 1) == (2, False)
    assert of(-1, 2) == (2, True)
    assert of(-8, 7) == (4, False)
    assert of(-7, 8) == (4, True)
    assert of(-9, 8) == (8, False)
    assert of(0, 255) == (8, True)
    with pytest.raises(ValueError, match="steps from -200 to 200 do not fit into 8 bits"):
        of(-200, 200)


def test_codes_lie_in_their_bytes_from_the_lowest_bits_up():
    """Steps -8, -7, -6, -5 are the codes 0, 1, 2, 3: bytes 0x10 and 0x32."""
    row = torch.tensor([[-8, -7, -6, -5] * 8], dtype=torch.int32)
    assert block_types.smallest_blocks(Steps(row, torch.ones(1, 1))).codes.flatten().tolist() == [0x10, 0x32] * 8


@pytest.mark.parametrize(
    ("grid", "columns"),
    [*((formats.grid_named(n), 384) for n in GRIDS), (Grid(4, 48), 384), (Grid(2, 16), 64), (Grid(6, 100), 100),
     (Grid(8, 192, symmetric=True), 384), (Grid(2, 100), 100)],
)  # fmt: skip
def test_the_runtimes_product_is_that_of_the_decoded_grid_and_takes_the_bytes_that_were_expected(grid, columns):
    torch.manual_seed(0)
    part = rounded(torch.randn(24, columns), grid)
    made = block_types.smallest_blocks(block_types.steps_of(part))
    assert made.bytes <= block_types.onnx_stored_bytes(24, columns, grid)
    helper, kinds = onnx.helper, onnx.TensorProto
    ends = [helper.make_tensor_value_info(n, kinds.FLOAT, [None, size]) for n, size in (("x", columns), ("y", 24))]
    product = helper.make_node("MatMul", ["x", "weight"], ["y"])
    dense = onnx.numpy_helper.from_array(np.zeros((columns, 24), np.float32), "weight")
    look_up = helper.make_node("Gather", ["table", "input_ids"], ["rows"])
    ids = helper.make_tensor_value_info("input_ids", kinds.INT64, [None])
    rows = helper.make_tensor_value_info("rows", kinds.FLOAT, [None, columns])
    table = onnx.numpy_helper.from_array(np.zeros((24, columns), np.float32), "embedding.weight")
    look_up.input[0] = "embedding.weight"
    stored = helper.make_graph([look_up, product], "g", [ends[0], ids], [ends[1], rows], [dense, table])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    graph = onnx_graph.Graph(helper.make_model(stored, opset_imports=opsets, ir_version=10), Path(), {})
    onnx_graph.replace_products(graph, {"weight": made, "embedding": made}, embedding="embedding", inputs="float32")
    import onnxruntime

    for tensor in graph.proto.graph.initializer:
        tensor.raw_data = graph.held[tensor.name].contiguous().view(torch.uint8).numpy().tobytes()
    session = onnxruntime.InferenceSession(graph.proto.SerializeToString(), providers=["CPUExecutionProvider"])
    x, ids = torch.randn(3, columns), np.array([5, 0, 23])
    y, found = session.run(["y", "rows"], {"x": x.numpy(), "input_ids": ids})
    assert torch.allclose(torch.from_numpy(y), x @ part.decode(torch.float32).T, rtol=1e-4, atol=1e-3)
    assert torch.equal(torch.from_numpy(found), part.decode(torch.float32)[ids])


def test_groups_that_no_block_divides_are_refused():
    with pytest.raises(ValueError, match="no blocks for groups of 24, only for whole rows and multiples of 16"):
        block_types.container_bits(4, 384, 24)


# --- packed artefacts --------------------------------------------------------------------------------------------


def test_a_packed_artefact_keeps_every_step_the_logits_are_those_of_the_torch_engine_in_float32(mixed, kept, prompt):
    """Both compute steps times scale in float32; what is left is the order of sums: 1e-5 of the largest logit."""
    ours, theirs = engines.load("onnx", kept, threads=1), engines.load("torch", mixed, dtype=torch.float32)
    found, expected = ours.logits(prompt), theirs.logits(prompt)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    assert ours.generate(prompt, 24, past_end=True) == theirs.generate(prompt, 24, past_end=True)
    ours.close()


def test_each_product_keeps_bits_and_groups_of_its_own_and_the_tied_head_has_no_second_copy(kept):
    found = sorted((n["bits"], n["block_size"]) for n in nodes(kept.path, "MatMulNBits"))
    wanted = [(2, 64), (4, 64), (4, 32), (4, 64), (8, 128), (8, 64), (8, 128)]
    assert found == sorted([*(wanted[at % 7] for at in range(27)), (8, 128)])
    assert [(n["bits"], n["block_size"]) for n in nodes(kept.path, "GatherBlockQuantized")] == [(8, 128)]
    assert len(nodes(kept.path, "MatMul")) == 1  # the layer that stayed bf16
    counted = kept.card["measured"]["containers"]
    assert sum(counted.values()) == 28
    assert (counted["int8-b128"], counted["int8-b128-zeros"]) == (4 + 1, 3)  # 5 bits and the embedding; 8 bits
    assert (kept.format, kept.card["engines"]) == ("onnx-mixed", ["onnx"])
    assert "nothing was rounded again: 28 packed weights take" in kept.card["measured"]["note"]


def test_rounding_what_products_read_to_8_bits_costs_little(run, mixed, prompt):
    made = write_onnx(mixed, "kept", out=run.artifacts_dir / "eight")
    ours, theirs = engines.load("onnx", made, threads=1), engines.load("torch", mixed, dtype=torch.float32)
    parts = [engine.logits(prompt).log_softmax(-1) for engine in (theirs, ours)]
    assert 1e-7 < float(predict.kl_divergence(*parts).mean()) < 0.01
    ours.close()


@pytest.mark.parametrize("table", ["w3g32", ""])
def test_an_embedding_on_a_grid_or_in_bf16_is_kept_too(run, base, table, prompt):
    source = packed_artifact(run, base, f"table-{table}", ("w4g32",), table)
    made = write_onnx(source, "kept", inputs="float32")
    ours, theirs = engines.load("onnx", made, threads=1), engines.load("torch", source, dtype=torch.float32)
    found, expected = ours.logits(prompt), theirs.logits(prompt)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    assert len(nodes(made.path, "GatherBlockQuantized")) == bool(table)
    ours.close()


def test_the_export_command_keeps_a_packed_artefact_without_being_told(mixed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["avalab", "export", str(mixed.path), "--to", "onnx", "--out", f"{tmp_path}/there"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr().out
    assert not stopped.value.code
    assert "onnx-mixed\nload it with the engine onnx\nnothing was rounded again" in said


# --- the compressor ----------------------------------------------------------------------------------------------


def test_ava_keeps_its_budget_and_beats_one_grid_for_all_layers_at_its_bytes(run, base):
    plain = write_onnx(packed_artifact(run, base, "plain", ("w4g32",), "w4g32"), "kept")
    made = quantize.compress_artifact(base, "ava", run=run, bytes=plain.bytes, format="onnx")
    about = made.card["measured"]
    assert 0.9 * plain.bytes < made.bytes <= about["predicted_bytes"] <= plain.bytes
    assert made.format == "onnx-mixed"
    assert made.name.endswith("b-onnx")
    assert sum(about["formats"].values()) == 29
    tokenizer = checkpoint.load_tokenizer(base)
    windows = corpora.windows(corpora.evaluation_text("python_docs", tokenizer), tokenizer, count=4, tokens=64)
    theirs = engines.load("torch", base, dtype=torch.float32)
    found = []
    for artifact in (made, plain):
        ours = engines.load("onnx", artifact, threads=1)
        pairs = [[e.logits(window.tolist()).log_softmax(-1) for e in (theirs, ours)] for window in windows]
        found.append(sum(float(predict.kl_divergence(*pair).mean()) for pair in pairs))
        ours.close()
    assert found[0] < 0.8 * found[1]


def test_what_a_transform_does_to_norms_is_in_the_graph_too(run, base, monkeypatch):
    """Factors of 2 and 1/2 at every site, and rotated values; the builder reads the changed model."""
    factors = torch.tensor([2.0, 0.5])
    monkeypatch.setattr(
        equivalence, "_best", lambda pair, *_: ((1.0, 0.0), factors.repeat(len(pair.source.weight) // 2))
    )
    monkeypatch.setattr(onnx_graph, "run_builder", ORIGINAL)
    made = quantize.compress_artifact(base, "ava", run=run, bytes=1_000_000, format="onnx", transform="scale+rotate")
    assert made.name.endswith("+ava-1000000b-onnx-scale+rotate")
    assert made.card["measured"]["measured_kl_divergence"] < 0.1


def test_a_budget_below_the_smallest_folder_names_it(run, base):
    with pytest.raises(ValueError, match=r"100,000 bytes is below the smallest ONNX graph and weights, [\d,]+ bytes"):
        quantize.compress_artifact(base, "ava", run=run, bytes=100_000, format="onnx")
    with pytest.raises(ValueError, match="embedding='packed' is of the own format"):
        quantize.compress_artifact(base, "ava", run=run, embedding="packed", format="onnx")


def test_every_grid_that_is_offered_is_stored_without_waste():
    for grid in [*ava_targets.onnx_grids(384), *ava_targets.onnx_grids(576, 64), Grid(8, 576, symmetric=True)]:
        columns = 384 if 384 % grid.group_size == 0 else 576
        assert block_types.container_bits(grid.bits, columns, grid.group_size) == grid.bits
    assert [g.name for g in ava_targets.onnx_grids(100)] == ["w2g100", "w4g100", "w4g100-sym", "w8g100-sym"]


# --- what is refused ---------------------------------------------------------------------------------------------


def test_what_holds_no_packed_layers_or_rounds_activations_is_refused(base, mixed, tmp_path):
    with pytest.raises(ValueError, match="tiny-llama holds no packed layers to keep; ava, gptq, awq and rtn make some"):
        onnx_graph.packed_blocks(base.path)
    shutil.copytree(mixed.path, tmp_path / "static")
    config = json.loads((tmp_path / "static" / "config.json").read_text())
    next(iter(config["quantization_config"]["config_groups"].values()))["input_activations"] = {"num_bits": 8}
    (tmp_path / "static" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="static rounds activations or reorders columns"):
        onnx_graph.packed_blocks(tmp_path / "static")


def test_layers_that_the_graph_does_not_have_and_unknown_inputs_are_refused(built, mixed):
    graph = onnx_graph.Graph(onnx.load(built / onnx_graph.FILE, load_external_data=False), built, {})
    part = next(iter(onnx_graph.packed_blocks(mixed.path)[0].values()))
    with pytest.raises(ValueError, match=r"no product of its own for model\.layers\.0\.experts"):
        onnx_graph.replace_products(graph, {"model.layers.0.experts": part}, embedding=EMBEDDING)
    with pytest.raises(ValueError, match="products read int8 or float32, not 'int4'"):
        onnx_graph.replace_products(graph, {}, embedding=EMBEDDING, inputs="int4")


def test_a_graph_that_computes_something_else_is_not_shipped(mixed, tmp_path, monkeypatch):
    """It is held to its own weights in torch, not to the model that they were rounded from."""
    finished, found = onnx_graph.finish_model, {}

    def with_other_logits(*arguments, check: tuple, **options):
        tokens, expected, _ = check
        return finished(*arguments, check=(tokens, *found["logits"](expected)), **options)

    monkeypatch.setattr(onnx_graph, "finish_model", with_other_logits)
    for name in ("right", "wrong"):
        (tmp_path / name).mkdir()
    found["logits"] = lambda expected: (expected, expected.flip(-1))  # far from the base, and right
    assert onnx_graph.export_packed(mixed.path, tmp_path / "right")["measured_kl_divergence"] > onnx_graph.DIFFERENT
    found["logits"] = lambda expected: (expected.flip(-1), expected)
    with pytest.raises(RuntimeError, match=r"diverge by .* nats from those of the same weights in torch"):
        onnx_graph.export_packed(mixed.path, tmp_path / "wrong")


@pytest.mark.parametrize(
    ("last", "error", "said"),
    [
        (
            "NotImplementedError: The x/y model is not currently supported.",
            ValueError,
            "The x/y model is not currently",
        ),
        ("KeyError: 'rope'", ValueError, r"tiny-llama is a llama of a kind that .* cannot read \(KeyError: 'rope'\)"),
        ("OSError: no space", RuntimeError, "builder failed on tiny-llama: OSError: no space"),
    ],
)
def test_a_family_that_the_builder_does_not_know_says_which_exports_remain(last, error, said, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr=f"Traceback\n{last}\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: failed)
    with pytest.raises(error, match=said) as caught:
        ORIGINAL(TINY, tmp_path, "fp32")
    assert ("`avalab export` writes gguf, aot and onnx" in str(caught.value)) == (error is ValueError)


def test_without_the_library_the_builder_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "PACKAGES", ("no_such_builder",))
    with pytest.raises(RuntimeError, match="engine onnx needs the package no_such_builder; install it: pip install -e"):
        ORIGINAL(TINY, tmp_path, "fp32")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("llama-rope-yarn", "leaves out rotary embeddings of type 'yarn' of a llama"),
        ("mistral-sliding", f"makes a graph that stops after the {families.WINDOW} tokens of the window of a mistral"),
    ],
)
def test_a_model_of_which_the_builder_makes_another_one_is_refused_before_it_starts(name, says, tmp_path):
    """Logits of the first are off by more than their spread; the second's graph ends with the runtime's own error."""
    source = families.make_model(name, tmp_path / "mine")
    with pytest.raises(ValueError, match=rf"mine: ONNX Runtime GenAI's builder {says}; `avalab export` writes gguf"):
        onnx_graph.refuse_unbuilt(source)
