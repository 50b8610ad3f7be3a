"""Running notebooks headless: what is written, what is left after a failure, Ctrl-C and kill -9, what runs again."""

import base64
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from avalab.report import dependencies, notebooks

REPOSITORY = Path(__file__).resolve().parents[2]
PARAMETERS = 'profile = "smoke"\nseed = 0\nmodel = ""'
NOISY = [
    "import os, sys, time, warnings, avalab\nfrom pathlib import Path",
    "print(avalab.__file__, os.getcwd(), sys.executable, Path.home() / 'x')",
    "warnings.warn('noise'); print('noise', file=sys.stderr)",
    "while Path('slow').exists(): Path('busy').touch(); time.sleep(0.05)",
]


def write_notebook(root: Path, name: str, sources: list[str], parameters: str = PARAMETERS) -> Path:
    tagged = nbformat.v4.new_code_cell(parameters, id="parameters", metadata={"tags": ["parameters"]})
    cells = [nbformat.v4.new_code_cell(source, id=f"cell{i}") for i, source in enumerate(sources)]
    path = root / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[tagged, *cells]), path)
    return path


def start(root: Path, notebook: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "avalab.report.notebooks", "run", "--notebooks", notebook, "--profile", "smoke"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, "AVALAB_ROOT": str(root)}, **options)


def start_and_wait_for_the_slow_cell(root: Path) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """The runner in the middle of a cell that never ends, and its kernel."""
    write_notebook(root, "01_noisy", NOISY)
    (root / "notebooks" / "slow").touch()
    runner = start(root, "01_noisy")
    while not (root / "notebooks" / "busy").exists():
        assert runner.poll() is None, runner.communicate()[0]
        time.sleep(0.05)
    return runner, psutil.Process(runner.pid).children(recursive=True)


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


# --- one notebook ------------------------------------------------------------------------------------------------


def test_after_kill_9_the_kernel_ends_nothing_is_half_written_and_the_next_run_is_clean(tmp_path):
    runner, kernel = start_and_wait_for_the_slow_cell(tmp_path)
    runner.kill()
    runner.communicate()
    results = tmp_path / "results" / "smoke"
    assert kernel, "the kernel is a child of the runner"
    assert not psutil.wait_procs(kernel, timeout=10)[1], "a kernel outlived its runner"
    assert not visible(results)

    (tmp_path / "notebooks" / "slow").unlink()
    (results / "01_noisy.failed.ipynb").write_text("{}")  # an earlier failure, now made good
    (results / "01_noisy.traceback.txt").write_text("KeyError: 1")
    again = start(tmp_path, "01_noisy")
    output, _ = again.communicate(timeout=60)
    assert again.returncode == 0, output
    assert visible(results) == {"01_noisy.ipynb", "index.html"}
    assert not list(results.glob(".*.ipynb")), "the killed run's temporary file is gone"
    assert_is_a_clean_copy(results / "01_noisy.ipynb", tmp_path)


def assert_is_a_clean_copy(executed: Path, root: Path) -> None:
    text = executed.read_text()
    notebook = nbformat.read(executed, as_version=4)
    nbformat.validate(notebook)
    assert "noise" in (executed.parent / ".01_noisy.stderr.txt").read_text(), "stderr is kept beside the copy"
    assert not [o for c in notebook.cells for o in c.get("outputs", []) if o.get("name") == "stderr"]
    for folder in (str(root), str(REPOSITORY), str(Path.home()), sys.prefix):
        assert f"{folder}/" not in text
        assert f'{folder}"' not in text
    assert "avalab/__init__.py notebooks <python>/bin/python" in text
    assert "~/x" in text
    assert notebook.metadata.papermill.output_path == "results/smoke/01_noisy.ipynb"
    assert dependencies.code_states(executed.parent, root) == {"01_noisy": "current"}


def test_ctrl_c_stops_the_kernel_and_leaves_nothing_behind(tmp_path):
    runner, kernel = start_and_wait_for_the_slow_cell(tmp_path)
    runner.send_signal(signal.SIGINT)
    output, _ = runner.communicate(timeout=30)
    assert runner.returncode == 130
    assert output.strip().endswith("stopped; the next run starts it again")
    assert "Traceback" not in output
    assert not psutil.wait_procs(kernel, timeout=10)[1]
    assert not visible(tmp_path / "results" / "smoke")
    assert not list((tmp_path / "results" / "smoke").glob(".*.ipynb"))


def test_a_failure_keeps_the_copy_so_far_the_traceback_and_the_earlier_result(tmp_path):
    write_notebook(tmp_path, "01_fails", ["print('so far')", "raise KeyError('no such layer')", "print('never')"])
    results = tmp_path / "results" / "smoke"
    results.mkdir(parents=True)
    earlier = Path(shutil.copy(tmp_path / "notebooks" / "01_fails.ipynb", results)).read_text()
    runner = start(tmp_path, "01_fails")
    output, _ = runner.communicate(timeout=60)
    assert runner.returncode == 1
    failure, report = output.splitlines()[-2:]
    assert failure.endswith("KeyError: 'no such layer'")
    assert report == "report so far: results/smoke/index.html"
    assert (results / "01_fails.ipynb").read_text() == earlier
    assert "so far" in (results / "01_fails.failed.ipynb").read_text()
    assert (results / "01_fails.traceback.txt").read_text().strip().endswith("KeyError: 'no such layer'")
    assert not list(results.glob(".*.ipynb"))


def test_a_misspelt_parameter_is_refused_before_anything_runs(tmp_path):
    source = write_notebook(tmp_path, "01_typo", ["1"], parameters='profil = "smoke"\nseed = 0\nmodel: str = ""')
    with pytest.raises(ValueError, match=r"does not define profile \(it defines model, profil, seed\)"):
        notebooks.check_parameters(source, {"profile": "smoke", "seed": 0, "model": ""})


def test_a_notebook_needs_one_parameters_cell(tmp_path):
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "01_none.ipynb")
    with pytest.raises(ValueError, match="0 cells tagged"):
        notebooks.check_parameters(tmp_path / "01_none.ipynb", {})


def test_paths_are_shortened_in_text_and_never_in_pictures():
    picture = base64.b64encode(b"0" * 30).decode() + f"{Path.home()}/x"
    outputs = [
        {"output_type": "display_data", "data": {"image/png": picture, "text/plain": f"see {REPOSITORY}/avalab/x.py"}},
        {"output_type": "stream", "name": "stdout", "text": [f"{REPOSITORY}\n", f"{Path.home()}/data\n"]},
        {"output_type": "stream", "name": "stderr", "text": "warning"},
        {"output_type": "display_data", "data": {notebooks.WIDGETS: {}, "text/plain": "0%"}},
    ]
    parameters = {"model": "/models/my model"}
    notebook = {
        "cells": [{"cell_type": "code", "outputs": outputs, "source": "p = '/models/my model/config.json'"}],
        "metadata": {"widgets": {"state": 1}, "papermill": {"parameters": parameters}},
    }
    cleaned = notebooks.cleaned(notebook)
    shown, stream = cleaned["cells"][0]["outputs"]
    assert shown["data"] == {"image/png": picture, "text/plain": "see avalab/x.py"}
    assert stream["text"] == [".\n", "~/data\n"]
    assert cleaned["cells"][0]["source"] == "p = 'my model/config.json'"
    assert cleaned["metadata"] == {"papermill": {"parameters": {"model": "my model"}}}


# --- what depends on what ----------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path) -> Path:
    """a imports b inside a function; b imports c.d; e stands alone."""
    sources = {
        "__init__.py": "",
        "a.py": "def f():\n    from avalab import b\n",
        "b.py": "from avalab.c.d import g\n",
        "c/__init__.py": "",
        "c/d.py": "import torch\n",
        "e.py": "import avalab\n",
    }
    for name, source in sources.items():
        path = tmp_path / "avalab" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(source)
    return tmp_path


def test_a_notebook_depends_on_what_its_imports_import(package):
    _, graph = dependencies.module_graph(package)
    uses_a = write_notebook(package, "01_a", ["%matplotlib inline\nfrom avalab.a import f"])
    assert dependencies.modules_of_notebook(uses_a, graph) == {f"avalab{m}" for m in ("", ".a", ".b", ".c", ".c.d")}
    uses_e = write_notebook(package, "02_e", ["from avalab import e"])
    assert dependencies.modules_of_notebook(uses_e, graph) == {"avalab", "avalab.e"}


def test_a_notebook_that_cannot_be_parsed_depends_on_everything(package):
    _, graph = dependencies.module_graph(package)
    assert dependencies.modules_of_notebook(write_notebook(package, "01_bad", ["from ("]), graph) == set(graph)


def test_the_page_depends_on_its_module_what_that_imports_and_its_template(package):
    write_notebook(package, "01_a", ["1"])
    (package / "avalab" / "report" / "templates").mkdir(parents=True)
    (package / "avalab" / "report" / "page.py").write_text("from avalab import e\n")
    (package / "avalab" / "report" / "templates" / "page.html.j2").touch()
    (rule,) = [line for line in notebooks.make_rules("smoke", package).splitlines() if "/report:" in line]
    _, _, files = rule.partition(": ")
    page = "avalab/report/page.py avalab/report/templates/page.html.j2"
    assert files == f"avalab/__init__.py avalab/e.py {page}"


def test_a_stamp_whose_result_or_source_is_gone_is_taken_back(package):
    write_notebook(package, "01_a", ["import avalab.a"])
    write_notebook(package, "02_e", ["import avalab.e"])
    write_notebook(package, "03_e", ["import avalab.e"])
    stamps, results = package / ".stamps" / "smoke", package / "results" / "smoke"
    stamps.mkdir(parents=True)
    results.mkdir(parents=True)
    (stamps / "dependencies.mk").write_text(notebooks.make_rules("smoke", package))
    for name in ("01_a", "02_e", "03_e"):
        (stamps / f"{name}.done").touch()
        (results / f"{name}.ipynb").touch()
    (package / "avalab" / "b.py").unlink()
    (results / "02_e.ipynb").unlink()
    notebooks.remove_void_stamps("smoke", package)
    assert [path.name for path in stamps.glob("*.done")] == ["03_e.done"]


def test_a_python_without_packages_plans_the_run(package):
    write_notebook(package, "01_a", ["import avalab.a"])
    command = [sys.executable, "-S", "-m", "avalab.report.notebooks", "plan", "--profile", "smoke"]  # no site-packages
    environment = {"AVALAB_ROOT": str(package)}
    planned = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert planned.stdout == "smoke 01_a\n", planned.stderr
    assert "01_a.done: avalab/__init__.py avalab/a.py" in (package / ".stamps/smoke/dependencies.mk").read_text()


def test_a_profile_may_name_the_notebooks_that_it_is_for(package):
    for name in ("01_a", "20_three_sizes"):
        write_notebook(package, name, ["import avalab.a"])
    command, environment = [sys.executable, "-m", "avalab.report.notebooks", "plan"], {"AVALAB_ROOT": str(package)}
    for asked, planned in (("sizes", "sizes 20_three_sizes\n"), ("laptop", "laptop 01_a 20_three_sizes\n")):
        done = subprocess.run(
            [*command, "--profile", asked], cwd=REPOSITORY, env=os.environ | environment, capture_output=True, text=True
        )
        assert done.stdout == planned, done.stderr


def test_an_unknown_notebook_or_profile_is_named_with_those_that_exist(package):
    write_notebook(package, "01_a", ["1"])
    with pytest.raises(ValueError, match="no notebook 07; notebooks/ holds 01_a"):
        notebooks.notebook_names("01 07", package)
    with pytest.raises(ValueError, match="unknown profile 'huge'; choose one of smoke, laptop, a2000"):
        notebooks.model_argument("huge", "", package)


def test_the_profiles_own_model_is_the_same_run_however_it_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "tiny-llama").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    for same in ("", "data/tiny-llama", "data/tiny-llama/", str(tmp_path / "data" / "tiny-llama")):
        assert notebooks.model_argument("smoke", same, tmp_path) == ""
    assert notebooks.model_argument("smoke", "mine", tmp_path) == str((tmp_path / "mine").resolve())
    assert notebooks.model_argument("smoke", "someone/some-model", tmp_path) == "someone/some-model"


# --- make --------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy with two notebooks, the first of which fails, and this environment already set up."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    for folder in ("lab", "report"):
        left_out = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / "avalab" / folder, tmp_path / "avalab" / folder, ignore=left_out)
    shutil.copy(REPOSITORY / "avalab" / "__init__.py", tmp_path / "avalab")
    page = (
        "import sys, pathlib\n"
        "def build_page(folder):\n"
        "    page = pathlib.Path(folder, 'index.html')\n"
        "    page.write_text(' '.join(sorted(p.name for p in page.parent.glob('0*'))))\n"
        "    return page\n"
        "if __name__ == '__main__':\n"
        "    build_page(sys.argv[1])\n"
    )
    (tmp_path / "avalab" / "report" / "page.py").write_text(page)
    write_notebook(tmp_path, "01_fails", ["1 / 0"])
    write_notebook(tmp_path, "02_works", ["from avalab.lab import artifacts"])
    (tmp_path / ".stamps").mkdir()
    return tmp_path


def make(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    # Make's own variables of an outer `make test` would reach this one.
    passed = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PYTHONPATH")}
    environment = {**passed, "VIRTUAL_ENV": sys.prefix}
    (root / ".stamps" / f"setup-{sys.prefix.replace('/', '_')}").touch()  # nothing is installed by a test
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)


def test_make_runs_the_rest_after_a_failure_and_again_only_what_changed(checkout):
    first = make(checkout, "reproduce", "PROFILE=smoke")
    assert first.returncode != 0
    assert "01_fails  FAILED   ZeroDivisionError: division by zero" in first.stdout
    assert "02_works  done     results/smoke/02_works.ipynb" in first.stdout
    assert first.stdout.count("report so far: results/smoke/index.html") == 2
    assert "02_works.ipynb" in (checkout / "results" / "smoke" / "index.html").read_text()

    second = make(checkout, "reproduce", "PROFILE=smoke", "NOTEBOOKS=02")
    assert second.returncode == 0
    assert second.stdout.splitlines() == ["02_works  done     results/smoke/02_works.ipynb"]

    write_notebook(checkout, "02_works", ["from avalab.lab import artifacts", "1 / 0"])  # its stamp is out of date now
    assert would_run(checkout) == ["01_fails", "02_works"]
    assert would_run(checkout, "NOTEBOOKS=01") == ["01_fails"]
    os.utime(checkout / ".stamps" / "smoke" / "02_works.done")
    assert would_run(checkout) == ["01_fails"]
    os.utime(checkout / "avalab" / "lab" / "artifacts.py")
    assert would_run(checkout) == ["01_fails", "02_works"]
    assert would_run(checkout, "SEED=1") == ["01_fails", "02_works"], "another seed is another run"


def would_run(root: Path, *arguments: str) -> list[str]:
    planned = make(root, "-n", "reproduce", "PROFILE=smoke", *arguments).stdout
    commands = [line.split() for line in planned.splitlines() if "avalab.report.notebooks run" in line]
    return [words[words.index("--notebooks") + 1] for words in commands]


def test_a_committed_result_without_a_stamp_counts_as_not_done(checkout):
    (checkout / "results" / "smoke").mkdir(parents=True)
    (checkout / "results" / "smoke" / "02_works.ipynb").write_text(json.dumps({}))
    assert would_run(checkout) == ["01_fails", "02_works"]


@pytest.mark.parametrize("name", ["модель 模型", "it's mine", "a$b c", "x#y%z", "a=b:c", "(two) [three]"])
def test_make_plans_a_model_in_a_folder_of_any_name_and_again_when_a_file_of_it_changes(checkout, name):
    """What a notebook would be given is what was named, and a change of a file makes it run again."""
    folder = checkout / "odd" / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    planned = make(checkout, "-n", "reproduce", "PROFILE=smoke", f"MODEL={folder}").stdout
    (line,) = [line for line in planned.splitlines() if "notebooks run --notebooks 02_works" in line]
    words = shlex.split(line)
    assert words[words.index("--model") + 1] == str(folder)

    (run,) = [path for path in (checkout / ".stamps").iterdir() if path.name.startswith("smoke+")]
    (run / "02_works.done").touch()
    (checkout / "results" / run.name).mkdir(parents=True)
    (checkout / "results" / run.name / "02_works.ipynb").write_text("{}")
    assert would_run(checkout, f"MODEL={folder}") == ["01_fails"]
    (folder / "config.json").write_text('{"changed": true}')
    assert would_run(checkout, f"MODEL={folder}") == ["01_fails", "02_works"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("PROFILE=huge", "unknown profile 'huge'; choose one of smoke, laptop, a2000"),
        ("NOTEBOOKS=9", "no notebook 9; notebooks/ holds 01_fails, 02_works"),
        ("SEED=one", "SEED is 'one'; it must be a whole number from 0 up"),
    ],
)
def test_make_refuses_a_wrong_argument_in_one_line(checkout, argument, message):
    refused = make(checkout, "reproduce", argument)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
