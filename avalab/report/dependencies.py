"""What a notebook depends on, and which results are older than that.

1. Imports of `avalab` modules anywhere in modules and code cells form a graph; a notebook depends on what it reaches.
   Sources are parsed, nothing is imported: a bare Python answers, in half a second.
2. A run stores the hash of that code in the executed copy (`avalab.report.notebooks`); a result is stale when the hash
   is another now. A result without one is compared with the code of the commit that its records name, as git has it.
   Comments and docstrings are no code.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import subprocess
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from avalab.lab.errors import InputError
from avalab.lab.run import ROOT, load_records


def module_paths(root: Path = ROOT) -> dict[str, Path]:
    """Dotted name -> file of every module of the package, `avalab` itself included."""
    paths = {}
    for path in sorted((root / "avalab").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


@cache
def imported_names(source: str) -> frozenset[str]:
    """Dotted names a source may import, as written: `from a import b` gives both `a` and `a.b`. Raises SyntaxError."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):  # never relative: ruff sees to it
            names.update((node.module, *(f"{node.module}.{alias.name}" for alias in node.names)))
    return frozenset(names)


def module_graph(root: Path = ROOT) -> tuple[dict[str, Path], dict[str, set[str]]]:
    """`module_paths`, and module -> the modules of the package that it imports itself."""
    paths, graph = module_paths(root), {}
    for name, path in paths.items():
        try:
            graph[name] = set(imported_names(path.read_text(encoding="utf-8")) & paths.keys()) - {name}
        except SyntaxError:  # being edited; the file itself stays a dependency of whoever imports it
            graph[name] = set()
    return paths, graph


def reachable(start: set[str], graph: dict[str, set[str]]) -> set[str]:
    """The modules in `start` and all they import, directly or not, with the packages that hold them."""
    found, waiting = set(), set(start)
    while waiting:
        name = waiting.pop()
        found.add(name)
        parent = {name.rpartition(".")[0]} & graph.keys()  # importing a.b runs a/__init__.py
        waiting |= (graph[name] | parent) - found
    return found


def code_cells(notebook: Path) -> list[str]:
    """Sources of a notebook's code cells, lines that are no Python (magics, shell) left out."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return ["\n".join(s for s in source.split("\n") if not s.lstrip().startswith(("%", "!"))) for source in sources]


def modules_of_notebook(notebook: Path, graph: dict[str, set[str]]) -> set[str]:
    """Modules of the package a notebook can reach; all of them when one of its cells cannot be parsed."""
    try:
        names = set().union(*map(imported_names, code_cells(notebook)))
    except (SyntaxError, json.JSONDecodeError, KeyError):
        return set(graph)
    return reachable(names & graph.keys(), graph)


@cache
def code_lines(source: str) -> str:
    """The lines of a source that do something: no docstring, no blank line, no comment that has its line to itself."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return source
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    docstrings = [node.body[0] for node in nodes if ast.get_docstring(node, clean=False) is not None]
    left_out = {line for d in docstrings for line in range(d.lineno, d.end_lineno + 1)}
    lines = [line.strip("\r") for i, line in enumerate(source.split("\n"), 1) if i not in left_out]
    return "\n".join(line.rstrip() for line in lines if line.strip() and not line.lstrip().startswith("#"))


def code_hashes(root: Path = ROOT) -> dict[str, str]:
    """Notebook -> hash of its code cells and of every module they reach; equal on every Python."""
    paths, graph = module_graph(root)
    hashes = {}
    for notebook in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        sources = {m: paths[m].read_text(encoding="utf-8") for m in sorted(modules_of_notebook(notebook, graph))}
        sources[""] = "\n".join(code_cells(notebook))
        code = json.dumps({module: code_lines(source) for module, source in sources.items()})
        hashes[notebook.stem] = hashlib.sha256(code.encode()).hexdigest()[:16]
    return hashes


def code_states(results: Path, root: Path = ROOT) -> dict[str, str]:
    """Executed notebook of a results folder -> `current`, `stale (why)` or `cannot tell (why)`."""
    now = code_hashes(root)
    at_commit = cache(lambda commit: _code_hashes_at(commit, root))
    states = {}
    for executed in sorted(results.glob("[0-9][0-9]_*.ipynb")):
        name = executed.name.removesuffix(".ipynb")
        if "." in name:  # the copy of a failure
            continue
        try:
            code = json.loads(executed.read_text(encoding="utf-8")).get("metadata", {}).get("avalab", {}).get("code")
        except (ValueError, AttributeError) as error:  # a JSON error is a ValueError
            raise InputError(f"{executed} is not a notebook: {error}") from error
        if code:
            states[name] = "current" if code == now.get(name) else "stale (its code has changed since)"
        else:
            records = results / f"{name}.json"
            commits = {record.commit for record in (load_records(records) if records.is_file() else [])}
            states[name] = _state_by_commit(name, commits, now, at_commit)
    return states


def _state_by_commit(name: str, commits: set[str], now: dict[str, str], at_commit: Callable) -> str:
    """The state of a result that carries no hash, from the commits its records were made at."""
    if not commits or "" in commits:
        return "cannot tell (no commit was recorded)"
    for commit in sorted(commits):
        if commit.endswith("+"):
            return f"cannot tell (made from changes to {commit[:-1]} that were not committed)"
        if (hashes := at_commit(commit)) is None:
            return f"cannot tell (git does not know {commit} here)"
        if hashes.get(name) != now.get(name):
            return f"stale (its code has changed since {commit})"
    return "current"


def _code_hashes_at(commit: str, root: Path) -> dict[str, str] | None:
    """What `code_hashes` said at a commit; None without git, or where git does not know it."""
    archive = ["git", "-C", str(root), "archive", "--format=zip", "-0", commit, "avalab", "notebooks"]
    try:
        packed = subprocess.run(archive, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(io.BytesIO(packed)).extractall(folder)
        return code_hashes(Path(folder))
