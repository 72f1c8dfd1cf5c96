"""Magnitude, Wanda, SparseGPT: what their papers say, at no more bits than every other method has."""

import hypothesis.strategies as st
import pytest
import references
import torch
from hypothesis import assume, given

from cospadi.checkpoint.specs import layer_of
from cospadi.errors import UserError
from cospadi.factorization import budget
from cospadi.factorization.factors import SparseDictionary, stored_bits
from cospadi.factorization.methods import factorize
from cospadi.factorization.problem import Problem
from cospadi.factorization.settings import MagnitudeConfig, SparseGPTConfig, WandaConfig
from cospadi.factorization.solvers import pruning
from cospadi.factorization.solvers.whitening import whitener
from cospadi.settings import load

CONFIGS = {"magnitude": MagnitudeConfig, "wanda": WandaConfig, "sparsegpt": SparseGPTConfig}
PATTERNS = ((2, 4), (1, 4), (4, 8), (1, 3), (3, 5))
seeds = st.integers(0, 10**6)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def method(name, compression_ratio=0.3, **settings):
    return CONFIGS[name](name=name, title=name, compression_ratio=compression_ratio, **settings)


def problem(weight, inputs, damping=0.0):
    return Problem(weight.float(), whitener(inputs.T @ inputs, damping), inputs.abs().mean(dim=0))


def some_problem(seed, d_in, d_out):
    """Inputs that are loud and quiet and depend on each other, as in language models."""
    inputs = normal(seed, 4 * d_in, d_in) @ normal(seed + 1, d_in, d_in) * torch.linspace(0.2, 4, d_in)
    return normal(seed + 2, d_in, d_out), inputs


# --- each is what its paper says


@given(st.integers(1, 20), st.integers(1, 20), seeds, st.data())
def test_magnitude_keeps_the_largest_of_the_whole_matrix(d_in, d_out, seed, data):
    weight, count = normal(seed, d_in, d_out), data.draw(st.integers(1, d_in * d_out))
    kept = pruning.keep_largest(weight, count)
    smallest = weight.abs().flatten().sort(descending=True).values[count - 1]
    assert kept.equal(torch.where(weight.abs() >= smallest, weight, 0.0))


@given(st.integers(1, 16), st.integers(1, 16), seeds, st.data())
def test_wanda_is_the_naive_loop(d_in, d_out, seed, data):
    weight, inputs = some_problem(seed, d_in, d_out)
    count = data.draw(st.integers(1, d_in))
    assert pruning.wanda(weight, inputs.norm(dim=0), count).equal(references.wanda(inputs, weight, count))


def test_the_norms_of_the_inputs_come_out_of_the_whitener():
    weight, inputs = some_problem(0, 12, 5)
    torch.testing.assert_close(problem(weight, inputs).input_norms, inputs.norm(dim=0))


@given(st.integers(1, 14), st.integers(1, 6), seeds, st.sampled_from([1, 3, 4, 128]), st.data())
def test_sparsegpt_is_the_textbook_brain_surgeon(d_in, d_out, seed, block_size, data):
    weight, inputs = some_problem(seed, d_in, d_out)
    gram, total = inputs.T @ inputs, data.draw(st.integers(0, d_in * d_out))

    def choose(costs, first):
        last = first + len(costs)
        share = total * last // d_in - total * first // d_in
        kept = torch.zeros(costs.numel(), dtype=torch.bool)
        kept[costs.flatten().argsort(descending=True)[:share]] = True
        return kept.view(costs.shape)

    found = pruning.sparsegpt(weight, gram, total, block_size=block_size, damping=0.01)
    expected = references.sparsegpt(weight, gram, choose, block_size, damping=0.01)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert int((found != 0).sum()) == total


@given(st.integers(1, 5), st.integers(1, 5), seeds, st.sampled_from(PATTERNS), st.integers(1, 3))
def test_sparsegpt_with_a_pattern_is_the_textbook_brain_surgeon(groups, d_out, seed, pattern, groups_per_block):
    kept, group = pattern
    weight, inputs = some_problem(seed, groups * group, d_out)
    gram = inputs.T @ inputs

    def choose(costs, _):
        return references.hard_threshold_columns(costs, kept) != 0

    found = pruning.sparsegpt(weight, gram, 0, pattern, groups_per_block * group, 0.02)
    torch.testing.assert_close(found, references.sparsegpt(weight, gram, choose, group, 0.02), rtol=1e-6, atol=1e-8)


@given(st.integers(2, 14), st.integers(1, 6), seeds)
def test_inputs_that_do_not_depend_on_each_other_make_up_for_nothing(d_in, d_out, seed):
    weight, loudness = normal(seed, d_in, d_out), normal(seed + 1, d_in).abs() + 0.1
    total = d_in * d_out // 2
    found = pruning.sparsegpt(weight, loudness.square().diag(), total, damping=0.0)
    torch.testing.assert_close(found, pruning.keep_largest(weight * loudness[:, None], total) / loudness[:, None])


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_the_more_a_method_looks_at_the_better_its_outputs(seed):
    weight, inputs = some_problem(seed, 64, 48)

    def error(name, **settings):
        factors = factorize(method(name, 0.4, **settings), problem(weight, inputs))
        return references.output_error(inputs, weight, factors.weight().double())

    assert error("sparsegpt") < 0.9 * error("wanda")
    assert error("wanda") < error("magnitude")
    for name in ("wanda", "sparsegpt"):
        assert error(name) < error(name, pattern="2:4")
    assert error("sparsegpt", pattern="2:4") < error("wanda", pattern="2:4")


def test_a_silent_input_is_pruned_first():
    weight, inputs = some_problem(3, 16, 8)
    inputs[:, 5] = 0
    for config in (method("wanda"), method("sparsegpt", damping=0.0)):
        assert factorize(config, problem(weight, inputs, damping=1e-6)).weight()[5].abs().max() == 0


# --- bits


@pytest.mark.parametrize("name", CONFIGS)
@given(d_in=st.integers(1, 40), d_out=st.integers(1, 40), seed=seeds, ratio=st.floats(0.01, 0.95))
def test_a_budget_is_kept_and_filled(name, d_in, d_out, seed, ratio):
    weight, inputs = some_problem(seed, d_in, d_out)
    allowed = budget.budget_bits(d_in, d_out, ratio)
    equal_counts = name == "wanda"
    try:
        factors = factorize(method(name, ratio), problem(weight, inputs, damping=1e-6))
    except UserError as error:
        assert "Choose a smaller ratio" in str(error)  # noqa: PT017 - the mask alone takes all there is
        assert allowed < budget.sparse_bits(d_in, d_out, d_out if equal_counts else 1)
        return
    bits = stored_bits(factors)
    assert bits <= allowed < bits + 16 * (d_out if equal_counts else 1)
    assert bits == budget.sparse_bits(d_in, d_out, int((factors.weight() != 0).sum()))
    if equal_counts:
        assert len(set((factors.weight() != 0).sum(dim=0).tolist())) == 1


@given(st.integers(1, 30), st.integers(1, 30), seeds, st.sampled_from([torch.float16, torch.bfloat16]))
def test_a_sparse_weight_survives_storage_and_is_its_layer(d_in, d_out, seed, dtype):
    weight = pruning.keep_largest(normal(seed, d_in, d_out), (d_in * d_out + 1) // 2)
    factors = SparseDictionary.of_sparse_weight(weight, dtype)
    assert factors.weight().equal(weight.to(dtype).float())
    back = SparseDictionary.from_tensors(factors.tensors() | {"d_out": torch.tensor(d_out)})
    assert back.identity
    assert back.weight().equal(factors.weight())
    layer, inputs = layer_of(factors), normal(seed + 1, 3, d_in).float()
    assert layer.spec["atoms"] == 0
    with torch.inference_mode():
        torch.testing.assert_close(layer(inputs), inputs @ factors.weight(), rtol=1e-4, atol=1e-4)


# --- N:M


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
@given(groups=st.integers(1, 6), d_out=st.integers(1, 12), seed=seeds, pattern=st.sampled_from(PATTERNS))
def test_a_pattern_holds_in_every_group_of_every_output(name, groups, d_out, seed, pattern):
    kept, group = pattern
    d_in = groups * group
    weight, inputs = some_problem(seed, d_in, d_out)
    config = method(name, 0.05, pattern=f"{kept}:{group}", **({"block_size": 2 * group} if name == "sparsegpt" else {}))
    assume(budget.sparse_bits(d_in, d_out, groups * kept * d_out) <= budget.budget_bits(d_in, d_out, 0.05))
    found = factorize(config, problem(weight, inputs, damping=1e-6)).weight()
    counts = (found.T.reshape(d_out, groups, group) != 0).sum(dim=2)
    assert (counts == kept).all()
    if name == "wanda":
        scores = (weight.float().abs() * inputs.norm(dim=0)[:, None]).T.reshape(-1, group)
        lost = torch.where((found.T.reshape(-1, group) != 0), 0.0, scores).amax(dim=1)
        assert (torch.where(found.T.reshape(-1, group) != 0, scores, torch.inf).amin(dim=1) >= lost - 1e-6).all()


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_2_4_takes_nine_bits_a_weight_and_fits_0_4375_exactly(name):
    weight, inputs = some_problem(0, 16, 24)
    factors = factorize(method(name, 0.4375, pattern="2:4"), problem(weight, inputs))
    assert stored_bits(factors) == 9 * weight.numel() == budget.budget_bits(16, 24, 0.4375)
    assert stored_bits(factorize(method(name, 0.2, pattern="2:4"), problem(weight, inputs))) == 9 * weight.numel()


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_a_pattern_that_does_not_fit_the_budget_is_refused_with_the_ratio_that_does(name):
    with pytest.raises(UserError, match=r"factorization\.pattern=2:4 removes 0\.4375 .*ratio=0\.5 .*0\.4375 or less"):
        method(name, 0.5, pattern="2:4")
    with pytest.raises(UserError, match=r"the ratio to 0\.2708 or less"):
        method(name, 0.28, pattern="2:3", **({"block_size": 3} if name == "sparsegpt" else {}))
    weight, inputs = some_problem(0, 4, 1)  # 4 mask bits fill a byte: the exact check is per shape
    with pytest.raises(UserError, match=r"the ratio to 0\.375 or less"):
        factorize(method(name, 0.4, pattern="2:4"), problem(weight, inputs))
    assert stored_bits(factorize(method(name, 0.375, pattern="2:4"), problem(weight, inputs))) == 40


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_inputs_that_do_not_divide_into_groups_are_refused(name):
    weight, inputs = some_problem(0, 18, 8)
    with pytest.raises(UserError, match=r"18 inputs .* groups of 4, as factorization\.pattern=2:4"):
        factorize(method(name, pattern="2:4"), problem(weight, inputs))


# --- settings


@pytest.mark.parametrize("pattern", ["2", "2:4:8", "a:b", "0:4", "4:2", "4:4", "2:0", "15:16", "124"])
def test_what_is_no_pattern_is_refused(pattern):
    with pytest.raises(UserError, match=rf"factorization\.pattern={pattern}"):
        method("wanda", 0.01, pattern=pattern)


def test_a_block_that_would_cut_a_group_is_refused():
    with pytest.raises(UserError, match=r"factorization\.block_size=10 is not a multiple of the 4.*Set it to 8"):
        method("sparsegpt", pattern="2:4", block_size=10)


def test_patterns_come_from_files_and_the_command_line():
    composed = load(["factorization=wanda_2_4"]).factorization
    assert (composed.pattern, composed.compression_ratio, composed.kept_of_group) == ("2:4", 0.4375, (2, 4))
    assert load(["factorization=sparsegpt", "factorization.pattern=1:4"]).factorization.kept_of_group == (1, 4)
    with pytest.raises(UserError, match=r"0\.4375 or less"):
        load(["factorization=sparsegpt_2_4", "factorization.compression_ratio=0.5"])
