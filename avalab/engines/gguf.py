"""GGUF files of the Llama and Qwen families: what llama.cpp, Ollama and OpenVINO GenAI read, from an HF artefact.

1. `write` makes an artefact: the file, configuration and tokenizer, and a `Modelfile` for Ollama.
2. Header: sizes, rotary base and norm epsilon from config.json; tokens, merges and chat template from the tokenizer
   beside the weights. Readers know ways of cutting text by name (`tokenizer.ggml.pre`): it is found from the pattern.
3. Tensors under the names of gguf's own table. Llama's query and key rows are re-ordered: the file's rotary embedding
   turns neighbouring channels, transformers' turns channel i with channel i + head_dim / 2.
4. Linear weights in one block type (`BLOCKS`). Norms and biases stay float32, as every reader expects. Embedding and
   head have 8 bits where the linear weights have 4 or 5; a row that 32 does not divide stays float16.
5. `kept` writes a packed checkpoint without rounding again: each layer in the smallest type of `RANGES` that holds its
   whole steps. Scales go from bfloat16 to float16, which holds them unless they are tiny; a minimum, scale times least
   step, is rounded to float16. GGUF has no groups of 64 or 128, and nothing between five and eight bits but
   super-blocks of 256, so that grids of 6 and 7 bits take 8.5 bits a weight.
6. `check` walks a file's header and compares the end of each tensor with the file's: engines map a file and trust it,
   and a truncated one ends a process or gives weights of zeros. (gguf's own reader takes 12 s for the header of a
   vocabulary of 150,000 entries, this one 0.2 s.)

Source: the GGUF specification, versions 2 and 3; names and keys by the gguf package. What is refused by name: K types
(see `llamacpp`), SentencePiece and unigram tokenizers, scaled rotary embeddings, experts.
"""

from __future__ import annotations

import json
import mmap
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from jaxtyping import Float, Int, Shaped, UInt8
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from avalab.kernels import block_types, formats
from avalab.kernels.block_types import Steps
from avalab.kernels.formats import Encoded
from avalab.lab import artifacts
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError
from avalab.models import checkpoint
from avalab.models.stops import padding_token, stop_tokens

BLOCKS = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")

KEPT = "kept"  # a mixed-grid artefact of `ava`: every layer in the smallest type that holds its own integers

ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}

BLOCK_WEIGHTS = 32

ENGINES = ("torch", "openvino", "llamacpp")

BESIDE = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

HEADS = ("token_embd.weight", "output.weight")

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
    about = artifacts.Export({"step": "gguf", "block": block}, f"gguf-{block}", ENGINES)

    def save(folder: Path) -> None:
        export(artifact.path, folder / f"{artifact.name}.{block}.gguf", block)
        copy_beside(artifact.path, folder)

    return artifacts.write_export(artifact, about, save, out=out)


def export(folder: Path, file: Path, block: str = "q8_0") -> None:
    """Write one GGUF file from a model folder in transformers' format, and Ollama's `Modelfile` beside it."""
    if block not in (*BLOCKS, KEPT):
        known = ", ".join((*BLOCKS, KEPT))
        raise InputError(f"no block type {block!r} is written; choose one of {known} (K types: llamacpp)")
    config = checked_config(folder, kept=block == KEPT)
    write_tensors(folder, file, stored_tensors(folder, config, block), config=config, block=block)


def write_tensors(
    folder: Path, file: Path, tensors: Iterable[tuple[str, str, np.ndarray]], *, config: PreTrainedConfig, block: str
) -> None:
    """Write a file of tensors (name, block type, content in the file's order) with the folder's tokenizer."""
    import gguf

    writer = gguf.GGUFWriter(str(file), config.model_type)
    _write_sizes(writer, config, file.stem, block)
    tokenizer = checkpoint.load_tokenizer(folder)
    _write_tokenizer(writer, tokenizer, rows=config.vocab_size, stops=stop_tokens(folder, tokenizer))
    for name, kind, values in tensors:
        writer.add_tensor(name, values, raw_dtype=gguf.GGMLQuantizationType[kind.upper()])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    (file.parent / "Modelfile").write_text(modelfile(file.name, tokenizer.chat_template or ""))


def copy_beside(folder: Path, out: Path) -> None:
    """Copy configuration and tokenizer of a model; how its weights were quantised is no longer true and left out."""
    for name in BESIDE:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    config = json.loads((out / "config.json").read_text())
    if config.pop("quantization_config", None):
        (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def checked_config(folder: Path, *, kept: bool = False) -> PreTrainedConfig:
    """The configuration of a model that can be exported. Raises ValueError naming what is not exported."""
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in ARCHITECTURES:
        raise InputError(f"{folder.name} is a {config.model_type}; exported are {', '.join(ARCHITECTURES)}")
    if getattr(config, "quantization_config", None) and not kept:
        method = config.quantization_config["quant_method"]
        raise InputError(f"{folder.name} is quantised already ({method}); export the dense model that it was made from")
    rotary = config.rope_parameters["rope_type"]
    if rotary != "default":
        raise InputError(f"{folder.name} has rotary embeddings of type {rotary!r}; exported is 'default'")
    return config


def block_of(name: str, tensor: Tensor, block: str) -> str:
    """Which block type a tensor gets when the linear weights get `block`."""
    if tensor.ndim == 1:
        return "f32"
    if not block.startswith("q"):
        return block
    if tensor.shape[1] % BLOCK_WEIGHTS:
        return "f16"
    return "q8_0" if name in HEADS else block


def encode_tensor(tensor: Tensor, block: str) -> np.ndarray:
    """A tensor's values (f32, f16) or its bytes, row by row (bf16 and blocks)."""
    if block in ("f32", "f16"):
        return tensor.to({"f32": torch.float32, "f16": torch.float16}[block]).numpy()
    if block == "bf16":
        return tensor.bfloat16().contiguous().view(torch.uint8).numpy()
    return block_types.pack_blocks(formats.encode(tensor.float(), block_types.FORMATS[block])).numpy()


def stored_tensors(folder: Path, config: PreTrainedConfig, block: str) -> Iterator[tuple[str, str, np.ndarray]]:
    """Name, block type and content of every tensor of the file, in the file's order of rows."""
    names = tensor_namer(config)
    if block == KEPT:
        tensors, block = packed_tensors(folder), "bf16"  # what is not packed
    else:
        model = checkpoint.load_model(folder, dtype=config.dtype or torch.bfloat16)
        tensors = model.named_parameters()  # each shared one once, under its first name
    for name, value in tensors:
        found = names(name)
        if isinstance(value, Steps):
            steps, scales = (in_file_order(name, part, config) for part in (value.steps, value.scales))
            kind = block_of_steps(steps)
            yield found, kind, encoded_steps(steps, scales, kind).numpy()
        else:
            kind = block_of(found, value, block)
            yield found, kind, encode_tensor(in_file_order(name, value.detach().cpu(), config), kind)


def tensor_namer(config: PreTrainedConfig) -> Callable[[str], str]:
    """The function from transformers' name of a tensor to the file's; it raises ValueError for one without."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]], config.num_hidden_layers)

    def file_name(name: str) -> str:
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise InputError(f"{name} has no name in GGUF's {config.model_type} models")
        return found

    return file_name


def in_file_order(
    name: str, tensor: Shaped[Tensor, "rows *cols"], config: PreTrainedConfig
) -> Shaped[Tensor, "rows *cols"]:
    """A parameter's rows, or their bytes, as the file's rotary embedding needs them."""
    if config.model_type != "llama" or not any(part in name for part in (".q_proj.", ".k_proj.")):
        return tensor
    return interleaved(tensor, config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads)


def interleaved(tensor: Shaped[Tensor, "rows *cols"], heads: int) -> Shaped[Tensor, "rows *cols"]:
    """Rows (0, h/2, 1, h/2 + 1, ...) of each head of h rows: pairs that turn together become neighbours."""
    halves = tensor.view(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def modelfile(weights: str, chat_template: str) -> str:
    """Ollama's description of a model: the file, and for ChatML the template, which Ollama cannot read from a file.

    For other templates Ollama looks for one of its own that matches the file's.
    """
    template = CHATML if "<|im_start|>" in chat_template else ""
    return f"FROM ./{weights}\n{template}PARAMETER temperature 0\n"


def _write_sizes(writer, config: PreTrainedConfig, name: str, block: str) -> None:
    import gguf

    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    types = {"f32": "ALL_F32", KEPT: "GUESSED", **{b: f"MOSTLY_{b.upper()}" for b in BLOCKS[1:]}}
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[types[block]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


# --- the tokenizer in the header -------------------------------------------------------------------------------------

BYTE_LEVEL = "ByteLevel"

# The part of a splitting pattern that tells the families apart: how many digits make one piece.
PATTERNS = {r"\p{N}{1,3}": "llama-bpe", r"|\p{N}|": "qwen2"}

DIGITS = set("0123456789")

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # of gguf's TokenType


def _write_tokenizer(writer, tokenizer: PreTrainedTokenizerBase, *, rows: int, stops: tuple[int, ...]) -> None:
    """Add the tokenizer to a `gguf.GGUFWriter`; `rows` of the embedding that no token has are filled as unused.

    Raises ValueError for a tokenizer that is not byte-level BPE, or has more tokens than rows.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = described["model"]["type"]
    if kind != "BPE" or BYTE_LEVEL not in json.dumps(described["pre_tokenizer"]):
        raise InputError(f"the tokenizer is no byte-level BPE (model {kind}); only those are exported")
    tokens, types = vocabulary(tokenizer, rows)
    writer.add_tokenizer_model("gpt2")
    alone = not any(len(text) > 1 and set(text) & DIGITS for text in described["model"]["vocab"])
    writer.add_tokenizer_pre(split_name(described["pre_tokenizer"], digits_stand_alone=alone))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in described["model"]["merges"]])
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id])
    # Readers end an answer at each of the three; without any, llama.cpp would take an id of its own, a piece of text.
    for kind, stop in zip(("eos", "eot", "eom"), stops or (padding_token(stops, tokenizer),), strict=False):
        getattr(writer, f"add_{kind}_token_id")(stop)
    ids = {"bos": tokenizer.bos_token_id, "pad": tokenizer.pad_token_id, "unk": tokenizer.unk_token_id}
    for name, token in ids.items():
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[list[str], list[int]]:
    """Text and type of each of `rows` ids. Raises ValueError for more tokens than rows."""
    known = {index: text for text, index in tokenizer.get_vocab().items()}
    if max(known) >= rows:
        raise InputError(f"the tokenizer has ids up to {max(known)}, the embedding {rows} rows")
    tokens = [known.get(index, f"[PAD{index}]") for index in range(rows)]
    types = [NORMAL if index in known else UNUSED for index in range(rows)]
    for index, added in tokenizer.added_tokens_decoder.items():
        types[index] = CONTROL if added.special else USER_DEFINED
    return tokens, types


def split_name(pre_tokenizer: dict[str, Any], *, digits_stand_alone: bool = False) -> str:
    """The name that readers know a way of cutting text by. Raises ValueError for one that has none here.

    Where no token joins a digit to anything, GPT-2's cut and SmolLM's give the same tokens; the latter is preferred, as
    OpenVINO GenAI 2026.4 cuts apostrophes and operators otherwise than GPT-2 does.
    """
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [part["type"] for part in parts]
    if kinds == [BYTE_LEVEL]:
        return "smollm" if digits_stand_alone else "gpt-2"
    if kinds == ["Digits", BYTE_LEVEL] and parts[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", BYTE_LEVEL]:
        pattern = parts[0]["pattern"].get("Regex", "")
        for telling, name in PATTERNS.items():
            if telling in pattern:
                return name
    raise InputError(f"text is cut by {' then '.join(kinds)}; known are {BYTE_LEVEL}, Digits, and Llama 3's and Qwen's")


# --- steps and scales that are kept ----------------------------------------------------------------------------------

RANGES = (("q4_0", -8, 7), ("q4_1", None, 15), ("q5_0", -16, 15), ("q5_1", None, 31), ("q8_0", -127, 127))

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")  # of a packed layer


def packed_tensors(folder: Path) -> Iterator[tuple[str, Tensor | Steps]]:
    """Every parameter by transformers' name. Raises ValueError for a checkpoint that holds no packed integers."""
    config = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    formats = {group.get("format") for group in config.get("config_groups", {}).values()}
    if not formats or formats - {"pack-quantized", "int-quantized"}:
        raise InputError(f"{folder.name} holds no packed integers to keep; export it with a block type instead")
    tensors = load_file(folder / "model.safetensors")
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


def block_of_steps(steps: Int[Tensor, "rows cols"]) -> str:
    """The smallest block type that holds these steps, or f16 for none."""
    if steps.shape[1] % BLOCK_WEIGHTS:
        return "f16"
    blocks = steps.view(-1, BLOCK_WEIGHTS)
    spread = int((blocks.amax(1) - blocks.amin(1)).max())
    for name, low, high in RANGES:
        if spread <= high if low is None else low <= int(steps.min()) and int(steps.max()) <= high:
            return name
    return "f16"


def encoded_steps(
    steps: Int[Tensor, "rows cols"], scales: Float[Tensor, "rows groups"], block: str
) -> UInt8[Tensor, "rows bytes"] | Float[Tensor, "rows cols"]:
    """The bytes of steps and scales in a block type that `block_of_steps` found; for f16 the values."""
    if block == "f16":
        return (steps * scales.float().repeat_interleave(steps.shape[1] // scales.shape[1], dim=1)).half()
    each = scales.half().repeat_interleave(steps.shape[1] // BLOCK_WEIGHTS // scales.shape[1], dim=1).flatten()
    format, blocks = block_types.FORMATS[block], steps.view(-1, BLOCK_WEIGHTS)
    least = blocks.amin(1) if format.offset else None
    codes = blocks if least is None else blocks - least[:, None]
    minimums = None if least is None else (least * each.float()).half()
    dtype = torch.int8 if format.low < 0 else torch.uint8
    return block_types.pack_blocks(Encoded(format, codes.to(dtype).view(steps.shape), each, minimums))


# --- whether a file is whole -----------------------------------------------------------------------------------------

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by type

STRING, ARRAY, ALIGNMENT = 8, 9, "general.alignment"


class _Header:
    """The header of a file, read from its beginning; `at` is where to read next. Raises struct.error for damage."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.alignment = data, 8, 32

    def number(self, form: str) -> int:
        """The next little-endian number, `I` of four bytes or `Q` of eight."""
        (value,) = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return value

    def text(self) -> str:
        """The next string."""
        size = self.number("Q")
        if self.at + size > len(self.data):
            raise struct.error("a string goes on beyond the end")
        self.at += size
        return self.data[self.at - size : self.at].decode(errors="replace")

    def skip(self, kind: int) -> None:
        """Pass over a value of a type, lists and their members included."""
        if kind in SIZES:
            self.at += SIZES[kind]
        elif kind == STRING:
            self.text()
        elif kind == ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner in SIZES:
                self.at += SIZES[inner] * count
            else:
                for _ in range(count):
                    self.skip(inner)
        else:
            raise struct.error(f"a value of unknown type {kind}")

    def tensors(self) -> list[tuple[str, int, int, int]]:
        """(name, elements, type, first byte) of every tensor."""
        if self.data[:4] != b"GGUF":
            raise struct.error("it does not begin with GGUF")
        count, pairs = self.number("Q"), self.number("Q")
        for _ in range(pairs):
            key, kind, at = self.text(), self.number("I"), self.at
            self.skip(kind)
            if key == ALIGNMENT:
                (self.alignment,) = struct.unpack_from("<I", self.data, at)
        found = []
        for _ in range(count):
            name, dimensions = self.text(), self.number("I")
            elements = prod(self.number("Q") for _ in range(dimensions))
            found.append((name, elements, self.number("I"), self.number("Q")))
        start = -(-self.at // self.alignment) * self.alignment
        return [(name, elements, kind, start + offset) for name, elements, kind, offset in found]


def check(file: Path) -> Counter[str]:
    """How many tensors of a file have which type, such as {"f32": 5, "q8_0": 30}.

    Raises ValueError naming file, offset and tensor for one that is no GGUF, truncated, or has tensors of unknown type.
    """
    import gguf

    if not (size := file.stat().st_size):
        raise InputError(f"{file} is damaged: it is empty")
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = _Header(data)
        try:
            tensors = header.tensors()
        except struct.error as error:
            raise InputError(f"{file} is damaged: its header breaks off at byte {header.at} ({error})") from error
    types = Counter()
    for name, elements, kind, start in tensors:
        if kind not in list(gguf.GGMLQuantizationType):
            raise InputError(f"{file}: tensor {name} at byte {start} has the unknown type {kind}")
        types[gguf.GGMLQuantizationType(kind).name.lower()] += 1
        weights, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        if (end := start + elements // weights * block_bytes) > size:
            raise InputError(f"{file} is truncated: it has {size} bytes, tensor {name} ends at byte {end}")
    return types


def block_of_file(file: Path) -> str:
    """The block type of `BLOCKS` that a file was written in; nothing for a file of other or mixed types."""
    types = check(file).keys() - {"f32"}
    eight = {"q8_0"} if any(kind.startswith("q") for kind in types) else set()
    return next((block for block in BLOCKS[1:] if {block} | eight == types | eight), "") if types else "f32"
