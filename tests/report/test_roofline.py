"""The roofline, the ratios to the plain form and the verdicts, on records nobody measured."""

import io
import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from PIL import Image

from avalab.lab.run import Record
from avalab.report import roofline, style

LIMITS = {"flops_per_s": 4e11, "bytes_per_s": 2e10, "load_average": 0.1}


def timed(work: str, arm: str, samples: list[float], *, flops: float = 8e6, size: float = 2e6, **more) -> list[Record]:
    """What the driver records of one arm: its time and its share of the limit."""
    median, details = sorted(samples)[len(samples) // 2], {"flops": flops, "bytes": size, **LIMITS}
    facts = {"details": details, "device": "cpu: a processor", "threads": 1, **more}
    subject, bounds = f"{work}:{arm}", {"low": min(samples), "high": max(samples), "samples": samples}
    share = 1e3 * max(flops / LIMITS["flops_per_s"], size / LIMITS["bytes_per_s"]) / median
    return [
        Record("10_kernels", subject, "kernel_ms", median, "ms", **bounds, **facts),
        Record("10_kernels", subject, "roofline_fraction", share, "1", **facts),
    ]


def peak(work: str, arm: str, value: float) -> Record:
    return Record("10_kernels", f"{work}:{arm}", "peak_bytes", value, "byte", device="cpu: a processor", threads=1)


SMALL, LARGE = "product nf4 64x128 batch 1", "product nf4 64x128 batch 512"
LOSS = "loss 64x64x512 trained"
RECORDS = [
    *timed(SMALL, "avalab", [0.2, 0.25, 0.3]),
    *timed(SMALL, "bf16", [0.5, 0.5, 0.6], size=8e6),
    *timed(SMALL, "bitsandbytes", [0.4, 0.5, 0.45]),
    *timed(LARGE, "avalab", [20, 20, 20], flops=4e9),
    *timed(LARGE, "bf16", [18, 18, 18], flops=4e9, size=8e6),
    *timed(LARGE, "bitsandbytes", [25, 25, 30], flops=4e9),
    *timed("lora nf4 64x128 tokens 64", "avalab", [3, 3, 3]),
    *timed("lora nf4 64x128 tokens 64", "bf16", [2, 2, 2]),
    *timed(LOSS, "avalab", [10, 10, 10]),
    *timed(LOSS, "dense", [10, 10, 10]),
    peak(LOSS, "avalab", 1e6),
    peak(LOSS, "dense", 1e7),
]
LOSSES = [r for r in RECORDS if r.subject.startswith("loss")]


def curves(axes) -> dict[str, tuple[list[float], list[float]]]:
    """Colour and marker -> the points of a line."""
    return {f"{to_hex(line.get_color())} {line.get_marker()}": line.get_data() for line in axes.get_lines()}


def target(**changes) -> roofline.Target:
    base = roofline.Target("a claim", "cpu", "product nf4", 3.0, ("bitsandbytes",))
    return replace(base, **changes)


def test_a_point_lies_at_operations_a_byte_and_operations_a_second():
    """8 MFLOP on 2 MB in 0.25 ms: 4 FLOP/byte and 32 GFLOP/s; 4 GFLOP in 20 ms: 2000 and 200."""
    axes = roofline.roofline(RECORDS).figure.axes[0]
    across, up = curves(axes)[f"{to_hex(roofline.LOOKS['avalab'][0])} o"]
    assert (list(across), list(up)) == ([4, 2000], [pytest.approx(32), pytest.approx(200)])


def test_the_roof_is_the_smaller_of_the_peak_and_what_can_be_read():
    """20 GB/s and 400 GFLOP/s meet at 20 FLOP/byte."""
    axes = roofline.roofline(RECORDS).figure.axes[0]
    across, up = next(line.get_data() for line in axes.get_lines() if len(line.get_xdata()) == 200)
    for x, y in zip(across, up, strict=True):
        assert y == pytest.approx(20 * x if x < 20 else 400)


def test_no_point_of_a_share_below_one_lies_above_the_roof():
    for record in (r for r in RECORDS if r.metric == "kernel_ms"):
        facts = record.details
        roof = min(facts["flops_per_s"], facts["flops"] / facts["bytes"] * facts["bytes_per_s"])
        share = next(r.value for r in RECORDS if (r.subject, r.metric) == (record.subject, "roofline_fraction"))
        assert facts["flops"] / record.value * 1e3 / roof == pytest.approx(share)


def test_a_form_is_drawn_at_its_median_over_the_plain_forms():
    picture = roofline.ratios({"one": ([r for r in RECORDS if "batch" in r.subject], "kernel_ms")})
    drawn = [line.get_xdata()[0] for line in picture.figure.axes[0].get_lines() if len(line.get_xdata()) == 1]
    assert sorted(drawn) == pytest.approx(sorted([0.5, 1, 0.9, 20 / 18, 1, 25 / 18]))


def test_both_figures_are_small_saved_and_described(tmp_path):
    panels = {"time": (LOSSES, "kernel_ms"), "memory": (LOSSES, "peak_bytes")}
    for picture in (roofline.roofline(RECORDS, tmp_path / "a.png"), roofline.ratios(panels, tmp_path / "b.png")):
        assert picture.path.read_bytes() == picture.png
        assert len(picture.png) <= style.MAX_BYTES
        assert Image.open(io.BytesIO(picture.png)).width == 900
        assert all("[" in axes.get_xlabel() for axes in picture.figure.axes)
        assert picture.alt


def test_what_was_not_measured_is_named_below_the_roofline():
    missing = Record("10_kernels", "product:triton", "kernel_ms", None, "ms", note="not measured: no GPU here")
    assert "product:triton" in roofline.roofline([*RECORDS, missing]).figure.get_supxlabel()


def test_an_arm_without_a_look_is_drawn_all_the_same():
    picture = roofline.roofline([*RECORDS, *timed(SMALL, "gemlite", [0.3])])
    assert "gemlite" in [text.get_text() for text in picture.figure.legends[0].get_texts()]


def test_a_table_cell_is_the_median_and_the_share_of_the_limit():
    header, rows = roofline.time_rows(RECORDS)
    assert header[1:] == ("avalab", "bf16", "dense", "bitsandbytes")
    assert rows[0] == (SMALL, "0.25 (40%)", "0.5 (80%)", "", "0.45 (22%)")


def test_a_target_is_judged_by_its_worst_case():
    """Batch 1: 0.45 / 0.25 = 1.8; batch 512: 25 / 20 = 1.25."""
    verdict = roofline.judge_target(RECORDS, target())
    assert verdict.words == "not reached: 1.25x of 3x"
    assert (verdict.low, verdict.high) == (1.25, 1.5)
    assert verdict.reason == f"{LARGE}, bitsandbytes"


def test_a_verdict_says_when_the_rounds_disagree():
    """The rounds of the large batch are 1.25, 1.25 and 1.5."""
    assert roofline.judge_target(RECORDS, target(works=LARGE, wanted=1.3)).words == (
        "not reached: 1.25x of 1.3x (rounds on both sides)"
    )


def test_a_target_of_cost_is_ours_over_the_peers():
    memory = target(works="loss ", wanted=0.2, peers=("dense",), metric="peak_bytes", at_most=True)
    assert roofline.judge_target(RECORDS, memory).words == "reached: 0.1x of 0.2x"
    assert not roofline.judge_target(RECORDS, replace(memory, wanted=0.09)).reached


def test_of_speeds_the_target_is_ours_over_the_peers():
    """30 tokens a second against 20, rounds 30/20 and 32/16: 1.5x of the medians, 1.5 to 2."""
    speeds = {"avalab": [30.0, 30.0, 32.0], "slow": [20.0, 20.0, 16.0]}
    about = {"device": "cuda: a card", "threads": 2}
    made = [
        Record("n", f"decode m:{arm}", "decode_tokens_per_s", sorted(s)[1], "token/s", samples=s, **about)
        for arm, s in speeds.items()
    ]
    wanted = target(device="cuda", works="decode ", peers=("slow",), metric="decode_tokens_per_s")
    verdict = roofline.judge_target(made, wanted)
    assert verdict.words == "not reached: 1.5x of 3x"
    assert (verdict.low, verdict.high) == (1.5, 2.0)


def test_a_target_without_peers_is_the_value_itself():
    verdict = roofline.judge_target(RECORDS, target(works=SMALL, peers=(), metric="roofline_fraction", wanted=0.8))
    assert verdict.words == "not reached: 0.4x of 0.8x"


def test_what_no_record_answers_is_not_measured_and_says_why():
    judged = [roofline.judge_target(RECORDS, each) for each in (target(device="cuda"), target(peers=("liger",)))]
    assert [v.words for v in judged] == [
        "not measured: no GPU here",
        "not measured: no kernel_ms of liger for such a work",
    ]
    assert [v.reached for v in judged] == [None, None]


def test_two_threads_do_not_judge_a_target_of_one_thread():
    assert roofline.judge_target([replace(r, threads=2) for r in RECORDS], target()).value is None


def test_every_target_of_a_cpu_finds_its_works_and_every_one_is_a_row_of_the_table():
    judged = [roofline.judge_target(RECORDS, each) for each in roofline.TARGETS]
    header, rows = roofline.verdict_rows(judged)
    assert len({row[0] for row in rows}) == len(roofline.TARGETS)
    assert all(len(row) == len(header) for row in rows)
    answered = [v for v in judged if v.value is not None]
    assert len(answered) == 5  # these records have no bitsandbytes-decoded
    assert all(v.reason == "no GPU here" for v in judged if v.target.device == "cuda")


@given(st.permutations(range(len(RECORDS))))
def test_the_order_of_the_records_changes_no_verdict(order):
    shuffled = [RECORDS[i] for i in order]
    assert [roofline.judge_target(shuffled, t).value for t in roofline.TARGETS] == [
        roofline.judge_target(RECORDS, t).value for t in roofline.TARGETS
    ]


@given(st.floats(0.1, 10), st.floats(0.1, 10))
def test_reached_agrees_with_the_two_numbers(value, wanted):
    for at_most in (True, False):
        verdict = roofline.Verdict(target(wanted=wanted, at_most=at_most), value)
        assert verdict.reached == (value <= wanted if at_most else value >= wanted)
        assert verdict.words.startswith("reached" if verdict.reached else "not reached")


def test_looks_differ_without_colour():
    assert all(a[1] != b[1] for a, b in itertools.combinations(roofline.LOOKS.values(), 2))


def test_records_that_cannot_be_drawn_are_refused():
    with pytest.raises(ValueError, match="no kernel_ms with a value among 0 records"):
        roofline.roofline([])
    alone = [r for r in RECORDS if r.subject.endswith("avalab")]
    with pytest.raises(ValueError, match="'left': every work needs a value of bf16 or dense"):
        roofline.ratios({"left": (alone, "kernel_ms")})
