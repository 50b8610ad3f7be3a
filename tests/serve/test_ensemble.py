"""Pools of distributions and their weights: what a pencil finds, what must always hold, what is refused."""

from math import log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from transformers import PreTrainedTokenizerFast

from avalab.compress import quantize
from avalab.lab import artifacts
from avalab.serve import ensemble

EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True, database=None)
EQUAL = torch.tensor([0.5, 0.5])


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


# --- pools -------------------------------------------------------------------------------------------------------


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


# --- weights -----------------------------------------------------------------------------------------------------


def test_two_members_that_are_each_right_on_one_token_of_three_and_two_share_by_count():
    """log w + 2 log (1 - w), the losses of members that give the other's tokens (almost) nothing: w = 1/3."""
    tiny = 1e-12
    weights = ensemble.fit_weights(torch.tensor([[1.0, tiny, tiny], [tiny, 1.0, 1.0]]).log())
    assert weights == pytest.approx((1 / 3, 2 / 3), abs=1e-4)
    expected = -(log(1 / 3) + 2 * log(2 / 3)) / 3
    assert ensemble.mixture_loss(torch.tensor([[1.0, tiny, tiny], [tiny, 1.0, 1.0]]).log(), weights) == pytest.approx(
        expected
    )


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
    best = min(ensemble.mixture_loss(found, corner) for corner in corners)
    assert ensemble.mixture_loss(found, weights) <= best + 1e-4


@given(targets(), st.floats(0, 1))
@EXAMPLES
def test_the_loss_of_a_mixture_is_convex_in_its_weights(found, share):
    one, other = torch.rand(2, len(found)).add(0.01)
    one, other = one / one.sum(), other / other.sum()
    between = ensemble.mixture_loss(found, (share * one + (1 - share) * other).tolist())
    ends = [ensemble.mixture_loss(found, end.tolist()) for end in (one, other)]
    assert between <= share * ends[0] + (1 - share) * ends[1] + 1e-5


def test_the_fit_agrees_with_a_general_solver():
    found = torch.randn(3, 200, dtype=torch.float64).mul(2).sub(3).clamp(max=-0.01)
    solved = minimize(
        lambda w: ensemble.mixture_loss(found, w.clip(0, 1).tolist()),
        [1 / 3] * 3,
        method="SLSQP",
        bounds=[(0, 1)] * 3,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
    )
    weights = ensemble.fit_weights(found)
    assert ensemble.mixture_loss(found, weights) == pytest.approx(solved.fun, abs=2e-6)
    assert weights == pytest.approx(tuple(solved.x), abs=0.01)


@pytest.mark.parametrize("bad", [torch.zeros(2, 0), torch.tensor([[float("-inf"), -1.0]])])
def test_weights_without_finite_tokens_are_refused(bad):
    with pytest.raises(ValueError, match="finite log-probabilities of held-out tokens"):
        ensemble.fit_weights(bad)


# --- ensembles of artefacts --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(run, base):
    return [
        quantize.compress_artifact(base, "nf4", run=run),
        quantize.compress_artifact(base, "rtn", run=run, group_size=32),
    ]


@pytest.fixture(scope="module")
def stranger(base, tmp_path_factory):
    """The same weights with another vocabulary."""

    def save(folder):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(base.path)
        tokenizer.add_tokens(["a-word-of-its-own"])
        tokenizer.save_pretrained(folder)

    about = {"base": {"name": "b", "sha256": ""}, "recipe": [], "format": "bf16"}
    return artifacts.write_artifact("stranger", tmp_path_factory.mktemp("other"), save, **about)


def test_bytes_are_summed_and_one_artefact_that_stands_twice_is_stored_once(pair):
    assert ensemble.assemble(pair, "mean").bytes == pair[0].bytes + pair[1].bytes
    assert ensemble.assemble([pair[0], pair[0]], "mean").bytes == pair[0].bytes
    assert ensemble.assemble(pair, "mean").as_artifact().bytes == pair[0].bytes + pair[1].bytes


def test_ensembles_that_differ_in_anything_have_another_identity(pair):
    made = [
        ensemble.assemble(pair, "mean"),
        ensemble.assemble(pair[::-1], "mean"),
        ensemble.assemble(pair, "logits"),
        ensemble.assemble(pair, "weighted", weights=[0.4, 0.6]),
        ensemble.assemble(pair, "cascade", threshold=0.5),
        ensemble.assemble(pair, "mean", temperature=1.0, draw=1),
        ensemble.assemble(pair, "mean", temperature=1.0, draw=2),
    ]
    assert len({e.as_artifact().sha256 for e in made}) == len(made)
    assert ensemble.assemble(pair, "mean").as_artifact().sha256 == made[0].as_artifact().sha256


def test_distributions_over_different_vocabularies_are_refused_in_one_line_that_names_both(pair, stranger):
    with pytest.raises(ValueError, match=rf"{pair[0].name[:10]}.* and stranger have different tokenizers.*vote") as e:
        ensemble.assemble([pair[0], stranger], "mean")
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
def test_what_makes_no_ensemble_is_refused(pair, method, how, says):
    with pytest.raises(ValueError, match=says):
        ensemble.assemble(pair, method, **how)


def test_nobody_and_a_cascade_of_three_are_refused(pair):
    with pytest.raises(ValueError, match="at least one member"):
        ensemble.assemble([], "mean")
    with pytest.raises(ValueError, match="a small and a large member, got 3"):
        ensemble.assemble([*pair, pair[0]], "cascade")
