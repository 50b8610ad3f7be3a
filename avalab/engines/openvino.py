"""The OpenVINO engine: GGUF files and exported folders through OpenVINO GenAI; the default on a CPU.

1. GenAI's pipeline generates. It shows no logits and takes grammars as text only, so `logits` and grammars use the same
   graph in plain OpenVINO, compiled at the first such call (the weights are then in memory twice).
2. `paged` uses GenAI's paged attention (what continuous batching needs). It keeps the cache of prompts that it has
   read, so that timing one prompt twice times nothing; hence not the default. `properties` are OpenVINO's own, such as
   `KV_CACHE_PRECISION`, `INFERENCE_PRECISION_HINT` or `DYNAMIC_QUANTIZATION_GROUP_SIZE`.
3. `export` makes the dense artefact a float16 GGUF file, which GenAI reads and writes as its own representation, with
   tokenizers: neither optimum-intel nor tracing is needed. NNCF compresses weights without data: `int8` with a scale
   and zero point a row, `int4` with one a group (embedding and head in int8).

GenAI 2026.4 reads GGUF tensors in F16, Q8_0, Q4_0 and Q4_1, and rounds the minimums of Q4_1 to whole steps: another
model than the file's (LOG.md), unless they were whole. With one thread it dies with SIGFPE on F16 files where the
processor has AMX (see `engine.usable`).
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from avalab.engines import checks, engine
from avalab.engines import gguf as gguf_file
from avalab.engines.checks import Check
from avalab.engines.engine import Engine, Request
from avalab.lab import artifacts
from avalab.lab.artifacts import Artifact
from avalab.lab.errors import InputError
from avalab.models import gguf_layout

INSTALL = 'pip install -e ".[openvino]"'


def load(
    artifact: Artifact | Path,
    *,
    device: str = "CPU",
    threads: int = 0,
    paged: bool = False,
    properties: dict[str, str] | None = None,
) -> Engine:
    """Open a GGUF artefact or an exported folder; `threads` 0 leaves OpenVINO's choice.

    Raises NotSupported for a GGUF file with tensors of a type that OpenVINO does not read.
    """
    folder = engine.folder_for("openvino", artifact)
    engine.require("openvino", "openvino_genai", INSTALL)
    source = engine.gguf_file(folder) if engine.artifact_kind(folder) == "gguf" else folder
    if source.is_file():
        refuse_unread(source)
    options = {"INFERENCE_NUM_THREADS": threads} if threads else {}
    state = {"source": source, "device": device, "options": options | (properties or {})}
    backend = {} if paged else {"ATTENTION_BACKEND": "SDPA"}
    state["pipeline"] = pipeline(source, device, **backend, **state["options"])
    return Engine("openvino", folder, engine.model_facts(folder), state, _new_tokens, _logits)


def _new_tokens(state: dict, request: Request) -> list[int]:
    if request.grammar or request.choose:
        read = _reader(state, every=False)
        return engine.greedy(lambda tokens: read(tokens)[-1], request)
    import openvino
    import openvino_genai

    class Reporter(openvino_genai.StreamerBase):
        def write(self, token) -> openvino_genai.StreamingStatus:
            for one in token if isinstance(token, list) else [token]:
                if one not in request.stops:
                    request.on_token(one)
            return openvino_genai.StreamingStatus.RUNNING

        def end(self) -> None:
            """Called once, after the last token."""

    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.do_sample, config.ignore_eos = request.max_new_tokens, False, not request.stops
    config.stop_token_ids = set(request.stops)
    prompt = openvino.Tensor(np.array([request.prompt], dtype=np.int64))
    tokens = state["pipeline"].generate(prompt, config, Reporter()).tokens[0]
    return [token for token in tokens if token not in request.stops]


def _logits(state: dict, tokens: list[int]) -> Tensor:
    return _reader(state, every=True)(tokens)


def _reader(state: dict, *, every: bool) -> Callable[[list[int]], Tensor]:
    """A function that reads tokens after those read before; logits of `every` one, or of the last."""
    graph = state["graph"] = state.get("graph") or compiled(state["source"], state["device"], state["options"])
    graph.reset_state()
    past = 0

    def read(tokens: list[int]) -> Tensor:
        nonlocal past
        inputs = {
            "input_ids": np.array([tokens]),
            "position_ids": np.arange(past, past + len(tokens))[None],
            "beam_idx": np.zeros(1, np.int32),
            "attention_mask": np.ones((1, past + len(tokens)), np.int64),
            "first_logit": np.array([0 if every else -1]),
        }
        past += len(tokens)
        return torch.from_numpy(graph.infer(inputs)[0][0].copy())

    return read


# What GenAI reads of kept steps. The minimums of q4_1 become whole steps, which they are.
GGUF = gguf_file.Reader(("q4_0", "q4_1", "q8_0"), dense="f16", whole_minimums=True)

UNREAD = ("Unsupported quantization type", "gguf_tensor_to_f16 failed")


def refuse_unread(file: Path) -> None:
    """Raise NotSupported for a GGUF file that GenAI refuses, or of which it would compute another model in silence."""
    header = gguf_layout.read_header(file)
    family = header.values.get("general.architecture")
    biases = family == "llama" and any(name.endswith(".bias") for name in header.types)
    if family not in gguf_file.OPENVINO_READS:
        reason = f"is a {family}; of GGUF files it reads {', '.join(gguf_file.OPENVINO_READS)}"
    elif f"{family}.rope.scaling.type" in header.values or "rope_freqs.weight" in header.types:
        reason = f"is a {family} of scaled positions, and it would leave the scaling out"
    elif biases:
        reason = f"is a {family} with biases, and it would leave them out"
    elif unread := sorted(set(header.types.values()) - set(gguf_file.OPENVINO_TYPES)):
        known = f"it reads {', '.join(gguf_file.OPENVINO_TYPES)}, to which `quantize --engine openvino` keeps"
        reason = f"holds {', '.join(unread)}; {known}"
    else:
        return
    raise engine.NotSupported(f"openvino cannot run {file.name}: it {reason}; llamacpp and torch can")


def pipeline(source: Path, device: str, **options):
    """GenAI's pipeline for a GGUF file or a folder. Raises NotSupported for unread types, ValueError for damage."""
    import openvino_genai

    try:
        return openvino_genai.LLMPipeline(str(source), device, **options)
    except (RuntimeError, IndexError) as error:
        if any(reason in str(error) for reason in UNREAD):
            raise engine.NotSupported(
                f"openvino does not read all tensors of {source.name}; export it as f16, q8_0 or q4_0, or use llamacpp "
                "or torch"
            ) from error
        raise InputError(f"openvino cannot read {source}: {str(error).strip().splitlines()[-1]}") from error


def compiled(source: Path, device: str, options: dict[str, str | int]):
    """A request to the stateful graph of a file or folder, with the input `first_logit` (a position, -1 the last).

    A slice before the last matrix product leaves logits of the positions from that one on.
    """
    import openvino
    from openvino import opset13 as ops

    core = openvino.Core()
    with tempfile.TemporaryDirectory() as folder:
        if source.is_file():  # GenAI alone reads GGUF: it writes what it made of the file beside it
            (Path(folder) / source.name).symlink_to(source.resolve())
            pipeline(Path(folder) / source.name, device, enable_save_ov_model=True)
            source = Path(folder)
        model = core.read_model(str(source / engine.OWN_FILES["openvino"]))
        head = model.output("logits").node
        while head.get_type_name() != "MatMul":
            head = head.input_value(0).get_node()
        first = ops.parameter([1], openvino.Type.i64, name="first_logit")
        first.output(0).tensor.set_names({"first_logit"})
        stop, one, axis = (ops.constant([n], openvino.Type.i64) for n in (2**31 - 1, 1, 1))
        head.input(0).replace_source_output(ops.slice(head.input_value(0), first, stop, one, axis).output(0))
        model.add_parameters([first])
        model.validate_nodes_and_infer_types()
        return core.compile_model(model, device, options).create_infer_request()


# --- export ----------------------------------------------------------------------------------------------------------

KEPT = gguf_file.KEPT  # the steps of a packed artefact, as they are

WEIGHTS = ("f16", "int8", "int4", KEPT)

# What rounding is like: the key-value cache and what products read have 8 bits.
COARSE = {"f16": "bf16", "int8": "q8_0", "int4": "q4_0", KEPT: "q8_0"}

GROUP_SIZE = 64


def write(artifact: Artifact, weights: str = "int8", *, out: Path | None = None) -> Artifact:
    """Export an artefact into an OpenVINO artefact, `<name>+openvino-<weights>` beside it or the folder `out`.

    `kept` asks for a packed one, the other weights for a dense one.
    """
    about = artifacts.Export({"step": "openvino", "weights": weights}, f"openvino-{weights}", ("openvino",))
    check = checks.against(artifact, Check({"openvino": COARSE[weights]}))
    return artifacts.write_export(
        artifact, about, lambda folder: export(artifact.path, folder, weights), check, out=out
    )


def export(folder: Path, out: Path, weights: str = "int8", *, group_size: int = GROUP_SIZE) -> None:
    """Fill `out` with graph, weights, tokenizers and configuration of the model in `folder`.

    Raises ValueError for unknown weights or a quantised model, EngineUnavailable without openvino-genai or nncf.
    """
    engine.check_source(folder, weights, known=WEIGHTS, form="OpenVINO", packed=KEPT)
    engine.require("openvino", ("openvino_genai", "nncf"), INSTALL)
    import openvino

    config = gguf_file.checked_config(folder, kept=weights == KEPT)
    out.mkdir(parents=True, exist_ok=True)
    graph = engine.OWN_FILES["openvino"]
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / f"{folder.name}.gguf"
        gguf_file.export(folder, file, KEPT if weights == KEPT else "f16", reader=GGUF)
        gguf_file.copy_beside(folder, file.parent)
        engine.usable("openvino", load, file.parent, {})  # raises where reading the file would end this process
        refuse_unread(file)
        pipeline(file, "CPU", enable_save_ov_model=True)
        model = openvino.Core().read_model(str(file.parent / graph))
        if weights in ("int8", "int4"):
            model = _compressed(model, weights, group_size)
        openvino.save_model(model, str(out / graph), compress_to_fp16=False)
        for path in file.parent.glob("openvino_*tokenizer.*"):
            shutil.copyfile(path, out / path.name)
    gguf_file.copy_beside(folder, out, context=gguf_layout.context_of(config))


def _compressed(model, weights: str, group_size: int):
    import nncf

    mode = {"int8": nncf.CompressWeightsMode.INT8_ASYM, "int4": nncf.CompressWeightsMode.INT4_ASYM}[weights]
    groups = {"group_size": group_size, "ratio": 1.0} if weights == "int4" else {}
    nncf.set_log_level(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):  # tables and progress bars
        return nncf.compress_weights(model, mode=mode, **groups)
