"""How the OpenVINO engine opens a model: GenAI's pipeline, and the same graph with logits that can be read.

GenAI alone reads GGUF; `compiled` lets it write what it made of such a file into a temporary folder. `cut_head` puts a
slice before the last matrix product, so that a step computes logits only where they are wanted.

What it does not do: generate, or change weights.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from avalab.engines import kinds

UNREAD = ("Unsupported quantization type", "gguf_tensor_to_f16 failed")


def pipeline(source: Path, device: str, **options):
    """GenAI's pipeline for a GGUF file or a folder. Raises NotSupported for unread types, ValueError for damage."""
    import openvino_genai

    try:
        return openvino_genai.LLMPipeline(str(source), device, **options)
    except RuntimeError as error:
        if any(reason in str(error) for reason in UNREAD):
            raise kinds.NotSupported(
                f"openvino does not read all tensors of {source.name}; export it as f16, q8_0 or q4_0, or use llamacpp "
                "or torch"
            ) from error
        raise ValueError(f"openvino cannot read {source}: {str(error).strip().splitlines()[-1]}") from error


def compiled(source: Path, device: str, options: dict[str, str | int]):
    """A request to the stateful graph of a GGUF file or a folder, with the input `first_logit` of `cut_head`."""
    import openvino

    core = openvino.Core()
    with tempfile.TemporaryDirectory() as folder:
        if source.is_file():  # GenAI alone reads GGUF: it writes what it made of the file beside it
            (Path(folder) / source.name).symlink_to(source.resolve())
            pipeline(Path(folder) / source.name, device, enable_save_ov_model=True)
            source = Path(folder)
        model = cut_head(core.read_model(str(source / kinds.OWN_FILES["openvino"])))
        return core.compile_model(model, device, options).create_infer_request()


def cut_head(model):
    """Add the input `first_logit` (a position, -1 the last) to a graph with an output `logits`, and return it."""
    import openvino
    from openvino import opset13 as ops

    head = model.output("logits").node
    while head.get_type_name() != "MatMul":
        head = head.input_value(0).get_node()
    first = ops.parameter([1], openvino.Type.i64, name="first_logit")
    first.output(0).tensor.set_names({"first_logit"})
    stop, one, axis = (ops.constant([n], openvino.Type.i64) for n in (2**31 - 1, 1, 1))
    head.input(0).replace_source_output(ops.slice(head.input_value(0), first, stop, one, axis).output(0))
    model.add_parameters([first])
    model.validate_nodes_and_infer_types()
    return model
