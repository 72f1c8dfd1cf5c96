"""Dictionary learning by hard-thresholding pursuit: nothing but matrix products.

Everything takes a batch of targets of equal shape, which a GPU solves as one. Coefficients are kept transposed,
``codes = coefficientsᵀ (d_out × atoms)``, so that choosing the support of a column runs along contiguous memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cospadi.errors import UserError
from cospadi.factorization.solvers.low_rank import left_singular_vectors
from cospadi.factorization.solvers.solution import Solution
from cospadi.factorization.solvers.sparse_coding import require_finite
from cospadi.kernels import selection
from cospadi.kernels.precision import float32_products

CPU_ROWS = 192
"""Rows of codes worked on at once on a CPU: what a round computes between two products stays in its cache."""
RIDGE = 0.03
"""Of unit atoms, in the inverse that preconditions conjugate gradients: supports change, and it is of all atoms."""
PRECONDITIONED = 8
"""Products from which preconditioned steps gain: three of them leave learned atoms behind (docs/solver-log.md)."""
GPU_BYTES = 4 * 2**30
"""Memory on a GPU for the same: a constant, so that results do not depend on what else is in it."""


def htp(target: Float[Tensor, "d_in d_out"], atoms: int, sparsity: int | float, **settings: Any) -> Solution:
    """`htp_batch` for one target; ``fixed``, ``fixed_codes`` and ``start`` have no batch dimension."""
    for name in ("fixed", "fixed_codes", "start"):
        if settings.get(name) is not None:
            settings[name] = settings[name][None]
    return htp_batch(target[None], atoms, sparsity, **settings)[0]


@torch.no_grad()
def htp_batch(
    targets: Float[Tensor, "batch d_in d_out"],
    atoms: int,
    sparsity: int | float,
    *,
    balanced: bool = True,
    n_rounds: int = 24,
    first_step: float = 2.8,
    last_step: float = 1.3,
    relaxation: float = 0.3,
    cg_steps: int = 2,
    tolerance: float = 2e-4,
    final_cg_steps: int = 4,
    fixed: Float[Tensor, "batch d_in n_fixed"] | None = None,
    fixed_codes: Float[Tensor, "batch d_out n_fixed"] | None = None,
    start: Float[Tensor, "batch d_in atoms"] | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> list[Solution]:
    """Minimise ``‖Y − [F D] S‖_F`` over ``D`` and ``S`` with at most ``sparsity`` non-zeros per column of ``S``.

    Not ``balanced``, columns have that many on average: a value stands wherever in the matrix it helps most.

    A round is a gradient step ``S + step · [F D]ᵀ(Y − [F D] S)``, the ``sparsity`` largest per column, least squares on
    that support by ``cg_steps`` conjugate-gradient steps (hard thresholding pursuit: Foucart 2011,
    doi:10.1137/100806278), and the closed-form dictionary ``(Y − F S_F) S_Dᵀ (S_D S_Dᵀ)⁻¹`` (MOD: Engan 1999), gone past
    by ``relaxation`` of the way. The step only ranks candidates for the support, so it may be longer than a descent step:
    beyond 1 it favours atoms that are not in use yet, which loses a little at first and ends at a far lower error. It
    goes down from ``first_step`` to ``last_step`` as the rounds pass. The best round is kept, its dictionary fitted once
    more and its least squares continued.

    On a GPU the products of all rounds but one last coding run in TF32; that one, the last dictionary and least squares and
    the error that is returned are in full precision, as everything is on a CPU (`float32_products`).

    Args:
        targets: float32 or float64, the whitened weights ``R W``, scaled to entries near 1.
        atoms: learned atoms of a target; 0 with ``fixed`` codes over the fixed atoms alone.
        sparsity: non-zeros allowed in a column of the coefficients; a mean, and so any number, where not ``balanced``.
        balanced: every column has the same number of non-zeros.
        n_rounds: rounds after the first coding. From half of them on, a target is done when its last two rounds together
            gained less than twice ``tolerance`` of its error.
        first_step: step of the ranking in the first round, for atoms of unit length.
        last_step: step of the ranking in the last round.
        relaxation: fraction by which the dictionary is moved past its optimum.
        cg_steps: products with the gram in a round's least squares. That many conjugate-gradient steps; atoms of very different
            length need no more, for they are made unit inside (which is Jacobi preconditioning). Learned atoms beside
            fixed ones, from `PRECONDITIONED` on: half as many steps, each with a product for the step and one with
            `Pursuit.inverse`.
        final_cg_steps: conjugate-gradient steps of the last least squares.
        fixed: atoms that are used but not changed, such as the whitener for identity atoms. Alone, without learned
            ones, a column keeps its old support where a new one does not lower its error (if ``balanced``).
        fixed_codes: coefficients over ``fixed`` to start from, not sparse: such as the weight itself.
        start: dictionary to start from; by default `first_atoms` of the target, or of what a code over the fixed atoms
            leaves over.
        progress: called as ``progress(rounds_done, error)`` after each coding, with the largest error of the batch.

    Raises:
        UserError: an input is not finite, or a count is below 1 (``atoms``: below 0).
    """
    inputs = {"target": targets, "fixed": fixed, "fixed_codes": fixed_codes, "start": start}
    for name, tensor in inputs.items():
        if tensor is not None:
            require_finite(name, tensor)
    if atoms < (0 if fixed is not None else 1) or sparsity < 1 or n_rounds < 0:
        raise UserError(f"htp needs at least one atom and one non-zero, not atoms={atoms}, sparsity={sparsity}.")
    pursuit = Pursuit(targets, fixed, balanced)
    codes = pursuit.first_codes(fixed_codes, atoms)

    # Learned atoms start where the fixed ones leave most, or where the eigenbasis of the target is.
    with float32_products(exact=True):
        if start is None:
            dictionary = first_atoms(pursuit.left_by_fixed_atoms(codes, sparsity, cg_steps), atoms, sparsity)
        else:
            dictionary = start.clone()

    # Codes for the dictionary, then the dictionary for the codes. A long step looks for other supports, a short one
    # settles them, so the step shrinks as the rounds pass.
    best = _Best(dictionary, codes)
    errors: list[list[float]] = []
    with float32_products(exact=False):
        for done in range(n_rounds + 1):
            step = first_step + (last_step - first_step) * done / max(n_rounds, 1)
            # Without learned atoms the problem does not change from round to round, and no column may get worse.
            keep_better = balanced and atoms == 0 and done > 0
            error = pursuit.code(dictionary, codes, step, sparsity, cg_steps, keep_better)
            best.take(error, dictionary, codes)
            errors.append(error.tolist())
            if progress is not None:
                progress(done, max(errors[-1]))
            # In the first half long steps may raise the error for a while: only after it does a stall mean the end.
            if 2 * done >= n_rounds:
                best.stop([has_stalled([e[i] for e in errors], tolerance) for i in range(len(targets))])
            if done == n_rounds or best.all_stopped:
                break
            dictionary = pursuit.update(dictionary, codes, 1 + relaxation)

    with float32_products(exact=True):
        # Errors that TF32 computed are not exact enough to be reported: one coding more, in float32.
        if targets.is_cuda and targets.dtype == torch.float32:
            dictionary = best.dictionary
            codes = best.codes
            best = _Best(dictionary, codes)
            best.take(pursuit.code(dictionary, codes, last_step, sparsity, cg_steps), dictionary, codes)
        del dictionary, codes  # the best ones are kept, and memory is short on a GPU
        refined = pursuit.refine(best, final_cg_steps)
    return [
        Solution(dictionary, codes.mT, [*(e[i] for e in errors), error])
        for i, (dictionary, codes, error) in enumerate(zip(*refined, strict=True))
    ]


class Pursuit:
    """The targets ``Y``, the fixed atoms made unit, and the steps of a round."""

    def __init__(self, targets: Tensor, fixed: Tensor | None, balanced: bool = True) -> None:
        self.targets = targets
        self.balanced = balanced
        self.energies = targets.square().sum(dim=1)
        """``‖y‖²`` of every column."""
        # Unit atoms precondition the conjugate gradients; the codes are scaled back at the end.
        self.fixed = targets.new_zeros(*targets.shape[:2], 0) if fixed is None else fixed
        self.fixed_norms = norms_of(self.fixed)
        if fixed is not None:
            self.fixed = fixed / self.fixed_norms
        self.n_fixed = self.fixed.shape[2]

    @cached_property
    def gram_of_fixed(self) -> Tensor:
        """``FᵀF``, in full precision on a GPU, too: every round takes this one."""
        with float32_products(exact=True):
            return product(self.fixed.mT, self.fixed)

    @cached_property
    def correlations_of_fixed(self) -> Tensor:
        """``YᵀF``, likewise."""
        with float32_products(exact=True):
            pieces = [product(self.targets[:, :, rows].mT, self.fixed) for rows in self._rows(self.n_fixed)]
        return torch.cat(pieces, dim=1)

    @cached_property
    def inverse_of_fixed(self) -> Tensor:
        """``(FᵀF + RIDGE · I)⁻¹``"""
        ridged = self.gram_of_fixed.double()
        ridged.diagonal(dim1=1, dim2=2).add_(RIDGE)
        return torch.cholesky_inverse(torch.linalg.cholesky(ridged)).to(self.targets)

    def inverse(self, gram: Tensor) -> Tensor:
        """``([F D]ᵀ[F D] + RIDGE · I)⁻¹`` from its gram, by the Schur complement of the fixed atoms: few are learned.

        Beside identity atoms learned ones are nearly dependent on many others, which is what conjugate gradients are slow
        at. On the support of a column it is not the inverse, but nearer to it than the identity is.
        """
        mixed = gram[:, : self.n_fixed, self.n_fixed :]
        own = gram[:, self.n_fixed :, self.n_fixed :].clone()
        own.diagonal(dim1=1, dim2=2).add_(RIDGE)
        explained = product(self.inverse_of_fixed, mixed)
        corner = torch.linalg.inv(own - product(mixed.mT, explained))
        side = product(explained, corner)
        joint = torch.empty_like(gram)
        joint[:, : self.n_fixed, : self.n_fixed] = torch.baddbmm(self.inverse_of_fixed, side, explained.mT)
        joint[:, : self.n_fixed, self.n_fixed :] = -side
        joint[:, self.n_fixed :, : self.n_fixed] = -side.mT
        joint[:, self.n_fixed :, self.n_fixed :] = corner
        return joint

    def first_codes(self, fixed_codes: Tensor | None, atoms: int) -> Tensor:
        batch, _, d_out = self.targets.shape
        codes = self.targets.new_zeros(batch, d_out, self.n_fixed + atoms)
        if fixed_codes is not None:
            codes[..., : self.n_fixed] = fixed_codes * self.fixed_norms
        return codes

    def left_by_fixed_atoms(self, codes: Tensor, sparsity: int | float, cg_steps: int) -> Tensor:
        """What a sparse code over the fixed atoms alone leaves of the targets."""
        if not self.n_fixed or codes.shape[2] == self.n_fixed:
            return self.targets
        codes = codes[..., : self.n_fixed].clone()
        no_atoms = self.fixed[..., :0]
        self.code(no_atoms, codes, 1.0, sparsity, 2 * cg_steps)
        return self.targets - self.fixed @ codes.mT

    def code(
        self,
        dictionary: Tensor,
        codes: Tensor,
        step: float,
        sparsity: int | float,
        cg_steps: int,
        keep_better: bool = False,
    ) -> Tensor:
        """One round of coding, in place; the relative error of every target."""
        gram = self._gram(dictionary)
        is_worth_it = 0 < self.n_fixed < gram.shape[2] and cg_steps >= PRECONDITIONED
        inverse = self.inverse(gram) if is_worth_it else None
        steps = cg_steps if inverse is None else cg_steps // 2
        explained = torch.zeros_like(self.energies[:, 0], dtype=torch.float64)
        for rows, correlations, gradient, support in self._supports(dictionary, gram, codes, step, sparsity):
            old = codes[:, rows]
            new, residual = least_squares(gram, gradient, old, support, steps, inverse)
            # ‖y − Ds‖² = ‖y‖² − sᵀ(Dᵀy + r) with r = Dᵀ(y − Ds), so the error needs no further product.
            gain = (new * residual.add_(correlations)).sum(dim=2)
            # The same for the old codes, on their old support: a column keeps whichever explains more.
            if keep_better:
                before = (old * gradient.add_(correlations)).sum(dim=2)
                new = torch.where((gain > before)[..., None], new, old)
                gain = torch.maximum(gain, before)
            codes[:, rows] = new
            explained += gain.sum(dim=1, dtype=torch.float64)
        return self.relative(self.energies.sum(dim=1, dtype=torch.float64) - explained)

    def _supports(
        self, dictionary: Tensor, gram: Tensor, codes: Tensor, step: float, sparsity: int | float
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Rows of codes, ``[F D]ᵀY`` and the gradient there, and the support that a step along the gradient leads to."""

        def piece(rows: slice) -> tuple[Tensor, Tensor]:
            correlations = self._correlations(dictionary, rows)
            return correlations, torch.baddbmm(correlations, codes[:, rows], gram, alpha=-1)

        # As many non-zeros in every column: a piece of the rows needs to know nothing of the others.
        pieces = list(self._rows(gram.shape[2]))
        if self.balanced:
            for rows in pieces:
                correlations, gradient = piece(rows)
                candidates = torch.add(codes[:, rows], gradient, alpha=step)
                yield rows, correlations, gradient, largest(candidates, int(sparsity))
            return

        # Wherever they help most: no column's support is known before the candidates of all columns are.
        computed = [piece(rows) for rows in pieces]
        candidates = torch.cat([gradient for _, gradient in computed], dim=1).mul_(step).add_(codes)
        count = int(sparsity * codes.shape[1] + 1e-6)  # the mean of a whole number may lie just below it
        support = largest(candidates.flatten(1), count).view_as(codes)
        del candidates
        for rows, (correlations, gradient) in zip(pieces, computed, strict=True):
            yield rows, correlations, gradient, support[:, rows]

    def update(self, dictionary: Tensor, codes: Tensor, way: float) -> Tensor:
        """The dictionary moved ``way`` of the way to the best one for these codes; codes are scaled in place."""
        if not dictionary.shape[2]:
            return dictionary
        learned = codes[..., self.n_fixed :]
        # (Y − F S_F) S_Dᵀ and S_D S_Dᵀ: the normal equations of the learned atoms, the fixed ones' share taken off.
        moments = product(codes.mT, learned)
        cross = product(self.targets, learned)
        if self.n_fixed:
            cross.baddbmm_(self.fixed, moments[:, : self.n_fixed], alpha=-1)
            moments = moments[:, self.n_fixed :]

        # Past the optimum: alternating least squares creeps along valleys, and over-relaxation shortens the way.
        used = (moments.diagonal(dim1=1, dim2=2) > 0)[:, None]
        improved = best_dictionary(cross, moments, dictionary)
        improved = torch.lerp(dictionary, improved, way, out=improved)

        # Atoms become unit again, and their codes take the lengths. What no column uses stays as it is.
        lengths = torch.where(used, norms_of(improved), 1.0)
        learned *= lengths
        return torch.where(used, improved.div_(lengths), dictionary, out=improved)

    def refine(self, best: _Best, cg_steps: int) -> tuple[Tensor, Tensor, list[float]]:
        """The best round, its dictionary fitted to its codes and its least squares continued; supports stay."""
        codes = best.codes.clone()
        dictionary = self.update(best.dictionary, codes, 1.0)
        squared, squared_before = self.polish(dictionary, codes, best.dictionary, best.codes, cg_steps)
        # Both steps can only lower the error, but for rounding: where they did not, the round stays as it was.
        worse = (squared > squared_before)[:, None, None]
        torch.where(worse, best.dictionary, dictionary, out=dictionary)
        torch.where(worse, best.codes, codes, out=codes)
        codes[..., : self.n_fixed] /= self.fixed_norms
        return dictionary, codes, self.relative(torch.minimum(squared, squared_before)).tolist()

    def polish(
        self, dictionary: Tensor, codes: Tensor, dictionary_before: Tensor, codes_before: Tensor, cg_steps: int
    ) -> tuple[Tensor, Tensor]:
        """Least squares of ``codes`` on their supports, in place; squared errors with them, and of what was before."""
        joint = self._joint(dictionary)
        before = self._joint(dictionary_before)
        gram = product(joint.mT, joint)
        squared, squared_before = torch.zeros(2, len(codes), dtype=torch.float64, device=codes.device)
        for rows in self._rows(joint.shape[2]):
            old = codes[:, rows]
            columns = self.targets[:, :, rows].mT
            gradient = torch.baddbmm(product(columns, joint), old, gram, alpha=-1)
            codes[:, rows], _ = least_squares(gram, gradient, old, (old != 0).to(old), cg_steps)
            # The error that is returned is computed from the residual itself, not by the shortcut of the rounds.
            squared += _squared(columns - product(codes[:, rows], joint.mT))
            squared_before += _squared(columns - product(codes_before[:, rows], before.mT))
        return squared, squared_before

    def _gram(self, dictionary: Tensor) -> Tensor:
        """``[F D]ᵀ[F D]``; what belongs to the fixed atoms alone is multiplied once."""
        if not dictionary.shape[2]:
            return self.gram_of_fixed
        own = product(dictionary.mT, dictionary)
        if not self.n_fixed:
            return own
        mixed = product(self.fixed.mT, dictionary)
        above = torch.cat([self.gram_of_fixed, mixed], dim=2)
        return torch.cat([above, torch.cat([mixed.mT, own], dim=2)], dim=1)

    def _correlations(self, dictionary: Tensor, rows: slice) -> Tensor:
        """``Yᵀ[F D]`` of some columns of ``Y``, likewise."""
        if not dictionary.shape[2]:
            return self.correlations_of_fixed[:, rows]
        own = product(self.targets[:, :, rows].mT, dictionary)
        return torch.cat([self.correlations_of_fixed[:, rows], own], dim=2) if self.n_fixed else own

    def _joint(self, dictionary: Tensor) -> Tensor:
        return torch.cat([self.fixed, dictionary], dim=2) if self.n_fixed else dictionary

    def _rows(self, atoms: int) -> Iterator[slice]:
        """Slices of ``d_out`` whose intermediates (ten of ``rows × atoms`` at most) fit cache, or stay near the weight's size."""
        batch, d_in, d_out = self.targets.shape
        rows = max(32, min(CPU_ROWS, d_in * d_out // (8 * max(atoms, 1))))
        if self.targets.is_cuda:
            rows = max(32, GPU_BYTES // (10 * batch * max(atoms, 1) * self.targets.element_size()))
        return (slice(first, first + rows) for first in range(0, d_out, rows))

    def relative(self, squared: Tensor) -> Tensor:
        """``‖Y − DS‖_F / ‖Y‖_F`` of every target, from its squared error."""
        energy = self.energies.sum(dim=1, dtype=torch.float64)
        return (squared.clamp_min(0) / torch.where(energy > 0, energy, 1.0)).sqrt()


class _Best:
    """The best round so far of every target. One that has stopped is not changed by later rounds of the others."""

    def __init__(self, dictionary: Tensor, codes: Tensor) -> None:
        self.error = torch.full_like(codes[:, 0, 0], torch.inf, dtype=torch.float64)
        self.stopped = torch.zeros_like(self.error, dtype=torch.bool)
        self.dictionary = dictionary.clone()
        self.codes = codes.clone()

    def take(self, error: Tensor, dictionary: Tensor, codes: Tensor) -> None:
        better = (error <= self.error) & ~self.stopped  # of equal rounds the last one
        self.error = torch.where(better, error, self.error)
        torch.where(better[:, None, None], dictionary, self.dictionary, out=self.dictionary)
        torch.where(better[:, None, None], codes, self.codes, out=self.codes)

    def stop(self, which: Sequence[bool]) -> None:
        self.stopped |= torch.tensor(which, device=self.stopped.device)

    @property
    def all_stopped(self) -> bool:
        return bool(self.stopped.all())


def first_atoms(
    targets: Float[Tensor, "batch d_in d_out"],
    atoms: int,
    sparsity: int | float,
    basis: Float[Tensor, "batch d_in n"] | None = None,
) -> Float[Tensor, "batch d_in atoms"]:
    """The eigenbasis of the target; beyond its size, singular vectors of what a sparse code in it leaves over.

    ``basis`` is the whole eigenbasis, if it has been computed before.
    """
    shortest = min(targets.shape[1:])
    basis = left_singular_vectors(targets, min(atoms, shortest)) if basis is None else basis[..., :atoms]
    while basis.shape[2] < atoms:
        pursuit = Pursuit(targets, None)
        codes = pursuit.first_codes(None, basis.shape[2])
        pursuit.code(basis, codes, 1.0, sparsity, cg_steps=10)
        extra = left_singular_vectors(targets - basis @ codes.mT, min(atoms - basis.shape[2], shortest))
        basis = torch.cat([basis, extra], dim=2)
    return basis


def largest(values: Float[Tensor, "*batch d_out atoms"], sparsity: int) -> Float[Tensor, "*batch d_out atoms"]:
    """1 where the ``sparsity`` largest magnitudes of every row are, 0 elsewhere; all 1 if a row has no more."""
    count = min(sparsity, values.shape[-1])
    if values.device.type == "cpu" and values.numel():
        return selection.keep_largest(values.flatten(end_dim=-2), count).view_as(values)
    chosen = values.abs().topk(count, dim=-1, sorted=False).indices
    return torch.zeros_like(values).scatter_(-1, chosen, 1.0)


def least_squares(
    gram: Float[Tensor, "batch atoms atoms"],
    gradient: Float[Tensor, "batch d_out atoms"],
    codes: Float[Tensor, "batch d_out atoms"],
    support: Float[Tensor, "batch d_out atoms"],
    steps: int,
    inverse: Float[Tensor, "batch atoms atoms"] | None = None,
) -> tuple[Float[Tensor, "batch d_out atoms"], Float[Tensor, "batch d_out atoms"]]:
    """``steps`` conjugate-gradient steps on every row's normal equations, restricted to its support (0 or 1).

    Starts from ``codes`` cut down to ``support``; ``gradient`` is ``Dᵀ(Y − DS)`` at ``codes`` as they come in. An ``inverse``
    of about the ``gram``, cut down to the support of a row, preconditions its steps. Each step
    lowers every row's error or leaves it, up to the rounding of the products. A row stops for good once its residual is
    rounding noise, or points where the atoms of its support are dependent to working precision: a step there would be
    noise over nothing. Returns the codes and the gradient at them on the support.
    """
    # Cutting the codes down moves the gradient by Dᵀ D (codes − start): no product with the targets is needed.
    start = codes * support
    residual = torch.baddbmm(gradient, codes - start, gram).mul_(support)
    codes = start

    def preconditioned(residual: Tensor) -> Tensor:
        return residual if inverse is None else product(residual, inverse).mul_(support)

    # Below ``noise`` a residual is rounding; below ``flat`` a curvature is, of atoms that depend on each other.
    direction = preconditioned(residual)
    length = (residual * direction).sum(dim=2, keepdim=True)
    epsilon = torch.finfo(gram.dtype).eps
    noise = (4 * epsilon) ** 2 * length
    flat = 64 * epsilon * gram.diagonal(dim1=1, dim2=2).amax(dim=1)[:, None, None]
    going = torch.ones_like(length, dtype=torch.bool)
    for done in range(1, steps + 1):
        # Every row is a system of its own: the support cuts its rows and columns out of the same gram.
        image = direction @ gram
        curvature = (direction * image).sum(dim=2, keepdim=True)
        going = going & (length > noise) & (curvature > flat * length)
        step = torch.where(going, length / curvature, 0.0)
        codes = torch.addcmul(codes, step, direction)
        residual = torch.addcmul(residual, image.mul_(support), step, value=-1)
        if done == steps:
            break
        steepest = preconditioned(residual)
        shorter = (residual * steepest).sum(dim=2, keepdim=True)
        direction = torch.addcmul(steepest, shorter / length.clamp_min(_tiny(gram)), direction)
        length = shorter
    return codes, residual


def best_dictionary(
    cross: Float[Tensor, "batch d_in atoms"],
    moments: Float[Tensor, "batch atoms atoms"],
    dictionary: Float[Tensor, "batch d_in atoms"],
) -> Float[Tensor, "batch d_in atoms"]:
    """``argmin_D ‖Y − D S‖_F = Y Sᵀ (S Sᵀ + εI)⁻¹`` from ``Y Sᵀ`` and ``S Sᵀ``, both of which it overwrites.

    The ridge is relative to the mean diagonal, only there for solvability, and pulls towards ``dictionary`` rather than
    towards zero. Where the moments are singular all the same, ``dictionary`` stays.
    """
    diagonal = moments.diagonal(dim1=1, dim2=2)
    ridge = 10 * torch.finfo(moments.dtype).eps * moments.shape[1] * diagonal.mean(dim=1, keepdim=True)
    diagonal.add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(moments)
    cross = cross.addcmul_(ridge[..., None], dictionary)
    solved = times_inverse(cross, factor, out=cross)
    return torch.where((failed > 0)[:, None, None], dictionary, solved, out=solved)


def times_inverse(
    matrix: Float[Tensor, "*batch n atoms"], factor: Float[Tensor, "*batch atoms atoms"], out: Tensor | None = None
) -> Float[Tensor, "*batch n atoms"]:
    """``matrix · (L Lᵀ)⁻¹`` of a lower ``factor`` ``L``, written to ``out`` where that is given.

    Rather than by ``cholesky_solve``, which takes the transpose and half as long again on a CPU.
    """
    half = torch.linalg.solve_triangular(factor.mT, matrix, upper=True, left=False, out=out)
    return torch.linalg.solve_triangular(factor, half, upper=False, left=False, out=out)


def product(left: Float[Tensor, "batch n m"], right: Float[Tensor, "batch m p"]) -> Float[Tensor, "batch n p"]:
    """``left @ right``. A single matrix goes through ``mm``, which takes a transpose as it is: ``bmm`` copies it first."""
    return torch.mm(left[0], right[0])[None] if len(left) == 1 else torch.bmm(left, right)


def has_stalled(errors: Sequence[float], tolerance: float) -> bool:
    """Whether the last two rounds together gained no more than twice ``tolerance`` of the error."""
    return len(errors) >= 3 and errors[-1] >= (1 - tolerance) ** 2 * errors[-3]


def _squared(residual: Float[Tensor, "batch rows d_in"]) -> Float[Tensor, " batch"]:
    return residual.square().sum(dim=(1, 2), dtype=torch.float64)


def relative_error(target: Float[Tensor, "d_in d_out"], approximation: Float[Tensor, "d_in d_out"]) -> float:
    """``‖Y − Ŷ‖_F / ‖Y‖_F``; 0 where there is nothing to fit."""
    energy = float(target.square().sum(dtype=torch.float64))
    return (float((target - approximation).square().sum(dtype=torch.float64)) / energy) ** 0.5 if energy else 0.0


def norms_of(columns: Float[Tensor, "batch d_in n"]) -> Float[Tensor, "batch 1 n"]:
    """Norms of the columns, 1 where there is nothing to divide by."""
    norms = columns.norm(dim=1, keepdim=True)
    return torch.where(norms > _tiny(columns), norms, 1.0)


def _tiny(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).tiny
