"""Hard thresholding pursuit: every step against its reference, batches, fixed atoms, memory; and its two rivals."""

import hypothesis.strategies as st
import pytest
import references
import torch
from hypothesis import assume, given
from torch.profiler import ProfilerActivity, profile

from cospadi.errors import UserError
from cospadi.factorization import budget
from cospadi.factorization.solvers import htp as htp_module
from cospadi.factorization.solvers.htp import (
    RIDGE,
    Pursuit,
    best_dictionary,
    first_atoms,
    htp,
    htp_batch,
    largest,
    least_squares,
)
from cospadi.factorization.solvers.low_rank import left_singular_vectors
from cospadi.factorization.solvers.one_shot import one_shot
from cospadi.factorization.solvers.orthogonal import orthogonal
from cospadi.factorization.solvers.whitening import whitener

seeds = st.integers(0, 10**6)


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def low_rank(seed, d_in, d_out, rank):
    return normal(seed, d_in, rank) @ normal(seed + 1, rank, d_out)


def realistic(seed, d_in, d_out, dtype=torch.float32):
    fall = torch.arange(1, d_in + 1).double() ** -0.6
    return (torch.linalg.qr(normal(seed, d_in, d_in)).Q * fall @ normal(seed + 1, d_in, d_out)).to(dtype)


@st.composite
def pursuits(draw, dtype=torch.float64):
    d_in, d_out, atoms = draw(st.integers(2, 12)), draw(st.integers(1, 20)), draw(st.integers(1, 24))
    sparsity = draw(st.integers(1, min(atoms, d_in)))
    target = normal(draw(seeds), d_in, d_out)
    if draw(st.booleans()):  # singular targets: fewer directions than atoms
        rank = draw(st.integers(1, min(d_in, d_out)))
        target = low_rank(draw(seeds), d_in, d_out, rank)
    return target.to(dtype), atoms, sparsity


def error(target, dictionary, coefficients):
    target, dictionary, coefficients = target.double(), dictionary.double(), coefficients.double()
    return float((target - dictionary @ coefficients).norm() / target.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(st.data())
def test_htp_keeps_its_promises(dtype, data):
    target, atoms, sparsity = data.draw(pursuits(dtype))
    fit = htp(target, atoms, sparsity, n_rounds=8)
    assert fit.dictionary.shape == (target.shape[0], atoms)
    assert ((fit.coefficients != 0).sum(dim=0) <= sparsity).all()
    norms = fit.dictionary.norm(dim=0)
    assert (((norms - 1).abs() < 1e-5) | (norms == 0)).all()
    noise = 2e-3 if dtype == torch.float32 else 1e-7  # of a difference of squares, where the fit is exact
    assert fit.errors[-1] <= min(fit.errors) + noise
    exact = 1e-5 if dtype == torch.float32 else 1e-12
    assert error(target, fit.dictionary, fit.coefficients) == pytest.approx(fit.errors[-1], abs=exact, rel=1e-4)
    again = htp(target, atoms, sparsity, n_rounds=8)
    assert fit.dictionary.equal(again.dictionary)
    assert fit.coefficients.equal(again.coefficients)


@given(pursuits())
def test_htp_is_no_worse_than_its_start(pursuit):
    target, atoms, sparsity = pursuit
    basis = first_atoms(target[None], atoms, sparsity)[0]
    if atoms <= min(target.shape):  # orthonormal: thresholding is already the best code
        coefficients = references.hard_threshold_columns(basis.T @ target, sparsity)
        fit = htp(target, atoms, sparsity)
        assert error(target, fit.dictionary, fit.coefficients) <= error(target, basis, coefficients) + 1e-6


@given(pursuits(), st.integers(1, 3))
def test_a_round_is_the_reference_round(pursuit, rounds_before):
    target, atoms, sparsity = pursuit
    before = htp(target, atoms, sparsity, n_rounds=rounds_before)
    dictionary, codes = before.dictionary, before.coefficients.T
    gradient = (target - dictionary @ codes.T).T @ dictionary
    moved = codes + 1.7 * gradient
    ordered = moved.abs().sort(dim=1, descending=True).values
    if sparsity < atoms:  # ties are broken either way
        assume((ordered[:, sparsity - 1] - ordered[:, sparsity] > 1e-6).all())
    support = largest(moved, sparsity)
    after = least_squares((dictionary.T @ dictionary)[None], gradient[None], codes[None], support[None], steps=60)[0][0]
    expected = references.htp_round(dictionary, before.coefficients, target, sparsity, step=1.7)
    assert (after[support == 0] == 0).all()
    torch.testing.assert_close(dictionary @ after.T, dictionary @ expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(st.data())
def test_least_squares_goes_down_to_the_reference(dtype, data):
    target, atoms, sparsity = data.draw(pursuits(dtype))
    dictionary = normal(data.draw(seeds), target.shape[0], atoms, dtype=dtype)
    dictionary[:, atoms // 2] = dictionary[:, 0]  # singular on some supports
    dictionary /= dictionary.norm(dim=0)
    gram, correlations = dictionary.T @ dictionary, target.T @ dictionary
    support = largest(normal(data.draw(seeds), target.shape[1], atoms, dtype=dtype), sparsity)
    start = correlations * support
    gradient = correlations - start @ gram
    expected = references.least_squares_on_support(dictionary.double(), target.double(), support.T.bool())
    best = error(target, dictionary, expected)
    slack = 1e-4 if dtype == torch.float32 else 1e-8
    last = error(target, dictionary, start.T)
    for steps in (1, 2, 3, 8, 20, 50, 200):  # far beyond convergence: it must stay there
        codes, residual = (t[0] for t in least_squares(gram[None], gradient[None], start[None], support[None], steps))
        assert (codes[support == 0] == 0).all()
        now = error(target, dictionary, codes.T)
        assert best - slack <= now <= last + slack
        last = now
    conditions = [torch.linalg.cond(dictionary[:, s].double()) for s in support.bool()]
    if max(conditions) < 30:
        torch.testing.assert_close(codes.T.double(), expected, rtol=1e-3, atol=2e-4)
        few, residual = (t[0] for t in least_squares(gram[None], gradient[None], start[None], support[None], steps=2))
        wanted = support * (correlations - few @ gram)
        torch.testing.assert_close(residual, wanted, rtol=1e-3, atol=1e-4)


@given(st.data(), st.integers(1, 4))
def test_learned_atoms_beside_fixed_ones_have_the_inverse_of_all(data, atoms):
    target = data.draw(pursuits(torch.float64))[0]
    fixed = normal(data.draw(seeds), len(target), 2 * len(target), dtype=torch.float64)
    dictionary = normal(data.draw(seeds), len(target), atoms, dtype=torch.float64)
    pursuit = Pursuit(target[None], fixed[None])
    gram = pursuit._gram((dictionary / dictionary.norm(dim=0))[None])
    joint = torch.cat([fixed / fixed.norm(dim=0), dictionary / dictionary.norm(dim=0)], dim=1)
    torch.testing.assert_close(gram[0], joint.T @ joint)
    expected = torch.linalg.inv(joint.T @ joint + RIDGE * torch.eye(joint.shape[1], dtype=torch.float64))
    torch.testing.assert_close(pursuit.inverse(gram)[0], expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))


@given(st.data())
def test_preconditioned_least_squares_go_down_to_the_reference_as_well(data):
    target, atoms, sparsity = data.draw(pursuits(torch.float64))
    dictionary = normal(data.draw(seeds), target.shape[0], atoms, dtype=torch.float64)
    dictionary /= dictionary.norm(dim=0)
    gram, correlations = dictionary.T @ dictionary, target.T @ dictionary
    inverse = torch.linalg.inv(gram + RIDGE * torch.eye(atoms, dtype=torch.float64))
    support = largest(normal(data.draw(seeds), target.shape[1], atoms, dtype=torch.float64), sparsity)
    start = correlations * support
    given_all = (gram[None], (correlations - start @ gram)[None], start[None], support[None])
    expected = references.least_squares_on_support(dictionary, target, support.T.bool())
    best, last = error(target, dictionary, expected), error(target, dictionary, start.T)
    for steps in (1, 2, 3, 8, 50):
        codes = least_squares(*given_all, steps, inverse[None])[0][0]
        assert (codes[support == 0] == 0).all()
        now = error(target, dictionary, codes.T)
        assert best - 1e-8 <= now <= last + 1e-8
        last = now
    if max(torch.linalg.cond(dictionary[:, s]) for s in support.bool()) < 30:
        torch.testing.assert_close(codes.T, expected, rtol=1e-3, atol=2e-4)


def test_on_a_full_support_and_without_a_ridge_one_preconditioned_step_is_all():
    dictionary = normal(0, 12, 8, dtype=torch.float64)
    target = normal(1, 12, 5, dtype=torch.float64)
    gram, correlations = dictionary.T @ dictionary, target.T @ dictionary
    start, support = torch.zeros_like(correlations)[None], torch.ones_like(correlations)[None]
    codes, _ = least_squares(gram[None], correlations[None], start, support, 1, torch.linalg.inv(gram)[None])
    torch.testing.assert_close(codes[0], correlations @ torch.linalg.inv(gram))


@given(pursuits(), seeds)
def test_the_dictionary_is_the_reference_update(pursuit, seed):
    target, atoms, sparsity = pursuit
    codes = normal(seed, target.shape[1], atoms)
    codes *= largest(codes, sparsity)
    dictionary = normal(seed + 1, target.shape[0], atoms)
    dictionary /= dictionary.norm(dim=0)
    products, moments = (target @ codes)[None], (codes.T @ codes)[None]
    improved = best_dictionary(products, moments, dictionary[None])[0]
    assert error(target, improved, codes.T) <= error(target, dictionary, codes.T) + 1e-9
    unused = ~codes.any(dim=0)
    torch.testing.assert_close(improved[:, unused], dictionary[:, unused])
    if len(codes) >= atoms and torch.linalg.cond(codes) < 1e3:
        expected = references.dictionary_update(target, codes.T)
        torch.testing.assert_close(improved @ codes.T, expected @ codes.T, rtol=1e-5, atol=1e-6)


@given(st.integers(2, 12), st.integers(1, 20), seeds, st.integers(0, 4))
def test_enough_atoms_and_no_sparsity_recover_exactly(d_in, d_out, seed, spare):
    rank = min(d_in, d_out, 4)
    target = low_rank(seed, d_in, d_out, rank)
    fit = htp(target, rank + spare, rank + spare)
    assert error(target, fit.dictionary, fit.coefficients) < 1e-6


def test_a_planted_sparse_code_is_found_better_than_by_one_shot():
    planted = normal(0, 16, 24)
    code = (largest(normal(1, 400, 24), 3) * normal(2, 400, 24)).T
    target = planted / planted.norm(dim=0) @ code
    fit = htp(target, 24, 3, n_rounds=40, tolerance=0.0)
    assert fit.errors[-1] < 0.75 * fit.errors[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("d_in", "atoms", "d_out"), [(6, 20, 40), (6, 20, 1), (40, 30, 5), (1, 3, 7)])
def test_more_atoms_than_inputs_or_outputs(d_in, atoms, d_out, dtype):
    target = normal(3, d_in, d_out, dtype=dtype)
    fit = htp(target, atoms, sparsity=1)
    assert fit.dictionary.isfinite().all()
    assert ((fit.coefficients != 0).sum(dim=0) <= 1).all()
    if d_in == 1 or d_out == 1:
        assert fit.errors[-1] < 2e-3


def test_an_overcomplete_start_is_better_than_random_columns():
    target = realistic(0, 32, 200)
    columns = target[:, torch.randperm(200, generator=torch.Generator().manual_seed(1))[:16]]
    random = torch.cat([left_singular_vectors(target, 32), columns / columns.norm(dim=0)], dim=1)
    assert htp(target, 48, 12).errors[0] < htp(target, 48, 12, start=random).errors[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_zero_target_is_coded_by_zeros(dtype):
    fit = htp(torch.zeros(5, 7, dtype=dtype), atoms=9, sparsity=2)
    assert fit.errors[-1] == 0.0
    assert not (fit.dictionary @ fit.coefficients).any()


@given(seeds, st.integers(0, 11))
def test_a_zero_column_gets_zeros(seed, column):
    target = normal(seed, 8, 12)
    target[:, column] = 0
    fit = htp(target, 6, 3)
    assert not fit.coefficients[:, column].any()
    assert fit.dictionary.isfinite().all()


@pytest.mark.parametrize(("atoms", "sparsity"), [(0, 3), (-1, 3), (4, 0)])
def test_counts_that_make_no_sense_are_refused(atoms, sparsity):
    with pytest.raises(UserError, match="at least one atom"):
        htp(normal(0, 8, 12), atoms, sparsity)


def test_inputs_that_are_not_finite_are_named():
    with pytest.raises(UserError, match="start"):
        htp(normal(0, 8, 12), 4, 2, start=normal(1, 8, 4) * float("nan"))
    with pytest.raises(UserError, match="fixed"):
        htp(normal(0, 8, 12), 4, 2, fixed=normal(1, 8, 4) * float("inf"))
    assert htp(normal(0, 8, 12), 4, 2, fixed=None, start=None).errors


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("solve", [htp, one_shot, orthogonal])
def test_a_target_that_is_not_finite_is_refused(solve, bad):
    target = normal(0, 8, 12)
    target[2, 3] = bad
    with pytest.raises(UserError, match="1 of 96 entries of the target are NaN or infinite"):
        solve(target, 6, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 3])
@given(st.data())
def test_the_largest_are_the_largest(dtype, threads, data):
    rows, columns = data.draw(st.sampled_from([1, 5, 200])), data.draw(st.integers(1, 70))
    sparsity = data.draw(st.integers(1, columns + 1))
    values = normal(data.draw(seeds), rows, columns, dtype=dtype) * 10.0 ** data.draw(st.integers(-30, 30))
    values[:, :: data.draw(st.integers(2, 9))] = data.draw(st.sampled_from([0.0, -0.0, 1.0, -float("inf")]))  # ties
    given_values, before = values.clone(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kept = largest(values, sparsity)
    finally:
        torch.set_num_threads(before)
    assert values.equal(given_values)
    assert (kept.sum(dim=1) == min(sparsity, columns)).all()
    expected = references.hard_threshold_columns(torch.where(values == 0, 1e-300, values.abs().double()).T, sparsity).T
    assert kept.equal((expected != 0).to(dtype))
    assert kept.equal(largest(values[None], sparsity)[0])


# --- batches, chunks, precision, memory


def test_a_batch_gives_what_its_members_give():
    targets = torch.stack([realistic(seed, 24, 40) for seed in range(3)])
    targets[2] = 0
    for together, target in zip(htp_batch(targets, 16, 6), targets, strict=True):
        alone = htp(target, 16, 6)
        assert together.errors[-1] == pytest.approx(alone.errors[-1], rel=1e-3)  # each stops by itself
        torch.testing.assert_close(
            together.dictionary @ together.coefficients, alone.dictionary @ alone.coefficients, rtol=1e-2, atol=1e-2
        )


def test_the_rows_worked_on_at_once_do_not_matter(monkeypatch):
    target = realistic(0, 24, 100, torch.float64)
    whole = htp(target, 16, 6)
    monkeypatch.setattr(htp_module, "CPU_ROWS", 7)
    assert htp(target, 16, 6).errors == pytest.approx(whole.errors, rel=1e-6)


def test_single_precision_finds_what_double_finds():
    target = realistic(0, 96, 160, torch.float64)
    assert htp(target.float(), 72, 24).errors[-1] == pytest.approx(htp(target, 72, 24).errors[-1], rel=1e-2)


def test_the_precision_of_other_products_stays_as_it_was():
    settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [setting.fp32_precision for setting in settings]
    htp(normal(0, 8, 12), 6, 3)
    with pytest.raises(UserError):
        htp(normal(0, 8, 12) * float("nan"), 6, 3)
    assert [setting.fp32_precision for setting in settings] == before


def test_progress_tells_rounds_and_errors():
    told = []
    fit = htp(realistic(0, 24, 40), 16, 6, n_rounds=5, tolerance=0.0, progress=lambda *heard: told.append(heard))
    assert [done for done, _ in told] == list(range(6))
    assert [error for _, error in told] == list(fit.errors[:-1])


def peak_bytes(call):
    """Most bytes that tensors allocated inside ``call`` held at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    held = peak = 0
    for event in sorted(record.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize(("d_in", "d_out"), [(192, 512), (512, 512), (768, 288), (384, 128)])
def test_memory_is_at_most_six_times_the_weight(d_in, d_out):
    target = realistic(0, d_in, d_out)
    atoms, sparsity = budget.atoms_and_sparsity(d_in, d_out, 0.2, rho=3.0)
    peak = peak_bytes(lambda: htp(target, atoms, sparsity, n_rounds=3))
    size = target.numel() * target.element_size()
    assert 0 < peak + size <= 6 * size


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_what_the_cpu_finds():
    targets = torch.stack([realistic(seed, 96, 160) for seed in range(3)])
    for here, there in zip(htp_batch(targets, 72, 24), htp_batch(targets.cuda(), 72, 24), strict=True):
        assert there.errors[-1] == pytest.approx(here.errors[-1], rel=1e-2)


# --- fixed atoms


def identity_problem(seed, d_in=24, d_out=40):
    """A whitener of correlated inputs, a weight, and their product: the identity's atoms are the whitener's columns."""
    inputs = normal(seed, 4 * d_in, d_in) @ normal(seed + 1, d_in, d_in)
    root, weight = whitener(inputs.T @ inputs), normal(seed + 2, d_in, d_out)
    scale = (root @ weight).norm() / weight.numel() ** 0.5
    return root / scale, weight, root @ weight / scale


@given(seeds, st.integers(1, 10))
def test_fixed_atoms_alone_are_least_squares_on_a_support(seed, sparsity):
    root, weight, target = identity_problem(seed, 10, 14)
    fit = htp(target, 0, sparsity, fixed=root, fixed_codes=weight.T, cg_steps=60, final_cg_steps=60)
    assert fit.dictionary.shape == (10, 0)
    assert ((fit.coefficients != 0).sum(dim=0) <= sparsity).all()
    expected = references.least_squares_on_support(root, target, fit.coefficients != 0)
    assert error(target, root, fit.coefficients) == pytest.approx(error(target, root, expected), rel=1e-3, abs=1e-6)
    kept = weight.abs() * root.norm(dim=0)[:, None] if sparsity < 10 else weight.abs()
    wanda = references.least_squares_on_support(
        root, target, references.hard_threshold_columns(kept, sparsity) != 0
    )  # magnitude times the length of the atom: where it starts, and it never leaves a column worse
    assert error(target, root, fit.coefficients) <= error(target, root, wanda) * (1 + 1e-3) + 1e-6


def test_learned_atoms_beside_fixed_ones_lower_the_error_of_either_alone():
    root, weight, target = identity_problem(3)
    joint = htp(target, 6, 10, fixed=root, fixed_codes=weight.T, cg_steps=6, last_step=0.7)
    assert joint.coefficients.shape == (24 + 6, 40)
    assert error(target, torch.cat([root, joint.dictionary], dim=1), joint.coefficients) == pytest.approx(
        joint.errors[-1], rel=1e-4
    )
    fixed_only = htp(target, 0, 10, fixed=root, fixed_codes=weight.T, cg_steps=6)
    learned_only = htp(target, 6, 6)
    assert joint.errors[-1] < min(fixed_only.errors[-1], learned_only.errors[-1])


def test_the_length_of_a_fixed_atom_does_not_matter():
    root, weight, target = identity_problem(4)
    scale = 10 ** torch.linspace(-3, 3, 24, dtype=torch.float64)
    plain = htp(target, 4, 8, fixed=root, fixed_codes=weight.T)
    scaled = htp(target, 4, 8, fixed=root * scale, fixed_codes=weight.T / scale)
    torch.testing.assert_close(scaled.coefficients[:24] * scale[:, None], plain.coefficients[:24], rtol=1e-6, atol=1e-9)


# --- the comparisons


@given(pursuits())
def test_orthogonal_never_rises_and_stays_orthonormal(pursuit):
    target, atoms, sparsity = pursuit
    if atoms > len(target):
        with pytest.raises(UserError, match="cannot be orthonormal"):
            orthogonal(target, atoms, sparsity)
        return
    fit = orthogonal(target, atoms, sparsity, n_rounds=6)
    assert all(later <= earlier + 1e-9 for earlier, later in zip(fit.errors, fit.errors[1:], strict=False))
    torch.testing.assert_close(fit.dictionary.T @ fit.dictionary, torch.eye(atoms).double(), rtol=0, atol=1e-8)
    expected = references.hard_threshold_columns(fit.dictionary.T @ target, sparsity)
    torch.testing.assert_close(fit.coefficients, expected)
    assert error(target, fit.dictionary, fit.coefficients) == pytest.approx(fit.errors[-1], abs=1e-9)


@given(pursuits())
def test_one_shot_is_thresholding_and_a_ridge(pursuit):
    target, atoms, sparsity = pursuit
    fit = one_shot(target, atoms, sparsity)
    assert (fit.coefficients != 0).sum() <= sparsity * target.shape[1]
    assert fit.dictionary.shape[1] == atoms
    assert error(target, fit.dictionary, fit.coefficients) == pytest.approx(fit.errors[-1], abs=1e-7)
    shortest = min(*target.shape, atoms)
    basis = left_singular_vectors(target, shortest)
    if round(0.005 * shortest) == 0:
        codes = references.hard_threshold_columns(basis.T @ target, min(sparsity, shortest))
        moments = codes @ codes.T
        expected = references.dictionary_update(target, codes, 1e-3 * float(moments.diagonal().mean()))
        if error(target, expected, codes) < error(target, basis, codes):  # else the basis itself is better
            torch.testing.assert_close(fit.dictionary @ fit.coefficients, expected @ codes, rtol=1e-4, atol=1e-5)
        assert fit.errors[-1] <= error(target, basis, codes) + 1e-9


def test_one_shot_weighs_coefficients_by_the_weights_they_stand_for():
    root, weight, target = identity_problem(5, 24, 400)
    plain, weighted = one_shot(target, 20, 8), one_shot(target, 20, 8, whitener=root)

    def in_weights(fit):
        return (weight - torch.linalg.solve_triangular(root, fit.dictionary @ fit.coefficients, upper=True)).norm()

    assert plain.errors[-1] < weighted.errors[-1]
    assert in_weights(weighted) < in_weights(plain)
