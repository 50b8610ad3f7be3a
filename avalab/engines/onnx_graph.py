"""Decoder graphs of ONNX Runtime GenAI whose products have bits and block sizes of their own.

1. `run_builder`: the library's builder writes the graph in float32, query, key and value apart, in a process of its
   own, as it prints, warns and sets global options.
2. `replace_products` puts MatMulNBits in the place of MatMul for each weight given as `Blocks`, and for an embedding
   GatherBlockQuantized in the place of Gather; a tied head then reads the same codes: the table is stored once.
3. `write_graph` stores scales in the 16 bits that they come in, with a cast behind them; where blocks share one it is
   repeated behind that. Matrices that stay dense are bf16 with a cast if they are bf16 exactly. The runtime computes
   all this when it loads the file.
4. `export_packed` decodes a compressed-tensors checkpoint, lets the builder write that dense model's graph, and puts
   the packed tensors into it as blocks that hold the very same steps: nothing is rounded again.
5. `OnnxModel.save_pretrained` writes the folder, opens it in ONNX Runtime GenAI, and says how far its logits are off.

Products either read float32 (accuracy level 1), or round what they read to 8 bits a block (level 4, the library's own
choice): for codes of 2 and 8 bits this runtime has no other fast kernel. A decoded value is steps times scale in
float32, where transformers rounds that product to bf16.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor

from avalab.engines import engine
from avalab.engines import gguf as gguf_file
from avalab.kernels import block_types
from avalab.kernels.block_types import Blocks
from avalab.lab.errors import InputError, ProcessFailed
from avalab.models import checkpoint, gguf_layout, loading, predict
from avalab.models.stops import stop_tokens

INSTALL = 'pip install -e ".[onnx]"'

PACKAGES = ("onnxruntime_genai", "onnx_ir")

BESIDE = ("config.json", "generation_config.json")

LIMIT_SECONDS = 3600

OTHERS = "`avalab export` writes gguf, aot and onnx (weights dense)"

UNBUILT = ("linear", "yarn", "dynamic")  # scalings of positions that it passes over in silence

DEFECTS = ("KeyError", "AttributeError", "TypeError", "NotImplementedError")  # what the builder ends with, otherwise

REFUSAL = "not currently supported"  # of the builder, for a family of models


def refuse_unbuilt(folder: Path) -> None:
    """Raise ValueError for a model of which the builder makes another one, or a graph that stops at its window."""
    config = loading.read_config(folder)
    window, reason = gguf_layout.window_of(config), ""
    if gguf_layout.rotary(config).get("rope_type") in UNBUILT:
        reason = f"leaves out rotary embeddings of type {gguf_layout.rotary(config)['rope_type']!r}"
    elif 0 < window < config.max_position_embeddings:
        reason = f"makes a graph that stops after the {window} tokens of the window"
    if reason:
        raise InputError(f"{folder.name}: ONNX Runtime GenAI's builder {reason} of a {config.model_type}; {OTHERS}")


def run_builder(folder: Path, out: Path, precision: str, *, options: Sequence[str] = ()) -> None:
    """Fill `out` with graph, weights, tokenizer and configuration of the dense model in `folder`.

    Raises ValueError for a family that the builder does not know, naming the exports that remain, EngineUnavailable
    without its packages, and RuntimeError with its last line when it fails.
    """
    engine.require("onnx", PACKAGES, INSTALL)
    refuse_unbuilt(folder)
    with tempfile.TemporaryDirectory() as cache:
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-e", "cpu", "-p", precision]
        command = [*builder, "-i", str(folder.resolve()), "-o", str(out.resolve()), "-c", cache]
        command += ["--extra_options", *options] if options else []
        # Without git the builder takes its release for the producer's; with it, the revision of whatever is around it.
        here = os.environ | {"GIT_DIR": os.devnull}
        done = subprocess.run(command, capture_output=True, text=True, cwd=cache, env=here, timeout=LIMIT_SECONDS)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        if REFUSAL in last:
            raise InputError(
                f"{folder.name}: {last.partition(': ')[2] or last} That is said by ONNX Runtime GenAI's builder; "
                f"packed artefacts stay readable in transformers and vLLM, and {OTHERS}"
            )
        if last.partition(":")[0] in DEFECTS:
            kind = json.loads((folder / "config.json").read_text()).get("model_type")
            raise InputError(
                f"{folder.name} is a {kind} of a kind that ONNX Runtime GenAI's builder cannot read ({last}); {OTHERS}"
            )
        raise ProcessFailed(f"the ONNX model builder failed on {folder.name}: {last}")
    for name in BESIDE:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    _name_stops(out / "genai_config.json", stop_tokens(folder))


def _name_stops(file: Path, stops: tuple[int, ...]) -> None:
    """Let whoever runs the folder without the lab stop where the lab stops."""
    told = json.loads(file.read_text(encoding="utf-8"))
    if stops:
        told["model"]["eos_token_id"] = list(stops)
    file.write_text(json.dumps(told, indent=4), encoding="utf-8")


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


def build_graph(folder: Path, scratch: Path) -> Graph:
    """The float32 graph of a dense model, its weights in the folder `scratch`, which has to outlive it."""
    import onnx

    run_builder(folder, scratch, "fp32", options=OPTIONS)
    return Graph(onnx.load(scratch / FILE, load_external_data=False), scratch, {})


def _products(graph: Graph) -> dict[str, object]:
    """MatMul nodes that read a stored weight, by transformers' name of the layer."""
    stored = graph.stored
    return {_layer(n.input[1]): n for n in graph.nodes if n.op_type == "MatMul" and n.input[1] in stored}


def _layer(weight: str) -> str:
    """transformers' name of the layer of a builder's weight such as `model.layers.0.attn.q_proj.MatMul.weight`."""
    return weight.removesuffix(".weight").removesuffix(".MatMul").replace(".attn.", ".self_attn.")


def _look_up(graph: Graph):
    """The node that reads the embedding."""
    return next(n for n in graph.nodes if n.op_type.startswith("Gather") and n.input[1] == "input_ids")


def _tied_head(graph: Graph) -> str:
    """The layer whose weight, turned, is the embedding; nothing where they are stored apart."""
    turned = {n.output[0]: n.input[0] for n in graph.nodes if n.op_type == "Transpose"}
    weight = turned.get(_look_up(graph).input[0], "")
    return _layer(weight) if weight else ""


def replace_products(graph: Graph, layers: Mapping[str, Blocks], *, embedding: str, inputs: str = "int8") -> None:
    """Replace, in place, the products of the named layers and, if it is among them, the look-up of the `embedding`.

    Raises ValueError for layers that are no products of their own in the graph, or `inputs` that are not in `INPUTS`.
    """
    if inputs not in INPUTS:
        raise InputError(f"products read {' or '.join(INPUTS)}, not {inputs!r}")
    known, head = _products(graph), _tied_head(graph)
    if absent := sorted(layers.keys() - known.keys() - {embedding}):
        raise InputError(
            f"the ONNX graph has no product of its own for {', '.join(absent[:3])} ({len(absent)} in all); "
            "such a model stays a transformers artefact, or is exported as gguf"
        )
    parts = {node.output[0]: name for name, node in known.items() if name in layers}
    if embedding in layers:
        parts[_look_up(graph).output[0]] = embedding
        parts |= {known[head].output[0]: embedding} if head else {}
    found = []
    for node in graph.nodes:
        if name := parts.get(node.output[0]):
            found += _tensors(graph, name, layers[name])
            found += _product(graph, node, name, layers[name], INPUTS[inputs])
        else:
            found.append(node)
    _exchange(graph, found)


def unchosen_bytes(graph: Graph, chosen: Collection[str], *, embedding: str) -> int:
    """Bytes of the graph, and of all weights but those of the `chosen` layers, at most."""
    known = _products(graph)
    gone = {known[name].input[1] for name in chosen if name in known}
    if embedding in chosen:
        head = _tied_head(graph)
        gone.add(known[head].input[1] if head else _look_up(graph).input[0])
    kept = [_kept(graph, name) for name in graph.stored if name not in gone]
    rest = sum(tensor.numel() * tensor.element_size() + ALIGNMENT for tensor in kept)
    casts = sum(tensor.dtype == torch.bfloat16 for tensor in kept)
    return len(graph.proto.SerializeToString()) + rest + LAYER_BYTES * (len(chosen) + casts)


def write_graph(graph: Graph, folder: Path) -> None:
    """Write a graph whose weights are all held, and those beside it; casts of dense matrices change `graph`."""
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
            tensor.ClearField("raw_data")
            tensor.ClearField("external_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", DATA), ("offset", file.tell()), ("length", len(content))):
                tensor.external_data.add(key=key, value=str(value))
            file.write(content)
    _exchange(graph, [*casts, *graph.nodes])
    (folder / FILE).write_bytes(graph.proto.SerializeToString())


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
    """The nodes in the place of a product or look-up of a weight that is now stored as blocks."""
    from onnx import helper

    zeros = [] if part.zeros is None else [f"{name}.zeros"]
    if node.op_type == "MatMul":
        return [
            helper.make_node(
                "MatMulNBits",
                [node.input[0], f"{name}.codes", f"{name}.scales", *zeros],
                list(node.output),
                name=f"{node.name}NBits",
                domain=MICROSOFT,
                K=part.columns,
                N=part.codes.shape[0],
                bits=part.bits,
                block_size=part.block_size,
                accuracy_level=level,
            )
        ]
    flat = _put(graph, f"{name}.rows", torch.tensor([part.codes.shape[0], part.codes[0].numel()]))
    padded = part.codes.shape[1] * part.block_size != part.columns
    output = f"{name}.padded" if padded else node.output[0]
    found = [
        helper.make_node("Reshape", [f"{name}.codes", flat], [f"{name}.table"]),
        helper.make_node(
            "GatherBlockQuantized",
            [f"{name}.table", node.input[1], f"{name}.scales", *zeros],
            [output],
            domain=MICROSOFT,
            bits=part.bits,
            block_size=part.block_size,
            gather_axis=0,
            quantize_axis=1,
        ),
    ]
    if padded:  # at the end of each row
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
    copy = type(tensor)()
    copy.CopyFrom(tensor)  # reading makes the file's bytes part of it
    value = torch.from_numpy(numpy_helper.to_array(copy, str(graph.folder)).copy())
    short = value.bfloat16() if value.ndim == 2 and value.dtype == torch.float32 else value
    return short if torch.equal(short.to(value.dtype), value) else value


# --- packed checkpoints ----------------------------------------------------------------------------------------------

FORMAT, ENGINES = "onnx-mixed", ("onnx",)

DIFFERENT = 1.0  # nats a token: a wrong graph, not arithmetic

CHECKED = "A language model gives every next word a probability. This one was rounded, and here it is read back."


@dataclass(frozen=True)
class OnnxModel:
    """A graph that is held, files beside it, token ids to check it with, and what was measured so far.

    `expected` are logits of the model that the graph is, `reference` those of what it is measured against.
    """

    graph: Graph
    beside: dict[str, bytes]
    tokens: Int[Tensor, "window time"]
    expected: Float[Tensor, "token vocab"]
    reference: Float[Tensor, "token vocab"]
    measured: dict

    def save_pretrained(self, folder: Path) -> None:
        """Write graph, weights and configuration; `measured` then says what ONNX Runtime makes of them."""
        import onnxruntime_genai

        folder = Path(folder)
        write_graph(self.graph, folder)
        for name, content in self.beside.items():
            (folder / name).write_bytes(content)
        state = {"model": onnxruntime_genai.Model(str(folder))}
        windows = self.tokens.tolist()
        found = torch.cat([token_reader(state, len(window), True)(window) for window in windows])
        if not (apart := _divergence(self.expected, found)) < DIFFERENT:
            raise ProcessFailed(
                f"ONNX Runtime's distributions diverge by {apart:.2f} nats from those of the same weights in torch: "
                "the graph is wrong, or this model bears no inputs of 8 bits; other formats read none"
            )
        self.measured["measured_kl_divergence"] = _divergence(self.reference, found)
        self.measured["onnx_bytes"] = sum(file.stat().st_size for file in folder.glob(f"{FILE}*"))


def export_packed(folder: Path, out: Path, *, inputs: str = "int8") -> dict:
    """Fill `out` with the graph of a packed checkpoint, its tokenizer and configuration; what the card should say.

    Raises ValueError for a checkpoint without packed layers, groups without blocks, or a family without a graph.
    """
    layers, own_bytes = packed_blocks(folder)  # before the model is loaded: it may be that nothing can be kept
    model, tokenizer = checkpoint.load_model(folder, packed=False), checkpoint.load_tokenizer(folder)
    tokens = torch.tensor([tokenizer(CHECKED).input_ids])
    with torch.inference_mode():
        expected = model(tokens, use_cache=False).logits[0].float()
    checkpoint.forget_quantisation(model)
    embedding, head = (
        next(name for name, module in model.named_modules() if module is wanted)
        for wanted in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    with tempfile.TemporaryDirectory() as dense, tempfile.TemporaryDirectory() as scratch:
        checkpoint.save_model(model, tokenizer, Path(dense))
        graph = build_graph(Path(dense), Path(scratch))
        if _tied_head(graph):
            layers.pop(head, None)  # the same codes as the embedding's
        measured = {
            "measured_on": f"{tokens.numel()} tokens, ONNX Runtime against transformers in bf16",
            "containers": count_containers(layers),
            "note": f"nothing was rounded again: {len(layers)} packed weights take "
            f"{sum(part.bytes for part in layers.values()):,} bytes in ONNX Runtime's 2, 4 and 8 bits and "
            f"{own_bytes:,} in the artefact; products read {inputs}",
        }
        check = tokens, expected, expected
        made = finish_model(graph, layers, embedding, inputs=inputs, check=check, measured=measured)
    made.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return made.measured


def finish_model(
    graph: Graph,
    layers: Mapping[str, Blocks],
    embedding: str,
    *,
    inputs: str,
    check: tuple[Tensor, Tensor, Tensor],
    measured: dict,
) -> OnnxModel:
    """The builder's graph with weights in blocks, in memory.

    `check` are windows of token ids, their logits by the model that the graph is, and by what it is measured against.
    """
    replace_products(graph, layers, embedding=embedding, inputs=inputs)
    for name in graph.stored.keys() - graph.held.keys():  # after that the builder's folder is not needed any more
        graph.held[name] = _kept(graph, name)
    names = ("genai_config.json", *BESIDE)
    beside = {name: (graph.folder / name).read_bytes() for name in names if (graph.folder / name).is_file()}
    return OnnxModel(graph, beside, *check, measured)


def packed_blocks(folder: Path) -> tuple[dict[str, Blocks], int]:
    """Packed tensors as blocks by transformers' names, and their bytes in the checkpoint.

    Raises ValueError for a checkpoint that has none, or whose steps the graph has no place for.
    """
    file = folder / "config.json"
    config = json.loads(file.read_text()) if file.is_file() else {}
    groups = (config.get("quantization_config") or {}).get("config_groups", {}).values()
    tensors = {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}
    if any(group.get("input_activations") for group in groups) or any(n.endswith("_g_idx") for n in tensors):
        raise InputError(f"{folder.name} rounds activations or reorders columns; the ONNX graph keeps neither")
    codes = (n.rpartition(".") for n, t in tensors.items() if t.dtype in (torch.int32, torch.int8))
    names = [n for n, _, part in codes if part in ("weight_packed", "weight") and f"{n}.weight_scale" in tensors]
    if not names:
        raise InputError(
            f"{folder.name} holds no packed layers to keep; ava, gptq, awq and rtn make some, and a dense model is "
            "exported with weights int4, int8 or fp32"
        )
    parts = (f"{name}.{part}" for name in names for part in (*gguf_file.PARTS, "weight"))
    own_bytes = sum(tensors[n].numel() * tensors[n].element_size() for n in parts if n in tensors)
    return {name: block_types.smallest_blocks(gguf_file.steps_of_layer(name, tensors)) for name in names}, own_bytes


def count_containers(layers: Mapping[str, Blocks]) -> dict[str, int]:
    """How many weights are stored in which bits and blocks: `int4-b64`, `int4-b64-zeros`."""
    named = (f"int{p.bits}-b{p.block_size}" + ("" if p.zeros is None else "-zeros") for p in layers.values())
    return dict(sorted(Counter(named).items()))


def token_reader(state: dict, capacity: int, every: bool) -> Callable[[list[int]], Tensor]:
    """The reader of ONNX Runtime GenAI's `state["model"]`, as `engine.from_reader` takes it."""
    import onnxruntime_genai

    parameters = onnxruntime_genai.GeneratorParams(state["model"])
    parameters.set_search_options(max_length=capacity, do_sample=False)
    generator = onnxruntime_genai.Generator(state["model"], parameters)

    def read(tokens: list[int]) -> Tensor:
        try:
            generator.append_tokens(np.array(tokens, dtype=np.int32))
        except RuntimeError as error:
            raise ProcessFailed(f"ONNX Runtime stopped after {len(tokens)} tokens: {_first_line(error)}") from error
        found = generator.get_output("logits")[0] if every else generator.get_logits()[0]
        return torch.from_numpy(found.copy())

    return read


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _divergence(expected: Tensor, found: Tensor) -> float:
    """KL divergence from what was expected, nats a token."""
    reference, candidate = (part[:, : expected.shape[1]].float().log_softmax(-1) for part in (expected, found))
    return float(predict.kl_divergence(reference, candidate).mean())
