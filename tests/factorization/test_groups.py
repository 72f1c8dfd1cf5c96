"""Groups: who shares with whom, one dictionary under every layer's own gram, bits counted once, ties that last."""

import copy
import itertools
import json
import re
import shutil
from dataclasses import asdict, replace

import hypothesis.strategies as st
import pytest
import references
import torch
from cases import cases
from hypothesis import example, given
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import cospadi
from cospadi import cli
from cospadi.api import compress_to
from cospadi.checkpoint import ledger
from cospadi.checkpoint import write as checkpoint
from cospadi.checkpoint.checksums import CHECKSUMS
from cospadi.checkpoint.linear import CompressedLinear
from cospadi.errors import UserError
from cospadi.factorization import budget, groups
from cospadi.factorization.factors import stored_bits
from cospadi.factorization.files import read_factors
from cospadi.factorization.methods import factorize, factorize_groups
from cospadi.factorization.problem import Problem
from cospadi.factorization.settings import BasisSharingConfig, CoSpaDiConfig, SVDConfig, SVDLLMConfig
from cospadi.factorization.solvers import shared
from cospadi.factorization.solvers.htp import htp
from cospadi.factorization.solvers.whitening import output_error
from cospadi.models import Projection
from cospadi.pipeline.study import Study
from cospadi.settings import load

pytestmark = pytest.mark.slow

seeds = st.integers(0, 10**6)
INPUTS = {
    "self_attn.q_proj": "self_attn.q_proj",
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "self_attn.o_proj": "self_attn.o_proj",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.gate_proj",
    "mlp.down_proj": "mlp.down_proj",
}


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def projections(n_layers, d=16, kv=8, ff=24):
    """Those of a model with ``kv / d`` of its heads' keys."""
    widths = dict(zip(INPUTS, ((d, d), (d, kv), (d, kv), (d, d), (d, ff), (d, ff), (ff, d)), strict=True))
    return [
        Projection(f"model.layers.{layer}.{name}", layer, name, INPUTS[name], *widths[name])
        for layer in range(n_layers)
        for name in INPUTS
    ]


def problems(seed, members=2, d_in=20, d_out=24, alike=0.5):
    """Weights with something in common, inputs of every layer with a spectrum and directions of their own."""
    common, made = normal(seed, d_in, d_out), []
    for i in range(members):
        fall = torch.arange(1, d_in + 1).double() ** -0.8
        inputs = normal(seed + 7 * i + 1, 6 * d_in, d_in) * fall @ torch.linalg.qr(normal(seed + i, d_in, d_in)).Q
        weight = alike * common + (1 - alike) * normal(seed + 7 * i + 2, d_in, d_out)
        made.append(Problem(weight.float(), references.whitener(inputs.T @ inputs), inputs.abs().mean(dim=0)))
    return made


def stacked(found):
    whiteners = torch.stack([p.whitener for p in found])
    return whiteners @ torch.stack([p.weight.double() for p in found]), whiteners


def together(errors):
    return (sum(error**2 for error in errors) / len(errors)) ** 0.5


def error_of(found, factors):
    """The error that a group's own metric minimises."""
    return together([output_error(p.whitener, p.weight, f.weight()) for p, f in zip(found, factors, strict=True)])


def cospadi_config(**settings):
    return CoSpaDiConfig(name="cospadi", title="", **{"compression_ratio": 0.3, "group_size": 2, **settings})


# --- forming


def names(found):
    return [tuple(re.sub(r"model\.layers\.(\d+)\.\w+\.(\w+)_proj", r"\1\2", p.name) for p in g) for g in found]


def unread(projection):
    raise AssertionError(f"{projection.name} was read, and nothing has to be known of it")


def test_projections_wider_than_their_siblings_share_and_the_rest_at_the_end_is_a_smaller_group():
    found = names(groups.groups_of(cospadi_config(), projections(5), unread))
    assert [g for g in found if g[0].startswith("0")] == [
        *(("0q", "1q"), ("0k",), ("0v",), ("0o",), ("0gate", "1gate"), ("0up", "1up"), ("0down",))
    ]
    assert [g for g in found if g[0].startswith("4")] == [
        (f"4{p}",) for p in ["q", "k", "v", "o", "gate", "up", "down"]
    ]
    assert sorted(itertools.chain(*found)) == sorted(itertools.chain(*names([p] for p in projections(5))))


def test_siblings_share_where_they_read_the_same_input():
    config = cospadi_config(group_size=1, pairing="same_input")
    assert [g for g in names(groups.groups_of(config, projections(2), unread)) if len(g) > 1] == [
        ("0gate", "0up"),
        ("1gate", "1up"),
    ]
    everything = cospadi_config(group_size=2, pairing="same_input", grouped=list(INPUTS))
    found = names(groups.groups_of(everything, projections(2, kv=16), unread))
    assert set(found) == {
        ("0q", "0k", "0v", "1q", "1k", "1v"),
        ("0o", "1o"),
        ("0gate", "0up", "1gate", "1up"),
        ("0down", "1down"),
    }


def test_keys_and_values_share_where_every_head_has_its_own():
    assert set(groups.shared_by_default(projections(2, kv=16))) == set(INPUTS) - {"self_attn.o_proj", "mlp.down_proj"}
    assert set(groups.shared_by_default(projections(2, kv=8))) == {"self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj"}


def test_named_projections_share_whatever_the_rule_says():
    found = groups.groups_of(cospadi_config(group_size=3, grouped=["mlp.down_proj"]), projections(4), unread)
    assert [g for g in names(found) if len(g) > 1] == [("0down", "1down", "2down")]


@pytest.mark.parametrize("config", [SVDConfig(name="", title=""), cospadi_config(group_size=1)])
def test_without_groups_every_projection_is_alone(config):
    assert groups.groups_of(config, projections(2), unread) == [(p,) for p in projections(2)]


def test_unequal_shapes_are_refused():
    found = projections(2)
    found[7] = replace(found[7], d_out=99)
    with pytest.raises(UserError, match=r"16×16 and model.layers.1.self_attn.q_proj 16×99.*factorization\.grouped"):
        groups.consecutive(found, 2, ["self_attn.q_proj"])


@given(seeds, st.integers(2, 8))
def test_matched_pairs_are_those_of_least_distance(seed, count):
    found = [replace(p, d_in=4, d_out=4) for p in projections(count) if p.projection == "self_attn.q_proj"]
    sketches = {p.name: normal(seed + i, 4, 2) for i, p in enumerate(found)}

    def apart(pairs):
        return sum(float((sketches[a.name] - sketches[b.name]).norm()) for a, b in pairs)

    def all_pairings(left):
        if len(left) < 2:
            yield []
            return
        for skipped in range((len(left) % 2 and len(left)) or 1):  # an odd one out may be any
            rest = left[:skipped] + left[skipped + 1 :] if len(left) % 2 else left
            first, *others = rest
            for other in others:
                remaining = [p for p in others if p is not other]
                for more in all_pairings(remaining):
                    yield [(first, other), *more]

    made = groups.matched(found, sketches)
    assert sorted(p.name for g in made for p in g) == sorted(p.name for p in found)
    pairs = [g for g in made if len(g) == 2]
    assert len(pairs) == count // 2
    assert apart(pairs) == pytest.approx(min(map(apart, all_pairings(found))))


def test_matched_pairs_have_one_shape_and_find_their_twins():
    found = projections(4)
    weights = {p.name: normal(i, p.d_in, p.d_out) for i, p in enumerate(found)}
    twins = [(f"model.layers.{a}.{x}", f"model.layers.{b}.{y}") for a, x, b, y in (
        (0, "self_attn.q_proj", 2, "self_attn.o_proj"), (1, "mlp.up_proj", 3, "mlp.gate_proj"),
    )]  # fmt: skip
    for one, other in twins:
        permuted = torch.randperm(weights[one].shape[1], generator=torch.Generator().manual_seed(0))
        weights[other] = 3 * weights[one][:, permuted]  # neither order nor scale of the outputs matters

    def problem_of(p):
        return Problem(weights[p.name].float(), torch.eye(p.d_in).double(), torch.ones(p.d_in))

    made = groups.groups_of(cospadi_config(pairing="matched"), found, problem_of)
    assert all(len({(p.d_in, p.d_out) for p in group}) == 1 for group in made)
    assert set(twins) <= {tuple(p.name for p in group) for group in made}
    assert sorted(p.name for group in made for p in group) == sorted(weights)


@given(seeds, seeds)
def test_a_distance_of_sketches_is_that_of_the_matrices(first, second):
    found = problems(first)[:1] + problems(second)[:1]

    def spanned(p):
        values, vectors = torch.linalg.eigh(p.whitener.T @ p.whitener)
        root = vectors @ values.clamp_min(0).sqrt().diag() @ vectors.T
        matrix = root @ p.weight.double() @ p.weight.double().T @ root
        return matrix / matrix.norm()

    exact = float((spanned(found[0]) - spanned(found[1])).norm())
    sketches = [groups.sketch(p.weight, groups.gram_root(p.whitener)) for p in found]
    assert float((sketches[0] - sketches[1]).norm()) == pytest.approx(exact, rel=0.6, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "allowed", "refused", "mended"),
    [
        ({"group_size": 1}, ["0-0", "1-3", "4-4"], [], ""),
        ({"group_size": 2}, ["0-1", "2-3", "0-3", "4-4", "2-4"], ["0-0", "1-2", "1-4", "0-2"], "000-001 000-003 000-004 000-003"),
        ({"pairing": "matched"}, ["0-4"], ["0-3", "1-4"], "000-004 000-004"),
    ],
)  # fmt: skip
def test_blocks_of_layers_that_cut_a_group_are_refused(settings, allowed, refused, mended):
    config = cospadi_config(**settings)
    for block in allowed:
        groups.require_whole_groups(config, *map(int, block.split("-")), 5)
    for block, instead in zip(refused, mended.split(), strict=True):
        with pytest.raises(UserError, match=rf"cuts a group.*Set --layers {instead}"):
            groups.require_whole_groups(config, *map(int, block.split("-")), 5)


# --- settings


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("factorization.group_size=0", "factorization.group_size=0 is too small"),
        ("factorization.metric=both", "factorization.metric=both is not known"),
        ("factorization.pairing=some", "factorization.pairing=some is not known"),
        ("factorization.grouped=[self_attn.q_prj]", "is not a projection of model .*Did you mean self_attn.q_proj?"),
        ("factorization.solver=ksvd", "metric=own of a group needs factorization.solver=htp"),
        ("factorization.rho=auto", "metric=own of a group needs .* a number for factorization.rho"),
    ],
)
def test_what_cannot_be_grouped_is_refused(override, sentence):
    with pytest.raises(UserError, match=sentence):
        load(["factorization=cospadi_group", override])


def test_a_matched_group_is_a_pair():
    with pytest.raises(UserError, match=r"factorization\.pairing=matched makes pairs.*group_size=3"):
        load(["factorization=geopair", "factorization.group_size=3"])


def test_jobs_cut_no_group():
    five = ("model.n_layers=5", "model.architecture.num_hidden_layers=5", "study.models=[tiny_llama]")
    grid = Study("smoke", ["study.methods=[svd,cospadi_group,geopair]", *five, "study.layers_per_job=3"])
    assert {cell.method: grid.layers(cell) for cell in grid.cells} == {
        "svd": ["000-002", "003-004"],
        "cospadi_group": ["000-003", "004-004"],
        "geopair": ["000-004"],
    }


# --- budget


@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(1, 5),
    st.floats(0.05, 0.9),
    st.floats(1, 5),
    st.sampled_from(["mask", "paper"]),
)
@example(29, 57, 3, 0.2, 1.0, "mask")  # masks that are filled up to bytes
def test_a_group_keeps_to_the_bits_of_its_members(d_in, d_out, members, ratio, rho, accounting):
    allowed = members * budget.budget_bits(d_in, d_out, ratio)
    rho = min(rho, 2.0) if accounting == "paper" else rho
    bits = budget.value_bits(accounting)
    try:
        atoms, sparsity = budget.atoms_and_sparsity(d_in, d_out, ratio, rho, accounting, members)
    except UserError:
        pass
    else:
        assert 1 <= sparsity <= atoms
        assert budget.stored_bits(d_in, d_out, atoms, sparsity, bits, members) <= allowed
        if accounting == "mask" and d_out % 8 == 0:
            assert budget.stored_bits(d_in, d_out, atoms + 1, sparsity, bits, members) > allowed
    try:
        rank = budget.rank(d_in, d_out, ratio, members)
    except UserError:
        return
    assert (
        budget.low_rank_bits(d_in, d_out, rank, members)
        <= allowed
        < budget.low_rank_bits(d_in, d_out, rank + 1, members)
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"metric": "own"},
        {"solver": "one_shot"},
        {"rho": "auto"},
        {"accounting": "paper"},
        {"fixed_atoms": "identity"},
        {"fixed_atoms": "identity", "learned_atoms": 0.1, "metric": "own"},
        {"fixed_atoms": "identity", "learned_atoms": 0.1, "metric": "own", "support": "matrix"},
    ],
)
@pytest.mark.parametrize("members", [1, 2, 3])
def test_what_a_group_stores_is_within_its_budget(settings, members):
    found = problems(members, members, d_in=21, d_out=27)
    factors = next(factorize_groups(cospadi_config(**settings), [found]))
    assert all(f.dictionary is factors[0].dictionary for f in factors)
    stored = sum(stored_bits(f, shares=i > 0) for i, f in enumerate(factors))
    assert stored <= members * budget.budget_bits(21, 27, 0.3)
    values, masks = (sum(f.tensors()[part].nbytes for f in factors) for part in ("values", "mask"))
    assert stored == 16 * factors[0].dictionary.numel() + 8 * (values + masks)
    assert error_of(found, factors) < 0.7


# --- one dictionary, every gram its own


@given(seeds, st.integers(1, 3), st.integers(1, 6))
def test_the_dictionary_solves_the_kronecker_system(seed, members, atoms):
    found = problems(seed, members, d_in=7, d_out=15)
    targets, whiteners = stacked(found)
    codes = normal(seed, members, atoms, 15) * (normal(seed + 1, members, atoms, 15).abs() < 1)
    mean = shared.mean_whitener(whiteners)
    maps = torch.linalg.solve_triangular(mean.expand_as(whiteners), whiteners, upper=True, left=False)
    moments, pulled = codes @ codes.mT, targets @ codes.mT
    solved = shared.shared_dictionary(maps, pulled, moments, normal(seed + 2, 7, atoms), steps=200)
    found_in_input_space = torch.linalg.solve(mean, solved)
    naive = references.shared_dictionary(whiteners, [p.weight.double() for p in found], codes)

    def error(dictionary):
        return float((targets - whiteners @ dictionary @ codes).norm())

    assert error(found_in_input_space) <= error(naive) * (1 + 1e-6) + 1e-9
    torch.testing.assert_close(
        whiteners @ found_in_input_space @ codes, whiteners @ naive @ codes, rtol=1e-4, atol=1e-4
    )


@given(seeds)
def test_for_one_layer_the_dictionary_takes_one_step(seed):
    found = problems(seed, 1, d_in=12, d_out=30)
    targets, _ = stacked(found)
    codes = normal(seed, 1, 5, 30)
    eye = torch.eye(12, dtype=torch.float64)[None]
    solved = shared.shared_dictionary(eye, targets @ codes.mT, codes @ codes.mT, normal(seed, 12, 5), steps=1)
    torch.testing.assert_close(solved, references.dictionary_update(targets[0], codes[0]), rtol=1e-6, atol=1e-8)


@given(seeds, st.integers(1, 4))
def test_maps_of_the_mean_gram_add_up_to_the_identity(seed, members):
    _, whiteners = stacked(problems(seed, members))
    mean = shared.mean_whitener(whiteners)
    torch.testing.assert_close(mean.mT @ mean, (whiteners.mT @ whiteners).mean(dim=0))
    assert mean.triu().equal(mean)
    assert (mean.diagonal() > 0).all()


@pytest.mark.parametrize("members", [1, 2, 3])
def test_identical_layers_get_what_one_gets_alone(members):
    (found,) = problems(3, 1)
    targets, whiteners = stacked([found] * members)
    fit = shared.shared_htp(targets, whiteners, 18, 6, own_rounds=0)
    alone = htp(targets[0] / targets[0].square().mean().sqrt(), 18, 6)
    assert alone.errors[-1] * 0.95 < fit.errors[-1] <= alone.errors[-1] * (1 + 1e-9)  # one least squares more
    first, *others = fit.coefficients.chunk(members, dim=1)
    assert all(codes.allclose(first, atol=1e-8) for codes in others)
    assert shared.shared_htp(targets, whiteners, 18, 6).errors[-1] <= fit.errors[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("identity", [False, True])
def test_the_error_told_is_that_of_what_is_returned(dtype, identity):
    found = problems(5, 3)
    targets, whiteners = stacked(found)
    start = torch.stack([p.weight.T for p in found]).to(dtype) if identity else None
    fit = shared.shared_htp(targets.to(dtype), whiteners, 9, 5, identity=identity, fixed_codes=start)
    atoms = torch.cat([torch.eye(20, dtype=dtype), fit.dictionary], dim=1) if identity else fit.dictionary
    of_members = fit.coefficients.chunk(3, dim=1)
    assert all(int((codes != 0).sum(dim=0).max()) <= 5 for codes in of_members)
    errors = [
        output_error(p.whitener, p.weight, (atoms @ codes).double()) for p, codes in zip(found, of_members, strict=True)
    ]
    assert fit.errors[-1] == pytest.approx(together(errors), rel=1e-3)
    assert fit.errors[-1] <= min(fit.errors) * (1 + 1e-5)


def test_identity_atoms_alone_need_no_dictionary():
    found = problems(6, 2)
    targets, whiteners = stacked(found)
    start = torch.stack([p.weight.T for p in found]).double()
    fit = shared.shared_htp(targets, whiteners, 0, 8, identity=True, fixed_codes=start)
    assert fit.dictionary.shape == (20, 0)
    for member, p in enumerate(found):
        alone = htp(targets[member], 0, 8, fixed=whiteners[member], fixed_codes=start[member])
        error = output_error(p.whitener, p.weight, fit.coefficients.chunk(2, dim=1)[member])
        assert 0.8 * alone.errors[-1] < error < 1.05 * alone.errors[-1]


def test_layers_of_any_loudness_count_alike():
    found = problems(8, 2)
    targets, whiteners = stacked(found)
    louder = torch.tensor([1.0, 1000.0]).double()[:, None, None]
    plain, loud = (shared.shared_htp(targets * by, whiteners * by, 18, 6) for by in (torch.ones_like(louder), louder))
    assert loud.errors[-1] == pytest.approx(plain.errors[-1], rel=1e-6)


@given(seeds, st.integers(2, 3), st.booleans())
def test_every_layers_own_gram_is_never_worse_than_their_mean(seed, members, identity):
    """On the error that is reported, of weights that are equally loud: the mean's solution is where it starts."""
    found = problems(seed, members)
    targets, whiteners = stacked(found)
    scales = targets.square().mean(dim=(1, 2), keepdim=True).sqrt()
    targets, whiteners = targets / scales, whiteners / scales
    mean = shared.mean_whitener(whiteners)
    weights = torch.stack([p.weight.double() for p in found])
    side_by_side = torch.cat(list(mean @ weights), dim=1)
    fixed = {"fixed": mean, "fixed_codes": weights.mT.flatten(end_dim=1)} if identity else {}
    start = htp(side_by_side, 12, 6, **fixed)
    atoms = torch.cat([fixed["fixed"], start.dictionary], dim=1) if identity else start.dictionary
    approximations = (torch.linalg.solve(mean, atoms) @ start.coefficients).chunk(members, dim=1)
    before = together([output_error(r, w, a) for r, w, a in zip(whiteners, weights, approximations, strict=True)])
    fit = shared.shared_htp(
        targets, whiteners, 12, 6, identity=identity, fixed_codes=weights.mT.contiguous() if identity else None
    )
    assert fit.errors[-1] <= before * (1 + 1e-9)
    assert fit.errors == sorted(fit.errors, reverse=True)


def test_every_layers_own_gram_gains_over_the_mean_gram():
    gains = []
    for seed in range(8):
        found = problems(seed, 2, d_in=32, d_out=40)
        own, mean = (
            error_of(found, next(factorize_groups(cospadi_config(metric=m), [found]))) for m in ("own", "mean")
        )
        gains.append(own / mean)
    assert max(gains) < 1
    assert sorted(gains)[4] < 0.97


@pytest.mark.parametrize("broken", ["targets", "whiteners"])
def test_what_is_not_finite_is_refused(broken):
    targets, whiteners = stacked(problems(1))
    {"targets": targets, "whiteners": whiteners}[broken][0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        shared.shared_htp(targets, whiteners, 4, 2)
    with pytest.raises(UserError, match="at least one atom"):
        shared.shared_htp(*stacked(problems(1)), 0, 2)


# --- Basis Sharing


@given(seeds, st.integers(1, 3))
def test_a_shared_basis_is_the_svd_of_all_outputs_under_the_summed_gram(seed, members):
    found = problems(seed, members)
    factors = next(
        factorize_groups(BasisSharingConfig(name="", title="", compression_ratio=0.3, group_size=2), [found])
    )
    assert all(f.left is factors[0].left for f in factors)
    summed = sum(p.whitener.T @ p.whitener for p in found)
    rank = budget.rank(20, 24, 0.3, members)
    expected = references.svd_llm(torch.cat([p.weight for p in found], dim=1), summed, rank)
    joint = torch.cat([f.weight() for f in factors], dim=1).double()
    torch.testing.assert_close(joint, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


def test_a_basis_of_ones_own_is_that_of_svd_llm():
    (found,) = problems(2, 1)
    alone = factorize(SVDLLMConfig(name="", title="", compression_ratio=0.3), found)
    shared_by_one = factorize(BasisSharingConfig(name="", title="", compression_ratio=0.3), found)
    torch.testing.assert_close(shared_by_one.weight(), alone.weight(), rtol=1e-2, atol=1e-3)


def test_methods_that_share_nothing_say_so():
    with pytest.raises(UserError, match="SVDConfig shares nothing"):
        next(factorize_groups(SVDConfig(name="", title=""), [problems(1)]))


# --- files, checkpoints, ties

GROUPED = ("cospadi_group", "cospadi_outputs", "geopair", "basis_sharing", "cospadi_group+int4", "basis_sharing+int8")
"""Methods, and two of them quantized."""
STORED = dict.fromkeys(GROUPED, "dictionary") | dict.fromkeys(("basis_sharing", "basis_sharing+int8"), "left")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function: method and model -> folder with ``out`` (checkpoint) and ``out.work`` (factors, record), made once."""
    parent, known = tmp_path_factory.mktemp("groups"), {}

    def make(method, model="tiny_llama"):
        if (method, model) not in known:
            folder = parent / f"{method}-{model}"
            factorization, _, quantization = method.partition("+")
            settings = [f"factorization={factorization}", "factorization.compression_ratio=0.3", "calibration=smoke"]
            settings.append(f"quantization={quantization or 'none'}")
            compress_to(model, folder / "out", settings, keep_work=True)
            known[method, model] = folder
        return known[method, model]

    return make


def tokens():
    return torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.inference_mode():
        return model(input_ids=tokens(), use_cache=False).logits


def shared_parameters(model):
    """Owner -> layers that share its tensor, found by the tensors themselves."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, CompressedLinear) and (part := getattr(layer, layer.shared_part)).numel():
            found.setdefault(part.data_ptr(), []).append(name)
    return sorted(tuple(names) for names in found.values() if len(names) > 1)


def rows_of(folder):
    """The rows of the last record."""
    return json.loads(factors_file(folder).with_suffix(".json").read_text())["projections"]


def factors_file(folder):
    """The factors that the checkpoint was made from: of one block of layers, as the model is small."""
    quantized = list((folder / "out.work/quantization").glob("*.safetensors"))
    (file,) = quantized or (folder / "out.work/factorization").glob("*.safetensors")
    return file


def groups_in(folder):
    return sorted({tuple(sorted(row["group"])) for row in rows_of(folder) if row["group"]})


@pytest.mark.parametrize("model", cases(["tiny_llama", "tiny_qwen3"], {"tiny_llama"}))
@pytest.mark.parametrize("method", GROUPED)
def test_a_factors_file_holds_what_is_shared_once(made, method, model):
    folder = made(method, model)
    rows = rows_of(folder)
    assert len(rows) == 14
    assert [row["name"] for row in rows] == list(dict.fromkeys(row["name"] for row in rows))
    with safe_open(factors_file(folder), "pt") as file:
        on_disk = {}
        for key in file.keys():  # noqa: SIM118
            name, tensor = key.rpartition(".")[0], file.get_tensor(key)
            on_disk[name] = on_disk.get(name, 0) + 8 * tensor.numel() * tensor.element_size()
    assert on_disk == {row["name"]: row["stored_bits"] for row in rows}
    assert sum(on_disk.values()) <= sum(row["budget_bits"] for row in rows)
    factors = dict(read_factors([factors_file(folder)]))
    assert groups_in(folder)
    for row in rows:
        if row["group"]:
            first, *others = (factors[name] for name in row["group"])
            assert all(getattr(f, f.shared_part) is getattr(first, first.shared_part) for f in others)
    sizes = {row["name"]: row["stored_bits"] for row in rows}
    for group in {tuple(row["group"]) for row in rows if row["group"]}:
        assert all(sizes[other] < sizes[group[0]] for other in group[1:])
        assert sum(sizes[name] for name in group) <= sum(r["budget_bits"] for r in rows if r["name"] in group)


@pytest.mark.parametrize("model", cases(["tiny_llama", "tiny_qwen3"], {"tiny_llama"}))
@pytest.mark.parametrize("method", GROUPED)
def test_a_loaded_model_shares_and_computes_what_its_factors_say(made, method, model):
    folder = made(method, model)
    compressed = cospadi.load(folder / "out")
    assert shared_parameters(compressed) == groups_in(folder)
    dense = AutoModelForCausalLM.from_pretrained(folder / "out.work/model")
    for name, factors in read_factors([factors_file(folder)]):
        dense.get_submodule(name).weight.data.copy_(factors.weight().T)
    torch.testing.assert_close(logits(compressed), logits(dense.eval()), rtol=1e-4, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(folder / "out", device_map="cpu").eval()
    assert shared_parameters(plain) == groups_in(folder)
    assert logits(plain).equal(logits(compressed))


@pytest.mark.parametrize("method", GROUPED)
def test_ties_outlast_saving_casting_copying_and_tying_again(made, tmp_path, method):
    folder = made(method)
    model, ties = cospadi.load(folder / "out"), groups_in(folder)
    before = logits(model)
    model.tie_weights()
    assert shared_parameters(model) == ties
    copied = copy.deepcopy(model)
    assert shared_parameters(copied) == ties
    assert logits(copied).equal(before)
    model.save_pretrained(tmp_path / "again")
    again = cospadi.load(tmp_path / "again")
    assert shared_parameters(again) == ties
    assert logits(again).equal(before)
    parameters = sum(p.numel() for p in model.parameters())
    assert model.num_parameters() == parameters == again.num_parameters()
    old, new = (ledger.ledger(f) for f in (folder / "out", tmp_path / "again"))
    assert old["projection_bytes"] == new["projection_bytes"]
    assert abs(old["file_bytes"] - new["file_bytes"]) < 20_000  # checksums and names; a dictionary more would not fit
    model.to(torch.bfloat16)
    assert shared_parameters(model) == ties
    copied.save_pretrained(tmp_path / "copied")
    assert logits(cospadi.load(tmp_path / "copied")).equal(before)
    halved = cospadi.load(folder / "out", dtype=torch.bfloat16)
    assert shared_parameters(halved) == ties
    halved.save_pretrained(tmp_path / "halved")
    assert logits(cospadi.load(tmp_path / "halved")).equal(logits(halved))


@pytest.mark.parametrize("method", GROUPED)
def test_every_shared_byte_is_counted_once(made, method):
    folder = made(method) / "out"
    found = ledger.ledger(folder)
    rows = rows_of(made(method))
    assert found["projection_bytes"] * 8 == sum(row["stored_bits"] for row in rows)
    everything = sum(t.numel() * t.element_size() for t in load_file(folder / "model.safetensors").values())
    assert found["projection_bytes"] + found["other_bytes"] == everything
    assert found["removed"] >= 0.3
    sharing = [row for row in found["projections"] if "shares" in row]
    assert len(sharing) == sum(len(group) - 1 for group in groups_in(made(method)))
    assert all(STORED[method] not in row["parts"] for row in sharing)


@pytest.mark.parametrize("method", GROUPED)
def test_the_densified_model_agrees(made, tmp_path, method):
    checkpoint.densify(made(method) / "out", tmp_path / "dense", "float32")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    expected = logits(cospadi.load(made(method) / "out"))
    torch.testing.assert_close(logits(dense), expected, rtol=1e-4, atol=1e-4)
    model = cospadi.load(made(method) / "out")
    model.dequantize()
    assert not any(isinstance(m, CompressedLinear) for m in model.modules())
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.tie_weights()


def test_only_checkpoints_that_share_have_the_newer_format(made, tmp_path):
    config = json.loads((made("cospadi_group") / "out/config.json").read_text())["quantization_config"]
    assert config["format_version"] == 2
    compress_to("tiny_llama", tmp_path / "out", ["factorization=svd_llm", "calibration=smoke"])
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["format_version"] == 1
    assert not any("shares" in spec for spec in config["modules"].values())


def refused(folder, sentence, capsys):
    with pytest.raises(UserError, match=sentence):
        cospadi.load(folder)
    with pytest.raises((UserError, RuntimeError, ValueError), match=sentence):
        AutoModelForCausalLM.from_pretrained(folder)
    assert cli.main(["info", str(folder)]) == 1
    assert re.search(sentence, capsys.readouterr().err)
    assert cli.main(["densify", str(folder), str(folder.with_name("dense"))]) == 1


@pytest.mark.parametrize("method", ["cospadi_group", "basis_sharing"])
def test_a_lost_shared_tensor_is_refused(made, tmp_path, method, capsys):
    shutil.copytree(made(method) / "out", tmp_path / "own")
    lost = f"model.layers.0.mlp.up_proj.{STORED[method]}"
    with safe_open(tmp_path / "own/model.safetensors", "pt") as tensors:
        kept = {name: tensors.get_tensor(name) for name in tensors.keys() if name != lost}  # noqa: SIM118
        assert f"model.layers.1.mlp.up_proj.{STORED[method]}" not in kept
        save_file(kept, tmp_path / "own/new", tensors.metadata())
    (tmp_path / "own/new").rename(tmp_path / "own/model.safetensors")
    refused(tmp_path / "own", rf"lack.* {re.escape(lost)}", capsys)


def test_a_damaged_shared_tensor_is_refused(made, tmp_path):
    shutil.copytree(made("cospadi_group") / "out", tmp_path / "own")
    with safe_open(tmp_path / "own/model.safetensors", "pt") as tensors:
        held, metadata = {name: tensors.get_tensor(name) for name in tensors.keys()}, tensors.metadata()  # noqa: SIM118
    held["model.layers.0.mlp.up_proj.dictionary"][0, 0] += 1
    assert CHECKSUMS in metadata
    save_file(held, tmp_path / "own/model.safetensors", metadata)
    with pytest.raises(UserError, match="is damaged"):
        cospadi.load(tmp_path / "own")


@pytest.mark.parametrize(
    "owner", ["model.layers.7.mlp.up_proj", "model.layers.1.mlp.gate_proj", "model.layers.0.mlp.down_proj"]
)
def test_a_layer_that_shares_with_no_fitting_one_is_refused(made, tmp_path, owner, capsys):
    shutil.copytree(made("cospadi_group") / "out", tmp_path / "own")
    config = json.loads((tmp_path / "own/config.json").read_text())
    config["quantization_config"]["modules"]["model.layers.1.mlp.up_proj"]["shares"] = owner
    (tmp_path / "own/config.json").write_text(json.dumps(config))
    refused(tmp_path / "own", "which does not store what it needs|lacks the tensors", capsys)


@pytest.mark.parametrize("method", cases(GROUPED, {"cospadi_outputs", "basis_sharing+int8"}))
def test_compress_in_python_shares_too(made, tmp_path, method):
    dense = made(method) / "out.work/model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(dense), AutoTokenizer.from_pretrained(dense)
    documents = json.loads((made(method) / "out.work/documents.json").read_text())
    factorization, _, quantization = method.partition("+")
    smaller = cospadi.compress(
        *(model, tokenizer, 0.3, factorization, documents, ["calibration=smoke"]), quantization=quantization or "none"
    ).eval()
    assert shared_parameters(smaller) == groups_in(made(method))
    smaller.save_pretrained(tmp_path / "out")
    assert ledger.ledger(tmp_path / "out")["removed"] >= 0.3
    again = cospadi.load(tmp_path / "out")
    assert shared_parameters(again) == groups_in(made(method))
    assert logits(again).equal(logits(smaller))
    stored = dict(read_factors([factors_file(made(method))]))
    for name, layer in smaller.named_modules():  # the same numbers as block by block, but for the grams' rounding
        if isinstance(layer, CompressedLinear):
            assert float((layer.dense_weight() - stored[name].weight()).norm() / layer.dense_weight().norm()) < 0.2


@pytest.mark.parametrize("method", ["cospadi_group", "basis_sharing", "cospadi_outputs"])
def test_layers_with_biases_share_too(made, tmp_path, method):
    dense = made("cospadi_group") / "out.work/model"
    tokenizer = AutoTokenizer.from_pretrained(dense)
    plain = AutoModelForCausalLM.from_pretrained(dense).config
    sizes = {
        key: getattr(plain, key) for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    }
    sizes |= {"num_attention_heads": plain.num_attention_heads, "num_key_value_heads": plain.num_key_value_heads}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, max_position_embeddings=2048))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    documents = json.loads((made("cospadi_group") / "out.work/documents.json").read_text())
    factorization, _, quantization = method.partition("+")
    smaller = cospadi.compress(
        *(model, tokenizer, 0.3, factorization, documents, ["calibration=smoke"]), quantization=quantization or "none"
    ).eval()
    smaller.save_pretrained(tmp_path / "out")
    again = cospadi.load(tmp_path / "out")
    again.tie_weights()
    assert shared_parameters(again) == shared_parameters(smaller) != []
    assert again.model.layers[1].self_attn.q_proj.bias.abs().sum() > 0
    assert logits(again).equal(logits(smaller))


def test_a_stage_refuses_half_a_group(made, tmp_path, capsys):
    work = made("cospadi_group") / "out.work"
    command = ["factorize", "model=tiny_llama", "calibration=smoke", "factorization=cospadi_group"]
    command += ["--model", str(work / "model"), "--grams", str(work / "grams"), "--factors", str(tmp_path / "f")]
    assert cli.main([*command, "--record", str(tmp_path / "r"), "--layers", "1-1"]) == 1
    assert "Set --layers 000-001" in capsys.readouterr().err
    assert cli.main([*command, "--record", str(tmp_path / "r"), "--layers", "000-001"]) == 0
    assert json.loads((tmp_path / "r").read_text())["settings"]["factorization"] | {"device": "auto"} == asdict(
        load(command[1:4]).factorization
    )
