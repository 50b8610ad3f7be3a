"""LongLoRA: shifted groups by pencil, no leak, oracles (transformers' scalings, full attention), training, refusals."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from avalab.data.packing import one_row_batch
from avalab.lab.errors import InputError
from avalab.measure import context
from avalab.models import attention, checkpoint, predict
from avalab.models.attention import apply_packed_attention
from avalab.train import long_context, loop, losses
from avalab.train.recipes import SCALINGS, AdapterRecipe, ContextRecipe, Schedule

pytestmark = pytest.mark.usefixtures("few_docstrings")

RECIPE = ContextRecipe(
    factor=2, training=AdapterRecipe(rank=4, schedule=Schedule(learning_rate=1e-3, checkpoint_every=2))
)


@pytest.fixture(scope="module")
def rows(run, base):
    return long_context.context_rows(run, base, tokens=128, count=4, group_share=0.25)


def hidden_of(model, ids, group):
    given = {"input_ids": ids[None], "boundaries": torch.tensor([0, len(ids)])}
    more = {} if group is None else {"group": torch.tensor(group)}
    return model.base_model(**given, **more, use_cache=False).last_hidden_state[0]


@pytest.fixture(scope="module")
def wide(base):
    model = checkpoint.load_model(base, dtype=torch.float64)
    apply_packed_attention(model)
    return model


def test_groups_of_four_in_ten_tokens_by_pencil():
    """Half the heads see 0-3, 4-7, 8-9; the other half 0-1, 2-5, 6-9: the end and the beginning are no group."""
    assert attention._grouped([0, 10], 4, 0).tolist() == [0, 4, 8, 10]
    assert attention._grouped([0, 10], 4, 2).tolist() == [0, 2, 6, 10]
    assert attention._grouped([0, 5, 10], 4, 2).tolist() == [0, 2, 5, 7, 10]  # never over an example's end


@pytest.mark.parametrize("group", [16, None])
def test_changing_later_tokens_never_changes_earlier_ones(wide, group):
    ids = torch.arange(64) * 37 % 1000
    before = hidden_of(wide, ids, group)
    for changed in (63, 40, 16, 9):
        other = ids.clone()
        other[changed:] = (other[changed:] + 11) % 1000
        after = hidden_of(wide, other, group)
        assert torch.equal(after[:changed], before[:changed])
        assert not torch.equal(after[changed:], before[changed:])


def test_a_group_as_long_as_the_row_is_full_attention_for_the_half_that_is_not_shifted(wide):
    query, key, value = (torch.randn(1, 4, 32, 8, dtype=torch.float64) for _ in range(3))
    module = wide.base_model.layers[0].self_attn
    whole, _ = attention.packed_attention(module, query, key, value, None)
    grouped, _ = attention.packed_attention(module, query, key, value, None, group=torch.tensor(32))
    torch.testing.assert_close(grouped[:, :, :2], whole[:, :, :2])
    torch.testing.assert_close(grouped[:, :16, 2:], whole[:, :16, 2:])  # the shifted half: two groups of sixteen
    alone, _ = attention.packed_attention(module, query[:, :, 16:], key[:, :, 16:], value[:, :, 16:], None)
    torch.testing.assert_close(grouped[:, 16:, 2:], alone[:, :, 2:])


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_stretched_model_is_what_transformers_makes_of_its_configuration(run, base, scaling):
    found = long_context.stretched(base, factor=2, scaling=scaling)
    theirs = AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.float32)
    ours = checkpoint.load_model(base, dtype=torch.float32)
    before = ours.config.max_position_embeddings
    long_context.apply_stretch(ours, factor=2, scaling=scaling)
    assert theirs.config.max_position_embeddings == 2 * before == ours.config.max_position_embeddings
    ids = torch.arange(50)[None]
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert not torch.equal(ours(ids).logits, checkpoint.load_model(base, dtype=torch.float32)(ids).logits)


def test_linear_scaling_by_two_puts_token_2n_where_token_n_was(base):
    plain, scaled = (checkpoint.load_model(base, dtype=torch.float32) for _ in range(2))
    long_context.apply_stretch(scaled, factor=2, scaling="linear")
    x, places = torch.zeros(1, 1), torch.tensor([[7]])
    before = plain.base_model.rotary_emb(x, places)
    after = scaled.base_model.rotary_emb(x, 2 * places)
    torch.testing.assert_close(after, before)


def test_training_learns_norms_and_embedding_too_and_the_artefact_has_them(run, base, rows):
    made = long_context.train_longer(base, rows, run=run, name="longer", recipe=RECIPE)
    assert made.format == "bf16"
    before, after = checkpoint.load_model(base), checkpoint.load_model(made)
    assert after.config.rope_parameters["rope_type"] == "linear"
    changed = {n for (n, a), b in zip(before.named_parameters(), after.parameters(), strict=True) if not a.equal(b)}
    assert "model.embed_tokens.weight" in changed
    assert "model.layers.0.self_attn.q_proj.weight" in changed
    assert any("norm" in name for name in changed)
    stretched = long_context.stretched(base, factor=2, scaling="linear")
    window = rows[0]["input_ids"][None]
    lost = [context.position_losses(a, window, run.artifacts_dir / "cache", "cpu").mean() for a in (stretched, made)]
    assert lost[1] < lost[0]


def test_the_same_recipe_is_not_trained_twice(run, base, rows, monkeypatch):
    first = long_context.train_longer(base, rows, run=run, name="longer", recipe=RECIPE)
    monkeypatch.setattr(loop, "fit", lambda *_, **__: pytest.fail("trained again"))
    assert long_context.train_longer(base, rows, run=run, name="longer", recipe=RECIPE).sha256 == first.sha256


def test_gradients_of_grouped_training_agree_with_a_mask_that_says_the_same(base, rows):
    """The oracle is dense attention of each half of the heads under its own mask of groups."""
    model = checkpoint.load_model(base, dtype=torch.float64)
    apply_packed_attention(model)
    module = model.base_model.layers[0].self_attn
    query = torch.randn(1, 4, 24, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(1, 2, 24, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ours, _ = attention.packed_attention(module, query, key, value, None, group=torch.tensor(8))
    place = torch.arange(24)
    masks = [(place[:, None] // 8 == place // 8), ((place[:, None] + 4) // 8 == (place + 4) // 8)]
    seen = torch.stack([masks[head // 2] & (place[:, None] >= place) for head in range(4)])
    scores = query @ key.repeat_interleave(2, 1).mT / 8**0.5
    p = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    theirs = (p @ value.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(ours, theirs)
    outer = torch.randn_like(ours)
    both = [torch.autograd.grad(out, (query, key, value), outer) for out in (ours, theirs)]
    torch.testing.assert_close(*both)


def test_rows_carry_their_group_into_the_loss(base, rows):
    model = checkpoint.load_model(base)
    model.requires_grad_(True)
    apply_packed_attention(model)
    student = loop.Student(model, losses.next_token)
    sparse = student(**one_row_batch([rows[0]]))["loss"]
    dense = student(**one_row_batch([{k: v for k, v in rows[0].items() if k != "group"}]))["loss"]
    assert sparse.isfinite()
    assert sparse != dense


# --- what it is worth -------------------------------------------------------------------------------------------------


def test_losses_by_position_are_those_of_the_model_and_fill_every_stretch(run, base, rows):
    window = torch.stack([row["input_ids"] for row in rows[:2]])
    nll = context.record_positions(run, "base", base, window, parts=4)
    logits = checkpoint.load_model(base)(window).logits.float().log_softmax(-1)
    theirs = -logits[:, :-1].gather(2, window[:, 1:, None])[..., 0]
    torch.testing.assert_close(nll, theirs, rtol=0.02, atol=0.05)  # the head in float32, or in bf16
    found = [record for record in run.records if record.subject == "base"]
    assert [record.metric for record in found] == [
        f"perplexity:{a}_{b}" for a, b in ((0, 32), (32, 64), (64, 96), (96, 127))
    ]


def test_a_pass_key_lies_at_its_depth_and_fits(base):
    tokenizer = checkpoint.load_tokenizer(base)
    for depth, prompt, answer in context.passkey_prompts(tokenizer, tokens=300, depths=(0.0, 1.0), count=2, seed=0):
        assert len(prompt) + len(answer) <= 300
        text, key = tokenizer.decode(prompt), tokenizer.decode(answer).strip()
        assert len(key) == 5
        place = text.index(f"The pass key is {key}.") / len(text)
        assert (place < 0.1) if depth == 0 else (place > 0.5)


def test_a_pass_key_is_found_exactly_when_greedy_decoding_writes_it(base):
    model = checkpoint.load_model(base, dtype=torch.float32)
    prompt = torch.arange(3, 23)[None]
    with torch.no_grad():
        written = model.generate(prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False)[0, 20:].tolist()
    assert context.finds_passkey(model, prompt[0].tolist(), written)
    assert not context.finds_passkey(model, prompt[0].tolist(), [written[0], written[1], (written[2] + 1) % 1000])


# --- refusals -----------------------------------------------------------------------------------------------------


def test_what_cannot_be_stretched_is_refused(run, base):
    twice = long_context.stretched(base, factor=2, scaling="linear")
    with pytest.raises(InputError, match=r"are scaled already \(linear\)"):
        long_context.stretched(twice, factor=2, scaling="yarn")
    with pytest.raises(InputError, match="it has to be even"):
        long_context.context_rows(run, base, tokens=60, count=1, group_share=0.25)
    with pytest.raises(InputError, match="no rotary positions"):
        long_context.rope_of(replace_rope(base), factor=2, scaling="linear")
    with pytest.raises(InputError, match="does not fit into 20 tokens"):
        next(context.passkey_prompts(checkpoint.load_tokenizer(base), tokens=20, depths=(0.5,), count=1, seed=0))


def replace_rope(base):
    config = checkpoint.load_model(base).config
    config.rope_parameters = None
    return config


@pytest.mark.parametrize(
    ("bad", "said"),
    [({"scaling": "ntk"}, "linear, llama3, yarn"), ({"factor": 0.5}, "factor is 0.5"), ({"group_share": 0}, "above 0")],
)
def test_a_recipe_that_stretches_nothing_is_refused(bad, said):
    with pytest.raises(InputError, match=said):
        replace(RECIPE, **bad)


def test_inputs_of_a_packed_row_are_the_ones_that_attention_takes():
    assert set(predict.INPUTS) - {"input_ids", "position_ids"} == {"boundaries", "forks", "group"}
