"""Numbers, intervals and tables as text, from records nobody measured."""

import subprocess
import sys

import pytest

from avalab.lab.run import Record
from avalab.report import tables


def rec(subject: str, metric: str, value: float | None, unit: str = "", **more) -> Record:
    return Record("01_quantization", subject, metric, value, unit, **more)


RECORDS = [
    rec("bf16", "artifact_bytes", 269.1e6, "bytes"),
    rec("bf16", "decode_tokens_per_s", 22, "tokens/s"),
    rec("bnb-nf4-dq", "artifact_bytes", 112.4e6, "bytes"),
    rec("bnb-nf4-dq", "decode_tokens_per_s", 33, "tokens/s"),
    rec("torchao-int8dyn", "artifact_bytes", 162.5e6, "bytes"),
    rec("torchao-int8dyn", "decode_tokens_per_s", None, note="no kernel for one row"),
]


@pytest.mark.parametrize("module", ["report.tables", "report.page", "plan.choose"])
def test_text_loads_no_drawing_library_and_no_pandas(module):
    heavy = {"matplotlib", "seaborn", "torch", "pandas"}
    check = f"import avalab.{module}, sys; assert not {heavy} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_a_prediction_is_found_under_the_metrics_name_with_or_without_its_unit():
    measured = rec("a", "peak_rss_bytes", 2.0)
    for name in ("predicted_bytes:peak_rss", "predicted_bytes:peak_rss_bytes"):
        made = [rec("b", name, 3.0), rec("a", name, 1.0), rec("a", "predicted_bytes:artifact", 9.0)]
        assert tables.predictions([*made, measured], "peak_rss_bytes").predicted["a"] == pytest.approx(1e-6)
        assert tables.metric_words(name) == "predicted, peak memory"


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (rec("a", "kl_divergence", 0.2312, low=0.2141, high=0.2488), "0.231 [0.214, 0.249] nats/token"),
        (rec("a", "artifact_bytes", 112_400_000, "bytes"), "112.4 MB"),
        (rec("a", "top1_agreement", 0.7701, low=0.7601, high=0.7801), "77.0 [76.0, 78.0] %"),
        (rec("a", "top1_agreement", 77.01, "%"), "77.01 %"),
        (rec("a", "prefill_tokens_per_s", 2345.6, low=2200.0, high=2500.0), "2,346 [2,200, 2,500] tokens/s"),
        (rec("a", "perplexity", 16.0887), "16.09"),
        (rec("a", "kl_divergence", 0.0, low=0.0, high=0.0), "0 nats/token"),
        (rec("a", "steps_taken", 12, "steps"), "12.00 steps"),
    ],
)
def test_a_record_is_shown_with_its_interval_in_its_unit(record, text):
    assert tables.value_text(record) == text


def test_a_record_without_a_value_cannot_be_shown_as_a_number():
    with pytest.raises(ValueError, match="no kernel"):
        tables.value_text(rec("a", "perplexity", None, note="no kernel"))


def test_predicted_and_measured_bytes_are_printed_with_their_ratio(capsys):
    tables.show_ratio("bytes", 123_400_000, 124_000_000)
    assert capsys.readouterr().out == "bytes: predicted 123.4 MB, measured 124.0 MB, measured/predicted 1.005\n"


def test_a_ratio_of_times_keeps_its_unit_and_one_to_nothing_is_refused(capsys):
    tables.show_ratio("decode", 2.0, 3.0, unit="s")
    assert capsys.readouterr().out == "decode: predicted 2.000 s, measured 3.000 s, measured/predicted 1.500\n"
    with pytest.raises(ValueError, match="predicted bytes is 0"):
        tables.show_ratio("bytes", 0, 1)


def test_a_table_shows_units_in_the_header_ratios_to_the_baseline_and_reasons_below():
    metrics = ["artifact_bytes", "artifact_bytes/baseline", "decode_tokens_per_s", "decode_tokens_per_s/baseline"]
    shown = tables.table(RECORDS, ["bf16", "bnb-nf4-dq", "torchao-int8dyn"], metrics)
    assert shown.header == ("", "artefact [MB]", "artefact, times smaller [x]", "decode [tokens/s]", "decode, gain [x]")
    assert shown.rows[1] == ("bnb-nf4-dq", "112.4", "2.39x", "33.00", "1.50x")
    assert shown.rows[2] == ("torchao-int8dyn", "162.5", "1.66x", "(1)", "(1)")
    assert shown.notes == ("(1) no kernel for one row",)


def test_a_disturbed_measurement_is_marked_with_what_disturbed_it():
    disturbed = Record(
        "06", "ava", "decode_tokens_per_s", 40.0, "token/s", note="disturbed: others kept 1.2 processors"
    )
    found = tables.table([disturbed], ["ava"], ["decode_tokens_per_s"])
    assert found.rows == (("ava", "40.00 (1)"),)
    assert found.notes == ("(1) disturbed: others kept 1.2 processors",)


def test_the_table_of_a_notebook_is_escaped_and_the_printed_one_is_markdown():
    shown = tables.Table(("", "a|b"), (("<b>", "1"),))
    assert "&lt;b&gt;" in shown._repr_html_()
    assert repr(shown) == "|  | a\\|b |\n| --- | ---: |\n| <b> | 1 |"


def test_the_page_of_a_table_has_headings_with_a_scope_and_intervals_that_do_not_break():
    shown = tables.Table(("memory", "use"), (("1 GiB", "0.1 [0.0, 0.2]"), ("1 GiB", "")), ("a <note>",))
    head = '<table><thead><tr><th scope="col">memory</th><th scope="col">use</th></tr></thead>'
    rows = '<tr><th scope="row">1 GiB</th><td>0.1 [0.0,\N{NO-BREAK SPACE}0.2]</td></tr>'
    rows += '<tr><th scope="row">1 GiB</th><td></td></tr>'
    notes = "<p><small>a &lt;note&gt;</small></p>\n"
    assert shown._repr_html_() == f"{head}<tbody>{rows}</tbody></table>{notes}"


# --- the frame ---------------------------------------------------------------------------------------------------


def test_a_frame_has_a_row_for_each_record_and_the_metric_in_two_parts():
    made = tables.frame([rec("a", "kl_divergence:docs:long", 0.1, "nats", low=0.0), rec("a", "perplexity", None)])
    assert made[["name", "part"]].to_numpy().tolist() == [["kl_divergence", "docs:long"], ["perplexity", ""]]
    assert made.value.isna().tolist() == [False, True]
    assert tables.frame(made) is made
    assert len(tables.frame([])) == 0


def test_of_a_metric_the_newest_values_are_found_in_their_unit_the_baseline_first():
    made = [rec("b", "recovered:x", 0.5, "1", low=0.4), rec("a", "recovered:x", 0.1, "1"), rec("b", "recovered:x", 0.2)]
    found = tables.measured([*made, rec("c", "recovered:x", None), rec("c", "perplexity", 3.0)], "recovered:x", "a")
    assert found.index.tolist() == ["a", "b"]
    assert found.value.tolist() == pytest.approx([10, 20])
    assert found.low.isna().all()
    assert tables.axis_label(found) == "recovered, x [%]"
    with pytest.raises(ValueError, match="the baseline 'c' has no recovered:x; subjects that have: b, a"):
        tables.measured([*made], "recovered:x", "c")


def test_a_table_of_a_subject_nothing_was_recorded_of_is_refused():
    with pytest.raises(ValueError, match=r"no record of gptq; recorded: bf16, bnb"):
        tables.table(RECORDS, ["bf16", "gptq"], ["perplexity"])
