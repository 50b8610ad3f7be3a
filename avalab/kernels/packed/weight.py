"""A weight of 2 to 8 bits a code as products read it: codes of sixteen rows beside each other, and their factors.

A weight is `(value - zero) * scale + minimum`, where value is `levels[code]`, or the code itself counted from `low`;
computed in float32 and rounded once. That covers the lab's grids (codes with or without zero points), rows of int8,
NF4, FP4 and GGUF's block types. What a group shares (`Factors`) is kept in the type of the file, or as a K type keeps
it: small integers times one float16 for several groups.

Layout of the codes, as many bytes as they have bits:
1. sixteen rows are a row block, 32 columns a chunk; a chunk of a row is `bits` words of 32 bits;
2. a code is cut into parts of 4, 2 and 1 bits (5 = 4 + 1, 7 = 4 + 2 + 1), from the lowest; 8 bits are one part, stored
   as a signed byte. The words of a part hold its 32 pieces in order of the columns, the first in the lowest bits;
3. words of the sixteen rows lie beside each other: a vector register takes them as one piece.

Rows are filled up to sixteens with zeros; columns are whole chunks and whole groups (`fits`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Float32, Int, Int32, Integer, UInt8
from torch import Tensor

from avalab.kernels.formats import Rounded
from avalab.kernels.weight import Weight4, group_scales
from avalab.lab.errors import InputError

LANES, CHUNK = 16, 32

PARTS = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}

PACKING_WEIGHTS = 2**18  # of whose codes wide copies are held at a time


@dataclass(frozen=True)
class Factors:
    """One number a group and row: `numbers`, each for some groups of a row, times the group's multiplier if any."""

    numbers: Tensor  # [spans, padded rows]
    multipliers: Tensor | None = None  # [groups, padded rows], int8 or uint8

    def dense(self, groups: int) -> Float32[Tensor, "groups padded"]:
        """The numbers in float32."""
        found = self.numbers.float()
        found = found.repeat_interleave(groups // len(found), 0) if len(found) != groups else found
        return found if self.multipliers is None else found * self.multipliers.float()


@dataclass(frozen=True, eq=False)  # one is itself: what native code reads of it is kept beside it
class PackedWeight:
    """A packed weight; make it with one of the functions below."""

    codes: Int32[Tensor, "blocks chunks bits 16"]
    rows: int
    group_size: int
    scales: Factors
    zeros: Factors | None = None
    minimums: Factors | None = None
    low: int = 0
    levels: Float32[Tensor, "level"] | None = None

    @property
    def bits(self) -> int:
        return self.codes.shape[2]

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.codes.shape[1] * CHUNK

    @property
    def groups(self) -> int:
        return self.shape[1] // self.group_size

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def tensors(self) -> list[Tensor]:
        """All tensors held."""
        found = [self.codes] if self.levels is None else [self.codes, self.levels]
        for part in (self.scales, self.zeros, self.minimums):
            found += [] if part is None else [t for t in (part.numbers, part.multipliers) if t is not None]
        return found

    @property
    def bytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def to(self, device: str | torch.device) -> PackedWeight:
        """The same weight on another device."""

        def moved(part: object) -> object:
            if isinstance(part, Factors):
                return Factors(*(None if t is None else t.to(device) for t in (part.numbers, part.multipliers)))
            return part.to(device) if isinstance(part, Tensor) else part

        return PackedWeight(**{field.name: moved(getattr(self, field.name)) for field in fields(self)})


def fits(cols: int, group_size: int) -> bool:
    """Whether whole chunks fill a row, and whole groups, of which a chunk holds one or two."""
    return cols > 0 and cols % CHUNK == 0 and cols % group_size == 0 and (group_size % CHUNK == 0 or group_size == 16)


# --- made of ---------------------------------------------------------------------------------------------------------


def pack(codes: Integer[Tensor, "rows cols"], bits: int, scales: Factors, *, group_size: int, **others) -> PackedWeight:
    """The weight of codes counted from `low` (0 unless given) and factors that `by_groups` has put in order.

    Raises InputError for columns that chunks or groups do not divide, and for a scale that is not finite, naming its
    row and group.
    """
    rows, cols = codes.shape
    if bits not in PARTS:
        raise InputError(f"packed weights have {min(PARTS)} to {max(PARTS)} bits a code, got {bits}")
    if not fits(cols, group_size):
        raise InputError(f"groups of {group_size} in {cols} columns: products take 16 or 32's multiples, both whole")
    words = pack_words(codes, bits, others.get("low", 0))
    found = PackedWeight(words, rows, group_size, scales, **others)
    for name in ("scales", "zeros", "minimums"):
        part = getattr(found, name)
        bad = [] if part is None else (~part.dense(found.groups).T.isfinite()).nonzero()
        if len(bad):
            row, group = bad[0].tolist()
            raise InputError(
                f"{name} hold NaN or infinity, first in row {row}, group {group} (of {group_size} columns)"
            )
    return found


def by_groups(numbers: Tensor) -> Tensor:
    """Numbers ["rows groups"] as `Factors` keep them: ["groups padded"]."""
    return torch.nn.functional.pad(numbers, (0, 0, 0, -len(numbers) % LANES)).T.contiguous()


def narrowest(scales: Float[Tensor, "rows groups"]) -> Float[Tensor, "rows groups"]:
    """The scales in bf16, where that holds them exactly as files of bf16 models do, else in float32."""
    narrow = scales.bfloat16()
    return narrow if torch.equal(narrow.float(), scales.float()) else scales.float()


def from_rounded(rounded: Rounded) -> PackedWeight:
    """A weight on one of the lab's grids."""
    grid = rounded.grid
    zeros = None if grid.symmetric else Factors(by_groups(rounded.zero_points))
    return pack(
        rounded.codes,
        grid.bits,
        Factors(by_groups(narrowest(rounded.scales))),
        group_size=rounded.codes.shape[1] // rounded.scales.shape[1],
        zeros=zeros,
        low=grid.low,
    )


def from_int8_rows(codes: Tensor, scales: Tensor) -> PackedWeight:
    """Rows of int8 with a scale each."""
    factors = Factors(by_groups(narrowest(scales.reshape(-1, 1))))
    return pack(codes, 8, factors, group_size=codes.shape[1], low=-128)


def from_weight4(weight: Weight4) -> PackedWeight:
    """A 4-bit weight of levels (NF4, FP4) or integers; double-quantised scales become float32."""
    codes = torch.stack((weight.codes >> 4, weight.codes & 15), -1).view(weight.shape)
    kept = {"zeros": weight.zero_points, "minimums": weight.minimums}
    return pack(
        codes,
        4,
        Factors(by_groups(group_scales(weight))),
        group_size=weight.group_size,
        levels=weight.levels,
        **{name: None if part is None else Factors(by_groups(part)) for name, part in kept.items()},
    )


def pack_words(codes: Integer[Tensor, "rows cols"], bits: int, low: int = 0) -> Int32[Tensor, "blocks chunks bits 16"]:
    """Codes, counted from `low`, in the order of the module's layout."""
    rows, cols = codes.shape
    words = torch.zeros(-(-rows // LANES), cols // CHUNK, bits, LANES, dtype=torch.int32, device=codes.device)
    step = max(1, PACKING_WEIGHTS // (cols * LANES))
    for first in range(0, len(words), step):
        part = codes[first * LANES : (first + step) * LANES].int() - low
        part = torch.nn.functional.pad(part, (0, 0, 0, -len(part) % LANES)).view(-1, LANES, cols // CHUNK, CHUNK)
        target, shift, at = words[first : first + step], 0, 0
        for width in PARTS[bits]:
            pieces = ((part >> shift) & ((1 << width) - 1)) ^ (128 if width == 8 else 0)
            places = torch.arange(0, 32, width, dtype=torch.int32, device=codes.device)
            # Pieces do not overlap: their sum is their union, in 64 bits because the highest reaches the sign.
            summed = (pieces.unflatten(-1, (width, -1)).long() << places).sum(-1)
            target[:, :, at : at + width] = summed.to(torch.int32).permute(0, 2, 3, 1)
            shift, at = shift + width, at + width
    return words


# --- decoded ---------------------------------------------------------------------------------------------------------


def unpack_codes(words: Int32[Tensor, "blocks chunks bits 16"]) -> UInt8[Tensor, "rows cols"]:
    """The codes that `pack_words` packed, rows filled up to sixteens."""
    blocks, chunks, bits, _ = words.shape
    found, shift, at = torch.zeros(blocks, chunks, LANES, CHUNK, dtype=torch.int32, device=words.device), 0, 0
    for width in PARTS[bits]:
        places = torch.arange(0, 32, width, dtype=torch.int32, device=words.device)
        part = words[:, :, at : at + width].transpose(2, 3)
        pieces = ((part[..., None] >> places) & ((1 << width) - 1)).flatten(3) ^ (128 if width == 8 else 0)
        found |= pieces << shift
        shift, at = shift + width, at + width
    return found.to(torch.uint8).transpose(1, 2).reshape(blocks * LANES, chunks * CHUNK)


def decode(weight: PackedWeight, dtype: torch.dtype = torch.float32) -> Float[Tensor, "rows cols"]:
    """The weights: computed in float32, rounded once. The definition that every other form is held to."""
    return decode_rows(weight, 0, len(weight.codes), dtype)[: weight.rows]


def decode_rows(weight: PackedWeight, first: int, last: int, dtype: torch.dtype) -> Float[Tensor, "rows cols"]:
    """The rows of row blocks `first` to `last`, those that fill the last one up included."""
    part = slice(first * LANES, last * LANES)
    return _valued(weight, unpack_codes(weight.codes[first:last]), lambda f: f.dense(weight.groups)[:, part].T, dtype)


def look_up(weight: PackedWeight, ids: Int[Tensor, "*batch"], dtype: torch.dtype) -> Float[Tensor, "*batch cols"]:
    """Some rows of a weight, as an embedding gives them; raises IndexError for an id outside the table."""
    flat = ids.reshape(-1)
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < weight.rows:
        raise IndexError(f"token ids go from {int(flat.min())} to {int(flat.max())}, the table has {weight.rows} rows")
    words = weight.codes[flat // LANES, :, :, flat % LANES]
    codes = unpack_codes(words[..., None].expand(-1, -1, -1, LANES))[::LANES]
    found = _valued(weight, codes, lambda f: _some_rows(f, flat, weight.groups), dtype)
    return found.view(*ids.shape, -1)


def _some_rows(factors: Factors, rows: Tensor, groups: int) -> Float32[Tensor, "rows groups"]:
    multipliers = None if factors.multipliers is None else factors.multipliers[:, rows]
    return Factors(factors.numbers[:, rows], multipliers).dense(groups).T


def _valued(
    weight: PackedWeight, codes: Tensor, rows_of: Callable[[Factors], Tensor], dtype: torch.dtype
) -> Float[Tensor, "rows cols"]:
    """What codes stand for; `rows_of` takes the factors of their rows, ["rows groups"]."""
    values = codes.float() + weight.low if weight.levels is None else weight.levels[codes.int()]
    values = values.view(len(codes), -1, weight.group_size)
    if weight.zeros is not None:
        values = values - rows_of(weight.zeros)[..., None]
    values = values * rows_of(weight.scales)[..., None]
    if weight.minimums is not None:
        values = values + rows_of(weight.minimums)[..., None]
    return values.flatten(1).to(dtype)
