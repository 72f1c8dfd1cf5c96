"""Descriptions of compressed layers: what a checkpoint's config says, and the layers built from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cospadi.checkpoint.layers import (
    SHARES,
    LowRankLinear,
    QuantizedLinear,
    SparseDictionaryLinear,
    SparsePlusLowRankLinear,
)
from cospadi.checkpoint.linear import CompressedLinear, dtype_name
from cospadi.errors import UserError
from cospadi.factorization.factors import Factors, LowRank, SparseDictionary, SparsePlusLowRank
from cospadi.factorization.settings import IDENTITY, NO_FIXED_ATOMS

LAYER_KINDS: dict[str, type[CompressedLinear]] = {
    c.kind: c for c in (LowRankLinear, SparseDictionaryLinear, SparsePlusLowRankLinear, QuantizedLinear)
}


def empty_layer(spec: Mapping[str, Any], dtype: torch.dtype | None = None) -> CompressedLinear:
    """The layer that a checkpoint's config describes, its tensors not filled; ``dtype`` is that of a bias.

    Raises:
        KeyError, TypeError: when the description is not one of `CompressedLinear.spec`.
    """
    arguments = {key: value for key, value in spec.items() if key != SHARES}
    return LAYER_KINDS[arguments.pop("kind")](**arguments, dtype=dtype)


def layer_of(factors: Factors, bias: Tensor | None = None) -> CompressedLinear:
    """The layer that computes with ``factors``.

    Raises:
        TypeError: for a projection that was left dense, which stays an ordinary layer.
    """
    tensors = factors.tensors()
    if isinstance(factors, LowRank):
        d_in, rank = factors.left.shape
        d_out = factors.right.shape[1]
        dtype = factors.left.dtype
        sizes: dict[str, Any] = {"rank": rank}
    elif isinstance(factors, SparseDictionary):
        d_in, atoms = factors.dictionary.shape
        d_out = factors.coefficients.shape[1]
        dtype = factors.dictionary.dtype
        sizes = {"atoms": atoms, "n_values": int(factors.mask.sum())}
        sizes |= {"value_bits": factors.value_bits, "fixed_atoms": IDENTITY if factors.identity else NO_FIXED_ATOMS}
    elif isinstance(factors, SparsePlusLowRank):
        d_in, d_out = factors.sparse.coefficients.shape
        _, rank = factors.low_rank.left.shape
        dtype = factors.low_rank.left.dtype
        sizes = {"rank": rank, "n_values": int(factors.sparse.mask.sum())}
    elif factors.formats:
        d_in, d_out = factors.dense.shape
        dtype = factors.dense.dtype
        sizes = {}
    else:
        raise TypeError(f"A {type(factors).__name__} projection in 16 bits has no compressed layer.")
    sizes |= {"kind": factors.kind, "d_in": d_in, "d_out": d_out, "storage_dtype": dtype_name(dtype)}
    sizes |= {"formats": factors.formats} if factors.formats else {}
    layer = empty_layer(sizes | {"bias": bias is not None}, bias.dtype if bias is not None else None)
    layer.load_state_dict(tensors | ({"bias": bias} if bias is not None else {}))
    return layer


def specs(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Path -> `CompressedLinear.spec` of every compressed layer, with `SHARES` where an earlier one has its shared part."""
    specs_of: dict[str, dict[str, Any]] = {}
    first: dict[int, str] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, CompressedLinear):
            shared = layer if layer.shared_part is None else getattr(layer, layer.shared_part)
            owner = first.setdefault(id(shared), name)
            specs_of[name] = layer.spec | ({SHARES: owner} if owner != name else {})
    return specs_of


def ties(modules: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Parameter -> the parameter that it is the same as, of the layers that a checkpoint describes.

    Raises:
        UserError: when one shares what no layer stores, or what has another size.
    """
    of_layers = {}
    for name, spec in modules.items():
        if SHARES not in spec:
            continue
        owner = modules.get(spec[SHARES], {SHARES: None})
        part = LAYER_KINDS[spec["kind"]].shared_part
        if part is None or SHARES in owner or _shared_size(owner) != _shared_size(spec):
            raise UserError(
                f"The checkpoint's config.json says that {name} shares with {spec[SHARES]}, which does not store what it "
                "needs. Get the checkpoint again."
            )
        for tensor in _empty(spec).shared_names:
            of_layers[f"{name}.{tensor}"] = f"{spec[SHARES]}.{tensor}"
    return of_layers


def _empty(spec: Mapping[str, Any]) -> CompressedLinear:
    """The described layer without memory."""
    with torch.device("meta"):
        return empty_layer(spec)


def _shared_size(spec: Mapping[str, Any]) -> tuple[Any, ...]:
    layer = _empty(spec)
    shared = getattr(layer, layer.shared_part) if layer.shared_part else torch.empty(0)
    return layer.kind, shared.shape, shared.dtype, layer.formats.get(layer.shared_part)
