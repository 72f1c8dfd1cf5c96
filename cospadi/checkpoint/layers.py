"""Linear layers that keep the compressed form in memory and multiply with it.

Each holds exactly the tensors that a checkpoint stores. Few tokens at a time (decoding) go through kernels that read the
packed form; many (prefill) through dense products of what is unpacked for the moment. Both compute the same product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cospadi.errors import UserError
from cospadi.factorization.budget import mask_bits
from cospadi.factorization.factors import STORAGE_DTYPES, Dense, LowRank, SparseDictionary, SparsePlusLowRank
from cospadi.kernels.precision import float32_products
from cospadi.packing.bits import unpack_bits
from cospadi.packing.formats import bits_of, format_of, parsed
from cospadi.packing.matrix import Packed, Quantized, empty_packed, groups, pack, unpack

FEW = 16
"""Rows up to which the packed form is read directly: beyond, unpacking it once is cheaper than reading it per row."""
SHARES = "shares"
"""Key of a layer's description in a checkpoint: path of the layer that stores what this one shares."""
IDENTITY = "identity"
NONE = "none"


class CompressedLinear(nn.Module):
    """What all kinds share: sizes, an optional bias, and the choice between few and many tokens.

    ``formats`` says which parts are quantized, and how: format and group size (`parsed`). They are held as packed codes, under the
    part's name, and scales, under its name and ``_scales``; all others in 16 bits.
    """

    kind: str
    shared_part: str | None = None
    """Name of the part that layers of a group share: one tensor for all, stored by the first (`ties`)."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        bias: bool,
        dtype: torch.dtype | None,
        storage_dtype: str,
        formats: Any = None,
    ) -> None:
        super().__init__()
        if min(d_in, d_out) < 1:
            raise ValueError(f"a layer of {d_in}×{d_out}")
        self.in_features = d_in
        self.out_features = d_out
        self.storage = _storage(storage_dtype)
        self.formats = parsed(formats)
        self.bias = _frozen(torch.empty(d_out, dtype=dtype)) if bias else None
        self._derived: dict[str, tuple[Any, Any]] = {}

    def _hold(self, part: str, rows: int, columns: int) -> None:
        """Room for a matrix, in the form that ``formats`` says."""
        if part not in self.formats:
            setattr(self, part, _frozen(torch.empty(rows, columns, dtype=self.storage)))
            return
        name, group_size = self.formats[part]
        setattr(self, part, _frozen(empty_packed(name, rows, columns)))
        scales = torch.empty(groups(rows, group_size), columns, dtype=self.storage)
        setattr(self, f"{part}_scales", _frozen(scales))

    def _matrix(self, part: str, dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
        """A matrix in full."""
        stored = getattr(self, part)
        if part not in self.formats:
            return stored.to(dtype)
        name, group_size = self.formats[part]
        scales = getattr(self, f"{part}_scales")
        return Quantized(unpack(stored, name, scales.shape[1]), scales, name, group_size).float().to(dtype)

    def _packed(self, part: str) -> Any:
        """A matrix as the kernels take it."""
        stored = getattr(self, part)
        if part not in self.formats:
            return stored
        scales = getattr(self, f"{part}_scales")
        return self._codes_of(part, stored, scales, scales.shape[1])

    def _codes_of(self, part: str, codes: Tensor, scales: Tensor, columns: int) -> Any:
        """Packed codes as the kernels take them; those of other widths than theirs are held a byte each from now on."""
        name, group_size = self.formats[part]
        if format_of(name).form is not None:
            return Packed(codes, scales, name, group_size)
        wide = self._once(part, (codes,), lambda: pack(unpack(codes, name, columns).contiguous(), "int8"))
        return Packed(wide, scales, "int8", group_size)

    def forward(self, inputs: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        rows = inputs.reshape(-1, self.in_features)
        few = len(rows) <= FEW and not torch.is_grad_enabled() and rows.device.type in ("cpu", "cuda")
        if few and self._kernels_read_it:
            outputs = self._few(rows)
        elif rows.device.type == "cpu":
            with float32_products(exact=True):
                outputs = self._many(rows)
        else:
            outputs = self._many(rows)
        outputs = outputs if self.bias is None else outputs + self.bias
        return outputs.view(*inputs.shape[:-1], self.out_features)

    def dense_weight(self) -> Float[Tensor, "d_in d_out"]:
        """The weight multiplied out in float32: ``outputs = inputs @ dense_weight``.

        Not named ``weight``: transformers takes a tied module that has one for a linear layer and looks at its shape.
        """
        raise NotImplementedError

    @property
    def _kernels_read_it(self) -> bool:
        """Whether kernels multiply with every part: as it is stored, or as whole numbers of a byte each."""
        return all(map(self._kernels_read, self.formats))

    def _kernels_read(self, part: str) -> bool:
        if part not in self.formats:
            return True
        format = format_of(self.formats[part][0])
        return format.form is not None or format.is_whole

    def _few(self, rows: Tensor) -> Tensor:
        return self._many(rows)

    def _many(self, rows: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def spec(self) -> dict[str, Any]:
        """What a checkpoint's config says of this layer: enough to build it empty."""
        shape = {"kind": self.kind, "d_in": self.in_features, "d_out": self.out_features}
        rest = {"storage_dtype": _name(self.storage), "bias": self.bias is not None}
        formats = {"formats": {part: list(how) for part, how in self.formats.items()}} if self.formats else {}
        return shape | self._sizes | rest | formats

    @property
    def _sizes(self) -> dict[str, Any]:
        """What `spec` says of this kind alone."""
        raise NotImplementedError

    def share_with(self, owner: CompressedLinear) -> None:
        """Use the very parameters of ``owner``, which stores them for both.

        Raises:
            UserError: it lies on another device.
        """
        for part in self.shared_names:
            mine = getattr(self, part)
            its = getattr(owner, part)
            if mine.device != its.device:
                raise UserError(
                    f"Layers on {mine.device} and {its.device} would share a tensor. Load the model on one device, or set "
                    "factorization.group_size=1."
                )
            setattr(self, part, its)

    @property
    def shared_names(self) -> list[str]:
        """Names of the tensors that layers of a group share."""
        if self.shared_part is None:
            return []
        return [self.shared_part, *([f"{self.shared_part}_scales"] if self.shared_part in self.formats else [])]

    def check(self) -> None:
        """That the tensors fit each other.

        Raises:
            UserError: when they do not.
        """

    def _apply(self, fn: Any, recurse: bool = True) -> CompressedLinear:
        """Move anywhere, but keep the stored bits: ``.to(dtype)`` is for what is computed, and changes the bias alone."""

        def same_bits(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if tensor is self.bias or moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(same_bits, recurse)

    def _once(self, name: str, sources: Sequence[Tensor], make: Callable[[], Tensor]) -> Tensor:
        """Derived tensors belong to their sources as they are: changed, or on another device, they are made anew."""
        key = tuple((t.data_ptr(), str(t.device), _version(t)) for t in sources)
        derived = self._derived.get(name)
        if derived is None or derived[0] != key:
            derived = self._derived[name] = key, make().to(sources[0].device)
        return derived[1]

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.spec.items())


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
    projected = _cpu_kernels().dense_product(rows.float(), layer._packed("left"))
    return _cpu_kernels().dense_product(projected, layer._packed("right")).to(rows.dtype)


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
        return _cpu_kernels().dense_product(rows.float(), self._packed("dense")).to(rows.dtype)

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
        fixed_atoms: str = NONE,
        value_bits: int = 16,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        formats: Any = None,
    ) -> None:
        super().__init__(d_in, d_out, bias, dtype, storage_dtype, formats)
        allowed_bits = [bits_of(self.formats["values"][0])] if "values" in self.formats else [14, 16]
        if fixed_atoms not in (NONE, IDENTITY) or value_bits not in allowed_bits:
            raise ValueError(f"fixed_atoms={fixed_atoms}, value_bits={value_bits}")
        self.fixed_atoms = fixed_atoms
        self.value_bits = value_bits
        self.n_values = n_values
        self.n_fixed = d_in if fixed_atoms == IDENTITY else 0
        self.atoms, self.all_atoms = atoms, self.n_fixed + atoms
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
        return _gpu_kernels().sparse_product(projected, self.mask, values, self._offsets(), self.out_features, *how)

    def _few_on_cpu(self, rows: Tensor) -> Tensor:
        rows, dtype = rows.float(), rows.dtype
        projected = self._beside_fixed(rows, _cpu_kernels().dense_product(rows, self._packed("dictionary")))
        return _cpu_kernels().sparse_product(projected, self.mask, self._values(), self._offsets()).to(dtype)

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
            return _cpu_kernels().unpack(self.mask, self._values(), self._offsets(), self.all_atoms)
        if self._kernels_read("values") and self.mask.is_cuda:
            values, how = _for_triton(self._values())
            sizes = self.out_features, self.all_atoms
            return _gpu_kernels().unpack(self.mask, values, self._offsets(), *sizes, *how)
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
        stored = unpack(self.values, name, self.n_values).float()
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
            starts = _cpu_kernels().offsets(self.mask.cpu(), self.out_features, self.all_atoms)
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


def _cpu_kernels() -> ModuleType:
    """Loaded by the first product: numba takes a second, and whoever only reads a checkpoint's config needs none."""
    from cospadi.kernels import sparse_product

    return sparse_product


def _gpu_kernels() -> ModuleType:
    """Loaded by the first product on a GPU: Triton is not installed everywhere."""
    from cospadi.kernels import triton_product

    return triton_product


def _for_triton(values: Any) -> tuple[Tensor, tuple[Any, ...]]:
    """Values, or codes and what the kernels on a GPU want to know of them."""
    if isinstance(values, Tensor):
        return values, ()
    return values.codes, (values.scales, values.group_size, values.format)


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; those made for inference do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def _storage(name: str) -> torch.dtype:
    """
    Raises:
        ValueError: when the kernels cannot read it.
    """
    if name not in STORAGE_DTYPES:
        raise ValueError(f"storage_dtype={name}")
    return STORAGE_DTYPES[name]


def _frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter rather than a buffer, so that layers may share it; it is not trained."""
    return nn.Parameter(tensor, requires_grad=False)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
