"""Costs: formulas by hand, headers of files made here, the measuring process on the committed tiny model."""

import json
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from avalab.lab import artifacts
from avalab.lab.run import ROOT, Run
from avalab.measure import cell, cost
from avalab.measure.cell import Cell, Workload
from avalab.measure.cost import Timing
from avalab.models.sizes import (
    BF16,
    Shape,
    bytes_by_component,
    kv_cache_bytes,
    predict_bytes,
    shape_of,
    storage_of_method,
)

TINY = ROOT / "data" / "tiny-llama"
# One block, hidden 8, MLP 16, two heads of four, one key-value head, ten tokens, head tied to the embedding.
PENCIL = Shape(vocab=10, hidden=8, mlp=16, layers=1, heads=2, kv_heads=1, head_dim=4, tied=True)


@pytest.fixture(scope="module")
def measured() -> Cell:
    work = Workload(prompts=(8,), new_tokens=3, samples=7, threads=1, predictable=True, limit_seconds=60)
    return cell.measure_cell(TINY, "torch", work=work)


@pytest.fixture
def saved_model(tmp_path):
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


def test_bf16_bytes_of_a_model_of_one_block_by_hand():
    """Embedding 10 x 8; q 8x8, k and v 4x8, o 8x8; three MLP matrices of 16 x 8; three norms of 8. Two bytes each."""
    sizes = predict_bytes(PENCIL, storage_of_method("bf16", {}))
    assert sizes["embedding"] == 160
    assert sizes["attention"] == 2 * (64 + 32 + 32 + 64)
    assert sizes["mlp"] == 2 * 3 * 128
    assert sizes["norm"] == 2 * 3 * 8
    assert sizes["head"] == sizes["scales"] == 0


def test_an_untied_head_costs_as_much_as_the_embedding():
    untied = Shape(**{**vars(PENCIL), "tied": False})
    assert predict_bytes(untied, BF16)["head"] == 160


def test_nf4_halves_a_byte_and_keeps_a_scale_a_block_and_a_table_a_layer():
    """MLP: 384 weights in 192 bytes. Blocks of 64: 1+1+1+1 and 2+2+2 scales of 4 bytes; 7 x (64 + 81) of state."""
    sizes = predict_bytes(PENCIL, storage_of_method("nf4", {"block_size": 64}))
    assert sizes["mlp"] == 192
    assert sizes["scales"] == 10 * 4 + 7 * (64 + 81)


def test_double_quantization_stores_four_and_an_eighth_bits_a_weight():
    """4 + 8/64 + 32/(64 x 256) = 4.127, as the QLoRA paper counts it."""
    assert storage_of_method("nf4", {"double_quantization": True}).bits_per_weight == pytest.approx(4.127, abs=5e-4)
    assert storage_of_method("nf4", {}).bits_per_weight == 4.5


def test_asymmetric_groups_of_32_cost_five_eighths_of_a_bit():
    """bf16 scale and 4-bit zero-point shared by 32: 4 + 20/32."""
    assert storage_of_method("gptq", {"bits": 4, "group_size": 32, "symmetric": False}).bits_per_weight == 4.625


def test_a_kept_layer_stays_in_bf16():
    nf4 = storage_of_method("nf4", {})
    sizes = predict_bytes(PENCIL, nf4, kept=["model.layers.0.mlp.up_proj"])
    assert sizes["mlp"] == 64 + 256 + 64


def test_predicted_bf16_file_is_the_written_one_but_for_a_line_of_its_header(saved_model):
    measured = bytes_by_component(saved_model)
    predicted = predict_bytes(shape_of(saved_model), BF16)
    assert {k: v for k, v in predicted.items() if k != "overhead"} == {
        k: v for k, v in measured.items() if k != "overhead"
    }
    assert predicted["overhead"] == pytest.approx(measured["overhead"], abs=64)


def test_components_add_up_to_the_file_size_exactly(saved_model):
    assert sum(bytes_by_component(saved_model).values()) == (saved_model / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "attention"),
        ("model.layers.0.mlp.up_proj.weight_packed", "mlp"),
        ("model.layers.0.mlp.up_proj._weight_qdata", "mlp"),
        ("model.layers.0.mlp.up_proj._weight_scale", "scales"),
        ("model.layers.0.mlp.up_proj.weight_zero_point", "scales"),
        ("model.layers.0.mlp.up_proj.weight_shape", "scales"),
        ("model.layers.0.mlp.up_proj.SCB", "scales"),
        ("model.layers.0.mlp.up_proj.weight.absmax", "scales"),
        ("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", "scales"),
        ("model.embed_tokens.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("model.norm.weight", "norm"),
    ],
)
def test_each_stored_tensor_is_counted_in_its_component(tmp_path, name, component):
    save_file({name: torch.zeros(6, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    assert bytes_by_component(tmp_path)[component] == 6


def test_a_folder_without_safetensors_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"holds no safetensors file"):
        bytes_by_component(tmp_path)


def test_a_file_that_is_not_safetensors_is_refused_by_name(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 3) + b"abc")
    with pytest.raises(ValueError, match=r"model\.safetensors has no readable safetensors header"):
        bytes_by_component(tmp_path)


def test_an_unknown_method_is_refused_by_name():
    with pytest.raises(ValueError, match="'int3'"):
        storage_of_method("int3", {})


def test_kv_cache_of_one_block_by_hand():
    """Keys and values x 1 layer x 1 head x 4 x 5 tokens x 3 sequences x 2 bytes."""
    assert kv_cache_bytes(PENCIL, context=5, batch=3) == 2 * 4 * 5 * 3 * 2


def test_predicted_memory_by_hand():
    """Six tokens: MLP 6 x 2 x (16 + 48) = 768 beats attention 6 x 2 x (16 + 32) = 576; logits of one position only."""
    work = Workload(prompts=(6,), new_tokens=2)
    parts = cost.predict_memory(PENCIL, BF16, weight_bytes=1000, work=work, runtime_bytes=5000)
    assert parts["activations"] == 768
    assert parts["logits"] == 20
    assert parts["kv_cache"] == 2 * 4 * 8 * 2
    assert parts["copies"] == parts["workspace"] == 0
    assert parts["total"] == 1000 + 768 + 20 + 128 + 5000


def test_unpacked_weights_are_counted_as_a_copy_on_a_cpu_only():
    """576 linear weights, 2 bytes each, beside the file of a method that rounds activations; others stay packed."""
    unpacked = storage_of_method("smoothquant", {})
    assert cost.predict_memory(PENCIL, unpacked, weight_bytes=0, work=Workload())["copies"] == 2 * 576
    assert cost.predict_memory(PENCIL, unpacked, weight_bytes=0, work=Workload(device="cuda"))["copies"] == 0
    packed = storage_of_method("gptq", {"group_size": 32})
    assert cost.predict_memory(PENCIL, packed, weight_bytes=0, work=Workload())["copies"] == 0


def test_one_decode_step_reads_the_weights_once_and_half_the_cache(measured):
    """The head is tied, so the embedding is read too; the cache is counted after the prompt and half the new tokens."""
    model = shape_of(TINY)
    sizes = bytes_by_component(TINY)
    weights = sum(sizes.values()) - sizes["overhead"]
    cache = kv_cache_bytes(model, context=8 + 1)
    assert measured.bytes_read_per_token == pytest.approx(weights + cache, rel=0.01)


def test_memory_of_the_measuring_process_grows_in_the_order_of_its_steps(measured):
    assert 0 < measured.runtime_bytes <= measured.load_peak_bytes
    assert measured.loaded_bytes <= measured.load_peak_bytes
    assert measured.peak_bytes >= 0.98 * (measured.anonymous_bytes + measured.file_bytes)


def test_predicted_peak_memory_of_the_tiny_model_is_within_15_percent(measured):
    work = Workload(prompts=(8,), new_tokens=3)
    size = sum(bytes_by_component(TINY).values())
    parts = cost.predict_memory(
        shape_of(TINY), BF16, weight_bytes=size, work=work, runtime_bytes=measured.runtime_bytes
    )
    assert parts["total"] == pytest.approx(measured.peak_bytes, rel=0.15)


def test_raw_samples_are_kept(measured):
    assert len(measured.first["8"]) == 7
    assert [len(steps) for steps in measured.further["8"]] == [2] * 7
    assert measured.first_prefill_seconds > 0
    assert min(measured.roofline_fractions) > 0


def test_records_hold_prediction_beside_measurement(measured, artifact, tmp_path, monkeypatch):
    monkeypatch.setenv("AVALAB_DEVICE", "cpu")
    monkeypatch.setattr("avalab.lab.run.ROOT", tmp_path)
    monkeypatch.setattr(cell, "measure_cell", lambda *args, work: measured)  # measured once for the whole file
    run = Run("01_quantization", "smoke")
    cost.record_cost(run, "bf16", artifact)
    by_metric = {r.metric: r for r in run.records}
    assert by_metric["artifact_bytes"].value == artifact.bytes
    assert by_metric["predicted_bytes:artifact"].value == pytest.approx(artifact.bytes, rel=0.01)
    assert by_metric["predicted_bytes:peak_rss"].value == pytest.approx(by_metric["peak_rss_bytes"].value, rel=0.15)
    assert by_metric["decode_tokens_per_s"].low <= by_metric["decode_tokens_per_s"].value
    assert len(by_metric["time_to_first_token_ms:p50"].samples) == 7
    assert {"load_seconds", "prefill_tokens_per_s", "roofline_fraction", "memory_read_bytes_per_s"} <= set(by_metric)


def test_a_measurement_is_taken_once_for_the_same_bytes(measured, tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(cell, "measure_cell", lambda *args, work: taken.append(args) or measured)
    artifact = artifacts.Artifact(tmp_path, {"name": "tiny", "sha256": "0" * 64})
    first = cost.cached_cell(artifact, Workload(), tmp_path)
    assert cost.cached_cell(artifact, Workload(), tmp_path) == first == measured
    cost.cached_cell(artifact, Workload(prompts=(9,)), tmp_path)
    assert len(taken) == 2


def test_a_kept_figure_says_when_it_was_measured_and_again_replaces_it(measured, artifact, tmp_path, monkeypatch):
    clock = iter(range(9))
    at = "2026-01-0{}T00:00:00+00:00".format
    monkeypatch.setattr(Run, "artifacts_dir", tmp_path)
    monkeypatch.setattr(cell, "measure_cell", lambda *args, work: replace(measured, when=at(next(clock))))
    run = Run("t", "smoke")
    for again in (False, False, True, False):
        cost.record_cost(run, "tiny", artifact, again=again)
    found = [record.when for record in run.records if record.metric == "peak_rss_bytes"]
    assert found == [at(0), at(0), at(1), at(1)]


def test_a_crashing_measurement_names_the_artefact_and_the_last_error_line(tmp_path):
    folder = tmp_path / "broken-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(RuntimeError, match=r"broken-model in torch failed: .+") as caught:
        cell.measure_cell(folder, "torch", work=Workload(prompts=(4,), samples=1, threads=1, predictable=True))
    assert "\n" not in str(caught.value)


# --- whether zeros make a layer faster ---------------------------------------------------------------------------


def half_zero(rows: int = 32, columns: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    return weight.masked_fill(torch.rand(rows, columns, generator=generator) < 0.5, 0).bfloat16()


def test_every_kernel_is_timed_or_says_why_not():
    found = cost.time_kernels(half_zero(), tokens=8, rounds=3)
    assert list(found) == list(cost.KERNELS)
    for name, timing in found.items():
        assert (len(timing.samples) == 3 and min(timing.samples) > 0) != bool(timing.reason), name
    assert found[cost.BASELINE].samples
    assert found["CSR fp32"].samples
    assert "GPU" in found["2of4 bf16"].reason


def test_the_best_kernels_of_both_kinds_are_compared_by_their_medians():
    samples = {"dense bf16": [2.0, 4.0, 90.0], "dense fp32": [5.0], "CSR fp32": [6.0, 5.0, 7.0], "CSR bf16": [8.0]}
    found = {name: Timing(list_of) for name, list_of in samples.items()} | {"2of4 bf16": Timing(reason="no GPU")}
    assert cost.best_ratio(found) == 1.5


def test_a_kernel_with_another_product_is_refused(monkeypatch):
    monkeypatch.setitem(cost.KERNELS, "wrong", lambda w, x: lambda: 2 * (x @ w.float().T))
    with pytest.raises(ValueError, match="kernel 'wrong' differs from the dense product by"):
        cost.time_kernels(half_zero(), tokens=4, rounds=1, kernels=("wrong",))


def test_what_is_predicted_not_to_fit_is_refused_with_the_prediction():
    """3 GiB of weights and 2 of cache are 5, above 4; the runtime does not count."""
    parts = {"weights": 3 * 2**30, "kv_cache": 2 * 2**30, "runtime": 9 * 2**30, "total": 14 * 2**30}
    said = r"big in torch would need 5\.00 GiB at 8,192 tokens \(weights 3\.00, kv cache 2\.00\), the limit is 4 GiB"
    with pytest.raises(ValueError, match=said):
        cost.refuse_over_cap("big", "torch", parts, 4.0, tokens=8192)
    cost.refuse_over_cap("big", "torch", parts, 5.0, tokens=8192)
    cost.refuse_over_cap("big", "torch", parts, None, tokens=8192)
