"""What a GGUF file says of a model: metadata, names, order and values of its tensors, from transformers' configuration.

1. A row of `FAMILIES` is a family that llama.cpp computes: the architecture in gguf's own tables, whose map gives the
   names of tensors, and how the file differs from transformers' checkpoint. Rotary embeddings that turn neighbouring
   channels need the rows of query and key in another order (transformers turns channel i with i + head_dim / 2);
   Gemma's gains are stored with the 1 that is added to them; GPT-2's matrices are turned.
2. `write_metadata` puts sizes, scaling of positions, windows and multipliers into the header. What readers fix
   themselves (which layers slide, or have no rotary embedding) is compared with the configuration.
3. Frequencies that are no formula are tensors of the file (`extra_tensors`): Llama 3's factors, Phi-3's long and short.
4. `read_back` is the inverse: the file's numbers in a model of the configuration beside it, whatever the family.
5. `read_header` walks a file's header and compares the end of each tensor with the file's: engines map a file and trust
   it, and a truncated one ends a process or gives weights of zeros. (gguf's own reader takes 12 s for the header of a
   vocabulary of 150,000 entries, this one 0.2 s.)

Readers of some families know no window: `context_of` then ends the context where the window does, so that the file
computes what the model computes. Source: the GGUF specification, gguf 0.19 and llama.cpp's model definitions.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from avalab.lab.errors import InputError


@dataclass(frozen=True)
class Family:
    """An architecture of gguf's tables, and how its files differ from transformers' checkpoints.

    `slides` is the period of layers of which the last one sees everything, as readers know it; 0: they know no window.
    """

    architecture: str
    neighbours: bool = False  # pairs of channels that turn together are neighbours
    gain_offset: float = 0.0  # of norms: what the file's gain has more than the checkpoint's
    turned: bool = False  # matrices of linear layers are stored inputs first
    layer_norm: bool = False  # with a mean and a bias
    biases: tuple[str, ...] = ()  # parts of a layer that may have one
    slides: int = 0
    scalings: tuple[str, ...] = ("default", "linear", "yarn", "llama3")


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

FAMILIES: dict[str, Family] = {
    "llama": Family("LLAMA", neighbours=True, biases=(*ATTENTION, "gate_proj", "up_proj", "down_proj")),
    "mistral": Family("LLAMA", neighbours=True),
    "qwen2": Family("QWEN2", biases=ATTENTION[:3]),
    "qwen3": Family("QWEN3"),
    "gemma2": Family("GEMMA2", gain_offset=1.0, slides=2, scalings=("default",)),
    "gemma3_text": Family("GEMMA3", gain_offset=1.0, slides=6, scalings=("default", "linear")),
    "phi3": Family("PHI3", scalings=("default", "longrope")),
    "stablelm": Family("STABLELM", layer_norm=True, biases=ATTENTION[:3], scalings=("default",)),
    "smollm3": Family("SMOLLM3", neighbours=True),
    "granite": Family("GRANITE", neighbours=True),
    "olmo2": Family("OLMO2"),
    "gpt2": Family("GPT2", turned=True, layer_norm=True, biases=("c_attn", "c_proj", "c_fc")),
}

INSTEAD = "what remains: the engine torch, `quantize` for transformers, and the exports aot and onnx"

LARGEST_GEMMA = {"gemma2": 46, "gemma3_text": 62}  # layers of those that readers scale by hidden size over heads

NO_ROPE_STEP = 4  # SmolLM3's layers without rotary embedding, as readers know them: every fourth


def family_of(config: PreTrainedConfig, name: str) -> Family:
    """The row of a model, called `name` in messages. Raises ValueError for what GGUF's readers would not compute."""
    if config.model_type not in FAMILIES:
        known = ", ".join(kind.removesuffix("_text") for kind in FAMILIES)
        raise InputError(f"{name} is a {config.model_type}; GGUF is written for {known}; {INSTEAD}")
    family = FAMILIES[config.model_type]
    if reason := _refused(config, family):
        raise InputError(f"{name} has {reason}, which GGUF's {config.model_type} models have not; {INSTEAD}")
    return family


def _refused(config: PreTrainedConfig, family: Family) -> str:
    """What of a configuration the file cannot say; nothing where it can say all."""
    kind = rotary(config).get("rope_type", "default")
    if kind not in family.scalings:
        return f"rotary embeddings of type {kind!r}"
    for flag, part in (("attention_bias", "q_proj"), ("mlp_bias", "up_proj")):
        if getattr(config, flag, False) and part not in family.biases:
            return f"biases ({flag})"
    if family.architecture == "SMOLLM3":
        wanted = [int((layer + 1) % NO_ROPE_STEP != 0) for layer in range(config.num_hidden_layers)]
        if list(config.no_rope_layers) != wanted:
            return f"rotary embeddings in other layers (no_rope_layers) than all but every {NO_ROPE_STEP}th"
    if getattr(config, "qk_layernorm", False) or getattr(config, "use_parallel_residual", False):
        return "norms of queries, or attention and MLP side by side"
    if family.architecture == "GPT2" and (config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights):
        return "another scale of attention"
    if family.architecture == "GEMMA3" and window_of(config) and not period_of(config) > 0:
        return "layers that slide in no regular order"
    if family.architecture == "GEMMA2" and query_factor(config) != 1:
        return f"queries scaled by {config.query_pre_attn_scalar} instead of its head size {head_size(config)}"
    return ""


# --- sizes -----------------------------------------------------------------------------------------------------------


def head_size(config: PreTrainedConfig) -> int:
    """Channels of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rotary(config: PreTrainedConfig) -> dict:
    """The rotary embedding's parameters, those of layers that see everything; empty where positions are learnt."""
    found = getattr(config, "rope_parameters", None) or {}
    return found.get("full_attention", found)


def window_of(config: PreTrainedConfig) -> int:
    """Tokens that sliding layers see; 0 where no layer slides."""
    layers = getattr(config, "layer_types", None)
    if layers and "sliding_attention" not in layers:
        return 0
    return getattr(config, "sliding_window", None) or 0


def period_of(config: PreTrainedConfig) -> int:
    """The period of layers of which the last one sees everything; 0 for layers in no such order."""
    layers = config.layer_types
    period = layers.index("full_attention") + 1 if "full_attention" in layers else len(layers) + 1
    regular = ["full_attention" if (at + 1) % period == 0 else "sliding_attention" for at in range(len(layers))]
    return period if regular == list(layers) else 0


def context_of(config: PreTrainedConfig) -> int:
    """Tokens that the file may be given: the model's own, or as many as its window where readers know none."""
    longest, family = config.max_position_embeddings, FAMILIES[config.model_type]
    window = window_of(config)
    known = family.slides and (family.architecture == "GEMMA3" or period_of(config) == family.slides)
    return longest if known or not window else min(longest, window)


def query_factor(config: PreTrainedConfig) -> float:
    """What queries have to be multiplied by where readers scale by the head size and the model by another number."""
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is None:
        return 1.0
    largest = config.num_hidden_layers == LARGEST_GEMMA.get(config.model_type)
    size = config.hidden_size / config.num_attention_heads if largest else head_size(config)
    return (size / scalar) ** 0.5


def write_metadata(writer, config: PreTrainedConfig) -> None:
    """Add what a reader has to know of the model to a `gguf.GGUFWriter`."""
    family = FAMILIES[config.model_type]
    heads, size = config.num_attention_heads, head_size(config)
    kv_heads = heads if family.architecture == "GPT2" else config.num_key_value_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_of(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    if family.layer_norm:
        epsilon = getattr(config, "layer_norm_eps", None) or config.layer_norm_epsilon
        writer.add_layer_norm_eps(epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if family.architecture != "GPT2":
        writer.add_key_length(size)
        writer.add_value_length(size)
        _write_rotary(writer, config, size)
    _write_particulars(writer, config, family)


def _write_rotary(writer, config: PreTrainedConfig, size: int) -> None:
    """Base, turned channels and scaling of positions."""
    from gguf import RopeScalingType

    found = rotary(config)
    writer.add_rope_dimension_count(int(size * found.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(found["rope_theta"])
    kind = found.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(found["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(found["factor"])
        writer.add_rope_scaling_orig_ctx_len(original_context(config))
        usual = 0.1 * math.log(found["factor"]) + 1  # which readers multiply by, too
        writer.add_rope_scaling_attn_factors(_attention_factor(config) / usual)
        writer.add_rope_scaling_yarn_beta_fast(found.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(found.get("beta_slow") or 1.0)
    elif kind == "longrope":
        writer.add_rope_scaling_orig_ctx_len(original_context(config))
        writer.add_rope_scaling_attn_factors(_attention_factor(config))


def _write_particulars(writer, config: PreTrainedConfig, family: Family) -> None:
    """What only some families have: windows, caps and multipliers."""
    if family.slides and window_of(config):
        writer.add_sliding_window(window_of(config))
    elif family.architecture == "PHI3":
        writer.add_sliding_window(0)  # its readers want a number
    if family.architecture == "GEMMA3":
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
        if window_of(config) and period_of(config) != family.slides:
            writer.add_sliding_window_pattern(period_of(config))
    for name, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
        ("embedding_multiplier", writer.add_embedding_scale),
        ("attention_multiplier", writer.add_attention_scale),
        ("residual_multiplier", writer.add_residual_scale),
        ("logits_scaling", writer.add_logit_scale),
    ):
        if getattr(config, name, None) is not None:
            add(getattr(config, name))
    if family.architecture == "STABLELM":
        writer.add_parallel_residual(config.use_parallel_residual)


def original_context(config: PreTrainedConfig) -> int:
    """Tokens that the model was trained on before its positions were scaled; 0 where they are not."""
    found = rotary(config)
    if found.get("rope_type", "default") == "default":
        return 0
    original = found.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )
    return original or config.max_position_embeddings


def _attention_factor(config: PreTrainedConfig) -> float:
    return float(ROPE_INIT_FUNCTIONS[rotary(config)["rope_type"]](config, "cpu", seq_len=1)[1])


# --- tensors ---------------------------------------------------------------------------------------------------------


def extra_tensors(config: PreTrainedConfig) -> dict[str, Float[Tensor, "half"]]:
    """Tensors of the file that no parameter is: what rotary frequencies are divided by."""
    found = rotary(config)
    kind = found.get("rope_type", "default")
    if kind == "longrope":
        return {f"rope_factors_{which}.weight": torch.tensor(found[f"{which}_factor"]) for which in ("long", "short")}
    if kind != "llama3":
        return {}
    scaled, _ = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    size = len(scaled) * 2
    plain = found["rope_theta"] ** -(torch.arange(0, size, 2).float() / size)
    return {"rope_freqs.weight": plain / scaled}


def tensor_namer(config: PreTrainedConfig) -> Callable[[str], str]:
    """The function from transformers' name of a tensor to the file's; it raises ValueError for one without."""
    import gguf

    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[FAMILIES[config.model_type].architecture], config.num_hidden_layers
    )

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
    heads = _turning_heads(name, config)
    return interleaved(tensor, heads) if heads else tensor


def _turning_heads(name: str, config: PreTrainedConfig) -> int:
    """Heads of a parameter whose rows are in another order in the file; 0 where they are not."""
    if not FAMILIES[config.model_type].neighbours:
        return 0
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2], 0)


def interleaved(tensor: Shaped[Tensor, "rows *cols"], heads: int) -> Shaped[Tensor, "rows *cols"]:
    """Rows (0, h/2, 1, h/2 + 1, ...) of each head of h rows: pairs that turn together become neighbours."""
    halves = tensor.view(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def apart(tensor: Shaped[Tensor, "rows *cols"], heads: int) -> Shaped[Tensor, "rows *cols"]:
    """The rows that `interleaved` re-ordered, as they were."""
    pairs = tensor.view(heads, -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def is_turned(name: str, config: PreTrainedConfig) -> bool:
    """Whether a parameter is a matrix that the file has the other way round."""
    return FAMILIES[config.model_type].turned and name.split(".")[-2] in FAMILIES[config.model_type].biases


def file_value(name: str, tensor: Shaped[Tensor, "rows *cols"], config: PreTrainedConfig) -> Shaped[Tensor, "..."]:
    """A parameter's numbers as the file has them, before they are rounded."""
    if is_turned(name, config) and tensor.ndim == 2:
        tensor = tensor.T.contiguous()
    return in_file_order(name, _gain(name, tensor, config), config)


def _gain(name: str, tensor: Tensor, config: PreTrainedConfig, *, back: bool = False) -> Tensor:
    """A norm's gain with what the file has more, and the queries' with their scale; `back`: without."""
    family = FAMILIES[config.model_type]
    if not family.gain_offset or not name.endswith("norm.weight"):
        return tensor
    factor = query_factor(config) if name.endswith("q_norm.weight") else 1.0
    if back:
        return tensor.float() / factor - family.gain_offset
    return (tensor.float() + family.gain_offset) * factor


# --- read back -------------------------------------------------------------------------------------------------------


def stored_tensors(file: Path) -> Iterator[tuple[str, Float[Tensor, "..."]]]:
    """Name and decoded float32 numbers of every tensor of a file, by the gguf package."""
    from gguf import GGUFReader, dequantize

    for tensor in GGUFReader(file).tensors:
        yield tensor.name, torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())


def read_back(file: Path, config: PreTrainedConfig) -> PreTrainedModel:
    """The float32 model that a file holds, in the graph of a configuration of one of `FAMILIES`.

    Raises ValueError for a file that lacks a tensor, or has it in another shape, naming both.
    """
    with torch.random.fork_rng(devices=[]):  # weights are drawn before they are replaced
        # Fused attention leaves a cap of its scores out.
        way = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **way)
    names, stored = tensor_namer(config), dict(stored_tensors(file))
    for name, parameter in model.named_parameters():
        found = stored.get(names(name))
        if found is None:
            raise InputError(f"{file} has no tensor {names(name)}, which its configuration asks for")
        if found.numel() != parameter.numel():
            shape = tuple(found.shape)
            raise InputError(
                f"{file}: tensor {names(name)} is {shape}, its configuration says {tuple(parameter.shape)}"
            )
        heads = _turning_heads(name, config)
        found = _gain(name, apart(found, heads) if heads else found, config, back=True)
        if is_turned(name, config) and parameter.ndim == 2:
            found = found.T
        with torch.no_grad():
            parameter.copy_(found.reshape(parameter.shape))
    return nn.Module.eval(model)


# --- whether a file is whole -----------------------------------------------------------------------------------------

FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # by type

STRING, ARRAY, ALIGNMENT = 8, 9, "general.alignment"


class _Header:
    """The header of a file, read from its beginning; `at` is where to read next. Raises struct.error for damage."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.values = data, 8, {}  # those that are no lists, by key

    def number(self, form: str) -> float:
        """The next little-endian number of a form of `struct`."""
        (value,) = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return value

    def text(self) -> str:
        """The next string."""
        size = self.number("Q")
        self.skip(size)
        return self.data[self.at - size : self.at].decode(errors="replace")

    def value(self, kind: int) -> float | str | None:
        """The next value of a type; nothing for a list, which is passed over with its members."""
        if kind in FORMS:
            return self.number(FORMS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise struct.error(f"a value of unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in FORMS:
            self.skip(struct.calcsize(FORMS[inner]) * count)
        elif inner in (STRING, ARRAY):
            for _ in range(self.counted(count)):
                self.value(inner)
        else:
            raise struct.error(f"a list of unknown type {inner}")
        return None

    def skip(self, size: int) -> None:
        """Pass over bytes."""
        if self.at + size > len(self.data):
            raise struct.error("a list goes on beyond the end")
        self.at += size

    def counted(self, count: int) -> int:
        """A number of parts, of which each takes a byte or more."""
        if count > len(self.data):
            raise struct.error(f"it says that {count} parts follow")
        return count

    def tensors(self) -> list[tuple[str, int, int, int]]:
        """(name, elements, type, first byte) of every tensor."""
        if self.data[:4] != b"GGUF":
            raise struct.error("it does not begin with GGUF")
        count, pairs = self.number("Q"), self.number("Q")
        for _ in range(self.counted(pairs)):
            key = self.text()
            self.values[key] = self.value(self.number("I"))
        found = []
        for _ in range(self.counted(count)):
            name, dimensions = self.text(), self.number("I")
            elements = math.prod(self.number("Q") for _ in range(self.counted(dimensions)))
            found.append((name, elements, self.number("I"), self.number("Q")))
        alignment = self.values.get(ALIGNMENT, 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise struct.error(f"its alignment is {alignment!r}")
        start = -(-self.at // alignment) * alignment
        return [(name, elements, kind, start + offset) for name, elements, kind, offset in found]


@dataclass(frozen=True)
class Header:
    """What a file says of itself: values by key, lists left out, and the type of every tensor by name."""

    values: dict[str, float | str | None]
    types: dict[str, str]


def check(file: Path) -> Counter[str]:
    """How many tensors of a file have which type, such as {"f32": 5, "q8_0": 30}; raises as `read_header` does."""
    return Counter(read_header(file).types.values())


def read_header(file: Path) -> Header:
    """The header of a whole file.

    Raises ValueError naming file, offset and tensor for one that is no GGUF, truncated, or has tensors of unknown type.
    """
    import gguf

    if not (size := file.stat().st_size):
        raise InputError(f"{file} is damaged: it is empty")
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = _Header(data)
        try:
            tensors = header.tensors()
        except (struct.error, OverflowError) as error:
            raise InputError(f"{file} is damaged: its header breaks off at byte {header.at} ({error})") from error
    types = {}
    for name, elements, kind, start in tensors:
        shown = name if name.isprintable() else repr(name)  # a damaged name is no second line
        if kind not in list(gguf.GGMLQuantizationType):
            raise InputError(f"{file}: tensor {shown} at byte {start} has the unknown type {kind}")
        types[name] = gguf.GGMLQuantizationType(kind).name.lower()
        weights, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        if (end := start + elements // weights * block_bytes) > size:
            raise InputError(f"{file} is truncated: it has {size} bytes, tensor {shown} ends at byte {end}")
    return Header(header.values, types)


def tensor_bytes(file: Path) -> dict[str, tuple[str, int]]:
    """The type and the stored bytes of every tensor of a file. Raises ValueError as `read_header` does."""
    import gguf

    types = read_header(file).types
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        counts = {name: elements for name, elements, *_ in _Header(data).tensors()}
    blocks = {kind: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]] for kind in {*types.values()}}
    return {name: (kind, counts[name] // blocks[kind][0] * blocks[kind][1]) for name, kind in types.items()}
