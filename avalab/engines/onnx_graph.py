"""Decoder graphs of ONNX Runtime GenAI whose products have bits and block sizes of their own.

1. `run_builder`: the library's builder writes the graph in float32, query, key and value apart, in a process of its
   own, as it prints, warns and sets global options.
2. `quantise` puts, for each weight given as `Blocks`, MatMulNBits in the place of MatMul. For an embedding it puts
   GatherBlockQuantized in the place of Gather; a tied head then reads the same codes: the table is stored once.
3. `write` stores scales in the 16 bits that they come in, with a cast behind them; where blocks share one it is
   repeated behind that. Matrices that stay dense are bf16 with a cast if they are bf16 exactly. The runtime computes
   all this when it loads the file.
4. `export_packed` decodes a compressed-tensors checkpoint, lets the builder write that dense model's graph, and puts
   the packed tensors into it as blocks that hold the very same steps (`onnx_blocks`): nothing is rounded again. Bits
   and groups follow from the tensors' shapes.
5. `OnnxModel.save_pretrained` writes the folder, opens it in ONNX Runtime GenAI, and says how far its logits are off.

Products either read float32 (accuracy level 1), or round what they read to 8 bits a block (level 4, the library's own
choice): for codes of 2 and 8 bits this runtime has no other fast kernel. A decoded value is steps times scale in
float32, where transformers rounds that product to bf16.
What it does not do: choose grids or round, join query, key and value; rounded activations; experts.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from avalab.engines import engine
from avalab.kernels import block_types
from avalab.kernels.block_types import Blocks, Steps
from avalab.models import checkpoint, predict

INSTALL = 'pip install -e ".[onnx]"'

PACKAGES = ("onnxruntime_genai", "onnx_ir")

BESIDE = ("config.json", "generation_config.json")

LIMIT_SECONDS = 3600

REFUSAL = "not currently supported"  # of the builder, for a family of models


def require() -> None:
    """Raise EngineUnavailable with the install command where a package of the builder is missing."""
    for module in PACKAGES:
        engine.require("onnx", module, INSTALL)


def run_builder(folder: Path, out: Path, precision: str, *, options: Sequence[str] = ()) -> None:
    """Fill `out` with graph, weights, tokenizer and configuration of the dense model in `folder`.

    Raises ValueError for a family that the builder does not know, naming the exports that remain, EngineUnavailable
    without its packages, and RuntimeError with its last line when it fails.
    """
    require()
    with tempfile.TemporaryDirectory() as cache:
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-e", "cpu", "-p", precision]
        command = [*builder, "-i", str(folder.resolve()), "-o", str(out.resolve()), "-c", cache]
        command += ["--extra_options", *options] if options else []
        done = subprocess.run(command, capture_output=True, text=True, cwd=cache, timeout=LIMIT_SECONDS)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        if REFUSAL in last:
            raise ValueError(
                f"{folder.name}: {last.partition(': ')[2] or last} That is said by ONNX Runtime GenAI's builder; "
                "packed artefacts stay readable in transformers and vLLM, and `avalab export` writes gguf and openvino"
            )
        raise RuntimeError(f"the ONNX model builder failed on {folder.name}: {last}")
    for name in BESIDE:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)


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

    run_builder(folder, scratch, "fp32", options=OPTIONS)
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


# --- packed checkpoints ----------------------------------------------------------------------------------------------

FORMAT, ENGINES = "onnx-mixed", ("onnx",)

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")

DIFFERENT = 1.0  # nats a token: a wrong graph, not arithmetic

CHECKED = "A language model gives every next word a probability. This one was rounded, and here it is read back."


@dataclass(frozen=True)
class OnnxModel:
    """A graph that is held, files beside it, token ids and logits to check it with, and what was measured so far."""

    graph: Graph
    beside: dict[str, bytes]
    tokens: Int[Tensor, "window time"]
    expected: Float[Tensor, "token vocab"]
    measured: dict

    def save_pretrained(self, folder: Path) -> None:
        """Write graph, weights and configuration; `measured` then says what ONNX Runtime makes of them."""
        folder = Path(folder)
        write(self.graph, folder)
        for name, content in self.beside.items():
            (folder / name).write_bytes(content)
        self.measured.update(_compared(self.expected, logits(folder, self.tokens)))
        self.measured["onnx_bytes"] = sum(file.stat().st_size for file in folder.glob(f"{FILE}*"))


def export_packed(folder: Path, out: Path, *, inputs: str = "int8") -> dict:
    """Fill `out` with the graph of a packed checkpoint, its tokenizer and configuration; what the card should say.

    Raises ValueError for a checkpoint without packed layers, groups without blocks, or a family without a graph.
    """
    tensors, own_bytes = packed(folder)
    layers = {name: block_types.blocks(weight) for name, weight in tensors.items()}
    model, tokenizer = (
        checkpoint.load_model(folder),
        checkpoint.load_tokenizer(folder),
    )  # not before what cannot be kept is refused
    tokens = torch.tensor(tokenizer(CHECKED).input_ids)
    expected = _dense_logits(model, tokens)
    checkpoint.forget_quantisation(model)
    embedding, head = tables(model)
    with tempfile.TemporaryDirectory() as dense, tempfile.TemporaryDirectory() as scratch:
        checkpoint.save_model(model, tokenizer, Path(dense))
        graph = build(Path(dense), Path(scratch))
        if tied_head(graph):
            layers.pop(head, None)  # the same codes as the embedding's
        about = {"measured_on": f"{len(tokens)} tokens, ONNX Runtime against transformers in bf16"}
        measured = about | {"containers": containers(layers), "note": _note(layers, own_bytes, inputs)}
        made = finished(graph, layers, embedding, inputs=inputs, check=(tokens[None], expected), measured=measured)
    made.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return made.measured


def finished(
    graph: Graph,
    layers: Mapping[str, Blocks],
    embedding: str,
    *,
    inputs: str,
    check: tuple[Tensor, Tensor],
    measured: dict,
) -> OnnxModel:
    """The builder's graph with weights in blocks, in memory; `check` are windows of token ids and their logits."""
    quantise(graph, layers, embedding=embedding, inputs=inputs)
    hold(graph)
    names = ("genai_config.json", *BESIDE)
    beside = {name: (graph.folder / name).read_bytes() for name in names if (graph.folder / name).is_file()}
    return OnnxModel(graph, beside, *check, measured)


def packed(folder: Path) -> tuple[dict[str, Steps], int]:
    """Packed tensors by transformers' names, and their bytes in the checkpoint.

    Raises ValueError for a checkpoint that has none, or whose steps the graph has no place for.
    """
    file = folder / "config.json"
    config = json.loads(file.read_text()) if file.is_file() else {}
    groups = (config.get("quantization_config") or {}).get("config_groups", {}).values()
    tensors = {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}
    if any(group.get("input_activations") for group in groups) or any(n.endswith("_g_idx") for n in tensors):
        raise ValueError(f"{folder.name} rounds activations or reorders columns; the ONNX graph keeps neither")
    codes = (n.rpartition(".") for n, t in tensors.items() if t.dtype in (torch.int32, torch.int8))
    names = [n for n, _, kind in codes if kind in ("weight_packed", "weight") and f"{n}.weight_scale" in tensors]
    if not names:
        raise ValueError(
            f"{folder.name} holds no packed layers to keep; ava, gptq, awq and rtn make some, and a dense model is "
            "exported with weights int4, int8 or fp32"
        )
    parts = (f"{name}.{part}" for name in names for part in (*PARTS, "weight"))
    own_bytes = sum(tensors[n].numel() * tensors[n].element_size() for n in parts if n in tensors)
    return {name: _steps(name, tensors) for name in names}, own_bytes


def tables(model: PreTrainedModel) -> tuple[str, str]:
    """Names of embedding and head."""
    wanted = (model.get_input_embeddings(), model.get_output_embeddings())
    return tuple(next(name for name, module in model.named_modules() if module is one) for one in wanted)


def containers(layers: Mapping[str, Blocks]) -> dict[str, int]:
    """How many weights are stored in which bits and blocks: `int4-b64`, `int4-b64-zeros`."""
    named = (f"int{p.bits}-b{p.block_size}" + ("" if p.zeros is None else "-zeros") for p in layers.values())
    return dict(sorted(Counter(named).items()))


def logits(folder: Path, windows: Int[Tensor, "window time"]) -> Float[Tensor, "token vocab"]:
    """What ONNX Runtime GenAI computes for windows of token ids, one after the other."""
    import onnxruntime_genai

    model, found = onnxruntime_genai.Model(str(folder)), []
    for window in windows:
        options = onnxruntime_genai.GeneratorParams(model)
        options.set_search_options(max_length=len(window), do_sample=False)
        generator = onnxruntime_genai.Generator(model, options)
        generator.append_tokens(np.asarray(window, dtype=np.int32))
        found.append(torch.from_numpy(generator.get_output("logits")[0].copy()))
    return torch.cat(found)


def _steps(name: str, tensors: Mapping[str, Tensor]) -> Steps:
    scales = tensors[f"{name}.weight_scale"]
    if f"{name}.weight_packed" not in tensors:
        return Steps(tensors[f"{name}.weight"].int(), scales.view(len(scales), -1))
    words = tensors[f"{name}.weight_packed"]
    rows, columns = tensors[f"{name}.weight_shape"].tolist()
    bits = words.shape[1] * 32 // columns
    steps = unpack_from_int32(words, bits, torch.Size((rows, columns))).int()
    if f"{name}.weight_zero_point" in tensors:
        zeros = unpack_from_int32(tensors[f"{name}.weight_zero_point"], bits, scales.shape, packed_dim=0).int()
        steps -= zeros.repeat_interleave(columns // scales.shape[1], dim=1)
    return Steps(steps, scales)


def _note(layers: Mapping[str, Blocks], own_bytes: int, inputs: str) -> str:
    held = sum(part.bytes for part in layers.values())
    return (
        f"nothing was rounded again: {len(layers)} packed weights take {held:,} bytes in ONNX Runtime's 2, 4 and 8 "
        f"bits and {own_bytes:,} in the artefact; products read {inputs}"
    )


@torch.inference_mode()
def _dense_logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    return model(tokens[None], use_cache=False).logits[0].float()


def _compared(expected: Tensor, found: Tensor) -> dict[str, float]:
    """Divergence from what was expected, nats a token. Raises RuntimeError where the two have nothing in common."""
    reference, candidate = (part[:, : expected.shape[1]].float().log_softmax(-1) for part in (expected, found))
    divergence = float(predict.kl_divergence(reference, candidate).mean())
    if not divergence < DIFFERENT:
        raise RuntimeError(f"ONNX Runtime's distributions diverge by {divergence:.2f} nats: the graph is wrong")
    return {"measured_kl_divergence": divergence}
