"""Factorization: budgets are kept and filled, whitening is exact, every method agrees with a slow reference."""

import re
from fractions import Fraction

import hypothesis.strategies as st
import pytest
import references
import torch
from hypothesis import assume, example, given

from cospadi.errors import UserError
from cospadi.factorization import budget
from cospadi.factorization.factors import KINDS, Dense, LowRank, SparseDictionary, rounded, stored_bits
from cospadi.factorization.methods import factorize
from cospadi.factorization.problem import Problem
from cospadi.factorization.settings import (
    ASVDConfig,
    CoSpaDiConfig,
    MagnitudeConfig,
    OATSConfig,
    SparseGPTConfig,
    SVDConfig,
    SVDLLMConfig,
    WandaConfig,
)
from cospadi.factorization.solvers.low_rank import left_singular_vectors, truncated_svd
from cospadi.factorization.solvers.whitening import output_error, unwhiten, weight_error, whitener
from cospadi.packing.bits import pack_bits, unpack_bits

METHODS = {
    "svd": (SVDConfig, {}),
    "svd_llm": (SVDLLMConfig, {}),
    "asvd": (ASVDConfig, {}),
    "cospadi": (CoSpaDiConfig, {}),
    "cospadi_rho_3": (CoSpaDiConfig, {"rho": 3.0}),
    "cospadi_paper": (CoSpaDiConfig, {"accounting": "paper"}),
    "cospadi_rho_auto": (CoSpaDiConfig, {"rho": "auto"}),
    "cospadi_ksvd": (CoSpaDiConfig, {"solver": "ksvd", "n_rounds": 3}),
    "cospadi_free": (CoSpaDiConfig, {"support": "matrix"}),
    "cospadi_plus": (CoSpaDiConfig, {"fixed_atoms": "identity", "support": "matrix"}),
    "cospadi_plus_balanced": (CoSpaDiConfig, {"fixed_atoms": "identity"}),
    "cospadi_sparse": (CoSpaDiConfig, {"fixed_atoms": "identity", "learned_atoms": 0, "support": "matrix"}),
    "compot": (CoSpaDiConfig, {"solver": "orthogonal"}),
    "rocket": (CoSpaDiConfig, {"solver": "one_shot"}),
    "magnitude": (MagnitudeConfig, {}),
    "wanda": (WandaConfig, {}),
    "sparsegpt": (SparseGPTConfig, {}),
    "oats": (OATSConfig, {}),
}
sides = st.integers(1, 90)
ratios = st.floats(0.01, 0.99)
rhos = st.floats(1.0, 6.0)
seeds = st.integers(0, 10**6)


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def low_rank(seed, d_in, d_out, rank):
    return normal(seed, d_in, rank) @ normal(seed + 1, rank, d_out)


def method(name, compression_ratio=0.3, **given_settings):
    config, settings = METHODS[name]
    return config(name=name, title=name, compression_ratio=compression_ratio, **{**settings, **given_settings})


def problem(weight, inputs, damping=0.0):
    return Problem(weight.float(), whitener(inputs.T @ inputs, damping), inputs.abs().mean(dim=0))


def realistic(seed, d_in=48, d_out=64):
    """Inputs and weight whose spectra fall like a power, as in language models, with a few loud channels."""
    fall = torch.arange(1, d_in + 1).double() ** -0.8
    inputs = normal(seed, 300, d_in) * fall @ torch.linalg.qr(normal(seed + 1, d_in, d_in)).Q
    inputs[:, :3] *= 5
    directions, others = torch.linalg.qr(normal(seed + 2, d_in, d_in)).Q, normal(seed + 3, d_in, d_out)
    return directions * torch.arange(1, d_in + 1).double() ** -0.3 @ others, inputs


def error_of(name, weight, inputs, compression_ratio=0.3, **settings):
    factors = factorize(method(name, compression_ratio, **settings), problem(weight, inputs))
    return references.output_error(inputs, weight, factors.weight().double())


# --- budget


@given(sides, sides, st.integers(1, 60), st.integers(1, 60), seeds)
def test_stored_bits_are_those_of_the_stored_arrays(d_in, d_out, atoms, sparsity, seed):
    assume(sparsity <= atoms)
    coefficients = torch.zeros(atoms, d_out)
    rows = torch.rand(d_out, atoms, generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :sparsity].T
    coefficients.scatter_(0, rows, 1.5)
    naive = references.stored_bits_by_storing(torch.ones(d_in, atoms), coefficients)
    assert budget.stored_bits(d_in, d_out, atoms, sparsity) == naive
    assert stored_bits(SparseDictionary(torch.ones(d_in, atoms).half(), coefficients.half())) == naive
    packed = SparseDictionary(torch.ones(d_in, atoms).half(), coefficients.half(), value_bits=14)
    assert budget.stored_bits(d_in, d_out, atoms, sparsity, value_bits=14) == stored_bits(packed) <= naive


@given(sides, sides, ratios, rhos)
@example(29, 57, 0.01, 1.0)
def test_a_budget_is_kept_and_filled(d_in, d_out, ratio, rho):
    allowed = budget.budget_bits(d_in, d_out, ratio)
    try:
        atoms, sparsity = budget.atoms_and_sparsity(d_in, d_out, ratio, rho)
    except UserError:
        # honest refusal: at this rho there is no room for one atom, or for one non-zero per column
        assert allowed < budget.stored_bits(d_in, d_out, 1, 1) * (1 + rho)
        return
    assert 1 <= sparsity <= atoms
    assert budget.stored_bits(d_in, d_out, atoms, sparsity) <= allowed
    assert budget.stored_bits(d_in, d_out, atoms + 1, sparsity) > allowed
    if sparsity < atoms:
        assert budget.stored_bits(d_in, d_out, atoms, sparsity + 1) > allowed


@given(st.integers(64, 512), st.integers(64, 512), st.floats(0.1, 0.6), rhos)
def test_the_asked_atoms_per_nonzero_are_met(d_in, d_out, ratio, rho):
    atoms, sparsity = budget.atoms_and_sparsity(d_in, d_out, ratio, rho)
    per_nonzero_in_atoms = 16 * d_out / (16 * d_in + d_out)
    assert abs(atoms - rho * sparsity) <= rho * (1 + 1 / per_nonzero_in_atoms) + per_nonzero_in_atoms + 1


@given(sides, sides, ratios)
def test_the_rank_is_the_largest_within_the_budget(d_in, d_out, ratio):
    allowed = budget.budget_bits(d_in, d_out, ratio)
    if budget.low_rank_bits(d_in, d_out, 1) > allowed:
        with pytest.raises(UserError, match=r"factorization\.compression_ratio"):
            budget.rank(d_in, d_out, ratio)
        return
    rank = budget.rank(d_in, d_out, ratio)
    assert budget.low_rank_bits(d_in, d_out, rank) <= allowed < budget.low_rank_bits(d_in, d_out, rank + 1)


@given(sides, sides, st.integers(1, 99), st.fractions(1, 2, max_denominator=20))
def test_paper_accounting_is_the_papers_formula_and_stays_within_the_budget(d_in, d_out, percent, rho):
    kept = Fraction(100 - percent, 100)
    naive_atoms = int(kept * d_in * d_out / (d_in + d_out / rho))
    naive_sparsity = int(naive_atoms / rho)
    settings = (d_in, d_out, percent / 100, float(rho), "paper")
    if naive_sparsity < 1:
        with pytest.raises(UserError, match="one atom"):
            budget.atoms_and_sparsity(*settings)
        return
    try:
        atoms, sparsity = budget.atoms_and_sparsity(*settings)
    except UserError:  # only where filling up to bytes takes the one non-zero
        assert budget.stored_bits(d_in, d_out, naive_atoms, 1, 14) > budget.budget_bits(d_in, d_out, percent / 100)
        return
    assert atoms == naive_atoms
    assert naive_sparsity - 1 <= sparsity <= naive_sparsity
    assert budget.stored_bits(d_in, d_out, atoms, sparsity, 14) <= budget.budget_bits(d_in, d_out, percent / 100)
    if d_out % 8 == 0:
        assert sparsity == naive_sparsity  # nothing is filled up: the paper's numbers exactly


def test_budgets_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="one atom with one non-zero") as told:
        budget.atoms_and_sparsity(8, 8, 0.98, rho=2.0)
    assert "factorization.compression_ratio=0.98" in str(told.value)
    with pytest.raises(UserError, match="rank 1"):
        budget.rank(8, 8, 0.98)
    with pytest.raises(UserError, match=r"factorization\.rho=2.*accounting=mask"):
        budget.atoms_and_sparsity(64, 64, 0.2, rho=2.5, accounting="paper")


# --- whitening


@given(st.integers(1, 12), st.integers(1, 9), seeds)
def test_whitening_turns_output_error_into_plain_error(d_in, d_out, seed):
    inputs, weight, approximation = normal(seed, 3 * d_in + 5, d_in), normal(seed + 1, d_in, d_out), None
    approximation = weight + 0.3 * normal(seed + 2, d_in, d_out)
    gram = inputs.T @ inputs
    root = whitener(gram)
    assert root.triu().equal(root)
    torch.testing.assert_close(root.T @ root, gram)
    torch.testing.assert_close(root, references.whitener(gram))
    torch.testing.assert_close((root @ (weight - approximation)).norm(), (inputs @ (weight - approximation)).norm())
    assert output_error(root, weight, approximation) == pytest.approx(
        references.output_error(inputs, weight, approximation)
    )
    torch.testing.assert_close(unwhiten(root, root @ weight), weight)


@given(st.integers(2, 24), seeds, st.floats(-6, 6))
def test_a_gram_that_misses_a_direction_needs_damping(d_in, seed, magnitude):
    inputs = normal(seed, d_in - 1, d_in) * 10**magnitude  # rank d_in - 1; rounding may or may not show it
    with pytest.raises(UserError, match=r"calibration\.damping") as refused:
        whitener(inputs.T @ inputs)
    gram = inputs.T @ inputs
    advised = float(re.search(r"calibration\.damping to (\S+) or more", str(refused.value))[1])
    whitener(gram, damping=advised)
    root = whitener(gram, damping=1e-6)
    torch.testing.assert_close(root.T @ root, gram + 1e-6 * gram.diagonal().mean() * torch.eye(d_in).double())


def test_a_gram_with_a_silent_or_a_doubled_channel_needs_damping():
    inputs = normal(0, 50, 6)
    inputs[:, 2] = 0
    with pytest.raises(UserError, match=r"calibration\.damping"):
        whitener(inputs.T @ inputs)
    inputs[:, 2] = inputs[:, 4]
    with pytest.raises(UserError, match=r"calibration\.damping"):
        whitener(inputs.T @ inputs)
    whitener(inputs.T @ inputs, damping=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gram_that_is_not_finite_is_refused(bad):
    gram = torch.eye(4).double()
    gram[1, 2] = bad
    with pytest.raises(UserError, match="NaN or infinite"):
        whitener(gram, damping=1e-6)


def test_errors_of_zero_weights():
    zero, one = torch.zeros(3, 2), torch.ones(3, 2)
    root = torch.eye(3).double()
    assert (output_error(root, zero, zero), weight_error(zero, zero)) == (0.0, 0.0)
    assert (output_error(root, zero, one), weight_error(zero, one)) == (float("inf"), float("inf"))


# --- low rank


@given(st.integers(1, 20), st.integers(1, 20), st.data())
def test_truncation_is_the_best_of_its_rank(rows, columns, data):
    rank = data.draw(st.integers(1, min(rows, columns)))
    matrix = normal(data.draw(seeds), rows, columns)
    left, right = truncated_svd(matrix, rank)
    assert left.shape == (rows, rank)
    tail = torch.linalg.svdvals(matrix)[rank:].norm()  # Eckart-Young
    torch.testing.assert_close((matrix - left @ right).norm(), tail, rtol=1e-7, atol=1e-9)
    expected = references.svd_llm(matrix, torch.eye(rows).double(), rank)
    torch.testing.assert_close(left @ right, expected, rtol=1e-5, atol=1e-6)
    vectors = left_singular_vectors(matrix, rank)
    torch.testing.assert_close(vectors @ vectors.T @ matrix, expected, rtol=1e-5, atol=1e-6)


@given(st.integers(4, 24), st.integers(4, 24), seeds, st.sampled_from([0.2, 0.4]))
def test_svd_llm_is_the_reference_and_no_svd_is_better_at_the_outputs(d_in, d_out, seed, ratio):
    inputs = normal(seed, 4 * d_in, d_in) * torch.linspace(0.1, 3, d_in)
    weight = normal(seed + 1, d_in, d_out).float().double()
    gram = inputs.T @ inputs
    rank = budget.rank(d_in, d_out, ratio)
    factors = {name: factorize(method(name, ratio), problem(weight, inputs)) for name in ("svd", "svd_llm", "asvd")}
    assert {f.sizes["rank"] for f in factors.values()} == {rank}
    expected = references.svd_llm(weight, gram, rank)
    got = factors["svd_llm"].weight().double()
    assert (got - expected).norm() <= 3e-3 * expected.norm()  # half precision: 2⁻¹¹ per entry of both factors
    errors = {n: references.output_error(inputs, weight, f.weight().double()) for n, f in factors.items()}
    assert errors["svd_llm"] <= min(errors["svd"], errors["asvd"]) + 2e-3
    assert errors["svd_llm"] == pytest.approx(references.output_error(inputs, weight, expected), abs=2e-3)


@given(st.integers(4, 16), st.integers(4, 16), seeds)
def test_asvd_with_equally_loud_channels_is_svd(d_in, d_out, seed):
    weight, inputs = normal(seed, d_in, d_out).float(), torch.eye(d_in).double()
    plain = factorize(method("svd"), problem(weight, inputs))
    for absolute_mean, alpha in ((torch.full((d_in,), 0.37), 0.5), (normal(seed, d_in).abs(), 0.0)):
        scaled = factorize(method("asvd", alpha=alpha), Problem(weight, inputs, absolute_mean))
        torch.testing.assert_close(scaled.weight(), plain.weight(), rtol=1e-2, atol=5e-3)


def test_asvd_is_the_svd_of_the_scaled_weight_and_survives_a_silent_channel():
    weight, absolute_mean = normal(0, 12, 18).float(), normal(1, 12).abs()
    absolute_mean[4] = 0
    factors = factorize(method("asvd", 0.4), Problem(weight, torch.eye(12).double(), absolute_mean))
    assert factors.weight().isfinite().all()
    others = absolute_mean > 0
    scale = absolute_mean[others].sqrt()[:, None]
    left, singular_values, right = torch.linalg.svd(scale * weight[others], full_matrices=False)
    rank = budget.rank(12, 18, 0.4)
    expected = (left[:, :rank] * singular_values[:rank]) @ right[:rank] / scale
    torch.testing.assert_close(factors.weight()[others].double(), expected, rtol=1e-2, atol=5e-3)
    silent = factorize(method("asvd"), Problem(weight, torch.eye(12).double(), torch.zeros(12)))
    assert silent.weight().isfinite().all()


def test_a_rank_search_decides_instead_of_the_ratio():
    weight, root, absolute_mean = normal(0, 12, 18).float(), torch.eye(12).double(), torch.ones(12)
    assert factorize(method("asvd"), Problem(weight, root, absolute_mean, rank=2)).sizes["rank"] == 2
    kept = factorize(method("asvd"), Problem(weight, root, absolute_mean, keep_dense=True))
    assert kept.weight().equal(weight.half().float())
    assert stored_bits(kept) == budget.dense_bits(12, 18)


# --- every method


@pytest.mark.parametrize("name", METHODS)
@given(d_in=st.integers(6, 20), d_out=st.integers(6, 20), seed=seeds, ratio=st.sampled_from([0.1, 0.33, 0.5]))
def test_a_method_stays_within_its_budget(name, d_in, d_out, seed, ratio):
    inputs = normal(seed, 3 * d_in, d_in)
    try:
        factors = factorize(method(name, ratio), problem(normal(seed + 1, d_in, d_out), inputs))
    except UserError as error:
        assert "Choose a smaller ratio" in str(error)  # noqa: PT017 - tiny shapes at half the bits
        return
    assert stored_bits(factors) <= budget.budget_bits(d_in, d_out, ratio)
    assert factors.weight().isfinite().all()
    assert factors.weight().shape == (d_in, d_out)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("loudness", [1e-6, 1.0, 1e6])
def test_a_zero_weight_becomes_zero(name, loudness):
    factors = factorize(method(name), problem(torch.zeros(16, 24), loudness * normal(0, 40, 16)))
    assert factors.weight().equal(torch.zeros(16, 24))


@pytest.mark.parametrize("name", METHODS)
def test_zero_rows_columns_and_repeated_columns_are_ordinary(name):
    weight = normal(0, 16, 24)
    weight[3], weight[:, 5], weight[:, 7] = 0, 0, weight[:, 8]
    factors = factorize(method(name, 0.2), problem(weight, normal(1, 60, 16)))
    assert factors.weight().isfinite().all()
    assert factors.weight()[:, 5].abs().max() < 2e-3
    assert weight_error(weight, factors.weight()) < 0.8


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(name, bad):
    weight = normal(0, 16, 24)
    weight[2, 3] = bad
    with pytest.raises(UserError, match=r"weight holds NaN or infinite"):
        factorize(method(name), problem(weight, normal(1, 60, 16)))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("scale", [1e-5, 1e5])
def test_the_calibration_size_does_not_matter(name, scale):
    weight, inputs = realistic(0, 16, 24)
    assert error_of(name, weight, inputs) == pytest.approx(error_of(name, weight, scale * inputs), abs=0.02)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_deterministic(name):
    weight, inputs = realistic(1, 16, 24)
    first, again = (factorize(method(name), problem(weight, inputs)).tensors() for _ in range(2))
    assert all(first[part].equal(again[part]) for part in first)


@pytest.mark.parametrize("ratio", [0.2, 0.4])
@pytest.mark.parametrize("seed", [0, 10, 20])
def test_cospadi_is_better_than_svd_llm_at_equal_bits(seed, ratio):
    weight, inputs = realistic(seed)
    svd_llm = error_of("svd_llm", weight, inputs, ratio)
    assert error_of("cospadi", weight, inputs, ratio) < 0.95 * svd_llm
    assert error_of("cospadi_ksvd", weight, inputs, ratio, n_rounds=10) < svd_llm
    assert svd_llm < error_of("svd", weight, inputs, ratio)


# --- stored form


@st.composite
def sparse_dictionaries(draw):
    d_in, atoms, d_out = draw(st.integers(1, 9)), draw(st.integers(1, 11)), draw(st.integers(1, 13))
    seed, dtype = draw(seeds), draw(st.sampled_from([torch.float16, torch.bfloat16]))
    coefficients = normal(seed, atoms, d_out) * 10 ** draw(st.floats(-6, 3))
    kept = torch.rand(atoms, d_out, generator=torch.Generator().manual_seed(seed)) < draw(st.floats(0, 1))
    return SparseDictionary.normalized(
        normal(seed + 1, d_in, atoms), coefficients * kept, dtype, draw(st.sampled_from([14, 16]))
    )


@given(sparse_dictionaries())
def test_a_sparse_dictionary_survives_storage(factors):
    d_out = factors.coefficients.shape[1]
    tensors = factors.tensors()
    back = SparseDictionary.from_tensors(tensors | {"d_out": torch.tensor(d_out)})
    assert back.dictionary.equal(factors.dictionary)
    assert back.coefficients.equal(factors.coefficients)
    assert back.coefficients.dtype == factors.coefficients.dtype
    if factors.value_bits == 14 or factors.coefficients.any():
        assert back.value_bits == factors.value_bits
    again = back.tensors()
    assert all(again[part].equal(tensors[part]) for part in tensors)
    n_values = int((factors.coefficients != 0).sum())
    assert stored_bits(factors) == 16 * factors.dictionary.numel() + 8 * sum(
        -(-bits // 8) for bits in (factors.value_bits * n_values, factors.coefficients.numel())
    )
    assert factors.sizes["sparsity"] == int((factors.coefficients != 0).sum(dim=0).max())


@given(sparse_dictionaries())
def test_cut_values_have_two_zero_bits_and_are_below_the_full_ones(factors):
    words = factors.coefficients.contiguous().view(torch.int16)
    if factors.value_bits == 14:
        assert not (words & 3).any()
        full = factors.coefficients.contiguous()
        cut = SparseDictionary.normalized(torch.eye(len(full)), full.float(), full.dtype, 14).coefficients
        assert cut.equal(full)  # cutting what is cut changes nothing


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cutting_goes_towards_zero_by_at_most_three_last_places(dtype):
    values = normal(0, 7, 9)
    full, cut = (
        SparseDictionary.normalized(torch.eye(7).double(), values, dtype, bits).coefficients for bits in (16, 14)
    )
    assert ((full.abs() - cut.abs()) >= 0).all()
    assert ((full - cut).abs() <= 3 * torch.finfo(dtype).eps * full.abs()).all()
    assert (full != cut).any()


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 5), seeds, st.sampled_from([torch.float16, torch.bfloat16]))
def test_dense_and_low_rank_survive_storage(d_in, d_out, rank, seed, dtype):
    left, right = normal(seed, d_in, rank) * 1e3, normal(seed + 1, rank, d_out) * 1e-3
    balanced = LowRank.balanced(left, right, dtype)
    kept = {"atol": 5 * rank * torch.finfo(dtype).eps * float(left.norm() * right.norm()), "rtol": 0}
    torch.testing.assert_close(balanced.weight().double(), left @ right, **kept)
    torch.testing.assert_close(
        balanced.left.float().norm(dim=0), balanced.right.float().norm(dim=1), rtol=0.02, atol=1e-6
    )
    assert stored_bits(balanced) == budget.low_rank_bits(d_in, d_out, rank)
    for factors in (balanced, Dense(rounded(left, dtype))):
        back = KINDS[factors.kind].from_tensors(factors.tensors() | {"d_out": torch.tensor(d_out)})
        assert back.weight().equal(factors.weight())
        assert type(back) is type(factors)


@given(st.lists(st.integers(-(2**15), 2**15 - 1), min_size=0, max_size=20), st.integers(1, 16))
def test_packed_words_come_back_without_their_lower_bits(words, n_bits):
    tensor = torch.tensor(words, dtype=torch.int16)
    packed = pack_bits(tensor, n_bits)
    assert len(packed) == -(-n_bits * len(words) // 8)
    assert unpack_bits(packed, n_bits, len(words)).equal(tensor & -(1 << (16 - n_bits)))


def test_a_zero_value_takes_no_bits():
    coefficients = torch.tensor([[1.0, 0.0, -0.0], [1e-30, 2.0, 0.0]]).double()  # 1e-30 is 0 in half precision
    factors = SparseDictionary.normalized(torch.eye(2).double(), coefficients, torch.float16)
    assert factors.tensors()["values"].tolist() == [1.0, 2.0]
    assert factors.tensors()["mask"].tolist() == [0b00001001]  # bit 0 first


@given(seeds, st.sampled_from([torch.float16, torch.bfloat16]))
def test_rounding_what_is_rounded_changes_nothing(seed, dtype):
    once = rounded(normal(seed, 5, 6), dtype)
    assert rounded(once, dtype).equal(once)
    assert rounded(once.double(), dtype).equal(once)


def test_numbers_beyond_half_precision_are_refused_and_fit_bfloat16():
    weight = 1e9 * normal(0, 12, 16)
    given_problem = problem(weight, normal(1, 40, 12))
    for name in ("svd", "svd_llm", "asvd"):  # two factors share the magnitude
        assert factorize(method(name), given_problem).weight().isfinite().all()
    for name in ("cospadi", "cospadi_ksvd"):
        with pytest.raises(UserError, match=r"factorization\.storage_dtype=bfloat16"):
            factorize(method(name), given_problem)
        wide = factorize(method(name, storage_dtype="bfloat16"), given_problem)
        assert wide.tensors()["dictionary"].dtype == torch.bfloat16
        assert weight_error(weight, wide.weight()) < 0.7
    with pytest.raises(UserError, match=r"calibration\.damping"):
        rounded(torch.tensor([float("nan")]), torch.float16)
