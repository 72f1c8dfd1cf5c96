"""Linear layers that keep the compressed form in memory and multiply with it.

Each holds exactly the tensors that a checkpoint stores. Few tokens at a time (decoding) go through kernels that read the
packed form; many (prefill) through dense products of what is unpacked for the moment. Both compute the same product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cospadi.errors import UserError
from cospadi.factorization.budget import mask_bits
from cospadi.factorization.factors import (
    STORAGE_DTYPES,
    Factors,
    LowRank,
    SparseDictionary,
    SparsePlusLowRank,
    unpack_bits,
)
from cospadi.kernels.products import products

FEW = 16
"""Rows up to which the packed form is read directly: beyond, unpacking it once is cheaper than reading it per row."""
SHARES = "shares"
"""Key of a layer's description in a checkpoint: path of the layer that stores what this one shares."""
IDENTITY = "identity"
NONE = "none"


class CompressedLinear(nn.Module):
    """What all kinds share: sizes, an optional bias, and the choice between few and many tokens."""

    kind: str
    shared_part: str | None = None
    """Name of the parameter that layers of a group share: one tensor for all, stored by the first (`ties`)."""

    def __init__(self, d_in: int, d_out: int, bias: bool, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if min(d_in, d_out) < 1:
            raise ValueError(f"a layer of {d_in}×{d_out}")
        self.in_features, self.out_features = d_in, d_out
        self.bias = _frozen(torch.empty(d_out, dtype=dtype)) if bias else None

    def forward(self, inputs: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        rows = inputs.reshape(-1, self.in_features)
        if len(rows) <= FEW and not torch.is_grad_enabled() and rows.device.type in ("cpu", "cuda"):
            outputs = self._few(rows)
        elif rows.device.type == "cpu":
            with products(exact=True):
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

    def _few(self, rows: Tensor) -> Tensor:
        return self._many(rows)

    def _many(self, rows: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def spec(self) -> dict[str, Any]:
        """What a checkpoint's config says of this layer: enough to build it empty."""
        shape = {"kind": self.kind, "d_in": self.in_features, "d_out": self.out_features}
        return shape | self._sizes | {"bias": self.bias is not None}

    @property
    def _sizes(self) -> dict[str, Any]:
        """What `spec` says of this kind alone."""
        raise NotImplementedError

    def share_with(self, owner: CompressedLinear) -> None:
        """Use the very parameter of ``owner``, which stores it for both.

        Raises:
            UserError: it lies on another device.
        """
        mine, its = getattr(self, self.shared_part), getattr(owner, self.shared_part)
        if mine.device != its.device:
            raise UserError(
                f"Layers on {mine.device} and {its.device} would share a tensor. Load the model on one device, or set "
                "factorization.group_size=1."
            )
        setattr(self, self.shared_part, its)

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

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.spec.items())


class LowRankLinear(CompressedLinear):
    """``y = (x L) R + b`` with ``L (d_in × rank)`` and ``R (rank × d_out)`` in 16 bits."""

    kind = LowRank.kind
    shared_part = LowRank.shared_part

    def __init__(
        self, d_in: int, d_out: int, rank: int, storage_dtype: str, bias: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(d_in, d_out, bias, dtype)
        storage = _storage(storage_dtype)
        self.left = _frozen(torch.empty(d_in, rank, dtype=storage))
        self.right = _frozen(torch.empty(rank, d_out, dtype=storage))

    @property
    def _sizes(self) -> dict[str, Any]:
        return {"rank": self.left.shape[1], "storage_dtype": _name(self.left.dtype)}

    def dense_weight(self) -> Float[Tensor, "d_in d_out"]:
        return self.left.float() @ self.right.float()

    def _few(self, rows: Tensor) -> Tensor:
        return _few_through_rank(rows, self.left, self.right)

    def _many(self, rows: Tensor) -> Tensor:
        return _many_through_rank(rows, self.left, self.right)


def _few_through_rank(rows: Tensor, left: Tensor, right: Tensor) -> Tensor:
    if rows.is_cuda:
        return _many_through_rank(rows, left, right)
    from cospadi.kernels.sparse_product import dense_product

    return dense_product(dense_product(rows.float(), left), right).to(rows.dtype)


def _many_through_rank(rows: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return rows @ left.to(rows.dtype) @ right.to(rows.dtype)


class SparseDictionaryLinear(CompressedLinear):
    """``y = x [I D] S + b``: learned atoms ``D`` in 16 bits, ``S`` as values and one bit per coefficient.

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
    ) -> None:
        super().__init__(d_in, d_out, bias, dtype)
        storage = _storage(storage_dtype)
        if fixed_atoms not in (NONE, IDENTITY) or value_bits not in (14, 16):
            raise ValueError(f"fixed_atoms={fixed_atoms}, value_bits={value_bits}")
        self.fixed_atoms, self.value_bits, self.n_values = fixed_atoms, value_bits, n_values
        self.n_fixed = d_in if fixed_atoms == IDENTITY else 0
        self.all_atoms = self.n_fixed + atoms
        self.dictionary = _frozen(torch.empty(d_in, atoms, dtype=storage))
        values = torch.empty(n_values, dtype=storage)
        if value_bits != 16:
            values = torch.empty((n_values * value_bits + 7) // 8, dtype=torch.uint8)
        self.register_buffer("values", values)
        self.register_buffer("mask", torch.empty(mask_bits(self.all_atoms, d_out) // 8, dtype=torch.uint8))
        self._derived: dict[str, Tensor] = {}
        self._derived_from: Any = None

    @property
    def _sizes(self) -> dict[str, Any]:
        return {
            "atoms": self.dictionary.shape[1],
            "n_values": self.n_values,
            "storage_dtype": _name(self.dictionary.dtype),
            "fixed_atoms": self.fixed_atoms,
            "value_bits": self.value_bits,
        }

    def dense_weight(self) -> Float[Tensor, "d_in d_out"]:
        codes = self._codes().float()
        learned = self.dictionary.float() @ codes[:, self.n_fixed :].T
        return learned + codes[:, : self.n_fixed].T if self.n_fixed else learned

    def _few(self, rows: Tensor) -> Tensor:
        return self._few_on_gpu(rows) if rows.is_cuda else self._few_on_cpu(rows)

    def _few_on_gpu(self, rows: Tensor) -> Tensor:
        from cospadi.kernels.triton_product import sparse_product

        projected = self._beside_fixed(rows, rows @ self.dictionary.to(rows.dtype))
        return sparse_product(projected, self.mask, self._values(), self._offsets(), self.out_features)

    def _few_on_cpu(self, rows: Tensor) -> Tensor:
        from cospadi.kernels.sparse_product import dense_product, sparse_product

        rows, dtype = rows.float(), rows.dtype
        projected = self._beside_fixed(rows, dense_product(rows, self.dictionary))
        return sparse_product(projected, self.mask, self._values(), self._offsets()).to(dtype)

    def _many(self, rows: Tensor) -> Tensor:
        """Through the atoms, or through the weight multiplied out: whichever takes fewer operations."""
        codes = self._codes().to(rows.dtype)
        dictionary = self.dictionary.to(rows.dtype)
        (d_in, atoms), d_out = dictionary.shape, self.out_features
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
        if self.mask.device.type == "cpu":
            from cospadi.kernels.sparse_product import unpack

            return unpack(self.mask, self._values(), self._offsets(), self.all_atoms)
        if self.mask.is_cuda:
            from cospadi.kernels import triton_product

            sizes = self.out_features, self.all_atoms
            return triton_product.unpack(self.mask, self._values(), self._offsets(), *sizes)
        shifts = torch.arange(8, device=self.mask.device, dtype=torch.uint8)
        bits = (self.mask[:, None] >> shifts & 1).flatten()[: self.out_features * self.all_atoms]
        codes = torch.zeros(len(bits), dtype=self.dictionary.dtype, device=self.mask.device)
        return codes.masked_scatter_(bits.bool(), self._values()).view(self.out_features, self.all_atoms)

    def _values(self) -> Tensor:
        """The values, 16 bits each."""
        if self.value_bits == 16:
            return self.values
        return self._once(
            "values",
            lambda: unpack_bits(self.values.cpu(), self.value_bits, self.n_values).view(self.dictionary.dtype),
        )

    def check(self) -> None:
        self._offsets()

    def _offsets(self) -> Tensor:
        """Where the values of each output begin: counted once, from the mask."""
        from cospadi.kernels.sparse_product import offsets

        def count() -> Tensor:
            found = offsets(self.mask.cpu(), self.out_features, self.all_atoms)
            if int(found[-1]) != self.n_values:  # the kernels read where the mask tells them to
                raise UserError(
                    f"A mask has {int(found[-1])} bits set for {self.n_values} values. Get the checkpoint again."
                )
            return found

        return self._once("offsets", count)

    def _once(self, name: str, make: Any) -> Tensor:
        """Derived tensors belong to the mask and values as they are: changed, or on another device, they are made anew."""
        key = tuple((t.data_ptr(), str(t.device), _version(t)) for t in (self.mask, self.values))
        if self._derived_from != key:
            self._derived, self._derived_from = {}, key
        if name not in self._derived:
            self._derived[name] = make().to(self.mask.device)
        return self._derived[name]


class SparsePlusLowRankLinear(SparseDictionaryLinear):
    """``y = x S + (x L) R + b``: sparse ``S`` as coefficients of the identity, ``L`` and ``R`` in 16 bits beside it."""

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
    ) -> None:
        super().__init__(d_in, d_out, 0, n_values, storage_dtype, IDENTITY, bias=bias, dtype=dtype)
        self.left = _frozen(torch.empty(d_in, rank, dtype=self.dictionary.dtype))
        self.right = _frozen(torch.empty(rank, d_out, dtype=self.dictionary.dtype))

    @property
    def _sizes(self) -> dict[str, Any]:
        return {"rank": len(self.right), "n_values": self.n_values, "storage_dtype": _name(self.left.dtype)}

    def dense_weight(self) -> Float[Tensor, "d_in d_out"]:
        return super().dense_weight() + self.left.float() @ self.right.float()

    def _few(self, rows: Tensor) -> Tensor:
        return super()._few(rows) + _few_through_rank(rows, self.left, self.right)

    def _many(self, rows: Tensor) -> Tensor:
        return super()._many(rows) + _many_through_rank(rows, self.left, self.right)


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


KINDS: dict[str, type[CompressedLinear]] = {
    c.kind: c for c in (LowRankLinear, SparseDictionaryLinear, SparsePlusLowRankLinear)
}


def empty_layer(spec: Mapping[str, Any], dtype: torch.dtype | None = None) -> CompressedLinear:
    """The layer that a checkpoint's config describes, its tensors not filled; ``dtype`` is that of a bias.

    Raises:
        KeyError, TypeError: when the description is not one of `CompressedLinear.spec`.
    """
    arguments = {key: value for key, value in spec.items() if key != SHARES}
    return KINDS[arguments.pop("kind")](**arguments, dtype=dtype)


def layer_of(factors: Factors, bias: Tensor | None = None) -> CompressedLinear:
    """The layer that computes with ``factors``.

    Raises:
        TypeError: for a projection that was left dense, which stays an ordinary layer.
    """
    tensors = factors.tensors()
    if isinstance(factors, LowRank):
        (d_in, rank), d_out = factors.left.shape, factors.right.shape[1]
        sizes = {"kind": factors.kind, "d_in": d_in, "d_out": d_out, "rank": rank}
        sizes["storage_dtype"] = _name(factors.left.dtype)
    elif isinstance(factors, SparseDictionary):
        (d_in, atoms), d_out = factors.dictionary.shape, factors.coefficients.shape[1]
        sizes = {"kind": factors.kind, "d_in": d_in, "d_out": d_out, "atoms": atoms}
        sizes |= {"n_values": int((factors.coefficients != 0).sum()), "value_bits": factors.value_bits}
        sizes |= {
            "storage_dtype": _name(factors.dictionary.dtype),
            "fixed_atoms": IDENTITY if factors.identity else NONE,
        }
    elif isinstance(factors, SparsePlusLowRank):
        d_in, d_out = factors.sparse.coefficients.shape
        sizes = {"kind": factors.kind, "d_in": d_in, "d_out": d_out, "rank": factors.low_rank.left.shape[1]}
        sizes |= {"n_values": int((factors.sparse.coefficients != 0).sum())}
        sizes["storage_dtype"] = _name(factors.low_rank.left.dtype)
    else:
        raise TypeError(f"A {type(factors).__name__} projection has no compressed layer.")
    layer = empty_layer(sizes | {"bias": bias is not None}, bias.dtype if bias is not None else None)
    layer.load_state_dict(tensors | ({"bias": bias} if bias is not None else {}))
    return layer


def specs(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Path -> `CompressedLinear.spec` of every compressed layer, with `SHARES` where an earlier one has its shared part."""
    found: dict[str, dict[str, Any]] = {}
    first: dict[int, str] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, CompressedLinear):
            shared = layer if layer.shared_part is None else getattr(layer, layer.shared_part)
            owner = first.setdefault(id(shared), name)
            found[name] = layer.spec | ({SHARES: owner} if owner != name else {})
    return found


def ties(modules: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Parameter -> the parameter that it is the same as, of the layers that a checkpoint describes.

    Raises:
        UserError: when one shares what no layer stores, or what has another size.
    """
    found = {}
    for name, spec in modules.items():
        if SHARES not in spec:
            continue
        owner = modules.get(spec[SHARES], {SHARES: None})
        part = KINDS[spec["kind"]].shared_part
        if part is None or SHARES in owner or _shared_size(owner) != _shared_size(spec):
            raise UserError(
                f"The checkpoint's config.json says that {name} shares with {spec[SHARES]}, which does not store what it "
                "needs. Get the checkpoint again."
            )
        found[f"{name}.{part}"] = f"{spec[SHARES]}.{part}"
    return found


def _shared_size(spec: Mapping[str, Any]) -> tuple[Any, ...]:
    with torch.device("meta"):
        layer = empty_layer(spec)
    shared = getattr(layer, layer.shared_part) if layer.shared_part else torch.empty(0)
    return layer.kind, shared.shape, shared.dtype


def _frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter rather than a buffer, so that layers may share it; it is not trained."""
    return nn.Parameter(tensor, requires_grad=False)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
