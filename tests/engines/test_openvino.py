"""OpenVINO: GGUF files and exported folders against transformers in float32, and what is refused."""

import pytest
import torch

from avalab import engines
from avalab.compress import quantize
from avalab.engines import checks
from avalab.engines import gguf as gguf_file
from avalab.engines import openvino as openvino_engine
from avalab.engines.engine import TINY
from avalab.measure import families
from avalab.models import checkpoint, walk

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}


@pytest.mark.needs("openvino_genai")
@pytest.mark.parametrize("block", ["q8_0", "q4_0"])
def test_openvino_in_float32_has_the_logits_of_transformers(block, made, prompt, reference):
    """Activations, keys and values in float32: logits within 1e-3, the order of additions."""
    folder = made(f"gguf-{block}")
    ours = engines.load("openvino", folder, threads=1, properties=EXACT)
    torch.testing.assert_close(ours.logits(prompt), reference(folder).logits(prompt), atol=1e-3, rtol=0)
    assert ours.generate(prompt, 16, past_end=True) == reference(folder).generate(prompt, 16, past_end=True)


@pytest.mark.needs("openvino_genai")
def test_openvino_reads_q4_1_as_it_is_where_minimums_are_whole_steps(tmp_path, prompt, reference):
    """Its reader rounds a block's minimum to a whole number of steps; weights of that kind lose nothing."""
    model = checkpoint.load_model(TINY, dtype=torch.float32)
    for layer in walk.linear_layers(model).values():
        blocks = layer.weight.data.view(-1, 32)
        steps = (blocks * 2**5).round().clamp(-7, 8)
        steps[:, 0], steps[:, 1] = -7, 8  # the block's ends, so that its type finds this grid
        layer.weight.data = (steps / 2**7).view(layer.weight.shape)
    model.config.dtype = torch.float32
    checkpoint.save_model(model, checkpoint.load_tokenizer(TINY), tmp_path / "grid")
    (tmp_path / "file").mkdir()
    gguf_file.export(tmp_path / "grid", tmp_path / "file" / "m.gguf", "q4_1")
    ours = engines.load("openvino", tmp_path / "file", threads=1, properties=EXACT).logits(prompt)
    torch.testing.assert_close(ours, reference(tmp_path / "file").logits(prompt), atol=1e-3, rtol=0)


@pytest.mark.needs("openvino_genai")
@pytest.mark.parametrize(("weights", "allowed"), [("f16", 0.005), ("int8", 0.005), ("int4", 0.15)])
def test_an_openvino_folder_is_close_to_its_dense_model(weights, allowed, made, prompt, divergence, reference):
    """Against the dense model: 0.005 is the engine's own rounding, 0.15 bounds int4 with groups of 64."""
    engine = engines.load("openvino", made(f"openvino-{weights}"), threads=1)
    assert divergence(engine.logits(prompt), reference(TINY).logits(prompt)) < allowed
    assert engine.generate(prompt, 4, past_end=True)[0] == int(engine.logits(prompt)[-1].argmax())


@pytest.mark.needs("openvino_genai")
def test_an_openvino_artefact_names_what_it_was_made_from_and_is_made_once(tiny_artifact, monkeypatch, prompt):
    base, made = tiny_artifact, openvino_engine.write(tiny_artifact, "f16")
    assert (made.name, made.format, made.card["base"]["sha256"]) == ("tiny+openvino-f16", "openvino-f16", base.sha256)
    assert engines.load("openvino", made, threads=1).generate(prompt, 3, past_end=True)
    monkeypatch.setattr(openvino_engine, "export", lambda *arguments: pytest.fail("it was made a second time"))
    assert openvino_engine.write(base, "f16").sha256 == made.sha256


@pytest.mark.needs("openvino_genai")
def test_openvino_refuses_block_types_that_it_does_not_read_and_says_what_does(made):
    says = r"it holds q5_1; it reads f32, f16, q8_0, q4_0, q4_1.*; llamacpp and torch can"
    with pytest.raises(engines.NotSupported, match=says):
        engines.load("openvino", made("gguf-q5_1"))


@pytest.mark.needs("openvino_genai")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("llama-rope-llama3", "it is a llama of scaled positions, and it would leave the scaling out"),
        ("llama-rope-linear", "it is a llama of scaled positions, and it would leave the scaling out"),
        ("llama-biases", "it is a llama with biases, and it would leave them out"),
        ("granite", "it is a granite; of GGUF files it reads llama, qwen2, qwen3"),
    ],
)
def test_a_gguf_file_of_which_openvino_would_compute_another_model_is_refused(name, says, tmp_path):
    """Its reader takes these files and gives logits that are off by more than their own spread (LOG.md)."""
    source = families.make_model(name, tmp_path / "source")
    (tmp_path / "file").mkdir()
    gguf_file.export(source, tmp_path / "file" / "m.gguf", "f16")
    with pytest.raises(engines.NotSupported, match=rf"openvino cannot run m\.gguf: {says}.*; llamacpp and torch can"):
        openvino_engine.refuse_unread(tmp_path / "file" / "m.gguf")
    with pytest.raises(engines.NotSupported, match=says):
        openvino_engine.export(source, tmp_path / "out", "f16")


@pytest.mark.needs("openvino_genai")
def test_the_steps_of_a_packed_artefact_reach_openvino_as_they_are(run, base, prompt):
    """In float32, logits of the decoded model within what bf16 rounds of decoded values."""
    artifact = quantize.compress_artifact(base, "rtn", run=run, group_size=32)
    made = openvino_engine.write(artifact, "kept")
    ours = engines.load("openvino", made, threads=1, properties=EXACT).logits(prompt)
    theirs = engines.load("torch", artifact, dtype=torch.float32).logits(prompt)
    assert checks.difference(ours, theirs) < 0.01
    assert made.card["measured"]["checked_in"] == "openvino"


@pytest.mark.needs("openvino_genai")
def test_openvino_leaves_an_artefact_as_it_was(made, prompt):
    """For logits GenAI writes what it read from a GGUF file: not beside the file."""
    folder = made("gguf-q8_0")
    before = sorted(path.name for path in folder.iterdir())
    engines.load("openvino", folder, threads=1).logits(prompt)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_unknown_weights_for_an_export_are_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"no weights 'int3' for OpenVINO; choose one of f16, int8, int4, kept"):
        openvino_engine.export(TINY, tmp_path, "int3")
