"""Images beside text: pencil, oracle (transformers), gradient caching, a tower that learns, refusals."""

from math import log

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from avalab.lab import artifacts
from avalab.lab.errors import InputError, MissingFile
from avalab.train import loop
from avalab.train.contrastive import emoji, losses, towers
from avalab.train.recipes import CONTRASTIVE, ImageRecipe, Schedule

RECIPE = ImageRecipe(
    width=8, shared=16, batch=16, chunk=5, schedule=Schedule(learning_rate=3e-3, steps=12, checkpoint_every=4)
)

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "black": (0, 0, 0), "yellow": (1, 1, 0)}


@pytest.fixture(scope="module")
def shapes():
    """Coloured squares of four sizes stand for emoji: no font, and what is learned is plain."""
    names, pictures = [], []
    for colour, values in COLOURS.items():
        for size in (6, 12, 18, 26):
            picture = torch.ones(3, emoji.SIDE, emoji.SIDE)
            edge = (emoji.SIDE - size) // 2
            picture[:, edge : edge + size, edge : edge + size] = torch.tensor(values)[:, None, None].float()
            names.append(f"{colour} square {size}")
            pictures.append(picture)
    return emoji.Emoji(["x"] * len(names), names, torch.stack(pictures))


@pytest.fixture(scope="module")
def trained(run, base, shapes):
    return towers.train_towers(base, shapes, run=run, name="shapes", recipe=RECIPE)


def one(value):
    return torch.tensor(float(value), dtype=torch.float64)


# --- losses ---------------------------------------------------------------------------------------------------------


def test_two_pairs_at_right_angles_by_pencil():
    """x = y = the axes, scale ln 3: each softmax is 3 to 1, so the loss is ln(4/3); siglip: ln(4/3) + ln 2 a pair."""
    axes = torch.eye(2, dtype=torch.float64)
    assert losses.clip(axes, axes, scale=one(log(3)), bias=one(0)).item() == pytest.approx(log(4 / 3))
    assert losses.siglip(axes, axes, scale=one(log(3)), bias=one(0)).item() == pytest.approx(log(4 / 3) + log(2))


def test_clip_agrees_with_transformers_and_siglip_with_its_definition():
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    x, y = (F.normalize(torch.randn(9, 4, dtype=torch.float64), dim=-1) for _ in range(2))
    ours = losses.clip(x, y, scale=one(7), bias=one(3))
    torch.testing.assert_close(ours, image_text_contrastive_loss(7 * y @ x.T))
    pairs = [(1 if i == j else -1, 7 * x[i] @ y[j] - 2) for i in range(9) for j in range(9)]
    wanted = -sum(torch.sigmoid(sign * z).log() for sign, z in pairs) / 9
    torch.testing.assert_close(losses.siglip(x, y, scale=one(7), bias=one(-2)), wanted)


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_the_order_of_pairs_changes_no_loss(name):
    assert tuple(losses.LOSSES) == CONTRASTIVE == tuple(losses.STARTS)
    x, y = (F.normalize(torch.randn(9, 4, dtype=torch.float64), dim=-1) for _ in range(2))
    order = torch.randperm(9)
    both = [losses.LOSSES[name](a, b, scale=one(7), bias=one(-2)) for a, b in ((x, y), (x[order], y[order]))]
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("name", CONTRASTIVE)
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_gradients_of_a_batch_in_chunks_are_those_of_the_whole_batch(shapes, name, chunk):
    recipe = ImageRecipe(loss=name, width=8, shared=16, batch=20, chunk=chunk)
    whole = towers.new_towers(6, ImageRecipe(loss=name, width=8, shared=16, batch=20, chunk=20), seed=1).double()
    parts = towers.new_towers(6, recipe, seed=1).double()
    batch = {"pictures": shapes.pictures.double(), "features": torch.randn(20, 6, dtype=torch.float64)}
    found = []
    for each in (whole, parts):
        loss = each(**batch, places=torch.arange(20))["loss"]
        loss.backward()
        found.append([loss, *(p.grad for p in each.parameters() if p.grad is not None)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_a_batch_in_chunks_keeps_a_fraction_of_what_the_whole_batch_keeps():
    tower, pictures = towers.new_towers(6, RECIPE, seed=0), torch.rand(32, 3, emoji.SIDE, emoji.SIDE)
    whole = loop.kept_for_backward(lambda: tower.images(pictures))
    parts = loop.kept_for_backward(lambda: losses.in_chunks(tower.images, pictures, 4))
    assert parts < 0.2 * whole


# --- emoji ----------------------------------------------------------------------------------------------------------


def test_names_are_unicodes_without_empty_words():
    assert emoji.spoken_name("\N{GRINNING FACE}") == "grinning face"
    assert emoji.spoken_name("\N{HEAVY BLACK HEART}") == "heart"
    assert emoji.spoken_name("\ue888") == ""


def test_who_is_unseen_is_a_fifth_and_does_not_depend_on_the_others(shapes):
    many = emoji.Emoji([], [f"thing {n}" for n in range(2000)], torch.zeros(1, 3, 4, 4))
    assert 0.17 < len(many.unseen) / 2000 < 0.23
    assert not set(many.unseen.tolist()) & set(many.seen.tolist())
    fewer = emoji.Emoji([], many.names[:100], torch.zeros(1, 3, 4, 4))
    assert fewer.unseen.tolist() == [i for i in many.unseen.tolist() if i < 100]


def test_augmented_pictures_differ_stay_in_range_and_come_again_with_the_seed(shapes):
    first, again, other = (emoji.augmented(shapes.pictures, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.min() >= 0
    assert first.max() <= 1


# --- training --------------------------------------------------------------------------------------------------------


def test_the_tower_learns_and_is_read_back(run, base, shapes, trained):
    found = towers.load_towers(trained)
    features = towers.text_features(base, shapes, run)
    ranks = towers.ranks(found, shapes, features, shapes.seen)
    before = towers.ranks(towers.new_towers(features.shape[1], RECIPE, seed=0).eval(), shapes, features, shapes.seen)
    assert ranks.float().mean() < before.float().mean()
    assert sorted(towers.nearest(found, shapes.pictures[0], features, 50)) == list(range(len(shapes.names)))


def test_a_killed_run_goes_on_with_the_batches_it_would_have_seen(run, base, shapes, trained, monkeypatch):
    class Stop(loop.Progress):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 6:
                raise KeyboardInterrupt

    progress = loop.Progress
    monkeypatch.setattr(loop, "Progress", Stop)
    with pytest.raises(KeyboardInterrupt):
        towers.train_towers(base, shapes, run=run, name="killed", recipe=RECIPE)
    monkeypatch.setattr(loop, "Progress", progress)
    resumed = towers.train_towers(base, shapes, run=run, name="killed", recipe=RECIPE)
    files = [{f["name"]: f["sha256"] for f in a.card["files"]}[towers.WEIGHTS] for a in (trained, resumed)]
    assert files[0] == files[1]


def test_the_same_recipe_is_not_trained_twice(run, base, shapes, trained, monkeypatch):
    monkeypatch.setattr(loop, "fit_module", lambda *_, **__: pytest.fail("trained again"))
    assert towers.train_towers(base, shapes, run=run, name="shapes", recipe=RECIPE).sha256 == trained.sha256


def test_recall_is_recorded_with_its_interval_and_chance(run, base, shapes, trained):
    features = towers.text_features(base, shapes, run)
    tower = towers.load_towers(trained)
    towers.record_recall(run, "clip", tower, shapes, features, shapes.seen, part="seen", artifact=trained)
    towers.record_training(run, "clip", trained)
    found = {record.metric: record for record in run.records if record.subject == "clip"}
    assert found["recall_at_1:seen"].low <= found["recall_at_1:seen"].value <= found["recall_at_5:seen"].value
    assert found["recall_at_1:seen"].details["chance"] == pytest.approx(1 / len(shapes.seen))
    assert len(found["contrastive_loss"].samples) == 12
    assert towers.kept_bytes(shapes, RECIPE, images=4) < towers.kept_bytes(shapes, RECIPE, images=16)


def test_the_rank_of_a_name_counts_the_names_that_are_nearer(shapes):
    """Two pictures at right angles whose names are swapped: each own name is second."""

    swapped = towers.new_towers(3, RECIPE, seed=0)
    swapped.images, swapped.texts = (lambda pictures: torch.eye(2)), (lambda features: torch.eye(2).flip(0))
    assert towers.ranks(swapped, shapes, torch.zeros(20, 3), torch.tensor([0, 1])).tolist() == [1, 1]


def test_rounding_to_eight_bits_changes_little_and_to_two_more(trained, shapes):
    pictures, vectors, bits = shapes.pictures, {}, {}
    for name in ("", "int8", "int2"):
        found = towers.load_towers(trained)
        bits[name] = towers.apply_rounding(found, name) if name else 32
        vectors[name] = found.images(pictures)
    moved = {name: (vectors[name] - vectors[""]).norm(dim=-1).mean().item() for name in ("int8", "int2")}
    assert moved["int8"] < 0.05 < moved["int2"]
    assert bits["int2"] < bits["int8"] < 32


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_picture_that_is_none_is_refused_and_any_size_of_one_is_taken(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InputError, match=r"text\.png is no picture that can be read"):
        emoji.load_picture(tmp_path / "text.png")
    with pytest.raises(MissingFile, match="no picture at"):
        emoji.load_picture(tmp_path / "none.png")
    Image.new("RGBA", (7, 90), (255, 0, 0, 128)).save(tmp_path / "thin.png")
    found = emoji.load_picture(tmp_path / "thin.png")
    assert found.shape == (3, emoji.SIDE, emoji.SIDE)
    assert found[:, 0, 0].tolist() == [1, 1, 1]


def test_a_font_that_is_none_and_too_few_emoji_are_refused(run, base, tmp_path):
    (tmp_path / "font.ttf").write_text("no font")
    with pytest.raises(InputError, match="is no font that can be drawn"):
        emoji.load_emoji(font=tmp_path / "font.ttf")
    few = emoji.Emoji(["x"], ["only one"], torch.zeros(1, 3, emoji.SIDE, emoji.SIDE))
    with pytest.raises(InputError, match="1 emoji are too few"):
        towers.train_towers(base, few, run=run, name="few", recipe=RECIPE)


@pytest.mark.parametrize(
    ("bad", "said"),
    [({"loss": "triplet"}, "clip, siglip"), ({"width": 12}, "multiple of 8"), ({"batch": 1}, "batch is 1")],
)
def test_a_recipe_that_no_tower_can_have_is_refused(bad, said):
    with pytest.raises(InputError, match=said):
        ImageRecipe(**bad)


def test_another_artefact_is_no_tower(base):
    with pytest.raises(InputError, match="an image tower is wanted"):
        towers.load_towers(base)
    assert artifacts.CARD
