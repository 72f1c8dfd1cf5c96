"""Orthogonal matching pursuit, compiled and in torch: a slow reference, scikit-learn, and what must always hold."""

import os
import subprocess
import sys

import hypothesis.strategies as st
import pytest
import references
import torch
from hypothesis import given
from sklearn.linear_model import orthogonal_mp_gram

from cospadi.errors import UserError
from cospadi.factorization.solvers import sparse_coding
from cospadi.factorization.solvers.sparse_coding import sparse_code
from cospadi.kernels import pursuit


def random_problem(d_in, atoms, d_out, seed, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    dictionary = torch.randn(d_in, atoms, generator=draw, dtype=torch.float64)
    target = torch.randn(d_in, d_out, generator=draw, dtype=torch.float64)
    return (dictionary / dictionary.norm(dim=0)).to(dtype), target.to(dtype)


@st.composite
def problems(draw):
    """Dictionary, target and a sparsity below the rank, so that the greedy choice is unique."""
    d_in, atoms = draw(st.integers(2, 20)), draw(st.integers(2, 30))
    sparsity = draw(st.integers(1, max(1, min(d_in, atoms) - 1)))
    return *random_problem(d_in, atoms, draw(st.integers(1, 8)), draw(st.integers(0, 10**6))), sparsity


def by_torch(dictionary, target, sparsity, chunk=None):
    """What `sparse_code` does with tensors on a GPU, on the CPU."""
    return sparse_code(dictionary, target, sparsity, chunk, compiled=False)


either = pytest.mark.parametrize("code", [sparse_code, by_torch])


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)


@either
@given(problems())
def test_agrees_with_the_naive_reference(code, problem):
    actual, expected = code(*problem), references.sparse_code(*problem)
    assert torch.equal(actual != 0, expected != 0)
    close(actual, expected)


@either
@given(problems())
def test_agrees_with_scikit_learn(code, problem):
    dictionary, target, sparsity = problem
    gram, correlations = (dictionary.T @ dictionary).numpy(), (dictionary.T @ target).numpy()
    expected = torch.from_numpy(orthogonal_mp_gram(gram, correlations, n_nonzero_coefs=sparsity))
    close(code(*problem), expected.reshape(dictionary.shape[1], -1))


@either
@pytest.mark.parametrize(
    ("d_in", "atoms", "d_out", "sparsity"), [(96, 130, 12, 60), (64, 120, 9, 63), (200, 81, 7, 80)]
)
def test_agrees_with_scikit_learn_at_a_real_size(code, d_in, atoms, d_out, sparsity):
    dictionary, target = random_problem(d_in, atoms, d_out, seed=0)
    gram, correlations = (dictionary.T @ dictionary).numpy(), (dictionary.T @ target).numpy()
    expected = torch.from_numpy(orthogonal_mp_gram(gram, correlations, n_nonzero_coefs=sparsity))
    actual = code(dictionary, target, sparsity)
    assert torch.equal(actual != 0, expected != 0)
    close(actual, expected)


def test_single_precision_agrees_with_double_and_with_torch():
    dictionary, target = random_problem(96, 130, 40, seed=0, dtype=torch.float32)
    double = sparse_code(dictionary.double(), target.double(), 40)
    for code in (sparse_code, by_torch):
        single = code(dictionary, target, 40)
        assert single.dtype == torch.float32
        assert torch.equal(single != 0, double != 0)
        torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-4)
    spread = torch.linspace(3, 0.01, 96)[:, None] * target  # hard columns: near-ties may fall otherwise
    errors = [(spread - dictionary @ code(dictionary, spread, 70)).norm(dim=0) for code in (sparse_code, by_torch)]
    torch.testing.assert_close(*errors, rtol=5e-2, atol=1e-3)
    torch.testing.assert_close(errors[0].norm(), errors[1].norm(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_change_nothing(dtype, monkeypatch):
    dictionary, target = random_problem(30, 45, 150, seed=3, dtype=dtype)
    correlations = target.T @ dictionary
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(pursuit.pursue(dictionary.T @ dictionary, correlations, 20))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    alone = [pursuit.pursue(dictionary.T @ dictionary, correlations[c : c + 1], 20) for c in (0, 63, 64, 149)]
    assert torch.equal(torch.cat(alone), results[0][[0, 63, 64, 149]])


@either
def test_of_equal_correlations_the_first_atom_is_taken(code):
    dictionary = torch.eye(6)
    target = torch.tensor([[0.0, 2.0, -2.0, 2.0, 1.0, 2.0]]).T
    for sparsity, expected in ((1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (5, [1, 2, 3, 4, 5]), (6, [1, 2, 3, 4, 5])):
        assert code(dictionary, target, sparsity)[:, 0].nonzero()[:, 0].tolist() == expected
    twice = torch.cat([dictionary, dictionary, dictionary], 1)
    assert code(twice, target, 9)[:, 0].nonzero()[:, 0].tolist() == [1, 2, 3, 4, 5]


@either
@given(problems())
def test_has_exactly_the_sparsity_and_its_residual_is_orthogonal_to_the_support(code, problem):
    dictionary, target, sparsity = problem
    coefficients = code(*problem)
    support = coefficients != 0
    assert (support.sum(0) == sparsity).all()
    close((dictionary.T @ (target - dictionary @ coefficients))[support], torch.zeros(int(support.sum())).double())


@either
@given(problems())
def test_values_are_the_least_squares_on_the_support(code, problem):
    dictionary, target, _ = problem
    coefficients = code(*problem)
    close(coefficients, references.least_squares_on_support(dictionary, target, coefficients != 0))


@either
@given(problems())
def test_one_more_atom_never_hurts_and_supports_are_nested(code, problem):
    dictionary, target, sparsity = problem
    fewer, more = code(dictionary, target, sparsity), code(dictionary, target, sparsity + 1)
    error_fewer = (target - dictionary @ fewer).norm(dim=0)
    error_more = (target - dictionary @ more).norm(dim=0)
    assert (error_more <= error_fewer + 1e-9).all()
    assert ((fewer != 0) <= (more != 0)).all()


@either
@given(st.integers(0, 10**6))
def test_a_planted_code_is_recovered(code, seed):
    dictionary, values = random_problem(200, 60, 5, seed)
    dictionary = torch.linalg.qr(dictionary).Q + 0.01 * dictionary  # nearly orthogonal: recovery is certain
    dictionary = dictionary / dictionary.norm(dim=0)
    rows = torch.rand(5, 60, generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :6].T
    planted = torch.zeros(60, 5).double().scatter_(0, rows, values[:6].sign() * (1 + values[:6].abs()))
    close(code(dictionary, dictionary @ planted, 6), planted)
    close(code(dictionary, dictionary @ planted, 20), planted)  # stops when nothing is left to explain


@either
@given(problems(), st.integers(0, 10**6), st.integers(1, 9))
def test_columns_are_coded_one_by_one(code, problem, seed, chunk):
    dictionary, target, sparsity = problem
    whole = code(*problem)
    order = torch.randperm(target.shape[1], generator=torch.Generator().manual_seed(seed))
    close(code(dictionary, target[:, order], sparsity), whole[:, order])
    close(code(dictionary, target, sparsity, chunk=chunk), whole)
    close(code(dictionary, 3 * target, sparsity), 3 * whole)


@either
@given(problems(), st.sampled_from([torch.float32, torch.float64]))
def test_zero_columns_get_zeros_and_zero_atoms_are_never_used(code, problem, dtype):
    dictionary, target, sparsity = problem
    dictionary, target = dictionary.to(dtype), target.to(dtype)
    target[:, 0] = 0
    dictionary[:, 0] = 0
    coefficients = code(dictionary, target, sparsity)
    assert coefficients.dtype == dtype
    assert coefficients.isfinite().all()
    assert not coefficients[:, 0].any()
    assert not coefficients[0].any()
    assert not code(torch.zeros_like(dictionary), target, sparsity).any()


@either
@given(problems(), st.sampled_from([torch.float32, torch.float64]))
def test_of_duplicated_atoms_one_is_used(code, problem, dtype):
    dictionary, target, sparsity = problem
    dictionary, target = dictionary.to(dtype), target.to(dtype)
    alone = code(dictionary, target, sparsity)
    doubled = code(torch.cat([dictionary, dictionary], 1), target, sparsity)
    first, second = doubled.chunk(2)
    assert not ((first != 0) & (second != 0)).any()
    tolerance = 1e-8 if dtype == torch.float64 else 1e-3
    torch.testing.assert_close(dictionary @ (first + second), dictionary @ alone, rtol=tolerance, atol=tolerance)


@either
@given(problems(), st.sampled_from([torch.float32, torch.float64]))
def test_a_sparsity_beyond_the_rank_is_plain_least_squares(code, problem, dtype):
    dictionary, target, _ = problem
    dictionary, target = dictionary.to(dtype), target.to(dtype)
    coefficients = code(dictionary, target, sparsity=10**6)
    assert coefficients.isfinite().all()
    assert ((coefficients != 0).sum(0) <= min(dictionary.shape)).all()
    best = torch.linalg.lstsq(dictionary.double(), target.double(), driver="gelsd").solution
    left_best = (target - dictionary.double() @ best).norm()
    left = (target - dictionary @ coefficients).norm()
    assert left <= left_best + (1e-6 if dtype == torch.float64 else 2e-2) * target.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_is_bounded_by_chunks(dtype, monkeypatch):
    dictionary, target = random_problem(20, 30, 40, seed=1, dtype=dtype)
    whole = by_torch(dictionary, target, 8)
    widths = []
    pursue = sparse_coding._pursue
    monkeypatch.setattr(sparse_coding, "CPU_BYTES", 20_000)
    monkeypatch.setattr(sparse_coding, "_pursue", lambda g, c, s: (widths.append(len(c)), pursue(g, c, s))[1])
    torch.testing.assert_close(by_torch(dictionary, target, 8), whole)
    assert len(widths) > 1
    assert sum(widths) == 40


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_the_scale_of_a_target_does_not_matter(scale):
    dictionary, target = random_problem(20, 30, 10, seed=1, dtype=torch.float32)
    torch.testing.assert_close(sparse_code(dictionary, scale * target, 8) / scale, sparse_code(dictionary, target, 8))


def test_inputs_may_lie_in_any_order_and_stay_as_they_are():
    dictionary, target = random_problem(20, 30, 10, seed=1)
    expected = sparse_code(dictionary, target, 8)
    turned = [matrix.T.contiguous().T for matrix in (dictionary, target)]
    close(sparse_code(*turned, 8), expected)
    assert torch.equal(turned[0], dictionary)
    assert torch.equal(turned[1], target)


def test_no_columns_give_no_columns():
    dictionary, target = random_problem(5, 7, 0, seed=0)
    assert sparse_code(dictionary, target, 2).shape == (7, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["dictionary", "target"])
def test_what_is_not_finite_is_named(name, bad):
    tensors = dict(zip(("dictionary", "target"), random_problem(5, 7, 3, seed=0), strict=True))
    tensors[name][1, 2] = bad
    with pytest.raises(UserError, match=f"1 of .* entries of the {name}"):
        sparse_code(**tensors, sparsity=2)


@pytest.mark.parametrize("setting", [{"sparsity": 0}, {"sparsity": 2, "chunk": 0}])
def test_counts_below_one_are_refused(setting):
    dictionary, target = random_problem(5, 7, 3, seed=0)
    with pytest.raises(UserError, match="=0"):
        sparse_code(dictionary, target, **setting)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gpu_gives_the_same(dtype):
    dictionary, target = random_problem(60, 80, 30, seed=2, dtype=dtype)
    actual = sparse_code(dictionary.cuda(), target.cuda(), 25).cpu()
    torch.testing.assert_close(actual, sparse_code(dictionary, target, 25), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("locators", ["", "ZipCacheLocator"])
def test_loops_compile_where_no_folder_can_be_written(locators, tmp_path):
    """Numba itself refuses to define a loop when none of its ways to find a folder for its cache works."""
    script = tmp_path / "script.py"
    script.write_text("from cospadi.kernels.compiled import compiled\nprint(compiled(lambda x: x + 1)(2))")
    environment = {**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": locators}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert run.stdout == "3\n", run.stderr
    assert (tmp_path / "__pycache__").exists() == (not locators)
