"""The rules of the repository that a machine can check: layers, notebooks, pins, README, docstrings."""

import ast
import importlib
import json
import re
import resource
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from avalab.report.dependencies import code_cells, imported_names, module_paths
from avalab.report.notebooks import assigned_names

REPOSITORY = Path(__file__).resolve().parent.parent
MODULES = module_paths(REPOSITORY)
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("[0-9][0-9]_*.ipynb"))
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]

ROOMS = {
    *("lab", "kernels", "models", "data", "engines", "compress", "train", "measure"),
    *("serve", "agent", "plan", "report", "cli"),
}
FOLDERS = sorted(
    str(path.parent.relative_to(REPOSITORY / "avalab")) for path in (REPOSITORY / "avalab").rglob("*/__init__.py")
)
FILES_A_ROOM, LINES_A_FILE, LINES_A_FUNCTION = 13, 500, 60

notebooks = pytest.mark.parametrize("notebook", NOTEBOOKS or [None], ids=lambda path: path.stem if path else "none")


def cells(notebook: Path | None, kind: str = "code") -> list[dict]:
    if notebook is None:
        pytest.skip("there is no notebook yet")
    return [c for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


# --- the package -------------------------------------------------------------------------------------------------


def test_the_package_is_thirteen_rooms_and_nothing_beside_them():
    found = {path.name for path in (REPOSITORY / "avalab").iterdir() if not path.name.startswith("__")}
    assert found == ROOMS


@pytest.mark.parametrize("room", FOLDERS)
def test_a_folder_holds_at_most_thirteen_files(room):
    files = sorted(path.name for path in (REPOSITORY / "avalab" / room).glob("*.py") if path.name != "__init__.py")
    assert len(files) <= FILES_A_ROOM, f"avalab/{room} holds {len(files)}; merge what does one job"


@pytest.mark.parametrize("module", MODULES)
def test_a_file_is_at_most_500_lines_and_a_function_at_most_60(module):
    source = MODULES[module].read_text(encoding="utf-8")
    assert len(source.splitlines()) <= LINES_A_FILE
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
    # The lines after the signature: a command's options, each with its help, stand in it.
    lines = {f.name: f.end_lineno - f.body[0].lineno + 1 for f in functions}
    assert not {name: count for name, count in lines.items() if count > LINES_A_FUNCTION}


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_no_name_of_a_rooms_face_hides_a_module_of_the_room(room):
    """After `from avalab.kernels.encode import encode` in the face, `avalab.kernels.encode` would be the function."""
    folder = REPOSITORY / "avalab" / room
    names = {
        alias.asname or alias.name
        for node in ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom) and node.module != f"avalab.{room}"
        for alias in node.names
    }
    assert not names & {path.stem for path in folder.glob("*.py")}


def test_imports_point_down_and_never_in_a_circle():
    """The contracts of import-linter in pyproject.toml: which room may import which."""
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's deprecations at import are not this test's question
        importlib.import_module(module)


def seconds_to_import_avalab() -> float:
    """Of the processor, not of the clock: another busy process must not decide."""
    check = "import avalab, avalab.lab.run, sys; assert 'torch' not in sys.modules, 'torch was imported'"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", check], cwd=REPOSITORY, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def test_importing_avalab_takes_less_than_three_tenths_of_a_second_and_leaves_torch_alone():
    assert min(seconds_to_import_avalab() for _ in range(3)) < 0.3


@pytest.mark.parametrize("module", MODULES)
def test_every_public_function_and_module_has_a_docstring(module):
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    bare = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if not ast.get_docstring(node)
    ]
    if MODULES[module].name != "__init__.py" and not ast.get_docstring(tree):
        bare.append("the module itself")
    assert not bare, f"{module}: no docstring on {', '.join(bare)}"


@pytest.mark.parametrize("module", MODULES)
def test_no_module_can_run_code_from_a_file_of_weights(module):
    assert not unsafe_calls(MODULES[module].read_text(encoding="utf-8"))


def unsafe_calls(source: str) -> list[str]:
    """Calls that unpickle, and `trust_remote_code` other than False."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        options = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        called = ast.unparse(node.func)
        if called in ("pickle.load", "pickle.loads") or options.get("trust_remote_code", False) is not False:
            found.append(ast.unparse(node))
        if called == "torch.load" and options.get("weights_only") is not True:
            found.append(ast.unparse(node))
    return found


def test_the_search_for_unsafe_calls_finds_them():
    bad = ["pickle.load(f)", "torch.load(p)", "torch.load(p, weights_only=False)", "g(trust_remote_code=True)"]
    assert all(unsafe_calls(source) for source in bad)
    assert not unsafe_calls("torch.load(p, weights_only=True); g(trust_remote_code=False)")


# --- notebooks ---------------------------------------------------------------------------------------------------


@notebooks
def test_a_notebook_declares_the_parameters_that_make_passes_with_smoke_as_default(notebook):
    tagged = [c for c in cells(notebook) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1, "exactly one code cell carries the tag `parameters`"
    source = "".join(tagged[0]["source"])
    assert {"profile", "seed", "model"} <= assigned_names(source)
    values = {}
    exec(source, values)
    assert (values["profile"], values["seed"], values["model"]) == ("smoke", 0, "")


@notebooks
def test_a_notebook_defines_no_function_and_no_class(notebook):
    cells(notebook)
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    defined = [n.name for c in code_cells(notebook) for n in ast.walk(ast.parse(c)) if isinstance(n, kinds)]
    assert not defined, "move it into the package, with a test"


@notebooks
def test_a_notebook_has_8_to_20_code_cells_of_at_most_15_lines(notebook):
    lengths = [len("".join(c["source"]).strip().splitlines()) for c in cells(notebook)]
    assert 8 <= len(lengths) <= 20
    assert max(lengths) <= 15


@notebooks
def test_a_notebook_is_titled_by_a_question(notebook):
    title = "".join(cells(notebook, "markdown")[0]["source"]).splitlines()[0]
    assert title.startswith("# ")
    assert "?" in title


@notebooks
def test_a_notebook_imports_only_modules_that_exist(notebook):
    cells(notebook)
    named = set().union(*(imported_names(source) for source in code_cells(notebook)))
    modules = {".".join(name.split(".")[:3]) for name in named if name.startswith("avalab.")}
    assert modules <= MODULES.keys()


# --- what surrounds the package ----------------------------------------------------------------------------------


def tree_entries(readme: str) -> list[str]:
    """Top-level names in the first fenced block that looks like a folder tree (some line starts with `avalab/`)."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    trees = [block for block in blocks if re.search(r"^(?:[├└]── )?avalab/", block, re.MULTILINE)]
    return re.findall(r"^(?:[├└]── )?([\w.][\w./-]*)(?:\s|$)", trees[0], re.MULTILINE) if trees else []


def test_a_tree_is_read_with_and_without_lines():
    assert tree_entries("```\navalab/    the package\n  x.py  no\nMakefile\n```\n") == ["avalab/", "Makefile"]
    assert tree_entries("```\n├── avalab/  the package\n│   └── x.py\n└── Makefile\n```\n") == ["avalab/", "Makefile"]


def test_every_top_level_name_in_the_readme_tree_exists():
    entries = tree_entries((REPOSITORY / "README.md").read_text(encoding="utf-8"))
    if not entries:
        pytest.skip("README.md shows no folder tree yet")
    # Folders that a run creates, and that git ignores, need not be there.
    created = {"artifacts/", "data/cache/"}
    assert not [e for e in entries if e not in created and "<" not in e and not (REPOSITORY / e).exists()]


def requirements(*names: str) -> dict[str, Requirement]:
    extras = PROJECT["optional-dependencies"]
    lists = [PROJECT["dependencies"] if name == "core" else extras[name] for name in names]
    return {r.name: r for text in lists for r in map(Requirement, text)}


def test_every_package_of_the_projects_card_is_declared_where_it_belongs():
    card = {
        "jupyterlab",
        "papermill",
        "torch",
        "transformers",
        "bitsandbytes",
        "peft",
        "matplotlib",
        "seaborn",
        "nbval",
    }
    assert card <= requirements("core", "lab").keys()
    assert "unsloth" in requirements("gpu")
    assert "unsloth" not in requirements("core", "lab"), "importing it without a supported GPU raises"


def test_every_pin_of_the_lab_is_exact():
    lab = requirements("lab")
    named = set(lab.pop("avalab").extras)  # the lab takes some extras whole
    pins = lab | {name: r for extra in named for name, r in requirements(extra).items()}
    ranged = {name for name, r in pins.items() if [s.operator for s in r.specifier] != ["=="]}
    assert not ranged


def test_the_conda_environment_installs_what_pyproject_lists_on_a_python_it_allows():
    text = (REPOSITORY / "environment.yml").read_text()
    version = re.search(r"^  - python=([\d.]+)$", text, re.MULTILINE).group(1)
    assert SpecifierSet(PROJECT["requires-python"]).contains(version)
    assert re.findall(r"^      - (.+)$", text, re.MULTILINE) == ["-e .[lab]"], "pins live in pyproject.toml only"


def test_make_help_describes_every_public_target_in_one_line():
    made = subprocess.run(["make", "--no-print-directory"], cwd=REPOSITORY, capture_output=True, text=True).stdout
    named = {line.split()[1] for line in made.splitlines()}
    public = "help setup setup-llamacpp lab reproduce smoke families test lint report stale clean bench"
    public += " bench-kernels bench-train bench-align bench-calls bench-peers bench-sizes bench-serve"
    public += " bench-packed bench-gpu"
    assert named == set(public.split())
