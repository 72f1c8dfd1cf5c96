"""Identity atoms beside learned ones: its two ends, its search, and supports that are free across the matrix."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import references
import torch
from hypothesis import given

from cospadi.api import configured
from cospadi.errors import UserError
from cospadi.factorization import budget, search
from cospadi.factorization.factors import SparseDictionary, stored_bits
from cospadi.factorization.methods import factorize, factorize_groups
from cospadi.factorization.problem import Problem
from cospadi.factorization.settings import LEARNED_FRACTIONS, PROBE_ROUNDS, CoSpaDiConfig
from cospadi.factorization.solvers.htp import htp, htp_batch
from cospadi.factorization.solvers.solution import Solution
from cospadi.factorization.solvers.whitening import output_error, whitener
from cospadi.settings import load

seeds = st.integers(0, 10**6)


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def problem(seed, d_in=32, d_out=48, rank=None):
    """Correlated inputs; a weight that is noise, or (with ``rank``) mostly of low rank."""
    fall = torch.arange(1, d_in + 1).double() ** -0.6
    inputs = normal(seed, 8 * d_in, d_in) * fall @ torch.linalg.qr(normal(seed + 1, d_in, d_in)).Q
    weight = normal(seed + 2, d_in, d_out)
    if rank is not None:
        weight = normal(seed + 2, d_in, rank) @ normal(seed + 3, rank, d_out) + 0.1 * weight
    return Problem(weight.float(), whitener(inputs.T @ inputs), inputs.abs().mean(dim=0))


def plus(compression_ratio=0.4, **settings):
    given = {"fixed_atoms": "identity", "support": "matrix", "name": "plus", "title": "plus", "first_step": 2.6}
    given |= {"last_step": 0.7, "cg_steps": 8}
    return CoSpaDiConfig(compression_ratio=compression_ratio, **given | settings)


def error_of(problem, factors):
    return output_error(problem.whitener, problem.weight, factors.weight())


@pytest.mark.parametrize("support", ["column", "matrix"])
@given(seed=seeds, compression_ratio=st.floats(0.15, 0.6))
def test_without_learned_atoms_values_are_least_squares_on_their_support(support, seed, compression_ratio):
    given = problem(seed, 16, 24)
    factors = factorize(plus(compression_ratio, learned_atoms=0, support=support), given)
    assert factors.dictionary.shape == (16, 0)
    chosen = factors.coefficients != 0
    target = given.whitener @ given.weight.double()
    best = references.least_squares_on_support(given.whitener, target, chosen)
    lowest = float((target - given.whitener @ best).norm() / target.norm())
    assert error_of(given, factors) <= lowest * 1.02 + 1e-3  # conjugate gradients stop; values are rounded to 16 bits


@given(seed=seeds, rank=st.sampled_from([None, 2, 6]), support=st.sampled_from(["column", "matrix"]))
def test_learned_atoms_are_kept_only_where_they_lower_the_error(seed, rank, support):
    given = problem(seed, rank=rank)
    searched = factorize(plus(support=support), given)
    none = factorize(plus(support=support, learned_atoms=0), given)
    assert error_of(given, searched) <= error_of(given, none) * (1 + 1e-3)
    assert stored_bits(searched) <= budget.budget_bits(*given.weight.shape, 0.4)


def test_a_weight_of_low_rank_gets_learned_atoms_and_a_sparse_one_none():
    config = plus(0.6)
    assert factorize(config, problem(0, 64, 96, rank=3)).dictionary.shape[1] > 0
    given = problem(1, 64, 96)
    sparse = replace(given, weight=given.weight * (normal(2, 64, 96) > 0.8).float())
    found = factorize(config, sparse)
    assert found.dictionary.shape[1] == 0
    assert error_of(sparse, found) < 1e-3


@given(seed=seeds, fraction=st.sampled_from([0.0, 0.05, 0.125, 0.25]), compression_ratio=st.floats(0.1, 0.5))
def test_the_budget_is_spent_to_the_last_value(seed, fraction, compression_ratio):
    given = problem(seed)
    factors = factorize(plus(compression_ratio, learned_atoms=fraction, n_rounds=2), given)
    allowed = budget.budget_bits(*given.weight.shape, compression_ratio)
    zeros_among_kept = 16 * 4  # a value may round to zero
    assert allowed - 16 - 8 - zeros_among_kept <= stored_bits(factors) <= allowed


@given(seed=seeds)
def test_free_supports_hold_as_many_values_and_fit_better(seed):
    given = problem(seed)
    loud = Problem(
        given.weight * (torch.arange(48) % 4 == 0).float().mul(9).add(1), given.whitener, given.absolute_mean
    )
    column, matrix = (factorize(plus(support=s, learned_atoms=0), loud) for s in ("column", "matrix"))
    per_column = (column.coefficients != 0).sum(dim=0)
    assert per_column.max() - per_column.min() <= 1
    counts = (matrix.coefficients != 0).sum(dim=0)
    assert counts[::4].float().mean() > counts[1::4].float().mean()
    assert 0 <= int(counts.sum()) - int(per_column.sum()) < 48
    assert error_of(loud, matrix) < error_of(loud, column)


def test_a_batch_gives_what_its_members_give_alone():
    problems = [problem(seed, rank=rank) for seed, rank in ((0, 2), (10, None), (20, 5))]
    targets = torch.stack([(p.whitener @ p.weight.double()).float() for p in problems])
    fixed = torch.stack([p.whitener.float() for p in problems])
    weights = torch.stack([p.weight for p in problems])
    settings = {"n_rounds": 6, "balanced": False, "tolerance": 0.0}
    together = search.beside_identity(targets, fixed, weights, 0.4, LEARNED_FRACTIONS, settings)
    for i in range(3):
        one = slice(i, i + 1)
        alone = search.beside_identity(targets[one], fixed[one], weights[one], 0.4, LEARNED_FRACTIONS, settings)[0]
        assert alone.errors[-1] == pytest.approx(together[i].errors[-1], rel=0.03)


def test_the_size_of_a_matrix_is_not_that_of_its_batch():
    errors = {0: (5.0, 6.0, 4.0, 1.0), 1: (5.0, 4.0, 3.0, 3.5), 2: (5.0, 4.0, 4.0, 1.0)}

    def solve(which, size, n_rounds):
        assert n_rounds == PROBE_ROUNDS
        return [Solution(torch.zeros(1, 1), torch.zeros(1, 1), [errors[i][size[0]]]) for i in which]

    sizes = [(0, 1.0), (1, 1.0), (2, 1.0), (3, 1.0)]
    assert search._probed(3, sizes, solve) == ([0, 2, 1], [5.0, 3.0, 4.0])
    for i in range(3):
        alone = search._probed(1, sizes, lambda which, *rest, i=i: solve([i], *rest))
        assert alone == ([[0, 2, 1][i]], [[5.0, 3.0, 4.0][i]])


def test_free_supports_also_serve_dictionaries_without_fixed_atoms():
    given = problem(3)
    target = (given.whitener @ given.weight.double()).float()
    for sparsity in (3, 3.5):
        fit = htp(target, 20, sparsity, balanced=False)
        assert int((fit.coefficients != 0).sum()) <= round(sparsity * 48)
    with pytest.raises(UserError, match="non-zero"):
        htp_batch(target[None], 20, 0.5, balanced=False)


def test_one_size_that_fits_is_taken_and_none_is_an_error():
    tiny = problem(0, 4, 4)
    assert factorize(plus(0.5), tiny).dictionary.shape == (4, 0)
    with pytest.raises(UserError, match=r"compression_ratio=0\.9"):
        factorize(plus(0.9), tiny)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"solver": "ksvd"}, "fixed_atoms=identity needs factorization.solver=htp"),
        ({"accounting": "paper"}, "accounting=mask"),
        ({"fixed_atoms": "dct"}, "factorization.fixed_atoms"),
        ({"support": "row"}, "factorization.support"),
        ({"learned_atoms": 1.5}, "learned_atoms=1.5 is not a fraction"),
        ({"learned_atoms": "many"}, "learned_atoms=many is not a fraction"),
    ],
)
def test_settings_that_make_no_sense_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        plus(**setting)


def test_the_configurations_are_what_their_names_say():
    names = ("cospadi_plus", "cospadi_fast", "cospadi_outputs", "cospadi_outputs_private", "cospadi_sparse")
    of = {name: load([f"factorization={name}"]).factorization for name in names}
    assert all(config.fixed_atoms == "identity" for config in of.values())
    assert {name: config.learned_atoms for name, config in of.items()} == dict(
        zip(names, (1 / 16, 0.0, "auto", "auto", 0.0), strict=True)
    )
    assert [name for name in names if of[name].objective == of[name].allocation == "loss"] == list(names[:2])
    assert [name for name in names if of[name].shares] == ["cospadi_outputs"]


def test_settings_that_are_not_read_change_nothing():
    assert plus(rho=3) == plus()
    learned_only = {"fixed_atoms": "none", "support": "column"}
    assert plus(learned_atoms=0.1, **learned_only) == plus(**learned_only)
    with pytest.raises(UserError, match=r"factorization\.rho has no effect on cospadi_plus"):
        configured("tiny_llama", ["factorization=cospadi_plus", "factorization.rho=3"], None)


def test_nothing_is_lost_between_factors_and_file():
    given = problem(5, rank=3)
    for (factors,) in factorize_groups(plus(), [[given], [given]]):
        tensors = factors.tensors() | {"d_out": torch.tensor(48)}
        again = SparseDictionary.from_tensors(tensors)
        assert again.identity
        assert again.weight().equal(factors.weight())
