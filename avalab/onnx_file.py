"""A bf16 artefact, pruned or not, as an ONNX file that ONNX Runtime has executed and found equal.

1. Trace the model in float32 with torch's exporter: token ids in, logits of every position out, both axes free.
2. Store what the artefact holds: weights that are bf16 exactly stay bf16, with a cast to float32 behind them, because
   ONNX Runtime has no bf16 products on a CPU. It folds the casts when it loads the file.
3. Store what was pruned as `weights` says: "dense"; "sparse", ONNX's own coordinates; or "bitmask", the layout of
   `avalab.sparse_storage` with the few nodes that unpack it.
4. Run the written file beside the model and compare their logits; a file that differs is not kept.

What zeros save here: bytes on disk. ONNX Runtime executes both layouts by making the matrices dense when it loads the
file, so they save neither memory nor time. In coordinates a kept weight costs two bytes and eight for its place, less
than the dense two only above four fifths of zeros. The bitmask costs a bit a weight and pays from one sixteenth.

What it does not do: a cache of keys and values (the whole prompt is computed in every call), quantised weights,
generation. Above the 2 GB of a protobuf tensors go into a second file, which coordinates cannot.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from avalab import artifacts, models, sparse_storage
from avalab.artifacts import Artifact
from avalab.engines import EngineUnavailable

FILE = "model.onnx"
WEIGHTS = ("dense", "sparse", "bitmask")
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
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


def require() -> None:
    """Raise EngineUnavailable with the install command where a package is missing."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise EngineUnavailable(f"ONNX export needs {', '.join(missing)}; install it: pip install 'avalab[onnx]'")


def write(artifact: Artifact, out: Path, *, weights: str = "dense") -> Artifact:
    """Export an artefact into the folder `out`, an artefact in format "onnx"; `measured` says how far logits differ.

    Raises ValueError for unknown `weights` and for a base that is not bf16, EngineUnavailable without the packages,
    RuntimeError where ONNX Runtime's logits differ by more than `TOLERANCE` of the largest.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"unknown weights {weights!r}; choose one of {', '.join(WEIGHTS)}")
    if artifact.format != "bf16":
        raise ValueError(f"{artifact.name} is in format {artifact.format!r}; only bf16 artefacts become ONNX files")
    require()
    out = artifacts.checked_target(out)
    return artifacts.write(
        out.name,
        out.parent,
        lambda folder: _export_into(folder, artifact, weights),
        base={"name": artifact.name, "sha256": artifact.sha256},
        recipe=[*artifact.card["recipe"], {"step": "onnx", "weights": weights}],
        format="onnx",
        engines=["onnxruntime"],
        licence=artifact.card["licence"],
    )


def logits(file: Path, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocab"]:
    """What ONNX Runtime computes for some tokens, on the CPU."""
    return torch.from_numpy(_session(file).run(None, {"input_ids": tokens.numpy()})[0])


def product(weight: Float[Tensor, "rows cols"], *, sparse: bool) -> Callable[[Tensor], Tensor]:
    """The product of rows with one weight as ONNX Runtime computes it in float32, given as a sparse tensor or not."""
    require()
    from onnx import TensorProto, helper

    right = weight.float().T.contiguous()
    stored = {"sparse_initializer": [_coordinates(right, "w")]} if sparse else {"initializer": [_tensor(right, "w")]}
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, size])
        for n, size in zip("xy", right.shape, strict=True)
    ]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    proto = helper.make_model(
        helper.make_graph(nodes, "linear", ends[:1], ends[1:], **stored),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    session = _session(proto.SerializeToString())
    return lambda rows: torch.from_numpy(session.run(None, {"x": rows.numpy()})[0])


@torch.inference_mode()
def difference(model: PreTrainedModel, file: Path, tokens: Int[Tensor, "batch time"]) -> dict[str, float]:
    """Largest difference of logits, over the largest logit, and share of positions whose best token is the same."""
    expected, found = model(input_ids=tokens, use_cache=False).logits, logits(file, tokens)
    worst = float((found - expected).abs().max() / expected.abs().max())
    return {
        "logit_difference": worst,
        "top1_agreement": float((found.argmax(-1) == expected.argmax(-1)).double().mean()),
    }


class Logits(nn.Module):
    """A causal language model as the function of token ids that is exported."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of every position."""
        return self.model(input_ids=input_ids, use_cache=False).logits


def graph(model: PreTrainedModel):
    """The float32 model as an `onnx.ModelProto` with free batch and time, without traces of where it was made."""
    require()
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("time")}
    how = {"dynamic_shapes": {"input_ids": axes}, "input_names": ["input_ids"], "output_names": ["logits"]}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # "torchvision is not installed"
    # The exporter's own deprecations and progress: nothing a reader can act on.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        example = (torch.arange(6).view(2, 3),)
        program = torch.onnx.export(Logits(model).eval(), example, dynamo=True, verbose=False, **how)
    proto = program.model_proto
    for node in proto.graph.node:  # stack traces: paths of this machine
        del node.metadata_props[:]
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        del value.metadata_props[:]
    return proto


def store(proto, weights: str) -> None:
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


def _session(model: Path | bytes):
    """ONNX Runtime on the CPU, with as many threads as torch."""
    require()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _export_into(folder: Path, artifact: Artifact, weights: str) -> dict:
    import onnx

    model, tokenizer = models.load(artifact, dtype=torch.float32), models.load_tokenizer(artifact)
    proto = graph(model)
    store(proto, weights)
    sparse = sum(
        len(tensor.values.raw_data) + len(tensor.indices.raw_data) for tensor in proto.graph.sparse_initializer
    )
    size = sum(len(tensor.raw_data) for tensor in proto.graph.initializer) + sparse
    if sparse and size > FILE_BYTES:
        raise ValueError(f"{artifact.name} takes {size:,} bytes; a file with sparse tensors ends at {FILE_BYTES:,}")
    onnx.save_model(proto, folder / FILE, save_as_external_data=size > FILE_BYTES, location=f"{FILE}.data")
    tokenizer.save_pretrained(folder)
    model.config.save_pretrained(folder)  # context and vocabulary, for the engine onnxruntime
    return {
        "onnx_bytes": sum(file.stat().st_size for file in folder.glob(f"{FILE}*")),
        **_checked(model, folder / FILE),
    }


def _checked(model: PreTrainedModel, file: Path) -> dict[str, float]:
    """`difference` on random tokens of another shape than the traced one. Raises RuntimeError above the tolerance."""
    generator = torch.Generator().manual_seed(0)
    found = difference(model, file, torch.randint(model.config.vocab_size, (2, 64), generator=generator))
    if not found["logit_difference"] <= TOLERANCE:
        raise RuntimeError(f"ONNX Runtime's logits differ by {found['logit_difference']:.2g} of the largest one")
    return found


def _tensor(value: Tensor, name: str, shape: list[int] | None = None):
    """A tensor as ONNX keeps it."""
    from onnx import TensorProto, helper

    kinds = {
        torch.float32: "FLOAT",
        torch.bfloat16: "BFLOAT16",
        torch.int32: "INT32",
        torch.int64: "INT64",
        torch.uint8: "UINT8",
    }
    raw = value.contiguous().view(torch.int16) if value.dtype == torch.bfloat16 else value.contiguous()
    kind = TensorProto.DataType.Value(kinds[value.dtype])
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

    parts = sparse_storage.to_bitmask(weight)
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
