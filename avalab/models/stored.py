"""An embedding below 8 bits in a compressed-tensors checkpoint: found, decoded and put in place while a model loads.

The checkpoint keeps such an embedding as it keeps a packed linear layer: codes in int32 words, a bf16 scale and packed
zero point a row and group, and a group of its own in the configuration. That is a proper compressed-tensors file, but
transformers 5.17 looks for a tensor called `weight` in every embedding and refuses the folder, and so does vLLM: only
this package loads it. (`engines.gguf` with the block type `kept` turns it into a file that others read.)

1. The group is taken out of the configuration that transformers sees; it loads everything else.
2. What it then misses has to be the embedding (and a head tied to it), and nothing more.
3. The decoded rows, integers less zero points times scales, each in bf16, take the place; a tied head shares them.

What it does not do: choose, round or pack (see `ava_targets`, `packing`), or keep the rows packed in memory.

HQQ's half-quadratic rounding as a checkpoint: rounded by the library, and decoded by it on loading.

1. `write` lets the library round every linear layer (Badri and Shaji 2023, Half-Quadratic Quantization: zero points are
   chosen so that the weights' error is sparse; no data) with its defaults, and keeps what a layer needs: packed codes,
   and a float16 scale and fractional zero point a group.
2. The embedding stays bf16 or goes to int8 rows (`packed.int8_rows`' numbers, handed in by the caller).
3. `from_pretrained` decodes every layer with the library's own `Quantizer` into a dense model.

transformers 5.17 lists HQQ and refuses it ("not available yet"), to compress and to load; what the library saves itself
is pickled, or in safetensors that only transformers would read. Hence this file. The library's tensors that repeat its
settings, 17 a layer, are left out: the configuration holds them once. What it does not do: compute with packed weights.

What zeros save on disk: a model file in which pruned layers keep only what is left of them.

| layout | of a layer with rows x cols weights | bytes |
|---|---|---|
| `bitmask` | one bit a weight, the kept ones in bf16, row by row | rows x ceil(cols / 8) + 2 x kept |
| `2:4` | two of every four in bf16, and two bits for the place of each | rows x cols x (1/8 + 1) |

The bitmask is that of compressed-tensors' `sparse-bitmask`, which its present version can no longer write; the second
is the layout of sparse tensor cores (Mishra et al. 2021, arXiv 2104.08378). Everything else in the file is as in the
dense one. `write` and `read` are inverse to the bit. A group of four with more zeros than two keeps zeros as values.

Engines here read dense weights: the file saves disk and download, not memory or time.
What it does not do: prune, or multiply.

The tokenizer of a GGUF file whose vocabulary is SentencePiece's, where transformers makes another one of it.

transformers 5.17 turns Gemma's vocabulary into a model that leaves the merges out: "Hello world" becomes `Hello`, ` w`,
`or`, `ld`, and no start token is added, so that the model scores as if damaged. llama.cpp's rule, followed here:

1. User-defined tokens (runs of newlines and spaces, tags) are cut out first, the longest one that fits.
2. Elsewhere a space is written U+2581, and the pair of neighbours whose joined token scores highest is merged, over
   and over. As byte-pair encoding: all splits of each token into two tokens, the highest score first.
3. A character without a token falls back to its bytes. The start token comes first if the file says so.

What it does not do: other vocabularies; transformers reads those right.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int, UInt8
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

FILE = "model.sparse"  # safetensors inside; another suffix, so that nothing loads it for the weights

LAYOUTS = ("bitmask", "2:4")


def write_sparse(tensors: dict[str, Tensor], sparse: list[str], path: Path, *, layout: str = "bitmask") -> int:
    """Write a model's tensors, those named in `sparse` compressed; returns the file's bytes.

    Raises ValueError for an unknown layout, or a tensor that does not have its zeros.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    compress = to_bitmask if layout == "bitmask" else to_two_of_four
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in sparse:
            stored[name] = tensor.detach().cpu().contiguous()
            continue
        try:
            parts = compress(tensor.detach().cpu())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        stored |= {f"{name}.{part}": value for part, value in parts.items()}
    save_file(stored, path, metadata={"layout": layout})
    return path.stat().st_size


def read_sparse(path: Path) -> dict[str, Tensor]:
    """The dense tensors of a file that `write` made."""
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


def predicted_bytes(rows: int, columns: int, kept: int, *, layout: str = "bitmask") -> int:
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
    weight = torch.zeros(rows, columns, dtype=values.dtype)
    weight[unpack_bits(mask, columns)] = values
    return weight


def to_two_of_four(weight: Float[Tensor, "rows cols"]) -> dict[str, Tensor]:
    """`values` (two of every four columns), `places` (two bits each, four to a byte), `shape`.

    Raises ValueError for columns that eight does not divide or four neighbours with more than two non-zeros.
    """
    if weight.shape[1] % 8:
        raise ValueError(f"the 2:4 layout needs columns in eights, got {weight.shape[1]}")
    groups = weight.unflatten(1, (-1, 4))
    if ((groups != 0).sum(2) > 2).any():
        raise ValueError("four neighbours hold more than two non-zeros; use the bitmask layout")
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


def pack_bits(mask: Bool[Tensor, "rows cols"]) -> UInt8[Tensor, "rows bytes"]:
    """Eight columns a byte, the first in the lowest bit; the last byte of a row is filled up with zeros."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 8)).unflatten(1, (-1, 8)).to(torch.uint8)
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(2, dtype=torch.uint8)


def unpack_bits(packed: UInt8[Tensor, "rows bytes"], columns: int) -> Bool[Tensor, "rows cols"]:
    """The mask that `pack_bits` packed."""
    bits = (packed[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten(1)[:, :columns].bool()


# --- the tokenizer of a GGUF file whose vocabulary is SentencePiece's, where transformers makes another one of it ---


NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # token types of the GGUF specification

SPACE = "\u2581"

KEYS = "model tokens scores token_type add_bos_token padding_token_id bos_token_id eos_token_id unknown_token_id"

MODEL_TYPES = ("gemma3_text",)  # transformers' names of the families whose files need this


def tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a file of one of the families in `MODEL_TYPES`.

    Raises ValueError for a vocabulary that is not SentencePiece's, or one without scores.
    """
    model, tokens, scores, types, starts, padding, *ids = _fields(gguf)
    if model != "llama" or not scores:
        raise ValueError(f"{gguf.name} has a vocabulary of kind {model!r}; expected 'llama' with scores")
    bos, eos, unknown = (tokens[index] for index in ids)
    made = encoder(tokens, scores, types, unknown=unknown)
    if starts:
        first = {"single": f"{bos} $A", "pair": f"{bos} $A {bos} $B", "special_tokens": [(bos, ids[0])]}
        made.post_processor = processors.TemplateProcessing(**first)
    special = {"bos_token": bos, "eos_token": eos, "unk_token": unknown}
    special |= {} if padding is None else {"pad_token": tokens[padding]}
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **special)


def encoder(tokens: list[str], scores: list[float], types: list[int], *, unknown: str) -> Tokenizer:
    """Byte-pair encoding that merges as SentencePiece's scores ask."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = _merges([t for t, kind in zip(tokens, types, strict=True) if kind == NORMAL], vocabulary, scores)
    made = Tokenizer(BPE(vocabulary, merges, unk_token=unknown, byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", SPACE)
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    of_kind = {kind: [t for t, k in zip(tokens, types, strict=True) if k == kind] for kind in (CONTROL, USER_DEFINED)}
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in of_kind[CONTROL]])
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in of_kind[USER_DEFINED]])
    return made


def _merges(normal: list[str], vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every split of a token into two, by falling score of the token, then by the parts' own."""
    known = set(normal)
    splits = [
        (-scores[vocabulary[token]], vocabulary[token[:at]], vocabulary[token[at:]])
        for token in normal
        for at in range(1, len(token))
        if token[:at] in known and token[at:] in known
    ]
    tokens = list(vocabulary)
    return [(tokens[left], tokens[right]) for _score, left, right in sorted(splits)]


def _fields(gguf: Path) -> list:
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields  # reading takes seconds: once
    found = [fields.get(f"tokenizer.ggml.{key}") for key in KEYS.split()]
    return [field and field.contents() for field in found]


# --- hQQ's half-quadratic rounding as a checkpoint ------------------------------------------------------------------


METHOD = "hqq"

WEIGHTS = "model.safetensors"

KEPT = ("W_q", "scale", "zero")


def is_one(folder: Path) -> bool:
    """Whether a folder holds such a checkpoint."""
    path = Path(folder) / "config.json"
    return path.is_file() and _settings(json.loads(path.read_text())).get("quant_method") == METHOD


def write_hqq(
    model: PreTrainedModel, layers: list[str], folder: Path, *, bits: int, group_size: int, others: dict[str, Tensor]
) -> None:
    """Fill `folder` with the model, its named linear layers rounded by HQQ, everything else as `others` has it."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    how = BaseQuantizeConfig(nbits=bits, group_size=group_size)
    axis = how["weight_quant_params"]["axis"]
    tensors = dict(others)
    for name in layers:
        made = HQQLinear(model.get_submodule(name), how, del_orig=False, compute_dtype=torch.float16, device="cpu")
        parts = {"W_q": made.W_q.data, "scale": made.meta["scale"], "zero": made.meta["zero"]}
        tensors |= {f"{name}.{key}": value.detach().contiguous() for key, value in parts.items()}
    save_file(dict(sorted(tensors.items())), folder / WEIGHTS, metadata={"format": "pt"})
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    config["quantization_config"] = {"quant_method": METHOD, "nbits": bits, "group_size": group_size, "axis": axis}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_hqq(folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The dense model of a checkpoint. Raises ValueError for a tensor that is missing, naming it."""
    config = AutoConfig.from_pretrained(folder)
    settings, _ = config.quantization_config, delattr(config, "quantization_config")
    with torch.random.fork_rng(devices=[]):  # weights are drawn before they are replaced
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    tensors = load_file(Path(folder) / WEIGHTS)
    found = {}
    for name, parameter in model.named_parameters():
        layer = name.removesuffix(".weight")
        if f"{layer}.W_q" in tensors:
            parts = {key: tensors[f"{layer}.{key}"] for key in KEPT}
            found[name] = _decoded(parts, settings, parameter.shape).to(dtype)
        elif f"{name}_scale" in tensors:
            found[name] = tensors[name].to(dtype) * tensors[f"{name}_scale"].to(dtype)
        elif name in tensors:
            found[name] = tensors[name]
        else:
            raise ValueError(f"{folder} has no tensor for {name}")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(found[name])
    return model


def _decoded(parts: dict[str, Tensor], settings: dict, shape: torch.Size) -> Tensor:
    from hqq.core.quantize import Quantizer

    packing = Quantizer.bit_to_packing[settings["nbits"]]
    about = {key: settings[key] for key in ("nbits", "group_size", "axis")} | {"shape": shape, "packing": packing}
    about |= {"view_as_float": False, "compute_dtype": torch.float16, "scale": parts["scale"], "zero": parts["zero"]}
    return Quantizer.dequantize(parts["W_q"], about)


def _settings(config: dict) -> dict:
    return config.get("quantization_config") or {}


# --- an embedding below 8 bits in a compressed-tensors checkpoint ---------------------------------------------------


GROUP = "packed_embedding"  # its name among the configuration's groups

PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")

CHUNK_ROWS = 16384  # unpacked at a time


def name_in(folder: Path) -> str:
    """The packed embedding's name in a folder, or nothing where there is none."""
    path = Path(folder) / "config.json"
    groups = (_quantization(json.loads(path.read_text())) if path.is_file() else {}).get("config_groups", {})
    return groups[GROUP]["targets"][0] if GROUP in groups else ""


def load_packed_embedding(folder: Path, **options) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained` that knows packed embeddings; without one it is just that.

    Raises ValueError when the folder lacks other tensors than the embedding, naming the first.
    """
    name = name_in(folder)
    if not name:
        return AutoModelForCausalLM.from_pretrained(folder, **options)
    config = AutoConfig.from_pretrained(folder)
    others = {key: group for key, group in config.quantization_config["config_groups"].items() if key != GROUP}
    config.quantization_config = config.quantization_config | {"config_groups": others}
    if not others:
        del config.quantization_config
    with torch.random.fork_rng(devices=[]):  # missing weights are drawn before they are replaced
        model, told = AutoModelForCausalLM.from_pretrained(folder, config=config, output_loading_info=True, **options)
    table = model.get_input_embeddings()
    filled = {n for n, m in model.named_modules() if getattr(m, "weight", None) is table.weight}
    astray = sorted(set(told["missing_keys"]) - {f"{n}.weight" for n in filled})
    if astray or name not in filled:
        raise ValueError(f"{folder} lacks {', '.join(astray[:1]) or name}: nothing else than the embedding is packed")
    table.weight.data = decode_embedding(folder, name, table.weight.dtype).to(table.weight.device)
    return model


def decode_embedding(folder: Path, name: str, dtype: torch.dtype = torch.bfloat16) -> Float[Tensor, "rows cols"]:
    """The embedding's values. Raises ValueError for tensors that are not there, naming the folder."""
    parts = _tensors(folder, name)
    rows, columns = parts["weight_shape"].tolist()
    scales = parts["weight_scale"].to(dtype)
    bits = parts["weight_packed"].shape[1] * 32 // columns
    zeros = _unpacked(parts["weight_zero_point"], bits, scales.shape, along=0) if "weight_zero_point" in parts else 0
    zeros = torch.zeros_like(scales) + zeros
    found = torch.empty(rows, columns, dtype=dtype)
    for start in range(0, rows, CHUNK_ROWS):
        part = slice(start, min(start + CHUNK_ROWS, rows))
        codes = _unpacked(parts["weight_packed"][part], bits, (part.stop - start, columns), along=1)
        levels = codes.unflatten(1, (scales.shape[1], -1)).to(dtype) - zeros[part, :, None]
        found[part] = (levels * scales[part, :, None]).flatten(1)
    return found


def _unpacked(words: Tensor, bits: int, shape: tuple[int, ...], *, along: int) -> Tensor:
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    return unpack_from_int32(words, bits, torch.Size(shape), packed_dim=along)


def _tensors(folder: Path, name: str) -> dict[str, Tensor]:
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            found |= {part: file.get_tensor(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in names}
    if not {"weight_packed", "weight_scale", "weight_shape"} <= found.keys():
        raise ValueError(f"{folder} says that {name} is packed, and holds no such tensors")
    return found


def _quantization(config: dict) -> dict:
    return config.get("quantization_config") or {}
