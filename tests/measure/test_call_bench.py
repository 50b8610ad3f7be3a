"""The race of calls: everybody on the same cases, whoever cannot run has a record that says why."""

import pytest
from transformers import PreTrainedModel  # noqa: F401  before avalab reaches torchao: its warnings are its own

from avalab.data.calls import Case
from avalab.engines.calling.decoder import Decoder, Tally
from avalab.lab.errors import Unavailable
from avalab.lab.run import Run
from avalab.measure.calling import bench
from avalab.measure.calling.bench import Contestant


class Nobody:
    """A reader that is never asked."""

    slots, context = 1, 8

    def read(self, rows):
        raise AssertionError

    def share(self, source, target, place):
        raise AssertionError

    def forget(self, slot, place):
        raise AssertionError


def contestant(name, samples, texts, readings=0):
    tally = Tally(readings=readings, emitted=10, grammar_s=1.0, reading_s=3.0)
    decoder = Decoder(Nobody(), (0,), tally=tally) if readings else None
    return Contestant(name, lambda cases: texts, lambda: None, decoder, samples, texts)


def value(run, subject, metric):
    return next(row.value for row in run.records if (row.subject, row.metric) == (subject, metric))


def test_ratios_are_paired_by_round_and_to_the_servers_best_setting():
    run = Run("bench_calls", "smoke")
    there = [
        contestant("slow", [1.0, 1.0, 1.0], ["a", "b"], readings=10),
        contestant("forced", [4.0, 2.0, 6.0], ["a", "c"], readings=4),
        contestant("server of 1", [1.0, 1.0, 1.0], ["x", "y"]),
        contestant("server of 4", [2.0, 1.0, 2.0], ["x", "y"]),
    ]
    bench.record(run, there, sha256="f", cases=2)
    assert value(run, "forced", "speed_ratio") == 2.0  # of 2, 2 and 3
    assert value(run, "server of 1", "speed_ratio") == 0.5
    assert value(run, "forced", "identical_share") == 0.5
    assert value(run, "forced", "readings_per_token") == 0.4
    assert value(run, "forced", "grammar_share") == 0.25


def test_who_cannot_run_is_a_record_with_the_reason(monkeypatch, tmp_path):
    def missing(*arguments, **options):
        raise Unavailable("llama.cpp is not here")

    monkeypatch.setattr(bench, "ours", missing)
    monkeypatch.setattr(bench, "server", missing)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    run = Run("bench_calls", "smoke")
    assert bench.hold(run, tmp_path / "m.gguf") == []
    assert {row.note for row in run.records} == {"llama.cpp is not here"}
    assert len(run.records) == 7


def test_the_cases_are_ones_that_nobody_has_looked_at(monkeypatch):
    def first(category, limit):
        return [Case(str(i), category, [], [], []) for i in range(limit)]

    monkeypatch.setattr(bench.calls, "cases", first)
    found = [(case.category, int(case.id)) for case in bench.chosen_cases("laptop")]
    assert found == [(name, i) for name in ("simple_python", "multiple") for i in range(168, 176)]


@pytest.mark.parametrize("profile", ["smoke", "laptop", "long"])
def test_every_profile_has_cases_and_rounds(profile):
    categories, items, rounds = bench.SIZES.get(profile, bench.MOST)
    assert categories
    assert items > 0 < rounds
