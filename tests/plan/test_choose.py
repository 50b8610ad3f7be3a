"""What to use within a budget, and the targets: every choice by pencil from a few records."""

from dataclasses import replace

import pytest

from avalab.lab import statistics
from avalab.lab.run import Run
from avalab.plan import choose
from avalab.report import tables

MB = 10**6
# subject: memory in MB, decode, prefill, KL
FIELD = {
    "bf16 in torch": (900, 20, 500, 0.0),
    "nf4 in torch": (400, 25, 400, 0.20),
    "int8 in openvino": (300, 60, 2000, 0.01),
    "int4 in openvino": (200, 80, 1800, 0.25),
    "q8 in llamacpp": (250, 50, 400, 0.01),
    "q4 in llamacpp": (180, 70, 300, 0.20),
}


@pytest.fixture
def found():
    run = Run("t", "smoke")
    for threads in (1, 2):
        for subject, (memory, decode, prefill, kl) in FIELD.items():
            about = {"engine": subject.split()[-1], "threads": threads}
            run.record(subject, "peak_rss_bytes:engine", memory * MB, "byte", **about)
            for prompt, factor in ((16, 1.0), (512, 0.5)):
                how = {"low": 0.9 * decode * factor, "high": 1.1 * decode * factor}
                run.record(subject, f"decode_tokens_per_s:prompt{prompt}", decode * factor, "token/s", **how, **about)
                run.record(subject, f"prefill_tokens_per_s:prompt{prompt}", prefill / factor, "token/s", **about)
            if threads == 1:
                how = {"low": 0.9 * kl, "high": 1.1 * kl}
                run.record(subject, "kl_divergence:docs", kl, "nats/token", **how, engine=about["engine"])
    return {n: choose.read_candidates(run.records, kl="kl_divergence:docs", threads=n) for n in (1, 2)}


def test_a_candidate_has_the_decode_of_the_shortest_prompt_and_the_prefill_of_the_longest(found):
    first = found[1][0]
    assert (first.subject, first.decode.value, first.prefill.value) == ("bf16 in torch", 20, 1000)
    assert len(found[1]) == len(FIELD)


def test_a_subject_without_a_divergence_is_no_candidate(found):
    records = [r for c in found[1] for r in (c.memory, c.decode, c.prefill)]
    assert choose.read_candidates(records, kl="kl_divergence:docs", threads=1) == []


@pytest.mark.parametrize(
    ("megabytes", "limit", "chosen"),
    [
        (1000, 0.1, "int8 in openvino"),  # 60 is the fastest decode of those at 0.1 or below
        (1000, 0.3, "int4 in openvino"),  # now everything is good enough
        (260, 0.1, "q8 in llamacpp"),  # the faster one does not fit
        (210, 0.1, "q4 in llamacpp"),  # nothing that fits is good enough: the least divergence
        (100, 0.1, None),
    ],
)
def test_the_choice_within_a_budget(found, megabytes, limit, chosen):
    candidate, why = choose.choose_candidate(found[1], megabytes * MB, kl_limit=limit)
    assert (candidate and candidate.subject) == chosen
    assert why == "the least that was measured is 180 MB" or candidate


def test_more_memory_never_leads_to_a_slower_good_choice(found):
    rates = [choose.choose_candidate(found[1], m * MB, kl_limit=0.1)[0].decode.value for m in (250, 300, 500, 1000)]
    assert rates == sorted(rates)


def test_the_default_is_the_choice_of_the_smallest_budget_with_something_good_enough(found):
    small = (100 * MB, 260 * MB, 1000 * MB)
    assert choose.default_candidate(found[1], kl_limit=0.1, budgets=small).subject == "q8 in llamacpp"
    assert choose.default_candidate(found[1], kl_limit=0.1).subject == "int8 in openvino"
    assert choose.default_candidate(found[1], kl_limit=-1) is None


def test_the_table_has_a_row_for_each_budget_that_says_what_and_why(found):
    chosen = choose.choices(found[1], kl_limit=0.1, budgets=(choose.GIB, choose.GIB // 8))
    table = tables.budget_table(chosen, kl_limit=0.1)
    assert [row[:2] for row in table.rows] == [("0.125 GiB", "nothing"), ("1 GiB", "int8 in openvino")]
    assert all(len(row) == len(table.header) for row in table.rows)


def test_targets_compare_with_the_fastest_peer_that_is_not_closer_to_the_base(found):
    """int8 against q8 of the same divergence: 60 / 50 in decode; q4 decodes faster, at a higher divergence: 60 / 70."""
    judged = {
        t.claim: (ratio, sentence)
        for t, ratio, sentence in choose.judge_targets(found, "int8 in openvino", show=tables.value_text)
    }
    assert judged["decode, llama.cpp at one thread"][0] == pytest.approx(60 / 70)
    assert judged["decode, llama.cpp at one thread"][1].startswith("not reached: 0.86x [0.70, 1.05] of q4 in llamacpp")
    assert judged["prefill, llama.cpp at all threads"][0] == pytest.approx(2000 / 400)
    assert judged["prefill, NF4 of the torch engine"][0] == pytest.approx(5)
    assert judged["decode, NF4 of the torch engine"][1].startswith("reached: 2.40x")


def test_peers_that_are_closer_to_the_base_are_named_and_not_counted(found):
    judged = {
        t.claim: (ratio, sentence)
        for t, ratio, sentence in choose.judge_targets(found, "int4 in openvino", show=tables.value_text)
    }
    assert judged["decode, llama.cpp at one thread"] == (
        None,
        "not comparable: every peer is closer to the base, such as q8 in llamacpp (0.0100 [0.0090, 0.0110] nats/token)",
    )


def test_without_llama_cpp_the_sentence_says_so(found):
    alone = {n: [c for c in each if c.engine != "llamacpp"] for n, each in found.items()}
    judged = choose.judge_targets(alone, "int8 in openvino", show=tables.value_text)
    assert [sentence for t, _, sentence in judged if t.peers == " in llamacpp"] == [
        "not measured: no peer in llamacpp here"
    ] * 3
    table = tables.target_table(judged)
    assert len(table.rows) == len(choose.TARGETS)


# --- several models --------------------------------------------------------------------------------------------------

MODELS = {  # memory in MB, tokens/s, right of 20 cases
    "small q in llamacpp": (200, 100, "10" * 10),
    "middle q in llamacpp": (700, 40, "1" * 15 + "0" * 5),
    "large q in llamacpp": (1800, 20, "1" * 18 + "0" * 2),
    "large slow in openvino": (1900, 10, "1" * 18 + "0" * 2),
}


@pytest.fixture
def models():
    run = Run("t", "sizes")
    for subject, (memory, rate, right) in MODELS.items():
        about = {"engine": subject.split()[-1]}
        run.record(subject, "peak_rss_bytes:engine:context2048", memory * MB, "byte", **about)
        run.record(subject, "decode_tokens_per_s:context2048", rate, "token/s", **about)
        run.record(subject, "prefill_tokens_per_s:context2048", 10 * rate, "token/s", **about)
        run.record(subject, "kl_divergence:text", 0.1, "nats/token", **about)
        share = statistics.wilson(right.count("1"), len(right))
        run.record(subject, "calls", unit="1", details={"right": right}, **vars(share))
    return choose.candidates_at(run.records, context=2048, calls="calls", kl="kl_divergence:text")


def named(models, megabytes: int) -> dict[str, str | None]:
    found = choose.answer(models, budgets=(megabytes * MB,))
    return {each.wish.name: each.candidate and each.candidate.subject for each in found}


def test_the_best_at_calls_differs_by_budget_and_equal_shares_are_decided_by_speed(models):
    best = [named(models, m)["best at calls"] for m in (500, 1000, 4000)]
    assert best == ["small q in llamacpp", "middle q in llamacpp", "large q in llamacpp"]


def test_the_fastest_has_to_call_as_well_as_the_best_of_the_same_cases(models):
    """15 of 20 against 18 of 20: three cases apart, p = 0.25; 10 of 20: McNemar tells them apart."""
    assert named(models, 4000)["fastest"] == "middle q in llamacpp"
    assert named(models, 500)["fastest"] == "small q in llamacpp"


def test_under_20_ms_a_token_only_what_is_quick_enough_counts(models):
    assert named(models, 4000)["best under 20 ms a token"] == "small q in llamacpp"
    slow = [c for c in models if c.decode.value < 50]
    found = choose.choose_for(slow, 4000 * MB, choose.WISHES[2])
    assert (found.candidate, found.why) == (None, "the quickest that fits, middle q in llamacpp, takes 25 ms a token")


def test_where_nothing_fits_the_answer_says_what_the_least_is(models):
    found = choose.choose_for(models, 100 * MB, choose.WISHES[0])
    assert (found.candidate, found.why) == (None, "the least that was measured is 200 MB")


def test_without_verdicts_the_interval_decides(models):
    bare = [replace(c, calls=replace(c.calls, details={})) for c in models]
    assert choose.is_as_good(bare[3], bare[2])
    assert choose.is_as_good(bare[1], bare[2]) is False  # the interval of 15 of 20 ends at 89 %, 18 of 20 are 90 %


def test_a_subject_without_a_measurement_at_the_context_is_no_candidate(models):
    records = [r for c in models for r in (c.memory, c.decode, c.kl, c.calls)]
    assert choose.candidates_at(records, context=2048, calls="calls", kl="kl_divergence:text") == []


def test_the_answer_is_a_table_whose_first_column_is_memory(models):
    table = tables.answer_table(choose.answer(models), [], context=2048)
    assert table.header[:3] == ("memory", "you want", "use")
    assert [row[0] for row in table.rows[::3]] == ["0.5 GiB", "1 GiB", "2 GiB", "4 GiB"]
    assert all(len(row) == len(table.header) for row in table.rows)
