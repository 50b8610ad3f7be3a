"""What the tests of engines share: the tiny model in every form, the reference, and who is not installed.

Tolerances. With its own kernels in float32 an engine differs by the order of additions. By default the engines round
activations to 8 bits where weights have 4 or 8, and keep keys and values in 16 or 8: a KL divergence of 0.005 nats a
token bounds that on the tiny model (its own 4-bit rounding costs 0.03 to 0.06).

A library may crash natively: `engines.load` has a child process open each format with the same options first, so that
such a crash fails a test and never ends pytest's process.
"""

import functools
import importlib.util
import shutil
from pathlib import Path

import pytest

from avalab.lab.run import ROOT

TINY = ROOT / "data" / "tiny-llama"
EXTRAS = {"openvino_genai": "openvino", "xllamacpp": "lab", "executorch": "executorch"}


def pytest_configure(config):
    config.addinivalue_line("markers", "needs(*modules): skip the test where one of them is not installed")
    config.addinivalue_line("markers", "quantiser: skip the test where no build of llama.cpp that quantises is here")


def pytest_runtest_setup(item):
    for module in [module for mark in item.iter_markers("needs") for module in mark.args]:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install -e '.[{EXTRAS.get(module, 'onnx')}]'")
    if item.get_closest_marker("quantiser"):
        from avalab.engines import EngineUnavailable, llamacpp

        try:
            llamacpp.require_quantiser()
        except EngineUnavailable as error:
            pytest.skip(str(error))


@pytest.fixture(scope="session")
def prompt() -> list[int]:
    """Tokens of the beginning of a Python function."""
    from avalab.models import checkpoint

    return checkpoint.load_tokenizer(TINY)("def area(width, height):").input_ids


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Function from what is asked for (`gguf-q8_0`, `openvino-int8`, `onnx-fp32`) to the tiny model's folder."""
    from avalab.engines import gguf as gguf_file
    from avalab.engines import onnx as genai_folder
    from avalab.engines import openvino as openvino_engine

    @functools.cache
    def folder_of(name: str) -> Path:
        target, (form, weights) = tmp_path_factory.mktemp("engines") / name, name.split("-")
        target.mkdir()
        if form == "gguf":
            gguf_file.export(TINY, target / f"m.{weights}.gguf", weights)
        else:
            {"openvino": openvino_engine, "onnx": genai_folder}[form].export(TINY, target, weights)
        return target

    return folder_of


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """An artefact of the tiny model's first block, with embedding and head: it compiles in seconds."""
    from avalab.lab import artifacts
    from avalab.models import checkpoint

    def save(folder: Path) -> None:
        model = checkpoint.load_model(TINY)
        model.model.layers = model.model.layers[:1]
        model.config.num_hidden_layers = 1
        checkpoint.save_model(model, checkpoint.load_tokenizer(TINY), folder)

    about = {"base": {"name": "x", "sha256": "y"}, "recipe": [], "format": "bf16"}
    return artifacts.write_artifact("small", tmp_path_factory.mktemp("small"), save, **about)


@pytest.fixture
def tiny_artifact(tmp_path):
    """An artefact of the tiny model in a folder of the test's own."""
    from avalab.lab import artifacts

    def save(folder: Path) -> None:
        shutil.copytree(TINY, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.py", "__pycache__"))

    about = {"base": {"name": "x", "sha256": "y"}, "recipe": [], "format": "bf16"}
    return artifacts.write_artifact("tiny", tmp_path, save, **about)


@pytest.fixture(scope="session")
def opened():
    """Function that opens an engine which several tests share; none of them closes it."""
    from avalab import engines

    return functools.cache(lambda name, folder: engines.load(name, folder, threads=1))


@pytest.fixture(scope="session")
def reference():
    """Function from a folder or an artefact to transformers in float32 on the same weights."""
    import torch

    from avalab import engines

    @functools.cache
    def load(folder: Path):
        return engines.load("torch", folder, dtype=torch.float32)

    return lambda artifact: load(getattr(artifact, "path", artifact))


@pytest.fixture(scope="session")
def divergence():
    """Function from two arrays of logits to the mean KL divergence from the second, nats a token."""
    from avalab.models import predict

    return lambda ours, theirs: float(predict.kl_divergence(theirs.log_softmax(-1), ours.log_softmax(-1)).mean())


@pytest.fixture
def command(monkeypatch, capsys):
    """Function that runs `avalab` with some arguments: its exit code, and what it printed."""
    from avalab import cli

    def run(*arguments) -> tuple[object, str]:
        monkeypatch.setattr("sys.argv", ["avalab", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        return stopped.value.code, printed.out + printed.err

    return run
