"""`make test` ends: a test that hangs, or that kills its process, is named, and nothing waits for it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
HANGS = "import ctypes\ndef test_bad(): ctypes.{}(None).sleep(600)"  # in native code, where no signal helps
BAD = {
    "hangs": HANGS.format("CDLL"),
    "hangs and lets no thread run": HANGS.format("PyDLL"),  # it keeps the interpreter's lock
    "dies": "import os\ndef test_bad(): os.kill(os.getpid(), 9)",
}
GOOD = "import pytest\n@pytest.mark.parametrize('i', range(5))\ndef test_good(i): pass"


def without(environment: Mapping[str, str], beginning: str) -> dict[str, str]:
    """An outer make's and an outer pytest's variables are not those of an inner one."""
    return {name: value for name, value in environment.items() if not name.startswith(beginning)}


def command_of_make() -> list[str]:
    """What `make test` calls for the unit tests."""
    command = ["make", "-n", "test"]
    shown = subprocess.run(command, cwd=REPOSITORY, env=without(os.environ, "MAKE"), capture_output=True, text=True)
    return next(line for line in shown.stdout.splitlines() if "pytest tests" in line).split()


@pytest.mark.parametrize("how", BAD)
def test_a_test_that_hangs_or_kills_its_process_fails_the_run_and_is_named(how, tmp_path):
    (tmp_path / "test_bad.py").write_text(BAD[how])
    (tmp_path / "test_good.py").write_text(GOOD)
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    options = command_of_make()[4:]  # after `python -m pytest tests`
    plugins = ["-p", "xdist", "-p", "pytest_timeout"]  # loading the others takes longer than the test
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", ".", *options, *plugins, "-o", "timeout=2", "-o", "faulthandler_timeout=3"],
        cwd=tmp_path,
        env={**without(os.environ, "PYTEST_"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 1, ended.stderr
    assert "crashed while running 'test_bad.py::test_bad'" in ended.stdout
    assert "1 failed, 5 passed" in ended.stdout
