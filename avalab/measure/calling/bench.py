"""Calls a second on one machine, ours against llama.cpp's own server: the same file, cases, threads and greedy choice.

    python -m avalab.measure.calling.bench [--profile P] [--file FILE.gguf] [--rounds N]      (make bench-calls)

1. The cases are BFCL's simple and multiple ones beyond the first 168, which others were chosen by, or in `smoke` the
   toolbox's; a call is forced, one a case.
2. Contestants: `slow` reads a token at a time under the grammar; `forced` appends what the grammar dictates, `guessed`
   guesses from the prompt besides, `together` answers 8 requests at a time. `server` is llama.cpp's through xllamacpp
   with a JSON schema as its grammar, prompt cache on, 1, 4 or 8 slots and as many clients. Each is opened once.
3. Every round visits every contestant in an order drawn anew and times it on all cases, so that a busy moment meets
   them all; a first visit, of one case, is not counted. A contestant that cannot run here is a record that says why.
4. Records: `calls_per_s` (median of the rounds), `speed_ratio` to the server's best setting (paired by round), and of
   ours `identical_share` to `slow`, `readings_per_token`, `grammar_share` of the time.

The server writes JSON alone, ours a call between its tags, which is a few forced tokens more.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from avalab.data import calls
from avalab.data.calls import Case
from avalab.engines import facts, gguf
from avalab.engines.calling.decoder import GUESS, Ask, Decoder
from avalab.engines.calling.grammar import Languages, languages_for
from avalab.engines.calling.readers import LlamaCppReader, tokenizer_beside
from avalab.lab import assets, statistics
from avalab.lab.artifacts import sha256_of
from avalab.lab.errors import InputError, LabError, Unavailable
from avalab.lab.run import Run, load_average
from avalab.lab.schemas import to_json_schema

SEEN = 168  # cases of each category that were looked at before

ANSWER_TOKENS = 96

CONTEXT = 2048

TOGETHER = 8

SERVER_SLOTS = (1, 4, 8)

SIZES = {"smoke": (("toolbox_multiple",), 3, 2), "laptop": (("simple_python", "multiple"), 8, 3)}  # items, rounds

MOST = (("simple_python", "multiple"), 32, 5)  # of any other profile


@dataclass
class Contestant:
    """Somebody who answers cases; `about` says what it cost, `texts` what was answered."""

    name: str
    answer: Callable[[Sequence[Case]], list[str]]
    close: Callable[[], None]
    decoder: Decoder | None = None
    samples: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


def chosen_cases(profile: str) -> list[Case]:
    """The cases of a profile, of every category alike many."""
    categories, items, _ = SIZES.get(profile, MOST)
    skip = 0 if categories[0] in calls.TOOLBOX else SEEN
    return [case for category in categories for case in calls.cases(category, skip + items)[skip:]]


def ours(file: Path, name: str, *, threads: int, forced: bool, guess: int, together: int = 1) -> Contestant:
    """The lab's decoder over llama.cpp's batches."""
    reader = LlamaCppReader(file, slots=together + 1, context=CONTEXT, threads=threads)
    tokenizer = tokenizer_beside(file)
    decoder = Decoder(reader, facts(file.parent).stops, forced=forced, guess=guess)
    languages = languages_for(tokenizer, reader.vocabulary, decoder.stops)

    def answer(cases: Sequence[Case]) -> list[str]:
        asks = [_ask(tokenizer, languages, case) for case in cases]
        found = dict(decoder.answers(asks, at_once=together))
        return [tokenizer.decode(found[i]) for i in range(len(cases))]

    return Contestant(name, answer, reader.close, decoder)


def _ask(tokenizer, languages: Languages, case: Case) -> Ask:
    prompt = tokenizer(calls.case_prompt(tokenizer, case), add_special_tokens=False).input_ids
    return Ask(prompt, ANSWER_TOKENS, languages.matcher(languages.of_calls(case.functions, max_calls=1)))


def server(file: Path, *, threads: int, slots: int) -> Contestant:
    """llama.cpp's server inside this process, with as many clients as slots. Raises Unavailable without xllamacpp."""
    try:
        import xllamacpp
    except ImportError:
        raise Unavailable("llama.cpp's server needs xllamacpp; install it: pip install xllamacpp") from None
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_parallel, parameters.n_ctx = str(file), slots, CONTEXT * slots
    parameters.cont_batching, parameters.kv_unified, parameters.verbosity = True, True, -1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    opened = xllamacpp.Server(parameters)
    tokenizer = tokenizer_beside(file)

    def one(case: Case) -> str:
        asked = {
            "prompt": tokenizer(calls.case_prompt(tokenizer, case), add_special_tokens=False).input_ids,
            "n_predict": ANSWER_TOKENS,
            "temperature": 0,
            "cache_prompt": True,
            "json_schema": _schema(case),
        }
        given = opened.handle_completions(asked)
        return given.get("content") or given["choices"][0]["text"]

    def answer(cases: Sequence[Case]) -> list[str]:
        with ThreadPoolExecutor(slots) as pool:
            return list(pool.map(one, cases))

    return Contestant(f"server of {slots}", answer, lambda: None)


def _schema(case: Case) -> dict:
    one_of = [
        {
            "type": "object",
            "properties": {"name": {"const": function["name"]}, "arguments": to_json_schema(function)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in case.functions
    ]
    return {"type": "array", "items": {"anyOf": one_of}, "minItems": 1, "maxItems": 1}


def hold(run: Run, file: Path, *, rounds: int = 0) -> list[Contestant]:
    """Time everybody on the profile's cases; records are appended to the run."""
    cases, threads = chosen_cases(run.profile_name), 0
    makers = {
        "slow": lambda: ours(file, "slow", threads=threads, forced=False, guess=0),
        "forced": lambda: ours(file, "forced", threads=threads, forced=True, guess=0),
        "guessed": lambda: ours(file, "guessed", threads=threads, forced=True, guess=GUESS),
        "together": lambda: ours(file, "together", threads=threads, forced=True, guess=GUESS, together=TOGETHER),
        **{f"server of {n}": lambda n=n: server(file, threads=threads, slots=n) for n in SERVER_SLOTS},
    }
    there, sha256 = [], sha256_of(file)
    for name, make in makers.items():
        try:
            there.append(make())
            there[-1].answer(cases[:1])  # what is done once: kernels chosen, pages read
        except (LabError, RuntimeError, ValueError, KeyError) as error:
            there = [one for one in there if one.name != name]
            run.record(name, "calls_per_s", None, "calls/s", engine="llamacpp", artifact_sha256=sha256, note=str(error))
    order = random.Random(run.seed)
    for _ in range(rounds or SIZES.get(run.profile_name, MOST)[2]):
        for one in order.sample(there, len(there)):
            began = time.perf_counter()
            one.texts = one.answer(cases)
            one.samples.append(len(cases) / (time.perf_counter() - began))
    record(run, there, sha256=sha256, cases=len(cases))
    for one in there:
        one.close()
    return there


def record(run: Run, contestants: Sequence[Contestant], *, sha256: str, cases: int) -> None:
    """Speeds, ratios to the server's best setting, and whether fast answers are the slow ones."""
    about = {"engine": "llamacpp", "artifact_sha256": sha256, "details": {"cases": cases, "load": load_average()}}
    by_name = {one.name: one for one in contestants}
    servers = [one for one in contestants if one.decoder is None]
    best = max(servers, key=lambda one: statistics.quantile(one.samples).value, default=None)
    for one in contestants:
        run.record(
            one.name,
            "calls_per_s",
            unit="calls/s",
            samples=one.samples,
            **vars(statistics.quantile(one.samples)),
            **about,
        )
        if best is not None and one is not best:
            ratios = [a / b for a, b in zip(one.samples, best.samples, strict=True)]
            note = f"against {best.name}"
            run.record(one.name, "speed_ratio", unit="1", note=note, **vars(statistics.quantile(ratios)), **about)
        if one.decoder is not None:
            tally = one.decoder.tally
            run.record(one.name, "readings_per_token", tally.readings / max(1, tally.emitted), "1", **about)
            share = tally.grammar_s / max(1e-9, tally.grammar_s + tally.reading_s)
            run.record(one.name, "grammar_share", share, "1", **about)
            if "slow" in by_name:
                same = sum(a == b for a, b in zip(one.texts, by_name["slow"].texts, strict=True))
                run.record(one.name, "identical_share", unit="1", **vars(statistics.wilson(same, cases)), **about)


def the_file(run: Run, given: str) -> Path:
    """The GGUF file to time: the one given, that of the profile's model, or the tiny model written as one."""
    if given:
        return assets.only_gguf(assets.resolve_model(given))
    path = assets.resolve_model(run.model)
    if path.suffix == ".gguf":
        return path
    folder = run.artifacts_dir / "bench-calls"
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob("*.gguf")):
        gguf.export(path, folder / "model.gguf", "f16")
        gguf.copy_beside(path, folder)
    return assets.only_gguf(folder)


def main() -> None:
    """`python -m avalab.measure.calling.bench`: hold it, print and save the records."""
    parser = argparse.ArgumentParser(description="time function calls against llama.cpp's server")
    parser.add_argument("--profile", default="laptop")
    parser.add_argument("--file", default="")
    parser.add_argument("--rounds", type=int, default=0)
    given = parser.parse_args()
    if given.rounds < 0:
        raise InputError(f"{given.rounds} rounds; give 1 or more, or 0 for the profile's own")
    run = Run("bench_calls", given.profile)
    hold(run, the_file(run, given.file), rounds=given.rounds)
    for row in run.records:
        shown = "-" if row.value is None else f"{row.value:.3f}"
        print(f"{row.subject:14} {row.metric:20} {shown:>8}  {json.dumps([row.low, row.high])}  {row.note[:80]}")
    print(run.save())


if __name__ == "__main__":
    main()
