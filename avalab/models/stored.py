"""Files that transformers 5.17 cannot read alone: pruned weights, GGUF tokenizers, HQQ, packed embeddings.

**What zeros save on disk.** Pruned layers of a model file keep only what is left of them; the rest is as in the dense
file, and writing and reading are inverse to the bit. Engines here read dense weights: disk and download gain, not
memory or time. A group of four with more zeros than two keeps zeros as values.

| layout | of a layer with rows x cols weights | bytes |
|---|---|---|
| `bitmask` | one bit a weight, the kept ones in bf16, row by row | rows x ceil(cols / 8) + 2 x kept |
| `2:4` | two of every four in bf16, and two bits for the place of each | rows x cols x (1/8 + 1) |

The first is compressed-tensors' `sparse-bitmask`, which its present version can no longer write; the second is that of
sparse tensor cores (Mishra et al. 2021, arXiv 2104.08378).

**The tokenizer of a GGUF file with SentencePiece's vocabulary.** transformers leaves Gemma's merges and start token
out, so that the model scores as if damaged. llama.cpp's rule: user-defined tokens are cut out first; elsewhere a space
is written U+2581 and the neighbours whose joined token scores highest are merged, over and over; a character without
a token falls back to its bytes. As byte-pair encoding: all splits of each token into two, the highest score first.

**HQQ** (Badri and Shaji 2023, Half-Quadratic Quantization: zero points chosen so that the weights' error is sparse; no
data). The library rounds and decodes; a file keeps packed codes and a float16 scale and zero point a group, and the
configuration holds the settings once. The library itself saves pickles, or 17 tensors of settings a layer.

**An embedding below 8 bits in a compressed-tensors checkpoint** is kept as a packed linear layer is. transformers and
vLLM look for a tensor called `weight` and refuse the folder. Its group is taken out of the configuration that
transformers sees; what transformers then misses has to be the embedding (and a head tied to it) and nothing more; the
decoded rows, integers less zero points times scales, each in bf16, take the place.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int, UInt8
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from avalab.kernels.formats import Grid, Rounded
from avalab.kernels.packed.weight import fits, from_rounded
from avalab.lab.errors import InputError
from avalab.models import loading
from avalab.models.inference import layers

SPARSE_FILE = "model.sparse"  # safetensors inside; another suffix, so that nothing loads it for the weights

LAYOUTS = ("bitmask", "2:4")

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # token types of the GGUF specification

SPACE = "\u2581"

SENTENCEPIECE_FAMILIES = ("gemma3_text",)  # transformers' names

HQQ = "hqq"

PACKED_EMBEDDING = "packed_embedding"  # its name among the configuration's groups

PACKED_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")

CHUNK_ROWS = 16384  # unpacked at a time


# --- what zeros save -------------------------------------------------------------------------------------------------


def write_sparse(tensors: dict[str, Tensor], sparse: list[str], path: Path, *, layout: str = "bitmask") -> int:
    """Write a model's tensors, those named in `sparse` compressed; returns the file's bytes.

    Raises ValueError for an unknown layout, or a tensor that does not have its zeros.
    """
    if layout not in LAYOUTS:
        raise InputError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    compress = to_bitmask if layout == "bitmask" else to_two_of_four
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in sparse:
            stored[name] = tensor.detach().cpu().contiguous()
            continue
        try:
            parts = compress(tensor.detach().cpu())
        except ValueError as error:
            raise InputError(f"{name}: {error}") from error
        stored |= {f"{name}.{part}": value for part, value in parts.items()}
    save_file(stored, path, metadata={"layout": layout})
    return path.stat().st_size


def read_sparse(path: Path) -> dict[str, Tensor]:
    """The dense tensors of a file that `write_sparse` made."""
    stored = load_file(path)
    dense = {name: tensor for name, tensor in stored.items() if not name.endswith((".values", ".mask", ".places"))}
    for name in (key.removesuffix(".values") for key in stored if key.endswith(".values")):
        shape = dense.pop(f"{name}.shape")
        values = stored[f"{name}.values"]
        if f"{name}.mask" in stored:
            dense[name] = from_bitmask(stored[f"{name}.mask"], values, shape)
        else:
            dense[name] = from_two_of_four(stored[f"{name}.places"], values)
    return dense


def predicted_sparse_bytes(rows: int, columns: int, kept: int, *, layout: str = "bitmask") -> int:
    """Bytes of one layer's tensors in bf16, the header left out."""
    if layout == "2:4":
        return rows * columns // 8 + rows * columns + 16
    return rows * -(-columns // 8) + 2 * kept + 16


def to_bitmask(weight: Float[Tensor, "rows cols"]) -> dict[str, Tensor]:
    """`mask` (eight columns a byte, the first in the lowest bit), `values` in row order, `shape`."""
    kept = weight != 0
    return {"mask": pack_bits(kept), "values": weight[kept], "shape": torch.tensor(weight.shape)}


def from_bitmask(
    mask: UInt8[Tensor, "rows bytes"], values: Float[Tensor, "kept"], shape: Int[Tensor, "2"]
) -> Float[Tensor, "rows cols"]:
    """The weight that `to_bitmask` took apart."""
    rows, columns = shape.tolist()
    bits = (mask[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
    weight = torch.zeros(rows, columns, dtype=values.dtype)
    weight[bits.flatten(1)[:, :columns].bool()] = values
    return weight


def pack_bits(mask: Bool[Tensor, "rows cols"]) -> UInt8[Tensor, "rows bytes"]:
    """Eight columns a byte, the first in the lowest bit; the last byte of a row is filled up with zeros."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 8)).unflatten(1, (-1, 8)).to(torch.uint8)
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(2, dtype=torch.uint8)


def to_two_of_four(weight: Float[Tensor, "rows cols"]) -> dict[str, Tensor]:
    """`values` (two of every four columns), `places` (two bits each, four to a byte), `shape`.

    Raises ValueError for columns that eight does not divide or four neighbours with more than two non-zeros.
    """
    if weight.shape[1] % 8:
        raise InputError(f"the 2:4 layout needs columns in eights, got {weight.shape[1]}")
    groups = weight.unflatten(1, (-1, 4))
    if ((groups != 0).sum(2) > 2).any():
        raise InputError("four neighbours hold more than two non-zeros; use the bitmask layout")
    places = (groups != 0).to(torch.uint8).argsort(dim=2, descending=True, stable=True)[..., :2].sort(dim=2).values
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)
    packed = (places.flatten(1).unflatten(1, (-1, 4)).to(torch.uint8) << shifts).sum(2, dtype=torch.uint8)
    values = groups.gather(2, places).flatten(1).contiguous()
    return {"values": values, "places": packed, "shape": torch.tensor(weight.shape)}


def from_two_of_four(
    places: UInt8[Tensor, "rows bytes"], values: Float[Tensor, "rows half"]
) -> Float[Tensor, "rows cols"]:
    """The weight that `to_two_of_four` took apart."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)
    index = ((places[..., None] >> shifts) & 3).flatten(1).unflatten(1, (-1, 2)).long()
    groups = torch.zeros(*index.shape[:2], 4, dtype=values.dtype)
    return groups.scatter_(2, index, values.unflatten(1, (-1, 2))).flatten(1)


# --- the tokenizer of a GGUF file ------------------------------------------------------------------------------------


@contextlib.contextmanager
def headers_read_once() -> Iterator[None]:
    """Within it a GGUF file's header is parsed once: transformers does it for configuration, weights and tokenizer.

    Each time takes 12 s for a vocabulary of 150,000 tokens.
    """
    import gguf

    parse = gguf.GGUFReader
    parsed = functools.cache(parse)
    gguf.GGUFReader = lambda path, *mode: parsed(str(path), *mode)
    try:
        yield
    finally:
        gguf.GGUFReader = parse


def sentencepiece_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a file of one of the families in `SENTENCEPIECE_FAMILIES`.

    Raises ValueError for a vocabulary that is not SentencePiece's, or one without scores.
    """
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields  # reading takes seconds: once

    def content(key: str):
        field = fields.get(f"tokenizer.ggml.{key}")
        return field and field.contents()

    tokens, scores = content("tokens"), content("scores")
    if content("model") != "llama" or not scores:
        raise InputError(f"{gguf.name} has a vocabulary of kind {content('model')!r}; expected 'llama' with scores")
    bos_id, padding_id = content("bos_token_id"), content("padding_token_id")
    bos, eos, unknown = tokens[bos_id], tokens[content("eos_token_id")], tokens[content("unknown_token_id")]
    made = sentencepiece_encoder(tokens, scores, content("token_type"), unknown=unknown)
    if content("add_bos_token"):
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
        )
    special = {"bos_token": bos, "eos_token": eos, "unk_token": unknown}
    if padding_id is not None:
        special["pad_token"] = tokens[padding_id]
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **special)


def sentencepiece_encoder(tokens: list[str], scores: list[float], types: list[int], *, unknown: str) -> Tokenizer:
    """Byte-pair encoding that merges as SentencePiece's scores ask."""
    vocabulary = {token: index for index, token in enumerate(tokens)}

    def of_kind(kind: int) -> list[str]:
        return [token for token, found in zip(tokens, types, strict=True) if found == kind]

    normal = of_kind(NORMAL)
    known = set(normal)
    splits = [  # by falling score of the token, then by the parts' own place
        (-scores[vocabulary[token]], vocabulary[token[:at]], vocabulary[token[at:]])
        for token in normal
        for at in range(1, len(token))
        if token[:at] in known and token[at:] in known
    ]
    distinct = list(vocabulary)
    merges = [(distinct[left], distinct[right]) for _score, left, right in sorted(splits)]
    made = Tokenizer(BPE(vocabulary, merges, unk_token=unknown, byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", SPACE)
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in of_kind(CONTROL)])
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in of_kind(USER_DEFINED)])
    return made


# --- HQQ -------------------------------------------------------------------------------------------------------------


def quantization_of(folder: Path) -> dict:
    """What the configuration in a folder says of quantisation; nothing where there is no configuration."""
    path = Path(folder) / "config.json"
    return (loading.read_json(path).get("quantization_config") if path.is_file() else None) or {}


def write_hqq(
    model: PreTrainedModel, layers: list[str], folder: Path, *, bits: int, group_size: int, others: dict[str, Tensor]
) -> None:
    """Fill `folder` with the model, its named linear layers rounded by HQQ, everything else as `others` has it."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    settings = BaseQuantizeConfig(nbits=bits, group_size=group_size)
    axis = settings["weight_quant_params"]["axis"]
    tensors = dict(others)
    for name in layers:
        layer = model.get_submodule(name)
        made = HQQLinear(layer, settings, del_orig=False, compute_dtype=torch.float16, device="cpu")
        parts = {"W_q": made.W_q.data, "scale": made.meta["scale"], "zero": made.meta["zero"]}
        tensors |= {f"{name}.{key}": value.detach().contiguous() for key, value in parts.items()}
    save_file(dict(sorted(tensors.items())), folder / "model.safetensors", metadata={"format": "pt"})
    config = loading.configuration(model)
    config["quantization_config"] = {"quant_method": HQQ, "nbits": bits, "group_size": group_size, "axis": axis}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_hqq(folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The dense model of a checkpoint. Raises ValueError for tensors that are missing or too many, naming them."""
    config = loading.read_config(folder)
    settings = config.quantization_config
    del config.quantization_config
    with torch.random.fork_rng(devices=[]):  # weights are drawn before they are replaced
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config = loading.token_ids(folder, config)
    names = loading.tensor_names(files := loading.weight_files(folder))
    parts = {name: _hqq_parts(name, names) for name, _ in model.named_parameters()}
    loading.refuse_differences(
        folder,
        missing={part for of in parts.values() for part in of} - names,
        unexpected=names - {part for of in parts.values() for part in of},
        mismatched=[],
    )
    tensors = {name: tensor for path in files for name, tensor in load_file(path).items()}
    for name, parameter in model.named_parameters():
        if len(parts[name]) == 1:
            found = tensors[name]
        elif len(parts[name]) == 2:
            found = tensors[name].to(dtype) * tensors[f"{name}_scale"].to(dtype)
        else:
            found = _decode_hqq(name.removesuffix(".weight"), tensors, settings, parameter.shape)
        if found.shape != parameter.shape:
            loading.refuse_differences(
                folder, missing=[], unexpected=[], mismatched=[(name, found.shape, parameter.shape)]
            )
        with torch.no_grad():
            parameter.copy_(found)
    return model


def _hqq_parts(name: str, names: set[str]) -> tuple[str, ...]:
    """The tensors that a parameter is kept in: HQQ's codes, scales and zeros, int8 rows with a scale, or itself."""
    layer = name.removesuffix(".weight")
    if f"{layer}.W_q" in names:
        return tuple(f"{layer}.{part}" for part in ("W_q", "scale", "zero"))
    return (name, f"{name}_scale") if f"{name}_scale" in names else (name,)


def _decode_hqq(layer: str, tensors: dict[str, Tensor], settings: dict, shape: torch.Size) -> Tensor:
    from hqq.core.quantize import Quantizer

    about = {
        "nbits": settings["nbits"],
        "group_size": settings["group_size"],
        "axis": settings["axis"],
        "shape": shape,
        "packing": Quantizer.bit_to_packing[settings["nbits"]],
        "view_as_float": False,
        "compute_dtype": torch.float16,
        "scale": tensors[f"{layer}.scale"],
        "zero": tensors[f"{layer}.zero"],
    }
    return Quantizer.dequantize(tensors[f"{layer}.W_q"], about)


# --- a packed embedding ----------------------------------------------------------------------------------------------


def packed_embedding_name(folder: Path) -> str:
    """The packed embedding's name in a folder, or nothing where there is none."""
    groups = quantization_of(folder).get("config_groups", {})
    return groups[PACKED_EMBEDDING]["targets"][0] if PACKED_EMBEDDING in groups else ""


def load_packed_embedding(folder: Path, *, packed: bool = False, **options) -> PreTrainedModel:
    """`loading.load` that knows packed embeddings, which stay `packed` or are decoded; without one it is just that.

    Raises ValueError when the folder lacks other tensors than the embedding, naming them.
    """
    name = packed_embedding_name(folder)
    if not name:
        return loading.load(folder, **options)
    config = loading.read_config(folder)
    groups = config.quantization_config["config_groups"]
    others = {key: group for key, group in groups.items() if key != PACKED_EMBEDDING}
    config.quantization_config = config.quantization_config | {"config_groups": others}
    if not others:
        del config.quantization_config
    tied = ["lm_head"] if config.tie_word_embeddings else []
    model = loading.load(folder, config=config, replaced=[name, *tied], **options)
    table = model.get_input_embeddings()
    if model.get_submodule(name) is not table:
        raise InputError(f"{folder} packs {name}: nothing else than the embedding is read so")
    codes = read_embedding(folder, name)
    if packed and fits(codes.codes.shape[1], codes.grid.group_size):
        dtype, kept = table.weight.dtype, from_rounded(codes).to(table.weight.device)
        head = model.get_output_embeddings()
        for at in [name, *(n for n, module in model.named_modules() if tied and module is head)]:
            layers.replace_layer(model, at, kept, dtype)
        return model
    for start in range(0, len(codes.codes), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        rows = Rounded(codes.grid, codes.codes[part], codes.scales[part], codes.zero_points[part])
        table.weight.data[part] = rows.decode(table.weight.dtype).to(table.weight.device)
    return model


def read_embedding(folder: Path, name: str) -> Rounded:
    """The packed embedding's codes. Raises ValueError for tensors that are not there, naming the folder."""
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    parts = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            parts |= {part: file.get_tensor(f"{name}.{part}") for part in PACKED_PARTS if f"{name}.{part}" in names}
    if not {"weight_packed", "weight_scale", "weight_shape"} <= parts.keys():
        raise InputError(f"{folder} says that {name} is packed, and holds no such tensors")
    (rows, columns), scales = parts["weight_shape"].tolist(), parts["weight_scale"]
    bits, groups = parts["weight_packed"].shape[1] * 32 // columns, scales.shape[1]
    zeros, symmetric = torch.zeros(rows, groups, dtype=torch.int8), "weight_zero_point" not in parts
    if not symmetric:
        zeros = unpack_from_int32(parts["weight_zero_point"], bits, scales.shape, packed_dim=0)
    codes = torch.empty(rows, columns, dtype=torch.int8)
    for start in range(0, rows, CHUNK_ROWS):
        words = parts["weight_packed"][start : start + CHUNK_ROWS]
        codes[start : start + CHUNK_ROWS] = unpack_from_int32(words, bits, (len(words), columns))
    return Rounded(Grid(bits, columns // groups, symmetric), codes, scales, zeros.contiguous())


@contextlib.contextmanager
def tried_out(model: PreTrainedModel) -> Iterator[None]:
    """A few tokens may pass through the model in the block: without dropout, without gradients, and leaving no trace.

    Outside of training bitsandbytes orders 4-bit weights anew for its processor kernels at their first call, and these
    have no gradients: its layers are kept as they are in training.
    """
    before = {module: module.training for module in model.modules()}
    model.eval()
    for module in before:
        if getattr(getattr(module, "weight", None), "quant_state", None) is not None:
            module.training = True
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in before.items():
            module.training = training
