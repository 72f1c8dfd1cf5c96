"""One dictionary for several weights, each under its own gram: hard-thresholding pursuit from the mean gram's solution.

All works in the coordinates of the mean gram ``R̄ᵀR̄ = Σ_l R_lᵀR_l / g``: the dictionary is ``D = R̄⁻¹E``, member ``l`` sees
``A_l E`` with the map ``A_l = R_l R̄⁻¹``. Since ``Σ_l A_lᵀA_l = g·I``, the problem is well-conditioned however far the grams
are from being so, which float32 needs and conjugate gradients like.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cospadi.factorization.solvers.htp import Pursuit, has_stalled, htp_batch, norms_of, product, times_inverse
from cospadi.factorization.solvers.solution import Solution
from cospadi.factorization.solvers.sparse_coding import require_finite
from cospadi.factorization.solvers.whitening import unwhiten
from cospadi.kernels.precision import float32_products


@torch.no_grad()
def shared_htp(
    targets: Float[Tensor, "g d_in d_out"],
    whiteners: Float[Tensor, "g d_in d_in"],
    atoms: int,
    sparsity: int | float,
    *,
    balanced: bool = True,
    identity: bool = False,
    fixed_codes: Float[Tensor, "g d_out d_in"] | None = None,
    own_rounds: int = 16,
    step: float = 1.3,
    relaxation: float = 0.3,
    cg_steps: int = 2,
    tolerance: float = 2e-4,
    final_cg_steps: int = 4,
    dictionary_steps: int = 3,
    final_dictionary_steps: int = 12,
    **settings: Any,
) -> Solution:
    """Minimise ``Σ_l ‖R_l(W_l − D S_l)‖_F² / ‖R_l W_l‖_F²`` over one ``D`` and every ``S_l``, ``sparsity`` non-zeros per column.

    Starts from what `htp_batch` makes of all weights side by side under the mean gram, the paper's stand-in for this
    problem (arXiv:2509.22075, eq. 30, here of weights that count alike). Every round then codes each member over its own
    atoms ``R_l D``, made unit, where a column keeps its old code if the new one is no better, and solves
    ``Σ_l G_l D M_l = Σ_l G_l W_l S_lᵀ`` with ``M_l = S_l S_lᵀ``, ``G_l = R_lᵀR_l`` (`shared_dictionary`), gone past by
    ``relaxation`` of the way. Both lower the error or leave it, so the result is never worse than the start (if ``balanced``). From the
    eigenbasis rather than from there, the same rounds end at a far higher error: atoms that are orthonormal under the mean
    gram are not under any member's, and a few conjugate-gradient steps do not make up for it.

    GeoPair (2026) solves the same system for pairs, as a generalised Sylvester equation.

    Args:
        targets: the whitened weights ``R_l W_l``, not scaled otherwise than the whiteners; the precision in which rounds are
            computed.
        whiteners: ``R_l``, upper-triangular.
        atoms: learned atoms; 0 with ``identity`` codes over the identity alone.
        sparsity: non-zeros allowed in a column of the coefficients.
        identity: ``W_l ≈ [I D] S_l``: the inputs themselves are atoms that cost nothing.
        fixed_codes: with ``identity``, coefficients to start from, not sparse: ``W_lᵀ``.
        own_rounds: rounds under the members' own grams, after a first coding.
        step: step of the ranking in these rounds.
        relaxation: as in `htp_batch`, for the start and for the own rounds; so are the next three.
        cg_steps: see there.
        tolerance: see there.
        final_cg_steps: see there.
        dictionary_steps: conjugate-gradient steps on the dictionary in a round, from the previous one.
        final_dictionary_steps: conjugate-gradient steps on the last dictionary.
        settings: others of `htp_batch`, for the start.

    Returns:
        The dictionary in input space; the coefficients of all members side by side, those of the identity first, if any;
        ``(Σ_l ‖R_l(W_l − Ŵ_l)‖² / ‖R_l W_l‖² / g)^½`` after the coding of every own round, and last of what is returned.

    Raises:
        UserError: an input is not finite, or a count is below 1 (``atoms`` with ``identity``: below 0).
    """
    require_finite("target", targets)
    require_finite("whitener", whiteners)
    dtype = targets.dtype
    members = len(targets)

    # Every member is divided by the size of its target: all count alike, and entries are near 1.
    scales = targets.double().square().mean(dim=(1, 2), keepdim=True).sqrt()
    scales = torch.where(scales > 0, scales, 1.0)
    targets = targets.double() / scales
    whiteners = whiteners.double() / scales

    # The start: all weights side by side under the mean gram, as one target R̄ [W_1 … W_g].
    mean = mean_whitener(whiteners)
    maps = torch.linalg.solve_triangular(mean.expand_as(whiteners), whiteners, upper=True, left=False)
    under_mean = torch.linalg.solve_triangular(maps, targets, upper=True)
    coding = {"balanced": balanced, "relaxation": relaxation, "cg_steps": cg_steps}
    if identity:
        coding |= {"fixed": mean[None].to(dtype)}
    if fixed_codes is not None:
        coding |= {"fixed_codes": fixed_codes.flatten(end_dim=1)[None]}
    side_by_side = torch.cat(list(under_mean), dim=1)[None].to(dtype)
    stopping = {"tolerance": tolerance, "final_cg_steps": final_cg_steps}
    (start,) = htp_batch(side_by_side, atoms, sparsity, **coding, **stopping, **settings)

    # From here on every member codes over its own view of the atoms, made unit: the codes take the lengths.
    maps = maps.to(dtype)
    targets = targets.to(dtype)
    pursuit = Pursuit(targets, whiteners.to(dtype) if identity else None, balanced)
    learned = start.dictionary
    codes = torch.stack(start.coefficients.chunk(members, dim=1)).mT.contiguous()
    codes[..., : pursuit.n_fixed] *= pursuit.fixed_norms
    codes[..., pursuit.n_fixed :] *= _seen(maps, learned)[1]

    # Codes of every member, then the one dictionary that is best for all of them together.
    best = _Best(learned, codes)
    errors: list[float] = []
    with float32_products(exact=False):
        for done in range(own_rounds + 1):
            seen, lengths = _seen(maps, learned)
            errors.append(_together(pursuit.code(seen, codes, step, sparsity, cg_steps, keep_better=balanced)))
            best.take(errors[-1], learned, codes)
            if done == own_rounds or has_stalled(errors, tolerance):
                break
            learned = _update(pursuit, maps, learned, codes, lengths, 1 + relaxation, dictionary_steps)
    with float32_products(exact=True):
        # Errors that TF32 computed are not exact enough to be reported: one coding more, in float32.
        if targets.is_cuda and dtype == torch.float32:
            learned = best.learned
            codes = best.codes
            error = pursuit.code(_seen(maps, learned)[0], codes, step, sparsity, cg_steps, keep_better=balanced)
            best = _Best(learned, codes)
            best.take(_together(error), learned, codes)
        learned, codes, error = _refine(pursuit, maps, best, final_dictionary_steps, final_cg_steps)
    # Back to atoms of the inputs: D = R̄⁻¹ E, and codes over them instead of over unit views.
    coefficients = codes.double()
    coefficients[..., : pursuit.n_fixed] /= pursuit.fixed_norms
    coefficients[..., pursuit.n_fixed :] /= _seen(maps, learned)[1]
    of_members = coefficients.mT.to(dtype)
    return Solution(unwhiten(mean, learned).to(dtype), torch.cat(list(of_members), dim=1), [*errors, error])


def mean_whitener(whiteners: Float[Tensor, "g d_in d_in"]) -> Float[Tensor, "d_in d_in"]:
    """Upper-triangular ``R̄`` with ``R̄ᵀR̄ = Σ_l R_lᵀR_l / g``, by a QR decomposition: no gram is formed, no precision lost."""
    stacked = whiteners.double().flatten(end_dim=1) / len(whiteners) ** 0.5
    factor = torch.linalg.qr(stacked, mode="r").R
    return factor * torch.where(factor.diagonal() < 0, -1.0, 1.0)[:, None]


def shared_dictionary(
    maps: Float[Tensor, "g d_in d_in"],
    cross: Float[Tensor, "g d_in atoms"],
    moments: Float[Tensor, "g atoms atoms"],
    dictionary: Float[Tensor, "d_in atoms"],
    steps: int,
) -> Float[Tensor, "d_in atoms"]:
    """``argmin_E Σ_l ‖Y_l − A_l E S_l‖_F²``: the solution of ``Σ_l A_lᵀA_l E M_l = Σ_l A_lᵀP_l``, approached from ``dictionary``.

    ``P_l = Y_l S_lᵀ`` and ``M_l = S_l S_lᵀ``. Conjugate gradients on matrices, preconditioned by ``X ↦ X (Σ_l M_l)⁻¹``: the
    exact inverse for one member or equal maps, as ``Σ_l A_lᵀA_l = g·I``. The system would have ``d_in · atoms`` unknowns
    written out (``Σ_l M_l ⊗ A_lᵀA_l``). A ridge relative to the mean diagonal of the moments, only there for solvability,
    pulls towards ``dictionary``; where they are singular all the same, ``dictionary`` stays.
    """
    together = moments.sum(dim=0)
    ridge = 10 * torch.finfo(moments.dtype).eps * len(together) * together.diagonal().mean()
    together.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(together)

    def image(change: Tensor) -> Tensor:
        """``Σ_l A_lᵀA_l X M_l``, the ridge included."""
        parts = [a.mT @ (a @ change @ m) for a, m in zip(maps, moments, strict=True)]
        return torch.stack(parts).sum(dim=0) + ridge * change

    # Preconditioned conjugate gradients on the change: from zero, so that few steps stay near the old dictionary.
    pulls = [a.mT @ (p - a @ dictionary @ m) for a, p, m in zip(maps, cross, moments, strict=True)]
    residual = torch.stack(pulls).sum(dim=0)
    change = torch.zeros_like(dictionary)
    guess = times_inverse(residual, factor)
    direction = guess
    length = (residual * guess).sum()
    smallest = torch.finfo(moments.dtype).eps ** 2 * length
    for _ in range(0 if failed else steps):
        forward = image(direction)
        curvature = (direction * forward).sum()
        # Decided on the device, so that no step waits for the host: a finished system goes on with steps of 0.
        going = (length > smallest) & (curvature > 0)
        step = torch.where(going, length / curvature, 0.0)
        change = change + step * direction
        residual = residual - step * forward
        guess = times_inverse(residual, factor)
        shorter = (residual * guess).sum()
        direction = guess + torch.where(going, shorter / length, 0.0) * direction
        length = shorter
    return dictionary + change


def _seen(maps: Tensor, learned: Tensor) -> tuple[Tensor, Tensor]:
    """The atoms as each member sees them, ``A_l E``, made unit; and their lengths before."""
    seen = maps @ learned
    lengths = norms_of(seen)
    return seen / lengths, lengths


def _together(errors: Tensor) -> float:
    return float(errors.square().mean().sqrt())


def _update(
    pursuit: Pursuit, maps: Tensor, learned: Tensor, codes: Tensor, lengths: Tensor, way: float, steps: int
) -> Tensor:
    """Atoms moved ``way`` of the way to the best ones for these codes; the codes are scaled to their new lengths."""
    if not learned.shape[1]:
        return learned
    free = codes[..., pursuit.n_fixed :]
    free /= lengths
    moments = product(free.mT, free)
    cross = product(pursuit.targets, free)
    if pursuit.n_fixed:
        cross.baddbmm_(pursuit.fixed, product(codes[..., : pursuit.n_fixed].mT, free), alpha=-1)
    used = (moments.diagonal(dim1=1, dim2=2) > 0).any(dim=0)
    improved = torch.lerp(learned, shared_dictionary(maps, cross, moments, learned, steps), way)
    norms = norms_of(improved[None])[0]
    learned = torch.where(used, improved / norms, learned)
    free *= torch.where(used, norms, 1.0) * _seen(maps, learned)[1]
    return learned


def _refine(
    pursuit: Pursuit, maps: Tensor, best: _Best, dictionary_steps: int, cg_steps: int
) -> tuple[Tensor, Tensor, float]:
    """The best round, its dictionary fitted to its codes and its least squares continued; supports stay."""
    codes = best.codes.clone()
    before, lengths = _seen(maps, best.learned)
    learned = _update(pursuit, maps, best.learned, codes, lengths, 1.0, dictionary_steps)
    after, _ = _seen(maps, learned)
    squared = pursuit.polish(after, codes, before, best.codes, cg_steps)
    errors, errors_before = (_together(pursuit.relative(s)) for s in squared)
    if errors > errors_before:  # by rounding: the round stays as it was
        return best.learned, best.codes, errors_before
    return learned, codes, errors


class _Best:
    """The best round so far."""

    def __init__(self, learned: Tensor, codes: Tensor) -> None:
        self.error = torch.inf
        self.learned = learned
        self.codes = codes.clone()

    def take(self, error: float, learned: Tensor, codes: Tensor) -> None:
        if error <= self.error:  # of equal rounds the last one
            self.error = error
            self.learned = learned
            self.codes.copy_(codes)
