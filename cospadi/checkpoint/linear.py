"""The base of all compressed layers: stored tensors, what is derived from them, and the choice between few and many tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cospadi.errors import UserError
from cospadi.factorization.factors import STORAGE_DTYPES
from cospadi.kernels.precision import float32_products
from cospadi.packing.formats import format_of, parsed
from cospadi.packing.matrix import Packed, Quantized, empty_packed, groups, pack, unpack

FEW = 16
"""Rows up to which the packed form is read directly: beyond, unpacking it once is cheaper than reading it per row."""


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
        rest = {"storage_dtype": dtype_name(self.storage), "bias": self.bias is not None}
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
        """Check that the tensors fit each other.

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


def cpu_kernels() -> ModuleType:
    """Loaded by the first product: numba takes a second, and whoever only reads a checkpoint's config needs none."""
    from cospadi.kernels import sparse_product

    return sparse_product


def gpu_kernels() -> ModuleType:
    """Loaded by the first product on a GPU: Triton is not installed everywhere."""
    from cospadi.kernels import triton_product

    return triton_product


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


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as settings name it: ``float16``."""
    return str(dtype).removeprefix("torch.")
