"""A mixed-grid model as a folder for ONNX Runtime GenAI: a packed artefact kept as it is, or what `ava` rounded.

1. `packed` reads every packed tensor of a compressed-tensors checkpoint as whole steps and scales, whoever rounded it;
   bits and groups follow from the tensors' shapes.
2. `from_artifact` decodes the checkpoint, lets the builder write that dense model's graph, and puts the packed tensors
   into it as blocks that hold the very same steps (`onnx_blocks`, `onnx_graph`): nothing is rounded a second time.
3. `OnnxModel.save_pretrained` writes the folder, opens it in ONNX Runtime GenAI, and says how far its logits are off.

A decoded value is steps times scale in float32, where transformers rounds that product to bf16. With `inputs="float32"`
the logits are those of the torch engine in float32; "int8" adds the error of rounding what products read to 8 bits.

What it does not do: choose grids or round; formats other than compressed-tensors; rounded activations; experts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from avalab import models, onnx_blocks, onnx_builder, onnx_graph, predict
from avalab.onnx_blocks import Blocks, Steps

FORMAT, ENGINES = "onnx-mixed", ("onnx",)
PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
DIFFERENT = 1.0  # nats a token: a wrong graph, not arithmetic
CHECKED = "A language model gives every next word a probability. This one was rounded, and here it is read back."


@dataclass(frozen=True)
class OnnxModel:
    """A graph that is held, files beside it, token ids and logits to check it with, and what was measured so far."""

    graph: onnx_graph.Graph
    beside: dict[str, bytes]
    tokens: Int[Tensor, "window time"]
    expected: Float[Tensor, "token vocab"]
    measured: dict

    def save_pretrained(self, folder: Path) -> None:
        """Write graph, weights and configuration; `measured` then says what ONNX Runtime makes of them."""
        folder = Path(folder)
        onnx_graph.write(self.graph, folder)
        for name, content in self.beside.items():
            (folder / name).write_bytes(content)
        self.measured.update(_compared(self.expected, logits(folder, self.tokens)))
        self.measured["onnx_bytes"] = sum(file.stat().st_size for file in folder.glob(f"{onnx_graph.FILE}*"))


def export(folder: Path, out: Path, *, inputs: str = "int8") -> dict:
    """Fill `out` with the graph of a packed checkpoint, its tokenizer and configuration; what the card should say.

    Raises ValueError for a checkpoint without packed layers, groups without blocks, or a family without a graph.
    """
    tensors, own_bytes = packed(folder)
    layers = {name: onnx_blocks.blocks(weight) for name, weight in tensors.items()}
    model, tokenizer = models.load(folder), models.load_tokenizer(folder)  # not before what cannot be kept is refused
    tokens = torch.tensor(tokenizer(CHECKED).input_ids)
    expected = _dense_logits(model, tokens)
    models.forget_quantisation(model)
    embedding, head = tables(model)
    with TemporaryDirectory() as dense, TemporaryDirectory() as scratch:
        models.save_model(model, tokenizer, Path(dense))
        graph = onnx_graph.build(Path(dense), Path(scratch))
        if onnx_graph.tied_head(graph):
            layers.pop(head, None)  # the same codes as the embedding's
        about = {"measured_on": f"{len(tokens)} tokens, ONNX Runtime against transformers in bf16"}
        measured = about | {"containers": containers(layers), "note": _note(layers, own_bytes, inputs)}
        made = finished(graph, layers, embedding, inputs=inputs, check=(tokens[None], expected), measured=measured)
    made.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return made.measured


def finished(
    graph: onnx_graph.Graph,
    layers: Mapping[str, Blocks],
    embedding: str,
    *,
    inputs: str,
    check: tuple[Tensor, Tensor],
    measured: dict,
) -> OnnxModel:
    """The builder's graph with weights in blocks, in memory; `check` are windows of token ids and their logits."""
    onnx_graph.quantise(graph, layers, embedding=embedding, inputs=inputs)
    onnx_graph.hold(graph)
    names = ("genai_config.json", *onnx_builder.BESIDE)
    beside = {name: (graph.folder / name).read_bytes() for name in names if (graph.folder / name).is_file()}
    return OnnxModel(graph, beside, *check, measured)


def packed(folder: Path) -> tuple[dict[str, Steps], int]:
    """Packed tensors by transformers' names, and their bytes in the checkpoint.

    Raises ValueError for a checkpoint that has none, or whose steps the graph has no place for.
    """
    file = folder / "config.json"
    config = json.loads(file.read_text()) if file.is_file() else {}
    groups = (config.get("quantization_config") or {}).get("config_groups", {}).values()
    tensors = {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}
    if any(group.get("input_activations") for group in groups) or any(n.endswith("_g_idx") for n in tensors):
        raise ValueError(f"{folder.name} rounds activations or reorders columns; the ONNX graph keeps neither")
    codes = (n.rpartition(".") for n, t in tensors.items() if t.dtype in (torch.int32, torch.int8))
    names = [n for n, _, kind in codes if kind in ("weight_packed", "weight") and f"{n}.weight_scale" in tensors]
    if not names:
        raise ValueError(
            f"{folder.name} holds no packed layers to keep; ava, gptq, awq and rtn make some, and a dense model is "
            "exported with weights int4, int8 or fp32"
        )
    parts = (f"{name}.{part}" for name in names for part in (*PARTS, "weight"))
    own_bytes = sum(tensors[n].numel() * tensors[n].element_size() for n in parts if n in tensors)
    return {name: _steps(name, tensors) for name in names}, own_bytes


def tables(model: PreTrainedModel) -> tuple[str, str]:
    """Names of embedding and head."""
    wanted = (model.get_input_embeddings(), model.get_output_embeddings())
    return tuple(next(name for name, module in model.named_modules() if module is one) for one in wanted)


def containers(layers: Mapping[str, Blocks]) -> dict[str, int]:
    """How many weights are stored in which bits and blocks: `int4-b64`, `int4-b64-zeros`."""
    named = (f"int{p.bits}-b{p.block_size}" + ("" if p.zeros is None else "-zeros") for p in layers.values())
    return dict(sorted(Counter(named).items()))


def logits(folder: Path, windows: Int[Tensor, "window time"]) -> Float[Tensor, "token vocab"]:
    """What ONNX Runtime GenAI computes for windows of token ids, one after the other."""
    import onnxruntime_genai

    model, found = onnxruntime_genai.Model(str(folder)), []
    for window in windows:
        options = onnxruntime_genai.GeneratorParams(model)
        options.set_search_options(max_length=len(window), do_sample=False)
        generator = onnxruntime_genai.Generator(model, options)
        generator.append_tokens(np.asarray(window, dtype=np.int32))
        found.append(torch.from_numpy(generator.get_output("logits")[0].copy()))
    return torch.cat(found)


def _steps(name: str, tensors: Mapping[str, Tensor]) -> Steps:
    scales = tensors[f"{name}.weight_scale"]
    if f"{name}.weight_packed" not in tensors:
        return Steps(tensors[f"{name}.weight"].int(), scales.view(len(scales), -1))
    words = tensors[f"{name}.weight_packed"]
    rows, columns = tensors[f"{name}.weight_shape"].tolist()
    bits = words.shape[1] * 32 // columns
    steps = unpack_from_int32(words, bits, torch.Size((rows, columns))).int()
    if f"{name}.weight_zero_point" in tensors:
        zeros = unpack_from_int32(tensors[f"{name}.weight_zero_point"], bits, scales.shape, packed_dim=0).int()
        steps -= zeros.repeat_interleave(columns // scales.shape[1], dim=1)
    return Steps(steps, scales)


def _note(layers: Mapping[str, Blocks], own_bytes: int, inputs: str) -> str:
    held = sum(part.bytes for part in layers.values())
    return (
        f"nothing was rounded again: {len(layers)} packed weights take {held:,} bytes in ONNX Runtime's 2, 4 and 8 "
        f"bits and {own_bytes:,} in the artefact; products read {inputs}"
    )


@torch.inference_mode()
def _dense_logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    return model(tokens[None], use_cache=False).logits[0].float()


def _compared(expected: Tensor, found: Tensor) -> dict[str, float]:
    """Divergence from what was expected, nats a token. Raises RuntimeError where the two have nothing in common."""
    reference, candidate = (part[:, : expected.shape[1]].float().log_softmax(-1) for part in (expected, found))
    divergence = float(predict.kl_divergence(reference, candidate).mean())
    if not divergence < DIFFERENT:
        raise RuntimeError(f"ONNX Runtime's distributions diverge by {divergence:.2f} nats: the graph is wrong")
    return {"measured_kl_divergence": divergence}
