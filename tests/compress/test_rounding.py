"""Error-compensated rounding on small random matrices."""

import itertools

import pytest
import torch

from avalab.compress import rounding
from avalab.kernels import formats
from avalab.kernels.formats import Grid
from avalab.models import walk


def correlated(columns: int = 64, rows: int = 24, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the second moment of correlated inputs of uneven size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(400, columns, generator=generator) @ (mixing + 0.5 * torch.eye(columns))
    inputs *= torch.linspace(0.2, 3, columns)
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs / 400


def plain(weight: torch.Tensor, grid: Grid) -> formats.Rounded:
    """Round to nearest between the extremes, as a method without calibration does."""
    groups = weight.unflatten(1, (-1, grid.group_size))
    scales, zeros = rounding.grid_of_range(groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0), grid)
    codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(grid.low, grid.high).flatten(1)
    return formats.Rounded(grid, codes.to(torch.int8), scales.bfloat16(), zeros.to(torch.int8))


def test_two_columns_by_hand_the_second_makes_up_for_the_first():
    """H = [[1, .9], [.9, 1]]; 0.5 rounds to 0 on the grid of integers, and the second column takes 0.9 x 0.5 of it."""
    posed = rounding.rounding_problem(torch.tensor([[1.0, 0.9], [0.9, 1.0]]), damping=1e-7)
    grid, one, zero = Grid(4, 2), torch.ones(1, 1), torch.zeros(1, 1)
    codes = rounding.compensated(torch.tensor([[0.4, 1.2]]), posed, grid, one, zero)
    assert codes.tolist() == [[0.0, 2.0]]  # 1.2 + 0.9 * 0.4 = 1.56


def test_the_cost_of_a_column_is_what_remains_after_the_later_ones_made_up_for_it():
    """The first of two columns: 1 - 0.9^2 = 0.19; the last one pays in full."""
    posed = rounding.rounding_problem(torch.tensor([[1.0, 0.9], [0.9, 1.0]]), damping=1e-7)
    torch.testing.assert_close(posed.column_cost, torch.tensor([0.19, 1.0]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_compensation_beats_rounding_to_nearest_and_repair_beats_both(bits: int, symmetric: bool):
    weight, moment = correlated()
    grid, posed = Grid(bits, 32, symmetric), rounding.rounding_problem(moment)
    errors = [
        float(rounding.output_error(weight, rounded, moment).sum())
        for rounded in (
            plain(weight, grid),
            rounding.round_weight(weight, posed, grid, repairs=0),
            rounding.round_weight(weight, posed, grid, repairs=2),
        )
    ]
    assert errors[0] > errors[1] > errors[2]


def test_each_step_of_the_repair_never_raises_the_error():
    weight, moment = correlated(seed=1)
    grid, posed = Grid(3, 32), rounding.rounding_problem(moment)
    moment = posed.moment  # what is minimised
    scales, zeros = rounding.search(weight, posed.column_cost, grid)
    codes = rounding.compensated(weight, posed, grid, scales, zeros)
    errors = []
    for _ in range(3):
        for step in ("scales", "codes"):
            if step == "scales":
                scales = rounding.refit(weight, moment, grid, codes, scales, zeros)
            else:
                codes = rounding.descended(weight, posed, grid, codes, scales=scales, zeros=zeros)
            rounded = formats.Rounded(grid, codes.to(torch.int8), scales.bfloat16(), zeros.to(torch.int8))
            errors.append(float(rounding.output_error(weight, rounded, moment).sum()))
    assert all(after <= before * 1.001 for before, after in itertools.pairwise(errors)), errors


def test_without_correlation_compensation_is_rounding_to_nearest():
    weight, _ = correlated()
    grid, posed = Grid(4, 32), rounding.rounding_problem(torch.eye(64))
    found = rounding.round_weight(weight, posed, grid, repairs=0).decode(torch.float32)
    torch.testing.assert_close(found, rounding.round_to_nearest(weight, posed.column_cost, grid), atol=1e-6, rtol=1e-6)


def test_weights_on_the_grid_come_back_exactly():
    grid = Grid(4, 32)
    codes = torch.randint(-8, 8, (6, 64), generator=torch.Generator().manual_seed(0))
    codes[:, ::32], codes[:, 1::32] = -8, 7  # both ends are used, so the range gives the scale
    weight = (codes + 3) * 0.25
    posed = rounding.rounding_problem(correlated()[1])
    assert torch.equal(rounding.round_weight(weight, posed, grid).decode(torch.float32), weight)


def test_rows_do_not_depend_on_what_is_rounded_beside_them():
    weight, moment = correlated()
    grid, posed = Grid(3, 32), rounding.rounding_problem(moment)
    whole = rounding.round_weight(weight, posed, grid).split([10, 14])
    alone = rounding.round_weight(weight[10:], posed, grid)
    assert (whole[1].codes != alone.codes).float().mean() < 0.01  # sums may differ in their last bit
    assert torch.equal(rounding.round_weight(weight, posed, grid).codes, torch.cat([part.codes for part in whole]))


def test_aiming_gives_the_least_squares_weights_for_changed_inputs():
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(300, 16, generator=generator)
    changed = original @ (torch.eye(16) + 0.1 * torch.randn(16, 16, generator=generator))
    weight = torch.randn(4, 16, generator=generator)
    expected = torch.linalg.lstsq(changed, original @ weight.T).solution.T
    found = rounding.aim(weight, changed.T @ changed / 300, original.T @ changed / 300, damping=1e-6)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    same = changed.T @ changed / 300
    torch.testing.assert_close(rounding.aim(weight, same, same), weight)


def test_a_singular_moment_is_damped_and_columns_that_carry_nothing_are_harmless():
    moment = torch.ones(64, 64)
    moment[7], moment[:, 7] = 0, 0
    posed = rounding.rounding_problem(moment, damping=1e-12)
    assert posed.attempts > 1
    rounded = rounding.round_weight(correlated()[0], posed, Grid(4, 32))
    assert rounded.decode().isfinite().all()
    assert rounding.round_weight(
        correlated()[0], rounding.rounding_problem(torch.zeros(64, 64)), Grid(4, 32)
    ).codes.any()


@pytest.mark.parametrize("name", ["w4g64", "w3g128-sym"])
def test_a_grids_name_says_all_of_it(name: str):
    assert formats.grid_named(name).name == name


def test_what_cannot_be_rounded_is_refused():
    with pytest.raises(ValueError, match="group of 48 does not divide 64"):
        rounding.round_weight(correlated()[0], rounding.rounding_problem(torch.eye(64)), Grid(4, 48))
    with pytest.raises(ValueError, match="1 entries"):
        rounding.rounding_problem(torch.diag(torch.tensor([1.0, float("nan")])))
    with pytest.raises(ValueError, match="'w9g64'"):
        formats.grid_named("w9g64")


def test_few_tokens_a_column_are_damped_more_than_many():
    """Five a column: 0.01; three: 1; four, in the middle, 0.1."""
    assert rounding.damping_for(100, 500) == pytest.approx(0.01)
    assert rounding.damping_for(100, 400) == pytest.approx(0.1)
    assert rounding.damping_for(100, 300) == pytest.approx(1)
    assert rounding.damping_for(100, 10) == pytest.approx(1)


def test_a_walk_damps_thirty_times_as_much_up_to_one():
    """A hundred columns: 0.01 for 500 tokens becomes 0.3, 0.1 for 400 becomes 1, and 1 for 300 stays."""
    sites = [walk.Site(0, {}, torch.eye(100), torch.eye(100), tokens) for tokens in (500, 400, 300)]
    assert [rounding.damping_of(site) for site in sites] == pytest.approx([0.3, 1, 1])
