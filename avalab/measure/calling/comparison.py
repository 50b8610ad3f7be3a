"""What real tools add to training: old templates, new sources, or half of each, at equal tokens, on the same cases.

    python -m avalab.measure.calling.comparison [--profile long] [--sources botocore,nestful] [--tokens N] [--draws D]

1. Examples are split into as many disjoint parts as there are draws; an arm's draw is a sample of its part with the
   same number of tokens as any other's, so that what differs is what the tokens hold.
2. Each draw trains an adapter of notebook 02's recipe, which is merged and answers under the grammar that allows a
   refusal: BFCL's cases beyond the first 168 (`bench.SEEN`), which nobody has looked at, and the held-out third of
   `nestful`'s requests, whose tools come with documentation of their own.
3. Records: the share of right calls a draw and an arm, and its difference to the templates paired by draw.

Adapters, merges and answers are artefacts and cached lines: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

from transformers import PreTrainedTokenizerBase

from avalab.data import packing, repeats, sources, synthesize
from avalab.data.calls import Case, cases
from avalab.data.gates import standard_gates
from avalab.data.sources import nestful
from avalab.lab import assets, statistics
from avalab.lab.errors import InputError
from avalab.lab.run import ROOT, Run
from avalab.measure import answers
from avalab.measure.calling.bench import SEEN
from avalab.models import adapters, checkpoint
from avalab.train import finetune
from avalab.train.loop import Schedule
from avalab.train.recipes import AdapterRecipe

ARMS = ("templates", "sources", "both")

REHEARSAL = 0.25  # tokens of general text a token of examples


def arm_examples(
    tokenizer: PreTrainedTokenizerBase, old: Sequence[dict], new: Sequence[dict], *, draw: int, draws: int, tokens: int
) -> dict[str, list[dict]]:
    """The examples of each arm in one of `draws` disjoint draws, `tokens` tokens each.

    Raises ValueError where a part is too small for so many tokens.
    """
    take = partial(packing.sample_examples, tokenizer, seed=draw)
    parts = {"templates": list(old)[draw::draws], "sources": list(new)[draw::draws]}
    found = {name: take(part, tokens=tokens) for name, part in parts.items()}
    for name, chosen in found.items():
        held = sum(len(packing.encode_chat(tokenizer, example["messages"]).ids) for example in chosen)
        if held < tokens:
            raise InputError(f"draw {draw} of {name} holds {held} tokens of {tokens}: fewer draws, or more examples")
    halves = [take(part, tokens=tokens // 2) for part in parts.values()]
    return {**found, "both": [*halves[0], *halves[1]]}


def new_cases(limit: int) -> dict[str, list[Case]]:
    """`limit` cases of each category that nobody has looked at, and of the second test."""
    found = {name: cases(name, SEEN + limit)[SEEN:] for name in ("simple_python", "multiple", "irrelevance")}
    wheel = assets.fetch_asset(sources.source("nestful").asset)
    return {**found, "nestful": nestful.held_out_cases(wheel)[:limit]}


def compare(
    run: Run, old: Sequence[dict], new: Sequence[dict], asked: dict[str, list[Case]], *, tokens: int, draws: int
) -> dict[str, list[float]]:
    """Train and score every arm of every draw; the mean share of right answers over categories, by arm and draw."""
    base = checkpoint.base_artifact(run)
    tokenizer, row_tokens = checkpoint.load_tokenizer(base), AdapterRecipe.row_tokens
    old, new = (packing.fitting(tokenizer, part, row_tokens) for part in (old, new))
    schedule = Schedule(learning_rate=1e-3, rows_per_step=2)
    recipe = AdapterRecipe(rank=16, alpha=32, rehearsal_tokens=int(REHEARSAL * tokens), schedule=schedule)
    shares: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for draw in range(draws):
        for arm, examples in arm_examples(tokenizer, old, new, draw=draw, draws=draws, tokens=tokens).items():
            name = f"{base.name}+calls-{arm}-{draw}"
            adapter = finetune.train_adapter(base, examples, run=run, name=name, recipe=recipe)
            respondent = answers.Respondent(adapters.merge_adapters(adapter), run.device)
            shares[arm].append(_score(run, f"{arm} {draw}", respondent, asked))
    record_arms(run, shares)
    return shares


def _score(run: Run, subject: str, respondent: answers.Respondent, asked: dict[str, list[Case]]) -> float:
    """Append the share of right answers of each category; their mean."""
    found = []
    for category, listed in asked.items():
        texts = answers.answer_calls(respondent, listed, "grammar", run.artifacts_dir / "cache", progress=subject)
        right = sum(verdict.correct for verdict in answers.judge_calls(listed, texts))
        share = statistics.wilson(right, len(listed))
        metric, sha256 = answers.call_metric(category, "grammar"), respondent.artifact.sha256
        run.record(subject, metric, unit="1", artifact_sha256=sha256, engine="torch", **vars(share))
        found.append(share.value)
    return sum(found) / len(found)


def record_arms(run: Run, shares: dict[str, list[float]]) -> None:
    """Append each arm's mean over its draws, and its difference to the templates, paired by draw."""
    import torch

    baseline = torch.tensor(shares["templates"])
    for arm, values in shares.items():
        found = statistics.over_draws(torch.tensor(values))
        run.record(arm, "call_accuracy_grammar", unit="1", engine="torch", samples=values, **vars(found))
        if arm != "templates":
            gain = statistics.over_draws(torch.tensor(values) - baseline)
            run.record(arm, "call_accuracy_grammar_gain", unit="1", engine="torch", **vars(gain))


def main() -> None:
    """`python -m avalab.measure.calling.comparison`: make the examples, compare, print and save the records."""
    parser = argparse.ArgumentParser(description="old templates, new sources and both, at equal tokens")
    parser.add_argument("--profile", default="long")
    parser.add_argument("--sources", default="botocore,azure-cli,home-assistant,nestful")
    parser.add_argument("--tokens", type=int, default=150_000)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.tokens < 1 or given.draws < 1:
        raise InputError(f"{given.tokens} tokens, {given.draws} draws; give 1 or more of each")
    run = Run("calls_comparison", given.profile, given.seed)
    names, sets = given.sources.split(","), repeats.evaluation_sets()
    each = max(8, given.draws * given.tokens // 300 // len(names))  # 300 tokens are a usual example
    new = [
        example
        for name in names
        for example in synthesize.generate(each, given.seed, row=standard_gates(sets), source=name)
    ]
    old = synthesize.load_examples(ROOT / "data" / "synthetic_datasets")
    asked = new_cases(run.profile.call_items)
    for arm, values in compare(run, old, new, asked, tokens=given.tokens, draws=given.draws).items():
        print(f"{arm:10} {', '.join(f'{value:.1%}' for value in values)}")
    print(run.save())


if __name__ == "__main__":
    main()
