"""Error-compensated rounding on small random matrices, and a whole checkpoint of a tiny model."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from transformers import PreTrainedModel

from avalab import ava, calibration, corpora, models, packed, quality, rounded_walk, rounding
from avalab.experiment import Run
from avalab.libraries import Job
from avalab.rounding import Grid


def correlated(columns: int = 64, rows: int = 24, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the second moment of correlated inputs of uneven size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(400, columns, generator=generator) @ (mixing + 0.5 * torch.eye(columns))
    inputs *= torch.linspace(0.2, 3, columns)
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs / 400


def plain(weight: torch.Tensor, grid: Grid) -> rounding.Rounded:
    """Round to nearest between the extremes, as a method without calibration does."""
    groups = weight.unflatten(1, (-1, grid.group_size))
    scales, zeros = rounding._range_to_grid(groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0), grid)
    codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(grid.low, grid.high).flatten(1)
    return rounding.Rounded(grid, codes.to(torch.int8), scales.bfloat16(), zeros.to(torch.int8))


def test_two_columns_by_hand_the_second_makes_up_for_the_first():
    """H = [[1, .9], [.9, 1]]; 0.5 rounds to 0 on the grid of integers, and the second column takes 0.9 x 0.5 of it."""
    posed = rounding.problem(torch.tensor([[1.0, 0.9], [0.9, 1.0]]), damping=1e-7)
    grid, one, zero = Grid(4, 2), torch.ones(1, 1), torch.zeros(1, 1)
    codes = rounding.compensated(torch.tensor([[0.4, 1.2]]), posed, grid, one, zero)
    assert codes.tolist() == [[0.0, 2.0]]  # 1.2 + 0.9 * 0.4 = 1.56


def test_the_cost_of_a_column_is_what_remains_after_the_later_ones_made_up_for_it():
    """The first of two columns: 1 - 0.9^2 = 0.19; the last one pays in full."""
    posed = rounding.problem(torch.tensor([[1.0, 0.9], [0.9, 1.0]]), damping=1e-7)
    torch.testing.assert_close(posed.column_cost, torch.tensor([0.19, 1.0]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_compensation_beats_rounding_to_nearest_and_repair_beats_both(bits: int, symmetric: bool):
    weight, moment = correlated()
    grid, posed = Grid(bits, 32, symmetric), rounding.problem(moment)
    errors = [
        float(rounding.error(weight, rounded, moment).sum())
        for rounded in (
            plain(weight, grid),
            rounding.round_weight(weight, posed, grid, repairs=0),
            rounding.round_weight(weight, posed, grid, repairs=2),
        )
    ]
    assert errors[0] > errors[1] > errors[2]


def test_each_step_of_the_repair_never_raises_the_error():
    weight, moment = correlated(seed=1)
    grid, posed = Grid(3, 32), rounding.problem(moment)
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
            rounded = rounding.Rounded(grid, codes.to(torch.int8), scales.bfloat16(), zeros.to(torch.int8))
            errors.append(float(rounding.error(weight, rounded, moment).sum()))
    assert all(after <= before * 1.001 for before, after in itertools.pairwise(errors)), errors


def test_without_correlation_compensation_is_rounding_to_nearest():
    weight, _ = correlated()
    grid, posed = Grid(4, 32), rounding.problem(torch.eye(64))
    scales, zeros = rounding.search(weight, posed.column_cost, grid)
    found = rounding.round_weight(weight, posed, grid, repairs=0).decode(torch.float32)
    torch.testing.assert_close(found, rounding.nearest(weight, grid, scales, zeros), atol=1e-6, rtol=1e-6)


def test_weights_on_the_grid_come_back_exactly():
    grid = Grid(4, 32)
    codes = torch.randint(-8, 8, (6, 64), generator=torch.Generator().manual_seed(0))
    codes[:, ::32], codes[:, 1::32] = -8, 7  # both ends are used, so the range gives the scale
    weight = (codes + 3) * 0.25
    posed = rounding.problem(correlated()[1])
    assert torch.equal(rounding.round_weight(weight, posed, grid).decode(torch.float32), weight)


def test_rows_do_not_depend_on_what_is_rounded_beside_them():
    weight, moment = correlated()
    grid, posed = Grid(3, 32), rounding.problem(moment)
    whole = rounding.split(rounding.round_weight(weight, posed, grid), [10, 14])
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
    posed = rounding.problem(moment, damping=1e-12)
    assert posed.attempts > 1
    rounded = rounding.round_weight(correlated()[0], posed, Grid(4, 32))
    assert rounded.decode().isfinite().all()
    assert rounding.round_weight(correlated()[0], rounding.problem(torch.zeros(64, 64)), Grid(4, 32)).codes.any()


@pytest.mark.parametrize("name", ["w4g64", "w3g128-sym"])
def test_a_grids_name_says_all_of_it(name: str):
    assert rounding.grid_named(name).name == name


def test_what_cannot_be_rounded_is_refused():
    with pytest.raises(ValueError, match="group of 48 does not divide 64"):
        rounding.round_weight(correlated()[0], rounding.problem(torch.eye(64)), Grid(4, 48))
    with pytest.raises(ValueError, match="1 entries"):
        rounding.problem(torch.diag(torch.tensor([1.0, float("nan")])))
    with pytest.raises(ValueError, match="'w9g64'"):
        rounding.grid_named("w9g64")


# A whole model: sensitivity, choice, rounding, checkpoint


@dataclass(frozen=True)
class Tiny:
    """The committed tiny model as a base artefact, its calibration and other windows, and what scores it."""

    folder: object
    calibration: torch.Tensor
    against: quality.Reference

    def job(self, **parameters) -> Job:
        return Job(self.folder, "cpu", {**ava.DEFAULTS, **parameters}, [], self.calibration)

    def kl(self, model: PreTrainedModel) -> float:
        return float(quality.score(model, self.against).kl.mean())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    run = Run("test_rounding", "smoke")
    base = models.base(run)
    tokenizer = models.load_tokenizer(base)
    windows = corpora.windows(corpora.evaluation_texts(run, tokenizer)[0], tokenizer, count=8, tokens=64)
    against = quality.reference(base, windows, tmp_path_factory.mktemp("cache"))
    return Tiny(base.path, corpora.calibration_windows(run, tokenizer), against)


@pytest.fixture(scope="module")
def options(tiny):
    return ava.sensitivities(models.load(tiny.folder), tiny.calibration)


def test_equal_seeds_give_equal_bytes_within_the_budget_and_load_as_they_were_rounded(tiny, tmp_path):
    budget = 600_000
    written = [tmp_path / "a", tmp_path / "b"]
    for folder in written:
        folder.mkdir()
        made = ava.compress(tiny.job(bytes=budget))
        made.save_pretrained(folder)
    files = [folder / "model.safetensors" for folder in written]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert 0.97 * budget < files[0].stat().st_size <= budget
    assert 0.97 * made.measured["predicted_bytes"] < files[0].stat().st_size <= made.measured["predicted_bytes"]
    loaded = models.load(written[0])
    assert tiny.kl(loaded) < 0.1
    layer = loaded.get_submodule("model.layers.0.mlp.down_proj")
    assert layer.weight.dtype == torch.bfloat16
    assert "weight_packed" not in dict(layer.named_parameters())


def test_a_checkpoint_decodes_to_the_weights_that_were_scored_in_memory(tiny, tmp_path):
    model = models.load(tiny.folder)
    name = "model.layers.1.mlp.up_proj"
    layer = model.get_submodule(name)
    for grid in (Grid(3, 64), Grid(4, 128, symmetric=True), Grid(8, 32)):
        rounded = rounding.round_weight(
            layer.weight.detach().float(), rounding.problem(torch.eye(layer.in_features)), grid
        )
        stored = packed.packed_tensors(rounded)
        size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
        assert size == packed.stored_bytes(*layer.weight.shape, grid)
        packed.pack(model, {name: rounded}, measured={}).save_pretrained(tmp_path)
        assert torch.equal(models.load(tmp_path).get_submodule(name).weight, rounded.decode())


def test_expected_rises_rank_formats_as_measured_ones_do(tiny, options):
    """Every layer of one block in two formats, alone: the rank correlation of expected and measured KL."""
    expected, measured = [], []
    for name, row in options.items():
        for option in row:
            if option.format in ("w2g128", "w3g64") and ".layers.1." in name:
                model = models.load(tiny.folder)
                alone = ava.allocation.Allocation({name: option})
                ava.round_model(model, tiny.calibration, alone)
                expected.append(option.cost)
                measured.append(tiny.kl(model))
    ranks = torch.tensor([expected, measured]).argsort(1).argsort(1).float()
    assert len(expected) >= 10
    assert torch.corrcoef(ranks)[0, 1] > 0.8


def test_more_bits_cost_more_bytes_and_less_divergence(options):
    for name, row in options.items():
        for size in ("g64", "g128"):
            of_size = [option for option in row if option.format.endswith(size)]
            assert [o.bytes for o in of_size] == sorted(o.bytes for o in of_size), name
            assert [o.cost for o in of_size] == sorted((o.cost for o in of_size), reverse=True), name


def test_a_group_that_does_not_divide_gives_way_to_the_next_larger_one():
    assert {grid.group_size for grid in ava.grids(576)} == {32, 64}
    assert {grid.group_size for grid in ava.grids(640, 32)} == {32}
    assert {grid.group_size for grid in ava.grids(640, 48)} == {64}
    assert {grid.group_size for grid in ava.grids(576, 128)} == {576}


def test_a_budget_below_the_smallest_is_refused_with_the_limit(tiny):
    with pytest.raises(ValueError, match=r"below the smallest file, [\d,]+ bytes"):
        ava.compress(tiny.job(bits_per_weight=1.0))
    with pytest.raises(ValueError, match="'nf4' is not one of any, bf16, packed"):
        ava.compress(tiny.job(embedding="nf4"))


def test_few_tokens_a_column_are_damped_more_than_many():
    """Five a column: 0.01; three: 1; four, in the middle, 0.1."""
    assert rounding.damping_for(100, 500) == pytest.approx(0.01)
    assert rounding.damping_for(100, 400) == pytest.approx(0.1)
    assert rounding.damping_for(100, 300) == pytest.approx(1)
    assert rounding.damping_for(100, 10) == pytest.approx(1)


def test_a_walk_damps_thirty_times_as_much_up_to_one():
    """A hundred columns: 0.01 for 500 tokens becomes 0.3, 0.1 for 400 becomes 1, and 1 for 300 stays."""
    sites = [calibration.Site(0, {}, torch.eye(100), torch.eye(100), tokens) for tokens in (500, 400, 300)]
    assert [rounded_walk.damping_of(site) for site in sites] == pytest.approx([0.3, 1, 1])
    assert rounded_walk.damping_of(sites[0], 1) == pytest.approx(0.01)


def test_groups_that_do_not_divide_are_named_in_the_notes(tiny):
    assert ava._notes(models.load(tiny.folder), 0, 0) == []
    notes = ava._notes(models.load(tiny.folder), 96, 0)
    assert notes == ["groups of 128 instead of 96 for 128 columns in 24 layers", notes[1]]
    assert notes[1] == "groups of 128 instead of 96 for 384 columns in 4 layers"


def test_damped_moments_are_counted_in_the_notes(tiny):
    assert ava._notes(models.load(tiny.folder), 0, 2) == ["2 second moments were singular and got more damping"]
