"""One layer at a time: the shortcut through the blocks gives what a full pass gives, and leaves no trace."""

import pytest
import torch
from transformers import PreTrainedModel

from avalab import corpora, models, numerics, predict, sensitivity

FORMAT = numerics.FORMATS["int4-g64"]


@pytest.fixture(scope="module")
def model(run) -> PreTrainedModel:
    return models.load(models.base(run))


@pytest.fixture(scope="module")
def against(run):
    base = models.base(run)
    tokenizer = models.load_tokenizer(base)
    windows = corpora.windows(corpora.text("python_docs", tokenizer), tokenizer, count=3, tokens=48)
    return predict.reference(base, windows, run.artifacts_dir / "cache")


@pytest.fixture(scope="module")
def found(model, against):
    return dict(sensitivity.layer_by_layer(model, against, FORMAT))


def test_every_linear_layer_is_measured_once_and_each_one_hurts(found, model):
    assert list(found) == list(models.linear_layers(model))
    assert all(kl.mean() > 0 for kl in found.values())


def test_starting_at_a_layers_block_gives_what_a_full_pass_gives(found, model, against):
    for name, layer in models.linear_layers(model).items():
        kept = layer.weight.data
        layer.weight.data = numerics.round_to_nearest(kept.float(), FORMAT).to(kept.dtype)
        full = predict.score_model(model, against).kl
        layer.weight.data = kept
        assert torch.allclose(found[name], full, atol=1e-5), name


def test_the_model_is_left_as_it_was_even_when_the_walk_is_abandoned(model, against):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    walk = sensitivity.layer_by_layer(model, against, FORMAT)
    next(walk)
    walk.close()
    list(sensitivity.layer_by_layer(model, against, FORMAT))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(block._forward_pre_hooks for block in model.model.layers)
    assert predict.score_model(model, against).kl.abs().max() == 0


def test_fewer_bits_hurt_more(found, model, against):
    eight = dict(sensitivity.layer_by_layer(model, against, numerics.FORMATS["int8-g64"]))
    assert sum(float(kl.mean()) for kl in eight.values()) < 0.1 * sum(float(kl.mean()) for kl in found.values())


def test_groups_that_do_not_divide_the_columns_are_refused_and_change_nothing(model, against):
    with pytest.raises(ValueError, match=r"group size 48 .*does not divide 128 columns"):
        next(sensitivity.layer_by_layer(model, against, numerics.integer(4, 48)))
    assert predict.score_model(model, against).kl.abs().max() == 0


def test_each_layer_becomes_a_record_with_its_format(run, model, against, found):
    sensitivity.record(run, model, against, FORMAT)
    assert [record.subject for record in run.records] == [sensitivity.subject(name) for name in found]
    last = run.records[-1]
    assert last.value == pytest.approx(float(found["model.layers.3.mlp.down_proj"].mean()))
    assert (last.metric, last.unit, last.n, last.details["format"]) == ("kl_divergence", "nats/token", 3, "int4-g64")
    assert last.low < last.value < last.high


def test_a_layers_subject_sorts_by_its_block():
    assert sensitivity.subject("model.layers.7.mlp.down_proj") == "layer 07/mlp.down_proj"
    assert sensitivity.subject("model.layers.12.self_attn.q_proj") == "layer 12/self_attn.q_proj"


def test_a_block_is_found_in_its_layers_name():
    assert sensitivity.block_index("model.layers.7.mlp.down_proj") == 7
    assert sensitivity.block_index("model.layers.12.self_attn.q_proj") == 12
