"""Every command of the README's block "Your own model", read from it and run in order on the tiny model.

The folder is fresh, with the model at `path/to/folder`. What is changed for its 0.9 M parameters: the profile is
`smoke`; a size is `SHARE` of the model's own bf16 bytes, since headers, norms and the groups of an embedding with 64
channels take a larger part of it than of a real model; a count is a tenth; training learns from fewer tokens, and fewer
questions are asked (`LESS`).
"""

import contextlib
import inspect
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from importlib.util import find_spec

import pytest
from transformers import AutoModelForCausalLM  # noqa: F401  its warnings come before the package's type checks

from avalab import cli
from avalab.cli.compress import EXPORTERS
from avalab.lab import artifacts
from avalab.lab.run import ROOT

SHARE = 0.7

LESS = {
    "eval": ("--limit", "2"),
    "finetune": ("--limit", "8"),
    "align": ("--limit", "12"),
    "distill": ("--tokens", "300", "--row-tokens", "128"),
    "recover": ("--tokens", "512", "--steps", "2"),
}

SAID = "How many ways are there to choose 2 of 5?\n/quit\n"  # to `avalab chat`


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it printed."""

    code: int
    text: str
    error: str


def block(readme: str) -> list[str]:
    """The lines of the first fenced block below the heading."""
    return readme.split("## Your own model", 1)[1].split("```", 2)[1].strip().splitlines()


def commands(lines: list[str]) -> dict[str, list[str]]:
    """Each command as it stands, without its comment, and its words; an export once a format that the comment names."""
    found = {}
    for line in lines:
        words, comment = shlex.split(line, comments=True), line.partition("#")[2]
        others = (
            [name for name in EXPORTERS if re.search(rf"(?<![\w-]){name}(?![\w-])", comment)] if "--to" in words else []
        )
        found[shlex.join(words)] = words
        for other in others:
            variant = list(words)
            variant[words.index("--to") + 1], variant[words.index("--out") + 1] = other, f"there-{other}"
            found[shlex.join(variant)] = variant
    return found


def scaled(words: list[str], weight_bytes: int) -> list[str]:
    """A command's words as they are run: in the profile `smoke`, and smaller by the rule above."""
    after = dict(itertools.pairwise(words))
    changed = {"--bytes": str(int(SHARE * weight_bytes))}
    if count := after.get("--count"):
        changed["--count"] = str(int(count) // 10)
    words = [changed.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    known = inspect.signature(cli.COMMANDS.get(words[1], cli.show)).parameters
    return [*words[1:], *LESS.get(words[1], ()), *(("--profile", "smoke") if "profile" in known else ())]


LINES = block((ROOT / "README.md").read_text(encoding="utf-8"))

# A server does not end by itself: tests/serve/test_web_app.py asks the line's.
COMMANDS = {s: words for s, words in commands(LINES).items() if words[0] == "avalab" and words[1] != "serve"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A fresh folder with the model in `path/to/folder`; what commands keep for themselves is in it, too."""
    fresh = tmp_path_factory.mktemp("fresh")
    ignored = shutil.ignore_patterns("*.py", "__pycache__", "README.md")
    shutil.copytree(ROOT / "data" / "tiny-llama", fresh / "path" / "to" / "folder", ignore=ignored)
    (fresh / "path" / "to" / "documents").mkdir()
    (fresh / "path" / "to" / "documents" / "tea.md").write_text("# Tea\nGreen tea is brewed at 80 degrees.\n")
    return fresh


@pytest.fixture(scope="module")
def outcome_of(folder):
    """What became of a command; those before it are run first, each of them once."""
    weight_bytes = (folder / "path" / "to" / "folder" / "model.safetensors").stat().st_size
    waiting, found = list(COMMANDS.items()), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("AVALAB_DEVICE", "cpu")
        patch.setenv("AVALAB_ARTIFACTS", str(folder / "kept"))

        def run(shown: str) -> Outcome:
            while shown not in found:
                name, words = waiting.pop(0)
                patch.setattr("sys.argv", ["avalab", *scaled(words, weight_bytes)])
                patch.setattr("sys.stdin", io.StringIO(SAID))
                found[name] = outcome()
            return found[shown]

        yield run


def outcome() -> Outcome:
    """Run the command in `sys.argv`."""
    text, error, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(error), warnings.catch_warnings():
        try:
            cli.main()
        except SystemExit as stopped:
            code = stopped.code or 0
    return Outcome(code, text.getvalue(), error.getvalue())


def test_the_block_has_a_command_of_every_kind_and_no_out_twice():
    """A new sub-command without a line here is not shown to anybody."""
    shown = {words[1] for words in COMMANDS.values()}
    # The other road to `aot`; needs a GPU; the last two answer until they are stopped.
    assert shown == {*cli.COMMANDS, "show"} - {"compile", "tensorrt", "serve", "mcp"}
    outs = [words[words.index("--out") + 1] for words in COMMANDS.values() if "--out" in words]
    assert len(outs) == len(set(outs))
    assert len([words for words in COMMANDS.values() if words[1] == "export"]) == len(EXPORTERS)


@pytest.mark.parametrize("shown", COMMANDS)
def test_a_command_of_the_readme_does_what_it_says(shown, outcome_of, folder):
    words, found = COMMANDS[shown], outcome_of(shown)
    if words[1] == "export" and "executorch" in words and find_spec("executorch") is None:
        assert (found.code, found.error.strip().count("\n")) == (2, 0), found.error
        return
    assert found.code == 0, found.error
    assert "Traceback" not in found.error
    if "--json" in words:
        assert {"metric", "value", "unit", "when"} <= json.loads(found.text)[0].keys()
    if words[1] in ("quantize", "prune", "export", "finetune", "align", "distill", "recover"):
        artifacts.load_artifact(folder / words[words.index("--out") + 1])
    elif words[1] == "compare":
        verdicts = r"(better|worse|not distinguishable): [+-]\d"
        assert all(re.search(verdicts, line) for line in found.text.splitlines()), found.text
    else:
        assert found.text.strip()


def test_the_order_to_reproduce_a_model_plans_its_notebooks(folder, tmp_path):
    """`make -n` in a copy of the checkout says what would run, and on which model."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("avalab", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    words, model = shlex.split(LINES[0], comments=True), folder / "path" / "to" / "folder"
    assert words[:2] == ["make", "reproduce"]
    command = [word.replace("path/to/folder", str(model)) for word in words]
    passed = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        [*command, "-n", "PROFILE=smoke", "NOTEBOOKS=11"],
        cwd=tmp_path,
        env=passed | {"VIRTUAL_ENV": sys.prefix},
        capture_output=True,
        text=True,
    )
    assert f"run --notebooks 11_function_calling --profile 'smoke' --model '{model}'" in done.stdout, done.stderr
