"""A decoder graph for ONNX Runtime GenAI whose products have bits and block sizes of their own.

1. The library's builder writes the graph in float32, query, key and value apart (`onnx_builder`).
2. `quantise` puts, for each weight given as `Blocks`, MatMulNBits in the place of MatMul. For an embedding it puts
   GatherBlockQuantized in the place of Gather; a tied head then reads the same codes: the table is stored once.
3. `write` stores scales in the 16 bits that they come in, with a cast behind them; where blocks share one it is
   repeated behind that. Matrices that stay dense are bf16 with a cast if they are bf16 exactly. The runtime computes
   all this when it loads the file.

Products either read float32 (accuracy level 1), or round what they read to 8 bits a block (level 4, the library's own
choice): for codes of 2 and 8 bits this runtime has no other fast kernel.

What it does not do: choose, round, or join query, key and value.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from avalab import onnx_builder
from avalab.onnx_blocks import Blocks

FILE, DATA = "model.onnx", "model.onnx.data"
INPUTS = {"int8": 4, "float32": 1}  # what products read, and the operator's accuracy level
OPTIONS = ("fuse_qkv=false",)
ALIGNMENT = 64
LAYER_BYTES = 800  # of a layer's nodes and tensors in the graph's file, and of alignment, at most
KINDS = {1: torch.float32, 2: torch.uint8, 7: torch.int64, 10: torch.float16, 16: torch.bfloat16}  # ONNX's numbers
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Graph:
    """A graph (an `onnx.ModelProto`), the builder's folder with its float32 weights, and tensors in memory by name."""

    proto: object
    folder: Path
    held: dict[str, Tensor]

    @property
    def nodes(self) -> list:
        return list(self.proto.graph.node)

    @property
    def stored(self) -> dict[str, object]:
        return {tensor.name: tensor for tensor in self.proto.graph.initializer}


def build(folder: Path, scratch: Path) -> Graph:
    """The float32 graph of a dense model, its weights in the folder `scratch`, which has to outlive it."""
    import onnx

    onnx_builder.build(folder, scratch, "fp32", options=OPTIONS)
    return Graph(onnx.load(scratch / FILE, load_external_data=False), scratch, {})


def products(graph: Graph) -> dict[str, object]:
    """MatMul nodes that read a stored weight, by transformers' name of the layer."""
    stored = graph.stored
    return {_layer(n.input[1]): n for n in graph.nodes if n.op_type == "MatMul" and n.input[1] in stored}


def tied_head(graph: Graph) -> str:
    """The layer whose weight, turned, is the embedding; nothing where they are stored apart."""
    turned = {n.output[0]: n.input[0] for n in graph.nodes if n.op_type == "Transpose"}
    weight = turned.get(_look_up(graph).input[0], "")
    return _layer(weight) if weight else ""


def quantise(graph: Graph, layers: Mapping[str, Blocks], *, embedding: str, inputs: str = "int8") -> None:
    """Replace, in place, the products of the named layers and, if it is among them, the look-up of the `embedding`.

    Raises ValueError for layers that are no products of their own in the graph, or `inputs` that are not in `INPUTS`.
    """
    if inputs not in INPUTS:
        raise ValueError(f"products read {' or '.join(INPUTS)}, not {inputs!r}")
    known, head = products(graph), tied_head(graph)
    if absent := sorted(layers.keys() - known.keys() - {embedding}):
        raise ValueError(
            f"the ONNX graph has no product of its own for {', '.join(absent[:3])} ({len(absent)} in all); "
            "such a model stays a transformers artefact, or is exported as gguf"
        )
    parts = {node.output[0]: name for name, node in known.items() if name in layers}
    if embedding in layers:
        parts[_look_up(graph).output[0]] = embedding
        parts |= {known[head].output[0]: embedding} if head else {}
    found = []
    for node in graph.nodes:
        name = parts.get(node.output[0])
        made = _product if node.op_type == "MatMul" else _gathered
        if name:
            found += _tensors(graph, name, layers[name])
        found += made(graph, node, name, layers[name], INPUTS[inputs]) if name else [node]
    _exchange(graph, found)


def unchosen_bytes(graph: Graph, chosen: Collection[str], *, embedding: str) -> int:
    """Bytes of the graph, and of all weights but those of the `chosen` layers, at most."""
    known = products(graph)
    gone = {known[name].input[1] for name in chosen if name in known}
    if embedding in chosen:
        gone |= {known[tied_head(graph)].input[1] if tied_head(graph) else _look_up(graph).input[0]}
    kept = [_kept(graph, name) for name in graph.stored if name not in gone]
    rest = sum(tensor.numel() * tensor.element_size() + ALIGNMENT for tensor in kept)
    casts = sum(tensor.dtype == torch.bfloat16 for tensor in kept)
    return len(graph.proto.SerializeToString()) + rest + LAYER_BYTES * (len(chosen) + casts)


def hold(graph: Graph) -> None:
    """Read what is left of the builder's weights into memory: after that its folder is not needed any more."""
    for name in graph.stored.keys() - graph.held.keys():
        graph.held[name] = _kept(graph, name)


def write(graph: Graph, folder: Path) -> None:
    """Write a graph that is held, and its weights beside it; casts of dense matrices change `graph`."""
    from onnx import TensorProto, helper

    casts = []
    with (folder / DATA).open("wb") as file:
        for tensor in graph.proto.graph.initializer:
            value = graph.held[tensor.name]
            if KINDS[tensor.data_type] != value.dtype:
                casts.append(helper.make_node("Cast", [f"{tensor.name}.bf16"], [tensor.name], to=TensorProto.FLOAT))
                tensor.name, tensor.data_type = f"{tensor.name}.bf16", TensorProto.BFLOAT16
            if value.dtype == torch.int64:  # shapes: the runtime reads them before it opens the other file
                tensor.raw_data = value.numpy().tobytes()
                continue
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            content = value.contiguous().view(torch.uint8).numpy().tobytes()
            _place(tensor, file.tell(), len(content))
            file.write(content)
    _exchange(graph, [*casts, *graph.nodes])
    (folder / FILE).write_bytes(graph.proto.SerializeToString())


def _layer(weight: str) -> str:
    """transformers' name of the layer of a builder's weight such as `model.layers.0.attn.q_proj.MatMul.weight`."""
    return weight.removesuffix(".weight").removesuffix(".MatMul").replace(".attn.", ".self_attn.")


def _look_up(graph: Graph):
    return next(n for n in graph.nodes if n.op_type.startswith("Gather") and n.input[1] == "input_ids")


def _tensors(graph: Graph, name: str, part: Blocks) -> list:
    """Put a weight's tensors into the graph, once, and the nodes that make one float32 scale a block of its scales."""
    from onnx import TensorProto, helper

    if f"{name}.codes" in graph.held:
        return []
    _put(graph, f"{name}.codes", part.codes)
    if part.zeros is not None:
        _put(graph, f"{name}.zeros", part.zeros)
    if part.repeats == 1:
        kept = _put(graph, f"{name}.scales16", part.scales)
        return [helper.make_node("Cast", [kept], [f"{name}.scales"], to=TensorProto.FLOAT)]
    rows, groups = part.scales.shape
    kept = _put(graph, f"{name}.scales16", part.scales[..., None])
    wide = _put(graph, f"{name}.wide", torch.tensor([rows, groups, part.repeats]))
    flat = _put(graph, f"{name}.flat", torch.tensor([rows, groups * part.repeats]))
    return [
        helper.make_node("Cast", [kept], [f"{name}.scales32"], to=TensorProto.FLOAT),
        helper.make_node("Expand", [f"{name}.scales32", wide], [f"{name}.spread"]),
        helper.make_node("Reshape", [f"{name}.spread", flat], [f"{name}.scales"]),
    ]


def _product(graph: Graph, node, name: str, part: Blocks, level: int) -> list:
    from onnx import helper

    given = [node.input[0], f"{name}.codes", f"{name}.scales"] + ([] if part.zeros is None else [f"{name}.zeros"])
    sizes = {"K": part.columns, "N": part.codes.shape[0], "bits": part.bits, "block_size": part.block_size}
    how = {"name": f"{node.name}NBits", "domain": MICROSOFT, "accuracy_level": level}
    return [helper.make_node("MatMulNBits", given, list(node.output), **how, **sizes)]


def _gathered(graph: Graph, node, name: str, part: Blocks, _level: int) -> list:
    """A look-up in the rows that products read as blocks; padding at a row's end is cut off."""
    from onnx import helper

    flat = _put(graph, f"{name}.rows", torch.tensor([part.codes.shape[0], part.codes[0].numel()]))
    given = [f"{name}.table", node.input[1], f"{name}.scales"] + ([] if part.zeros is None else [f"{name}.zeros"])
    padded = part.codes.shape[1] * part.block_size != part.columns
    output = f"{name}.padded" if padded else node.output[0]
    how = {"bits": part.bits, "block_size": part.block_size, "gather_axis": 0, "quantize_axis": 1}
    found = [
        helper.make_node("Reshape", [f"{name}.codes", flat], [f"{name}.table"]),
        helper.make_node("GatherBlockQuantized", given, [output], domain=MICROSOFT, **how),
    ]
    if padded:
        ends = [_put(graph, f"{name}.slice{at}", torch.tensor([at])) for at in (0, part.columns, -1)]
        found.append(helper.make_node("Slice", [output, *ends], list(node.output)))
    return found


def _put(graph: Graph, name: str, value: Tensor) -> str:
    from onnx import TensorProto

    kind = next(number for number, dtype in KINDS.items() if dtype == value.dtype)
    graph.proto.graph.initializer.append(TensorProto(name=name, dims=value.shape, data_type=kind))
    graph.held[name] = value.detach().cpu()
    return name


def _exchange(graph: Graph, nodes: list) -> None:
    """Make these the graph's nodes, without turned weights and stored tensors that nothing reads any more."""
    read = {name for node in nodes for name in node.input}
    nodes = [node for node in nodes if node.op_type != "Transpose" or node.output[0] in read]
    read = {name for node in nodes for name in node.input}
    tensors = [tensor for tensor in graph.proto.graph.initializer if tensor.name in read]
    for part, content in ((graph.proto.graph.node, nodes), (graph.proto.graph.initializer, tensors)):
        copies = [type(one).FromString(one.SerializeToString()) for one in content]
        del part[:]
        part.extend(copies)


def _kept(graph: Graph, name: str) -> Tensor:
    """A tensor as the builder stored it; a float32 matrix that is bf16 exactly as that."""
    from onnx import numpy_helper

    tensor = graph.stored[name]
    where = {entry.key: entry.value for entry in tensor.external_data}
    if where:
        with (graph.folder / where["location"]).open("rb") as file:
            file.seek(int(where.get("offset", 0)))
            raw = bytearray(file.read(int(where["length"])))
        value = torch.frombuffer(raw, dtype=KINDS[tensor.data_type]).view(*tensor.dims)
    else:
        value = torch.from_numpy(numpy_helper.to_array(tensor).copy())
    short = value.bfloat16() if value.ndim == 2 and value.dtype == torch.float32 else value
    return short if torch.equal(short.to(value.dtype), value) else value


def _place(tensor, offset: int, length: int) -> None:
    """Let a tensor point into the file of weights."""
    from onnx import TensorProto

    tensor.ClearField("raw_data")
    tensor.ClearField("external_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", DATA), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
