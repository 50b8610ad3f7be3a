"""Compressed models whose weights stay packed in memory: the same numbers, the file's bytes, and clear refusals."""

import pytest
import torch

from avalab import engines
from avalab.compress import quantize
from avalab.engines import gguf as gguf_file
from avalab.kernels.packed import native
from avalab.kernels.packed.weight import decode
from avalab.lab.errors import InputError
from avalab.models import adapters, checkpoint, sizes
from avalab.models.inference import layers

pytestmark = pytest.mark.usefixtures("few_docstrings")

RECIPES = (
    ("rtn", {"bits": 4, "group_size": 64, "embedding": "int8"}),
    ("rtn", {"bits": 3, "group_size": 32, "symmetric": True}),
    ("rtn", {"bits": 8, "group_size": 128}),
    ("ava", {"bits_per_weight": 4.0, "embedding": "packed"}),
)


@pytest.fixture(scope="module", params=RECIPES, ids=lambda recipe: "-".join(map(str, [recipe[0], *recipe[1].values()])))
def artefact(request, run, base):
    method, parameters = request.param
    return quantize.compress_artifact(base, method, run=run, **parameters)


def test_packed_and_decoded_models_write_the_same_tokens_in_float32(artefact):
    prompt = torch.arange(3, 40)[None]
    kept, decoded = (checkpoint.load_model(artefact, dtype=torch.float32, packed=p) for p in (True, False))
    assert layers.packed_layers(kept)
    assert not layers.packed_layers(decoded)
    written = [m.generate(prompt, max_new_tokens=32, do_sample=False, eos_token_id=-1) for m in (kept, decoded)]
    assert torch.equal(*written)
    torch.testing.assert_close(kept(prompt).logits, decoded(prompt).logits, rtol=1e-4, atol=1e-3)


def test_every_packed_layer_decodes_to_the_weight_of_the_decoded_model(artefact):
    kept, decoded = (checkpoint.load_model(artefact, dtype=torch.float32, packed=p) for p in (True, False))
    for name, layer in layers.packed_layers(kept).items():
        torch.testing.assert_close(decode(layer.packed), decoded.get_submodule(name).weight.data, rtol=1e-6, atol=0)


def test_memory_holds_what_the_file_holds(artefact):
    model = checkpoint.load_model(artefact)
    held = {id(layer.packed): layer.packed.bytes for layer in layers.packed_layers(model).values()}
    others = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    assert sum(held.values()) + sum(others.values()) <= 1.02 * artefact.bytes


def test_a_tied_head_reads_the_embedding_s_codes(run, base):
    model = checkpoint.load_model(quantize.compress_artifact(base, "rtn", run=run, **RECIPES[0][1]))
    assert model.get_output_embeddings().packed is model.get_input_embeddings().packed


def test_without_native_code_the_same_tokens_are_written(artefact, monkeypatch):
    prompt = list(range(3, 20))
    first = engines.load("torch", artefact, dtype=torch.float32).generate(prompt, 16, past_end=True)
    monkeypatch.setattr(native, "library", lambda: None)
    engine = engines.load("torch", artefact, dtype=torch.float32)
    assert engine.state["native"] is None
    assert engine.generate(prompt, 16, past_end=True) == first


def test_adapters_train_on_packed_weights_as_on_decoded_ones(run, base):
    small, ids = quantize.compress_artifact(base, "rtn", run=run, **RECIPES[0][1]), torch.arange(3, 30)[None]
    gradients = []
    for kept in (True, False):
        model = checkpoint.load_model(small, dtype=torch.float32, packed=kept)
        adapters.attach_adapters(model, rank=4, seed=1)
        adapters.apply_fused_adapters(model, decoded=False)
        model(ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert gradients[0]
    for name, found in gradients[0].items():
        torch.testing.assert_close(found, gradients[1][name], rtol=1e-3, atol=1e-5)


def test_a_packed_model_is_not_saved_as_if_it_were_decoded(run, base, tmp_path):
    model = checkpoint.load_model(quantize.compress_artifact(base, "rtn", run=run, **RECIPES[0][1]))
    with pytest.raises(InputError, match="embed_tokens is packed; load it with packed=False"):
        checkpoint.save_model(model, checkpoint.load_tokenizer(base), tmp_path)


def test_layers_that_round_activations_are_decoded(run, base):
    model = checkpoint.load_model(quantize.compress_artifact(base, "smoothquant", run=run))
    assert not layers.packed_layers(model)
    assert model(torch.arange(3, 9)[None]).logits.isfinite().all()


def test_a_step_reads_the_packed_bytes_and_an_embedding_only_where_the_head_shares_it(artefact):
    read = sizes.weight_bytes_read(checkpoint.load_model(artefact))
    assert 0.9 * artefact.bytes < read < 1.02 * artefact.bytes


@pytest.mark.parametrize("block", ["q4_0", "q8_0", "q5_1"])
def test_a_gguf_file_stays_packed_and_writes_the_tokens_of_its_decoded_weights(base, block, tmp_path):
    made = gguf_file.write(base, block, out=tmp_path / block)
    prompt = list(range(3, 40))
    found = [engines.load("torch", made, dtype=torch.float32, packed=packed) for packed in (True, False)]
    assert layers.packed_layers(found[0].state["model"])
    assert not layers.packed_layers(found[1].state["model"])
    assert found[0].generate(prompt, 24, past_end=True) == found[1].generate(prompt, 24, past_end=True)
