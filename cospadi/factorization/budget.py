"""The one place where a compression ratio becomes ranks, atoms and non-zeros, and these become bits.

A projection of ``d_in × d_out`` takes ``16 · d_in · d_out`` bits dense. ``compression_ratio`` is the fraction of them
that is removed, and nothing here ever hands out more than what is left.

``members`` projections of that shape may share their dictionary or left factor: it is counted once, the rest for each.
"""

from __future__ import annotations

from math import floor

from cospadi.errors import UserError

DENSE_BITS = 16
"""Bits of a dense weight, a dictionary entry, a low-rank factor's entry."""
PAPER_VALUE_BITS = 14
"""Bits of a coefficient under the paper's accounting: two mantissa bits pay for the mask (arXiv:2509.22075, eq. 11)."""


def dense_bits(d_in: int, d_out: int) -> int:
    """Bits of an uncompressed projection.

    >>> dense_bits(64, 256)
    262144
    """
    return DENSE_BITS * d_in * d_out


def budget_bits(d_in: int, d_out: int, compression_ratio: float) -> int:
    """Bits that a compressed projection may take, ``⌊(1 − ratio) · dense⌋``.

    >>> budget_bits(64, 256, 0.2)
    209715
    """
    return int((1 - compression_ratio) * dense_bits(d_in, d_out) + 1e-6)


def mask_bits(atoms: int, d_out: int) -> int:
    """Bits of the support mask: one per coefficient, filled up to whole bytes.

    >>> mask_bits(32, 256), mask_bits(3, 3)
    (8192, 16)
    """
    return (atoms * d_out + 7) // 8 * 8


def stored_bits(
    d_in: int, d_out: int, atoms: int, sparsity: int, value_bits: int = DENSE_BITS, members: int = 1
) -> int:
    """Bits of a sparse dictionary: dictionary, non-zero coefficients, support mask (arXiv:2509.22075, eq. 10).

    >>> stored_bits(d_in=64, d_out=256, atoms=32, sparsity=16)  # 32768 + 65536 + 8192
    106496
    >>> stored_bits(d_in=64, d_out=256, atoms=32, sparsity=16, members=2)  # 32768 + 2 · (65536 + 8192)
    180224
    """
    value_bytes = (value_bits * sparsity * d_out + 7) // 8
    return DENSE_BITS * d_in * atoms + members * (8 * value_bytes + mask_bits(atoms, d_out))


def low_rank_bits(d_in: int, d_out: int, rank: int, members: int = 1) -> int:
    """Bits of two dense factors of the given rank.

    >>> low_rank_bits(64, 256, 8), low_rank_bits(64, 256, 8, members=2)
    (40960, 73728)
    """
    return DENSE_BITS * rank * (d_in + members * d_out)


def rank(d_in: int, d_out: int, compression_ratio: float, members: int = 1) -> int:
    """Largest rank within the budget, ``⌊(1 − ratio) · d_in · d_out / (d_in + d_out)⌋``.

    A group is one wide projection: ``d_out`` becomes ``members · d_out`` (arXiv:2410.03765).

    >>> rank(576, 576, 0.2), rank(576, 576, 0.2, members=2)
    (230, 307)

    Raises:
        UserError: when not even rank 1 fits.
    """
    allowed = members * budget_bits(d_in, d_out, compression_ratio)
    largest = allowed // low_rank_bits(d_in, d_out, 1, members)
    if largest < 1:
        raise _too_small(d_in, d_out, compression_ratio, "rank 1")
    return largest


def atoms_and_sparsity(
    d_in: int, d_out: int, compression_ratio: float, rho: float, accounting: str = "mask", members: int = 1
) -> tuple[int, int]:
    """Atoms and non-zeros per column that fill the budget with about ``rho`` atoms per non-zero.

    ``mask`` solves ``16·d_in·k + 16·(k/rho)·d_out + k·d_out = budget`` for the atoms ``k`` and then spends what
    rounding down has left over, first on non-zeros, then on atoms. ``paper`` is arXiv:2509.22075 v6, eq. 49:
    ``k = (1 − ratio)·d_in·d_out / (d_in + d_out/rho)``, ``s = ⌊k/rho⌋``, the mask paid for by 14-bit values; that is
    honest only up to rho = 2. Of a group ``d_out`` is ``members · d_out`` in both.

    >>> atoms_and_sparsity(576, 1536, 0.2, rho=2.0)
    (493, 245)
    >>> atoms_and_sparsity(576, 1536, 0.2, rho=2.0, members=2)
    (615, 307)
    >>> atoms_and_sparsity(576, 1536, 0.2, rho=2.0, accounting="paper")
    (526, 263)

    Raises:
        UserError: when the budget holds no atom, or paper accounting is asked for beyond rho = 2.
    """
    budget = members * budget_bits(d_in, d_out, compression_ratio)
    wide = members * d_out
    if accounting == "paper":
        if rho > 2:
            raise UserError(
                f"factorization.accounting=paper is only exact up to factorization.rho=2, and rho={rho:g}: "
                "14-bit values would no longer pay for the mask. Set rho to 2 or less, or accounting=mask."
            )
        atoms = int((1 - compression_ratio) * d_in * wide / (d_in + wide / rho) + 1e-9)
        sparsity = int(atoms / rho + 1e-9)
        while sparsity and stored_bits(d_in, d_out, atoms, sparsity, PAPER_VALUE_BITS, members) > budget:
            sparsity -= 1  # odd shapes: filling values and mask up to bytes may cost what was left
    else:
        per_atom = DENSE_BITS * d_in + wide
        per_nonzero = DENSE_BITS * wide
        budget -= budget % 8  # the mask is filled up to a byte, so the last bits buy nothing
        budget -= 7 * (members - 1) if d_out % 8 else 0  # and so is every other member's
        atoms = int(budget / (per_atom + per_nonzero / rho))
        sparsity = min((budget - atoms * per_atom) // per_nonzero, atoms)
        atoms += max(budget - atoms * per_atom - sparsity * per_nonzero, 0) // per_atom
    if atoms < 1 or sparsity < 1:
        raise _too_small(d_in, d_out, compression_ratio, "one atom with one non-zero per column")
    return atoms, sparsity


def sparsity_for(
    d_in: int, d_out: int, compression_ratio: float, atoms: int, accounting: str = "mask", members: int = 1
) -> int:
    """Non-zeros per column that the budget has room for beside ``atoms`` atoms, at most ``atoms``.

    >>> sparsity_for(576, 1536, 0.2, atoms=493)
    245

    Raises:
        UserError: when there is no room for one.
    """
    budget = members * budget_bits(d_in, d_out, compression_ratio)
    bits = value_bits(accounting)
    left = budget - DENSE_BITS * d_in * atoms - members * mask_bits(atoms, d_out)
    sparsity = min(left // (members * bits * d_out), atoms)
    while sparsity > 0 and stored_bits(d_in, d_out, atoms, sparsity, bits, members) > budget:
        sparsity -= 1  # values are filled up to bytes
    if sparsity < 1:
        raise _too_small(d_in, d_out, compression_ratio, f"{atoms} atoms with one non-zero per column")
    return sparsity


def within_eigenbasis(
    d_in: int,
    d_out: int,
    compression_ratio: float,
    atoms: int,
    sparsity: int,
    accounting: str = "mask",
    members: int = 1,
) -> tuple[int, int]:
    """Atoms and non-zeros for an orthonormal dictionary: what atoms beyond ``min(d_in, d_out)`` cost goes to non-zeros.

    >>> within_eigenbasis(576, 1536, 0.2, *atoms_and_sparsity(576, 1536, 0.2, rho=3.0))
    (576, 208)
    """
    most = min(d_in, members * d_out)
    if atoms <= most:
        return atoms, sparsity
    return most, sparsity_for(d_in, d_out, compression_ratio, most, accounting, members)


def sparse_bits(d_in: int, d_out: int, nonzeros: int) -> int:
    """Bits of a sparse weight: its non-zeros and one bit per weight that says where they are.

    >>> sparse_bits(64, 256, 8192)  # 2:4: 9 bits a weight, where a dense one has 16
    147456
    """
    return DENSE_BITS * nonzeros + mask_bits(d_in, d_out)


def nonzeros(
    d_in: int, d_out: int, compression_ratio: float, atoms: int = 0, members: int = 1, at_least: int = 1
) -> int:
    """Most non-zeros of a sparse weight within the budget, ``16·nnz + d_in·d_out = budget``.

    With ``atoms`` stored ones beside those of the identity ``16·(nnz + d_in·atoms) + (d_in + atoms)·d_out = budget``; of a
    group ``d_out`` and the budget are those of all members together.

    >>> nonzeros(576, 1536, 0.3), nonzeros(576, 1536, 0.3, atoms=72)
    (564019, 515635)

    Raises:
        UserError: when atoms and mask leave no room for ``at_least`` so many.
    """
    taken = DENSE_BITS * d_in * atoms + members * mask_bits(d_in + atoms, d_out)
    most = (members * budget_bits(d_in, d_out, compression_ratio) - taken) // DENSE_BITS
    if most < at_least:
        least = f"a mask and {at_least} non-zero value{'s' if at_least > 1 else ''}"
        raise _too_small(d_in, d_out, compression_ratio, f"{atoms} atoms, {least}" if atoms else least)
    return most


def nonzeros_per_output(d_in: int, d_out: int, compression_ratio: float) -> int:
    """Most non-zeros of every output where all outputs have the same number.

    >>> nonzeros_per_output(576, 1536, 0.3)
    367

    Raises:
        UserError: when there is no room for one.
    """
    return nonzeros(d_in, d_out, compression_ratio, at_least=d_out) // d_out


def pattern_ratio(kept: int, group: int) -> float:
    """Fraction of the bits that is removed where ``kept`` of every ``group`` weights stay, the mask counted.

    >>> pattern_ratio(2, 4), pattern_ratio(1, 4), pattern_ratio(15, 16)
    (0.4375, 0.6875, 0.0)
    """
    return 1 - kept / group - 1 / DENSE_BITS


def pattern_nonzeros(d_in: int, d_out: int, compression_ratio: float, kept: int, group: int) -> int:
    """Non-zeros per output where ``kept`` of every ``group`` consecutive inputs stay, known to fit the budget.

    >>> pattern_nonzeros(576, 1536, 0.4, kept=2, group=4)
    288

    Raises:
        UserError: when ``d_in`` is not a multiple of ``group``, or the pattern takes more bits than there are.
    """
    if d_in % group:
        raise UserError(
            f"A projection of {d_in} inputs does not divide into groups of {group}, as factorization.pattern={kept}:{group} "
            "needs. Choose a pattern N:M whose M divides it, or factorization.pattern=null."
        )
    per_output = d_in // group * kept
    needed = sparse_bits(d_in, d_out, per_output * d_out)
    if needed > budget_bits(d_in, d_out, compression_ratio):
        raise pattern_too_large(kept, group, compression_ratio, 1 - needed / dense_bits(d_in, d_out))
    return per_output


def pattern_too_large(kept: int, group: int, compression_ratio: float, removed: float) -> UserError:
    """The refusal of a pattern that removes only ``removed`` of the bits where ``compression_ratio`` is asked for."""
    largest = _rounded_down(removed)
    return UserError(
        f"factorization.pattern={kept}:{group} removes {largest} of a projection's bits, its mask counted: less than "
        f"factorization.compression_ratio={compression_ratio:g} asks for. Set the ratio to {largest} or less, or choose a "
        "sparser pattern."
    )


def _rounded_down(fraction: float) -> float:
    """To four digits, so that the number printed is one that works.

    >>> _rounded_down(0.4375), _rounded_down(1 - 2 / 3 - 1 / 16)
    (0.4375, 0.2708)
    """
    return floor(fraction * 1e4 + 1e-9) / 1e4


def rank_and_nonzeros(d_in: int, d_out: int, compression_ratio: float, rank_ratio: float) -> tuple[int, int]:
    """Rank and non-zeros per output of a low-rank plus a sparse weight (OATS, arXiv:2409.13652).

    The values that the mask leaves room for, ``P = (budget − d_in·d_out) / 16``, are split as in the paper:
    ``rank = ⌊rank_ratio · P / (d_in + d_out)⌋``, and what is left over goes to the non-zeros.

    >>> rank_and_nonzeros(576, 1536, 0.3, rank_ratio=0.25)  # 16·66·2112 + 16·276·1536 + 576·1536 bits
    (66, 276)

    Raises:
        UserError: when there is no room for rank 1 beside one non-zero per output.
    """
    values = nonzeros(d_in, d_out, compression_ratio)
    largest = int(rank_ratio * values / (d_in + d_out) + 1e-9)
    per_output = (values - largest * (d_in + d_out)) // d_out
    if largest < 1 or per_output < 1:
        least = f"rank 1 and one non-zero per output at factorization.rank_ratio={rank_ratio:g}"
        raise _too_small(d_in, d_out, compression_ratio, least)
    return largest, per_output


def value_bits(accounting: str) -> int:
    """Bits of a stored coefficient under an accounting."""
    return PAPER_VALUE_BITS if accounting == "paper" else DENSE_BITS


def _too_small(d_in: int, d_out: int, compression_ratio: float, least: str) -> UserError:
    return UserError(
        f"A {d_in}×{d_out} projection at factorization.compression_ratio={compression_ratio:g} has "
        f"{budget_bits(d_in, d_out, compression_ratio)} bits, less than {least} needs. Choose a smaller ratio."
    )
