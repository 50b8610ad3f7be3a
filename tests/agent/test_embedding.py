"""Sentence vectors: length one, nearer for what is alike."""

import numpy as np
import pytest

from avalab.agent.retrieval import embedding


def test_texts_of_like_meaning_are_nearer_than_others():
    pytest.importorskip("onnxruntime", reason="vectors need the extra `onnx`")
    embedder = embedding.available(threads=1, fetch=False)
    if embedder is None:
        pytest.skip("the assets minilm-l6-int8 and minilm-l6-tokenizer are not here")
    found = embedder.embed(["A dog runs across the field.", "A puppy is running on grass.", "Interest rates rose."])
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    near, far = found[0] @ found[1], found[0] @ found[2]
    assert near > far + 0.3
    alone = embedder.embed(["A dog runs across the field."])
    assert alone[0] @ found[0] > 0.99, "padding beside longer texts changes nothing"
