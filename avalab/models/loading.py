"""A folder's configuration, tokenizer and weights through transformers: whole and as named, or refused in one line.

transformers draws at random what a checkpoint lacks, leaves out what it does not know, and says so in a log. Here

1. the headers of the weight files are read first: damaged files, shards that an index names and nobody has, and names
   that carry a wrapper's prefix are known before anything is loaded;
2. prefixes of wrappers (torch.compile, DDP, FSDP, PEFT) are taken off, which is logged;
3. tensors that are missing, unknown or of another shape are refused by name. What transformers itself knows to be
   harmless passes: a tied head, present or absent, rotary buffers. A head that differs from the embedding it is said to
   be tied to is a head of its own, and the configuration then says so;
4. of the publisher's generation settings only the token ids are taken: how to decode is the caller's to say.

A library's exception becomes a line that names the folder or the file.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from avalab.lab import process
from avalab.lab.errors import InputError, LabError, MissingFile, Unavailable

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

GENERATION = "generation_config.json"

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Anywhere in a name, then at its beginning; taken off in this order.
WRAPPERS = {
    r"(^|\.)_orig_mod\.": "_orig_mod.",
    r"(^|\.)_fsdp_wrapped_module\.": "_fsdp_wrapped_module.",
    r"(^|\.)_checkpoint_wrapped_module\.": "_checkpoint_wrapped_module.",
    r"^module\.": "module.",
    r"^base_model\.model\.": "base_model.model.",
}

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")

SAYS_NOTHING = {"transformers_version", "use_cache", "output_attentions", "output_hidden_states", "do_sample"}

SHOWN = 3  # tensors named in a line


# --- configuration and tokenizer -------------------------------------------------------------------------------------


def read_json(file: Path) -> dict:
    """The object in a JSON file. Raises MissingFile or InputError naming the file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise MissingFile(f"{file.parent} has no {file.name}") from error
    except ValueError as error:
        raise InputError(f"{file} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{file} is damaged: it holds a {type(found).__name__}, not an object")
    return found


def read_config(folder: Path, *, gguf_file: str | None = None) -> PreTrainedConfig:
    """The configuration in a folder. Raises InputError for a family that transformers does not know, or damage."""
    if gguf_file is None:
        read_json(folder / "config.json")
    try:
        with process.quietly():
            return AutoConfig.from_pretrained(folder, **({"gguf_file": gguf_file} if gguf_file else {}))
    except Exception as error:  # whatever a family's own checks raise
        raise _unusable(folder / (gguf_file or "config.json"), error) from error


def read_tokenizer(folder: Path, *, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder. Raises MissingFile where there is none, InputError for one that is damaged."""
    if gguf_file is None and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        others = ", ".join(TOKENIZER_FILES[1:4])
        raise MissingFile(f"{folder} has no tokenizer; copy the model's tokenizer.json there (or {others})")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            read_json(folder / name)
    try:
        with process.quietly():
            found = AutoTokenizer.from_pretrained(folder, **({"gguf_file": gguf_file} if gguf_file else {}))
            found("a")  # what it is told of lengths and padding is looked at when it is used
            return found
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise _unusable(folder / (gguf_file or "tokenizer_config.json and tokenizer.json"), error) from error


def token_ids(folder: Path, config: PreTrainedConfig) -> GenerationConfig:
    """The special tokens of a folder's generation configuration, or else of its configuration, and nothing more."""
    text = config.get_text_config()
    told = {name: told_ids(folder / GENERATION, name) for name in TOKEN_IDS}
    return GenerationConfig(**{n: getattr(text, n, None) if ids is None else ids for n, ids in told.items()})


def told_ids(file: Path, name: str) -> int | list[int] | None:
    """What a configuration file says of a token, itself or in its part on text. Raises InputError for what is no id."""
    if not file.is_file():
        return None
    described = read_json(file)
    text = described.get("text_config")
    found = described.get(name, text.get(name) if isinstance(text, dict) else None)
    ids = found if isinstance(found, list) and name == "eos_token_id" else [] if found is None else [found]
    if not all(isinstance(index, int) and index >= -1 for index in ids):
        raise InputError(f"{file} has {name} {found!r}; it is a number, and several only of eos_token_id")
    return found


def generation_settings(folder: Path) -> list[str]:
    """The publisher's settings that the lab does not take over, by name."""
    told = read_json(folder / GENERATION) if (folder / GENERATION).is_file() else {}
    return sorted(n for n in told if n not in {*TOKEN_IDS, *SAYS_NOTHING} and not n.startswith("_"))


def configuration(model: PreTrainedModel) -> dict:
    """What config.json of a model says, without the path that it was loaded from."""
    found = model.config.to_dict() | {"architectures": [type(model).__name__]}
    return {key: value for key, value in found.items() if key not in ("_name_or_path", "name_or_path")}


# --- weight files ----------------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a model. Raises MissingFile for shards that an index names and nobody has."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        others = ", ".join(sorted(path.name for path in folder.glob("*.safetensors"))[:SHOWN]) or "none"
        raise MissingFile(f"{folder} has neither {WEIGHTS} nor {INDEX}; safetensors files there: {others}")
    named = read_json(folder / INDEX).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise InputError(f"{folder / INDEX} is damaged: it has no weight_map")
    files = [folder / name for name in sorted(set(named.values()))]
    if missing := [path.name for path in files if not path.is_file()]:
        raise MissingFile(f"{folder / INDEX} names {_few(missing)}, which {_verb(missing, 'is', 'are')} not there")
    return files


def tensor_names(files: Iterable[Path]) -> set[str]:
    """Names of all tensors, read from the headers. Raises InputError for a file that is truncated or damaged."""
    names: set[str] = set()
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                names |= set(file.keys())
        except (SafetensorError, OSError) as error:
            raise InputError(f"weights in {path} are truncated or damaged: {error}") from error
    return names


def wrappers(names: Collection[str]) -> dict[str, str]:
    """Patterns of the wrappers' prefixes that these names carry, with the prefixes; those further in come off first."""
    found = {}
    for pattern, prefix in WRAPPERS.items():
        if any(re.search(pattern, name) for name in names):
            found[pattern] = prefix
            names = {re.sub(pattern, r"\1" if "|" in pattern else "", name) for name in names}
    return found


# --- models ----------------------------------------------------------------------------------------------------------


def load(
    folder: Path, *, replaced: Sequence[str] = (), config: PreTrainedConfig | None = None, **options
) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained` of a folder with safetensors; tensors of `replaced` layers may be missing.

    Raises InputError naming the tensors that do not fit the configuration, MissingFile or Unavailable with the reason.
    """
    config = config or read_config(folder)
    names = tensor_names(weight_files(folder))
    found = wrappers(names)
    if found:
        logging.getLogger(__name__).warning(
            "%s: taken off the names of its tensors: %s, as a wrapper leaves them", folder, " ".join(found.values())
        )
        options["key_mapping"] = {pattern.replace(r"(^|\.)", ""): "" for pattern in found}
    options["generation_config"] = token_ids(folder, config)
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):  # which the other forms drop without a word
        options.setdefault("attn_implementation", "eager")
    try:
        model, differences = pretrained(folder, config=config, **options | {"use_safetensors": True})
    except InputError:  # a library's words, which a tensor that is not there may have caused
        if getattr(config, "quantization_config", None):
            lost = {name for name in _layers_without_tensors(folder, config, names) if name not in replaced}
            refuse_differences(folder, missing=lost, unexpected=[], mismatched=[])
        raise
    if found:
        model._weight_conversions = None  # saving would put the prefix back
    missing = set(differences["missing_keys"])
    missing -= _never_saved(folder, config) if missing else set()
    refuse_differences(
        folder,
        missing={name for name in missing if name.rpartition(".")[0] not in replaced},
        unexpected={n for n in differences["unexpected_keys"] if not n.startswith(tuple(f"{r}." for r in replaced))},
        mismatched=differences["mismatched_keys"],
    )
    _say_whether_tied(model)
    return model


def skeleton(folder: Path, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """A model's modules and shapes without any weights, nor what its configuration says of quantisation."""
    config = copy.deepcopy(config) if config else read_config(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with torch.device("meta"), process.quietly():
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # of a family's own code, for numbers that make no model
        raise _unusable(folder / "config.json", error) from error


def _never_saved(folder: Path, config: PreTrainedConfig) -> set[str]:
    """Names of buffers that no checkpoint holds: rotary frequencies, the scale of Gemma's embedding.

    Of the model before quantisation: compressed-tensors makes parameters of them, with their values.
    """
    named = skeleton(folder, config).named_modules()
    return {f"{name}.{buffer}" for name, module in named for buffer in module._non_persistent_buffers_set}


def _layers_without_tensors(folder: Path, config: PreTrainedConfig, names: Collection[str]) -> set[str]:
    """Parameters of a quantised model whose layer has no tensor of any kind, under whatever names and types."""
    model = skeleton(folder, config)
    known = {".".join(parts[:depth]) for name in names for parts in [name.split(".")] for depth in range(len(parts))}
    return {name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in known}


def _say_whether_tied(model: PreTrainedModel) -> None:
    """Let the configuration say that head and embedding are two, where they are."""
    head, table, config = model.get_output_embeddings(), model.get_input_embeddings(), model.config.get_text_config()
    if getattr(config, "tie_word_embeddings", False) and head is not None and head.weight is not table.weight:
        config.tie_word_embeddings = False


def pretrained(folder: Path, **options) -> tuple[PreTrainedModel, dict]:
    """The model that transformers makes of a folder, and what did not fit; its exceptions as one line."""
    try:
        with process.quietly(), torch.random.fork_rng(devices=[]):  # what is missing is drawn
            return AutoModelForCausalLM.from_pretrained(
                folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except (LabError, torch.OutOfMemoryError, MemoryError):
        raise
    except SafetensorError as error:
        raise InputError(f"weights in {folder} are truncated or damaged: {error}") from error
    except Exception as error:  # of transformers and of the library that the weights were quantised with
        raise _unusable(folder, error) from error


def refuse_differences(
    where: Path, *, missing: Collection[str], unexpected: Collection[str], mismatched: Collection[tuple]
) -> None:
    """Raise InputError naming the first tensors that a checkpoint lacks, has too many, or has in another shape."""
    faults = []
    if missing:
        faults.append(f"lacks {_count(missing)}: {_few(missing)}")
    if unexpected:
        faults.append(f"holds {_count(unexpected)} that the model does not have: {_few(unexpected)}")
    if mismatched:
        shown = [f"{name} is {tuple(has)}, not {tuple(needs)}" for name, has, needs in sorted(mismatched)]
        faults.append(f"has {_count(shown)} of another shape than its configuration says: {_few(shown)}")
    if faults:
        raise InputError(f"{where} {'; it '.join(faults)}. Give the folder as it was published or saved")


# --- adapters in PEFT's format ---------------------------------------------------------------------------------------


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter in PEFT's format."""
    return (folder / ADAPTER_CONFIG).is_file()


def apply_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Put an adapter's layers into its base. Raises InputError for tensors that the base has no layer for, by name."""
    _check_adapter(folder)
    try:
        with process.quietly():
            model.load_adapter(str(folder))
    except Exception as error:  # of transformers and PEFT: rows and columns that differ, layers that are not there
        raise _unusable(folder, error) from error
    _refuse_other_tensors(model, folder)


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The base with an adapter (LoRA, rsLoRA, DoRA, whole modules) merged by PEFT: exact where the base is in float32.

    Raises InputError for tensors that the base has no layer for, by name, and for other kinds of adapters.
    """
    from peft import PeftConfig, PeftModelForCausalLM, set_peft_model_state_dict
    from safetensors.torch import load_file

    kind = _check_adapter(folder)
    if kind != "LORA":
        raise InputError(f"{folder} is a {kind} adapter; merged are LoRA, rsLoRA and DoRA, with whole modules or not")
    try:
        with process.quietly():
            adapted = PeftModelForCausalLM(model, PeftConfig.from_pretrained(folder))
            _refuse_other_tensors(adapted, folder)
            set_peft_model_state_dict(adapted, load_file(folder / ADAPTER_WEIGHTS))
            merged = adapted.merge_and_unload()
    except LabError:
        raise
    except Exception as error:  # PEFT's own: target modules that the base does not have, what it cannot merge
        raise _unusable(folder, error) from error
    _say_whether_tied(merged)
    return merged


def _check_adapter(folder: Path) -> str:
    """The kind of an adapter whose files can be read."""
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise MissingFile(f"{folder} has {ADAPTER_CONFIG} and no {ADAPTER_WEIGHTS}; pickled adapters are not opened")
    tensor_names([folder / ADAPTER_WEIGHTS])
    return str(read_json(folder / ADAPTER_CONFIG).get("peft_type", "unknown"))


def _refuse_other_tensors(model: torch.nn.Module, folder: Path) -> None:
    from peft import get_peft_model_state_dict

    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        has = {_bare(name): tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    whole = any(".base_layer." in name for name in has)
    state = get_peft_model_state_dict(model, save_embedding_layers=whole, adapter_name="default")
    needs = {_bare(name): tuple(tensor.shape) for name, tensor in state.items()}
    refuse_differences(
        folder,
        missing=needs.keys() - has.keys(),
        unexpected=has.keys() - needs.keys(),
        mismatched=[(name, has[name], needs[name]) for name in has.keys() & needs.keys() if has[name] != needs[name]],
    )


def _bare(name: str) -> str:
    return name.removeprefix("base_model.model.")


# --- words -----------------------------------------------------------------------------------------------------------


def _count(names: Collection[str]) -> str:
    return f"{len(names)} tensor{'s' * (len(names) > 1)}"


def _few(names: Collection[str]) -> str:
    shown = sorted(names)[:SHOWN]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def _verb(names: Collection[str], one: str, more: str) -> str:
    return one if len(names) == 1 else more


def _unusable(where: Path, error: Exception) -> LabError:
    """A library's exception as one line."""
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ImportError):
        return Unavailable(f"{where} needs a library that is not installed: {said}")
    return InputError(f"{where} cannot be read: {said[:400]}")
