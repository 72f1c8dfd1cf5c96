"""OATS: a sparse plus a low-rank weight, as the exact alternation would have it, at the bits every method has."""

import itertools

import hypothesis.strategies as st
import pytest
import references
import torch
from hypothesis import given

from cospadi.errors import UserError
from cospadi.factorization import budget
from cospadi.factorization.factors import KINDS, stored_bits
from cospadi.factorization.methods import factorize
from cospadi.factorization.problem import Problem
from cospadi.factorization.settings import OATSConfig
from cospadi.factorization.solvers.low_rank import followed_svd
from cospadi.factorization.solvers.oats import sparse_plus_low_rank
from cospadi.factorization.solvers.whitening import whitener

seeds = st.integers(0, 10**6)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def target_with_both(seed, d_in, d_out):
    """A spectrum that falls, and a few large entries beside it."""
    falling = torch.arange(1, min(d_in, d_out) + 1).double() ** -0.8
    left, right = torch.linalg.qr(normal(seed, d_in, d_in)).Q, torch.linalg.qr(normal(seed + 1, d_out, d_out)).Q
    low_rank = 10 * (left[:, : len(falling)] * falling) @ right[: len(falling)]
    return low_rank + normal(seed + 2, d_in, d_out) ** 3 / 10


def objective(target, parts):
    sparse, left, right = (part.double() for part in parts)
    return float((target - sparse - left @ right).norm() / target.norm())


def problem(seed, d_in, d_out):
    inputs = normal(seed, 4 * d_in, d_in) @ normal(seed + 1, d_in, d_in) * torch.linspace(0.2, 4, d_in)
    return Problem(normal(seed + 2, d_in, d_out).float(), whitener(inputs.T @ inputs, 1e-6), inputs.abs().mean(dim=0))


def config(compression_ratio=0.3, **settings):
    return OATSConfig(name="oats", title="OATS", compression_ratio=compression_ratio, **settings)


# --- the alternation


@given(st.integers(2, 24), st.integers(2, 24), seeds, st.data())
def test_one_round_is_the_exact_one(d_in, d_out, seed, data):
    rank, nonzeros = data.draw(st.integers(1, min(d_in, d_out))), data.draw(st.integers(1, d_in))
    target = target_with_both(seed, d_in, d_out)
    sparse, left, right = sparse_plus_low_rank(target, rank, nonzeros, n_rounds=1)
    expected, low_rank = references.oats(target, rank, nonzeros, 1)
    torch.testing.assert_close(left @ right, low_rank, rtol=1e-5, atol=1e-6)
    if rank < min(d_in, d_out):  # else nothing but rounding noise is left to be sparse
        torch.testing.assert_close(sparse, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("d_in", "d_out"), [(48, 48), (40, 72), (72, 40)])
@pytest.mark.parametrize("seed", [0, 10, 20])
def test_followed_and_exact_svds_end_equally_well(d_in, d_out, seed):
    target = target_with_both(seed, d_in, d_out)
    exact_sparse, exact_low_rank = references.oats(target, 5, d_in // 3, 80)
    exact = float((target - exact_sparse - exact_low_rank).norm() / target.norm())
    found = objective(target, sparse_plus_low_rank(target.float(), 5, d_in // 3))
    assert found == pytest.approx(exact, rel=0.02)
    assert exact < 0.9 * objective(target, sparse_plus_low_rank(target, 5, d_in // 3, n_rounds=1))


@given(st.integers(2, 16), st.integers(2, 16), seeds, st.data())
def test_no_round_makes_it_worse(d_in, d_out, seed, data):
    rank, nonzeros = data.draw(st.integers(1, min(d_in, d_out))), data.draw(st.integers(1, d_in))
    target = target_with_both(seed, d_in, d_out)
    errors = [objective(target, sparse_plus_low_rank(target, rank, nonzeros, rounds)) for rounds in (1, 2, 3, 9, 27)]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(errors))


@given(st.integers(1, 16), st.integers(1, 16), seeds, st.data())
def test_a_followed_svd_is_no_farther_than_what_it_started_from(rows, columns, seed, data):
    rank = data.draw(st.integers(1, min(rows, columns)))
    matrix, start = normal(seed, rows, columns), normal(seed + 1, columns, rank)
    best_left = torch.linalg.lstsq(start, matrix.T, driver="gelsd").solution.T
    left, right = followed_svd(matrix, start, data.draw(st.integers(1, 4)))
    torch.testing.assert_close(left.T @ left, torch.eye(rank).double())
    assert (matrix - left @ right.T).norm() <= (matrix - best_left @ start.T).norm() + 1e-9


def test_planted_parts_are_found():
    low_rank = normal(0, 60, 3) @ normal(1, 3, 80)
    sparse = torch.zeros(60, 80).double()
    places = torch.rand(80, 60, generator=torch.Generator().manual_seed(2)).argsort(dim=1)[:, :3].T
    sparse.scatter_(0, places, 30.0)
    found, left, right = sparse_plus_low_rank(low_rank + sparse, 3, 3)
    torch.testing.assert_close(found, sparse, atol=1e-3, rtol=0)
    torch.testing.assert_close(left @ right, low_rank, atol=1e-3, rtol=0)


# --- the method


@given(st.integers(2, 40), st.integers(2, 40), seeds, st.floats(0.01, 0.9), st.floats(0.05, 0.95))
def test_a_budget_is_kept_and_filled(d_in, d_out, seed, ratio, rank_ratio):
    allowed = budget.budget_bits(d_in, d_out, ratio)
    given_problem = problem(seed, d_in, d_out)
    try:
        factors = factorize(config(ratio, rank_ratio=rank_ratio, n_rounds=3), given_problem)
    except UserError as error:
        assert "Choose a smaller ratio" in str(error)  # noqa: PT017 - no room for rank 1, or for one non-zero beside it
        least = budget.sparse_bits(d_in, d_out, d_out) + budget.low_rank_bits(d_in, d_out, 1)
        assert allowed < least + 16 * (d_in + d_out) * max(1 / rank_ratio, d_out / (1 - rank_ratio))
        return
    bits, rank = stored_bits(factors), factors.sizes["rank"]
    per_output = (factors.sparse.coefficients != 0).sum(dim=0)
    assert bits == budget.sparse_bits(d_in, d_out, int(per_output.sum())) + budget.low_rank_bits(d_in, d_out, rank)
    assert bits <= allowed
    if rank < min(d_in, d_out):
        assert allowed < bits + 16 * d_out
        assert len(set(per_output.tolist())) == 1
    assert rank * (d_in + d_out) <= rank_ratio * budget.nonzeros(d_in, d_out, ratio) + 1e-6
    back = KINDS[factors.kind].from_tensors(factors.tensors() | {"d_out": torch.tensor(d_out)})
    assert back.weight().equal(factors.weight())


def test_it_is_the_naive_alternation_on_the_scaled_weight():
    given_problem = problem(0, 40, 56)
    rank, nonzeros = budget.rank_and_nonzeros(40, 56, 0.3, 0.25)
    scale = given_problem.input_norms[:, None]
    weight = given_problem.weight.double()
    sparse, low_rank = references.oats(scale * weight, rank, nonzeros, 80)
    exact = float((sparse + low_rank - scale * weight).norm() / (scale * weight).norm())
    factors = factorize(config(), given_problem)
    found = float((scale * (factors.weight().double() - weight)).norm() / (scale * weight).norm())
    assert found == pytest.approx(exact, rel=0.03)
    assert factors.sizes == {"rank": rank, "atoms": 0, "sparsity": nonzeros}


@pytest.mark.parametrize("rank_ratio", [0.0, 1.0, -0.2, 2.0])
def test_a_rank_ratio_that_leaves_out_a_part_is_refused(rank_ratio):
    with pytest.raises(UserError, match=r"factorization\.rank_ratio=.* is not between 0 and 1"):
        config(rank_ratio=rank_ratio)


def test_a_budget_without_room_for_rank_1_is_refused():
    with pytest.raises(UserError, match=r"rank 1 and one non-zero per output at factorization\.rank_ratio=0\.05"):
        factorize(config(0.5, rank_ratio=0.05), problem(0, 12, 12))
