"""Bytes on disk: how each format keeps a linear layer, what a file will weigh, and what a file is made of.

1. A `Storage` lists the tensors that a format keeps for one linear layer, as rows of data (`Part`).
2. `predict_bytes` lists the tensors that a Llama-family model has in a storage and the header that they need.
3. `bytes_by_component` reads the headers of the safetensors files that were written, and no tensor.

Predictions leave out biases, as some families have, and the GPU layout of torchao's int4.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError
from avalab.models import checkpoint
from avalab.models.inference.layers import PackedEmbedding, PackedLinear

COMPONENTS = ("embedding", "head", "attention", "mlp", "norm", "scales", "overhead")

PAYLOAD = ("weight", "bias", "weight_packed", "qdata")  # how the name of a tensor of weights ends

WEIGHT_FILES = (".safetensors", ".gguf", ".onnx", ".data", ".bin", ".pt2", ".pte")


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-family model."""

    vocab: int
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool

    def linears(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of the linear layers of one block, by name below the block."""
        d, f, q, kv = self.hidden, self.mlp, self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q)}
        mlp = {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
        return {f"self_attn.{k}": v for k, v in attention.items()} | {f"mlp.{k}": v for k, v in mlp.items()}


@dataclass(frozen=True)
class Part:
    """One stored tensor of a linear layer: its name's ending and `bits` for every `per` weights (or a row, a layer)."""

    ending: str
    bits: float
    per: int | str = 1

    def bytes(self, rows: int, columns: int) -> int:
        items = {"row": rows, "layer": 1}[self.per] if isinstance(self.per, str) else ceil(rows * columns / self.per)
        return ceil(items * self.bits / 8)


@dataclass(frozen=True)
class Storage:
    """How a format keeps a linear layer on disk, and what it adds in memory."""

    name: str
    parts: tuple[Part, ...]
    metadata_bytes: int = 0  # text a layer in the file's header
    copy_bits: float = 0.0  # bits a weight of the linear layers that the torch engine adds on a CPU
    int8_embedding: bool = False  # with a scale a row, repeated for a tied head
    decodes: bool = True  # weights are decoded on the fly, layer by layer

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight, scales included; what is stored once a row or layer is left out."""
        return sum(part.bits / part.per for part in self.parts if not isinstance(part.per, str))


BF16 = Storage("bf16", (Part("weight", 16),), decodes=False)


def storage_of_method(method: str, parameters: dict) -> Storage:
    """The storage of an `avalab.compress.quantize` method with its (merged) parameters; `bf16` for the base.

    Raises ValueError for a method whose storage is not known.
    """
    group = parameters.get("group_size") or "row"
    if method in ("bf16", "rescale_off_grid", "cast", "prune", "merge"):
        return BF16
    if method in ("nf4", "fp4"):
        return _bitsandbytes(method, parameters.get("block_size", 64), parameters.get("double_quantization", False))
    if method == "int8":
        return Storage(method, (Part("weight", 8), Part("SCB", 32, "row"), Part("weight_format", 8, "layer")))
    if method in ("torchao-int8", "torchao-int8-dynamic"):
        return _torchao(method, "row", 32, 575 if method.endswith("dynamic") else 355)
    if method == "torchao-int4":
        return _torchao(method, group, 16, 420)
    if method == "smoothquant":
        static = (Part("input_scale", 16, "layer"), Part("input_zero_point", 8, "layer"))
        parts = (Part("weight", 8), Part("weight_scale", 16, "row"))
        return Storage(method, parts + (static if parameters.get("static", True) else ()), copy_bits=16)
    if method in ("rtn", "gptq", "awq", "autoround"):
        stored = _packed(method, parameters.get("bits", 4), group, parameters.get("symmetric", False))
        int8 = parameters.get("embedding") == "int8"
        return replace(stored, int8_embedding=int8)
    raise InputError(f"the storage of method {method!r} is not known; give a Storage of your own")


def storage_of_artifact(artifact: Artifact) -> tuple[Storage, list[str]]:
    """Storage of an artefact and the linear layers it keeps in bf16, from the last step of its card's recipe."""
    step = artifact.card["recipe"][-1]
    if step["step"] == "ava":  # each layer has a format of its own
        return Storage("ava", ()), step["skip"]
    return storage_of_method(step["step"], step), step.get("skip", [])


def predicted_bytes(artifact: Artifact) -> dict[str, int]:
    """What an artefact's file was expected to weigh: by `predict_bytes`, or as its own allocation announced."""
    stored, kept = storage_of_artifact(artifact)
    if stored.name == "ava":
        return {"allocation": artifact.card["measured"]["predicted_bytes"]}
    return predict_bytes(shape_of(artifact), stored, kept)


def _bitsandbytes(name: str, block: int, double: bool) -> Storage:
    scale = (Part("weight.absmax", 32, block),)
    if double:  # scales in 8 bits, 256 of them sharing one in 32
        nested = Part("weight.nested_absmax", 32, 256 * block), Part("weight.nested_quant_map", 256 * 32, "layer")
        scale = (Part("weight.absmax", 8, block), *nested)
    state = Part(f"weight.quant_state.bitsandbytes__{name}", 8 * (170 if double else 81), "layer")
    parts = (Part("weight", 4), *scale, Part("weight.quant_map", 16 * 32, "layer"), state)
    return Storage(name + ("-dq" if double else ""), parts, copy_bits=4 + 16 / block)


def _torchao(name: str, group: int | str, scale_bits: int, metadata_bytes: int) -> Storage:
    """Codes in a byte each, also where they have four bits (torchao on a CPU)."""
    parts = (Part("_weight_qdata", 8), Part("_weight_scale", scale_bits, group), Part("_weight_zero_point", 8, group))
    return Storage(name, parts, metadata_bytes)


def _packed(name: str, bits: int, group: int | str, symmetric: bool) -> Storage:
    if bits == 8 and name != "autoround":  # compressed-tensors packs what is shorter than a byte; we pack all
        parts = (Part("weight", 8), Part("weight_scale", 16, group))
        return Storage(name, parts + (() if symmetric else (Part("weight_zero_point", 8, group),)))
    parts = (Part("weight_packed", bits), Part("weight_scale", 16, group), Part("weight_shape", 128, "layer"))
    return Storage(name, parts + (() if symmetric else (Part("weight_zero_point", bits, group),)))


def shape_of(folder: Artifact | Path) -> Shape:
    """Sizes of the model in a folder, from its config.json.

    Raises ValueError naming the folder when there is no config or it is not Llama-like.
    """
    path = folder_of(folder) / "config.json"
    if not path.is_file():
        raise InputError(f"{path.parent} has no config.json")
    config = json.loads(path.read_text())
    try:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        return Shape(
            vocab=config["vocab_size"],
            hidden=hidden,
            mlp=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            tied=config.get("tie_word_embeddings", True),
        )
    except KeyError as error:
        raise InputError(f"{path} has no {error}; only Llama-like models are known here") from error


def bytes_by_component(artifact: Artifact | Path) -> dict[str, int]:
    """Stored bytes of the weight files by component; their sum is the size of the safetensors files exactly.

    `scales` are all tensors that only serve to decode others; `overhead` is the files' headers. Raises ValueError when
    there is no safetensors file or a header cannot be read.
    """
    files = sorted(folder_of(artifact).glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder_of(artifact)} holds no safetensors file")
    sizes = dict.fromkeys(COMPONENTS, 0)
    for file in files:
        sizes["overhead"] += file.stat().st_size
        for name, tensor in _header(file).items():
            start, end = tensor["data_offsets"]
            sizes[_component(name)] += end - start
            sizes["overhead"] -= end - start
    return sizes


def predict_bytes(model: Shape, stored: Storage, kept: Sequence[str] = ()) -> dict[str, int]:
    """Bytes by component of the file that `stored` gives; linear layers named in `kept` stay in bf16."""
    tensors = _tensor_table(model, stored, kept)
    sizes = dict.fromkeys(COMPONENTS, 0)
    for name, (_, count) in tensors.items():
        sizes[_component(name)] += count
    sizes["overhead"] = _header_bytes(tensors)
    sizes["overhead"] += stored.metadata_bytes * (len(model.linears()) * model.layers - len(kept))
    return sizes


def predict_artifact_bytes(model: Shape, stored: Storage, kept: Sequence[str] = ()) -> int:
    """Bytes of the weight file: the sum of `predict_bytes`."""
    return sum(predict_bytes(model, stored, kept).values())


def predict_gguf_bytes(model: PreTrainedModel, folder: Path, bits: float) -> int:
    """Bytes of a GGUF file with `bits` a weight of all matrices: those, vectors in float32, and the vocabulary.

    `model` may be a skeleton. A token takes its letters, a length and a type, a merge its two parts and a length;
    nothing else of the header counts.
    """
    matrices, vectors = ([p.numel() for p in model.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
    words = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = sum(8 + len(token.encode()) + 4 for token in words["vocab"])
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in words.get("merges", ()))
    return ceil(sum(matrices) * bits / 8) + 4 * sum(vectors) + tokens + sum(8 + len(pair.encode()) for pair in pairs)


def kv_cache_bytes(model: Shape, *, context: int, batch: int = 1, bytes_per_value: int = 2) -> int:
    """Bytes of keys and values of every layer for `context` tokens of `batch` sequences."""
    return 2 * model.layers * model.kv_heads * model.head_dim * batch * context * bytes_per_value


def folder_of(artifact: Artifact | Path) -> Path:
    """The folder of an artefact, or the folder itself."""
    return artifact.path if isinstance(artifact, Artifact) else Path(artifact)


def _component(name: str) -> str:
    return checkpoint.component(name) if name.endswith(PAYLOAD) else "scales"


def _header(file: Path) -> dict[str, dict]:
    """Tensors a safetensors file describes: dtype, shape, data_offsets; nothing else of the file is read."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            tensors = json.loads(stream.read(min(length, file.stat().st_size)))
    except (struct.error, ValueError) as error:
        raise InputError(f"{file} has no readable safetensors header ({error})") from error
    return {name: tensor for name, tensor in tensors.items() if name != "__metadata__"}


def _tensor_table(model: Shape, stored: Storage, kept: Sequence[str]) -> dict[str, tuple[list[int], int]]:
    """(shape, bytes) by tensor name. Shapes only serve to know the header's length."""
    d = model.hidden
    table = {"model.embed_tokens.weight": ([model.vocab, d], 2 * model.vocab * d), "model.norm.weight": ([d], 2 * d)}
    if stored.int8_embedding:
        table["model.embed_tokens.weight"] = ([model.vocab, d], model.vocab * d)
        for reader in ("model.embed_tokens", "lm_head") if model.tied else ("model.embed_tokens",):
            table[f"{reader}.weight_scale"] = ([model.vocab, 1], 2 * model.vocab)
    if not model.tied:
        table["lm_head.weight"] = ([model.vocab, d], 2 * model.vocab * d)
    for layer in range(model.layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            table[f"{prefix}{norm}.weight"] = ([d], 2 * d)
        for name, (rows, columns) in model.linears().items():
            for part in (BF16 if prefix + name in kept else stored).parts:
                size = part.bytes(rows, columns)
                table[f"{prefix}{name}.{part.ending}"] = ([rows, max(size // rows, 1)], size)
    return table


def _header_bytes(tensors: dict[str, tuple[list[int], int]]) -> int:
    """Length of the header safetensors would write, its own length included; it is padded to 8 bytes."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, count) in tensors.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + count]}
        end += count
    return 8 + ceil(len(json.dumps(header, separators=(",", ":"))) / 8) * 8


def weight_file_bytes(folder: Path) -> int:
    """Bytes of the files that hold weights, whatever the engine; tokenizers not counted."""
    files = [path for path in folder.iterdir() if path.suffix in WEIGHT_FILES and "tokenizer" not in path.name]
    return sum(path.stat().st_size for path in files)


def weight_bytes_read(model: PreTrainedModel) -> int:
    """Bytes of the tensors that a decoding step reads, scales included, each storage once.

    An input embedding is left out unless the head reads it too: a step gathers one row of it, which is nothing.
    """
    sizes = {t.data_ptr(): t.nbytes for t in stored_tensors(model)}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    shared = {t.data_ptr() for t in stored_tensors(head)} if head is not None else set()
    for tensor in stored_tensors(table):
        if tensor.data_ptr() not in shared:
            sizes.pop(tensor.data_ptr(), None)
    return sum(sizes.values())


def stored_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Plain tensors behind a model's parameters and buffers: tensor subclasses and quantisation states opened."""
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            yield from _plain_tensors(tensor)
        yield from _plain_tensors(getattr(getattr(module, "weight", None), "quant_state", None))
        yield from _plain_tensors(getattr(module, "state", None))
        yield from module.packed.tensors() if isinstance(module, PackedLinear | PackedEmbedding) else ()


def _plain_tensors(found: object) -> Iterator[torch.Tensor]:
    """Of a tensor or a bitsandbytes state (4-bit: `absmax`, `code`, nested `state2`; 8-bit: `CB`, `SCB`)."""
    if hasattr(found, "__tensor_flatten__"):
        for name in found.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(found, name))
    elif isinstance(found, torch.Tensor):
        yield found
    elif type(found).__name__ in ("QuantState", "MatmulLtState"):
        for value in vars(found).values():
            yield from _plain_tensors(value)
