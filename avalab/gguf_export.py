"""GGUF files of the Llama and Qwen families: what llama.cpp, Ollama and OpenVINO GenAI read, from an HF artefact.

1. Header: sizes, rotary base and norm epsilon from config.json; tokens, merges, token types and chat template from the
   tokenizer that lies beside the weights, so that the file needs nothing else.
2. Tensors under the names of gguf's own table. Llama's query and key rows are re-ordered: the file's rotary embedding
   turns neighbouring channels, transformers' turns channel i with channel i + head_dim / 2.
3. Linear weights in one block type (`BLOCKS`), or as they are packed already (`KEPT`, see `gguf_packed`). Norms and
   biases stay float32, as every reader expects. Embedding and head have 8 bits where the linear weights have 4 or 5; a
   row that 32 does not divide stays float16.
4. `write` makes an artefact of it: the file, configuration and tokenizer, and a `Modelfile` for Ollama.

Source: the GGUF specification; names and keys by the gguf package. What it does not do: K-quants or weighting by
importance (see `gguf_quantizer`), SentencePiece tokenizers, scaled rotary embeddings, experts; each is refused by name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from avalab import exported, gguf_blocks, gguf_packed, gguf_tokenizer, models, numerics
from avalab.artifacts import Artifact

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
    about = exported.Export({"step": "gguf", "block": block}, f"gguf-{block}", ENGINES)

    def save(folder: Path) -> None:
        export(artifact.path, folder / f"{artifact.name}.{block}.gguf", block)
        copy_beside(artifact.path, folder)

    return exported.write(artifact, about, save, out=out)


def export(folder: Path, file: Path, block: str = "q8_0") -> None:
    """Write one GGUF file from a model folder in transformers' format, and Ollama's `Modelfile` beside it."""
    if block not in (*BLOCKS, KEPT):
        known = ", ".join((*BLOCKS, KEPT))
        raise ValueError(f"no block type {block!r} is written; choose one of {known} (K types: gguf_quantizer)")
    config = checked_config(folder, kept=block == KEPT)
    write_tensors(folder, file, stored(folder, config, block), config=config, block=block)


def write_tensors(
    folder: Path, file: Path, tensors: Iterable[tuple[str, str, np.ndarray]], *, config: PreTrainedConfig, block: str
) -> None:
    """Write a file of tensors (name, block type, content in the file's order) with the folder's tokenizer."""
    import gguf

    writer = gguf.GGUFWriter(str(file), config.model_type)
    _write_sizes(writer, config, file.stem, block)
    tokenizer = models.load_tokenizer(folder)
    gguf_tokenizer.write(writer, tokenizer, rows=config.vocab_size)
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
        raise ValueError(f"{folder.name} is a {config.model_type}; exported are {', '.join(ARCHITECTURES)}")
    if getattr(config, "quantization_config", None) and not kept:
        method = config.quantization_config["quant_method"]
        raise ValueError(f"{folder.name} is quantised already ({method}); export the dense model that it was made from")
    rotary = config.rope_parameters["rope_type"]
    if rotary != "default":
        raise ValueError(f"{folder.name} has rotary embeddings of type {rotary!r}; exported is 'default'")
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


def encoded(tensor: Tensor, block: str) -> np.ndarray:
    """A tensor's values (f32, f16) or its bytes, row by row (bf16 and blocks)."""
    if block in ("f32", "f16"):
        return tensor.to({"f32": torch.float32, "f16": torch.float16}[block]).numpy()
    if block == "bf16":
        return tensor.bfloat16().contiguous().view(torch.uint8).numpy()
    return gguf_blocks.pack(numerics.encode(tensor.float(), gguf_blocks.FORMATS[block])).numpy()


def stored(folder: Path, config: PreTrainedConfig, block: str) -> Iterator[tuple[str, str, np.ndarray]]:
    """Name, block type and content of every tensor of the file, in the file's order of rows."""
    names = file_names(config)
    for name, value in gguf_packed.tensors(folder) if block == KEPT else _parameters(folder, config):
        found = names(name)
        if isinstance(value, tuple):
            steps, scales = (in_file_order(name, part, config) for part in value)
            kind = gguf_packed.block_of(steps)
            yield found, kind, gguf_packed.encoded(steps, scales, kind).numpy()
        else:
            kind = block_of(found, value, "bf16" if block == KEPT else block)
            yield found, kind, encoded(in_file_order(name, value, config), kind)


def _parameters(folder: Path, config: PreTrainedConfig) -> Iterator[tuple[str, Tensor]]:
    """The dense model's parameters; a head tied to the embedding is not repeated."""
    model = models.load(folder, dtype=config.dtype or torch.bfloat16)
    for name, parameter in model.named_parameters():  # each shared one once, under its first name
        yield name, parameter.detach().cpu()


def file_names(config: PreTrainedConfig) -> Callable[[str], str]:
    """The function from transformers' name of a tensor to the file's; it raises ValueError for one without."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]], config.num_hidden_layers)

    def file_name(name: str) -> str:
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"{name} has no name in GGUF's {config.model_type} models")
        return found

    return file_name


def in_file_order(name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
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
