"""Recipes that a plan chooses from: what is done to a model, for which engine, and what its file will weigh.

A `Recipe` is a row of `RECIPES`: its steps as (verb, parameters), the engine that ships, the bytes of its file as a
function of a model's sizes, and where results of the lab tell what it costs in divergence, speed and memory. Size
classes have strategies of their own (30 % pruning and int8; 50 %, distillation and mixed precision; 70 %, distillation
and 4 bits), and every class tries what the lab knows besides. A recipe whose weights are trained under rounding is a
row as any other.

Bytes: formats of `avalab.models.sizes` are exact; GGUF files are their blocks and vectors, exact, and a header that is
mostly the vocabulary (`HEADER_BYTES_A_WORD`); `ava` is given its budget; llama.cpp's mixtures are taken at the bits a
weight that they came to on the lab's own model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import prod

from avalab.kernels import block_types
from avalab.lab.errors import InputError
from avalab.models import sizes
from avalab.models.sizes import Shape
from avalab.plan.agents import SIZES

HEADER_BYTES_A_WORD = 36.0  # of GGUF: a word, its type and its merge; SmolLM2's 49,152 words take 1.8 MB

KEPT_CHANNELS = 0.75  # of the MLPs that are made narrower


@dataclass(frozen=True)
class Recipe:
    """One way to make a model smaller: `steps` are (verb, parameters), `weights` gives the bytes of its file.

    `costs` names the subjects of results whose divergences add up to the recipe's own, and `race` the one whose
    memory and speed it has; `distilled` recipes get back the share that distillation recovers.
    """

    name: str
    engine: str
    weights: Callable[[Shape], int]
    steps: tuple[tuple[str, dict], ...]
    costs: tuple[str, ...]
    race: str
    classes: tuple[str, ...] = SIZES
    distilled: bool = False
    narrower: bool = False  # a quarter of the MLP channels is cut

    @property
    def subject(self) -> str:
        """What its records are called, as in the race of every artefact in every engine."""
        return f"{self.name} in {self.engine}"

    def shape(self, model: Shape) -> Shape:
        """The sizes of the model that is stored."""
        return replace(model, mlp=round(model.mlp * KEPT_CHANNELS)) if self.narrower else model


def parameters_of(model: Shape) -> int:
    """Number of weights of a model, embedding included."""
    blocks = sum(map(prod, model.linears().values())) + 2 * model.hidden
    return model.vocab * model.hidden * (1 if model.tied else 2) + model.layers * blocks + model.hidden


def stored_bytes(model: Shape, method: str, **parameters) -> int:
    """Bytes of a safetensors file, exact."""
    return sizes.predict_artifact_bytes(model, sizes.storage_of_method(method, parameters))


def gguf_bytes(model: Shape, block: str) -> int:
    """Bytes of a GGUF file whose linear layers are of a block type, embedding and head of q8_0, vectors of float32."""

    def matrix(rows: int, columns: int, name: str) -> int:
        kind = block_types.FORMATS[name]
        return (
            block_types.gguf_stored_bytes(rows, columns, kind)
            if block_types.fits_blocks(kind, columns)
            else 2 * rows * columns
        )

    table = matrix(model.vocab, model.hidden, "q8_0") * (1 if model.tied else 2)
    linears = sum(matrix(rows, columns, block) for rows, columns in model.linears().values())
    vectors = 4 * model.hidden * (2 * model.layers + 1)
    return table + model.layers * linears + vectors + round(HEADER_BYTES_A_WORD * model.vocab)


def budget_bytes(model: Shape, bits_per_weight: float) -> int:
    """Bytes of a file of so many bits a weight."""
    return int(parameters_of(model) * bits_per_weight / 8)


# --- the rows ---------------------------------------------------------------------------------------------------------


def _gguf(block: str) -> Recipe:
    name = f"gguf-{block}"
    made = (("gguf", {"block": block}),)
    return Recipe(name, "llamacpp", partial(gguf_bytes, block=block), made, (f"{name} in llamacpp",), name)


def _ava(bits_per_weight: float, subject: str) -> Recipe:
    made = (("quantize", {"method": "ava", "bits_per_weight": bits_per_weight, "format": "gguf"}),)
    size = partial(budget_bytes, bits_per_weight=bits_per_weight)
    return Recipe(f"ava-{bits_per_weight:g}bpw", "llamacpp", size, made, (subject,), "gguf-ava")


def _mixture(name: str, bits_per_weight: float, subject: str) -> Recipe:
    made = (("quantize", {"method": f"gguf-{name}"}),)
    size = partial(budget_bytes, bits_per_weight=bits_per_weight)
    return Recipe(f"gguf-{name}", "llamacpp", size, made, (subject,), "gguf-q4_k_m")


def _pruned(sparsity: float) -> tuple[str, dict]:
    return "prune", {"score": "sparsegpt", "pattern": "unstructured", "sparsity": sparsity}


_INT8 = ("quantize", {"method": "torchao-int8"})

_NARROW = ("prune", {"score": "wanda", "pattern": "mlp_channels", "sparsity": 1 - KEPT_CHANNELS})

_DISTIL = ("distill", {})

ROWS = (
    Recipe("bf16", "torch", partial(stored_bytes, method="bf16"), (), ("bf16 in torch",), "bf16"),
    Recipe(
        "torchao-int8",
        "torch",
        partial(stored_bytes, method="torchao-int8"),
        (_INT8,),
        ("torchao-int8 in torch",),
        "torchao-int8",
    ),
    Recipe(
        "nf4",
        "torch",
        partial(stored_bytes, method="nf4", double_quantization=True),
        (("quantize", {"method": "nf4", "double_quantization": True}),),
        ("nf4 in torch",),
        "nf4",
    ),
    _gguf("q8_0"),
    _gguf("q4_0"),
    _mixture("q4_k_m", 6.27, "gguf-q4_k_m in llamacpp"),
    _mixture("q3_k_m", 5.56, "gguf-q3_k_m"),
    _mixture("q2_k", 5.25, "gguf-q2_k"),
    _ava(6.27, "ava-gguf-105440096b"),
    _ava(5.45, "gguf-ava in llamacpp"),
    _ava(5.11, "ava-gguf-85899872b"),
    _ava(4.31, "ava-gguf-72421472b"),
    Recipe(
        "openvino-int8",
        "openvino",
        partial(budget_bytes, bits_per_weight=8.04),
        (("openvino", {"weights": "int8"}),),
        ("openvino-int8 in openvino",),
        "openvino-int8",
    ),
    Recipe(
        "onnx-int4",
        "onnx",
        partial(budget_bytes, bits_per_weight=5.15),
        (("onnx", {"weights": "int4"}),),
        ("onnx-int4 in onnx",),
        "onnx-int4",
    ),
    Recipe(
        "recovered-4.5bpw",  # the codes and scales of a mixed grid, trained under rounding
        "torch",
        partial(budget_bytes, bits_per_weight=4.5),
        (
            ("quantize", {"method": "ava", "bits_per_weight": 4.5, "embedding": "packed"}),
            ("recover", {"kind": "blocks"}),
        ),
        ("packed-blocks",),
        "ava",
    ),
    Recipe(
        "narrow-distilled-q8_0",
        "llamacpp",
        partial(gguf_bytes, block="q8_0"),
        (_NARROW, _DISTIL, ("gguf", {"block": "q8_0"})),
        ("wanda-mlp_channels-s25", "gguf-q8_0 in llamacpp"),
        "gguf-q8_0",
        distilled=True,
        narrower=True,
    ),
    Recipe(  # the strategy of the small class
        "pruned30-int8",
        "torch",
        partial(stored_bytes, method="torchao-int8"),
        (_pruned(0.3), _INT8),
        ("sparsegpt-s30", "torchao-int8 in torch"),
        "torchao-int8",
        classes=("small",),
    ),
    Recipe(  # of the medium one
        "pruned50-distilled-ava",
        "llamacpp",
        partial(budget_bytes, bits_per_weight=5.11),
        (_pruned(0.5), _DISTIL, ("quantize", {"method": "ava", "bits_per_weight": 5.11, "format": "gguf"})),
        ("sparsegpt-s50", "ava-gguf-85899872b"),
        "gguf-ava",
        classes=("medium",),
        distilled=True,
    ),
    Recipe(  # of the large one
        "pruned70-distilled-q4_0",
        "llamacpp",
        partial(gguf_bytes, block="q4_0"),
        (_pruned(0.7), _DISTIL, ("gguf", {"block": "q4_0"})),
        ("sparsegpt-s70", "gguf-q4_0 in llamacpp"),
        "gguf-q4_0",
        classes=("large",),
        distilled=True,
    ),
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in ROWS}


def recipes_of(classes: set[str], names: list[str] | None = None) -> list[Recipe]:
    """The recipes that any of the size classes tries, or those of these names. Raises InputError for an unknown one."""
    if names is not None:
        if unknown := [name for name in names if name not in RECIPES]:
            raise InputError(f"unknown recipe {unknown[0]!r}; choose of {', '.join(RECIPES)}")
        return [RECIPES[name] for name in names]
    return [recipe for recipe in ROWS if classes & set(recipe.classes)]
