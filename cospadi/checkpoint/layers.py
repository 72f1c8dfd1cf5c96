"""Linear layers that keep the compressed form in memory and multiply with it.

Each holds exactly the tensors that a checkpoint stores. Few tokens at a time (decoding) go through kernels that read the
packed form; many (prefill) through dense products of what is unpacked for the moment. Both compute the same product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cospadi.checkpoint.linear import CompressedLinear, cpu_kernels, gpu_kernels
from cospadi.errors import UserError
from cospadi.factorization.budget import mask_bits
from cospadi.factorization.factors import Dense, LowRank, SparseDictionary, SparsePlusLowRank
from cospadi.factorization.settings import FIXED_ATOMS, IDENTITY, NO_FIXED_ATOMS
from cospadi.packing.bits import unpack_bits
from cospadi.packing.formats import bits_of
from cospadi.packing.matrix import decoded, empty_packed, groups, unpack

SHARES = "shares"
"""Key of a layer's description in a checkpoint: path of the layer that stores what this one shares."""


class LowRankLinear(CompressedLinear):
    """``y = (x L) R + b`` with ``L (d_in × rank)`` and ``R (rank × d_out)``."""

    kind = LowRank.kind
    shared_part = LowRank.shared_part

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int,
        storage_dtype: str,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        formats: Any = None,
    ) -> None:
        super().__init__(d_in, d_out, bias, dtype, storage_dtype, formats)
        self.rank = rank
        self._hold("left", d_in, rank)
        self._hold("right", rank, d_out)

    @property
    def _sizes(self) -> dict[str, Any]:
        return {"rank": self.rank}

    def dense_weight(self) -> Float[Tensor, "d_in d_out"]:
        return self._matrix("left", torch.float32) @ self._matrix("right", torch.float32)

    def _few(self, rows: Tensor) -> Tensor:
        return _few_through_rank(self, rows)

    def _many(self, rows: Tensor) -> Tensor:
        return _many_through_rank(self, rows)


def _few_through_rank(layer: CompressedLinear, rows: Tensor) -> Tensor:
    if rows.is_cuda:
        return _many_through_rank(layer, rows)
    projected = cpu_kernels().dense_product(rows.float(), layer._packed("left"))
    return cpu_kernels().dense_product(projected, layer._packed("right")).to(rows.dtype)


def _many_through_rank(layer: CompressedLinear, rows: Tensor) -> Tensor:
    return rows @ layer._matrix("left", rows.dtype) @ layer._matrix("right", rows.dtype)


class QuantizedLinear(CompressedLinear):
    """``y = x W + b`` with a dense ``W`` in few bits."""

    kind = Dense.kind

    def __init__(
        self,
        d_in: int,
        d_out: int,
        storage_dtype: str,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        formats: Any = None,
    ) -> None:
        super().__init__(d_in, d_out, bias, dtype, storage_dtype, formats)
        self._hold("dense", d_in, d_out)

    @property
    def _sizes(self) -> dict[str, Any]:
        return {}

    def dense_weight(self) -> Float[Tensor, "d_in d_out"]:
        return self._matrix("dense", torch.float32)

    def _few(self, rows: Tensor) -> Tensor:
        if rows.is_cuda:
            return self._many(rows)
        return cpu_kernels().dense_product(rows.float(), self._packed("dense")).to(rows.dtype)

    def _many(self, rows: Tensor) -> Tensor:
        return rows @ self._matrix("dense", rows.dtype)


class SparseDictionaryLinear(CompressedLinear):
    """``y = x [I D] S + b``: learned atoms ``D``, and ``S`` as values and one bit per coefficient.

    ``fixed_atoms`` is ``none``, or ``identity``: then the first ``d_in`` atoms are the inputs themselves and cost nothing.
    """

    kind = SparseDictionary.kind
    shared_part = SparseDictionary.shared_part

    def __init__(
        self,
        d_in: int,
        d_out: int,
        atoms: int,
        n_values: int,
        storage_dtype: str,
        fixed_atoms: str = NO_FIXED_ATOMS,
        value_bits: int = 16,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        formats: Any = None,
    ) -> None:
        super().__init__(d_in, d_out, bias, dtype, storage_dtype, formats)
        allowed_bits = [bits_of(self.formats["values"][0])] if "values" in self.formats else [14, 16]
        if fixed_atoms not in FIXED_ATOMS or value_bits not in allowed_bits:
            raise ValueError(f"fixed_atoms={fixed_atoms}, value_bits={value_bits}")
        self.fixed_atoms = fixed_atoms
        self.value_bits = value_bits
        self.n_values = n_values
        self.n_fixed = d_in if fixed_atoms == IDENTITY else 0
        self.atoms = atoms
        self.all_atoms = self.n_fixed + atoms
        self._hold("dictionary", d_in, atoms)
        self._hold_values()
        self.register_buffer("mask", torch.empty(mask_bits(self.all_atoms, d_out) // 8, dtype=torch.uint8))

    def _hold_values(self) -> None:
        if "values" in self.formats:
            name, group_size = self.formats["values"]
            self.register_buffer("values", empty_packed(name, self.n_values))
            scales = torch.empty(self.out_features, groups(self.all_atoms, group_size), dtype=self.storage)
            self.register_buffer("values_scales", scales)
        elif self.value_bits == 16:
            self.register_buffer("values", torch.empty(self.n_values, dtype=self.storage))
        else:
            self.register_buffer("values", torch.empty((self.n_values * self.value_bits + 7) // 8, dtype=torch.uint8))

    @property
    def _sizes(self) -> dict[str, Any]:
        sizes = {"atoms": self.atoms, "n_values": self.n_values, "fixed_atoms": self.fixed_atoms}
        return sizes | {"value_bits": self.value_bits}

    def dense_weight(self) -> Float[Tensor, "d_in d_out"]:
        codes = self._codes().float()
        learned = self._matrix("dictionary", torch.float32) @ codes[:, self.n_fixed :].T
        return learned + codes[:, : self.n_fixed].T if self.n_fixed else learned

    def _few(self, rows: Tensor) -> Tensor:
        return self._few_on_gpu(rows) if rows.is_cuda else self._few_on_cpu(rows)

    def _few_on_gpu(self, rows: Tensor) -> Tensor:
        projected = self._beside_fixed(rows, rows @ self._matrix("dictionary", rows.dtype))
        values, how = _for_triton(self._values())
        return gpu_kernels().sparse_product(projected, self.mask, values, self._offsets(), self.out_features, *how)

    def _few_on_cpu(self, rows: Tensor) -> Tensor:
        dtype = rows.dtype
        rows = rows.float()
        projected = self._beside_fixed(rows, cpu_kernels().dense_product(rows, self._packed("dictionary")))
        return cpu_kernels().sparse_product(projected, self.mask, self._values(), self._offsets()).to(dtype)

    def _many(self, rows: Tensor) -> Tensor:
        """Through the atoms, or through the weight multiplied out: whichever takes fewer operations."""
        codes = self._codes().to(rows.dtype)
        dictionary = self._matrix("dictionary", rows.dtype)
        d_in, atoms = dictionary.shape
        d_out = self.out_features
        through_atoms = len(rows) * (d_in * atoms + self.all_atoms * d_out)
        through_weight = d_in * d_out * (atoms + len(rows))
        if through_atoms <= through_weight:
            return F.linear(self._beside_fixed(rows, rows @ dictionary), codes)
        weight = codes[:, self.n_fixed :] @ dictionary.T
        return F.linear(rows, weight.add_(codes[:, : self.n_fixed]) if self.n_fixed else weight)

    def _beside_fixed(self, rows: Tensor, learned: Tensor) -> Tensor:
        """``x [I D]`` from ``x`` and ``x D``; without fixed atoms ``x D``."""
        return torch.cat([rows, learned], dim=1) if self.n_fixed else learned

    def _codes(self) -> Float[Tensor, "d_out all_atoms"]:
        """The coefficients as a dense matrix, a row per output."""
        if self._kernels_read("values") and self.mask.device.type == "cpu":
            return cpu_kernels().unpack(self.mask, self._values(), self._offsets(), self.all_atoms)
        if self._kernels_read("values") and self.mask.is_cuda:
            values, how = _for_triton(self._values())
            sizes = self.out_features, self.all_atoms
            return gpu_kernels().unpack(self.mask, values, self._offsets(), *sizes, *how)
        return self._codes_in_torch()

    def _codes_in_torch(self) -> Float[Tensor, "d_out all_atoms"]:
        """`_codes` in plain torch: for other devices, and for formats that no kernel reads."""
        shifts = torch.arange(8, device=self.mask.device, dtype=torch.uint8)
        bits = (self.mask[:, None] >> shifts & 1).flatten()[: self.out_features * self.all_atoms]
        codes = torch.zeros(len(bits), dtype=torch.float32, device=self.mask.device)
        if "values" not in self.formats:
            codes = codes.to(self.storage)
            return codes.masked_scatter_(bits.bool(), self._values()).view(self.out_features, self.all_atoms)
        name, group_size = self.formats["values"]
        stored = decoded(unpack(self.values, name, self.n_values), name)
        codes = codes.masked_scatter_(bits.bool(), stored).view(self.out_features, self.all_atoms)
        return codes * self.values_scales.float().repeat_interleave(group_size, dim=1)[:, : self.all_atoms]

    def _values(self) -> Any:
        """The values, 16 bits each or packed as the kernels take them."""
        if "values" in self.formats:
            return self._codes_of("values", self.values, self.values_scales, self.n_values)
        if self.value_bits == 16:
            return self.values
        return self._once(
            "values",
            (self.values,),
            lambda: unpack_bits(self.values.cpu(), self.value_bits, self.n_values).view(self.storage),
        )

    def check(self) -> None:
        self._offsets()

    def _offsets(self) -> Tensor:
        """Where the values of each output begin: counted once, from the mask."""

        def count() -> Tensor:
            starts = cpu_kernels().offsets(self.mask.cpu(), self.out_features, self.all_atoms)
            if int(starts[-1]) != self.n_values:  # the kernels read where the mask tells them to
                raise UserError(
                    f"A mask has {int(starts[-1])} bits set for {self.n_values} values. Get the checkpoint again."
                )
            return starts

        return self._once("offsets", (self.mask,), count)


class SparsePlusLowRankLinear(SparseDictionaryLinear):
    """``y = x S + (x L) R + b``: sparse ``S`` as coefficients of the identity, ``L`` and ``R`` beside it."""

    kind = SparsePlusLowRank.kind
    shared_part = None

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int,
        n_values: int,
        storage_dtype: str,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        formats: Any = None,
    ) -> None:
        bits = bits_of(formats["values"][0]) if "values" in (formats or {}) else 16
        super().__init__(d_in, d_out, 0, n_values, storage_dtype, IDENTITY, bits, bias, dtype, formats)
        self.rank = rank
        self._hold("left", d_in, rank)
        self._hold("right", rank, d_out)

    @property
    def _sizes(self) -> dict[str, Any]:
        return {"rank": self.rank, "n_values": self.n_values}

    def dense_weight(self) -> Float[Tensor, "d_in d_out"]:
        left = self._matrix("left", torch.float32)
        right = self._matrix("right", torch.float32)
        return super().dense_weight() + left @ right

    def _few(self, rows: Tensor) -> Tensor:
        return super()._few(rows) + _few_through_rank(self, rows)

    def _many(self, rows: Tensor) -> Tensor:
        return super()._many(rows) + _many_through_rank(self, rows)


def _for_triton(values: Any) -> tuple[Tensor, tuple[Any, ...]]:
    """Values, or codes and what the kernels on a GPU want to know of them."""
    if isinstance(values, Tensor):
        return values, ()
    return values.codes, (values.scales, values.group_size, values.format)
