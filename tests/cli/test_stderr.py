"""What a command leaves on standard error when all is well: progress bars, and nothing of any library."""

import json
import re
import subprocess
import sys

from avalab.lab.run import ROOT

COMMANDS = [
    ["quantize", "--method", "gptq", "--bits", "4", "--group-size", "32", "--out", "small"],  # llmcompressor, torch.fx
    ["quantize", "--method", "nf4", "--out", "other"],
    ["bench", "small"],
    ["eval", "small", "--limit", "1"],
]

PROGRAM = """import json, sys
from avalab import cli
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["avalab", *arguments, "--profile", "smoke"]
    try:
        cli.main()
    except SystemExit as stopped:
        assert not stopped.code, arguments"""

BAR = re.compile(r"^\S.*\d+%\|.*\||^\s*$|: *\d*it \[")  # as tqdm draws them


def remarks(text: str) -> list[str]:
    """The lines that are no progress bar; a bar is drawn over and over from the beginning of its line."""
    return [line for line in re.split(r"[\r\n]|\x1b\[A", text) if not BAR.search(line)]


def test_a_progress_bar_is_no_remark_and_a_warning_is_one():
    assert remarks("gptq:  50%|█████     | 1/2 [00:00<00:00]\r   \r\x1b[A0it [00:00, ?it/s]") == ["0it [00:00, ?it/s]"]
    assert remarks("load: 0it [00:00, ?it/s]\nUserWarning: x\n") == ["UserWarning: x"]


def test_commands_on_the_tiny_model_say_nothing_but_progress(tmp_path):
    """In a process of its own, where no filter of the tests hides a warning; one for all: importing takes longest."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(COMMANDS)]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "AVALAB_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    environment |= {"AVALAB_ARTIFACTS": str(tmp_path / "kept"), "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert remarks(done.stderr) == []
