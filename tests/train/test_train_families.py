"""Families: what is trained, packed, merged and scored equals plain transformers and PEFT, or is refused by name."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from avalab.data.packing import IGNORED, Encoded, one_row_batch, pack_rows
from avalab.measure import families
from avalab.models import adapters, predict
from avalab.models.attention import apply_packed_attention
from avalab.train import distill, loop, losses
from avalab.train.distill import Objective, Recipe

REFUSED = {
    "stablelm": "stablelm models cannot be trained here: an example changes the one packed behind it; models of plain",
    "gpt2": r"gpt2 models have no linear layers of torch in their blocks \(but Conv1D\): they can be measured and",
    "qwen3-moe": r"'mlp' matches no linear layer of this qwen3_moe model, whose experts are stacked .*use attention,",
}
PLAIN = [name for name, row in families.FAMILIES.items() if not row.adapter and not row.layout]
TRAINED = [name for name in PLAIN if name not in REFUSED] + ["qwen3-moe"]
TARGETS = {"qwen3-moe": ("attention",)}
LENGTHS = (5, 40, 23)  # of the examples: shorter and longer than the sliding windows

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def row():
    generator = torch.Generator().manual_seed(1)
    told = [torch.randint(3, 1024, (length,), generator=generator).tolist() for length in LENGTHS]
    return pack_rows([Encoded(ids, [*ids[1:], IGNORED]) for ids in told], row_tokens=sum(LENGTHS), seed=0)[0]


def plain(folder):
    """As transformers loads it; eager, because its other forms drop Gemma 2's soft cap of attention."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def with_adapters(model, targets):
    """With adapters that do something."""
    adapters.attach_adapters(model, rank=2, alpha=8, target_modules=targets, seed=0)
    generator = torch.Generator().manual_seed(2)
    for layer in adapters.adapter_layers(model).values():
        b = layer.lora_B[adapters.ADAPTER].weight
        b.data = torch.randn(b.shape, generator=generator) * 0.1
    return model


def examples(row):
    ends = row["boundaries"].tolist()
    return [(row["input_ids"][start:end], row["labels"][start:end]) for start, end in pairwise(ends)]


def plain_loss(model, row):
    """Mean over all labels of the model's own logits, one example at a time."""
    parts = [F.cross_entropy(model(ids[None]).logits[0], labels, reduction="sum") for ids, labels in examples(row)]
    return sum(parts) / int((row["labels"] != IGNORED).sum())


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", TRAINED)
def test_a_packed_row_has_the_loss_and_gradients_of_its_examples_in_plain_transformers(name, family_model, row):
    model = with_adapters(plain(family_model(name)), TARGETS.get(name, ("attention", "mlp")))
    expected = plain_loss(model, row)
    expected.backward()
    theirs = gradients(model)
    adapters.apply_fused_adapters(model)
    student = loop.Student(model, losses.next_token)
    apply_packed_attention(model)
    found = student(**one_row_batch([row]))["loss"]
    found.backward()
    assert found.item() == pytest.approx(expected.item(), abs=2e-5)
    torch.testing.assert_close(gradients(model), theirs, atol=2e-5, rtol=2e-3)


@pytest.mark.parametrize("name", TRAINED)
def test_merged_weights_are_pefts_and_give_the_logits_of_the_adapter(name, family_model, row):
    model = with_adapters(plain(family_model(name)), TARGETS.get(name, ("attention", "mlp")))
    ids, merged = row["input_ids"][None, :20], adapters.merged_weights(model, torch.float32)
    with torch.no_grad():
        adapted, bare = model(ids).logits, plain(family_model(name))
        for at, layer in adapters.adapter_layers(model).items():
            layer.merge()
            torch.testing.assert_close(merged[at], layer.base_layer.weight)
            bare.get_submodule(at).weight.data = merged[at]
        torch.testing.assert_close(bare(ids).logits, adapted, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_cannot_be_trained_is_refused_with_what_can(name, family_model):
    model = plain(family_model(name))
    with pytest.raises(ValueError, match=REFUSED[name]):
        _ = apply_packed_attention(model) or adapters.attach_adapters(model, rank=2)


@pytest.mark.parametrize("name", PLAIN)
def test_scored_distributions_are_those_of_plain_transformers_logits(name, family_model, row):
    model, ids = plain(family_model(name)), row["input_ids"][None, :20]
    with torch.no_grad():
        expected = model(ids).logits[0].log_softmax(-1)
        found = predict.log_probabilities(predict.hidden_states(model, ids)[0], *predict.output_head(model))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_logits_that_are_made_in_another_way_are_refused_by_family(family_model):
    """A scale that the configuration does not name, as a family to come may have one."""
    model = plain(family_model("llama"))
    model.forward = lambda *args, forward=model.forward, **more: _halved(forward(*args, **more))
    with pytest.raises(ValueError, match="llama models make logits of their hidden states in a way that is not known"):
        predict.output_head(model)


def _halved(outputs):
    outputs.logits = outputs.logits / 2
    return outputs


@pytest.mark.parametrize("form", ["online", "sampled", "topk"])
@pytest.mark.parametrize(("student", "teacher"), [("granite", "gemma2"), ("gemma2", "granite")])
def test_a_teachers_divergence_is_that_of_both_models_own_logits(student, teacher, form, family_model, row):
    """Also where one of them caps and the other scales its logits; stored targets are given dense here."""
    models = [plain(family_model(name)) for name in (student, teacher)]
    keep = row["labels"] != IGNORED
    q, p = (
        torch.cat([model(ids[None]).logits[0] for ids, _ in examples(row)]).detach()[keep].div(2).log_softmax(-1)
        for model in models
    )
    recipe, batch = Recipe(temperature=2.0, teacher=form), one_row_batch([row])
    if form != "online":
        batch["target_ids"] = torch.arange(1024).expand(1, sum(LENGTHS), 1024)
        batch["target_weights"] = torch.zeros(1, sum(LENGTHS), 1024)
        batch["target_weights"][0, keep] = p.exp()
        batch["target_entropy"] = torch.zeros(1, sum(LENGTHS))
        batch["target_entropy"][0, keep] = -(p.exp() * p).sum(-1)
    for model in models:
        apply_packed_attention(model)
    loss = Objective(recipe, models[0], models[1] if form == "online" else None, (), (), "t")
    found = loop.Student(models[0], loss)(**batch)["loss"]
    expected = 4 * F.kl_div(q, p, log_target=True, reduction="batchmean")
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("name", ["mistral-sliding", "gemma2", "gpt2"])
def test_attention_that_cannot_be_computed_again_is_refused_by_family(name, family_model):
    model = plain(family_model(name))
    with pytest.raises(ValueError, match=f"attention of {model.config.model_type} models cannot be matched here"):
        losses.refuse_other_attention(model)
    losses.refuse_other_attention(plain(family_model("llama")))


def test_stored_targets_are_of_the_teachers_own_distribution(family_model, row):
    teacher = plain(family_model("gemma2"))
    with torch.no_grad():
        expected = torch.cat([teacher(ids[None]).logits[0, :-1] for ids, _ in examples(row)]).log_softmax(-1)
    apply_packed_attention(teacher)
    with torch.no_grad():
        found = torch.cat(list(distill.targets.distributions(teacher, row, 1.0)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
