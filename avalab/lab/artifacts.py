"""Artefact folders: the only form in which a compressed model exists for the rest of the lab.

An artefact is a folder with weights, tokenizer and `card.json`; the caller's function fills it, whatever its format.

1. It is written under a temporary name, every file is hashed, the card is written last and the folder renamed: a
   half-written artefact is never visible. Its `sha256` is the hash of its card's file list, so that artefacts of the
   same bytes have the same identity, wherever and whenever they were made.
2. `load_artifact` verifies sizes and hashes, and names the file that differs.
3. `make_artifact` makes one from another: the recipe of its base with one more step. What the same step made from the
   same base before is verified and returned instead. `write_export` does so for an engine, and adds to the step a hash
   of the code that fills the folder.
4. Outside the lab's own `artifacts/`, which is a cache, nothing is replaced that the same step did not make, and a
   model never replaces what it was made from (`refuse_replacing`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from safetensors import SafetensorError

from avalab.lab.code import code_of
from avalab.lab.errors import InputError, MissingFile
from avalab.lab.run import ROOT

CARD = "card.json"

REMEDY = "delete the artefact folder and make it again"

WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".onnx", ".onnx.data", "openvino_model.bin", ".pt2", ".pte")

UNSAFE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


@dataclass(frozen=True)
class Artifact:
    """A verified artefact folder and its card."""

    path: Path
    card: dict

    @property
    def name(self) -> str:
        return self.card["name"]

    @property
    def sha256(self) -> str:
        return self.card["sha256"]

    @property
    def bytes(self) -> int:
        """Size of the weight files, in bytes: what a memory budget pays for (tokenizer and card not counted)."""
        return sum(f["bytes"] for f in self.card["files"] if f["name"].endswith(WEIGHT_SUFFIXES))

    @property
    def format(self) -> str:
        return self.card["format"]


def write_artifact(
    name: str,
    directory: Path,
    save: Callable[[Path], dict | None],
    *,
    base: dict,
    recipe: list[dict],
    format: str,
    engines: Iterable[str] = ("torch",),
    licence: str = "",
) -> Artifact:
    """Create `directory/name`: `save(folder)` fills it and may return measurements for the card's `measured`.

    `base` is `{"name", "sha256"}` of what the recipe was applied to. An artefact of the same name is replaced, but for
    that base. Raises OSError naming the folder when the disk is full or not writable; nothing is left behind.
    """
    _refuse_own_base(directory / name, base, recipe)
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".writing-{name}-{os.getpid()}"
    for folder in directory.glob(".writing-*"):  # of processes that were killed; one may have had our id
        owner = re.search(r"-(\d+)$", folder.name)  # without a process id it is not ours to delete
        if owner and (folder == temporary or not psutil.pid_exists(int(owner[1]))):
            shutil.rmtree(folder, ignore_errors=True)
    try:
        temporary.mkdir()
        measured = save(temporary) or {}
        files = _describe_files(temporary)
        card = {
            "name": name,
            "base": base,
            "recipe": recipe,
            "format": format,
            "engines": list(engines),
            "licence": licence,
            "files": files,
            "sha256": combined_sha256((f["name"], f["sha256"]) for f in files),
            "measured": measured,
        }
        (temporary / CARD).write_text(json.dumps(card, indent=1, sort_keys=True) + "\n")
        _replace_folder(temporary, directory / name)
    except (OSError, SafetensorError) as error:
        if _disk_is_full(error):
            free = shutil.disk_usage(directory).free
            message = f"no space for artefact {name!r} in {directory} ({free:,} bytes free)"
            raise OSError(errno.ENOSPC, message) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Artifact(directory / name, card)


def load_artifact(path: Path | str, *, verify: bool = True) -> Artifact:
    """Open an artefact folder; with `verify`, check that every file is the one its card describes.

    Raises FileNotFoundError when there is no artefact, ValueError naming the file that is missing or differs.
    """
    path = Path(path)
    if not (path / CARD).is_file():
        known = ", ".join(card.parent.name for card in _cards(path.parent)) or "none"
        raise MissingFile(f"no artefact at {path} (artefacts beside it: {known})")
    try:
        card = _checked_card(json.loads((path / CARD).read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:  # a JSON or UTF-8 error is a ValueError
        raise InputError(f"{path / CARD} is damaged ({error}); {REMEDY}") from error
    for described in card["files"] if verify else ():
        file = path / described["name"]
        if not file.is_file():
            raise InputError(f"{file} is missing; {REMEDY}")
        if file.stat().st_size != described["bytes"]:
            size = f"{file.stat().st_size:,} bytes, its card says {described['bytes']:,}"
            raise InputError(f"{file} has {size}; {REMEDY}")
        if sha256_of(file) != described["sha256"]:
            raise InputError(f"{file} was altered: its SHA-256 differs from its card's; {REMEDY}")
    return Artifact(path, card)


def _checked_card(card: object) -> dict:
    """The card. Raises InputError saying what it lacks, or which part is of another form."""
    if not isinstance(card, dict):
        raise InputError(f"it holds a {type(card).__name__}, not an object")
    if missing := [key for key in FORMS if key not in card]:
        raise InputError(f"without {', '.join(missing)}")
    if wrong := [key for key, fits in FORMS.items() if not fits(card[key])]:
        raise InputError(f"{', '.join(wrong)} of another form than the lab writes")
    if card["sha256"] != combined_sha256((f["name"], f["sha256"]) for f in card["files"]):
        raise InputError("its sha256 is not that of its files")
    return {"engines": ["torch"], "licence": "", "measured": {}} | card


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_file(value: object) -> bool:
    return (
        isinstance(value, dict)
        and _is_text(value.get("name"))
        and _is_text(value.get("sha256"))
        and (isinstance(value.get("bytes"), int))
    )


FORMS: dict[str, Callable[[object], bool]] = {  # what the lab reads from a card, and what each part has to be
    "name": lambda value: _is_text(value) and bool(value),
    "base": lambda value: isinstance(value, dict) and _is_text(value.get("name")) and _is_text(value.get("sha256")),
    "recipe": lambda value: isinstance(value, list) and all(isinstance(step, dict) for step in value),
    "format": _is_text,
    "files": lambda value: isinstance(value, list) and all(map(_is_file, value)),
    "sha256": _is_text,
}


def checked_target(out: Path | None) -> Path | None:
    """The folder that an artefact is to be written to. Raises ValueError for one that may hold somebody's files."""
    if out and out.exists() and not (out / CARD).is_file() and not _is_empty(out):
        raise InputError(f"{out} exists and is not an artefact; name a new folder")
    return out and out.resolve()


def refuse_replacing(out: Path, base_name: str, step: dict) -> None:
    """Raise ValueError for a folder with anything in it that this step of a recipe did not make from this base.

    What an older version of the step's code made counts as its own; of a parameter that is not in `step`, any value.
    """
    checked_target(out)
    if not (out / CARD).is_file() or out.resolve().is_relative_to(ROOT / "artifacts"):
        return
    there = load_artifact(out, verify=False).card
    last = there["recipe"][-1] if there["recipe"] else {}
    wanted = json.loads(json.dumps({name: value for name, value in step.items() if name != "code"}))
    if there["base"]["name"] != base_name or any(last.get(name) != value for name, value in wanted.items()):
        made_by = f"{last.get('step', 'no step')} of {there['base']['name']}"
        raise InputError(f"{out} holds another artefact ({made_by}); name a new folder, or delete that one (--force)")


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _refuse_own_base(target: Path, base: dict, recipe: list[dict]) -> None:
    """Raise ValueError where the artefact that is there is the one that the new one is made from."""
    try:
        there = load_artifact(target, verify=False).card
    except (FileNotFoundError, ValueError):
        return
    earlier = len(there["recipe"]) < len(recipe) and there["recipe"] == recipe[: len(there["recipe"])]
    if there["sha256"] == base["sha256"] and earlier:
        raise InputError(f"{target} is what the new artefact is made from; name another folder")


def list_artifacts(directory: Path | str) -> list[Artifact]:
    """All artefacts directly below a folder, by name; their files are not verified."""
    return [load_artifact(card.parent, verify=False) for card in _cards(Path(directory))]


def _cards(directory: Path) -> list[Path]:
    return sorted(directory.glob(f"[!.]*/{CARD}")) if directory.is_dir() else []


def of_sha256(directory: Path, sha256: str, *, first: str = "") -> Artifact | None:
    """The artefact of this identity directly below a folder, the one called `first` looked at first; else None."""
    for card in sorted(_cards(directory), key=lambda card: card.parent.name != first):
        try:
            artifact = load_artifact(card.parent, verify=False)
        except (FileNotFoundError, ValueError):  # somebody's damaged one is not what is looked for
            continue
        if artifact.sha256 == sha256:
            return artifact
    return None


def find_artifact(name: str, directory: Path, recipe: list[dict], base_sha256: str) -> Artifact | None:
    """The verified artefact of this name if it was made by exactly this recipe from this base, else None."""
    try:
        artifact = load_artifact(directory / name)
    except (FileNotFoundError, ValueError):
        return None
    same = artifact.card["recipe"] == json.loads(json.dumps(recipe)) and artifact.card["base"]["sha256"] == base_sha256
    return artifact if same else None


def make_artifact(
    out: Path,
    fill: Callable[[Path], dict | None],
    *,
    base: Artifact,
    step: dict,
    format: str,
    engines: Iterable[str] = ("torch",),
) -> Artifact:
    """The artefact in the folder `out`, read back or filled by `fill`, of `base` with one more step of its recipe.

    Raises ValueError for an `out` that is the base, or as `refuse_replacing` does.
    """
    recipe = json.loads(json.dumps([*base.card["recipe"], step]))
    if out.resolve() == base.path.resolve():
        raise InputError(f"{out} is what the new artefact is made from; name another folder")
    found = find_artifact(out.name, out.parent, recipe, base.sha256)
    if not found:
        refuse_replacing(out, base.name, step)
    return found or write_artifact(
        out.name,
        out.parent,
        fill,
        base={"name": base.name, "sha256": base.sha256},
        recipe=recipe,
        format=format,
        engines=engines,
        licence=base.card.get("licence", ""),
    )


@dataclass(frozen=True)
class Export:
    """One kind of export: its step of the recipe, the format, engines that load it."""

    step: dict
    format: str
    engines: Sequence[str]


def write_export(
    artifact: Artifact,
    export: Export,
    save: Callable[[Path], dict | None],
    check: Callable[[Path], dict],
    *,
    out: Path | None = None,
) -> Artifact:
    """`make_artifact` for an engine, in `<name>+<format>` beside the artefact or in the folder `out`.

    `check` compares the filled folder with the artefact; what it finds is in the card, what it raises keeps nothing.
    """
    out = out or artifact.path.parent / f"{artifact.name}+{export.format}"
    step = {**export.step, "code": code_of(save, check)}

    def fill(folder: Path) -> dict:
        return (save(folder) or {}) | check(folder)

    return make_artifact(out, fill, base=artifact, step=step, format=export.format, engines=export.engines)


def refuse_foreign(folder: Path, names: Iterable[str], *, made_by: str) -> None:
    """Raise ValueError for files of these names, or a README.md, that would be replaced and are somebody else's.

    Ours is a README.md that says `made_by`, and a file whose sha256 it lists; it need not be there.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder")
    parent = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not os.access(parent, os.W_OK):
        raise InputError(f"{parent} cannot be written; name another folder")
    card = folder / "README.md"
    said = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    foreign = [card.name] if card.exists() and made_by not in said else []
    foreign += [name for name in names if (folder / name).is_file() and sha256_of(folder / name) not in said]
    if foreign:
        raise InputError(
            f"{folder} holds {', '.join(foreign)} that this command did not make, or that was changed since; "
            "name another folder, or have it replaced by --force"
        )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _disk_is_full(error: Exception) -> bool:
    # safetensors turns the system's error into one of its own and keeps the number in the text only.
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(f"(os error {number})" in str(error) for number in full)


def _describe_files(folder: Path) -> list[dict]:
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    # OpenVINO's numbers lie bare in a .bin beside the graph's .xml; any other .bin may be pickled.
    unsafe = [p.name for p in paths if p.suffix.lower() in UNSAFE_SUFFIXES and not p.with_suffix(".xml").is_file()]
    if unsafe:
        raise InputError(
            f"refusing to write pickled weights: {', '.join(unsafe)}; only safetensors and GGUF are allowed"
        )
    for path in paths:
        if path.suffix == ".safetensors":
            _sort_metadata(path)
    return [
        {"name": p.relative_to(folder).as_posix(), "bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in paths
    ]


def _sort_metadata(file: Path) -> None:
    """Put a safetensors file's metadata into one order: its library writes them in a new order each time."""
    with file.open("r+b") as opened:
        try:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(min(length, file.stat().st_size)))
        except (struct.error, ValueError):  # no safetensors file: whoever reads it says so
            return
        metadata = header.get("__metadata__", {})
        if list(metadata) == sorted(metadata):
            return
        header["__metadata__"] = dict(sorted(metadata.items()))
        written = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(written) <= length:  # the same characters in another order; the rest are spaces, as the format has it
            opened.seek(8)
            opened.write(written.ljust(length))


def combined_sha256(files: Iterable[tuple[str, str]]) -> str:
    """One hash for a list of (name, sha256): that of the text `sha256sum` prints for them."""
    return sha256_of_text("\n".join(f"{sha256}  {name}" for name, sha256 in files))


def sha256_of_text(content: str) -> str:
    """SHA-256 of a text's UTF-8 bytes."""
    return hashlib.sha256(content.encode()).hexdigest()


def _replace_folder(source: Path, target: Path) -> None:
    """Rename onto `target`; an older folder of that name is moved aside first, and back if that fails."""
    old = target.with_name(f".writing-old-{target.name}-{os.getpid()}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    try:
        source.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
