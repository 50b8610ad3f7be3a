"""Claims of compressing, by pencil: a quarter of the bytes, a loss on the worst text, three times the speed."""

from math import log

import pytest

from avalab.lab.run import Run
from avalab.plan import claims
from avalab.report import tables


@pytest.fixture
def records():
    """Before: 400 bytes and 10 tokens/s; after: 100 bytes, 30 tokens/s, perplexity 1 % and 5 % up."""
    run = Run("t", "smoke")
    for subject, size, rate in (("before", 400, 10), ("after", 100, 30), ("slower", 200, 9)):
        run.record(subject, "artifact_bytes", size, "byte")
        run.record(subject, "decode_tokens_per_s:context8", rate, "token/s", low=0.9 * rate, high=1.1 * rate)
    for text, rise in (("near", log(1.01)), ("far", log(1.05))):
        run.record("after", f"loss_rise:{text}", rise, "nats/token", low=log(1.03), high=log(1.07))
    return run.records


def verdicts(records, subject: str) -> dict[str, str]:
    return {j.claim.words: j.verdict for j in claims.judge_claims(records, subject, "before", context=8)}


def test_a_quarter_of_the_bytes_and_three_times_the_speed_are_reached(records):
    found = verdicts(records, "after")
    assert found["75 % smaller"] == "reached: 75.00 %"
    assert found["2 to 4 times faster"] == "reached: 3.00 [2.45, 3.67] x"


def test_the_loss_is_that_of_the_worst_text_and_not_of_the_mean(records):
    assert verdicts(records, "after")["less than 2 % lost"] == "not reached: 5.00 [3.00, 7.00] % on far"


def test_what_was_not_measured_is_said_and_half_the_bytes_do_not_count(records):
    found = verdicts(records, "slower")
    assert found["75 % smaller"] == "not reached: 50.00 %"
    assert found["less than 2 % lost"] == "not measured"
    assert found["2 to 4 times faster"].startswith("not reached: 0.90")


def test_an_interval_that_holds_the_claim_is_within_chance(records):
    run = Run("t", "smoke", records=list(records))
    run.record("after", "decode_tokens_per_s:context8", 21, "token/s", low=15, high=25)
    assert verdicts(run.records, "after")["2 to 4 times faster"].startswith("reached, within chance: 2.10")


def test_the_table_has_a_row_a_subject_and_a_column_a_claim(records):
    judged = [j for s in ("after", "slower") for j in claims.judge_claims(records, s, "before", context=8)]
    table = tables.claim_table(judged)
    assert table.header == ("after", "75 % smaller", "less than 2 % lost", "2 to 4 times faster")
    assert [row[0] for row in table.rows] == ["after", "slower"]
