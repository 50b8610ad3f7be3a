"""What each notebook depends on, written down for make, so that only what changed runs again.

Method: every module of the package and every code cell is parsed with `ast`; the imports of `avalab` modules
found anywhere in them (inside functions too) form a graph; a notebook depends on what it can reach in it, on
the package's pins and assets, and on the files of a model that is a local folder. The result is a make include
file with one rule a notebook. Nothing is imported, so this takes a tenth of a second on a bare Python.

It also names the run (`results/<name>`, `.stamps/<name>`) and takes back a stamp whose results, or one of whose
sources, were deleted.

What it does not do: look inside data files, or know of a library upgraded behind the back of pyproject.toml.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from pathlib import Path

from avalab.experiment import PROFILES, ROOT, folder_name, write_atomically

COMMON = ("pyproject.toml", "data/assets.toml")


def module_paths(root: Path = ROOT) -> dict[str, Path]:
    """Dotted name -> file of every module of the package, `avalab` itself included."""
    paths = {}
    for path in sorted((root / "avalab").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


def imported_names(source: str, package: str = "") -> set[str]:
    """Dotted names a source may import, as written: `from a import b` gives both `a` and `a.b`.

    `package` resolves relative imports. Raises SyntaxError.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, node.module] if node.module else above)
            names.add(module)
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def import_graph(paths: dict[str, Path]) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports itself."""
    graph = {}
    for name, path in paths.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        try:
            graph[name] = (imported_names(path.read_text(encoding="utf-8"), package) & paths.keys()) - {name}
        except SyntaxError:  # being edited; the file itself stays a dependency of whoever imports it
            graph[name] = set()
    return graph


def reachable(start: set[str], graph: dict[str, set[str]]) -> set[str]:
    """The modules in `start` and all they import, directly or not, with the packages that hold them."""
    found: set[str] = set()
    waiting = set(start)
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
        names = set().union(*(imported_names(source) for source in code_cells(notebook)))
    except (SyntaxError, json.JSONDecodeError, KeyError):
        return set(graph)
    return reachable(names & graph.keys(), graph)


def check_parameters(source: Path, parameters: dict) -> None:
    """Raise ValueError unless the cell tagged `parameters` assigns every name in `parameters`."""
    cells = json.loads(source.read_text(encoding="utf-8"))["cells"]
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(f"{source.name} has {len(tagged)} cells tagged `parameters`; it needs exactly one")
    defined = assigned_names("".join(tagged[0]["source"]))
    missing = sorted(parameters.keys() - defined)
    if missing:
        raise ValueError(
            f"{source.name} is given {', '.join(parameters)}, but its parameters cell does not define "
            f"{', '.join(missing)} (it defines {', '.join(sorted(defined)) or 'nothing'})"
        )


def assigned_names(source: str) -> set[str]:
    """Names a piece of Python assigns at its top level."""
    statements = [s for s in ast.parse(source).body if isinstance(s, ast.Assign | ast.AnnAssign)]
    targets = [t for s in statements for t in (s.targets if isinstance(s, ast.Assign) else [s.target])]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def notebook_names(selection: str = "", root: Path = ROOT) -> list[str]:
    """Names (`01_quantization`) of all notebooks, or of those whose number or name is in `selection`.

    Raises ValueError naming what was not found and what exists.
    """
    known = sorted(path.stem for path in (root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    wanted = selection.split()
    missing = [w for w in wanted if not any(w in (name, name[:2]) for name in known)]
    if missing or not known:
        shown = ", ".join(known) or "no notebook (NN_subject.ipynb)"
        raise ValueError(f"no notebook {' '.join(missing) or 'to run'}; notebooks/ holds {shown}")
    return [name for name in known if not wanted or name in wanted or name[:2] in wanted]


def model_argument(profile: str, model: str, root: Path = ROOT) -> str:
    """What a notebook gets as its `model`: '' for the profile's own, an absolute path for a folder, else as given.

    A notebook runs in notebooks/, so a folder's relative path would be lost on the way.
    Raises ValueError for an unknown profile.
    """
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}; choose one of {', '.join(PROFILES)}")
    own = PROFILES[profile].model
    folder = next((f for f in (Path(model).expanduser(), root / model) if f.is_dir()), None) if model else None
    if model in ("", own) or (folder and folder.resolve() == (root / own).resolve()):
        return ""
    return str(folder.resolve()) if folder else model


def make_rules(name: str, model: str, root: Path = ROOT) -> str:
    """The make include file of run `name`: which stamp (one a notebook, one for the page) depends on which files."""
    paths = module_paths(root)
    graph = import_graph(paths)
    folder = root / model
    data = [*(root / path for path in COMMON), *(sorted(folder.iterdir()) if model and folder.is_dir() else [])]
    reached = {"report": reachable({"avalab.report"} & graph.keys(), graph)}
    for notebook in notebook_names(root=root):
        reached[f"{notebook}.done"] = modules_of_notebook(root / "notebooks" / f"{notebook}.ipynb", graph)
    lines, sources = ["# Written by avalab.dependencies; do not edit."], set()
    for stamp, modules in reached.items():
        files = [paths[m] for m in sorted(modules)] + ([] if stamp == "report" else [p for p in data if p.is_file()])
        lines.append(f".stamps/{name}/{stamp}: {' '.join(_make_path(file, root) for file in files)}")
        sources.update(_make_path(file, root) for file in files)
    # Empty rules: a module deleted later is a change, not "no rule to make target".
    return "\n".join([*lines, f"{' '.join(sorted(sources))}:", ""])


def _make_path(path: Path, root: Path) -> str:
    text = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
    return text.replace("$", "$$").replace(" ", "\\ ").replace("#", "\\#")


def _plain_path(text: str) -> str:
    return text.replace("\\#", "#").replace("\\ ", " ").replace("$$", "$")


def remove_void_stamps(name: str, root: Path = ROOT) -> None:
    """Delete the stamps of run `name` whose results are gone, or that rest on a file that was deleted since."""
    stamps, results = root / ".stamps" / name, root / "results" / name
    made = {stamp: results / f"{stamp.stem}.ipynb" for stamp in stamps.glob("*.done")}
    made[stamps / "report"] = results / "index.html"
    rules = stamps / "dependencies.mk"
    for line in rules.read_text(encoding="utf-8").splitlines() if rules.is_file() else []:
        stamp, _, files = line.partition(": ")
        if any(not (root / _plain_path(file)).exists() for file in re.split(r"(?<!\\) ", files) if file):
            (root / stamp).unlink(missing_ok=True)
    for stamp, result in made.items():
        if not result.is_file():
            stamp.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> int:
    """Write `.stamps/<name>/dependencies.mk`; print `<name> <notebook>...`, or `error: ` and one line (for make)."""
    parser = argparse.ArgumentParser(prog="python -m avalab.dependencies", description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="laptop")
    parser.add_argument("--model", default="")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--notebooks", default="", help='numbers or names, such as "01 06"; empty: all')
    options = parser.parse_args(arguments)
    try:
        if not options.seed.isdigit():
            raise ValueError(f"SEED is {options.seed!r}; it must be a whole number from 0 up")
        model = model_argument(options.profile, options.model)
        name = folder_name(options.profile, model, int(options.seed))
        notebooks = notebook_names(options.notebooks)
        remove_void_stamps(name)
        rules = make_rules(name, model or PROFILES[options.profile].model)
        write_atomically(ROOT / ".stamps" / name / "dependencies.mk", rules)
    except (ValueError, OSError) as error:
        print(f"error: {error}")
        return 2
    print(name, *notebooks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
