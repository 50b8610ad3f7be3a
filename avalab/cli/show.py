"""`avalab show`: what a folder or a file holds, whoever made it, read from cards, configurations and headers.

A row of `KINDS` is a file by whose presence a folder is known, and the function that describes such a folder as lines
of a label and a text. What is damaged is one line that names the file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

from avalab.cli import options
from avalab.lab import artifacts
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError, Unavailable

Line = tuple[str, str]  # label and text


def show(artifact: options.ModelPath) -> None:
    """Print what an artefact, a model folder, an adapter, a GGUF file or an exported folder is made of."""
    options.there(artifact)
    for label, text in described(artifact):
        print(f"{label:9} {text}")


def described(path: Path) -> Iterator[Line]:
    """What stands in a file or folder. Raises InputError for one that holds no model, or a damaged one."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"{path} is no model; give an artefact's folder, a model's folder or a .gguf file")
        yield from _gguf(path)
        return
    for pattern, describe in KINDS.items():
        if any(path.glob(pattern)):
            yield from describe(path)
            return
    raise InputError(options.no_model(path))


def _artifact(folder: Path) -> Iterator[Line]:
    """Verified: base, recipe, what was measured, bytes by component."""
    found = artifacts.load_artifact(folder)
    card = found.card
    yield "name", found.name
    yield "format", f"{found.format} (engines: {', '.join(card.get('engines', []))})"
    yield "base", f"{card['base']['name']}  sha256 {card['base']['sha256'][:16]}..."
    yield "sha256", found.sha256
    for step in card["recipe"]:
        yield "recipe", json.dumps(step, sort_keys=True)
    for name, value in (card.get("measured") or {}).items():
        if isinstance(value, int | float | str) and value != "":
            yield "measured", f"{name.replace('_', ' ')}: {value:g}" if isinstance(value, float) else f"{name}: {value}"
    yield from _bytes(_parts(found))


def _parts(found: Artifact) -> dict[str, int]:
    """Bytes by component where the weights are a model's safetensors, else by file."""
    if list(found.path.glob("*.safetensors")) and found.format != "peft":
        from avalab.models import sizes

        return sizes.bytes_by_component(found)
    return {file["name"]: file["bytes"] for file in found.card["files"]}


def _bytes(parts: dict[str, int]) -> Iterator[Line]:
    total = sum(parts.values())
    width = max(10, *map(len, parts)) if parts else 10
    for part, count in parts.items():
        yield "bytes", f"{part:{width}} {count:>14,}  {count / max(1, total):6.1%}"
    yield "bytes", f"{'total':{width}} {total:>14,}"


def _ggufs(folder: Path) -> Iterator[Line]:
    for file in sorted(folder.glob("*.gguf")):
        yield from _gguf(file)


def _gguf(file: Path) -> Iterator[Line]:
    """Architecture, sizes and block types of a GGUF file, whatever architecture it is."""
    from avalab.models import gguf_layout

    types = gguf_layout.check(file)
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise Unavailable(f"{file} is read by the package gguf; install it: pip install gguf ({error})") from error
    reader = GGUFReader(file)
    values = {
        name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.ggml.t")
    }
    family = values.get("general.architecture", "unknown")
    yield "name", str(values.get("general.name") or file.name)
    yield "format", f"gguf, {family} (engines: llamacpp, openvino, torch where they know the family)"
    for name in ("block_count", "embedding_length", "context_length", "attention.head_count_kv"):
        if (value := values.get(f"{family}.{name}")) is not None:
            yield "size", f"{name.replace('_', ' ').replace('.', ', ')}: {value}"
    yield "weights", f"{sum(int(tensor.n_elements) for tensor in reader.tensors):,} in {sum(types.values())} tensors"
    yield "chat", "with a chat template" if "tokenizer.chat_template" in values else "without a chat template"
    by_type: Counter[str] = Counter()
    for tensor in reader.tensors:
        by_type[tensor.tensor_type.name.lower()] += int(tensor.n_bytes)
    yield from _bytes({**by_type, "rest": file.stat().st_size - sum(by_type.values())})


def _adapter(folder: Path) -> Iterator[Line]:
    """An adapter of PEFT's that has no card: what it was trained on, and how large it is."""
    config = _read(folder / "adapter_config.json")
    kinds = [name for key, name in (("use_rslora", "rsLoRA"), ("use_dora", "DoRA")) if config.get(key)]
    yield "name", folder.resolve().name
    yield "format", f"adapter of PEFT, {', '.join([str(config.get('peft_type', 'unknown type')), *kinds])}"
    yield "base", str(config.get("base_model_name_or_path") or "not named")
    yield "rank", f"{config.get('r', 'unknown')}, alpha {config.get('lora_alpha', 'unknown')}"
    targets = config.get("target_modules") or "unknown"
    yield "layers", targets if isinstance(targets, str) else ", ".join(map(str, targets))
    yield from _files(folder)


def _model(folder: Path) -> Iterator[Line]:
    """A model folder as it is published."""
    config = _read(folder / "config.json")
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    quantised = (config.get("quantization_config") or {}).get("quant_method")
    yield "name", folder.resolve().name
    yield "format", f"model folder, {config.get('model_type', 'of no named family')}, {quantised or 'not quantised'}"
    for name in ("num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings"):
        if name in text:
            yield "size", f"{name.replace('_', ' ')}: {text[name]}"
    files = sorted(folder.glob("*.safetensors"))
    if files:
        tensors = [row for file in files for row in _tensors(file)]
        types = ", ".join(sorted({kind for kind, _ in tensors}))
        yield "weights", f"{sum(count for _, count in tensors):,} in {len(tensors)} tensors of {types}"
    else:
        yield "weights", "no .safetensors file here; the lab reads no other"
    template = (folder / "chat_template.jinja").is_file() or "chat_template" in _read(
        folder / "tokenizer_config.json", {}
    )
    yield "chat", "with a chat template" if template else "without a chat template"
    yield from _files(folder)


def _exported(folder: Path) -> Iterator[Line]:
    """A folder for another engine that has no card."""
    engines = [engine for name, engine in EXPORTED.items() if list(folder.glob(name))]
    yield "name", folder.resolve().name
    yield "format", f"exported model without a card (engine: {engines[0]})"
    yield from _files(folder)


def _files(folder: Path) -> Iterator[Line]:
    yield from _bytes({file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()})


def _read(file: Path, absent: dict | None = None) -> dict:
    """The JSON object in a file. Raises InputError naming one that is damaged."""
    if absent is not None and not file.is_file():
        return absent
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{file} is damaged: it holds a {type(found).__name__}, not an object")
    return found


def _tensors(file: Path) -> list[tuple[str, int]]:
    """Type and number of elements of each tensor of a safetensors file, from its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            slices = [opened.get_slice(name) for name in opened.keys()]  # noqa: SIM118  it is no mapping
            return [(row.get_dtype().lower(), prod(row.get_shape())) for row in slices]
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is damaged: {error}") from error


EXPORTED = {  # of avalab.engines.OWN_FILES
    "genai_config.json": "onnx",
    "openvino_model.xml": "openvino",
    "model.pt2": "aot",
    "model.pte": "executorch",
    "*.onnx": "onnxruntime",
}

KINDS: dict[str, Callable[[Path], Iterator[Line]]] = {  # the first that fits
    artifacts.CARD: _artifact,
    "adapter_config.json": _adapter,
    **dict.fromkeys(EXPORTED, _exported),
    "*.gguf": _ggufs,
    "config.json": _model,
}
