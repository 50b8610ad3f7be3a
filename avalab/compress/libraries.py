"""Other people's compressors, one function a library, each from a `Job` to a compressed model in memory.

A function may also fill `job.out` itself and return what it measured: so do the quantisers that come with an inference
engine, which write a folder for that engine. What each method does, and where it is published, is said in `quantize`.

What a library cannot do on this device is worked around only where the result is the same (pinned memory), or named in
the artefact's card (torchao's byte-sized 4-bit codes on a CPU). Embeddings, norms and the head stay in bf16, but for
engines' quantisers: NNCF keeps embedding and head in int8, ONNX Runtime in int4, llama.cpp in 8 bits or fewer.
"""

from __future__ import annotations

import contextlib
import io
import logging
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.quantizers import AutoHfQuantizer

from avalab import engines, kernels
from avalab.compress import equivalence
from avalab.engines import llamacpp, onnx_graph
from avalab.engines import openvino as openvino_engine
from avalab.kernels import NestedScales, Weight4, formats
from avalab.kernels.formats import Grid, Rounded
from avalab.kernels.weight import NESTED_GROUP
from avalab.lab import artifacts, process
from avalab.lab.errors import InputError, ProcessFailed
from avalab.models import checkpoint, loading, packed, stored, walk
from avalab.models.packed import Packed

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

AUTOROUND_BATCH = 8  # windows; the library's own

# By method, where not all of 2 to 8: with more bits than 6 AutoRound's bf16 weights no longer tell its integers.
KNOWN_BITS = {"hqq": (2, 3, 4, 8), "autoround": (2, 3, 4, 5, 6)}

NNCF_GROUP_SIZE = 64

K_QUANT = ("algo_config=k_quant", "is_symmetric=false")

FUSED = ("phi3",)  # families whose q, k and v are one layer, as gate and up are

GGUF = "gguf-"  # and a mixture: the methods of `llama_cpp`


@dataclass(frozen=True)
class Job:
    """What a compressor is given: the base's folder, where to compute, parameters, layers to leave alone, text.

    `method` is the row of `quantize.METHODS`; `out` is the artefact's folder, for a library that writes files itself.
    """

    folder: Path
    device: str
    parameters: dict
    skipped: list[str]
    calibration: Int[Tensor, "window time"] | None
    method: str = ""
    seed: int = 0
    out: Path | None = None


def _load(job: Job, quantization_config: object = None) -> PreTrainedModel:
    return loading.load(
        job.folder,
        dtype=torch.bfloat16,
        device_map=job.device if job.device != "cpu" else None,
        quantization_config=quantization_config,
    )


def bitsandbytes_4bit(job: Job) -> PreTrainedModel:
    """NF4 or FP4 in bitsandbytes' layout, encoded by `avalab.kernels`: what reads the library's files reads these.

    Every weight is encoded where it lies and put into the library's own layer, which transformers then saves; on a CPU
    the bytes are bitsandbytes' own. Block sizes are all those of the library; transformers can ask for 64 only.
    """
    model, parameters = checkpoint.load_model(job.folder, job.device), job.parameters
    double = parameters["double_quantization"]
    format = formats.four_bit(job.method, parameters["block_size"], double_quantization=double)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=job.method,
        bnb_4bit_compute_dtype=DTYPES[parameters["compute_dtype"]],
        bnb_4bit_use_double_quant=double,
        llm_int8_skip_modules=["lm_head", *job.skipped],
    )
    for name, plain in walk.linear_layers(model).items():
        if name not in job.skipped:
            weight = kernels.encode(plain.weight.data, format)
            layer = four_bit_layer(plain, weight, job.method, config.bnb_4bit_compute_dtype)
            walk.replace_linear(model, name, layer)
    model.hf_quantizer = AutoHfQuantizer.from_config(config)
    model.config.quantization_config = config
    return model


def four_bit_layer(plain: nn.Linear, weight: Weight4, levels: str, compute_dtype: torch.dtype) -> nn.Module:
    """bitsandbytes' layer holding the weight and the plain layer's bias."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState

    scales, inner = weight.scales, None
    if isinstance(scales, NestedScales):
        inner = QuantState(absmax=scales.absmax, blocksize=NESTED_GROUP, code=scales.levels, dtype=torch.float32)
    state = QuantState(
        absmax=scales.codes if inner else scales.reshape(-1),
        shape=torch.Size(weight.shape),
        code=weight.levels + 0.0,  # FP4 has a zero below zero, which bitsandbytes writes without its sign
        blocksize=weight.group_size,
        quant_type=levels,
        dtype=plain.weight.dtype,
        offset=scales.offset if inner else None,
        state2=inner,
    )
    made = bnb.nn.Linear4bit(
        plain.in_features,
        plain.out_features,
        plain.bias is not None,
        compute_dtype=compute_dtype,
        compress_statistics=inner is not None,
        quant_type=levels,
        device="meta",
    )
    made.weight = bnb.nn.Params4bit(
        weight.codes.view(-1, 1),
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=inner is not None,
        quant_type=levels,
        module=made,
        bnb_quantized=True,
    )
    made.quant_state, made.bias = state, plain.bias
    return made


def bitsandbytes_8bit(job: Job) -> PreTrainedModel:
    """LLM.int8(): columns with activations above `threshold` are multiplied in 16 bit."""
    config = BitsAndBytesConfig(
        load_in_8bit=True,
        llm_int8_threshold=job.parameters["threshold"],
        llm_int8_skip_modules=["lm_head", *job.skipped],
    )
    return _load(job, config)


def torchao(job: Job) -> PreTrainedModel:
    """torchao's int8 (weights only), int8-dynamic (activations too, a scale a token) or int4 (groups)."""
    from torchao import quantization as ao

    if job.method == "torchao-int8":
        config = ao.Int8WeightOnlyConfig(version=2)
    elif job.method == "torchao-int8-dynamic":
        config = ao.Int8DynamicActivationInt8WeightConfig(version=2)
    elif job.device.startswith("cuda"):
        config = ao.Int4WeightOnlyConfig(group_size=job.parameters["group_size"])
    else:  # packed int4 needs a GPU kernel; on a CPU torchao keeps each 4-bit code in a byte of its own
        granularity = ao.PerGroup(job.parameters["group_size"])
        config = ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity)
    return _load(job, TorchAoConfig(config, modules_to_not_convert=["lm_head", *job.skipped]))


def llmcompressor(job: Job) -> PreTrainedModel:
    """llmcompressor's rtn, gptq, awq or smoothquant on the job's calibration windows."""
    _silence_llmcompressor()
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache
    from llmcompressor.pipelines.sequential import pipeline

    model, data = _load(job), {}
    recipe = _modifiers(job, model.config.model_type)
    _silence_llmcompressor()  # again: modules that were imported since have enabled their log
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
    family = model.config.model_type
    if job.method == "awq" and not hasattr(model.base_model.layers[0], "input_layernorm"):
        raise InputError(f"awq folds scales into norms that blocks of {family} do not have; use gptq, rtn or ava")
    try:  # it draws the order of the samples from the global generators
        with pinning, patch.object(pipeline, "tqdm", process.progress), _seeded(job.seed):
            oneshot(model=model, recipe=recipe, **data)
    except (ValueError, RuntimeError, KeyError, AttributeError, NotImplementedError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ProcessFailed(
            f"llmcompressor's {job.method} failed on a {family}: {said}; ava and nf4 do without it"
        ) from error
    return model


def _silence_llmcompressor() -> None:
    """Disable the library's log, which is bound to whatever is standard output at its first import."""
    with contextlib.redirect_stdout(io.StringIO()):
        import llmcompressor  # noqa: F401
        from loguru import logger
    for chatty in ("llmcompressor", "compressed_tensors"):
        logger.disable(chatty)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch, and give them their states back after."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _modifiers(job: Job, family: str) -> list:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    kind = GPTQModifier if job.method == "gptq" else QuantizationModifier
    rounding = kind(config_groups=_scheme(job), ignore=["lm_head", *job.skipped])
    if job.method == "smoothquant":
        strength = job.parameters["smoothing_strength"]
        return [SmoothQuantModifier(smoothing_strength=strength, mappings=_smoothed(family)), rounding]
    return [AWQModifier(n_grid=job.parameters["grid_points"]), rounding] if job.method == "awq" else [rounding]


def _smoothed(family: str) -> list[tuple[list[str], str]]:
    """Layers that read a norm, and that norm: the library's own list takes the wrong one of Gemma's four.

    Raises ValueError for a family whose norms are not known here.
    """
    before_attention, before_mlp = equivalence.NORMS.get(family, ("", ""))
    if not before_attention:
        known = ", ".join(name for name, norms in equivalence.NORMS.items() if norms[0])
        raise InputError(f"smoothquant scales norms before attention and MLP; known are those of {known}, not {family}")
    attention, mlp = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]
    if family in FUSED:
        attention, mlp = ["qkv_proj"], ["gate_up_proj"]
    pairs = ((attention, before_attention), (mlp, before_mlp))
    return [([f"re:.*{name}" for name in layers], f"re:.*{norm}") for layers, norm in pairs]


def _scheme(job: Job) -> dict:
    """Weights in groups or by rows; for SmoothQuant both weights and activations in 8 bits."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    parameters = job.parameters
    if job.method == "smoothquant":
        weights = QuantizationArgs(num_bits=8, symmetric=True, strategy="channel")
        static = parameters["static"]
        strategy = "tensor" if static else "token"
        activations = QuantizationArgs(num_bits=8, dynamic=not static, strategy=strategy, symmetric=not static)
        scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations)
        return {"weights_and_activations": scheme}
    group = parameters["group_size"] or None  # none: by rows
    strategy, symmetric = "group" if group else "channel", parameters["symmetric"]
    weights = QuantizationArgs(num_bits=parameters["bits"], symmetric=symmetric, strategy=strategy, group_size=group)
    return {"weights": QuantizationScheme(targets=["Linear"], weights=weights)}


def autoround(job: Job) -> Packed:
    """AutoRound, asymmetric, as a compressed-tensors checkpoint of any number of bits.

    The library minimises each block's output error over rounding offsets and clipping ranges. Its own scales (asked for
    in bf16, as the file keeps them) and zero points give every weight's integer back: they are read off the rounded
    model, not rounded again, so that one loader and one count of bytes serve this file as the lab's own.
    """
    windows, parameters = job.calibration, job.parameters
    grid = Grid(parameters["bits"], parameters["group_size"])
    _restore_logger_class("autoround")
    logging.getLogger("autoround").setLevel(logging.CRITICAL)
    with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng():  # bars
        from auto_round import AutoRound

        rounder = AutoRound(
            checkpoint.load_model(job.folder, job.device),
            checkpoint.load_tokenizer(job.folder),
            dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in windows],
            nsamples=len(windows),
            seqlen=windows.shape[1],
            batch_size=min(AUTOROUND_BATCH, len(windows)),
            bits=grid.bits,
            group_size=grid.group_size,
            sym=False,
            layer_config={name: {"bits": 16, "data_type": "float"} for name in job.skipped} or None,
            iters=parameters["iterations"],
            scale_dtype="bf16",
            seed=job.seed,
            device_map=job.device,
        )
        tuned = rounder.quantize()[0]
    layers = {name: layer for name, layer in walk.linear_layers(tuned).items() if name not in job.skipped}
    left = [name for name, layer in layers.items() if not hasattr(layer, "scale")]  # rows or columns not whole 32s
    rounded = {name: autoround_integers(layer, grid) for name, layer in layers.items() if name not in left}
    note = f"AutoRound left {len(left)} layers in bf16, {left[0]} the first: it takes whole 32s" if left else ""
    return packed.pack_model(tuned, rounded, measured={"iterations": parameters["iterations"], "note": note})


def autoround_integers(layer: nn.Linear, grid: Grid) -> Rounded:
    """The integers of a layer that AutoRound has rounded, from its own scales and zero points.

    Raises ValueError when scales and zero points do not give the layer's weights back.
    """
    scales, zeros = (part.detach().float().reshape(layer.out_features, -1) for part in (layer.scale, layer.zp))
    codes = layer.weight.detach().float().unflatten(1, (scales.shape[1], -1)) / scales[..., None] + zeros[..., None]
    steps = codes.round().clamp(0, 2**grid.bits - 1)
    distance = float((codes - steps).abs().max())
    if distance > 0.25:  # bf16 weights stand at most 2^-9 of their size, a sixteenth of a step at 4 bits, off the grid
        raise InputError(f"a weight is {distance:.2f} steps off AutoRound's own grid of {grid.bits} bits")
    offset = 2 ** (grid.bits - 1)
    return Rounded(grid, (steps - offset).flatten(1).to(torch.int8), scales, (zeros - offset).to(torch.int8))


def _restore_logger_class(name: str) -> None:
    """Give a library's logger the standard class back: NNCF, once imported, makes all new loggers its own.

    Its `warning_once` takes one argument where AutoRound passes two.
    """
    logging.getLogger(name).__class__ = logging.Logger


def hqq(job: Job) -> dict:
    """HQQ with its defaults, in its own storage; the embedding in bf16 or int8 rows."""
    parameters = job.parameters
    model = checkpoint.load_model(job.folder)
    layers = [name for name in walk.linear_layers(model) if name not in job.skipped]
    others = {n: p.detach() for n, p in model.named_parameters() if n.removesuffix(".weight") not in layers}
    if parameters["embedding"] == "int8":
        table = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
        others[table], others[f"{table}_scale"] = packed.int8_rows(others[table])
    bits, group_size = parameters["bits"], parameters["group_size"]
    stored.write_hqq(model, layers, job.out, bits=bits, group_size=group_size, others=others)
    checkpoint.load_tokenizer(job.folder).save_pretrained(job.out)
    return {}


def openvino_int4(job: Job) -> dict:
    """NNCF's int4 without data, as `avalab export` writes it."""
    openvino_engine.export(job.folder, job.out, "int4")
    return {}


def nncf_int4(job: Job) -> dict:
    """NNCF's int4 with AWQ and scale estimation on the job's windows."""
    for module in ("openvino_genai", "nncf"):
        engines.require("openvino", module, openvino_engine.INSTALL)
    import nncf
    import openvino as runtime

    graph = engines.OWN_FILES["openvino"]
    nncf.set_log_level(logging.ERROR)
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(io.StringIO()):
        openvino_engine.export(job.folder, Path(temporary), "f16")
        model = nncf.compress_weights(
            runtime.Core().read_model(str(Path(temporary) / graph)),
            mode=nncf.CompressWeightsMode.INT4_ASYM,
            group_size=NNCF_GROUP_SIZE,
            ratio=1.0,
            dataset=nncf.Dataset([_inputs(window) for window in job.calibration]),
            subset_size=len(job.calibration),
            awq=True,
            scale_estimation=True,
        )
        runtime.save_model(model, str(job.out / graph), compress_to_fp16=False)
        for file in Path(temporary).iterdir():
            if not file.name.startswith(graph.removesuffix(".xml")):
                shutil.copyfile(file, job.out / file.name)
    return {}


def _inputs(window: Tensor) -> dict[str, np.ndarray]:
    """One window as the stateful graph reads it, from an empty cache."""
    tokens = window.numpy()[None]
    return {
        "input_ids": tokens,
        "position_ids": np.arange(tokens.shape[1])[None],
        "attention_mask": np.ones_like(tokens),
        "beam_idx": np.zeros(1, np.int32),
    }


def onnx_k_quant(job: Job) -> dict:
    """ONNX Runtime's k-quant, groups of 32, by its GenAI model builder; raises as `onnx_graph.run_builder` does."""
    onnx_graph.run_builder(job.folder, job.out, "int4", options=K_QUANT)
    return {}


def llama_cpp(job: Job) -> dict:
    """llama.cpp's own quantisation into the mixture that the method names."""
    base = artifacts.load_artifact(job.folder, verify=False)
    return llamacpp.quantise_to_gguf(base, job.out, job.method.removeprefix(GGUF), job.calibration)
