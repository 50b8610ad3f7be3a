"""GGUF files of the families in `gguf_layout`: what llama.cpp, Ollama and OpenVINO GenAI read, from an HF artefact.

1. `write` makes an artefact: the file, configuration and tokenizer, and a `Modelfile` for Ollama.
2. Header and order of tensors are those of the family (`models.gguf_layout`), tokens, merges and chat templates those
   of the tokenizer beside the weights (`models.gguf_tokenizer`).
3. Linear weights in one block type (`BLOCKS`). Norms and biases stay float32, as every reader expects. Embedding and
   head have 8 bits where the linear weights have 4 or 5; a row that 32 does not divide stays float16.
4. `kept` writes a packed checkpoint without rounding again: each layer in the smallest type of `RANGES` that holds its
   values exactly. Scales go from bfloat16 to float16, which holds them unless they are tiny; a minimum, scale times
   least step, often has a bit more than float16, and five bits without minimums are taken for four with. What no type
   holds, or groups that 32 does not divide, is stored as the values that transformers decodes. GGUF has nothing
   between five and eight bits but super-blocks of 256, so that grids of 6 and 7 bits take 8.5 bits a weight.

Source: the GGUF specification, versions 2 and 3; names and keys by the gguf package. K types: see `llamacpp`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from jaxtyping import Float, Int, UInt8
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from avalab.engines import checks
from avalab.engines.checks import Check
from avalab.kernels import block_types, formats
from avalab.kernels.block_types import Steps
from avalab.kernels.formats import Encoded, NumberFormat
from avalab.lab import artifacts
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError
from avalab.models import checkpoint, gguf_layout, gguf_tokenizer
from avalab.models.stops import stop_tokens

BLOCKS = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")

KEPT = "kept"  # a mixed-grid artefact of `ava`: every layer in the smallest type that holds its own integers

BLOCK_WEIGHTS = 32

ENGINES = ("torch", "llamacpp")  # which read whatever is written here

# What OpenVINO GenAI 2026.4 makes the right graph of, where positions are not scaled, and the types that it reads.
OPENVINO_READS, OPENVINO_TYPES = ("llama", "qwen2", "qwen3"), ("f32", "f16", "q8_0", "q4_0", "q4_1")

TEMPLATES = "additional_chat_templates"  # transformers' folder of those that have a name

BESIDE = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

HEADS = ("token_embd.weight", "output.weight")

FLOAT_TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

FLOATS = ("position_embd.weight",)  # added to embeddings in float32

CHATML = """TEMPLATE \"\"\"{{ range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
\"\"\"
PARAMETER stop "<|im_end|>"
"""


def write(artifact: Artifact, block: str = "q8_0", *, out: Path | None = None) -> Artifact:
    """Export an artefact into a GGUF artefact, `<name>+gguf-<block>` beside it or the folder `out`.

    One made before by the same code is reused. Raises ValueError for an unknown block type, a model family or tokenizer
    that is not exported, or weights that are quantised already.
    """
    config = checked_config(artifact.path, kept=block == KEPT)
    about = artifacts.Export({"step": "gguf", "block": block}, f"gguf-{block}", engines_of(config, block))

    def save(folder: Path) -> dict:
        file = folder / f"{artifact.name}.{block}.gguf"
        export(artifact.path, file, block)
        copy_beside(artifact.path, folder, context=gguf_layout.context_of(config))
        return {"types": dict(sorted(gguf_layout.check(file).items())), **_context_note(config)}

    if block == KEPT:  # the source's values are rounded to bf16, the file's are not
        allowed = Check({"llamacpp": "q8_0", "torch": "bf16"})
    else:
        read = "q8_0" if block.startswith("q") else "bf16"  # llama.cpp rounds what products read, too
        allowed = Check({"llamacpp": read, "torch": ""}, stored=as_stored(config, block))
    return artifacts.write_export(artifact, about, save, checks.against(artifact, allowed), out=out)


def keep_published(artifact: Artifact, file: Path) -> Artifact:
    """The very file that a base was made from as an artefact, `<name>+gguf-published`, tokenizer beside it.

    Its numbers are the publisher's; the base's are the same function stored again. Raises ValueError for another file.
    """
    if artifact.card["base"]["sha256"] != (sha256 := artifacts.sha256_of(file)):
        raise InputError(f"{artifact.name} was not made from {file.name}: its card names another SHA-256")

    def save(folder: Path) -> dict:
        shutil.copyfile(file, folder / file.name)
        copy_beside(artifact.path, folder)
        return {"types": dict(sorted(gguf_layout.check(file).items()))}

    out, step = artifact.path.parent / f"{artifact.name}+gguf-published", {"step": "published", "sha256": sha256}
    return artifacts.make_artifact(out, save, base=artifact, step=step, format="gguf-published", engines=ENGINES)


def engines_of(config: PreTrainedConfig, block: str) -> tuple[str, ...]:
    """The engines that read a model's file of a block type as it is written."""
    plain = gguf_layout.rotary(config).get("rope_type", "default") == "default"
    known = config.model_type in OPENVINO_READS and plain and not getattr(config, "attention_bias", False)
    return ("openvino", *ENGINES) if known and block in OPENVINO_TYPES else ENGINES


def _context_note(config: PreTrainedConfig) -> dict[str, str]:
    """What a card says of a context that ends where the model's window does."""
    context = gguf_layout.context_of(config)
    if context == config.max_position_embeddings:
        return {}
    note = f"readers know no window for a {config.model_type}: the file's context ends with it, at {context} tokens"
    return {"note": note}


def export(folder: Path, file: Path, block: str = "q8_0", *, reader: Reader | None = None) -> None:
    """Write one GGUF file from a model folder in transformers' format, and Ollama's `Modelfile` beside it."""
    if block not in (*BLOCKS, KEPT):
        known = ", ".join((*BLOCKS, KEPT))
        raise InputError(f"no block type {block!r} is written; choose one of {known} (K types: llamacpp)")
    config = checked_config(folder, kept=block == KEPT)
    write_tensors(folder, file, stored_tensors(folder, config, block, reader or ANY), config=config, block=block)


def write_tensors(
    folder: Path, file: Path, tensors: Iterable[tuple[str, str, np.ndarray]], *, config: PreTrainedConfig, block: str
) -> None:
    """Write a file of tensors (name, block type, content in the file's order) with the folder's tokenizer."""
    import gguf

    architecture = gguf.MODEL_ARCH[gguf_layout.FAMILIES[config.model_type].architecture]
    writer = gguf.GGUFWriter(str(file), gguf.MODEL_ARCH_NAMES[architecture])
    _write_kind(writer, file.stem, block)
    gguf_layout.write_metadata(writer, config)
    tokenizer = checkpoint.load_tokenizer(folder)
    gguf_tokenizer.write_tokenizer(writer, tokenizer, rows=config.vocab_size, stops=stop_tokens(folder, tokenizer))
    for name, factors in gguf_layout.extra_tensors(config).items():
        writer.add_tensor(name, factors.numpy())
    for name, kind, values in tensors:
        writer.add_tensor(name, values, raw_dtype=gguf.GGMLQuantizationType[kind.upper()])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    template = gguf_tokenizer.chat_templates(tokenizer).get("default", "")
    (file.parent / "Modelfile").write_text(modelfile(file.name, template))


def copy_beside(folder: Path, out: Path, *, context: int = 0) -> None:
    """Copy configuration and tokenizer of a model; how its weights were quantised is no longer true and left out.

    `context` is a shorter one, 0 leaves the model's.
    """
    for name in BESIDE:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    if (folder / TEMPLATES).is_dir():
        shutil.copytree(folder / TEMPLATES, out / TEMPLATES)
    config = json.loads((out / "config.json").read_text())
    shorter = {"max_position_embeddings": context} if context else {}
    if config.pop("quantization_config", None) or config | shorter != config:
        (out / "config.json").write_text(json.dumps(config | shorter, indent=2, sort_keys=True) + "\n")


def checked_config(folder: Path, *, kept: bool = False) -> PreTrainedConfig:
    """The configuration of a model that can be exported. Raises ValueError naming what is not exported."""
    config = AutoConfig.from_pretrained(folder)
    gguf_layout.family_of(config, folder.name)
    if getattr(config, "quantization_config", None) and not kept:
        method = config.quantization_config["quant_method"]
        raise InputError(f"{folder.name} is quantised already ({method}); export the dense model that it was made from")
    return config


def block_of(name: str, tensor: Tensor, block: str) -> str:
    """Which block type a tensor gets when the linear weights get `block`."""
    if tensor.ndim == 1 or name in FLOATS:
        return "f32"
    if not block.startswith("q"):
        return block
    if tensor.shape[1] % BLOCK_WEIGHTS:
        return "f16"
    return "q8_0" if name in HEADS else block


def encode_tensor(tensor: Tensor, block: str) -> np.ndarray:
    """A tensor's values (f32, f16) or its bytes, row by row (bf16 and blocks)."""
    if block in ("f32", "f16"):
        return tensor.to(FLOAT_TYPES[block]).numpy()
    if block == "bf16":
        return tensor.bfloat16().contiguous().view(torch.uint8).numpy()
    return block_types.pack_blocks(formats.encode(tensor.float(), block_types.FORMATS[block])).numpy()


def as_stored(config: PreTrainedConfig, block: str) -> Callable[[str, Tensor], Tensor]:
    """The function from a parameter, by transformers' name, to the numbers that a file of a block type holds for it."""
    names = gguf_layout.tensor_namer(config)

    def numbers(name: str, tensor: Tensor) -> Tensor:
        turned = gguf_layout.is_turned(name, config) and tensor.ndim == 2
        value = tensor.T if turned else tensor
        kind = block_of(names(name), value, block)
        if kind in FLOAT_TYPES:
            found = value.to(FLOAT_TYPES[kind]).float()
        else:
            found = formats.round_to_nearest(value.float(), block_types.FORMATS[kind])
        return found.T if turned else found

    return numbers


def stored_tensors(
    folder: Path, config: PreTrainedConfig, block: str, reader: Reader
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Name, block type and content of every tensor of the file, in the file's order of rows."""
    names = gguf_layout.tensor_namer(config)
    if block == KEPT:
        tensors, block = packed_tensors(folder), reader.dense  # what is not packed
    else:
        model = checkpoint.load_model(folder, dtype=config.dtype or torch.bfloat16, packed=False)
        tensors = model.named_parameters()  # each shared one once, under its first name
    for name, value in tensors:
        found = names(name)
        if isinstance(value, Steps):
            parts = (gguf_layout.in_file_order(name, part, config) for part in (value.steps, value.scales))
            yield found, *encoded_steps(Steps(*parts), reader)
        else:
            kind = block_of(found, value, block)
            yield found, kind, encode_tensor(gguf_layout.file_value(name, value.detach().cpu(), config), kind)


def modelfile(weights: str, chat_template: str) -> str:
    """Ollama's description of a model: the file, and for ChatML the template, which Ollama cannot read from a file.

    For other templates Ollama looks for one of its own that matches the file's.
    """
    template = CHATML if "<|im_start|>" in chat_template else ""
    return f"FROM ./{weights}\n{template}PARAMETER temperature 0\n"


def _write_kind(writer, name: str, block: str) -> None:
    """Add what a file is called and how its weights are stored."""
    import gguf

    types = {"f32": "ALL_F32", KEPT: "GUESSED", **{b: f"MOSTLY_{b.upper()}" for b in BLOCKS[1:]}}
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[types[block]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


# --- steps and scales that are kept ----------------------------------------------------------------------------------

RANGES = (("q4_0", -8, 7), ("q4_1", None, 15), ("q5_0", -16, 15), ("q5_1", None, 31), ("q8_0", -127, 127))

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")  # of a packed layer


@dataclass(frozen=True)
class Reader:
    """What reads a file of kept steps: the types it knows, that of dense matrices, and how it takes minimums.

    Where minimums become whole steps when they are read, it does not matter that float16 rounds some.
    """

    types: tuple[str, ...]
    dense: str = "bf16"
    whole_minimums: bool = False


ANY = Reader(tuple(name for name, *_ in RANGES))


def packed_tensors(folder: Path) -> Iterator[tuple[str, Tensor | Steps]]:
    """Every parameter by transformers' name. Raises ValueError for a checkpoint that holds no packed integers."""
    config = json.loads((folder / "config.json").read_text()).get("quantization_config") or {}
    groups = config.get("config_groups", {}).values()
    formats = {group.get("format") or config.get("format") for group in groups}
    if not formats or formats - {"pack-quantized", "int-quantized"}:
        raise InputError(f"{folder.name} holds no packed integers to keep; export it with a block type instead")
    tensors = {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}
    if any(group.get("input_activations") for group in groups) or any(n.endswith("_g_idx") for n in tensors):
        raise InputError(f"{folder.name} rounds activations or reorders columns, which no GGUF file can say")
    for name in sorted(tensors):
        layer, _, part = name.rpartition(".")
        if part == "weight_packed" or (part == "weight" and f"{name}_scale" in tensors):
            yield f"{layer}.weight", steps_of_layer(layer, tensors)
        elif part not in PARTS:
            yield name, tensors[name]


def steps_of_layer(layer: str, tensors: Mapping[str, Tensor]) -> Steps:
    """The whole steps of a layer of compressed-tensors, packed or in bytes: codes less zero points."""
    scales = tensors[f"{layer}.weight_scale"]
    if f"{layer}.weight_packed" not in tensors:
        return Steps(tensors[f"{layer}.weight"].int(), scales.view(len(scales), -1))
    words = tensors[f"{layer}.weight_packed"]
    rows, columns = tensors[f"{layer}.weight_shape"].tolist()
    bits = words.shape[1] * 32 // columns
    steps = unpack_from_int32(words, bits, torch.Size((rows, columns))).int()
    if (zeros := tensors.get(f"{layer}.weight_zero_point")) is not None:
        zeros = unpack_from_int32(zeros, bits, scales.shape, packed_dim=0).int()
        steps -= zeros.repeat_interleave(columns // scales.shape[1], dim=1)
    return Steps(steps, scales)


def encoded_steps(weight: Steps, reader: Reader = ANY) -> tuple[str, np.ndarray]:
    """The smallest type of the reader's that holds every value exactly, and its bytes.

    Where none does, the values are stored rounded to bf16, as transformers decodes them: in float16 if it holds those.
    """
    rows, columns = weight.steps.shape
    if columns // weight.scales.shape[1] % BLOCK_WEIGHTS == 0:
        blocks, each = weight.steps.view(-1, BLOCK_WEIGHTS), _scale_a_block(weight)
        for name, low, high in RANGES:
            if name in reader.types and _holds(blocks, each, low, high, whole_minimums=reader.whole_minimums):
                return name, _bytes_of_steps(blocks, each, block_types.FORMATS[name]).view(rows, -1).numpy()
    scales = weight.scales.float().repeat_interleave(columns // weight.scales.shape[1], dim=1)
    values = (weight.steps * scales).bfloat16()
    kind = "f16" if torch.equal(values.half().float(), values.float()) else reader.dense
    return kind, encode_tensor(values, kind)


def _scale_a_block(weight: Steps) -> Float[Tensor, "blocks"]:
    """The float32 scale of every block of 32 columns, row after row."""
    return (
        weight.scales.float()
        .repeat_interleave(weight.steps.shape[1] // BLOCK_WEIGHTS // weight.scales.shape[1], 1)
        .flatten()
    )


def _holds(
    blocks: Int[Tensor, "blocks 32"], each: Float[Tensor, "blocks"], low: int | None, high: int, *, whole_minimums: bool
) -> bool:
    """Whether codes, float16 scales and, without a lowest step, float16 minimums are what the steps and scales say."""
    least, most = blocks.amin(1), blocks.amax(1)
    if not torch.equal(each.half().float(), each):
        return False
    if low is not None:
        return low <= int(least.min()) and int(most.max()) <= high
    minimums = least * each
    exact = whole_minimums or torch.equal(minimums.half().float(), minimums)
    return exact and int((most - least).max()) <= high


def _bytes_of_steps(
    blocks: Int[Tensor, "blocks 32"], each: Float[Tensor, "blocks"], format: NumberFormat
) -> UInt8[Tensor, "blocks bytes"]:
    least = blocks.amin(1) if format.offset else None
    codes = blocks if least is None else blocks - least[:, None]
    minimums = None if least is None else (least * each).half()
    dtype = torch.int8 if format.low < 0 else torch.uint8
    return block_types.pack_blocks(Encoded(format, codes.to(dtype), each.half(), minimums))


def block_of_file(file: Path) -> str:
    """The block type of `BLOCKS` that a file was written in; nothing for a file of other or mixed types."""
    types = gguf_layout.check(file).keys() - {"f32"}
    eight = {"q8_0"} if any(kind.startswith("q") for kind in types) else set()
    return next((block for block in BLOCKS[1:] if {block} | eight == types | eight), "") if types else "f32"
