"""Linear layers and embeddings whose weights stay packed: what a compressed checkpoint holds is what memory holds.

`apply_packed` takes the layers that compressed-tensors has read but not yet decoded, one at a time, to `PackedLinear`
and `PackedEmbedding`. A head that shares its codes with the embedding shares them here. A layer that no packed product
takes (activations are rounded as well, groups that do not fit the columns) is decoded, as all of them once were.

A `PackedLinear` counts as a linear layer, so that adapters find it; its `weight` is empty, and what needs numbers asks
`checkpoint.load_model(packed=False)`.
"""

from __future__ import annotations

import logging

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from avalab.kernels.formats import Grid, Rounded
from avalab.kernels.packed import product
from avalab.kernels.packed.weight import PackedWeight, fits, from_rounded, look_up
from avalab.lab import process
from avalab.lab.errors import InputError

PACKED, ROWS = "pack-quantized", "int-quantized"


class _Product(torch.autograd.Function):
    """x W^T with the gradient of x; W is decoded a tile at a time in both directions."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: PackedWeight) -> Tensor:
        ctx.weight = weight
        return product.multiply(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        return product.multiply_transposed(g, ctx.weight), None


class PackedLinear(nn.Linear):
    """x W^T + bias of a packed weight, in x's dtype; differentiable in x."""

    def __init__(
        self, packed: PackedWeight, bias: Tensor | None = None, *, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        nn.Module.__init__(self)
        self.packed = packed
        self.out_features, self.in_features = packed.shape
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype, device=packed.device), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Float[Tensor, "*batch cols"]) -> Float[Tensor, "*batch rows"]:
        """The product by the best form whose check has passed."""
        wanted = x.requires_grad and torch.is_grad_enabled()
        y = _Product.apply(x, self.packed) if wanted else product.multiply(x, self.packed)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Shape, bits and group size, as printed with the model."""
        rows, cols = self.packed.shape
        return f"in_features={cols}, out_features={rows}, bits={self.packed.bits}, group={self.packed.group_size}"


class PackedEmbedding(nn.Module):
    """Rows of a packed table, decoded when they are looked up, in `dtype`; times `factor`, as Gemma has it."""

    def __init__(self, packed: PackedWeight, *, dtype: torch.dtype, factor: float = 1.0) -> None:
        super().__init__()
        self.packed, self.dtype, self.factor = packed, dtype, factor
        self.num_embeddings, self.embedding_dim = packed.shape
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype, device=packed.device), requires_grad=False)

    def forward(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch cols"]:
        """The tokens' rows."""
        found = look_up(self.packed, ids, self.dtype)
        return found if self.factor == 1.0 else found * torch.tensor(self.factor, dtype=self.dtype)

    def extra_repr(self) -> str:
        """Shape, bits and group size, as printed with the model."""
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.packed.bits}, group={self.packed.group_size}"


def packed_layers(model: nn.Module) -> dict[str, PackedLinear | PackedEmbedding]:
    """The packed layers of a model by qualified name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear | PackedEmbedding)}


def refuse_packed(model: nn.Module, what: str) -> None:
    """Raise InputError where a model holds packed layers, whose weights are not there to be read."""
    if found := packed_layers(model):
        raise InputError(f"{what} needs decoded weights and {next(iter(found))} is packed; load it with packed=False")


def apply_packed(model: PreTrainedModel) -> int:
    """Put packed layers in the place of those that compressed-tensors has read, in place; how many."""
    from compressed_tensors.compressors.base import decompress_module
    from compressed_tensors.offload import from_accelerate

    compressor, dtype = model.hf_quantizer.compressor, model.dtype
    with process.quietly():
        from_accelerate(model)
    replaced: dict[int, PackedWeight] = {}
    for name, module in [(n, m) for n, m in model.named_modules() if hasattr(m, "quantization_scheme")]:
        packed = replaced.get(id(module.weight)) if hasattr(module, "weight") else None
        packed = packed or packed_weight(module, name)
        if packed is None:
            with process.quietly():
                decompress_module(module)
            continue
        if hasattr(module, "weight"):  # codes that embedding and head share
            replaced[id(module.weight)] = packed
        replace_layer(model, name, packed, dtype)
    compressor.remove_decompression_hook(model)
    return len(packed_layers(model))


def replace_layer(model: PreTrainedModel, name: str, packed: PackedWeight, dtype: torch.dtype) -> None:
    """Put a packed layer where `name` was: an embedding, or a linear layer with its bias."""
    parent, _, child = name.rpartition(".")
    module = model.get_submodule(name)
    if isinstance(module, nn.Embedding):
        factor = getattr(module, "embed_scale", 1.0)
        made = PackedEmbedding(packed, dtype=dtype, factor=float(factor))
    else:
        made = PackedLinear(packed, module.bias, dtype=dtype)
    setattr(model.get_submodule(parent) if parent else model, child, made)


def packed_weight(module: nn.Module, name: str) -> PackedWeight | None:
    """What a layer of compressed-tensors holds, or None for one that no packed product takes."""
    scheme = module.quantization_scheme
    form = str(getattr(scheme.format, "value", scheme.format))
    if scheme.input_activations is not None or scheme.weights.actorder is not None:
        return None
    try:
        if form == ROWS and module.weight.dtype == torch.int8:
            return _of_bytes(module)
        if form == PACKED and "weight_packed" in module._parameters:
            return _of_words(module, scheme.weights.num_bits)
    except InputError as error:
        logging.getLogger(__name__).warning("%s is decoded: %s", name, error)
    return None


def _of_bytes(module: nn.Module) -> PackedWeight | None:
    (rows, cols), scales = module.weight.shape, module.weight_scale.data
    groups, zeros = scales.numel() // rows, getattr(module, "weight_zero_point", None)
    if cols % groups or not fits(cols, cols // groups):
        return None
    whole = torch.zeros(rows, groups, dtype=torch.int8) if zeros is None else zeros.data.view(rows, groups)
    grid = Grid(8, cols // groups, symmetric=zeros is None)
    return from_rounded(Rounded(grid, module.weight.data, scales.view(rows, groups), whole))


def _of_words(module: nn.Module, bits: int) -> PackedWeight | None:
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    (rows, cols), scales = module.weight_shape.tolist(), module.weight_scale.data
    groups = scales.shape[1] if scales.ndim == 2 else 1
    if not 2 <= bits <= 8 or cols % groups or not fits(cols, cols // groups):
        return None
    codes = unpack_from_int32(module.weight_packed.data, bits, (rows, cols))
    zeros = getattr(module, "weight_zero_point", None)
    symmetric = zeros is None
    zeros = codes.new_zeros(rows, groups) if symmetric else unpack_from_int32(zeros.data, bits, (rows, groups), 0)
    grid = Grid(bits, cols // groups, symmetric)
    return from_rounded(Rounded(grid, codes, scales.view(rows, groups), zeros.contiguous()))
