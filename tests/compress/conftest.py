"""What several compressors' tests share: calibration text that is read once, the base's predictions of other text."""

import pytest

from avalab.data import corpora
from avalab.models import checkpoint, predict


@pytest.fixture(scope="module")
def calibration(run):
    """The windows that every compressor calibrates on."""
    samples = corpora.calibration_windows(run, checkpoint.load_tokenizer(checkpoint.base_artifact(run)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "calibration_windows", lambda *arguments: samples)
        yield samples


@pytest.fixture(scope="module")
def against(run, base):
    """What the base predicts on text that nothing is calibrated on."""
    tokenizer = checkpoint.load_tokenizer(base)
    windows = corpora.windows(corpora.evaluation_text("python_docs", tokenizer), tokenizer, count=4, tokens=64)
    return predict.make_reference(base, windows, run.artifacts_dir / "cache")
