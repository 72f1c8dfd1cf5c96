"""Fewer bits: packing that loses nothing, rounding that only helps, layers that compute what was measured."""

import itertools
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import references
import torch
from hypothesis import given, settings

from cospadi.checkpoint.specs import layer_of
from cospadi.errors import UserError
from cospadi.factorization.factors import KINDS, Dense, stored_bits
from cospadi.factorization.files import FactorsFile, read_factors
from cospadi.factorization.methods import factorize, factorize_groups
from cospadi.factorization.problem import Problem
from cospadi.factorization.settings import CoSpaDiConfig, OATSConfig, PlainConfig, SVDLLMConfig, WandaConfig
from cospadi.factorization.solvers.whitening import output_error
from cospadi.packing.formats import FORMATS, TRUNCATED, Format, bits_of, format_of, packed_bytes
from cospadi.packing.matrix import Quantized, by_row, decoded, encoded, nearest, pack, unpack
from cospadi.quantization import methods
from cospadi.quantization.methods import quantize
from cospadi.quantization.rounding import Rounding, _codes, quantized
from cospadi.quantization.settings import QuantizationConfig
from cospadi.settings import load

WHOLE = [name for name, form in FORMATS.items() if form.is_whole]


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(seed, size):
    """A gram with strong correlations, as activations have them."""
    x = normal(seed, 3 * size, size) + 2 * normal(seed + 1, 3 * size, 1)
    return x.T @ x


def problem(seed=0, d_in=48, d_out=40):
    return Problem(normal(seed, d_in, d_out) / 7, references.whitener(correlated(seed, d_in)), torch.ones(d_in))


def quantization(name="int4", **more):
    given = {"dictionary": name, "values": name, "group_size": 32} | more
    return QuantizationConfig(name="q", title="q", **given)


FACTORIZATIONS = {
    "cospadi": CoSpaDiConfig(name="c", title="", compression_ratio=0.3, n_rounds=3),
    "plus": CoSpaDiConfig(
        name="p", title="", compression_ratio=0.3, n_rounds=3, fixed_atoms="identity", learned_atoms=0.25
    ),
    "wanda": WandaConfig(name="w", title="", compression_ratio=0.3),
    "svd_llm": SVDLLMConfig(name="s", title="", compression_ratio=0.3),
    "oats": OATSConfig(name="o", title="", compression_ratio=0.3, n_rounds=3),
    "plain": PlainConfig(name="plain", title=""),
}


# --- packing


def codes_of(name, seed, *shape):
    if name == "float8":
        return (normal(seed, *shape) * 100).to(torch.float8_e4m3fn)
    low, high = format_of(name).lowest, format_of(name).highest
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(int(low), int(high) + 1, shape, generator=generator).to(torch.int8)


def raw(codes):
    return codes.contiguous().view(torch.uint8)


@pytest.mark.parametrize("name", FORMATS)
@given(shape=st.tuples(st.integers(0, 5), st.integers(0, 41)), seed=st.integers(0, 99))
def test_unpacking_gives_back_what_was_packed(name, shape, seed):
    codes = codes_of(name, seed, *shape)
    packed = pack(codes, name)
    assert packed.dtype == torch.uint8
    assert packed.shape == (shape[0], packed_bytes(name, shape[1]))
    assert torch.equal(raw(unpack(packed, name, shape[1])), raw(codes))
    row = codes.flatten()
    assert torch.equal(raw(unpack(pack(row, name), name, len(row))), raw(row))


@pytest.mark.parametrize("name", WHOLE)
def test_every_code_survives(name):
    low, high = (int(format_of(name).lowest), int(format_of(name).highest))
    codes = torch.arange(low, high + 1, dtype=torch.int8)
    assert torch.equal(unpack(pack(codes, name), name, len(codes)), codes)


@pytest.mark.parametrize("kind", FACTORIZATIONS)
@pytest.mark.parametrize("name", ["int8", "int5", "int4", "float8"])
def test_factors_come_back_from_their_tensors_and_take_the_bits_that_are_counted(kind, name):
    task = problem(d_in=45, d_out=37)
    (found,) = quantize(quantization(name), [factorize(FACTORIZATIONS[kind], task)], [task])
    tensors = {part: tensor.clone() for part, tensor in found.tensors().items()}
    back = KINDS[found.kind].from_tensors({**tensors, "d_out": torch.tensor(37)}, found.formats)
    assert torch.equal(back.weight(), found.weight())
    assert stored_bits(back) == stored_bits(found) == 8 * sum(t.numel() * t.element_size() for t in tensors.values())
    assert stored_bits(found) < stored_bits(factorize(FACTORIZATIONS[kind], task))
    assert found.value_bits == bits_of(name)


def test_bits_of_quantized_values_are_codes_scales_and_the_mask():
    task = problem(d_in=64, d_out=40)
    before = factorize(FACTORIZATIONS["plus"], task)
    (found,) = quantize(quantization("int4"), [before], [task])
    n, atoms = int(found.mask.sum()), before.dictionary.shape[1]
    values = 8 * packed_bytes("int4", n) + 16 * 40 * -(-(64 + atoms) // 32)
    dictionary = 8 * 64 * packed_bytes("int4", atoms) + 16 * 2 * atoms
    assert stored_bits(found) == values + dictionary + (64 + atoms) * 40


# --- rounding


roundings = st.builds(
    Rounding,
    format=st.sampled_from(["int2", "int3", "int4", "int8", "float8"]),
    group_size=st.sampled_from([32, 64]),
    compensated=st.booleans(),
    sweeps=st.integers(0, 3),
)
sizes = st.tuples(st.integers(1, 70), st.integers(1, 9), st.integers(0, 99))


def sparse_numbers(rows, columns, seed, density=0.6):
    chosen = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density
    return torch.where(chosen, normal(seed, rows, columns), 0.0)


@given(rounding=roundings, size=sizes)
def test_rounding_what_is_rounded_changes_nothing(rounding, size):
    """To the nearest, whatever the scales; compensated, in its own scales: no group need have its extreme code any more."""
    rows, columns, seed = size
    gram, numbers = correlated(seed, rows), sparse_numbers(rows, columns, seed)
    nearest = Rounding(rounding.format, rounding.group_size, compensated=False)
    once = quantized(numbers, gram, nearest).float()
    assert torch.equal(quantized(once, gram, nearest).float(), once)
    found = quantized(numbers, gram, rounding)
    scales = by_row(found.scales.float(), rounding.group_size, rows)
    assert torch.equal(raw(_codes(found.float(), scales, rounding.format)), raw(found.codes))


@given(rounding=roundings, size=sizes)
def test_zeros_stay_zero_and_codes_are_in_range(rounding, size):
    rows, columns, seed = size
    numbers = sparse_numbers(rows, columns, seed)
    found = quantized(numbers, correlated(seed, rows), rounding)
    low, high = format_of(rounding.format).lowest, format_of(rounding.format).highest
    assert found.codes.float().min() >= low
    assert found.codes.float().max() <= high
    assert (found.float()[numbers == 0] == 0).all()
    assert found.scales.shape == (-(-rows // rounding.group_size), columns)
    assert torch.equal(found.float(), found.codes.float() * by_row(found.scales.float(), rounding.group_size, rows))


def costs(numbers, rounded, gram):
    error = (numbers - rounded).double()
    return (error * (gram.double() @ error)).sum(dim=0)


@given(name=st.sampled_from(["int2", "int3", "int4", "float8"]), size=sizes, sweeps=st.integers(0, 4))
def test_no_column_ends_above_its_nearest_codes(name, size, sweeps):
    rows, columns, seed = size
    numbers, gram = sparse_numbers(rows, columns, seed), correlated(seed, rows)
    nearest = quantized(numbers, gram, Rounding(name, 32, compensated=False)).float()
    found = quantized(numbers, gram, Rounding(name, 32, sweeps=sweeps)).float()
    assert (costs(numbers, found, gram) <= costs(numbers, nearest, gram) * (1 + 1e-4) + 1e-6).all()


@pytest.mark.parametrize("name", ["int2", "int4", "int8", "float8"])
def test_more_sweeps_never_hurt_and_help_here(name):
    numbers, gram = normal(0, 96, 20), correlated(0, 96)
    found = [quantized(numbers, gram, Rounding(name, 32, sweeps=sweeps)).float() for sweeps in (0, 1, 2, 8)]
    cost = [float(costs(numbers, f, gram).sum()) for f in found]
    nearest = quantized(numbers, gram, Rounding(name, 32, compensated=False)).float()
    assert cost[0] < 0.6 * float(costs(numbers, nearest, gram).sum())
    assert cost[3] <= cost[2] * 1.0001 <= cost[1] * 1.0002 <= cost[0] * 1.0003
    assert cost[3] < 0.97 * cost[0]


@given(seed=st.integers(0, 99))
def test_codes_beside_the_best_of_all(seed):
    numbers, gram = normal(seed, 4, 3), correlated(seed, 4)
    found = quantized(numbers, gram, Rounding("int3", 32, sweeps=8))
    levels = torch.tensor(list(itertools.product(range(-4, 4), repeat=4))).float()
    for j in range(3):
        best = min(float(costs(numbers[:, j], row * found.scales[0, j].float(), gram)) for row in levels)
        mine = float(costs(numbers[:, j], found.float()[:, j], gram))
        assert best <= mine + 1e-5
        nearest = quantized(numbers, gram, Rounding("int3", 32, compensated=False)).float()
        assert mine <= float(costs(numbers[:, j], nearest[:, j], gram)) + 1e-5


@settings(max_examples=10)
@given(size=st.tuples(st.integers(1, 12) | st.integers(60, 140), st.integers(1, 3), st.integers(0, 99)))
def test_the_first_pass_is_the_slow_one(size):
    """`references.compensated_rounding` has one column and one number at a time, and inverts what is left each time."""
    rows, columns, seed = size
    numbers, gram = sparse_numbers(rows, columns, seed, density=0.8), correlated(seed, rows).double()
    found = quantized(numbers, gram, Rounding("int4", 32, sweeps=0))
    nearest = quantized(numbers, gram, Rounding("int4", 32, compensated=False)).float()
    scales = by_row(found.scales.double(), 32, rows)
    slow = references.compensated_rounding(numbers.double(), gram, scales, damping=0.01, levels=(-8, 7))
    better = costs(numbers, slow.float(), gram) < costs(numbers, nearest, gram)
    torch.testing.assert_close(found.float(), torch.where(better, slow.float(), nearest), rtol=1e-4, atol=1e-6)


def test_a_wrong_start_is_made_up_for_through_the_gradient():
    """Numbers that are not the minimum themselves: what is left of the slope moves the codes towards it."""
    gram, best = correlated(3, 40), normal(4, 40, 6)
    start = best + 0.05 * normal(5, 40, 6)
    rounding = Rounding("int8", 32, sweeps=6)
    blind = quantized(start, gram, rounding).float()
    told = quantized(start, gram, rounding, gradient=gram @ (best - start)).float()
    assert float(costs(best, told, gram).sum()) < 0.2 * float(costs(best, blind, gram).sum())


# --- what is awkward


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("compensated", [True, False])
def test_groups_that_do_not_divide_and_groups_of_zeros(name, compensated):
    numbers = normal(0, 75, 4)
    numbers[:32, 1] = 0
    numbers[:, 2] = 0
    found = quantized(numbers, correlated(0, 75), Rounding(name, 32, compensated))
    assert found.scales.shape == (3, 4)
    assert torch.isfinite(found.float()).all()
    assert (found.float()[:32, 1] == 0).all()
    assert (found.float()[:, 2] == 0).all()
    tolerance = 2.2 / (2 ** (bits_of(name) - 1)) if name != "float8" else 0.1
    if not compensated:
        assert ((found.float() - numbers).abs() <= tolerance * numbers.abs().amax(dim=0)).all()


@pytest.mark.parametrize("name", FORMATS)
def test_outliers_at_the_limit_of_float16(name):
    numbers = torch.full((40, 2), 6e-5)
    numbers[0, 0], numbers[39, 1] = 65504.0, -65504.0
    found = quantized(numbers, torch.eye(40), Rounding(name, 32, compensated=False)).float()
    assert torch.isfinite(found).all()
    extremes = torch.stack([found[0, 0], found[39, 1]])
    torch.testing.assert_close(extremes, torch.tensor([65504.0, -65504.0]), rtol=0.51, atol=0)
    if bits_of(name) > 3:
        torch.testing.assert_close(extremes, torch.tensor([65504.0, -65504.0]), rtol=0.05, atol=0)


def test_a_scale_beyond_float16_is_refused_by_name_and_fits_bfloat16():
    numbers = torch.full((32, 2), 1e7)
    with pytest.raises(UserError, match=r"quantization.*factorization\.storage_dtype=bfloat16"):
        quantized(numbers, torch.eye(32), Rounding("int4", 32))
    found = quantized(numbers, torch.eye(32), Rounding("int4", 32), torch.bfloat16)
    torch.testing.assert_close(found.float(), numbers, rtol=0.01, atol=0)


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="NaN or infinite"):
        quantized(torch.full((4, 1), torch.nan), torch.eye(4), Rounding("int8", 32))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["quantization.group_size=100"], "quantization.group_size=100 is not a multiple of 32.* Set it to 96"),
        (["quantization=int8", "quantization.values=int9"], "quantization.values=int9 is not known.*int8, float8"),
        (["quantization.rounding=up"], "quantization.rounding=up is not known"),
        (
            ["quantization=int8", "quantization.damping=0"],
            "quantization.damping=0 leaves a gram that cannot be inverted",
        ),
        (["quantization.values=int8"], "belong to a quantization with a name of its own"),
        (["quantization=int8", "quantization.values=null", "factorization=plain"], "leaves plain as it is"),
        (["quantization=truncated14", "factorization=svd_llm"], "svd_llm has none"),
        (["quantization=int8", "factorization=cospadi_paper"], "accounting=paper both cut bits"),
        (["quantization=int77"], "quantization=int77 does not exist"),
        (["factorization=plain", "factorization.compression_ratio=0.3"], "removes nothing"),
    ],
)
def test_settings_that_cannot_be_are_refused(overrides, words):
    with pytest.raises(UserError, match=words):
        load(overrides)


# --- whole factors


@pytest.mark.parametrize("kind", FACTORIZATIONS)
@pytest.mark.parametrize("name", ["int4", "float8"])
def test_a_weight_of_zeros_stays_one(kind, name):
    task = problem()
    zeros = Problem(torch.zeros_like(task.weight), task.whitener, task.absolute_mean)
    (found,) = quantize(quantization(name), [factorize(FACTORIZATIONS[kind], zeros)], [zeros])
    assert (found.weight() == 0).all()


@pytest.mark.parametrize("name", ["int4", "int8", "float8"])
def test_tiny_weights_do_not_vanish(name):
    numbers = normal(0, 64, 5) * 3e-6
    found = quantized(numbers, torch.eye(64), Rounding(name, 32, compensated=False)).float()
    assert (found - numbers).norm() < 0.2 * numbers.norm()


def test_what_no_longer_fits_sixteen_bits_is_refused():
    """A dictionary in two bits is far from what it was, and values that make up for it may be large."""
    task = problem()
    before = factorize(FACTORIZATIONS["cospadi"], task)
    large = replace(before, coefficients=before.coefficients.sign() * 6e4)
    with pytest.raises(UserError, match=r"does not fit torch\.float16.*factorization\.storage_dtype=bfloat16"):
        quantize(quantization("int2", values=None), [large], [task])


def test_a_left_factor_is_rounded_where_the_right_one_cannot_make_up_for_it(monkeypatch):
    task = problem(7, 128, 160)
    before = factorize(FACTORIZATIONS["svd_llm"], task)

    def error():
        (found,) = quantize(quantization("int3", values=None), [before], [task])
        return output_error(task.whitener, before.weight(), found.weight())

    told = error()
    monkeypatch.setattr(methods, "WITHIN_SPAN", 1.0)  # every error alike
    assert told < 0.95 * error()


@pytest.mark.parametrize("kind", FACTORIZATIONS)
def test_more_bits_are_closer_and_eight_cost_next_to_nothing(kind):
    task = problem(1, 96, 64)
    before = factorize(FACTORIZATIONS[kind], task)

    def error(config):
        (found,) = quantize(config, [before], [task])
        return output_error(task.whitener, task.weight, found.weight())

    exact = output_error(task.whitener, task.weight, before.weight())
    eight, four, three = (error(quantization(name)) for name in ("int8", "int4", "int3"))
    assert eight**2 <= exact**2 * 1.02 + 0.01**2
    assert eight < four < three
    assert four <= error(quantization("int4", rounding="nearest")) * 1.001


@pytest.mark.parametrize("name", ["cospadi", "plus"])
def test_truncated_values_are_the_upper_fourteen_bits(name):
    task = problem()
    before = factorize(FACTORIZATIONS[name], task)
    (found,) = quantize(quantization(values=TRUNCATED, dictionary=None), [before], [task])
    assert found.value_bits == 14
    assert found.dictionary is before.dictionary
    assert ((found.coefficients.view(torch.int16) & 3) == 0).all()
    assert torch.equal(found.coefficients != 0, before.coefficients != 0)
    torch.testing.assert_close(found.weight(), before.weight(), rtol=0.02, atol=0.01)


@pytest.mark.parametrize("kind", ["svd_llm", "oats", "plain"])
def test_factors_without_sparse_values_are_not_truncated(kind):
    task = problem()
    with pytest.raises(UserError, match=r"quantization\.values=truncated14 is for the values of a sparse dictionary"):
        quantize(quantization(values=TRUNCATED), [factorize(FACTORIZATIONS[kind], task)], [task])


def test_a_part_without_a_format_stays_as_it_is():
    task = problem()
    before = factorize(FACTORIZATIONS["plus"], task)
    (found,) = quantize(quantization(dictionary=None), [before], [task])
    assert found.dictionary is before.dictionary
    assert isinstance(found.coefficients, Quantized)
    (found,) = quantize(quantization(values=None), [before], [task])
    assert isinstance(found.dictionary, Quantized)
    assert found.coefficients.dtype == torch.float16
    assert torch.equal(found.mask, before.mask)
    dense = factorize(FACTORIZATIONS["plain"], task)
    assert quantize(quantization(values=None), [dense], [task]) == [dense]


def test_values_make_up_for_their_dictionary():
    task = problem(2, 64, 80)
    before = factorize(FACTORIZATIONS["cospadi"], task)
    (found,) = quantize(quantization("int3", values=None), [before], [task])
    alone = found.dictionary.float() @ before.coefficients.float()
    refitted = output_error(task.whitener, before.weight(), found.weight())
    assert refitted < 0.95 * output_error(task.whitener, before.weight(), alone)


def test_what_a_group_shares_stays_shared():
    config = CoSpaDiConfig(name="g", title="", compression_ratio=0.3, n_rounds=3, rho=2.0, group_size=2, metric="own")
    tasks = [problem(5), problem(6)]
    found = quantize(quantization("int4"), next(factorize_groups(config, [tasks])), tasks)
    assert found[0].dictionary is found[1].dictionary
    assert stored_bits(found[1], shares=True) < stored_bits(found[1]) - 4 * found[1].dictionary.codes.numel() + 1


@pytest.mark.parametrize("kind", FACTORIZATIONS)
@pytest.mark.parametrize("name", FORMATS)
def test_layers_compute_with_codes_what_the_multiplied_out_weight_says(kind, name):
    task = problem(3, 45, 37)
    (found,) = quantize(quantization(name), [factorize(FACTORIZATIONS[kind], task)], [task])
    layer = layer_of(found, bias=normal(9, 37))
    weight = found.weight()
    torch.testing.assert_close(layer.dense_weight(), weight, rtol=1e-6, atol=1e-6)
    with torch.inference_mode():
        for rows in (1, 3, 40):  # the kernels', and the dense products'
            x = normal(rows, rows, 45)
            torch.testing.assert_close(layer(x), x @ weight + layer.bias, rtol=1e-4, atol=1e-4)
    held = sum(t.numel() * t.element_size() for t in layer.state_dict().values()) - 4 * 37
    assert 8 * held == stored_bits(found)


def test_a_layer_described_wrongly_is_refused():
    task = problem()
    (found,) = quantize(quantization("int4"), [Dense(task.weight.half())], [task])
    spec = layer_of(found).spec
    from cospadi.checkpoint.specs import empty_layer

    for wrong in (
        {"dense": ["int9", 32]},
        {"dense": ["int4", 33]},
        {"dense": ["int4", 32.5]},
        ["int4", 32],
        {"dense": "int4"},
    ):
        with pytest.raises((ValueError, TypeError), match="formats"):
            empty_layer(spec | {"formats": wrong})


def test_an_unknown_format_is_refused_and_not_taken_for_eight_bits():
    with pytest.raises(ValueError, match="The number format nf4 is not known"):
        bits_of("nf4")


# --- a format that nobody has heard of


NF4 = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
NF4 += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]
NEW = {
    "float8_e5m2": Format("float8_e5m2", 8, -57344.0, 57344.0, "float8_e5m2"),
    "nf4": Format.of_table("nf4", 4, NF4),  # QLoRA's, arXiv:2305.14314, appendix E, rounded
}


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("kind", FACTORIZATIONS)
def test_a_format_that_no_kernel_reads_is_one_declaration(kind, name, monkeypatch, tmp_path):
    """Rounded, stored, read again and multiplied, for few rows and for many, without another word about it."""
    monkeypatch.setitem(FORMATS, name, NEW[name])
    task = problem()
    before = factorize(FACTORIZATIONS[kind], task)
    (factors,) = quantize(quantization(name), [before], [task])
    assert output_error(task.whitener, before.weight(), factors.weight()) < (0.3 if name == "nf4" else 0.1)

    file = FactorsFile(["a"])
    d_in, d_out = task.weight.shape
    file.add({"name": "a", "kind": factors.kind, "d_in": d_in, "d_out": d_out, "group": None}, factors)
    file.write(tmp_path / "factors.safetensors")
    ((_, read),) = read_factors([tmp_path / "factors.safetensors"])
    assert torch.equal(read.weight(), factors.weight())

    layer = layer_of(read, None)
    rows = normal(3, 40, d_in)
    with torch.no_grad():
        many = layer(rows)
        few = torch.cat([layer(part) for part in rows.split(4)])
    torch.testing.assert_close(many, rows @ factors.weight().float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(few, many, rtol=1e-4, atol=1e-4)


def test_codes_of_a_table_are_its_nearest_numbers_and_zeros_are_zeros(monkeypatch):
    monkeypatch.setitem(FORMATS, "nf4", NEW["nf4"])
    numbers = normal(0, 500) / 2
    table = torch.tensor(NF4)
    chosen = nearest(numbers.clone(), "nf4")
    naive = table[(numbers[:, None].clamp(-1, 1) - table).abs().argmin(dim=1)]
    assert torch.equal(chosen, naive)
    codes = encoded(chosen, "nf4")
    assert codes.dtype == torch.int8
    assert codes.min() >= -8
    assert codes.max() <= 7
    assert (codes[chosen == 0] == 0).all()
    assert torch.equal(decoded(unpack(pack(codes, "nf4"), "nf4", 500), "nf4"), chosen)
    assert not NEW["nf4"].is_whole
