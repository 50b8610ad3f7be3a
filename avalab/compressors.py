"""The libraries' own compressors behind one signature: a `Job` in, a compressed model in memory out.

One function a library and idea; `quantize.METHODS` gives them names, defaults and sources. What a library cannot
do on this device is worked around only where the result is the same (pinned memory), or named in the artefact's card
(torchao's byte-sized 4-bit codes on a CPU).

What it does not do: write files, choose parameters or text, or quantise embeddings, norms and the head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Job:
    """What a compressor is given: the base's folder, where to compute, parameters, layers to leave alone, text."""

    folder: Path
    device: str
    parameters: dict
    skipped: list[str]
    calibration: Int[Tensor, "window time"] | None


def _load(job: Job, **more) -> PreTrainedModel:
    placement = {"device_map": job.device} if job.device != "cpu" else {}
    return AutoModelForCausalLM.from_pretrained(
        job.folder, dtype=torch.bfloat16, use_safetensors=True, **placement, **more
    )


def llm_int8(job: Job) -> PreTrainedModel:
    """bitsandbytes' LLM.int8(): columns with activations above `threshold` are multiplied in 16 bit."""
    config = BitsAndBytesConfig(
        load_in_8bit=True,
        llm_int8_threshold=job.parameters["threshold"],
        llm_int8_skip_modules=["lm_head", *job.skipped],
    )
    return _load(job, quantization_config=config)


def torchao(kind: str) -> Callable[[Job], PreTrainedModel]:
    """torchao's `int8` (weights only), `int8-dynamic` (activations too, a scale a token) or `int4` (groups)."""

    def compress(job: Job) -> PreTrainedModel:
        config = TorchAoConfig(_torchao_config(kind, job), modules_to_not_convert=["lm_head", *job.skipped])
        return _load(job, quantization_config=config)

    return compress


def _torchao_config(kind: str, job: Job):
    from torchao import quantization as ao

    if kind == "int8":
        return ao.Int8WeightOnlyConfig(version=2)
    if kind == "int8-dynamic":
        return ao.Int8DynamicActivationInt8WeightConfig(version=2)
    if job.device.startswith("cuda"):
        return ao.Int4WeightOnlyConfig(group_size=job.parameters["group_size"])
    # Packed int4 needs a GPU kernel; on a CPU torchao keeps each 4-bit code in a byte of its own.
    granularity = ao.PerGroup(job.parameters["group_size"])
    return ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity)


def _weight_scheme(parameters: dict):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    groups = {"strategy": "group", "group_size": parameters["group_size"]} if parameters["group_size"] else {}
    weights = QuantizationArgs(
        num_bits=parameters["bits"], symmetric=parameters["symmetric"], **(groups or {"strategy": "channel"})
    )
    return {"weights": QuantizationScheme(targets=["Linear"], weights=weights)}


def _activation_scheme(static: bool):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    how = {"strategy": "tensor", "symmetric": False} if static else {"strategy": "token", "symmetric": True}
    return {
        "weights_and_activations": QuantizationScheme(
            targets=["Linear"],
            weights=QuantizationArgs(num_bits=8, symmetric=True, strategy="channel"),
            input_activations=QuantizationArgs(num_bits=8, dynamic=not static, **how),
        )
    }


def _modifiers(kind: str, job: Job) -> list:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    ignore = ["lm_head", *job.skipped]
    if kind == "smoothquant":
        scheme = _activation_scheme(job.parameters["static"])
        smooth = SmoothQuantModifier(smoothing_strength=job.parameters["smoothing_strength"])
        return [smooth, QuantizationModifier(config_groups=scheme, ignore=ignore)]
    scheme = _weight_scheme(job.parameters)
    if kind == "gptq":
        return [GPTQModifier(config_groups=scheme, ignore=ignore)]
    rounding = QuantizationModifier(config_groups=scheme, ignore=ignore)
    return [AWQModifier(n_grid=job.parameters["grid_points"]), rounding] if kind == "awq" else [rounding]


def llmcompressor(kind: str) -> Callable[[Job], PreTrainedModel]:
    """llmcompressor's `rtn`, `gptq`, `awq` or `smoothquant` on the job's calibration windows."""

    def compress(job: Job) -> PreTrainedModel:
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.pipelines.cache import IntermediatesCache
        from loguru import logger

        for chatty in ("llmcompressor", "compressed_tensors"):
            logger.disable(chatty)
        model = _load(job)
        data = {}
        if job.calibration is not None:
            rows = {"input_ids": job.calibration.tolist(), "attention_mask": torch.ones_like(job.calibration).tolist()}
            samples, length = job.calibration.shape
            data = {"dataset": Dataset.from_dict(rows), "num_calibration_samples": samples, "max_seq_length": length}
        # AWQ pins memory for a GPU even where there is none, and fails; pinning changes no result.
        pinning = (
            patch.object(IntermediatesCache, "pin_memory", lambda *args: None)
            if not torch.cuda.is_available()
            else contextlib.nullcontext()
        )
        with pinning:
            oneshot(model=model, recipe=_modifiers(kind, job), **data)
        return model

    return compress
