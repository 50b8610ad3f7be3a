"""The tokenizer of the committed model, once for all tests of this room."""

import pytest
from transformers import AutoTokenizer  # before the package, whose type checks would meet its warnings

from avalab.lab.run import ROOT


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "data" / "tiny-llama")
