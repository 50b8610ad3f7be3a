"""Training through the rounding on the tiny model: it helps, keeps bytes and grids, resumes, and refuses."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from avalab import cli
from avalab.compress import quantize, rounding
from avalab.data import corpora, packing
from avalab.kernels.formats import Grid
from avalab.lab.run import Run
from avalab.models import checkpoint, packed, predict
from avalab.train import fake_quant, loop, qat
from avalab.train.loop import Schedule
from avalab.train.qat import BlockTraining, Recipe

pytestmark = pytest.mark.usefixtures("few_docstrings")
SCHEDULE = Schedule(learning_rate=3e-3, checkpoint_every=2)
KINDS = {
    "scales": Recipe(schedule=SCHEDULE),
    "zeros": Recipe(zeros=True, schedule=SCHEDULE),
    "weights": Recipe(kind="weights", schedule=replace(SCHEDULE, learning_rate=1e-3)),
    "torchao": Recipe(kind="torchao", schedule=replace(SCHEDULE, learning_rate=1e-4)),
    "blocks": Recipe(kind="blocks", blocks=BlockTraining(steps=16)),
    "online": Recipe(teacher="online", schedule=SCHEDULE),
}


@pytest.fixture(scope="module")
def read(run, base):
    return qat.training_windows(run, checkpoint.load_tokenizer(base), tokens=1024)


@pytest.fixture(scope="module")
def low(run, base):
    return quantize.compress_artifact(base, "rtn", run=run, bits=3, group_size=32)


@pytest.fixture(scope="module")
def mixed(run, base):
    return quantize.compress_artifact(base, "ava", run=run, bits_per_weight=5.5)


@pytest.fixture(scope="module")
def against(run, base):
    windows = corpora.calibration_windows(run, checkpoint.load_tokenizer(base))
    return predict.make_reference(base, windows, run.artifacts_dir / "cache")


def divergence(artifact, against):
    return predict.score_model(checkpoint.load_model(artifact), against).kl.mean().item()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_closer_to_the_teacher_at_the_same_bytes_on_the_same_grids(
    kind, run, base, low, read, against
):
    trained = qat.train_quantized(low, base, read, run=run, out=run.artifacts_dir / f"low-{kind}", recipe=KINDS[kind])
    assert trained.bytes == low.bytes
    assert trained.format == low.format
    assert divergence(trained, against) < divergence(low, against)
    before, after = packed.packed_layers(low), packed.packed_layers(trained)
    assert {n: p.grid for n, p in before.items()} == {n: p.grid for n, p in after.items()}
    assert trained.card["measured"]["codes_changed"] == 0 or kind in ("weights", "torchao", "blocks")
    assert qat.train_quantized(low, base, read, run=run, out=trained.path, recipe=KINDS[kind]).sha256 == trained.sha256
    qat.record_recovery(run, kind, trained)
    found = {record.metric: record.value for record in run.records if record.subject == kind}
    assert found["train_tokens"] == (16 * 4 * 64 if kind == "blocks" else 1024)
    assert "train_seconds" in found


def test_mixed_precision_stays_as_it_was_and_every_other_tensor_too(run, base, mixed, read):
    trained = qat.train_quantized(
        mixed, base, read[:4], run=run, out=run.artifacts_dir / "mixed-scales", recipe=KINDS["scales"]
    )
    before, after = packed.packed_layers(mixed), packed.packed_layers(trained)
    assert len({part.grid.name for part in before.values()}) > 1
    assert [part.grid for part in before.values()] == [part.grid for part in after.values()]
    assert trained.bytes == mixed.bytes
    assert (trained.path / "config.json").read_bytes() == (mixed.path / "config.json").read_bytes()
    ours, theirs = (checkpoint.load_model(a).get_input_embeddings().weight for a in (trained, mixed))
    assert torch.equal(ours, theirs)


def test_a_packed_file_written_back_unchanged_is_the_same_file(low, tmp_path):
    packed.replace_layers(low, tmp_path, packed.packed_layers(low))
    assert (tmp_path / "model.safetensors").read_bytes() == (low.path / "model.safetensors").read_bytes()


def test_the_layers_read_from_a_file_decode_to_the_weights_that_the_model_computes_with(low):
    model = checkpoint.load_model(low, packed=False)
    for name, part in packed.packed_layers(low).items():
        assert torch.equal(part.decode(), model.get_submodule(name).weight)


def test_tensors_of_another_shape_or_name_are_refused(low, tmp_path):
    with pytest.raises(ValueError, match=r"has no tensor lm_head\.bias"):
        packed.replace_layers(low, tmp_path, {}, others={"lm_head.bias": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"model\.norm\.weight is .* in the file, not .*may not change the bytes"):
        packed.replace_layers(low, tmp_path, {}, others={"model.norm.weight": torch.zeros(2)})


def test_blocks_end_no_further_from_the_original_than_they_began(run, base, low, read):
    layers, teacher = packed.packed_layers(low), checkpoint.load_model(base)
    student, weights = checkpoint.load_model(low), {n: teacher.get_submodule(n).weight for n in layers}
    fake_quant.replace_layers(student, layers, weights=weights)
    errors = qat.reconstruct(student, teacher, read[:4], BlockTraining(steps=4, windows_per_step=2), seed=0)
    assert len(errors) == len(student.model.layers)
    assert all(after <= before for before, after in errors)
    assert all(part.position is None for part in fake_quant.fake_layers(student).values())


def test_blocks_without_fake_quantizers_or_steps_are_refused(base, low, read):
    teacher, student = checkpoint.load_model(base), checkpoint.load_model(low)
    with pytest.raises(ValueError, match="no layer of the student is a fake quantizer"):
        qat.reconstruct(teacher, teacher, read, BlockTraining(), seed=0)
    fake_quant.replace_layers(student, packed.packed_layers(low))
    with pytest.raises(ValueError, match="no windows"):
        qat.reconstruct(student, teacher, read[:0], BlockTraining(), seed=0)


ATTENTION = ["sliding_attention", "full_attention", "sliding_attention"]


def alternating() -> Gemma3ForCausalLM:
    rotary = {kind: {"rope_type": "default", "rope_theta": 10.0 if kind[0] == "s" else 1e6} for kind in ATTENTION}
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "query_pre_attn_scalar": 8, "sliding_window": 4}
    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **heads, layer_types=ATTENTION, rope_parameters=rotary)).eval()


def test_every_block_aims_at_what_the_teacher_gives_there(monkeypatch):
    """Gemma 3 alternates two rotary embeddings and masks: blocks get their own, not the first one's."""
    teacher, student, aims = alternating(), alternating(), []
    monkeypatch.setattr(qat, "_fit", lambda block, calls, aim, how, random: aims.append(aim) or (1.0, 1.0))
    posed = rounding.rounding_problem(torch.eye(16))
    name = "model.layers.1.mlp.up_proj"
    layer = rounding.round_weight(student.get_submodule(name).weight.detach(), posed, Grid(8, 16))
    fake_quant.replace_layers(student, {name: layer})
    windows = torch.arange(60).reshape(3, 20)
    qat.reconstruct(student, teacher, windows, BlockTraining(windows_per_step=2), seed=0)
    seen = {}
    for at, block in enumerate(teacher.model.layers):
        block.register_forward_hook(lambda _module, _args, given, at=at: seen.update({at: given}))
    with torch.no_grad():
        teacher(windows)
    for at, aim in enumerate(aims):
        given = seen[at][0] if isinstance(seen[at], tuple) else seen[at]
        torch.testing.assert_close(torch.cat(aim), given, atol=1e-5, rtol=1e-4)


class Stop(loop.Progress):
    """Ends the run as a kill does, after the checkpoint of step 4."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 4:
            raise KeyboardInterrupt


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(run, base, low, read, monkeypatch):
    whole = qat.train_quantized(low, base, read, run=run, out=run.artifacts_dir / "low-scales", recipe=KINDS["scales"])
    out, progress = run.artifacts_dir / "killed", loop.Progress
    monkeypatch.setattr(loop, "Progress", Stop)
    with pytest.raises(KeyboardInterrupt):
        qat.train_quantized(low, base, read, run=run, out=out, recipe=KINDS["scales"])
    assert not out.exists()
    assert list((run.artifacts_dir / "checkpoints" / "killed").glob("*/checkpoint-4"))
    monkeypatch.setattr(loop, "Progress", progress)
    resumed = qat.train_quantized(low, base, read, run=run, out=out, recipe=KINDS["scales"])
    assert weights_sha256(whole) == weights_sha256(resumed)


def weights_sha256(artifact):
    return {file["name"]: file["sha256"] for file in artifact.card["files"]}["model.safetensors"]


def test_a_run_killed_between_blocks_goes_on_at_the_next_one_and_ends_with_the_same_bytes(
    run, base, low, read, monkeypatch
):
    how = {"run": run, "recipe": KINDS["blocks"]}
    whole = qat.train_quantized(low, base, read, out=run.artifacts_dir / "low-blocks", **how)
    out, fit, fitted = run.artifacts_dir / "killed-blocks", qat._fit, []

    def counted(*arguments):
        fitted.append(1)
        if len(fitted) == 3:
            raise KeyboardInterrupt
        return fit(*arguments)

    monkeypatch.setattr(qat, "_fit", counted)
    with pytest.raises(KeyboardInterrupt):
        qat.train_quantized(low, base, read, out=out, **how)
    resumed = qat.train_quantized(low, base, read, out=out, **how)
    assert len(fitted) == 3 + 2  # of four blocks, two were kept
    assert weights_sha256(whole) == weights_sha256(resumed)
    assert resumed.card["measured"]["block_errors"] == whole.card["measured"]["block_errors"]
    assert not (run.artifacts_dir / "checkpoints" / "killed-blocks").exists()


def test_training_text_holds_no_window_that_calibrated_the_rounding(run, base, read):
    used = corpora.calibration_windows(run, checkpoint.load_tokenizer(base))
    assert {tuple(w.tolist()) for w in used}.isdisjoint(tuple(w.tolist()) for w in read)


def test_windows_in_one_row_are_told_apart_and_each_last_token_predicts_nothing(read):
    row, *others = packing.window_rows(read, windows_per_row=3)
    assert row["boundaries"].tolist() == [0, 64, 128, 192]
    assert len(others[-1]["input_ids"]) == 64
    assert row["labels"][63] == row["labels"][127] == -100
    assert row["labels"][62] == read[0, 63]
    assert row["position_ids"][64] == 0


@pytest.mark.parametrize(
    ("which", "recipe", "message"),
    [
        ("base", Recipe(), "is in format 'bf16' and holds no packed layers"),
    ],
)
def test_impossible_starts_and_kinds_are_refused(run, base, low, read, which, recipe, message):
    start = {"base": base, "low": low}[which]
    with pytest.raises(ValueError, match=message):
        qat.train_quantized(start, base, read, run=run, out=run.artifacts_dir / "x", recipe=recipe)
    with pytest.raises(ValueError, match="it has to be the bf16 model"):
        qat.train_quantized(low, low, read, run=run, out=run.artifacts_dir / "x")
    with pytest.raises(ValueError, match="calibration text has"):
        qat.training_windows(run, checkpoint.load_tokenizer(base), tokens=10**9)


def test_the_command_line_recovers_an_artefact_at_its_bytes(run, base, low, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Run, "artifacts_dir", tmp_path / "made")
    how = ["--profile", "smoke", "--tokens", "256", "--steps", "2", "--out", str(tmp_path / "better"), "--json"]
    monkeypatch.setattr("sys.argv", ["avalab", "recover", str(low.path), *how])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    told = json.loads(capsys.readouterr().out)
    assert not stopped.value.code
    assert {"train_tokens", "train_loss"} <= {record["metric"] for record in told}
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / "better", low.path)]
    assert sizes[0] == sizes[1]
    monkeypatch.setattr("sys.argv", ["avalab", "recover", str(low.path), "--out", "tests"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "is not an artefact; name a new folder" in capsys.readouterr().err
