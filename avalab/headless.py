"""Run one notebook without a browser: parameters in, executed copy out, nothing half-written in between.

1. The names passed must be those the notebook's `parameters` cell defines (papermill alone only warns).
2. papermill runs it in notebooks/, with this interpreter, into a hidden file of the results folder.
3. What is no result is taken out: absolute paths, progress bars, stderr (kept in a hidden log beside it).
4. The file is renamed to `results/<name>/NN_subject.ipynb`; after a failure, the copy so far is kept as
   `NN_subject.failed.ipynb` with `NN_subject.traceback.txt`, and an earlier good copy stays.
Ctrl-C stops the kernel and exits 130; a kernel whose runner was killed notices within seconds and exits.
Source of the method: papermill's execution model (one notebook, one parameters cell, one output file).

What it does not do: choose which notebooks must run (make does), or run two at once: they measure speed, so
runs of one results folder wait for each other.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from avalab.dependencies import check_parameters, model_argument, notebook_names
from avalab.experiment import ROOT, folder_name, write_atomically

WIDGETS = "application/vnd.jupyter.widget-view+json"
STOPPED = 130  # what a shell reports for Ctrl-C
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def execute(notebook: str, profile: str, *, model: str = "", seed: int = 0) -> Path:
    """Run `notebooks/<notebook>.ipynb` and return the executed copy.

    Raises ValueError for an unknown notebook or parameter, RuntimeError with the error's last line when it fails.
    """
    notebook_names(notebook)
    source = ROOT / "notebooks" / f"{notebook}.ipynb"
    parameters = {"profile": profile, "seed": seed, "model": model_argument(profile, model)}
    check_parameters(source, parameters)
    results = ROOT / "results" / folder_name(profile, parameters["model"], seed)
    with _alone_in(results):
        for stale in results.glob(f".{notebook}.*.ipynb"):  # a run that was killed
            stale.unlink()
        temporary = results / f".{notebook}.{os.getpid()}.ipynb"
        try:
            _run_papermill(source, temporary, parameters, log=results / f".{notebook}.stderr.txt")
        except Exception as error:  # whatever stopped it, the copy so far is evidence
            raise RuntimeError(_keep_failure(temporary, results, notebook, error)) from error
        else:
            return _keep_success(temporary, results, notebook)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _alone_in(results: Path) -> Iterator[None]:
    """Hold the results folder's lock; the system drops it when this process ends, however it ends."""
    results.mkdir(parents=True, exist_ok=True)
    with (results / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another run is writing {results.relative_to(ROOT)}; waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run_papermill(source: Path, output: Path, parameters: dict, *, log: Path) -> None:
    import papermill  # slow, and not needed for a summary

    # The kernel is this interpreter's, and imports this checkout's package.
    package_root = str(Path(__file__).resolve().parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    with log.open("w", encoding="utf-8") as stderr_file:
        papermill.execute_notebook(
            str(source),
            str(output),
            parameters=parameters,
            kernel_name="python3",
            language="python",
            cwd=str(source.parent),
            progress_bar={"desc": source.stem, "mininterval": 0.1 if sys.stderr.isatty() else 15},
            stderr_file=stderr_file,
            extra_arguments=["--log-level=CRITICAL"],  # the kernel's own chatter, not the notebook's
        )


def _keep_success(temporary: Path, results: Path, notebook: str) -> Path:
    executed = results / f"{notebook}.ipynb"
    _write_copy(temporary, executed)
    for suffix in ("failed.ipynb", "traceback.txt"):
        (results / f"{notebook}.{suffix}").unlink(missing_ok=True)
    return executed


def _keep_failure(temporary: Path, results: Path, notebook: str, error: Exception) -> str:
    """Keep the partial copy and the traceback; return the error's last line."""
    failed = results / f"{notebook}.failed.ipynb"
    if temporary.is_file():
        _write_copy(temporary, failed)
    text = without_paths(ANSI.sub("", str(error)).strip() or type(error).__name__, _shortenings())
    write_atomically(results / f"{notebook}.traceback.txt", text + "\n")
    return text.splitlines()[-1]


def _write_copy(temporary: Path, final: Path) -> None:
    notebook = json.loads(temporary.read_text(encoding="utf-8"))
    notebook["metadata"]["papermill"]["output_path"] = str(final)
    write_atomically(final, json.dumps(cleaned(notebook), indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def cleaned(notebook: dict) -> dict:
    """The notebook without stderr, progress-bar widgets and absolute paths."""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            kept = (o for o in cell["outputs"] if o.get("name") != "stderr" and WIDGETS not in o.get("data", {}))
            cell["outputs"] = list(kept)
    notebook["metadata"].pop("widgets", None)
    model = notebook["metadata"]["papermill"]["parameters"].get("model", "")
    return without_paths(notebook, _shortenings({model: Path(model).name} if model.startswith("/") else {}))


def without_paths(value, shortenings: list[tuple[re.Pattern, str]]):
    """The same JSON value with every match of a pattern replaced in its strings, pictures left alone."""
    if isinstance(value, dict):
        # A PNG is base64 text: a match in it would be chance, and a replacement would break the picture.
        kept = {k for k in value if k.startswith("image/") and "svg" not in k}
        return {k: v if k in kept else without_paths(v, shortenings) for k, v in value.items()}
    if isinstance(value, list):
        return [without_paths(item, shortenings) for item in value]
    if isinstance(value, str) and "/" in value:
        for pattern, shown in shortenings:
            value = pattern.sub(shown, value)
    return value


def _shortenings(more: dict[str, str] | None = None) -> list[tuple[re.Pattern, str]]:
    """Patterns for this machine's folders: the lab's own become relative, the home `~`, Python's `<python>`."""
    folders = {
        tempfile.gettempdir(): "<tmp>",
        str(Path.home()): "~",
        sys.base_prefix: "<python>",
        sys.prefix: "<python>",
        **dict.fromkeys((str(Path(__file__).resolve().parent.parent), str(ROOT), str(ROOT.resolve())), "."),
        **(more or {}),
    }
    pairs = []
    for folder in sorted((f for f in folders if len(f) > 1), key=len, reverse=True):  # the innermost folder first
        start = rf"(?<![\w.]){re.escape(folder)}"
        if folders[folder] == ".":
            pairs.append((re.compile(start + "/"), ""))
        pairs.append((re.compile(start + r"(?![\w-])"), folders[folder]))
    return pairs


def summary(name: str, notebooks: list[str]) -> int:
    """Print one line a notebook of run `name`: done, failed (with its error) or not run; 0 when all are done."""
    results = ROOT / "results" / name
    width, missing = max(map(len, notebooks)), 0
    for notebook in notebooks:
        traceback = results / f"{notebook}.traceback.txt"
        if traceback.is_file():
            last = traceback.read_text(encoding="utf-8").strip().splitlines()[-1]
            state = f"FAILED   {last}  (copy so far: results/{name}/{notebook}.failed.ipynb)"
        elif (ROOT / ".stamps" / name / f"{notebook}.done").is_file():
            state = f"done     results/{name}/{notebook}.ipynb"
        else:
            state = "not run"
        missing += not state.startswith("done")
        print(f"{notebook:{width}}  {state}")
    return 1 if missing else 0


def main(arguments: list[str] | None = None) -> int:
    """Run notebooks, or `--summary` them; 0, or 1 when one failed, 2 for wrong input, 130 when stopped."""
    parser = argparse.ArgumentParser(prog="python -m avalab.headless", description=__doc__.partition("\n")[0])
    parser.add_argument("notebook", nargs="+", help="NN_subject")
    parser.add_argument("--profile", default="laptop")
    parser.add_argument("--model", default="", help="asset, folder or hub id; empty: the profile's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--summary", metavar="NAME", help="say what is done in results/NAME instead of running")
    options = parser.parse_args(arguments)
    if options.summary:
        return summary(options.summary, options.notebook)
    try:
        selected = notebook_names(" ".join(options.notebook))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, _stop)
    status = 0
    known = notebook_names()
    for notebook in selected:
        print(f"[{known.index(notebook) + 1:02}/{len(known):02}] {notebook} ({options.profile})", flush=True)
        status = max(status, _report_on(notebook, options))
        if status == STOPPED:
            break
    return status


def _stop(signum: int, frame: object) -> None:
    logging.disable(logging.CRITICAL)  # that its kernel died is no news to whoever stopped it
    raise KeyboardInterrupt


def _report_on(notebook: str, options: argparse.Namespace) -> int:
    started = time.monotonic()
    try:
        executed = execute(notebook, options.profile, model=options.model, seed=options.seed)
    except KeyboardInterrupt:
        print(f"\n{notebook}: stopped; the next run starts it again", file=sys.stderr)
        return STOPPED
    except RuntimeError as error:
        print(f"{notebook}: failed after {time.monotonic() - started:.0f} s: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"{notebook}: {error}", file=sys.stderr)
        return 2
    print(f"{notebook}: done in {time.monotonic() - started:.0f} s, {executed.relative_to(ROOT)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
