"""8-bit ONNX graphs by onnxruntime.quantization: weights and the inputs of matrix products in whole numbers.

1. `onnx_file.graph` exports the model in float32 with free batch and time.
2. `dynamic`: weights have a scale a column, each product's input one found anew at every call; the embedding is stored
   in 8 bits too, and the tied head apart from it, as the quantiser takes no transposed weights.
   `static`: one scale and zero point a product's input, from the least and greatest value that it takes on calibration
   text, so that nothing is searched at run time; an outlier then costs every token resolution. Head and embedding stay
   in float32 there: the head's input has the largest outliers, and logits are read from it directly.
3. The engine `onnxruntime` scores the folder. There is no cache in it: generating reads all tokens at each step.

What it does not do: smooth outliers (see `quantize`, smoothquant), attention in integers, or graphs over 2 GB.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from avalab import artifacts, exported, gguf_export, models, onnx_file
from avalab.artifacts import Artifact
from avalab.engines import dense, kinds
from avalab.engines.onnxruntime import INPUTS, INSTALL

MODES = ("dynamic", "static")
HEAD = "logits"  # the graph's output


def write(
    artifact: Artifact, mode: str, *, windows: Int[Tensor, "window time"] | None = None, out: Path | None = None
) -> Artifact:
    """Export into `<name>+onnx-int8-<mode>` beside it or `out`; `static` needs `windows` of calibration tokens."""
    text = "" if windows is None else artifacts.sha256_of_text(str(windows.tolist()))
    step = {"step": "onnxruntime-int8", "mode": mode, "calibration": text}
    about = exported.Export(step, f"onnx-int8-{mode}", ("onnxruntime",))
    return exported.write(artifact, about, lambda folder: export(artifact.path, folder, mode, windows=windows), out=out)


def export(folder: Path, out: Path, mode: str, *, windows: Int[Tensor, "window time"] | None = None) -> None:
    """Fill `out` with the 8-bit graph, tokenizer and configuration of the dense model in `folder`.

    Raises ValueError for an unknown mode, a model that is not dense, or `static` without windows; EngineUnavailable
    without the packages.
    """
    dense.check(folder, mode, known=MODES, form="8-bit ONNX")
    if mode == "static" and windows is None:
        raise ValueError("static 8-bit ONNX needs windows of calibration tokens, such as corpora.calibration_windows")
    for module in ("onnx", "onnxscript", "onnxruntime"):
        kinds.require("onnxruntime", module, INSTALL)
    proto = onnx_file.graph(models.load(folder, dtype=torch.float32))
    out.mkdir(parents=True, exist_ok=True)
    file = out / kinds.OWN_FILES["onnx-graph"]
    logging.getLogger().addFilter(_is_not_advice)
    try:
        if mode == "dynamic":
            _dynamic(proto, file)
        else:
            _static(proto, file, windows)
    finally:
        logging.getLogger().removeFilter(_is_not_advice)
    gguf_export.copy_beside(folder, out)


def untie(proto) -> None:
    """Replace, in place, every transposed weight of a graph by a weight that is stored transposed."""
    from onnx import numpy_helper

    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in [n for n in proto.graph.node if n.op_type == "Transpose" and n.input[0] in weights]:
        (order,) = (attribute.ints for attribute in node.attribute)
        turned = numpy_helper.to_array(weights[node.input[0]]).transpose(order)
        proto.graph.initializer.append(numpy_helper.from_array(turned.copy(), node.output[0]))
        proto.graph.node.remove(node)


def _dynamic(proto, file: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    untie(proto)
    quantize_dynamic(proto, file, weight_type=QuantType.QInt8, per_channel=True)


def _static(proto, file: Path, windows: Tensor) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Windows(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[dict] = iter({INPUTS[0]: window[None].numpy()} for window in windows)

        def get_next(self) -> dict | None:
            return next(self.batches, None)

    head = [node.name for node in proto.graph.node if HEAD in node.output]
    kinds_of_numbers = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}
    quantize_static(
        proto, file, Windows(), quant_format=QuantFormat.QDQ, op_types_to_quantize=["MatMul"], nodes_to_exclude=head,
        extra_options={"MatMulConstBOnly": True}, **kinds_of_numbers,
    )  # fmt: skip


def _is_not_advice(record: logging.LogRecord) -> bool:
    return "pre-processing before quantization" not in record.getMessage()
