"""K-SVD: a sweep, compiled and in torch, against full SVDs, and what a whole run must keep."""

import hypothesis.strategies as st
import pytest
import references
import torch
from hypothesis import given

from cospadi.errors import UserError
from cospadi.factorization.solvers import ksvd as ksvd_module
from cospadi.factorization.solvers.ksvd import first_atoms, ksvd, ksvd_sweep
from cospadi.factorization.solvers.sparse_coding import sparse_code
from cospadi.kernels.sweep import sweep


def by_torch(*arguments, **settings):
    """What `ksvd_sweep` does with tensors on a GPU, on the CPU."""
    return ksvd_sweep(*arguments, **settings, compiled=False)


either = pytest.mark.parametrize("refit", [ksvd_sweep, by_torch])


def relative_error(target, dictionary, coefficients):
    return float((target - dictionary @ coefficients).norm() / target.norm())


@st.composite
def problems(draw):
    d_in, atoms, d_out = draw(st.integers(2, 12)), draw(st.integers(2, 16)), draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    dictionary = torch.randn(d_in, atoms, generator=generator, dtype=torch.float64)
    target = torch.randn(d_in, d_out, generator=generator, dtype=torch.float64)
    return dictionary / dictionary.norm(dim=0), target, draw(st.integers(1, max(1, min(d_in, atoms) - 1)))


@either
@given(problems(), st.integers(0, 8))
def test_a_sweep_never_hurts_and_keeps_supports_and_unit_atoms(refit, problem, power_iterations):
    dictionary, target, _ = problem
    before = sparse_code(*problem)
    dictionary = dictionary.T.contiguous().T  # either memory order: inputs must stay as they are
    given_dictionary, given_before = dictionary.clone(), before.clone()
    improved, after, residual = refit(dictionary, before, target, power_iterations)
    assert (target - improved @ after).norm() <= (target - dictionary @ before).norm() + 1e-9
    assert ((after != 0) <= (before != 0)).all()
    torch.testing.assert_close(improved.norm(dim=0), torch.ones(dictionary.shape[1]).double())
    assert torch.equal(dictionary, given_dictionary)
    assert torch.equal(before, given_before)
    torch.testing.assert_close(residual, target - improved @ after)


@either
@given(st.integers(0, 10**6))
def test_a_converged_sweep_is_the_reference(refit, seed):
    draw = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(12, 6, generator=draw, dtype=torch.float64)).Q
    coefficients = torch.randn(6, 40, generator=draw, dtype=torch.float64)
    coefficients *= torch.rand(6, 40, generator=draw) < 0.4
    target = directions @ coefficients + 0.1 * torch.randn(12, 40, generator=draw, dtype=torch.float64)
    dictionary, after, _ = refit(directions, coefficients, target, power_iterations=200)
    expected_dictionary, expected_after = references.ksvd_sweep(directions, coefficients, target)
    signs = (dictionary * expected_dictionary).sum(0).sign()
    torch.testing.assert_close(dictionary * signs, expected_dictionary, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after * signs[:, None], expected_after, rtol=1e-5, atol=1e-6)


@either
def test_a_sweep_survives_a_perfect_fit_and_unused_atoms(refit):
    dictionary = torch.eye(4, dtype=torch.float64)
    coefficients = torch.zeros(4, 3, dtype=torch.float64)
    coefficients[0, 0], coefficients[1, 1] = 2.0, -3.0  # column 2 is zero, atoms 2 and 3 are unused
    improved, after, residual = refit(dictionary, coefficients, dictionary @ coefficients)
    torch.testing.assert_close(residual, torch.zeros(4, 3).double())
    torch.testing.assert_close(improved @ after, dictionary @ coefficients)
    assert improved[:, 2:].equal(dictionary[:, 2:])
    zeros = torch.zeros(4, 3, dtype=torch.float64)
    improved, after, residual = refit(dictionary, dictionary[:, :3], zeros)  # nothing to fit
    assert improved.equal(dictionary)
    assert not after.any()
    assert not residual.any()


@pytest.mark.parametrize("power_iterations", [0, 1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_and_torch_sweeps_are_the_same(dtype, power_iterations):
    draw = torch.Generator().manual_seed(5)
    target = torch.randn(33, 150, generator=draw, dtype=torch.float64).to(dtype)
    dictionary = first_atoms(target, 29, seed=1)
    coefficients = sparse_code(dictionary, target, 7)
    coefficients[3] = 0
    results = [refit(dictionary, coefficients, target, power_iterations) for refit in (ksvd_sweep, by_torch)]
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    again = ksvd_sweep(dictionary, coefficients, target, power_iterations)
    assert all(torch.equal(first, second) for first, second in zip(results[0], again, strict=True))


@given(problems())
def test_the_kernel_and_the_torch_loops_change_the_same_tensors(problem):
    dictionary, target, _ = problem
    coefficients = sparse_code(*problem)
    state = [(target - dictionary @ coefficients).T, dictionary.T, coefficients]
    compiled, plain = ([t.clone(memory_format=torch.contiguous_format) for t in state] for _ in range(2))
    sweep(*compiled, 3)
    ksvd_module._sweep(*plain, 3)
    for actual, expected in zip(compiled, plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)


@given(problems())
def test_the_best_round_is_returned(problem):
    dictionary, target, sparsity = problem
    heard = []
    learned = ksvd(target, dictionary.shape[1], sparsity, n_rounds=5, progress=lambda *news: heard.append(news))
    assert relative_error(target, learned.dictionary, learned.coefficients) == pytest.approx(
        min(learned.errors), rel=1e-6, abs=1e-12
    )
    assert heard == list(zip(range(1, 6), learned.errors, strict=True))
    assert ((learned.coefficients != 0).sum(0) <= sparsity).all()
    torch.testing.assert_close(learned.dictionary.norm(dim=0), torch.ones(dictionary.shape[1]).double())


@given(problems())
def test_a_seed_fixes_the_result(problem):
    dictionary, target, sparsity = problem
    first, again = (ksvd(target, dictionary.shape[1], sparsity, n_rounds=3, seed=7) for _ in range(2))
    assert first.dictionary.equal(again.dictionary)
    assert first.coefficients.equal(again.coefficients)
    assert first.errors == again.errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_planted_dictionary_is_learnt(dtype):
    draw = torch.Generator().manual_seed(0)
    planted = torch.randn(16, 20, generator=draw, dtype=dtype)
    planted = planted / planted.norm(dim=0)
    coefficients = torch.zeros(20, 800, dtype=dtype)
    rows = torch.rand(800, 20, generator=draw).argsort(1)[:, :3].T
    coefficients.scatter_(0, rows, torch.randn(3, 800, generator=draw, dtype=dtype))
    learned = ksvd(planted @ coefficients, atoms=20, sparsity=3, n_rounds=40)
    assert min(learned.errors) < 0.5 * learned.errors[0]
    assert min(learned.errors) < 0.25  # a local optimum: a few atoms are not found


@pytest.mark.parametrize(("d_in", "atoms", "d_out"), [(6, 15, 40), (6, 15, 9), (20, 10, 4)])
def test_more_atoms_than_inputs_or_outputs(d_in, atoms, d_out):
    target = torch.randn(d_in, d_out, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    learned = ksvd(target, atoms, sparsity=3, n_rounds=6)
    assert learned.dictionary.shape == (d_in, atoms)
    assert learned.dictionary.isfinite().all()
    assert min(learned.errors) <= learned.errors[0]
    if atoms >= d_out:
        assert min(learned.errors) < 1e-9  # a column can be its own atom


def test_the_start_is_distinct_columns_then_random_directions():
    target = torch.randn(5, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    target[:, 2] = 0
    start = first_atoms(target, 6, seed=42)
    likeness = (start.T @ (target / target.norm(dim=0).clamp_min(1e-9)) > 1 - 1e-9).sum(0)
    assert likeness.max() == 1
    assert likeness.sum() == 6
    assert likeness[2] == 0
    filled = first_atoms(target, 11, seed=42)
    torch.testing.assert_close(filled.norm(dim=0), torch.ones(11).double())


def test_an_unused_atom_becomes_the_worst_column():
    target = torch.eye(4, dtype=torch.float64)
    learned = ksvd(torch.cat([target, target, target], 1), atoms=4, sparsity=1, n_rounds=8)
    assert learned.errors[-1] < 1e-9  # with duplicates at the start, only replacement reaches this


def test_a_zero_target_is_coded_by_zeros():
    learned = ksvd(torch.zeros(4, 5), atoms=3, sparsity=2, n_rounds=2)
    assert learned.errors == [0.0, 0.0]
    assert not learned.coefficients.any()


def test_mistakes_are_refused():
    target = torch.randn(4, 5)
    for setting in (
        {"atoms": 0, "sparsity": 1},
        {"atoms": 2, "sparsity": 0},
        {"atoms": 2, "sparsity": 1, "n_rounds": 0},
    ):
        with pytest.raises(UserError, match="=0"):
            ksvd(target, **setting)
    with pytest.raises(UserError, match="target"):
        ksvd(target / 0, atoms=2, sparsity=1)
