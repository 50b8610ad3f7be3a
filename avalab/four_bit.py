"""NF4 and FP4 files in bitsandbytes' layout, encoded by `avalab.kernels`: any library that reads those reads these.

1. The model is loaded in bf16, every linear layer's weight encoded where it lies (`kernels.encode`);
2. a `Linear4bit` takes its place, with codes, scales and quantized scales as bitsandbytes would have stored them. On a
   CPU the bytes are bitsandbytes' own, which a test compares;
3. transformers is told what the model is, so that `save_pretrained` writes the configuration beside the weights.

Source: Dettmers et al. 2023 (QLoRA), arXiv 2305.14314. Block sizes are all those of bitsandbytes; transformers
itself can ask for 64 only. What it does not do: compute with such a model
(`engines.four_bit`, `adapters`), or touch embeddings, norms and the head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from avalab import compressors, kernels, models, numerics
from avalab.compressors import Job
from avalab.kernels import NestedScales, Weight4
from avalab.kernels.weight import NESTED_GROUP


def compressor(levels: str) -> Callable[[Job], PreTrainedModel]:
    """`levels` ("nf4" or "fp4") with the job's block size, double quantization and compute dtype."""

    def compress(job: Job) -> PreTrainedModel:
        model = models.load(job.folder, job.device)
        parameters = job.parameters
        format = numerics.four_bit(
            levels, parameters["block_size"], double_quantization=parameters["double_quantization"]
        )
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=levels,
            bnb_4bit_compute_dtype=compressors.DTYPES[parameters["compute_dtype"]],
            bnb_4bit_use_double_quant=parameters["double_quantization"],
            llm_int8_skip_modules=["lm_head", *job.skipped],
        )
        for name, plain in models.linear_layers(model).items():
            if name not in job.skipped:
                weight = kernels.encode(plain.weight.data, format)
                models.replace_linear(model, name, layer(plain, weight, levels, config.bnb_4bit_compute_dtype))
        model.hf_quantizer = AutoHfQuantizer.from_config(config)
        model.config.quantization_config = config
        return model

    return compress


def layer(plain: nn.Linear, weight: Weight4, levels: str, compute_dtype: torch.dtype) -> nn.Module:
    """bitsandbytes' layer holding the weight and the plain layer's bias."""
    import bitsandbytes as bnb

    nested = isinstance(weight.scales, NestedScales)
    how = {"compute_dtype": compute_dtype, "compress_statistics": nested, "quant_type": levels}
    made = bnb.nn.Linear4bit(plain.in_features, plain.out_features, plain.bias is not None, **how, device="meta")
    state = quant_state(weight, levels, plain.weight.dtype)
    made.weight = bnb.nn.Params4bit(
        weight.codes.view(-1, 1),
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=nested,
        quant_type=levels,
        module=made,
        bnb_quantized=True,
    )
    made.quant_state, made.bias = state, plain.bias
    return made


def quant_state(weight: Weight4, levels: str, dtype: torch.dtype):
    """What bitsandbytes keeps beside the codes of a weight that was stored in `dtype`."""
    from bitsandbytes.functional import QuantState

    scales, more = weight.scales, {}
    if isinstance(scales, NestedScales):
        state = QuantState(absmax=scales.absmax, blocksize=NESTED_GROUP, code=scales.levels, dtype=torch.float32)
        more = {"offset": scales.offset, "state2": state}
    absmax: Tensor = scales.codes if more else scales.reshape(-1)
    code = weight.levels + 0.0  # FP4 has a zero below zero, which bitsandbytes writes without its sign
    about = {"shape": torch.Size(weight.shape), "code": code, "quant_type": levels, "dtype": dtype}
    return QuantState(absmax=absmax, blocksize=weight.group_size, **about, **more)
