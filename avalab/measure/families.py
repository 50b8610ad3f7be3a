"""Tiny random models of every family, and in every kind of folder, that people bring.

A row of `FAMILIES` is a configuration of transformers, small enough to be made, compressed and exported in a second or
two, or one of its variants: a layout of heads, a scaling of positions, a vocabulary, a dtype, an adapter, a folder.
`make_model` draws the weights from a seed and writes the folder as transformers or PEFT would, with the tokenizer and
chat template of data/tiny-llama. Every matrix has random weights wide enough that one logit stands out, every gain is
off one and every bias off zero: what a reader leaves out or takes for another thing changes the answer.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from avalab.lab import process
from avalab.lab.errors import InputError
from avalab.lab.run import ROOT

TOKENIZER = ROOT / "data" / "tiny-llama"

HIDDEN, VOCABULARY = 128, 1024  # of the tokenizer

WEIGHTS_STD, SPREAD_STD = 0.2, 0.1  # of matrices; of gains around their own value, and of biases around zero

SHARD_BYTES = 400_000  # less than half of a model

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

LOCAL_THEN_GLOBAL = ["sliding_attention", "full_attention"]

WINDOW = 32  # tokens that a sliding layer sees: fewer than the matrix's prompt has


@dataclass(frozen=True)
class Family:
    """A row: configuration class, what differs from `SHAPE`, and how the model is stored.

    `embedding_std` is less than other matrices' where embeddings are multiplied and tied: what a model of random
    weights reads would drown what it computes. `words` are added to the tokenizer, which has 1024. `adapter` are
    options of PEFT's LoraConfig: the model is then the folder of an adapter. `layout` is what is odd about the folder:
    "", sharded, links, read-only or path. `same_weights_as` names the row whose base artefact has the same tensors.
    """

    config: str
    settings: dict = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    embedding_std: float = WEIGHTS_STD
    words: int = 0
    adapter: dict | None = None
    layout: str = ""
    same_weights_as: str = ""


def _positions(kind: str, **settings: float) -> dict:
    scaled = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    return {"rope_parameters": scaled | settings}


def _adapter(*modules: str, **settings: object) -> dict:
    return {"r": 8, "lora_alpha": 16, "target_modules": list(modules), "task_type": "CAUSAL_LM"} | settings


FAMILIES = {
    "llama": Family("LlamaConfig"),
    "llama-tied": Family("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-one-kv-head": Family("LlamaConfig", {"num_key_value_heads": 1}),
    "llama-wide-heads": Family("LlamaConfig", {"head_dim": 64}),
    "llama-biases": Family("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-rope-llama3": Family("LlamaConfig", _positions("llama3", low_freq_factor=1.0, high_freq_factor=4.0)),
    "llama-rope-linear": Family("LlamaConfig", _positions("linear")),
    "llama-rope-yarn": Family("LlamaConfig", _positions("yarn")),
    "llama-odd-vocabulary": Family("LlamaConfig", {"vocab_size": VOCABULARY + 7}, words=7),
    "llama-padded-vocabulary": Family("LlamaConfig", {"vocab_size": VOCABULARY + 64}),
    "llama-fp16": Family("LlamaConfig", dtype=torch.float16),
    "llama-fp32": Family("LlamaConfig", dtype=torch.float32, same_weights_as="llama"),
    "llama-sharded": Family("LlamaConfig", layout="sharded", same_weights_as="llama"),
    "mistral-sliding": Family("MistralConfig", {"sliding_window": WINDOW}),
    "qwen2": Family("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": Family("Qwen3Config", {"head_dim": 64, "tie_word_embeddings": True}),
    "gemma2": Family(
        "Gemma2Config",
        {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": WINDOW, "tie_word_embeddings": True},
        embedding_std=0.03,
    ),
    "gemma3": Family(
        "Gemma3TextConfig",
        {
            "head_dim": 64,
            "query_pre_attn_scalar": 64,
            "sliding_window": WINDOW,
            "layer_types": LOCAL_THEN_GLOBAL,
            "tie_word_embeddings": True,
        },
        embedding_std=0.03,
    ),
    "phi3": Family("Phi3Config"),
    "stablelm": Family("StableLmConfig", {"partial_rotary_factor": 0.25, "use_qkv_bias": True}),
    "smollm3": Family(
        "SmolLM3Config", {"num_hidden_layers": 4, "tie_word_embeddings": True}
    ),  # the last without rotation
    "granite": Family(
        "GraniteConfig",
        {
            "embedding_multiplier": 6.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.25,
            "tie_word_embeddings": True,
        },
        embedding_std=0.06,
    ),
    "olmo2": Family("Olmo2Config"),
    "gpt2": Family(
        "GPT2Config",
        {
            "intermediate_size": None,
            "num_key_value_heads": None,
            "max_position_embeddings": 1536,  # learnt: in float32, as files hold them, they outweigh what is saved
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-moe": Family(
        "Qwen3MoeConfig",
        {"head_dim": 32, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "lora": Family("LlamaConfig", adapter=_adapter("q_proj", "v_proj", "down_proj")),
    "lora-rs": Family("LlamaConfig", adapter=_adapter("q_proj", "v_proj", use_rslora=True)),
    "lora-dora": Family("LlamaConfig", adapter=_adapter("q_proj", "v_proj", use_dora=True)),
    "lora-modules-to-save": Family("LlamaConfig", adapter=_adapter("q_proj", "v_proj", modules_to_save=["lm_head"])),
    "folder-of-links": Family("LlamaConfig", layout="links", same_weights_as="llama"),
    "folder-read-only": Family("LlamaConfig", layout="read-only", same_weights_as="llama"),
    "folder-odd-path": Family("LlamaConfig", layout="path", same_weights_as="llama"),
}

ODD_PATH = Path("my models", "模型 Größe №1")


def make_model(name: str, folder: Path, seed: int = 0) -> Path:
    """Write the model of a row below `folder`, and give the folder that a user would name; same seed, same bytes.

    That is `folder` itself unless the row's point is another: an adapter lies beside its base, a snapshot of links
    below a hub's cache. Raises ValueError for an unknown row.
    """
    if name not in FAMILIES:
        raise InputError(f"unknown family {name!r}; choose one of {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    with torch.random.fork_rng(devices=[]), process.quietly():
        torch.manual_seed(seed)
        if family.adapter:
            return _write_adapter(family, folder, seed)
        if family.layout == "path":
            folder = folder / ODD_PATH
        _write_base(family, folder, seed)
    if family.layout == "links":
        return _as_snapshot(folder)
    if family.layout == "read-only":
        for path in (*folder.iterdir(), folder):
            path.chmod(path.stat().st_mode & 0o555)
    return folder


def configuration(family: Family):
    """The row's configuration; what is None of a row's settings is not said."""
    import transformers

    settings = {name: value for name, value in (SHAPE | family.settings).items() if value is not None}
    return getattr(transformers, family.config)(**settings, dtype=family.dtype)


def _write_base(family: Family, folder: Path, seed: int) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(configuration(family), dtype=torch.float32)
    apply_random_weights(model, seed, family.embedding_std)
    model = nn.Module.to(model, family.dtype).eval()
    model.save_pretrained(folder, **({"max_shard_size": SHARD_BYTES} if family.layout == "sharded" else {}))
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_tokens([f"<|extra_{number}|>" for number in range(family.words)])
    tokenizer.save_pretrained(folder)
    return model


@torch.no_grad()
def apply_random_weights(model: PreTrainedModel, seed: int = 0, embedding_std: float = WEIGHTS_STD) -> None:
    """Draw every parameter in place: matrices around zero, gains around their value, biases around zero."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = model.get_input_embeddings().weight
    for _, parameter in sorted(model.named_parameters()):
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(drawn * (embedding_std if parameter is embeddings else WEIGHTS_STD))
        else:
            parameter.add_(drawn * SPREAD_STD)


def _write_adapter(family: Family, folder: Path, seed: int) -> Path:
    """The base in `folder`/base, and beside it an adapter that names it."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(_write_base(family, folder / "base", seed), LoraConfig(**family.adapter))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in (p for _, p in sorted(model.named_parameters()) if p.requires_grad):
            noise = torch.randn(parameter.shape, generator=generator) * SPREAD_STD
            parameter.add_(noise.to(parameter.dtype))
    model.save_pretrained(folder / "adapter")
    config = folder / "adapter" / "adapter_config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) | {"base_model_name_or_path": str(folder / "base")}
    config.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
    return folder / "adapter"


def _as_snapshot(folder: Path) -> Path:
    """Move a folder's files to blobs and link to them, as a hub's cache does."""
    blobs, snapshot = folder / "blobs", folder / "snapshots" / ("0" * 40)
    files = list(folder.iterdir())
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(files)):
        shutil.move(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / f"{number:040x}", snapshot))
    return snapshot
