"""The rules of the repository that a machine can check: layers, notebooks, pins, README, docstrings."""

import ast
import graphlib
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

from avalab.dependencies import assigned_names, code_cells, import_graph, imported_names, module_paths, reachable

REPOSITORY = Path(__file__).resolve().parent.parent
MODULES = module_paths(REPOSITORY)
GRAPH = import_graph(MODULES)
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("[0-9][0-9]_*.ipynb"))
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]

# Imports point to the same layer or down. A module below a package (`kernels.triton`) has its package's layer.
LAYERS = {
    0: "experiment assets numerics kernels gguf_blocks quiet allocation layer_sparsity "
    "sparse_storage sparsity_patterns variety cascade",
    1: "gguf_vocabulary mixed_plot energy alone engine_plot budgets models artifacts exported corpora cost "
    "storage probe marks plots tables labels executed roofline accuracy_plot gate_plot pruning_plot "
    "packaged_text argument_kinds surfaces grounding "
    "peers_table training_plot answer_cache toolbox phrasing sandbox calibration packed_rows packed_attention "
    "train_memory distill_losses distill_plot qat_plot structured ensemble_plot long_context_plot before_after "
    "packed_embedding hqq_checkpoint",
    2: "block_rounding rounded_walk expected_rise additivity ava_gguf ava_onnx onnx_blocks engines "
    "gguf_mixed quality quantize sensitivity compressors rounding packing ava prune removal moments saliency "
    "surgeon adapters calls call_cases grammars gates overlap drafts teachers example_files whole_training "
    "recovery answers_vote fake_quant four_bit packed_file torchao_qat agreement embedding_rounding equivalence",
    3: "train rehearsal first_token dialogues finetune answer_loss synthesize evaluate self_improvement ensemble "
    "mixture harness sparse_speed targets distill_rows distill_objective "
    "distill block_training qat chain rating",
    4: "race contestants engine_batches engine_quality peers peers_known peers_making peers_autoround peers_embedding "
    "peers_runtimes peers_scores peers_calls search serve engine_bench distill_bench train_bench train_limit "
    "chat_tools conversation ensemble_bench ensemble_answers long_context side_by_side kernels_end_to_end",
    5: "plan review rating_form",
    6: "cli cli_options cli_compress cli_train cli_measure cli_talk report headless dependencies",
}
LAYER = {f"avalab.{name}": layer for layer, names in LAYERS.items() for name in names.split()} | {"avalab": 0}
PLOTTERS = {"avalab.cli", "avalab.report"}
MODEL_CODE = {"avalab.models", "avalab.quality", "avalab.quantize", "avalab.prune", "avalab.adapters", "avalab.train"}

notebooks = pytest.mark.parametrize("notebook", NOTEBOOKS or [None], ids=lambda path: path.stem if path else "none")


def layer(module: str) -> int:
    return LAYER.get(".".join(module.split(".")[:2]), len(LAYERS))  # unknown: above all, until it is given one


def cells(notebook: Path | None, kind: str = "code") -> list[dict]:
    if notebook is None:
        pytest.skip("there is no notebook yet")
    return [c for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


# --- the package -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_layer(module):
    top = ".".join(module.split(".")[:2])
    assert top in LAYER, f"{top} is in no layer: add it to LAYERS in tests/test_layout.py (and to DESIGN.md's table)"


@pytest.mark.parametrize("module", MODULES)
def test_imports_never_point_up(module):
    above = [f"{other} (layer {layer(other)})" for other in sorted(GRAPH[module]) if layer(other) > layer(module)]
    assert not above, f"{module} (layer {layer(module)}) imports {', '.join(above)}"


def test_no_module_imports_itself_through_others():
    # A package is there before its modules, so that a module names its own package is no cycle.
    others = {name: {other for other in GRAPH[name] if not name.startswith(f"{other}.")} for name in GRAPH}
    graphlib.TopologicalSorter(others).prepare()  # raises CycleError, which names the cycle


def test_only_notebooks_the_command_line_and_the_report_import_plots():
    assert {name for name in GRAPH if "avalab.plots" in GRAPH[name]} <= PLOTTERS


@pytest.mark.parametrize("module", ["avalab.report", "avalab.plots", "avalab.roofline"])
def test_what_draws_records_never_sees_a_model(module):
    if module not in GRAPH:
        pytest.skip(f"{module} does not exist yet")
    assert not reachable({module}, GRAPH) & MODEL_CODE


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's deprecations at import are not this test's question
        importlib.import_module(module)


def seconds_to_import_avalab() -> float:
    """Of the processor, not of the clock: another busy process must not decide."""
    check = "import avalab, avalab.experiment, sys; assert 'torch' not in sys.modules, 'torch was imported'"
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
    first_two = {".".join(name.split(".")[:2]) for name in named if name.startswith("avalab.")}
    assert first_two <= MODULES.keys()


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
    public = "help setup setup-llamacpp lab reproduce smoke bench bench-kernels bench-train bench-peers test lint"
    public += " report clean"
    assert named == set(public.split())
