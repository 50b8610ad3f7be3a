"""The lab's compressor against other people's (`peers_known`): one signature, one evaluator, the same file bytes.

1. `write` makes an artefact with a peer; what calibrates does so on the run's own windows.
2. `match` makes the lab's artefact of the same file bytes: its budget is a number of bytes, so the lab does the
   matching, and one it has made already serves again within 1 %. It does so in every form of `FORMS`, a row each:
   `ava-<bytes>b` (int8 embedding at least: transformers, vLLM), `ava-packed-<bytes>b` (embedding below 8 bits: only
   this package loads it) and `ava-gguf-<bytes>b` (llama.cpp and its kin), so that portable forms stand by themselves.
3. `record` appends bytes, seconds and scores, and the ratio of KL divergences to each form on the same windows.
4. `peers_calls` asks all of them the same function calls, forced by a grammar, and pairs the answers.
5. `python -m avalab.peers` does all of it for a model and writes results/<run>/peers.json after each subject. With
   `--add` it goes on from that file: what it holds is neither made nor scored again, and nothing in it is lost.

A missing library raises EngineUnavailable with the install line; the command records that and goes on. What it does not
do: tune a peer, train after rounding, or choose among the lab's forms.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Mapping, Sequence

from avalab import corpora, engines, models, peers_calls, quality, quantize
from avalab import peers_scores as scoring
from avalab.artifacts import Artifact
from avalab.experiment import PROFILES, ROOT, Run, load_average, load_records
from avalab.peers_known import NAMES, PEERS, SHORT, known
from avalab.quality import Reference, TokenScores

SAME_BYTES = 0.01  # two files within this share are of one size


def write(base: Artifact, peer: str, *, run: Run) -> Artifact:
    """The artefact of a peer, below `run.artifacts_dir`; one of the same recipe and code is reused.

    Raises ValueError for an unknown peer or a base that is no bf16 artefact, EngineUnavailable without its library.
    """
    row = known(peer)
    if base.format != "bf16":
        raise ValueError(f"{base.name} is in format {base.format!r}; only bf16 artefacts can be compressed")
    if importlib.util.find_spec(row.module) is None:
        raise engines.EngineUnavailable(f"peer {peer} needs the package {row.module}; install it: {row.install}")
    return row.make(base, run)


def match(base: Artifact, size: int, *, run: Run, form: str = "ava", made: Sequence[Artifact] = ()) -> Artifact:
    """The lab's artefact of `size` bytes in one of `FORMS`: one of `made` within 1 % of it, or a new one.

    Raises ValueError for an unknown form, and as `ava` does for a budget that no file fits.
    """
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r} of the lab's artefact; choose one of {', '.join(FORMS)}")
    near = [artifact for artifact in made if abs(artifact.bytes / size - 1) <= SAME_BYTES]
    return near[0] if near else quantize.write(base, "ava", bytes=size, run=run, **FORMS[form])


def references(run: Run, base: Artifact) -> dict[str, Reference]:
    """What every subject is compared with: the base on the windows of each evaluation text of the profile."""
    tokenizer, cache = models.load_tokenizer(base), run.artifacts_dir / "cache"
    texts = corpora.evaluation_texts(run, tokenizer)
    windows = {text.name: corpora.profile_windows(run, text, tokenizer) for text in texts}
    return {name: quality.reference(base, rows, cache, run.device) for name, rows in windows.items()}


def record(
    run: Run,
    subject: str,
    artifact: Artifact,
    against: dict[str, Reference],
    *,
    peer: str = "",
    rivals: Mapping[str, Artifact] | None = None,
) -> dict[str, TokenScores]:
    """Append bytes, seconds and, for each text, KL (mean, 99th percentile), agreement, perplexity and rise in loss.

    `peer` names the row whose engine scores the artefact (none: torch). With `rivals` by form, which torch has to load,
    also `kl_ratio` (`:packed` and `:gguf` behind the text for those forms): the rival's mean KL divergence over this
    one's, windows paired. Returns the token scores by text.
    """
    row = known(peer) if peer else None
    about = {"artifact_sha256": artifact.sha256, "engine": row.engine if row else "torch"}
    measured, recipe = artifact.card["measured"], artifact.card["recipe"]
    stored = {"embedding": row.embedding if row else "as its recipe says", "format": artifact.format}
    run.record(subject, "artifact_bytes", artifact.bytes, "bytes", n=1, details=stored, **about)
    details = {"recipe": recipe, **measured}
    run.record(subject, "compress_seconds", measured.get("compress_seconds"), "s", n=1, details=details, **about)
    cache, found = run.artifacts_dir / "cache", {}
    for text, reference in against.items():
        found[text] = scoring.scores(artifact, reference, cache, engine=about["engine"], device=run.device)
        base = scoring.scores(reference.base, reference, cache, device=run.device)
        rows = _estimates(run, found[text], base)
        for metric, unit, estimate in rows:
            run.record(subject, f"{metric}:{text}", unit=unit, **vars(estimate), **about)
        for form, rival in (rivals or {}).items():
            theirs = scoring.scores(rival, reference, cache, device=run.device)
            estimate = scoring.ratio(theirs.kl, found[text].kl, resamples=run.profile.resamples, seed=run.seed)
            sizes = {"rival": rival.name, "rival_bytes": rival.bytes, "rival_sha256": rival.sha256}
            run.record(subject, _ratio_of(text, form), unit="1", **vars(estimate), details=sizes, **about)
    return found


def compare(run: Run, names: Sequence[str], *, forms: Sequence[str] = ()) -> None:
    """Record the base, each named peer and the lab's artefacts of its size, in all forms or the named ones.

    What the run's records hold already is left as it is, and a lab's artefact of theirs serves again within 1 %. The
    file of records is written after each subject. Raises ValueError when those records are of another base.
    """
    base = models.base(run)
    known = {row.subject: row for row in run.records if row.metric == "artifact_bytes"}
    if "base" in known and known["base"].artifact_sha256 != base.sha256:
        raise ValueError(f"{run.records_path.name} is about another base than {base.name}; start anew, without --add")
    against = references(run, base)
    if "base" not in known:
        record(run, "base", base, against)
    made = {form: _made_before(run, form) for form in forms or FORMS}
    for name in (name for name in names if name not in known):
        run.records[:] = [row for row in run.records if row.subject != name]  # why it failed then
        _compare_one(run, base, name, against, made)
        run.save()


def _made_before(run: Run, form: str) -> list[Artifact]:
    """The lab's artefacts of a form that the run's records speak of."""
    return [a for s, a in peers_calls.recorded(run).items() if re.fullmatch(rf"{form}-\d+b", s)]


def _compare_one(run: Run, base: Artifact, name: str, against: dict[str, Reference], made: dict) -> None:
    try:
        artifact = write(base, name, run=run)
        found = {form: _rival(run, base, artifact.bytes, against, form, made[form]) for form in made}
        rivals = {form: rival for form, rival in found.items() if rival}
        record(run, name, artifact, against, peer=name, rivals=rivals)
    except (engines.EngineUnavailable, ValueError, RuntimeError) as error:  # NotSupported is a ValueError
        run.record(name, "kl_divergence", None, "nats/token", note=" ".join(str(error).split()))


def _rival(run: Run, base: Artifact, size: int, against: dict, form: str, made: list[Artifact]) -> Artifact | None:
    """The lab's artefact of this size, recorded when it is new; None, with the reason, where there is none."""
    try:
        rival = match(base, size, run=run, form=form, made=made)
    except ValueError as error:
        run.record(f"{form}-{size}b", "kl_divergence", None, "nats/token", note=" ".join(str(error).split()))
        return None
    if rival not in made:
        made.append(rival)
        record(run, f"{form}-{rival.bytes}b", rival, against)
    return rival


def _ratio_of(text: str, form: str) -> str:
    return ":".join(("kl_ratio", text, *form.split("-")[1:]))


def _estimates(run: Run, ours: TokenScores, base: TokenScores) -> list[tuple[str, str, quality.Estimate]]:
    how = {"resamples": run.profile.resamples, "seed": run.seed}
    return [
        ("kl_divergence", "nats/token", quality.mean(ours.kl, **how)),
        ("kl_divergence_p99", "nats/token", scoring.tail(ours.kl, **how)),
        ("top1_agreement", "1", quality.mean(ours.agrees, **how)),
        ("perplexity", "1", quality.perplexity(ours.nll, **how)),
        ("loss_rise", "nats/token", quality.paired_difference(ours.nll, base.nll, **how)),
    ]


def _shown(run: Run) -> str:
    """A line a subject: bytes, seconds, and for each text its scores and the lab's ratio to it in every form."""
    texts = run.profile.eval_texts
    columns = ["artifact_bytes", "compress_seconds", *(f"{metric}:{text}" for text in texts for metric in SHOWN)]
    columns += [_ratio_of(text, form) for text in texts for form in FORMS]
    return scoring.table(run.records, [*columns, f"{peers_calls.SHARE}:{peers_calls.ALL}"])


def main() -> None:
    """Compare peers with the lab's compressor on one model; prints a table."""
    options = _options()
    run = Run("peers", options.profile, options.seed, options.model)
    if options.add and run.records_path.is_file():
        run.records += load_records(run.records_path)
    compare(run, options.peers.split(","), forms=options.forms.split(","))
    calls = run.profile.call_items if options.calls is None else options.calls
    if calls:
        peers_calls.record(run, calls)
    print(_shown(run))
    print(f"load average {load_average()}; records: {run.records_path.relative_to(ROOT)}")


def _options() -> argparse.Namespace:
    """The command's options; a wrong one ends the command before anything runs."""
    parser = argparse.ArgumentParser(prog="python -m avalab.peers", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="", help="asset, folder or hub id; the profile's own without it")
    parser.add_argument("--profile", choices=PROFILES, default="laptop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forms", default=",".join(FORMS), help="forms of the lab's artefact, joined by commas")
    parser.add_argument("--peers", default=",".join(SHORT), help=f"names joined by commas; all: {', '.join(NAMES)}")
    parser.add_argument("--calls", type=int, help="function calls of each category; 0: none; the profile's own without")
    parser.add_argument("--add", action="store_true", help="go on from the records that are there")
    options = parser.parse_args()
    for kind, given, allowed in (("peer", options.peers, PEERS), ("form", options.forms, FORMS)):
        unknown = [name for name in given.split(",") if name not in allowed]
        if unknown:
            parser.error(f"unknown {kind} {', '.join(unknown)}; choose from {', '.join(allowed)}")
    if options.calls is not None and options.calls < 0:
        parser.error(f"--calls has to be 0 or more, got {options.calls}")
    return options


FORMS: dict[str, dict] = {"ava": {}, "ava-packed": {"embedding": "packed"}, "ava-gguf": {"format": "gguf"}}
SHOWN = ("kl_divergence", "kl_divergence_p99", "top1_agreement", "perplexity")

if __name__ == "__main__":
    main()
