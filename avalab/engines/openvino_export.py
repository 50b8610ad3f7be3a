"""A model folder as OpenVINO's intermediate representation, with weights of 16, 8 or 4 bits by NNCF.

1. The dense artefact becomes a float16 GGUF file (`gguf_export`); GenAI reads it into a graph with a key-value cache
   and writes that, with tokenizers of its own. This needs neither optimum-intel nor tracing.
2. NNCF compresses weights without data: `int8` with a scale and zero point a row, `int4` with one a group (embedding
   and head in int8).

The families are those of `gguf_export`. What it does not do: data-aware compression, or activations in integers.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import tempfile
from pathlib import Path

from avalab import exported, gguf_export
from avalab.artifacts import Artifact
from avalab.engines import dense, kinds, openvino_graph
from avalab.engines.openvino import INSTALL

WEIGHTS = ("f16", "int8", "int4")
GROUP_SIZE = 64


def write(artifact: Artifact, weights: str = "int8", *, out: Path | None = None) -> Artifact:
    """Export a dense artefact into an OpenVINO artefact, `<name>+openvino-<weights>` beside it or the folder `out`."""
    about = exported.Export({"step": "openvino", "weights": weights}, f"openvino-{weights}", ("openvino",))
    return exported.write(artifact, about, lambda folder: export(artifact.path, folder, weights), out=out)


def export(folder: Path, out: Path, weights: str = "int8", *, group_size: int = GROUP_SIZE) -> None:
    """Fill `out` with graph, weights, tokenizers and configuration of the model in `folder`.

    Raises ValueError for unknown weights or a quantised model, EngineUnavailable without openvino-genai or nncf.
    """
    dense.check(folder, weights, known=WEIGHTS, form="OpenVINO")
    for module in ("openvino_genai", "nncf"):
        kinds.require("openvino", module, INSTALL)
    import openvino

    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "model.gguf"
        gguf_export.export(folder, file, "f16")
        openvino_graph.pipeline(file, "CPU", enable_save_ov_model=True)
        model = openvino.Core().read_model(str(Path(temporary) / kinds.OWN_FILES["openvino"]))
        model = _compressed(model, weights, group_size)
        openvino.save_model(model, str(out / kinds.OWN_FILES["openvino"]), compress_to_fp16=False)
        for path in Path(temporary).glob("openvino_*tokenizer.*"):
            shutil.copyfile(path, out / path.name)
    gguf_export.copy_beside(folder, out)


def _compressed(model, weights: str, group_size: int):
    if weights == "f16":
        return model
    import nncf

    mode = {"int8": nncf.CompressWeightsMode.INT8_ASYM, "int4": nncf.CompressWeightsMode.INT4_ASYM}[weights]
    groups = {"group_size": group_size, "ratio": 1.0} if weights == "int4" else {}
    nncf.set_log_level(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):  # tables and progress bars
        return nncf.compress_weights(model, mode=mode, **groups)
