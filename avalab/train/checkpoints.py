"""Checkpoints of a training that is not finished: whose they are, whether they are whole, and when one is due.

1. What a training is (its data, settings and code) names the folder of its checkpoints. One of other settings begins
   anew in a folder of its own and says so; the older one stays, and goes on when its own settings come again.
2. A checkpoint is sealed by a list of its files with their hashes, written last. One that lacks its seal, or whose
   files are others by now, is deleted, with a line that says so; training goes on from the one before, or anew.
3. `Keeper` asks for one every so many seconds, besides those that the Trainer makes every so many steps. The first
   Ctrl-C ends the step, keeps it and stops; the second one stops at once.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import TrainerCallback

from avalab.lab import artifacts
from avalab.lab.run import write_atomically

SETTINGS, SEAL = "settings.json", "files.json"


def say(line: str) -> None:
    """A line for the person who waits, above whatever bar is there."""
    tqdm.write(line, file=sys.stderr)


def own_folder(folder: Path, settings: dict) -> Path:
    """The folder below `folder` for a training of exactly these settings."""
    return folder / artifacts.sha256_of_text(json.dumps(settings, sort_keys=True))[:12]


def claim(own: Path, settings: dict) -> None:
    """Write the settings into the folder of their own; says what other trainings are unfinished beside it."""
    if (own / SETTINGS).is_file():
        return
    for other in sorted(own.parent.glob(f"*/{SETTINGS}")):
        say(f"{other.parent} keeps an unfinished training of other settings{_changes(other, settings)}; begun anew")
    write_atomically(own / SETTINGS, json.dumps(settings, indent=1, sort_keys=True))


def _changes(other: Path, settings: dict) -> str:
    """In brackets, what another training's settings differ in; nothing where its file cannot be read."""
    try:
        before = json.loads(other.read_text(encoding="utf-8"))
        differing = sorted(k for k in settings.keys() | before.keys() if settings.get(k) != before.get(k))
    except (ValueError, AttributeError):
        return ""
    return " (" + ", ".join(f"{k}: {before.get(k)!r} then, {settings.get(k)!r} now" for k in differing) + ")"


def forget(own: Path) -> None:
    """Delete what a training that is done has kept."""
    shutil.rmtree(own)
    if not any(own.parent.iterdir()):
        own.parent.rmdir()


def seal(checkpoint: Path) -> None:
    """Note every file of a checkpoint with its hash, last of all: without it there is no checkpoint."""
    files = sorted(path for path in checkpoint.iterdir() if path.name != SEAL)
    write_atomically(checkpoint / SEAL, json.dumps({path.name: artifacts.sha256_of(path) for path in files}, indent=1))


def last_whole(folder: Path, *, writes: bool = True) -> Path | None:
    """The newest checkpoint whose files are those of its seal; damaged ones are deleted where this process `writes`."""
    for path in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        if not (wrong := _damage(path)):
            return path
        if writes:
            say(f"{path} is damaged ({wrong}) and goes; training goes on from the checkpoint before it, or anew")
            shutil.rmtree(path)
    return None


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was made."""
    return int(checkpoint.name.rpartition("-")[2])


def _damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, or nothing."""
    try:
        files = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        wrong = [name for name, sha256 in files.items() if artifacts.sha256_of(checkpoint / name) != sha256]
    except FileNotFoundError as error:
        return "not written to its end" if Path(error.filename).name == SEAL else f"{error.filename} is missing"
    except (ValueError, AttributeError) as error:
        return f"{SEAL}: {error}"
    return f"{', '.join(wrong)} altered" if wrong else ""


class Keeper(TrainerCallback):
    """Checkpoints by time, their seals, and an end after the step in which somebody asked for it.

    The base class is what the Trainer's interface asks for.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.stopped = seconds, False

    def on_train_begin(self, args, state, control, **_) -> None:
        self.last = time.perf_counter()

    def on_step_end(self, args, state, control, **_) -> None:
        # Several processes have several clocks, and have to save in the same step: there, steps alone decide.
        due = args.world_size == 1 and time.perf_counter() - self.last >= self.seconds
        if due or self.stopped:
            control.should_save = True

    def on_save(self, args, state, control, **_) -> None:
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self.last = time.perf_counter()
        if self.stopped:  # not before: the state that was kept is to go on
            control.should_training_stop = True

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Turn the first Ctrl-C of the block into an end after the step; KeyboardInterrupt is raised behind it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(_signal: int, _frame: object) -> None:
            if self.stopped:
                raise KeyboardInterrupt
            self.stopped = True
            say("stopping after this step, which is kept; Ctrl-C again stops at once")

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
        if self.stopped:
            raise KeyboardInterrupt
