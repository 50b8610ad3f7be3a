"""What holds for every test: shapes and types are checked, one thread, no network, fixed seeds; and the tiny model."""

import logging
import os
import random
import socket
import sys
import warnings

import pytest

# Before any library reads them. Torch, numpy and the tokenizers then use one thread and never ask a hub.
os.environ.update(
    {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "MPLBACKEND": "Agg",
        "JUPYTER_PREFER_ENV_PATH": "1",
    }
)

from jaxtyping import install_import_hook  # after the environment is set

for _name in (
    "torchao",
    "torch.utils._pytree",
):  # as `avalab.lab.process`, which comes after the hook
    logging.getLogger(_name).setLevel(logging.ERROR)
with warnings.catch_warnings():  # its docstrings hold invalid escapes, which are errors where warnings are
    warnings.simplefilter("ignore")
    import torchao  # noqa: F401

# Every annotated function of the package is checked when it is called, array shapes included; as everywhere in
# Python's typing, an int will do where a float is asked for.
install_import_hook("avalab", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


class NetworkBlocked(OSError):
    """A test tried to leave this machine."""


def _refuse_unless_local(host: object) -> None:
    name = host.decode() if isinstance(host, bytes) else str(host)
    if name not in ("localhost", "::1", "", "None") and not name.startswith("127."):
        raise NetworkBlocked(f"tests have no network; something asked for {name}")


def _guarded(original):
    def connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _refuse_unless_local(address[0])
        return original(self, address)

    return connect


def _guarded_lookup(original):
    def getaddrinfo(host, *arguments, **options):
        _refuse_unless_local(host)
        return original(host, *arguments, **options)

    return getaddrinfo


@pytest.fixture(scope="session", autouse=True)
def no_network():
    """Connecting or looking up a name beyond the loopback interface raises."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", _guarded(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", _guarded(socket.socket.connect_ex))
        patch.setattr(socket, "getaddrinfo", _guarded_lookup(socket.getaddrinfo))
        yield


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Seed the global generators of whatever is loaded; nothing is imported for it."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the smoke profile on the CPU whose artefacts lie in a folder of the test file's own."""
    from avalab.lab.run import Run

    folder = tmp_path_factory.mktemp("artifacts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AVALAB_ARTIFACTS", str(folder))
        patch.setenv("AVALAB_DEVICE", "cpu")
        yield Run("t", "smoke")


@pytest.fixture(scope="module")
def base(run):
    """The artefact of the tiny model."""
    from avalab.models import checkpoint

    return checkpoint.base_artifact(run)


@pytest.fixture(scope="module")
def quantised(run, base):
    """The tiny model in two 4-bit forms, NF4 and rounded to the nearest."""
    from avalab.compress import quantize

    return [
        quantize.compress_artifact(base, "nf4", run=run),
        quantize.compress_artifact(base, "rtn", run=run, group_size=32),
    ]


@pytest.fixture(scope="module")
def respondent(base):
    """The tiny model, ready to answer."""
    from avalab.measure import answers

    return answers.Respondent(base)


@pytest.fixture(scope="session")
def family_model(tmp_path_factory):
    """A function from the name of a family to the folder of its tiny random model, made once."""
    from functools import cache

    from avalab.measure import families

    return cache(lambda name: families.make_model(name, tmp_path_factory.mktemp("family") / name))


@pytest.fixture(scope="module")
def few_docstrings():
    """Some of the standard library's docstrings stand for all, which take seconds to compare."""
    from avalab.data import corpora

    few = corpora.standard_library_docstrings()[:300]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "standard_library_docstrings", lambda: few)
        yield
