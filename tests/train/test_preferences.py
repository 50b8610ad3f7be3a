"""Preferences: pencil, properties, oracles (trl, the formula in float64), training, refusals."""

import json
from dataclasses import replace
from math import log

import pytest
import torch
from torch.nn import functional as F

from avalab.data import packing, synthesize
from avalab.data.packing import one_row_batch
from avalab.lab.errors import InputError, MissingFile
from avalab.lab.run import ROOT
from avalab.models import checkpoint
from avalab.models.attention import apply_packed_attention
from avalab.train import finetune, loop
from avalab.train.preferences import align, losses, pairs
from avalab.train.recipes import PREFERENCES, AdapterRecipe, PreferenceRecipe, Schedule

TRAINING = AdapterRecipe(
    rank=8, row_tokens=400, schedule=Schedule(learning_rate=5e-3, rows_per_step=2, epochs=4, checkpoint_every=2)
)
RECIPE = PreferenceRecipe(training=TRAINING)


def pair(number: int, chosen: str, rejected: str) -> dict:
    return {"messages": [{"role": "user", "content": f"Say {number}."}], "chosen": chosen, "rejected": rejected}


TEXTS = {"a": "good", "b": "bad", "c": "good too"}

PAIRS = [pair(n, f"It is {n}.", "I do not know what you want from me.") for n in range(24)]


@pytest.fixture(scope="module")
def tokenizer(base):
    return checkpoint.load_tokenizer(base)


@pytest.fixture(scope="module")
def row(tokenizer):
    return pairs.pack_pairs(tokenizer, PAIRS[:3], row_tokens=400, context=400, seed=0)[0]


def two_ratios(chosen: float, rejected: float):
    return torch.tensor([[chosen, rejected]], dtype=torch.float64), torch.tensor([[2, 4]])


# --- the losses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dpo", log(4 / 3)),  # beta h = ln 3: sigmoid is 3/4
        ("cdpo", 0.75 * log(4 / 3) + 0.25 * log(4)),
        ("ipo", (log(3) / 2 - log(3) / 4 - 1) ** 2),  # means over 2 and 4 tokens; 1 / (2 beta) = 1
    ],
)
def test_the_loss_of_a_pair_by_pencil(name, value):
    ratios, lengths = two_ratios(log(3), -log(3)) if name != "ipo" else two_ratios(log(3), log(3))
    found = losses.LOSSES[name](ratios, lengths, beta=0.5, smoothing=0.25)
    assert found.item() == pytest.approx(value)


def test_a_model_that_has_not_moved_loses_log_two_whatever_beta_is():
    for beta in (0.01, 3.0):
        assert losses.dpo(*two_ratios(0, 0), beta=beta, smoothing=0).item() == pytest.approx(log(2))


def test_the_conservative_loss_without_smoothing_is_the_plain_one_and_is_least_at_the_stated_margin():
    ratios, lengths = two_ratios(1.3, 0.2)
    assert losses.cdpo(ratios, lengths, beta=0.3, smoothing=0.0) == losses.dpo(ratios, lengths, beta=0.3, smoothing=0)
    best, _ = two_ratios(log(9) / 0.3, 0)  # log((1 - 0.1) / 0.1) / beta
    best.requires_grad_()
    losses.cdpo(best, lengths, beta=0.3, smoothing=0.1).backward()
    assert best.grad.abs().max() < 1e-12


@pytest.mark.parametrize("name", PREFERENCES)
def test_every_loss_of_the_recipe_is_a_row_of_the_table_and_falls_as_the_margin_grows_from_zero(name):
    assert tuple(losses.LOSSES) == PREFERENCES
    before, after = (losses.LOSSES[name](*two_ratios(x, -x), beta=0.1, smoothing=0.1).item() for x in (0.0, 0.5))
    assert after < before


# --- rows ------------------------------------------------------------------------------------------------------------


def test_a_prompt_stands_in_the_row_once_and_each_answer_is_predicted_whole(tokenizer, row):
    order = [int(owner) // 2 for owner in row["owners"]]
    assert order == sorted(order)
    for index, (first, second) in enumerate(row["forks"].tolist()):
        start, end = row["boundaries"][index : index + 2].tolist()
        said = [tokenizer.decode(row["input_ids"][a:b]) for a, b in ((start, first), (first, second), (second, end))]
        assert "Say" in said[0]
        assert said[1].startswith("It is")
        assert said[2].startswith("I do not know")
        for which, (a, b) in enumerate([(first, second), (second, end)]):
            mine = row["owners"] == 2 * index + which
            assert row["targets"][mine].tolist() == row["input_ids"][a:b].tolist()
            assert row["sources"][mine].tolist() == [first - 1, *range(a, b - 1)]
            assert row["position_ids"][a] == first - start
    assert int((row["labels"] != packing.IGNORED).sum()) == 3  # one a pair


def whole_answers(model, tokenizer, some):
    """log p of every answer, each in a chat of its own, by the definition, in float64."""
    found = []
    for each in some:
        for name in ("chosen", "rejected"):
            chat = packing.encode_chat(tokenizer, [*each["messages"], {"role": "assistant", "content": each[name]}])
            logits = model(input_ids=torch.tensor([chat.ids])).logits[0].log_softmax(-1)
            found.append(sum(logits[i, label] for i, label in enumerate(chat.labels) if label != packing.IGNORED))
    return torch.stack(found)


def test_log_probabilities_of_forked_rows_are_those_of_each_answer_alone(base, tokenizer):
    model = checkpoint.load_model(base, dtype=torch.float64)
    rows = pairs.pack_pairs(tokenizer, PAIRS[:5], row_tokens=150, context=150, seed=0)
    assert len(rows) > 1
    alone = whole_answers(model, tokenizer, PAIRS[:5])
    packed = torch.cat(align.log_probabilities(model, rows))
    torch.testing.assert_close(packed.sort().values, alone.sort().values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PREFERENCES)
def test_loss_and_gradients_agree_with_the_formula_in_float64(base, tokenizer, name):
    model = checkpoint.load_model(base, dtype=torch.float64)
    reference = whole_answers(model, tokenizer, PAIRS[:2]).detach() + torch.tensor([0.3, -0.2, -1.0, 0.5])
    ratios = (whole_answers(model, tokenizer, PAIRS[:2]) - reference).view(-1, 2)
    lengths = torch.tensor([len(_answer(tokenizer, p, n)) for p in PAIRS[:2] for n in ("chosen", "rejected")])
    h, mean = ratios[:, 0] - ratios[:, 1], ratios / lengths.view(-1, 2)
    theirs = {
        "dpo": -F.logsigmoid(0.1 * h),
        "cdpo": -0.9 * F.logsigmoid(0.1 * h) - 0.1 * F.logsigmoid(-0.1 * h),
        "ipo": (mean[:, 0] - mean[:, 1] - 5) ** 2,
    }[name].mean()
    weights = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(theirs, weights)
    (row,) = pairs.pack_pairs(tokenizer, PAIRS[:2], row_tokens=400, context=400, seed=1)
    order = reference.view(-1, 2)[_places(tokenizer, row)].flatten()
    student = _student(model, replace(RECIPE, loss=name))
    ours = student(**one_row_batch([{**row, "reference": order}]))["loss"]
    torch.testing.assert_close(ours, theirs)
    # The model's norms and angles are in float32 whatever its weights are, and the forms sum in another order.
    torch.testing.assert_close(torch.autograd.grad(ours, weights), wanted, rtol=1e-3, atol=2e-6)


def _answer(tokenizer, each, name):
    chat = packing.encode_chat(tokenizer, [*each["messages"], {"role": "assistant", "content": each[name]}])
    return [label for label in chat.labels if label != packing.IGNORED]


def _places(tokenizer, row):
    """Which of PAIRS stand in a row, in order."""
    starts = zip(row["boundaries"][:-1].tolist(), row["forks"].tolist(), strict=True)
    return [int(tokenizer.decode(row["input_ids"][a:first]).split("Say ")[1].split(".")[0]) for a, (first, _) in starts]


def _student(model, recipe):
    apply_packed_attention(model)
    return loop.Student(model, align.Objective(recipe, "t"))


class PlainLogProbabilities:
    """What trl's kernel computes, by definition."""

    @staticmethod
    def apply(hidden, weight, _bias, targets, *_):
        found = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        return found, *[torch.zeros_like(found)] * 3, found > 0  # what is only logged


@pytest.mark.parametrize(("name", "theirs"), [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_loss_and_gradients_of_a_batch_agree_with_trl(base, tokenizer, tmp_path, monkeypatch, name, theirs):
    """trl's log-probabilities come from a Triton kernel, which no CPU runs: torch's definition stands in for it."""
    trl = pytest.importorskip("trl", reason="the oracle is trl's own trainer")
    from datasets import Dataset
    from trl.trainer import utils

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", PlainLogProbabilities)
    model, reference = (checkpoint.load_model(base, dtype=torch.float32) for _ in range(2))
    with torch.no_grad():
        for weight in reference.parameters():
            weight.mul_(1.03)
    some, batch = PAIRS[:4], []
    for answer in ("chosen", "rejected"):
        for each in some:
            chat = packing.encode_chat(tokenizer, [*each["messages"], {"role": "assistant", "content": each[answer]}])
            begins = pairs._answer_start(chat)
            batch.append((torch.tensor(chat.ids), torch.tensor([0] * begins + [1] * (len(chat.ids) - begins))))
    padded = [torch.nn.utils.rnn.pad_sequence(part, batch_first=True) for part in zip(*batch, strict=True)]
    seen = torch.nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids, _ in batch], batch_first=True)
    options = trl.DPOConfig(
        output_dir=str(tmp_path), loss_type=[theirs], beta=0.1, report_to="none", use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_dropout=False,
    )  # fmt: skip
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    trainer = trl.DPOTrainer(
        model, reference, args=options, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    loss = trainer._compute_loss(
        trainer.model,
        {"input_ids": padded[0], "attention_mask": seen, "completion_mask": padded[1]},
        return_outputs=False,
    )
    loss.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    (row,) = pairs.pack_pairs(tokenizer, some, row_tokens=600, context=400, seed=1)
    (known,) = align.log_probabilities(reference, [row])
    ours = _student(model, replace(RECIPE, loss=name))(**one_row_batch([{**row, "reference": known}]))["loss"]
    ours.backward()
    assert ours.item() == pytest.approx(loss.item(), rel=1e-4)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[n], rtol=2e-3, atol=2e-5)


# --- training -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def aligned(run, base):
    return align.train_aligned(base, PAIRS, run=run, name="aligned", recipe=RECIPE, held_out=PAIRS[:4])


def test_training_tells_the_answers_apart_and_its_history_says_so(run, base, aligned):
    history = finetune.load_history(aligned)
    curve = [entry["margin"] for entry in history if "margin" in entry]
    assert abs(curve[0]) < 0.05  # the adapters begin as nothing
    assert curve[-1] > 1
    assert history[-1]["held_out_loss"] < history[0]["held_out_loss"] == pytest.approx(log(2), abs=0.01)
    unseen = [pair(n, f"It is {n}.", "I do not know what you want from me.") for n in range(30, 36)]
    margins = align.pair_margins(aligned, base, unseen, RECIPE, run)
    assert margins.min() > 0
    align.record_alignment(run, "aligned", aligned, margins)
    found = {record.metric: record for record in run.records}
    assert found["pair_accuracy"].value == 1
    assert len(found["pair_margin:trained"].samples) == len(curve)


def test_the_reference_is_computed_once_and_read_back(run, base, aligned, monkeypatch):
    monkeypatch.setattr(align, "answer_log_probabilities", lambda *_, **__: pytest.fail("computed again"))
    rows = align.packed(base, PAIRS, RECIPE, run)
    everything = [*rows, *align.packed(base, PAIRS[:4], RECIPE, run)]
    known = align.cached_log_probabilities(checkpoint.load_model(base), base, everything, run)
    assert [len(each) for each in known[: len(rows)]] == [2 * len(row["forks"]) for row in rows]


def test_a_second_run_is_the_artefact_that_is_there(run, base, aligned, monkeypatch):
    monkeypatch.setattr(loop, "fit", lambda *_, **__: pytest.fail("trained again"))
    again = align.train_aligned(base, PAIRS, run=run, name="aligned", recipe=RECIPE, held_out=PAIRS[:4])
    assert again.sha256 == aligned.sha256


class Stop(loop.Progress):
    """Ends the run as a kill does, after the checkpoint of step 2."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_a_killed_run_goes_on_and_its_margins_are_those_of_one_that_was_not(run, base, aligned, monkeypatch):
    progress = loop.Progress
    monkeypatch.setattr(loop, "Progress", Stop)
    with pytest.raises(KeyboardInterrupt):
        align.train_aligned(base, PAIRS, run=run, name="killed", recipe=RECIPE, held_out=PAIRS[:4])
    monkeypatch.setattr(loop, "Progress", progress)
    resumed = align.train_aligned(base, PAIRS, run=run, name="killed", recipe=RECIPE, held_out=PAIRS[:4])
    curves = [[e.get("margin") for e in finetune.load_history(a)] for a in (aligned, resumed)]
    assert curves[0] == curves[1]


# --- where pairs come from ------------------------------------------------------------------------------------------


def test_an_answer_is_wrong_when_its_calls_are_not_those_of_the_example():
    examples = synthesize.load_examples(ROOT / "data" / "synthetic_datasets" / "single_call.jsonl")
    example, other = examples[:2]
    assert pairs.calls_right(example, example["messages"][-1]["content"])
    assert not pairs.calls_right(example, other["messages"][-1]["content"])
    assert not pairs.calls_right(example, "I cannot do that.")
    refusal = {**example, "calls": []}
    assert pairs.calls_right(refusal, "None of these functions fits.")
    assert not pairs.calls_right(refusal, example["messages"][-1]["content"])


def test_own_mistakes_stand_against_the_right_answer_and_right_ones_give_no_pair(run, base):
    examples = synthesize.load_examples(ROOT / "data" / "synthetic_datasets" / "single_call.jsonl")[:4]
    found = pairs.own_mistakes(base, examples, run=run, new_tokens=8)
    assert found
    assert {each["chosen"] for each in found} <= {example["messages"][-1]["content"] for example in examples}
    assert not pairs.own_mistakes(base, examples, run=run, new_tokens=8, right=lambda *_: True)


def test_scores_of_people_become_pairs_of_the_answers_that_differ():
    sheet = {"prompts": [{"key": "k", "tools": [], "request": "Say 0.", "answers": TEXTS}]}
    scores = [("x", "a", 5), ("x", "b", 1), ("x", "c", 5), ("y", "a", 4), ("y", "b", 3)]
    ratings = [{"prompt": "k", "answer": answer, "rater": who, "helpfulness": n} for who, answer, n in scores]
    found = pairs.rated_pairs(sheet, ratings, by="helpfulness")
    assert found[0]["messages"] == PAIRS[0]["messages"]
    assert [(each["chosen"], each["rejected"]) for each in found] == [("good", "bad"), ("good too", "bad")]


# --- refusals ------------------------------------------------------------------------------------------------------


FORMS = {
    "text": {"prompt": "hi", "chosen": "yes", "rejected": "no"},
    "messages": {
        "prompt": [{"role": "user", "content": "hi"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    },
    "whole chats": {
        name: [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}]
        for name, text in (("chosen", "yes"), ("rejected", "no"))
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_pair_is_read_as_the_same_one(form, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(FORMS[form]) + "\n")
    wanted = {"messages": [{"role": "user", "content": "hi"}], "tools": [], "chosen": "yes", "rejected": "no"}
    assert pairs.load_pairs(path) == [wanted]
    pairs.store_pairs(path, pairs.load_pairs(path))
    assert pairs.load_pairs(path) == [wanted]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt": "hi", "chosen": "yes", "rejected": "yes "}, "equal .'yes'.; leave the pair out"),
        ({"prompt": "hi", "chosen": "yes", "rejected": " "}, "the rejected answer is empty"),
        ({"prompt": "hi", "chosen": "yes"}, "no field rejected"),
        ({"chosen": "yes", "rejected": "no"}, "no prompt"),
        ({"prompt": "hi", "chosen": 3, "rejected": "no"}, "are texts, or messages"),
        ([1], "a list, not an object"),
    ],
)
def test_a_bad_pair_is_refused_with_its_line(line, said, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(FORMS["text"]) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(InputError, match=f"pairs.jsonl:2: .*{said}"):
        pairs.load_pairs(path)


def test_no_file_and_an_empty_one_are_refused(tmp_path):
    with pytest.raises(MissingFile, match="no pairs at"):
        pairs.load_pairs(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no pair"):
        pairs.load_pairs(tmp_path / "empty.jsonl")


def test_pairs_that_are_too_long_or_of_another_tokenizer_are_refused(tokenizer):
    long = {**PAIRS[0], "messages": [{"role": "user", "content": "word " * 300}]}
    with pytest.raises(InputError, match=r"pair 0 has .* of them its prompt, and a row 64; raise"):
        pairs.pack_pairs(tokenizer, [long], row_tokens=64, context=4096, seed=0)
    with pytest.raises(InputError, match="the model's context 20"):
        pairs.pack_pairs(tokenizer, [long], row_tokens=64, context=20, seed=0)
    foreign = pair(0, "It is 0.<|eot_id|>", "no")
    with pytest.raises(InputError, match=r"chosen holds <\|eot_id\|>, a marker .* another tokenizer"):
        pairs.pack_pairs(tokenizer, [foreign], row_tokens=400, context=400, seed=0)
    same = pair(0, "It is 0.", "It is 0.")
    with pytest.raises(InputError, match=r"are the same .* tokens; leave it out"):
        pairs.pack_pairs(tokenizer, [same], row_tokens=400, context=400, seed=0)
    with pytest.raises(InputError, match="no pair to learn from"):
        pairs.pack_pairs(tokenizer, [], row_tokens=400, context=400, seed=0)


@pytest.mark.parametrize(
    ("bad", "said"),
    [({"loss": "kto"}, "choose one of dpo, ipo, cdpo"), ({"beta": 0}, "beta is 0"), ({"smoothing": 0.5}, "below 0.5")],
)
def test_a_recipe_that_no_loss_can_follow_is_refused(bad, said):
    with pytest.raises(InputError, match=said):
        PreferenceRecipe(**bad)
