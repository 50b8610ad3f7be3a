"""How much of a model a method reaches: families whose weights are elsewhere, and what the card says."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from avalab.compress import prune, quantize, reach
from avalab.lab.run import Run
from avalab.measure import families
from avalab.models import checkpoint, walk


@pytest.fixture(scope="module")
def made(tmp_path_factory, run):
    """The base artefact of a family, and its run."""
    found = {}

    def base(name: str):
        if name not in found:
            folder = families.make_model(name, tmp_path_factory.mktemp(name))
            own = Run("t", "smoke", 0, str(folder))
            found[name] = checkpoint.base_artifact(own), own
        return found[name]

    return base


LINEAR = [name for name, row in quantize.METHODS.items() if row.skips]


@pytest.mark.parametrize("method", LINEAR)
def test_transposed_layers_are_refused_by_every_method_of_linear_ones(method, made):
    base, run = made("gpt2")
    with pytest.raises(ValueError, match=r"hold 0% of the weights in the blocks of gpt2 \(Conv1D: 100%"):
        quantize.compress_artifact(base, method, run=run)


@pytest.mark.parametrize("method", LINEAR)
def test_stacked_experts_are_refused_by_every_method_of_linear_ones(method, made):
    base, run = made("qwen3-moe")
    with pytest.raises(ValueError, match=r"hold 3\d% .* qwen3_moe \(Qwen3MoeExperts, stacked: 6\d%.*--partial"):
        quantize.compress_artifact(base, method, run=run)


def test_a_part_is_compressed_when_asked_for_and_the_card_says_how_much(made):
    """The share counted from the base's tensors: attention's matrices over all bytes."""
    base, run = made("qwen3-moe")
    artifact = quantize.compress_artifact(base, "nf4", run=run, partial=True)
    tensors = load_file(base.path / "model.safetensors")
    attention = sum(t.nbytes for name, t in tensors.items() if "self_attn" in name and t.ndim == 2)
    total = sum(t.nbytes for t in tensors.values())
    measured = artifact.card["measured"]
    assert measured["reached_share"] == pytest.approx(attention / total, abs=1e-4)
    assert measured["kept"]["experts"] == pytest.approx(
        sum(t.nbytes for name, t in tensors.items() if "experts" in name) / total, abs=1e-4
    )
    assert f"reached {attention / total:.0%} of the weight bytes" in reach.in_words(measured)
    assert "experts" in reach.in_words(measured)


@pytest.mark.parametrize("method", ["nf4", "rtn", "torchao-int8"])
def test_the_share_of_a_llama_is_that_of_its_linear_layers(method, run, base):
    linear = sum(layer.weight.nbytes for layer in walk.linear_layers(checkpoint.load_model(base)).values())
    total = sum(t.nbytes for t in load_file(base.path / "model.safetensors").values())
    measured = quantize.compress_artifact(base, method, run=run).card["measured"]
    assert measured["reached_share"] == pytest.approx(linear / total, abs=1e-4)
    assert set(measured["kept"]) == {"embedding", "norm"}


def test_a_file_that_is_the_base_once_more_is_refused(base, tmp_path):
    save_file(load_file(base.path / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="nothing of the model was reached"):
        reach.of_artifact(base.path, tmp_path)


@pytest.mark.parametrize(
    ("score", "pattern"), [("magnitude", "unstructured"), ("wanda", "2:4"), ("influence", "layers")]
)
@pytest.mark.parametrize("family", ["gpt2", "qwen3-moe"])
def test_pruning_refuses_what_it_does_not_reach(family, score, pattern, made):
    base, run = made(family)
    with pytest.raises(ValueError, match="pruning changes linear layers, which hold"):
        prune.prune_artifact(base, score, pattern, run=run, sparsity=0.5)


def test_named_targets_are_pruned_and_the_card_says_their_share(made):
    base, run = made("qwen3-moe")
    artifact = prune.prune_artifact(base, "magnitude", run=run, sparsity=0.5, target_modules="attention")
    state = checkpoint.load_model(base).state_dict()
    attention = sum(t.numel() for name, t in state.items() if "self_attn" in name and t.ndim == 2)
    share = attention / sum(t.numel() for t in state.values())
    assert artifact.card["measured"]["reached_share"] == pytest.approx(share, abs=1e-3)
    pruned = checkpoint.load_model(artifact).model.layers[0].self_attn.q_proj.weight
    assert float((pruned == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("skip", ["*.no_such_layer", "model.layers.9.*"])
def test_a_glob_that_matches_nothing_is_refused(skip, run, base):
    with pytest.raises(ValueError, match="matches no linear layer"):
        quantize.compress_artifact(base, "nf4", run=run, skip=(skip,))
    with pytest.raises(ValueError, match="matches no linear layer"):
        prune.prune_artifact(base, "magnitude", run=run, sparsity=0.5, target_modules=skip)


def test_a_partial_reach_of_nothing_is_refused_too(made):
    base, run = made("gpt2")
    with pytest.raises(ValueError, match="hold 0%"):
        quantize.compress_artifact(base, "nf4", run=run, partial=True)


def test_shares_of_stacked_and_plain_weights_are_counted_by_hand():
    """A block of a 2 x 2 linear layer and two stacked 2 x 3 experts: 4 of 16 weights are linear."""
    model = torch.nn.Module()
    model.config = type("Config", (), {"model_type": "toy"})()
    block = torch.nn.Module()
    block.linear = torch.nn.Linear(2, 2, bias=False)
    block.experts = torch.nn.Module()
    block.experts.up = torch.nn.Parameter(torch.zeros(2, 2, 3))
    model.layers = torch.nn.ModuleList([block])
    layers = {"layers.0.linear": block.linear}
    with pytest.raises(ValueError, match=r"hold 25% .* toy \(Module, stacked: 75%"):
        reach.refuse_unreachable(model, layers, "x", partial=False, remedy="say so")
    reach.refuse_unreachable(model, layers, "x", partial=True, remedy="say so")
