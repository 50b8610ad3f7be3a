"""ONNX Runtime: graphs from token ids to logits (`model.onnx`), in float32 or with 8-bit products, and their engine.

1. `load`: such a graph has no key-value cache: every answer token reads the whole sequence again. The engine is here to
   score what those graphs compute; to generate at speed use the engine onnx, whose graphs have one.
2. `write`: a bf16 artefact, pruned or not, traced in float32 by torch's exporter with batch and time free. Weights that
   are bf16 exactly stay bf16, with a cast behind them, because ONNX Runtime has no bf16 products on a CPU; it folds the
   casts when it loads the file. What was pruned is stored as `weights` says: "dense"; "sparse", ONNX's own coordinates
   (two bytes a kept weight and eight for its place); or "bitmask", the layout of `models.stored` with the few nodes
   that unpack it (a bit a weight, which pays from one sixteenth of zeros). Both save bytes on disk, neither memory nor
   time: the runtime makes the matrices dense. The written file is run beside the model; one that differs is dropped.
3. `write_int8`: weights and inputs of matrix products in whole numbers, by onnxruntime.quantization. `dynamic`: each
   product's input finds its scale at every call; the embedding is stored in 8 bits too, and the tied head apart from
   it. `static`: one scale and zero point a product's input, from the least and greatest value on calibration text; an
   outlier then costs every token resolution. Head and embedding stay in float32 there: the head's input has the largest
   outliers, and logits are read from it directly.

Above the 2 GB of a protobuf tensors go into a second file, which coordinates and 8-bit graphs cannot.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from avalab.engines import checks, engine
from avalab.engines import gguf as gguf_file
from avalab.engines.checks import Check
from avalab.engines.engine import Engine
from avalab.lab import artifacts
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError, ProcessFailed
from avalab.models import checkpoint
from avalab.models.stored import to_bitmask

INSTALL = 'pip install -e ".[onnx]"'

PACKAGES = ("onnx", "onnxscript", "onnxruntime")

FILE = engine.OWN_FILES["onnx-graph"]

INPUTS, HEAD = ["input_ids"], "logits"


def load(artifact: Artifact | Path, *, threads: int = 0) -> Engine:
    """Open a folder with `model.onnx`; `threads` 0 leaves the library's choice.

    Raises ValueError for a graph that ONNX Runtime cannot read, NotSupported for one with other inputs.
    """
    folder = engine.folder_for("onnxruntime", artifact)
    engine.require("onnxruntime", "onnxruntime", INSTALL)
    file = folder / FILE
    try:
        session = _session(file, threads)
    except Exception as error:  # each of its error classes derives from Exception alone
        raise InputError(f"ONNX Runtime cannot read {file}: {error}") from error
    inputs = [given.name for given in session.get_inputs()]
    if inputs != INPUTS:
        raise engine.NotSupported(f"{file} takes {', '.join(inputs)}; onnxruntime runs graphs of {INPUTS[0]} alone")
    return engine.from_reader("onnxruntime", folder, engine.model_facts(folder), {"session": session}, _reader)


def _reader(state: dict, capacity: int, every: bool) -> Callable[[list[int]], Tensor]:
    sequence: list[int] = []

    def read(tokens: list[int]) -> Tensor:
        sequence.extend(tokens)
        return torch.from_numpy(state["session"].run(None, {INPUTS[0]: np.array([sequence])})[0][0])

    return read


def _session(model: Path | bytes, threads: int):
    """A graph opened on the CPU; `threads` 0 leaves the library's choice."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


# --- graphs in float32, zeros stored apart ---------------------------------------------------------------------------

WEIGHTS = ("dense", "sparse", "bitmask")

OPSET, IR_VERSION = 20, 10  # what torch's exporter writes too

TOLERANCE = 1e-3  # of the largest logit: both sides compute in float32, in another order

FILE_BYTES = 2**31 - 2**24  # what one protobuf can hold, with room for the graph

SPARSE_FROM = 1 / 16  # share of zeros from which a matrix counts as pruned: where a bitmask begins to pay

CONSTANTS = {
    "bitmask.shifts": torch.arange(8, dtype=torch.uint8),
    "bitmask.one": torch.tensor([1], dtype=torch.uint8),
    "bitmask.flat": torch.tensor([-1]),
    "bitmask.first": torch.tensor(0),
    "bitmask.corner": torch.tensor([0, 0]),
}

KINDS = {
    torch.float32: "FLOAT",
    torch.bfloat16: "BFLOAT16",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.uint8: "UINT8",
}


def write(artifact: Artifact, out: Path, *, weights: str = "dense") -> Artifact:
    """Export an artefact into the folder `out`, an artefact in format "onnx"; `measured` says how far logits differ.

    Raises ValueError for unknown `weights` and for a base that is not bf16, EngineUnavailable without the packages,
    RuntimeError where ONNX Runtime's logits differ by more than `TOLERANCE` of the largest.
    """
    if weights not in WEIGHTS:
        raise InputError(f"unknown weights {weights!r}; choose one of {', '.join(WEIGHTS)}")
    if artifact.format != "bf16":
        raise InputError(f"{artifact.name} is in format {artifact.format!r}; only bf16 artefacts become ONNX files")
    engine.require("onnxruntime", PACKAGES, INSTALL)
    about = artifacts.Export({"step": "onnx", "weights": weights}, "onnx", ("onnxruntime",))
    out = artifacts.checked_target(out)
    check = checks.against(artifact, Check({"onnxruntime": ""}))
    return artifacts.write_export(artifact, about, lambda folder: export(artifact, folder, weights), check, out=out)


def export(artifact: Artifact, out: Path, weights: str) -> dict:
    """Fill `out` with graph, tokenizer and configuration; how far ONNX Runtime's logits differ from the model's."""
    import onnx

    model = checkpoint.load_model(artifact, dtype=torch.float32, packed=False)
    tokenizer = checkpoint.load_tokenizer(artifact)
    proto = trace_graph(model)
    replace_tensors(proto, weights)
    sparse = sum(
        len(tensor.values.raw_data) + len(tensor.indices.raw_data) for tensor in proto.graph.sparse_initializer
    )
    size = sum(len(tensor.raw_data) for tensor in proto.graph.initializer) + sparse
    if sparse and size > FILE_BYTES:
        raise InputError(f"{artifact.name} takes {size:,} bytes; a file with sparse tensors ends at {FILE_BYTES:,}")
    onnx.save_model(proto, out / FILE, save_as_external_data=size > FILE_BYTES, location=f"{FILE}.data")
    tokenizer.save_pretrained(out)
    model.config.save_pretrained(out)  # context and vocabulary, for the engine
    # Of another shape than the traced tokens.
    tokens = torch.randint(model.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    found = difference(model, out / FILE, tokens)
    if not found["logit_difference"] <= TOLERANCE:
        raise ProcessFailed(f"ONNX Runtime's logits differ by {found['logit_difference']:.2g} of the largest one")
    return {"onnx_bytes": sum(file.stat().st_size for file in out.glob(f"{FILE}*")), **found}


@torch.inference_mode()
def difference(model: PreTrainedModel, file: Path, tokens: Int[Tensor, "batch time"]) -> dict[str, float]:
    """Largest difference of logits, over the largest logit, and share of positions whose best token is the same."""
    expected = model(input_ids=tokens, use_cache=False).logits
    found = torch.from_numpy(_session(file, torch.get_num_threads()).run(None, {INPUTS[0]: tokens.numpy()})[0])
    return {
        "logit_difference": float((found - expected).abs().max() / expected.abs().max()),
        "top1_agreement": float((found.argmax(-1) == expected.argmax(-1)).double().mean()),
    }


def runtime_product(weight: Float[Tensor, "rows cols"], *, sparse: bool) -> Callable[[Tensor], Tensor]:
    """The product of rows with one weight as ONNX Runtime computes it in float32, given as a sparse tensor or not."""
    engine.require("onnxruntime", PACKAGES, INSTALL)
    from onnx import TensorProto, helper

    right = weight.float().T.contiguous()
    stored = {"sparse_initializer": [_coordinates(right, "w")]} if sparse else {"initializer": [_tensor(right, "w")]}
    given, result = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, size])
        for name, size in zip("xy", right.shape, strict=True)
    )
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    proto = helper.make_model(
        helper.make_graph([node], "linear", [given], [result], **stored),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    session = _session(proto.SerializeToString(), torch.get_num_threads())
    return lambda rows: torch.from_numpy(session.run(None, {"x": rows.numpy()})[0])


class Logits(nn.Module):
    """A causal language model as the function of token ids that is exported."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of every position."""
        return self.model(input_ids=input_ids, use_cache=False).logits


def trace_graph(model: PreTrainedModel):
    """The float32 model as an `onnx.ModelProto` with free batch and time, without traces of where it was made."""
    engine.require("onnxruntime", PACKAGES, INSTALL)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # "torchvision is not installed"
    # The exporter's own deprecations and progress: nothing a reader can act on.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                Logits(model).eval(),
                (torch.arange(6).view(2, 3),),
                input_names=INPUTS,
                output_names=[HEAD],
                dynamic_shapes={INPUTS[0]: {0: torch.export.Dim("batch"), 1: torch.export.Dim("time")}},
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:  # its message is a page; what it was raised from names the cause
            cause = error.__cause__ or error
            said = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            raise InputError(
                f"{model.config.model_type} models cannot be traced into an ONNX graph: {said[:200]}; they run in "
                "torch as they are, and `avalab export` has other formats"
            ) from error
    proto = program.model_proto
    for part in (*proto.graph.node, *proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        del part.metadata_props[:]  # stack traces: paths of this machine
    return proto


def replace_tensors(proto, weights: str) -> None:
    """Replace, in place, float32 tensors that are bf16 exactly by what the module says of `weights`."""
    from onnx import TensorProto, helper, numpy_helper

    tensors, nodes = [], []
    for tensor in proto.graph.initializer:
        weight = torch.from_numpy(numpy_helper.to_array(tensor).copy())
        if weight.dtype != torch.float32 or not torch.equal(weight.bfloat16().float(), weight):
            tensors.append(tensor)
            continue
        name, weight = f"{tensor.name}.bf16", weight.bfloat16()
        pruned = weight.ndim == 2 and float((weight == 0).float().mean()) >= SPARSE_FROM
        if pruned and weights == "sparse":
            proto.graph.sparse_initializer.append(_coordinates(weight, name))
        elif pruned and weights == "bitmask":
            stored, decoding = _bitmask(weight, name)
            tensors, nodes = [*tensors, *stored], [*nodes, *decoding]
        else:
            tensors.append(_tensor(weight, name))
        nodes.append(helper.make_node("Cast", [name], [tensor.name], to=TensorProto.FLOAT))
    if any(node.op_type == "BitShift" for node in nodes):
        tensors += [_tensor(value, name) for name, value in CONSTANTS.items()]
    nodes += proto.graph.node
    del proto.graph.initializer[:], proto.graph.node[:]
    proto.graph.initializer.extend(tensors)
    proto.graph.node.extend(nodes)


def _tensor(value: Tensor, name: str, shape: list[int] | None = None):
    """A tensor as ONNX keeps it."""
    from onnx import TensorProto, helper

    raw = value.contiguous().view(torch.int16) if value.dtype == torch.bfloat16 else value.contiguous()
    kind = TensorProto.DataType.Value(KINDS[value.dtype])
    return helper.make_tensor(name, kind, shape or list(value.shape), raw.numpy().tobytes(), raw=True)


def _coordinates(weight: Tensor, name: str):
    """A matrix as ONNX's sparse tensor: its non-zeros, and their places in row order as int64, which ONNX demands."""
    from onnx import helper

    places = weight.flatten().nonzero().flatten()
    values = _tensor(weight.flatten()[places], name)  # a sparse tensor has the name of its values
    return helper.make_sparse_tensor(values, _tensor(places, f"{name}.places"), list(weight.shape))


def _bitmask(weight: Tensor, name: str) -> tuple[list, list]:
    """A matrix as its mask and its non-zeros, and the nodes that put them together under `name`.

    The bits' running count, where a bit is set, is the place of its weight among the non-zeros; place 0 holds the zero.
    """
    from onnx import TensorProto, helper

    parts = to_bitmask(weight)
    rows, width = parts["mask"].shape
    values = torch.cat([torch.zeros(1, dtype=weight.dtype), parts["values"]])
    stored = [_tensor(parts["mask"], f"{name}.mask", [rows, width, 1]), _tensor(values, f"{name}.values")]
    stored += [_tensor(torch.tensor([rows, 8 * width]), f"{name}.padded"), _tensor(parts["shape"], f"{name}.shape")]
    steps = [
        ("BitShift", ["mask", "bitmask.shifts"], "shifted", {"direction": "RIGHT"}),
        ("BitwiseAnd", ["shifted", "bitmask.one"], "bits", {}),
        ("Cast", ["bits"], "numbers", {"to": TensorProto.INT32}),
        ("Reshape", ["numbers", "bitmask.flat"], "set", {}),
        ("CumSum", ["set", "bitmask.first"], "count", {}),
        ("Mul", ["count", "set"], "places", {}),
        ("Gather", ["values", "places"], "gathered", {}),
        ("Reshape", ["gathered", "padded"], "wide", {}),
        ("Slice", ["wide", "bitmask.corner", "shape"], "", {}),
    ]

    def full(part: str) -> str:
        return part if part.startswith("bitmask.") else f"{name}.{part}".removesuffix(".")

    return stored, [helper.make_node(op, [*map(full, given)], [full(out)], **more) for op, given, out, more in steps]


# --- 8-bit products --------------------------------------------------------------------------------------------------

MODES = ("dynamic", "static")

OUTLIERS = 1.0  # of the logits' spread: what one scale a product may cost, however well it is chosen


def write_int8(
    artifact: Artifact, mode: str, *, windows: Int[Tensor, "window time"] | None = None, out: Path | None = None
) -> Artifact:
    """Export into `<name>+onnx-int8-<mode>` beside it or `out`; `static` needs `windows` of calibration tokens."""
    text = "" if windows is None else artifacts.sha256_of_text(str(windows.tolist()))
    step = {"step": "onnxruntime-int8", "mode": mode, "calibration": text}
    about = artifacts.Export(step, f"onnx-int8-{mode}", ("onnxruntime",))
    least = checks.FLOOR if mode == "dynamic" else OUTLIERS
    check = checks.against(artifact, Check({"onnxruntime": "q4_0"}, least=least))
    return artifacts.write_export(
        artifact, about, lambda folder: export_int8(artifact.path, folder, mode, windows=windows), check, out=out
    )


def export_int8(folder: Path, out: Path, mode: str, *, windows: Int[Tensor, "window time"] | None = None) -> None:
    """Fill `out` with the 8-bit graph, tokenizer and configuration of the dense model in `folder`.

    Raises ValueError for an unknown mode, a model that is not dense, or `static` without windows; EngineUnavailable
    without the packages.
    """
    engine.check_source(folder, mode, known=MODES, form="8-bit ONNX")
    if mode == "static" and windows is None:
        raise InputError("static 8-bit ONNX needs windows of calibration tokens, such as corpora.calibration_windows")
    engine.require("onnxruntime", PACKAGES, INSTALL)
    from onnxruntime.quantization import QuantType, quantize_dynamic

    proto = trace_graph(checkpoint.load_model(folder, dtype=torch.float32, packed=False))
    out.mkdir(parents=True, exist_ok=True)
    logging.getLogger().addFilter(_is_not_advice)
    try:
        if mode == "dynamic":
            untie(proto)
            quantize_dynamic(proto, out / FILE, weight_type=QuantType.QInt8, per_channel=True)
        else:
            _quantise_static(proto, out / FILE, windows)
    finally:
        logging.getLogger().removeFilter(_is_not_advice)
    gguf_file.copy_beside(folder, out)


def _is_not_advice(record: logging.LogRecord) -> bool:
    return "pre-processing before quantization" not in record.getMessage()


def untie(proto) -> None:
    """Replace, in place, every transposed weight of a graph by a weight that is stored transposed."""
    from onnx import numpy_helper

    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in [n for n in proto.graph.node if n.op_type == "Transpose" and n.input[0] in weights]:
        (order,) = (attribute.ints for attribute in node.attribute)
        turned = numpy_helper.to_array(weights[node.input[0]]).transpose(order)
        proto.graph.initializer.append(numpy_helper.from_array(turned.copy(), node.output[0]))
        proto.graph.node.remove(node)


def _quantise_static(proto, file: Path, windows: Tensor) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Windows(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter({INPUTS[0]: window[None].numpy()} for window in windows)

        def get_next(self) -> dict | None:
            return next(self.batches, None)

    quantize_static(
        proto,
        file,
        Windows(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul"],
        nodes_to_exclude=[node.name for node in proto.graph.node if HEAD in node.output],
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        extra_options={"MatMulConstBOnly": True},
    )
