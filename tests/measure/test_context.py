"""Long contexts: bytes and seconds that a pencil predicts, a real measurement of the tiny model, and refusals."""

import importlib.util
from pathlib import Path

import pytest
from transformers import PreTrainedModel  # noqa: F401  (before what reaches torchao)

from avalab import engines
from avalab.engines import gguf as gguf_file
from avalab.lab import process
from avalab.lab.run import Run
from avalab.measure import context, cost
from avalab.measure.cell import Workload
from avalab.models import sizes

TINY = Path(__file__).resolve().parents[2] / "data" / "tiny-llama"
ASKED = {"engine": "torch", "cache_bits": 16, "new_tokens": 4, "longest": 200}


def line(length: int, *steps: float) -> dict:
    """What the measuring process writes down of one length."""
    facts = {"runtime_bytes": 1000, "idle_bytes": 2000, "load_average": 0.5, "read_bytes_per_s": 1e9}
    return facts | {"length": length, "first": 0.2, "steps": list(steps), "peak": 5000 + length}


# --- predictions -------------------------------------------------------------------------------------------------


def test_a_scale_for_32_values_or_a_scale_and_a_zero_point_a_head_are_counted_in_an_8_bit_cache():
    assert context.cached_bits("torch", 16, 64) == 16
    assert context.cached_bits("llamacpp", 8, 64) == 8.5
    assert context.cached_bits("openvino", 8, 64) == 9
    assert context.cached_bits("openvino", 8, 32) == 10


def test_a_token_reads_the_weights_and_the_cache_once():
    """Weights and 2 x layers x kv heads x head size x 2 bytes x 100 tokens, at 1e9 bytes a second."""
    model = sizes.shape_of(TINY)
    cache = 2 * model.layers * model.kv_heads * model.head_dim * 2 * 100
    weights = (TINY / "model.safetensors").stat().st_size
    found = context.predict_length(TINY, asked=ASKED, length=100, runtime_bytes=0, bytes_per_s=1e9)
    assert found["read_bytes"] == weights + cache
    assert found["seconds"] == pytest.approx((weights + cache) / 1e9)
    assert found["memory"]["kv_cache"] == cache


def test_predicted_memory_is_that_of_the_cost_model_with_the_prompt_and_the_runtime():
    found = context.predict_length(TINY, asked=ASKED, length=100, runtime_bytes=7, bytes_per_s=1e9)["memory"]
    work = Workload(prompts=(96,), new_tokens=4)
    size = (TINY / "model.safetensors").stat().st_size
    same = cost.predict_memory(sizes.shape_of(TINY), sizes.BF16, weight_bytes=size, work=work, runtime_bytes=7)
    assert found == same


def test_half_the_bits_take_half_the_cache_and_llamacpp_holds_the_longest_one_from_the_start():
    sixteen, eight = (
        context.predict_length(TINY, asked=ASKED | how, length=100, runtime_bytes=0, bytes_per_s=1e9)["memory"]
        for how in ({}, {"engine": "llamacpp", "cache_bits": 8})
    )
    assert eight["kv_cache"] == int(sixteen["kv_cache"] * 2 * 8.5 / 16)


@pytest.mark.parametrize("engine", ["onnx", "aot"])
def test_an_engine_without_an_8_bit_cache_says_which_ones_have_it(engine):
    with pytest.raises(engines.NotSupported, match="torch, openvino and llamacpp have one of 8 bits"):
        context.cache_options(engine, 8, 100)


def test_the_caches_precision_is_set_where_an_engine_has_a_choice():
    assert context.cache_options("openvino", 8, 100)["properties"] == {"KV_CACHE_PRECISION": "u8"}
    assert context.cache_options("llamacpp", 8, 100) == {"context": 100, "cache_bits": 8}
    assert context.cache_options("torch", 16, 100) == {}
    assert context.cache_options("torch", 4, 100) == {"cache_bits": 4}


def test_a_torch_cache_of_four_bits_counts_scales_of_32_tokens_and_of_a_tokens_channels():
    assert context.cached_bits("torch", 4, head_dim=32) == 4 + (32 / 32 + 32 / 32) / 2


def test_a_cache_of_other_bits_is_refused():
    with pytest.raises(ValueError, match="no cache of 4 bits in openvino; choose 16 or 8"):
        context.cache_options("openvino", 4, 100)


# --- measuring ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "library"), [("openvino", "openvino_genai"), ("llamacpp", "xllamacpp")])
@pytest.mark.parametrize("cache_bits", [16, 8])
def test_an_engine_with_a_choice_reads_a_gguf_file_with_either_cache(artifact, engine, library, cache_bits):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    exported = gguf_file.write(artifact, "f16")
    points = context.measure_lengths(exported, engine, lengths=(16, 48), cache_bits=cache_bits, threads=1, new_tokens=3)
    assert [(point.length, point.note) for point in points] == [(16, ""), (48, "")]
    assert all(point.seconds_per_token > 0 for point in points)


@pytest.mark.parametrize("lengths", [(16, 2000), (), (4,)])
def test_lengths_that_the_models_context_does_not_hold_or_that_leave_no_prompt_are_refused(lengths):
    with pytest.raises(ValueError, match=r"lengths have to be 5 to 1,024 tokens, the model's context; got"):
        context.measure_lengths(TINY, "torch", lengths=lengths, new_tokens=4)


def test_one_new_token_is_too_few_to_time_one():
    with pytest.raises(ValueError, match="at least 2 new tokens"):
        context.measure_lengths(TINY, "torch", new_tokens=1)


def test_lengths_are_measured_in_a_process_of_its_own_shortest_first():
    points = context.measure_lengths(TINY, "torch", lengths=(64, 16), threads=1, new_tokens=4)
    assert [point.length for point in points] == [16, 64]
    for point in points:
        assert len(point.samples) == 3
        assert min(point.samples) <= point.seconds_per_token <= max(point.samples)
        assert 0 < point.predicted_seconds < point.first_token_seconds < 60
        assert point.peak_bytes > 1e8
        assert point.note == ""


def test_a_context_of_exactly_the_models_length_is_read(artifact, monkeypatch):
    seen = []
    monkeypatch.setattr(process, "call", lambda target, request, **how: seen.append(request) or answer(request))
    context.measure_lengths(artifact, "torch", lengths=(16, 1024), new_tokens=4)
    assert seen[0]["prompts"] == (12, 1020)


def answer(request: dict, lengths: int = 2) -> dict:
    """Write the first `lengths` lengths down, as the measuring process does."""
    rows = [line(n + request["new_tokens"], 0.01, 0.03, 0.02) for n in request["prompts"][:lengths]]
    Path(request["file"]).write_text("".join(f"{context.json.dumps(row)}\n" for row in rows))
    return {}


def test_what_was_measured_before_a_process_died_stays_and_the_rest_has_a_note(artifact, monkeypatch):
    def dies(target: str, request: dict, **how) -> dict:
        answer(request, 1)
        raise RuntimeError("tiny in torch failed: killed, most likely out of memory")

    monkeypatch.setattr(process, "call", dies)
    run = Run("t", "smoke")
    points = context.record_lengths(run, artifact, "torch", lengths=(32, 100))
    assert [(p.length, p.seconds_per_token) for p in points] == [(32, 0.02), (100, None)]
    last = run.records[-1]
    assert (last.metric, last.value) == ("token_latency_ms:context100:cache16", None)
    assert "stopped after 1 of 2 lengths: tiny in torch failed: killed" in last.note


def test_a_process_that_dies_at_once_raises_and_its_record_says_why(artifact, monkeypatch):
    def dies(target: str, request: dict, **how) -> dict:
        raise RuntimeError("killed")

    monkeypatch.setattr(process, "call", dies)
    with pytest.raises(RuntimeError, match="killed"):
        context.measure_lengths(artifact, "torch", lengths=(16,), new_tokens=4)
    run = Run("t", "smoke")
    assert context.record_lengths(run, artifact, "torch", lengths=(32,)) == []
    assert [(r.value, r.note) for r in run.records] == [(None, "killed")]


def test_a_cache_that_the_engine_does_not_have_is_a_record_with_its_reason(artifact):
    run = Run("t", "smoke")
    assert context.record_lengths(run, artifact, "aot", lengths=(32,), cache_bits=8) == []
    assert "torch, openvino and llamacpp have one of 8 bits" in run.records[0].note


def test_points_become_records_by_pencil(artifact, monkeypatch):
    """The median of 10, 20 and 30 ms, a first token after 200 ms, peaks as written; two lengths."""
    monkeypatch.setattr(process, "call", lambda target, request, **how: answer(request))
    run = Run("t", "smoke")
    context.record_lengths(run, artifact, "torch", lengths=(32, 100))
    found = {r.metric: r for r in run.records}
    assert found["token_latency_ms:context32:cache16"].value == pytest.approx(20)
    assert found["token_latency_ms:context32:cache16"].n == 3
    assert found["time_to_first_token_ms:context100:cache16"].value == pytest.approx(200)
    assert found["peak_rss_bytes:context100:cache16"].value == 5100
    weights = sizes.weight_file_bytes(artifact.path)
    assert found["predicted_bytes:peak_rss:context32:cache16"].value > weights + 1000
    assert found["predicted_token_latency_ms:context32:cache16"].value > weights / 1e6
    assert {r.artifact_sha256 for r in run.records} == {artifact.sha256}
    assert found["peak_rss_bytes:context100:cache16"].details["memory"]["runtime"] == 1000


def test_a_context_that_is_predicted_not_to_fit_is_not_started(artifact, monkeypatch):
    monkeypatch.setattr(process, "call", lambda *a, **k: pytest.fail("started"))
    with pytest.raises(ValueError, match=r"tiny in torch would need .* at 100 tokens .*: not started"):
        context.measure_lengths(artifact, "torch", lengths=(32, 100), new_tokens=4, memory_cap_gib=0.001)


def test_llama_cpp_copies_the_blocks_that_it_interleaves_and_holds_its_vocabulary(artifact, monkeypatch):
    """A q4_0 matrix is held twice, an embedding that is only looked up and a q8_0 matrix once."""
    tensors = {"blk.0.a": ("q4_0", 90), "token_embd.weight": ("q4_0", 50), "blk.0.b": ("q8_0", 70)}
    monkeypatch.setattr(context.gguf_layout, "tensor_bytes", lambda file: tensors)
    monkeypatch.setattr(context.engines, "gguf_file", lambda folder: folder)
    model = sizes.Shape(vocab=1000, hidden=8, mlp=16, layers=1, heads=2, kv_heads=1, head_dim=4, tied=False)
    found = context._llamacpp_parts(artifact.path, model, 10)
    assert found["copies"] == 90
    assert found["activations"] == 4 * 10 * (2 * 8 + 3 * 16)
    assert found["logits"] == 4000
    assert found["vocabulary"] == context.LIBRARY_BYTES + context.VOCABULARY_BYTES * 1000


def test_openvino_keeps_a_gguf_file_twice_and_its_library(artifact):
    exported = gguf_file.write(artifact, "q8_0")
    size = sizes.weight_file_bytes(exported.path)
    asked = ASKED | {"engine": "openvino"}
    found = context.predict_length(exported.path, asked=asked, length=100, runtime_bytes=0, bytes_per_s=1.0)["memory"]
    assert (found["weights"], found["copies"]) == (size, int(1.15 * size))
    assert found["total"] == sum(part for name, part in found.items() if name != "total")
    assert found["library"] == 70_000_000
