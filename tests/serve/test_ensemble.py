"""Ensembles: pools and their weights, an ensemble that decodes, votes, and when to ask the larger model."""

import json
from math import inf, log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from transformers import DynamicCache, PreTrainedTokenizerFast

from avalab.data import calls, grammars
from avalab.lab import artifacts
from avalab.measure import answers
from avalab.models import checkpoint
from avalab.serve import ensemble

EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True, database=None)
EQUAL = torch.tensor([0.5, 0.5])
PROMPTS = ["<|im_start|>user\nAdd 1 and 2.<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>user\nWhat is a list?"]
WORDS = st.lists(st.sampled_from("abc"), min_size=1, max_size=7)
ITEMS = st.lists(
    st.tuples(st.sampled_from([0.1, 0.2, 0.3, 0.9]), st.floats(0, 4), st.floats(0, 4)), min_size=1, max_size=9
)


def logs(*rows: list[float]) -> torch.Tensor:
    """Log-probabilities of one token, a row for each member."""
    return torch.tensor(rows).log()[:, None]


@st.composite
def targets(draw):
    members, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    values = st.floats(-30, -1e-3)
    return torch.tensor(
        draw(st.lists(st.lists(values, min_size=tokens, max_size=tokens), min_size=members, max_size=members))
    )


# --- pools -----------------------------------------------------------------------------------------------------------


def test_the_mean_of_a_sure_coin_and_a_fair_one_is_three_quarters():
    """(0.9 + 0.5) / 2 = 0.7 and (0.1 + 0.5) / 2 = 0.3."""
    pooled = ensemble.pool_probabilities(logs([0.9, 0.1], [0.5, 0.5]), EQUAL).exp()
    torch.testing.assert_close(pooled, torch.tensor([[0.7, 0.3]]))


def test_the_mean_of_logits_is_the_normalised_geometric_mean():
    """sqrt(0.9 x 0.5) : sqrt(0.1 x 0.5) = 3 : 1, so 0.75 and 0.25."""
    pooled = ensemble.pool_logits(logs([0.9, 0.1], [0.5, 0.5]), EQUAL).exp()
    torch.testing.assert_close(pooled, torch.tensor([[0.75, 0.25]]))


def test_adding_a_constant_to_a_members_logits_changes_nothing():
    members = torch.randn(3, 4, 7)
    weights = torch.tensor([0.2, 0.3, 0.5])
    shifted = members + torch.tensor([1.0, -2.0, 5.0])[:, None, None]
    torch.testing.assert_close(ensemble.pool_logits(shifted, weights), ensemble.pool_logits(members, weights))


def test_a_cascade_asks_the_second_exactly_where_the_first_is_below_the_threshold():
    members = torch.tensor([[[0.6, 0.4], [0.9, 0.1]], [[0.2, 0.8], [0.3, 0.7]]]).log()
    expected = torch.tensor([[0.2, 0.8], [0.9, 0.1]])
    torch.testing.assert_close(ensemble.pool_cascade(members, 0.7).exp(), expected)


@pytest.mark.parametrize("pool", [ensemble.pool_logits, ensemble.pool_probabilities])
def test_every_pool_gives_distributions_and_leaves_equal_members_as_they_are(pool):
    member = torch.randn(5, 11).log_softmax(-1)
    weights = torch.tensor([0.7, 0.0, 0.3])
    torch.testing.assert_close(pool(member.expand(3, -1, -1), weights), member, atol=1e-5, rtol=0)
    pooled = pool(torch.randn(3, 5, 11).log_softmax(-1), weights)
    torch.testing.assert_close(pooled.exp().sum(-1), torch.ones(5))


def test_a_member_of_weight_zero_has_no_say_even_where_it_excludes_a_token():
    members = logs([0.5, 0.5], [1.0, 0.0])
    pooled = ensemble.pool_probabilities(members, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(pooled.exp(), torch.tensor([[0.5, 0.5]]))


def test_the_linear_pool_is_nowhere_further_from_a_target_than_its_members_are_on_average():
    """KL(q || sum w p) <= sum w KL(q || p): the divergence is convex."""
    members, target = torch.randn(3, 20, 9).log_softmax(-1), torch.randn(20, 9).log_softmax(-1)
    divergence = lambda p: (target.exp() * (target - p)).sum(-1)  # noqa: E731  a formula of one line
    weights = torch.tensor([0.2, 0.5, 0.3])
    average = (weights[:, None] * torch.stack([divergence(m) for m in members])).sum(0)
    assert (divergence(ensemble.pool_probabilities(members, weights)) <= average + 1e-6).all()


# --- weights ---------------------------------------------------------------------------------------------------------


def mixture_loss(targets: torch.Tensor, weights) -> float:
    """Of the linear pool, in nats, from each member's log p of the tokens."""
    pooled = ensemble.pool_probabilities(targets.double()[..., None], torch.tensor(weights, dtype=torch.float64))
    return -float(pooled.mean())


def test_two_members_that_are_each_right_on_one_token_of_three_and_two_share_by_count():
    """log w + 2 log (1 - w), the losses of members that give the other's tokens (almost) nothing: w = 1/3."""
    tiny = 1e-12
    weights = ensemble.fit_weights(torch.tensor([[1.0, tiny, tiny], [tiny, 1.0, 1.0]]).log())
    assert weights == pytest.approx((1 / 3, 2 / 3), abs=1e-4)
    expected = -(log(1 / 3) + 2 * log(2 / 3)) / 3
    assert mixture_loss(torch.tensor([[1.0, tiny, tiny], [tiny, 1.0, 1.0]]).log(), weights) == pytest.approx(expected)


def test_a_member_that_is_better_on_every_token_gets_all():
    assert ensemble.fit_weights(torch.tensor([[-1.0, -1.0], [-2.0, -3.0]])) == pytest.approx((1, 0), abs=1e-4)


@given(targets())
@EXAMPLES
def test_fitted_weights_lie_on_the_simplex_and_lose_no_more_than_any_member_or_equal_weights(found):
    weights = ensemble.fit_weights(found)
    assert min(weights) >= 0
    assert sum(weights) == pytest.approx(1)
    count = len(found)
    corners = [[float(i == j) for j in range(count)] for i in range(count)] + [[1 / count] * count]
    best = min(mixture_loss(found, corner) for corner in corners)
    assert mixture_loss(found, weights) <= best + 1e-4


@given(targets(), st.floats(0, 1))
@EXAMPLES
def test_the_loss_of_a_mixture_is_convex_in_its_weights(found, share):
    one, other = torch.rand(2, len(found)).add(0.01)
    one, other = one / one.sum(), other / other.sum()
    between = mixture_loss(found, (share * one + (1 - share) * other).tolist())
    ends = [mixture_loss(found, end.tolist()) for end in (one, other)]
    assert between <= share * ends[0] + (1 - share) * ends[1] + 1e-5


def test_the_fit_agrees_with_a_general_solver():
    found = torch.randn(3, 200, dtype=torch.float64).mul(2).sub(3).clamp(max=-0.01)
    solved = minimize(
        lambda w: mixture_loss(found, w.clip(0, 1).tolist()),
        [1 / 3] * 3,
        method="SLSQP",
        bounds=[(0, 1)] * 3,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
    )
    weights = ensemble.fit_weights(found)
    assert mixture_loss(found, weights) == pytest.approx(solved.fun, abs=2e-6)
    assert weights == pytest.approx(tuple(solved.x), abs=0.01)


@pytest.mark.parametrize("bad", [torch.zeros(2, 0), torch.tensor([[float("-inf"), -1.0]])])
def test_weights_without_finite_tokens_are_refused(bad):
    with pytest.raises(ValueError, match="finite log-probabilities of held-out tokens"):
        ensemble.fit_weights(bad)


# --- ensembles of artefacts ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stranger(base, tmp_path_factory):
    """The same weights with another vocabulary."""

    def save(folder):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(base.path)
        tokenizer.add_tokens(["a-word-of-its-own"])
        tokenizer.save_pretrained(folder)

    about = {"base": {"name": "b", "sha256": ""}, "recipe": [], "format": "bf16"}
    return artifacts.write_artifact("stranger", tmp_path_factory.mktemp("other"), save, **about)


def test_bytes_are_summed_and_one_artefact_that_stands_twice_is_stored_once(quantised):
    assert ensemble.assemble(quantised, "mean").bytes == quantised[0].bytes + quantised[1].bytes
    assert ensemble.assemble([quantised[0], quantised[0]], "mean").bytes == quantised[0].bytes
    assert ensemble.assemble(quantised, "mean").as_artifact().bytes == quantised[0].bytes + quantised[1].bytes


def test_ensembles_that_differ_in_anything_have_another_identity(quantised):
    made = [
        ensemble.assemble(quantised, "mean"),
        ensemble.assemble(quantised[::-1], "mean"),
        ensemble.assemble(quantised, "logits"),
        ensemble.assemble(quantised, "weighted", weights=[0.4, 0.6]),
        ensemble.assemble(quantised, "cascade", threshold=0.5),
        ensemble.assemble(quantised, "mean", temperature=1.0, draw=1),
        ensemble.assemble(quantised, "mean", temperature=1.0, draw=2),
    ]
    assert len({e.as_artifact().sha256 for e in made}) == len(made)
    assert ensemble.assemble(quantised, "mean").as_artifact().sha256 == made[0].as_artifact().sha256


def test_distributions_over_different_vocabularies_are_refused_in_one_line_that_names_both(quantised, stranger):
    with pytest.raises(
        ValueError, match=rf"{quantised[0].name[:10]}.* and stranger have different tokenizers.*vote"
    ) as e:
        ensemble.assemble([quantised[0], stranger], "mean")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("method", "how", "says"),
    [
        ("median", {}, "unknown method 'median'; distributions: mean, logits, weighted, cascade"),
        ("weighted", {"weights": [0.7, 0.7]}, "sum to 1"),
        ("weighted", {"weights": [1.5, -0.5]}, ">= 0"),
        ("weighted", {"weights": [1.0]}, "2 members need as many weights"),
        ("mean", {"weights": [0.5, 0.5]}, "has no weights"),
    ],
)
def test_what_makes_no_ensemble_is_refused(quantised, method, how, says):
    with pytest.raises(ValueError, match=says):
        ensemble.assemble(quantised, method, **how)


def test_nobody_and_a_cascade_of_three_are_refused(quantised):
    with pytest.raises(ValueError, match="at least one member"):
        ensemble.assemble([], "mean")
    with pytest.raises(ValueError, match="a small and a large member, got 3"):
        ensemble.assemble([*quantised, quantised[0]], "cascade")


# --- an ensemble that decodes ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_base(base, quantised):
    return [base, quantised[0]]


@pytest.fixture(scope="module")
def both(with_base):
    return [checkpoint.load_model(artifact) for artifact in with_base]


def tokens(respondent, text: str) -> torch.Tensor:
    return respondent.tokenizer(text, return_tensors="pt").input_ids


def test_an_ensemble_of_one_answers_as_that_one_does(respondent, with_base):
    alone = dict(grammars.greedy_answers(respondent.model, respondent.tokenizer, PROMPTS, max_new_tokens=12))
    choir = ensemble.respondent(ensemble.assemble(with_base[:1], "mean"))
    assert dict(grammars.greedy_answers(choir.model, choir.tokenizer, PROMPTS, max_new_tokens=12)) == alone


@pytest.mark.parametrize("method", ["mean", "logits"])
def test_the_pool_is_that_of_the_members_own_distributions(method, with_base, both, respondent):
    about = ensemble.assemble(with_base, method)
    ids = tokens(respondent, PROMPTS[0])
    with torch.inference_mode():
        expected = torch.stack([m(ids).logits[0].float().log_softmax(-1) for m in both])
        found = ensemble.Mixture(both, about)(ids).logits[0]
    torch.testing.assert_close(found, ensemble.pooled(about, expected))


def test_steps_over_a_common_cache_agree_with_one_pass_over_the_whole_text(with_base, both, respondent):
    model, ids = ensemble.Mixture(both, ensemble.assemble(with_base, "mean")), tokens(respondent, PROMPTS[0])
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        whole = model(ids).logits[0, -1]
        model(ids[:, :-3], past_key_values=cache)
        for position in range(ids.shape[1] - 3, ids.shape[1]):
            last = model(ids[:, position : position + 1], past_key_values=cache).logits[0, -1]
    assert len(cache.layers) == sum(m.config.num_hidden_layers for m in both)
    assert {layer.get_seq_length() for layer in cache.layers} == {ids.shape[1]}
    assert (last - whole).abs().max() < 0.1, "bf16 arithmetic of one token against many"


def test_an_ensemble_answers_cases_under_a_grammar_and_is_read_back_after_that(run, with_base, monkeypatch):
    choir = ensemble.respondent(ensemble.assemble(with_base, "mean"))
    how = {"category": "toolbox_multiple", "mode": "forced", "limit": 3}
    verdicts = answers.record_calls(run, "mean-2", choir, **how)
    assert run.records[-1].artifact_sha256 == choir.artifact.sha256
    monkeypatch.setattr(checkpoint, "load_model", lambda *_: pytest.fail("the answers were known"))
    assert answers.record_calls(run, "mean-2", ensemble.respondent(choir.about), **how) == verdicts


def test_noise_draws_from_the_tempered_distribution(with_base, both):
    """p = (0.8, 0.2) at temperature 2: sqrt 0.8 : sqrt 0.2 = 2 : 1, so two thirds."""
    model = ensemble.Mixture(both[:1], ensemble.assemble(with_base[:1], "mean", temperature=2.0, draw=3))
    pooled = torch.tensor([0.8, 0.2]).log().expand(20_000, 2)
    share = float((model._drawn(pooled).argmax(-1) == 0).float().mean())
    assert share == pytest.approx(2 / 3, abs=3 * (2 / 9 / 20_000) ** 0.5)


def test_draws_with_a_seed_repeat_and_another_seed_draws_anew(with_base, respondent):
    def drawn(seed: int) -> list[str]:
        choir = ensemble.respondent(ensemble.assemble(with_base[:1], "mean", temperature=1.5, draw=seed))
        return [text for _, text in grammars.greedy_answers(choir.model, choir.tokenizer, PROMPTS, max_new_tokens=12)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_a_temperature_of_zero_draws_nothing(with_base, both):
    model = ensemble.Mixture(both[:1], ensemble.assemble(with_base[:1], "mean"))
    pooled = torch.randn(3, 5)
    assert model._drawn(pooled) is pooled


def test_members_with_another_number_of_logits_are_refused(both, with_base, monkeypatch):
    monkeypatch.setattr(both[1].config, "vocab_size", 7)
    with pytest.raises(ValueError, match=r"members have 7 and \d+ logits"):
        ensemble.Mixture(both, ensemble.assemble(with_base, "mean"))


def test_an_unsampled_case_prompt_is_that_of_the_first_member(with_base, respondent):
    (case,) = calls.cases("toolbox_simple", 1)
    choir = ensemble.respondent(ensemble.assemble(with_base, "mean"))
    assert calls.case_prompt(choir.tokenizer, case) == calls.case_prompt(respondent.tokenizer, case)


# --- votes -----------------------------------------------------------------------------------------------------------


def call(name: str = "add", **arguments) -> str:
    return f"<tool_call>{json.dumps([{'name': name, 'arguments': arguments}])}</tool_call>"


def test_two_of_three_win_with_two_thirds():
    assert ensemble.elect(["b", "a", "a"], ensemble.text_key) == ensemble.Vote(1, 2 / 3)


def test_a_tie_goes_to_the_answer_that_came_first():
    assert ensemble.elect(["b", "a", "a", "b"], ensemble.text_key).voter == 0
    assert ensemble.elect(["a", "b"], ensemble.text_key) == ensemble.Vote(0, 0.5)


def test_calls_are_equal_however_their_arguments_are_ordered():
    assert ensemble.call_key(call(a=1, b="x")) == ensemble.call_key(call(b="x", a=1))
    assert ensemble.call_key("add(a=1, b='x')") == ensemble.call_key(call(a=1, b="x"))
    assert ensemble.call_key(call(a=1)) != ensemble.call_key(call(a=2))
    assert ensemble.call_key(call("sub", a=1)) != ensemble.call_key(call(a=1))


def test_every_refusal_is_the_same_answer_and_a_damaged_call_abstains():
    assert ensemble.call_key("No tool fits.") == ensemble.call_key("I cannot do that.") == ""
    assert ensemble.call_key("<tool_call>[{") is None
    assert ensemble.elect(["<tool_call>[{", "<tool_call>[{", call(a=1)]) == ensemble.Vote(2, 1 / 3)


def test_where_all_abstain_the_first_one_speaks_and_nobody_agrees():
    assert ensemble.elect(["<tool_call>[{", "<tool_call>{"]) == ensemble.Vote(0, 0.0)


def test_each_question_is_voted_on_alone():
    columns = [["a", "x"], ["b", "x"], ["b", "y"]]
    assert ensemble.plurality(columns, ensemble.text_key) == (["b", "x"], [2 / 3, 2 / 3])


@given(WORDS)
@EXAMPLES
def test_the_winner_has_the_most_votes_and_is_the_first_of_those_that_do(words):
    found = ensemble.elect(words, ensemble.text_key)
    winner = words[found.voter]
    most = max(words.count(word) for word in words)
    assert words.count(winner) == most
    assert found.agreement == most / len(words)
    assert not any(words.count(word) == most for word in words[: found.voter])


@given(WORDS)
@EXAMPLES
def test_one_more_vote_for_the_winner_changes_nothing(words):
    winner = words[ensemble.elect(words, ensemble.text_key).voter]
    more = [*words, winner]
    assert more[ensemble.elect(more, ensemble.text_key).voter] == winner


def test_nobody_and_voters_with_different_questions_are_refused():
    with pytest.raises(ValueError, match="at least one answer"):
        ensemble.elect([])
    with pytest.raises(ValueError, match="voters answered 1, 2 questions"):
        ensemble.plurality([["a"], ["a", "b"]])


# --- when to ask the larger model ------------------------------------------------------------------------------------


def test_the_fewest_unsure_items_that_close_nine_tenths_of_the_gap_are_sent():
    """Gains 1, 0, 1, 0 by rising confidence: nine tenths of 2 need the first three of four."""
    rule = ensemble.choose_threshold([0.2, 0.4, 0.6, 0.9], [1, 0, 1, 0], [0, 0, 0, 0])
    assert rule == ensemble.Rule(0.9, 0.75, 0.0)
    half = ensemble.choose_threshold([0.2, 0.4, 0.6, 0.9], [1, 0, 1, 0], [0, 0, 0, 0], recovered=0.5)
    assert half == ensemble.Rule(0.4, 0.25, 0.25)
    assert half.deferred([0.39, 0.4]) == [True, False]


def test_items_of_equal_confidence_go_together():
    rule = ensemble.choose_threshold([0.5, 0.5, 0.8], [1, 0, 0], [0, 0, 0])
    assert rule == ensemble.Rule(0.8, 2 / 3, 0.0)


def test_a_large_model_that_is_no_better_is_never_asked():
    rule = ensemble.choose_threshold([0.1, 0.9], [0, 1], [1, 0])
    assert rule == ensemble.Rule(-inf, 0.0, 0.5)
    assert rule.deferred([0.0, 1.0]) == [False, False]


def test_where_everything_must_go_the_threshold_is_infinite():
    rule = ensemble.choose_threshold([0.1, 0.9], [1, 1], [0, 0], recovered=1.0)
    assert rule == ensemble.Rule(inf, 1.0, 0.0)


@given(ITEMS, st.floats(0, 1))
@EXAMPLES
def test_the_rule_keeps_its_promise_on_the_items_it_was_chosen_on(items, recovered):
    sure, small, large = zip(*items, strict=True)
    rule = ensemble.choose_threshold(sure, small, large, recovered=recovered)
    sent = rule.deferred(sure)
    loss = sum(b if go else a for go, a, b in zip(sent, small, large, strict=True)) / len(items)
    assert loss == pytest.approx(rule.loss, abs=1e-9)
    assert sum(sent) / len(items) == rule.share
    gap = max(0.0, sum(small) - sum(large)) / len(items)
    assert loss <= sum(small) / len(items) - recovered * gap + 1e-9


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (([], [], []), "at least 1"),
        (([0.1], [1, 2], [1]), "1 confidences for 2 and 1 losses"),
        (([float("nan")], [1], [1]), "must be finite"),
    ],
)
def test_what_no_rule_can_be_chosen_from_is_refused(given, says):
    with pytest.raises(ValueError, match=says):
        ensemble.choose_threshold(*given)


def test_more_than_the_whole_gap_cannot_be_recovered():
    with pytest.raises(ValueError, match=r"1\.5 cannot be recovered"):
        ensemble.choose_threshold([0.1], [1], [0], recovered=1.5)
