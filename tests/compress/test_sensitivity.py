"""One layer at a time: the shortcut through the blocks gives what a full pass gives, and leaves no trace."""

import pytest
import torch
from transformers import PreTrainedModel

from avalab.compress import sensitivity
from avalab.compress.allocation import Option
from avalab.kernels import formats
from avalab.models import checkpoint, predict, walk

OPTIONS = {
    "model.embed_tokens": [Option("q8_0", 9, 0.1)],
    "model.layers.0.mlp.up_proj": [Option("bf16", 8, 0.0), Option("q4_0", 2, 0.4)],
    "model.layers.1.mlp.up_proj": [Option("bf16", 8, 0.0), Option("q4_0", 2, 0.2), Option("q8_0", 4, 0.1)],
    "model.layers.0.mlp.down_proj": [Option("bf16", 8, 0.0)],
}
FORMAT = formats.FORMATS["int4-g64"]


@pytest.fixture(scope="module")
def model(run) -> PreTrainedModel:
    return checkpoint.load_model(checkpoint.base_artifact(run))


@pytest.fixture(scope="module")
def found(model, against):
    return dict(sensitivity.layer_by_layer(model, against, FORMAT))


def test_every_linear_layer_is_measured_once_and_each_one_hurts(found, model):
    assert list(found) == list(walk.linear_layers(model))
    assert all(kl.mean() > 0 for kl in found.values())


def test_starting_at_a_layers_block_gives_what_a_full_pass_gives(found, model, against):
    for name, layer in walk.linear_layers(model).items():
        kept = layer.weight.data
        layer.weight.data = formats.round_to_nearest(kept.float(), FORMAT).to(kept.dtype)
        full = predict.score_model(model, against).kl
        layer.weight.data = kept
        assert torch.allclose(found[name], full, atol=1e-5), name


def test_the_model_is_left_as_it_was_even_when_the_walk_is_abandoned(model, against):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    abandoned = sensitivity.layer_by_layer(model, against, FORMAT)
    next(abandoned)
    abandoned.close()
    list(sensitivity.layer_by_layer(model, against, FORMAT))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(block._forward_pre_hooks for block in model.model.layers)
    assert predict.score_model(model, against).kl.abs().max() == 0


def test_fewer_bits_hurt_more(found, model, against):
    eight = dict(sensitivity.layer_by_layer(model, against, formats.FORMATS["int8-g64"]))
    assert sum(float(kl.mean()) for kl in eight.values()) < 0.1 * sum(float(kl.mean()) for kl in found.values())


def test_groups_that_do_not_divide_the_columns_are_refused_and_change_nothing(model, against):
    with pytest.raises(ValueError, match=r"group size 48 .*does not divide 128 columns"):
        next(sensitivity.layer_by_layer(model, against, formats.integer(4, 48)))
    assert predict.score_model(model, against).kl.abs().max() == 0


def test_each_layer_becomes_a_record_with_its_format(run, model, against, found):
    sensitivity.record_layers(run, model, against, FORMAT)
    assert [record.subject for record in run.records] == [sensitivity.layer_subject(name) for name in found]
    last = run.records[-1]
    assert last.value == pytest.approx(float(found["model.layers.3.mlp.down_proj"].mean()))
    assert (last.metric, last.unit, last.details["format"]) == ("kl_divergence", "nats/token", "int4-g64")
    assert last.n == len(against.windows)
    assert last.low < last.value < last.high


def test_a_layers_subject_sorts_by_its_block():
    assert sensitivity.layer_subject("model.layers.7.mlp.down_proj") == "layer 07/mlp.down_proj"
    assert sensitivity.layer_subject("model.layers.12.self_attn.q_proj") == "layer 12/self_attn.q_proj"


def test_a_level_twice_too_low_has_the_factor_two():
    assert sensitivity.measured_over_expected([1.0, 2.0, 4.0], [2.0, 4.0, 8.0]) == pytest.approx(2)
    assert sensitivity.measured_over_expected([1.0, 1.0], [4.0, 1.0]) == pytest.approx(2)


def test_an_order_that_is_kept_has_rank_correlation_one():
    assert sensitivity.rank_correlation([1, 2, 3], [10, 11, 50]) == pytest.approx(1)
    assert sensitivity.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)


def test_choices_are_of_linear_layers_that_lose_something_one_a_layer_and_equal_for_equal_seeds():
    found = sensitivity.draw_choices(OPTIONS, 2, seed=3)
    assert [name for name, _ in found] == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    assert all(option.cost > 0 for _, option in found)
    assert sensitivity.draw_choices(OPTIONS, 2, seed=3) == found


def test_more_choices_than_layers_are_refused():
    with pytest.raises(ValueError, match="3 choices were asked for; only 2 layers have one"):
        sensitivity.draw_choices(OPTIONS, 3, seed=0)


def test_a_ratio_to_zero_is_refused():
    with pytest.raises(ValueError, match="positive"):
        sensitivity.measured_over_expected([0.0, 1.0], [1.0, 1.0])


def test_a_heat_map_has_a_row_for_each_kind_and_format():
    assert sensitivity.heat_map_rows(OPTIONS, ["q4_0", "q8_0"]) == {
        "layer 00/up_proj q4_0": 0.4,
        "layer 01/up_proj q4_0": 0.2,
        "layer 01/up_proj q8_0": 0.1,
    }


def test_an_increase_between_measured_ones_lies_between_them_and_falls_with_the_error():
    """Errors 1, 4 and 16, increases 0.1 and 1.6 measured at 1 and 16: a power law of slope one, 0.4 between them."""
    errors = {"w2": 16.0, "w3": 4.0, "w4": 1.0, "w5": 0.25}
    known = {"w2": 1.6, "w4": 0.1}
    found = [sensitivity.increase_by_error(errors, known, format) for format in errors]
    assert found == pytest.approx([1.6, 0.4, 0.1, 0.025])
