"""The notebooks as make sees them: what has to run again, and one run without a browser.

1. Plan: which notebooks (those asked for, else the profile's own, else all), and a make include file with one rule a
   notebook, which depends on the modules it reaches, on pins and assets, and on a list of the files of a model that is
   a local folder, whose names may be any (`list_model`). A stamp whose results or sources are gone is taken back.
   A bare Python answers: only a run imports more than the standard library.
2. Run by papermill into a hidden file of the results folder. Absolute paths, progress bars and stderr go, the code's
   hash comes in, and the file becomes `results/<name>/NN_subject.ipynb`. After a failure the copy so far is kept as
   `NN_subject.failed.ipynb` with `NN_subject.traceback.txt`, and an earlier good copy stays. The page is built anew
   after each notebook.
3. Ctrl-C stops the kernel and exits 130; a kernel whose runner was killed exits within seconds. Runs of one results
   folder wait for each other, since notebooks measure speed.
"""

from __future__ import annotations

import argparse
import ast
import fcntl
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from avalab.lab.errors import InputError, LabError, ProcessFailed
from avalab.lab.run import PROFILES, ROOT, as_path, child_environment, folder_name, write_atomically
from avalab.report.dependencies import code_hashes, code_states, module_graph, modules_of_notebook, reachable

COMMON = ("pyproject.toml", "data/assets.toml", "avalab/lab/profiles.toml")  # every notebook depends on these

MODEL_FILES = ".stamps/{}/model.json"

WIDGETS = "application/vnd.jupyter.widget-view+json"

STOPPED = 130  # what a shell reports for Ctrl-C

CHECKOUT = Path(__file__).resolve().parents[2]  # whose package a kernel imports

# --- the plan ---


def notebook_names(selection: str = "", root: Path = ROOT) -> list[str]:
    """Names (`01_quantization`) of all notebooks, or of those whose number or name is in `selection`.

    Raises ValueError naming what was not found and what exists.
    """
    known = sorted(path.stem for path in (root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    wanted = selection.split()
    missing = [w for w in wanted if not any(w in (name, name[:2]) for name in known)]
    if missing or not known:
        shown = ", ".join(known) or "no notebook (NN_subject.ipynb)"
        raise InputError(f"no notebook {' '.join(missing) or 'to run'}; notebooks/ holds {shown}")
    return [name for name in known if not wanted or name in wanted or name[:2] in wanted]


def model_argument(profile: str, model: str, root: Path = ROOT) -> str:
    """What a notebook gets: '' for the profile's own model, a folder's absolute path (it runs elsewhere), or an id.

    Raises ValueError for an unknown profile.
    """
    if profile not in PROFILES:
        raise InputError(f"unknown profile {profile!r}; choose one of {', '.join(PROFILES)}")
    own = PROFILES[profile].model
    folder = next((f for f in (as_path(model), root / model) if f.is_dir()), None) if model else None
    if model in ("", own) or (folder and folder.resolve() == (root / own).resolve()):
        return ""
    return str(folder.resolve()) if folder else model


def list_model(name: str, model: str, root: Path = ROOT) -> None:
    """Write what make compares for run `name`: names, sizes and times of a model's files, if it is a local folder.

    The list is written only when it changes: then it is newer than the stamps.
    """
    folder, file = root / model, root / MODEL_FILES.format(name)
    files = sorted(path for path in folder.iterdir() if path.is_file()) if model and folder.is_dir() else []
    rows = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    text = json.dumps(rows, indent=0) + "\n"
    if rows and not (file.is_file() and file.read_text(encoding="utf-8") == text):
        write_atomically(file, text)


def make_rules(name: str, root: Path = ROOT) -> str:
    """The make include file of run `name`: which stamp (one a notebook, one for the page) depends on which files."""
    paths, graph = module_graph(root)
    data = [*(root / path for path in COMMON), root / MODEL_FILES.format(name)]
    page = [paths[module] for module in sorted(reachable({f"{__package__}.page"} & graph.keys(), graph))]
    rules = {"report": [*page, *sorted((root / "avalab" / "report" / "templates").glob("*.j2"))]}
    for notebook in notebook_names(root=root):
        modules = modules_of_notebook(root / "notebooks" / f"{notebook}.ipynb", graph)
        rules[f"{notebook}.done"] = [*(paths[m] for m in sorted(modules)), *(path for path in data if path.is_file())]
    lines, sources = ["# Written by avalab.report.notebooks; do not edit."], set()
    for stamp, files in rules.items():
        named = [file.relative_to(root) if file.is_relative_to(root) else file for file in files]
        named = [path.as_posix().replace("$", "$$").replace(" ", "\\ ").replace("#", "\\#") for path in named]
        lines.append(f".stamps/{name}/{stamp}: {' '.join(named)}")
        sources.update(named)
    # Empty rules: a module deleted later is a change, not "no rule to make target".
    return "\n".join([*lines, f"{' '.join(sorted(sources))}:", ""])


def remove_void_stamps(name: str, root: Path = ROOT) -> None:
    """Delete the stamps of run `name` whose results are gone, or that rest on a file that was deleted since."""
    stamps, results = root / ".stamps" / name, root / "results" / name
    made = {stamp: results / f"{stamp.stem}.ipynb" for stamp in stamps.glob("*.done")}
    made[stamps / "report"] = results / "index.html"
    rules = stamps / "dependencies.mk"
    for line in rules.read_text(encoding="utf-8").splitlines() if rules.is_file() else []:
        stamp, _, files = line.partition(": ")
        plain = [f.replace("\\#", "#").replace("\\ ", " ").replace("$$", "$") for f in re.split(r"(?<!\\) ", files)]
        if any(not (root / file).exists() for file in plain if file):
            (root / stamp).unlink(missing_ok=True)
    for stamp, result in made.items():
        if not result.is_file():
            stamp.unlink(missing_ok=True)


def plan(profile: str, *, model: str = "", seed: str = "0", notebooks: str = "") -> list[str]:
    """Write `.stamps/<name>/dependencies.mk`; returns the run's name and the notebooks that were asked for."""
    if not seed.isdigit():
        raise InputError(f"SEED is {seed!r}; it must be a whole number from 0 up")
    model = model_argument(profile, model)
    name = folder_name(profile, model, int(seed))
    selected = notebook_names(notebooks or " ".join(PROFILES[profile].notebooks))
    remove_void_stamps(name)
    list_model(name, model or PROFILES[profile].model)
    write_atomically(ROOT / ".stamps" / name / "dependencies.mk", make_rules(name))
    return [name, *selected]


# --- one run ---


def execute_notebook(notebook: str, profile: str, *, model: str = "", seed: int = 0) -> Path:
    """Run `notebooks/<notebook>.ipynb` and return the executed copy.

    Raises ValueError for an unknown notebook or parameter, RuntimeError with the error's last line when it fails.
    """
    notebook_names(notebook)
    source = ROOT / "notebooks" / f"{notebook}.ipynb"
    parameters = {"profile": profile, "seed": seed, "model": model_argument(profile, model)}
    check_parameters(source, parameters)
    results = ROOT / "results" / folder_name(profile, parameters["model"], seed)
    with _alone_in(results):
        for abandoned in results.glob(f".{notebook}.*.ipynb"):  # by a run that was killed
            abandoned.unlink()
        temporary = results / f".{notebook}.{os.getpid()}.ipynb"
        code = code_hashes()[notebook]  # before it runs: what is edited meanwhile is not what ran
        try:
            _run_papermill(source, temporary, parameters, log=results / f".{notebook}.stderr.txt")
        except Exception as error:  # whatever stopped it, the copy so far is evidence
            raise ProcessFailed(_keep_failure(temporary, results, notebook, code, error)) from error
        else:
            _write_copy(temporary, results / f"{notebook}.ipynb", code)
            for suffix in ("failed.ipynb", "traceback.txt"):
                (results / f"{notebook}.{suffix}").unlink(missing_ok=True)
            return results / f"{notebook}.ipynb"
        finally:
            temporary.unlink(missing_ok=True)


def check_parameters(source: Path, parameters: dict) -> None:
    """Raise ValueError unless the cell tagged `parameters` assigns every name in `parameters`."""
    cells = json.loads(source.read_text(encoding="utf-8"))["cells"]
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise InputError(f"{source.name} has {len(tagged)} cells tagged `parameters`; it needs exactly one")
    defined = assigned_names("".join(tagged[0]["source"]))
    if missing := sorted(parameters.keys() - defined):
        raise InputError(
            f"{source.name} is given {', '.join(parameters)}, but its parameters cell does not define "
            f"{', '.join(missing)} (it defines {', '.join(sorted(defined)) or 'nothing'})"
        )


def assigned_names(source: str) -> set[str]:
    """Names a piece of Python assigns at its top level."""
    statements = [s for s in ast.parse(source).body if isinstance(s, ast.Assign | ast.AnnAssign)]
    targets = [t for s in statements for t in (s.targets if isinstance(s, ast.Assign) else [s.target])]
    return {target.id for target in targets if isinstance(target, ast.Name)}


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
    import papermill  # slow, and no plan needs it

    os.environ.update(child_environment())
    # The kernel is this interpreter's, and imports this checkout's package.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
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


def _keep_failure(temporary: Path, results: Path, notebook: str, code: str, error: Exception) -> str:
    """Keep the partial copy and the traceback; return the error's last line."""
    if temporary.is_file():
        _write_copy(temporary, results / f"{notebook}.failed.ipynb", code)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()  # without its colours
    text = path_shortener()(plain or type(error).__name__)
    write_atomically(results / f"{notebook}.traceback.txt", text + "\n")
    return text.splitlines()[-1]


def _write_copy(temporary: Path, final: Path, code: str) -> None:
    notebook = json.loads(temporary.read_text(encoding="utf-8"))
    notebook["metadata"]["papermill"]["output_path"] = str(final)
    notebook["metadata"]["avalab"] = {"code": code}
    write_atomically(final, json.dumps(cleaned(notebook), indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def cleaned(notebook: dict) -> dict:
    """The notebook without stderr, progress-bar widgets and absolute paths."""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            kept = (o for o in cell["outputs"] if o.get("name") != "stderr" and WIDGETS not in o.get("data", {}))
            cell["outputs"] = list(kept)
    notebook["metadata"].pop("widgets", None)
    model = notebook["metadata"]["papermill"]["parameters"].get("model", "")
    return _shortened(notebook, path_shortener({model: Path(model).name} if model.startswith("/") else {}))


def _shortened(value, shorten: Callable[[str], str]):
    """The same JSON value with its strings shortened, pictures left alone."""
    if isinstance(value, dict):
        # A PNG is base64 text: a match in it would be chance, and a replacement would break the picture.
        pictures = {k for k in value if k.startswith("image/") and "svg" not in k}
        return {k: v if k in pictures else _shortened(v, shorten) for k, v in value.items()}
    if isinstance(value, list):
        return [_shortened(item, shorten) for item in value]
    return shorten(value) if isinstance(value, str) and "/" in value else value


def path_shortener(more: dict[str, str] | None = None) -> Callable[[str], str]:
    """A function that shortens this machine's folders: the lab's own become relative, home `~`, Python's `<python>`."""
    names = {
        tempfile.gettempdir(): "<tmp>",
        str(Path.home()): "~",
        sys.base_prefix: "<python>",
        sys.prefix: "<python>",
        **dict.fromkeys((str(CHECKOUT), str(ROOT), str(ROOT.resolve())), "."),
        **(more or {}),
    }
    folders = sorted((re.escape(folder) for folder in names if len(folder) > 1), key=len, reverse=True)  # innermost
    pattern = re.compile(rf"(?<![\w.])({'|'.join(folders)})(?![\w-])(/?)")
    return lambda text: pattern.sub(lambda m: "" if names[m[1]] + m[2] == "./" else names[m[1]] + m[2], text)


def print_summary(name: str, notebooks: list[str]) -> int:
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


# --- the command ---


def main(arguments: list[str] | None = None) -> int:
    """`plan`, `run`, `summary` or `stale`; 0, or 1 when a notebook failed, 2 for wrong input, 130 when stopped."""
    parser = argparse.ArgumentParser(prog="python -m avalab.report.notebooks", description=__doc__.partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, said in (("plan", "write the rules for make; print the run's name and its notebooks"), ("run", "run")):
        options = verbs.add_parser(verb, help=said)
        options.add_argument("--profile", default="laptop")
        options.add_argument("--model", default="", help="asset, folder or hub id; empty: the profile's own")
        options.add_argument("--seed", default="0")
        options.add_argument("--notebooks", default="", help='numbers or names, such as "01 06"; empty: all')
    done = verbs.add_parser("summary", help="what is done in results/NAME")
    done.add_argument("name")
    done.add_argument("notebook", nargs="+")
    verbs.add_parser("stale", help="which of results/NAME are older than their code").add_argument("name")
    given = parser.parse_args(arguments)
    try:
        if given.verb == "plan":
            print(*plan(given.profile, model=given.model, seed=given.seed, notebooks=given.notebooks))
        elif given.verb == "stale":
            states = code_states(ROOT / "results" / given.name)
            for notebook, state in states.items():
                print(f"{notebook:{max(map(len, states))}}  {state}")
            stale = sum(state.startswith("stale") for state in states.values())
            print(f"{stale} of {len(states)} results/{given.name} are stale")
        elif given.verb == "summary":
            return print_summary(given.name, given.notebook)
        else:
            return _run_all(notebook_names(given.notebooks), given.profile, given.model, int(given.seed))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stdout if given.verb == "plan" else sys.stderr)  # make reads the plan's
        return 2
    return 0


def _run_all(selected: list[str], profile: str, model: str, seed: int) -> int:
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, _stop)
    status, known = 0, notebook_names()
    for notebook in selected:
        started = time.monotonic()
        print(f"[{known.index(notebook) + 1:02}/{len(known):02}] {notebook} ({profile})", flush=True)
        try:
            executed = execute_notebook(notebook, profile, model=model, seed=seed)
        except KeyboardInterrupt:
            print(f"\n{notebook}: stopped; the next run starts it again", file=sys.stderr)
            return STOPPED
        except RuntimeError as error:
            print(f"{notebook}: failed after {time.monotonic() - started:.0f} s: {error}", file=sys.stderr)
            status = max(status, 1)
            _rebuild_page(ROOT / "results" / folder_name(profile, model_argument(profile, model), seed))
        except (ValueError, OSError) as error:
            print(f"{notebook}: {error}", file=sys.stderr)
            status = 2
        else:
            seconds = time.monotonic() - started
            print(f"{notebook}: done in {seconds:.0f} s, {executed.relative_to(ROOT)}", flush=True)
            _rebuild_page(executed.parent)
    return status


def _rebuild_page(results: Path) -> None:
    """The page with what is there by now; what keeps it from being built is said, and fails no notebook."""
    from avalab.report import page  # papermill, which has just run, has imported most of it

    try:
        print(f"report so far: {page.build_page(results).relative_to(ROOT)}", flush=True)
    except (LabError, OSError) as error:
        print(f"no report yet: {error}", file=sys.stderr)


def _stop(signum: int, frame: object) -> None:
    logging.disable(logging.CRITICAL)  # that its kernel died is no news to whoever stopped it
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
