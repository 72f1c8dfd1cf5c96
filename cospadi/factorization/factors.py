"""What a factorization returns, and the tensors that are stored of it.

``tensors()`` is the stored form and ``stored_bits`` counts exactly those tensors; ``weight()`` multiplies the stored
form out again, so that every number reported belongs to the rounded factors and not to those before rounding.

Factors of a group hold one and the same tensor as their ``shared_part``; the first of them stores it, the others do not.
A matrix is in 16 bits, or `Quantized`: then its packed codes and its scales are stored in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cospadi.errors import UserError
from cospadi.factorization.budget import PAPER_VALUE_BITS, mask_bits
from cospadi.packing.bits import pack_bits, unpack_bits
from cospadi.packing.formats import bits_of
from cospadi.packing.matrix import Quantized, pack, unpack

Matrix = Float[Tensor, "_ _"] | Quantized
Formats = Mapping[str, tuple[str, int]]
"""Stored part -> format and group size of its codes, for those that are quantized."""
STORAGE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LowRank:
    """``W ≈ left @ right``."""

    left: Float[Tensor, "d_in rank"] | Quantized
    right: Float[Tensor, "rank d_out"] | Quantized
    kind = "low_rank"
    shared_part = "left"

    @property
    def value_bits(self) -> int:
        return _bits(self.right)

    @classmethod
    def balanced(cls, left: Tensor, right: Tensor, storage_dtype: torch.dtype) -> LowRank:
        """Both factors in ``storage_dtype``, scaled so that column ``i`` of one and row ``i`` of the other match.

        Equal norms keep both factors away from the ends of the 16-bit range.
        """
        column = left.norm(dim=0)
        row = right.norm(dim=1)
        used = (column > 0) & (row > 0)  # where one side is zero the product is: both become zero
        scale = torch.where(used, (row / column).sqrt(), torch.ones_like(column))
        left = torch.where(used, left * scale, 0.0)
        right = torch.where(used[:, None], right / scale[:, None], 0.0)
        return cls(rounded(left, storage_dtype), rounded(right, storage_dtype))

    @property
    def sizes(self) -> dict[str, int | None]:
        return {"rank": self.left.shape[1], "atoms": None, "sparsity": None}

    def weight(self) -> Float[Tensor, "d_in d_out"]:
        return self.left.float() @ self.right.float()

    def tensors(self) -> dict[str, Tensor]:
        return _stored("left", self.left) | _stored("right", self.right)

    @property
    def formats(self) -> Formats:
        return _formats(left=self.left, right=self.right)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], formats: Formats | None = None) -> LowRank:
        return cls(_read("left", tensors, formats), _read("right", tensors, formats))


@dataclass(frozen=True)
class SparseDictionary:
    """``W ≈ dictionary @ coefficients``, at most ``sparsity`` non-zero coefficients in a column.

    Stored: the dictionary, the non-zero values column by column, and one bit per coefficient that says where they are.
    With ``identity`` the atoms are ``[I, dictionary]``: the identity's come first, and are not stored.
    """

    dictionary: Float[Tensor, "d_in atoms"] | Quantized
    coefficients: Float[Tensor, "all_atoms d_out"] | Quantized
    value_bits: int = 16
    """Bits stored per value: 16, 14 under the paper's accounting, or the width of the codes when quantized."""
    identity: bool = False
    kind = "sparse_dictionary"
    shared_part = "dictionary"

    @classmethod
    def normalized(
        cls,
        dictionary: Tensor,
        coefficients: Tensor,
        storage_dtype: torch.dtype,
        value_bits: int = 16,
        identity: bool = False,
    ) -> SparseDictionary:
        """Unit atoms and coefficients to match, in ``storage_dtype``; low mantissa bits beyond ``value_bits`` cut."""
        norms = dictionary.norm(dim=0)
        norms = torch.where(norms > 0, norms, torch.ones_like(norms))
        if identity:  # its atoms are unit
            scales = torch.cat([norms.new_ones(len(dictionary)), norms])
        else:
            scales = norms
        values = rounded(coefficients * scales[:, None], storage_dtype)
        factors = cls(rounded(dictionary / norms, storage_dtype), values, identity=identity)
        return truncated(factors) if value_bits == PAPER_VALUE_BITS else factors

    @classmethod
    def of_sparse_weight(cls, weight: Float[Tensor, "d_in d_out"], storage_dtype: torch.dtype) -> SparseDictionary:
        """``weight`` as its non-zeros and their mask: the identity's atoms and no learned one."""
        nothing = torch.empty(len(weight), 0, dtype=storage_dtype, device=weight.device)
        return cls(nothing, rounded(weight, storage_dtype), identity=True)

    @property
    def sizes(self) -> dict[str, int | None]:
        nonzeros = self.mask.sum(dim=0)
        return {"rank": None, "atoms": self.dictionary.shape[1], "sparsity": int(nonzeros.max())}

    @property
    def mask(self) -> Bool[Tensor, "all_atoms d_out"]:
        """Where there is a value. One that quantization made zero is none, and takes no bits."""
        quantized = isinstance(self.coefficients, Quantized)
        return self.coefficients.nonzero if quantized else self.coefficients != 0

    def weight(self) -> Float[Tensor, "d_in d_out"]:
        n_fixed = self.dictionary.shape[0] if self.identity else 0
        coefficients = self.coefficients.float()
        learned = self.dictionary.float() @ coefficients[n_fixed:]
        return learned + coefficients[:n_fixed] if self.identity else learned

    def tensors(self) -> dict[str, Tensor]:
        return _stored("dictionary", self.dictionary) | self._packed

    @cached_property
    def _packed(self) -> dict[str, Tensor]:
        """Values and mask, column by column of the coefficients: packed once, although it is asked for at every step."""
        numbers = self.coefficients
        quantized = isinstance(numbers, Quantized)
        columns = (numbers.codes if quantized else numbers).T.contiguous().cpu()
        mask, values = _nonzeros().gather(columns)
        if quantized:
            stored = {"values": pack(values, numbers.format), "values_scales": numbers.scales.T.contiguous()}
        elif self.value_bits == 16:
            stored = {"values": values}
        else:
            stored = {"values": pack_bits(values.view(torch.int16), self.value_bits)}
        return stored | {"mask": mask}

    @property
    def formats(self) -> Formats:
        return _formats(dictionary=self.dictionary, values=self.coefficients)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], formats: Formats | None = None) -> SparseDictionary:
        dictionary = _read("dictionary", tensors, formats)
        stored = tensors["values"]
        mask_bytes = tensors["mask"]
        d_in, atoms = dictionary.shape
        d_out = int(tensors["d_out"])
        identity = len(mask_bytes) != mask_bits(atoms, d_out) // 8  # the mask is longer by d_in · d_out bits
        atoms += d_in if identity else 0
        if "values" in (formats or {}):
            name, group_size = formats["values"]
            codes = _nonzeros().scatter(mask_bytes, unpack(stored, name, _nonzeros().count(mask_bytes)), d_out, atoms)
            scales = tensors["values_scales"].T.contiguous()
            return cls(dictionary, Quantized(codes.T, scales, name, group_size), bits_of(name), identity)
        value_bits = 16
        if stored.dtype == torch.uint8:
            value_bits = PAPER_VALUE_BITS  # the only packed form; a few values do not tell their width by their bytes
            stored = unpack_bits(stored, value_bits, _nonzeros().count(mask_bytes)).view(dictionary.dtype)
        return cls(dictionary, _nonzeros().scatter(mask_bytes, stored, d_out, atoms).T, value_bits, identity)


@dataclass(frozen=True)
class SparsePlusLowRank:
    """``W ≈ S + left @ right``, the non-zeros of ``S`` stored with one bit per weight that says where they are."""

    sparse: SparseDictionary
    """The identity's atoms alone, see `SparseDictionary.of_sparse_weight`."""
    low_rank: LowRank
    kind = "sparse_plus_low_rank"

    @property
    def value_bits(self) -> int:
        return self.sparse.value_bits

    @property
    def sizes(self) -> dict[str, int | None]:
        return self.sparse.sizes | {"rank": self.low_rank.sizes["rank"]}

    def weight(self) -> Float[Tensor, "d_in d_out"]:
        return self.sparse.weight() + self.low_rank.weight()

    def tensors(self) -> dict[str, Tensor]:
        return self.sparse.tensors() | self.low_rank.tensors()

    @property
    def formats(self) -> Formats:
        return {**self.sparse.formats, **self.low_rank.formats}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], formats: Formats | None = None) -> SparsePlusLowRank:
        return cls(SparseDictionary.from_tensors(tensors, formats), LowRank.from_tensors(tensors, formats))


@dataclass(frozen=True)
class Dense:
    """A projection that a method leaves as it is, in 16 bits or quantized."""

    dense: Float[Tensor, "d_in d_out"] | Quantized
    kind = "dense"

    @property
    def value_bits(self) -> int:
        return _bits(self.dense)

    @property
    def sizes(self) -> dict[str, int | None]:
        return {"rank": None, "atoms": None, "sparsity": None}

    def weight(self) -> Float[Tensor, "d_in d_out"]:
        return self.dense.float()

    def tensors(self) -> dict[str, Tensor]:
        return _stored("dense", self.dense)

    @property
    def formats(self) -> Formats:
        return _formats(dense=self.dense)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], formats: Formats | None = None) -> Dense:
        return cls(_read("dense", tensors, formats))


def _nonzeros() -> ModuleType:
    """Loaded by the first sparse matrix: numba takes a second, and whoever reads low-rank factors needs none."""
    from cospadi.kernels import nonzeros

    return nonzeros


Factors = LowRank | SparseDictionary | SparsePlusLowRank | Dense
KINDS: dict[str, type[LowRank | SparseDictionary | SparsePlusLowRank | Dense]] = {
    c.kind: c for c in (LowRank, SparseDictionary, SparsePlusLowRank, Dense)
}


def stored_bits(factors: Factors, shares: bool = False) -> int:
    """Bits of the tensors that are written, nothing assumed; of factors that share what another one stores, of the rest."""
    return sum(8 * t.numel() * t.element_size() for t in private_tensors(factors, shares).values())


def private_tensors(factors: Factors, shares: bool) -> dict[str, Tensor]:
    """What is stored of ``factors``; where they share what another one stores, all but that."""
    shared = shared_names(factors) if shares else ()
    return {part: t for part, t in factors.tensors().items() if part not in shared}


def shared_names(factors: Factors) -> tuple[str, ...]:
    """Names of the tensors that factors of a group share."""
    part = getattr(factors, "shared_part", None)
    if part is None:
        return ()
    return (part, f"{part}_scales") if part in factors.formats else (part,)


def shared_matrix(factors: Factors) -> Matrix | None:
    """What factors of a group have in common, one object for all; ``None`` for a kind that never shares."""
    part = getattr(factors, "shared_part", None)
    return None if part is None else getattr(factors, part)


def truncated(factors: SparseDictionary) -> SparseDictionary:
    """With the low mantissa bits of its 16-bit values cut, 14 left (arXiv:2509.22075, section 3.3)."""
    values = factors.coefficients.contiguous()
    values = (values.view(torch.int16) & -(1 << (16 - PAPER_VALUE_BITS))).view(values.dtype)
    return replace(factors, coefficients=values, value_bits=PAPER_VALUE_BITS)


def _stored(part: str, matrix: Matrix) -> dict[str, Tensor]:
    if isinstance(matrix, Quantized):
        return {part: pack(matrix.codes, matrix.format), f"{part}_scales": matrix.scales.contiguous()}
    return {part: matrix}


def _read(part: str, tensors: Mapping[str, Tensor], formats: Formats | None) -> Matrix:
    """What `_stored` made a part into."""
    if part not in (formats or {}):
        return tensors[part]
    name, group_size = formats[part]
    scales = tensors[f"{part}_scales"]
    return Quantized(unpack(tensors[part], name, scales.shape[1]), scales, name, group_size)


def _formats(**parts: Matrix) -> Formats:
    return {part: (m.format, m.group_size) for part, m in parts.items() if isinstance(m, Quantized)}


def _bits(matrix: Matrix) -> int:
    return bits_of(matrix.format) if isinstance(matrix, Quantized) else 16


def split(factors: Factors, members: int) -> list[Factors]:
    """The factors of each of ``members`` equally wide weights side by side; all hold the same shared part."""
    if isinstance(factors, LowRank):
        return [replace(factors, right=right) for right in factors.right.chunk(members, dim=1)]
    return [replace(factors, coefficients=columns) for columns in factors.coefficients.chunk(members, dim=1)]


def rounded(tensor: Tensor, storage_dtype: torch.dtype) -> Tensor:
    """``tensor`` in a 16-bit dtype.

    Raises:
        UserError: when a finite number leaves the range of ``storage_dtype``, or is not finite to begin with.
    """
    if not torch.isfinite(tensor).all():
        raise UserError("The factors hold NaN or infinite numbers. Raise calibration.damping.")
    small = tensor.to(storage_dtype)
    if not torch.isfinite(small).all():
        raise UserError(
            f"A factor of magnitude {tensor.abs().max():.1e} does not fit {storage_dtype}. "
            "Set factorization.storage_dtype=bfloat16."
        )
    return small
