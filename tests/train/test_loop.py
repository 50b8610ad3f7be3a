"""Training: it learns, resumes exactly, counts tokens not batches, and several processes equal one."""

import _thread
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from avalab.data import packing, toolbox
from avalab.lab.run import ROOT
from avalab.models import adapters, attention, checkpoint
from avalab.train import loop
from avalab.train.loop import Schedule
from avalab.train.losses import next_token

TINY = ROOT / "data" / "tiny-llama"
SCHEDULE = Schedule(learning_rate=3e-3, checkpoint_every=2, epochs=3)


def packed():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    examples = toolbox.function_calling_examples(4, seed=0)
    return packing.pack_chats(tokenizer, examples, row_tokens=1000, context=1024, seed=0)


@pytest.fixture(scope="module")
def rows():
    return packed()


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def alike(first, second):
    return all(map(torch.equal, trained(first).values(), trained(second).values()))


@pytest.fixture(scope="module")
def whole(rows, tmp_path_factory):
    """A student after an unbroken run, and its history."""
    model = student()
    return model, loop.fit(model, rows, schedule=SCHEDULE, folder=tmp_path_factory.mktemp("whole") / "run")


def student(dtype=torch.float32, fused=True, dropout=0.0):
    model = checkpoint.load_model(TINY, dtype=dtype)
    adapters.attach_adapters(model, rank=4, alpha=8, dropout=dropout, seed=1)
    if fused:
        adapters.apply_fused_adapters(model)
    return model


def losses(history):
    return [entry["loss"] for entry in history if "loss" in entry]


def after(history, step):
    return [entry["loss"] for entry in history if entry["step"] > step]


def test_the_loss_falls_and_only_adapters_change(rows, tmp_path):
    model = student()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    history = loop.fit(model, rows, schedule=SCHEDULE, folder=tmp_path / "run")
    assert losses(history)[-1] < losses(history)[0]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert history[-1]["tokens"] == 3 * sum(len(row["input_ids"]) for row in rows)
    assert not (tmp_path / "run").exists()


class Stop(loop.Progress):
    """Ends the run as an interrupt does, after the checkpoint of step 4."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 4:
            raise KeyboardInterrupt


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(rows, tmp_path, monkeypatch):
    """Also where chance decides: the generators' states are part of a checkpoint."""
    first, second = student(dropout=0.3), student(dropout=0.3)
    whole = loop.fit(first, rows, schedule=SCHEDULE, folder=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "Progress", Stop)
        with pytest.raises(KeyboardInterrupt):
            loop.fit(student(dropout=0.3), rows, schedule=SCHEDULE, folder=tmp_path / "run")
    resumed = loop.fit(second, rows, schedule=SCHEDULE, folder=tmp_path / "run")
    assert after(resumed, 4) == after(whole, 4)
    assert alike(first, second)
    assert not (tmp_path / "run").exists()


KILLED = """
import json, os, signal, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
import test_loop as here
from avalab.train import loop
class Kill(loop.Progress):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
loop.Progress = Kill
loop.fit(here.student(), here.packed(), schedule=here.SCHEDULE, folder=Path(sys.argv[2]))
"""


def test_a_run_whose_process_was_killed_goes_on_from_its_last_checkpoint(rows, whole, tmp_path):
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path / "run")]
    killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert list((tmp_path / "run").glob("*/checkpoint-4"))
    resumed = student()
    history = loop.fit(resumed, rows, schedule=SCHEDULE, folder=tmp_path / "run")
    assert after(history, 4) == after(whole[1], 4)
    assert alike(resumed, whole[0])


def stopped(rows, folder, monkeypatch, schedule=SCHEDULE):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "Progress", Stop)
        with pytest.raises(KeyboardInterrupt):
            loop.fit(student(), rows, schedule=schedule, folder=folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schedule": replace(SCHEDULE, steps=1, learning_rate=0.1)}, "learning_rate: 0.003 then, 0.1 now"),
        ({"rows": slice(1)}, "rows: "),
        ({"identity": "rank 8"}, "identity: '' then, 'rank 8' now"),
    ],
)
def test_an_unfinished_run_of_other_settings_is_kept_and_not_continued(
    rows, tmp_path, monkeypatch, capsys, change, said
):
    stopped(rows, tmp_path / "run", monkeypatch)
    chosen = rows[change.get("rows", slice(None))]
    how = {"schedule": replace(SCHEDULE, steps=1), **{name: value for name, value in change.items() if name != "rows"}}
    assert loop.fit(student(), chosen, **how, folder=tmp_path / "run")[0]["step"] == 1
    shown = capsys.readouterr().err
    assert "keeps an unfinished training of other settings" in shown
    assert said in shown
    assert list((tmp_path / "run").glob("*/checkpoint-4"))


def test_a_checkpoint_is_due_after_so_many_seconds_too(rows, whole, tmp_path, monkeypatch):
    schedule = replace(SCHEDULE, checkpoint_every=50, checkpoint_seconds=0.0)
    stopped(rows, tmp_path / "run", monkeypatch, schedule)
    assert {path.name for path in (tmp_path / "run").glob("*/checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}
    resumed = student()
    loop.fit(resumed, rows, schedule=schedule, folder=tmp_path / "run")
    assert alike(resumed, whole[0])


class Interrupt(loop.Progress):
    """Presses Ctrl-C in the middle of step 3: the handler is called by Python, since a signal of the system's can end
    the process that runs many tests (tests/cli/test_cli_compress.py sends one to a command)."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 2:
            _thread.interrupt_main(signal.SIGINT)


def test_ctrl_c_ends_the_step_keeps_it_and_goes_on_from_there(rows, whole, tmp_path, monkeypatch, capsys):
    schedule, before = replace(SCHEDULE, checkpoint_every=50), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "Progress", Interrupt)
        with pytest.raises(KeyboardInterrupt):
            loop.fit(student(), rows, schedule=schedule, folder=tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopping after this step, which is kept" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").glob("*/checkpoint-*")] == ["checkpoint-3"]
    resumed = student()
    loop.fit(resumed, rows, schedule=schedule, folder=tmp_path / "run")
    assert alike(resumed, whole[0])


class Late(loop.Progress):
    """Is killed when the last checkpoint was made and nothing else."""

    def on_train_end(self, args, state, control, **_):
        raise KeyboardInterrupt


def test_a_run_that_ended_before_its_weights_were_kept_ends_again_at_once(rows, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "Progress", Late)
        with pytest.raises(KeyboardInterrupt):
            loop.fit(student(), rows, schedule=SCHEDULE, folder=tmp_path / "run")
    ended = student()
    assert losses(loop.fit(ended, rows, schedule=SCHEDULE, folder=tmp_path / "run")) == losses(whole[1])
    assert alike(ended, whole[0])


def test_a_step_is_the_mean_over_tokens_however_they_are_dealt_out(rows, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    examples = list(toolbox.function_calling_examples(4, seed=3))
    firsts = []
    for row_tokens, accumulated in ((1000, 1), (600, 4)):
        dealt = packing.pack_chats(tokenizer, examples, row_tokens=row_tokens, context=1024, seed=0)
        schedule = Schedule(rows_per_step=max(accumulated, len(dealt)), steps=1)
        firsts += losses(loop.fit(student(), dealt, schedule=schedule, folder=tmp_path / "run"))
    assert firsts[0] == pytest.approx(firsts[1], abs=1e-5)


def test_held_out_rows_are_scored_and_patience_ends_the_run(rows, tmp_path):
    schedule = Schedule(learning_rate=1e-30, checkpoint_every=1, epochs=50, patience=2)
    history = loop.fit(student(), rows[:1], schedule=schedule, folder=tmp_path / "run", held_out=rows[1:])
    held_out = [entry["held_out_loss"] for entry in history if "held_out_loss" in entry]
    assert len(losses(history)) < 6
    assert max(held_out) == pytest.approx(min(held_out), rel=1e-5)


def test_recomputed_activations_change_no_loss(rows, tmp_path):
    schedule = Schedule(steps=2)
    plain = loop.fit(student(), rows, schedule=schedule, folder=tmp_path / "run")
    less = loop.fit(student(), rows, schedule=replace(schedule, gradient_checkpointing=True), folder=tmp_path / "run")
    assert losses(less) == pytest.approx(losses(plain), abs=1e-5)


def test_the_libraries_own_forward_pass_and_loss_give_the_same_curve(rows, tmp_path):
    """PEFT's layers and the causal LM's own cross-entropy, one row at a time, against the fused path."""
    fused = losses(loop.fit(student(), rows, schedule=Schedule(steps=4), folder=tmp_path / "run"))
    plain = losses(loop.fit(student(fused=False), rows, schedule=Schedule(steps=4), folder=tmp_path / "run"))
    assert fused == pytest.approx(plain, abs=1e-4)
    model, row = student(fused=False), packing.one_row_batch(rows[:1])
    (start, end, *_), total, count = row["boundaries"].tolist(), 0.0, 0
    for start, end in zip(row["boundaries"][:-1].tolist(), row["boundaries"][1:].tolist(), strict=True):
        labels = row["labels"][:, start:end]
        logits = model(row["input_ids"][:, start:end]).logits
        total += torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum").item()
        count += int((labels != -100).sum())
    ours = loop.Student(model, next_token)
    attention.apply_packed_attention(model)
    assert ours(**row)["loss"].item() == pytest.approx(total / count, abs=1e-5)


def test_a_loss_that_is_not_finite_ends_the_run(rows, tmp_path):
    model = student()
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"the loss is nan at step 1; lower .*0\.001 \(nothing is left behind\)"):
        loop.fit(model, rows, schedule=Schedule(steps=2), folder=tmp_path / "run")


def test_a_loss_that_stops_being_finite_names_the_step_and_the_last_good_one(rows, tmp_path):
    def spoilt(hidden, head, batch):
        seen.append(1)
        return next_token(hidden, head, batch) * (float("nan") if len(seen) == 4 else 1.0)

    seen: list[int] = []
    with pytest.raises(ValueError, match=r"the loss is nan at step 4; lower the learning rate.*step 2 is kept in "):
        loop.fit(student(), rows, schedule=SCHEDULE, folder=tmp_path / "run", loss=spoilt)
    assert list((tmp_path / "run").glob("*/checkpoint-2"))


def test_a_model_without_trainable_parameters_is_refused(rows, tmp_path):
    model = checkpoint.load_model(TINY).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model is trainable"):
        loop.fit(model, rows, schedule=SCHEDULE, folder=tmp_path / "run")


def test_no_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        loop.fit(student(), [], schedule=SCHEDULE, folder=tmp_path / "run")


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine(rows, tmp_path):
    """Two of ten steps of warm-up: 0, 1/2, 1; then (1 + cos(pi k / 8)) / 2, which is 1/2 half-way."""
    schedule = Schedule(learning_rate=1.0, warmup=0.2, steps=10, clip=1e-9, epochs=50)
    history = loop.fit(student(), rows[:1], schedule=schedule, folder=tmp_path / "run")
    rates = [entry["learning_rate"] for entry in history]
    assert rates[:3] == pytest.approx([0, 0.5, 1.0])
    assert rates[2:] == pytest.approx([(1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)])


def test_a_run_of_a_few_steps_has_no_warm_up_that_would_be_all_of_it(rows, tmp_path):
    history = loop.fit(student(), rows[:1], schedule=Schedule(learning_rate=0.01), folder=tmp_path / "run")
    assert [entry["learning_rate"] for entry in history] == [0.01]


def test_the_bar_shows_the_curve_the_speed_and_the_time_left(rows, tmp_path, capsys):
    loop.fit(student(), rows, schedule=Schedule(steps=3), folder=tmp_path / "run")
    shown = capsys.readouterr().err.split("\r")[-1]
    assert re.search(r"3/3 \[\d\d:\d\d<\d\d:\d\d.*loss [▁-█]+ \d\.\d{3}, \d+ tokens/s\]", shown)


def test_a_gpu_gets_the_paged_8_bit_optimizer_and_a_cpu_the_plain_one(tmp_path):
    chosen = {d: loop._arguments(SCHEDULE, tmp_path, d, evaluate=False).optim.value for d in ("cuda", "cpu")}
    assert chosen == {"cuda": "paged_adamw_8bit", "cpu": "adamw_torch"}


def test_the_best_checkpoint_is_the_result_where_training_stops_early(rows, tmp_path):
    """A learning rate that ruins the model: the held-out loss only rises, and the first checkpoint comes back."""
    schedule = Schedule(learning_rate=1.0, warmup=0.0, checkpoint_every=1, epochs=20, patience=2)
    model, kept = student(), rows[1:2]
    history = loop.fit(model, rows[:1], schedule=schedule, folder=tmp_path / "run", held_out=kept)
    held_out = [entry["held_out_loss"] for entry in history if "held_out_loss" in entry and entry["step"]]
    with torch.inference_mode():
        final = loop.Student(model, next_token)(**packing.one_row_batch(kept))["loss"].item()
    assert final == pytest.approx(min(held_out), rel=1e-4)
    assert final < max(held_out)


def test_a_curve_is_drawn_in_eighths_and_never_wider_than_asked():
    assert loop.sparkline([2, 1, 0]) == "█▅▁"
    assert loop.sparkline([1.0]) == "▁"
    assert len(loop.sparkline(list(range(1000)))) <= 16


SCRIPT = """
import json, sys, torch
from transformers import AutoTokenizer
from avalab.data import packing, toolbox
from avalab.models import adapters, checkpoint
from avalab.train import loop
torch.set_num_threads(1)
tiny, rows_per_step, folder, out = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
model = checkpoint.load_model(tiny, dtype=torch.float32)
adapters.attach_adapters(model, rank=4, alpha=8, seed=1)
adapters.apply_fused_adapters(model)
examples = list(toolbox.function_calling_examples(8, seed=5))
assert int(__import__("os").environ.get("WORLD_SIZE", 1)) * rows_per_step == 2
rows = packing.pack_chats(AutoTokenizer.from_pretrained(tiny), examples, row_tokens=600, context=1024, seed=0)
schedule = loop.Schedule(steps=2, rows_per_step=rows_per_step)
from pathlib import Path
history = loop.fit(model, rows, schedule=schedule, folder=Path(folder))
if int(__import__("os").environ.get("RANK", 0)) == 0:
    Path(out).write_text(json.dumps(history))
"""


# Without a GPU this is two processes on the CPU, through gloo.
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]


def test_two_processes_under_accelerate_launch_train_as_one_with_the_doubled_batch(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    found = {}
    for processes, rows_per_step in ((1, 2), (2, 1)):
        out = tmp_path / f"{processes}.json"
        command = [sys.executable, *(LAUNCH if processes > 1 else [])]
        command += ["script.py", str(TINY), str(rows_per_step), str(tmp_path / f"run{processes}"), str(out)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        found[processes] = losses(json.loads(out.read_text()))
    assert found[2] == pytest.approx(found[1], abs=1e-5)


@pytest.mark.parametrize("harm", ["half", "missing", "altered", "unsealed"])
def test_a_damaged_checkpoint_goes_said_so_and_the_one_before_it_is_taken(
    rows, whole, tmp_path, monkeypatch, capsys, harm
):
    stopped(rows, tmp_path / "run", monkeypatch)
    (last,) = (tmp_path / "run").glob("*/checkpoint-4")
    if harm == "half":
        (last / "files.json").write_text('{"optim')
    elif harm == "unsealed":
        (last / "files.json").unlink()
    elif harm == "missing":
        (last / "rng_state.pth").unlink()
    else:
        content = bytearray((last / "optimizer.pt").read_bytes())
        content[len(content) // 2] ^= 1
        (last / "optimizer.pt").write_bytes(content)
    resumed = student()
    history = loop.fit(resumed, rows, schedule=SCHEDULE, folder=tmp_path / "run")
    assert f"{last} is damaged (" in capsys.readouterr().err
    assert [entry["step"] for entry in history] == [1, 2, 3, 4, 5, 6]
    assert alike(resumed, whole[0])
