"""Allocation: the fewest truncations that fit, and a model that is left as it was found."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from cospadi import models, settings
from cospadi.errors import UserError
from cospadi.factorization import budget
from cospadi.factorization import rank_search as factorization_rank_search
from cospadi.factorization import settings as factorization_settings
from cospadi.models import Projection
from cospadi.pipeline.stages import calibration, sources
from cospadi.pipeline.stages import rank_search as stages_rank_search
from cospadi.records import FinishedRows, read_json
from cospadi.sources.checkpoints import prepare_model


@st.composite
def searches(draw):
    projections = [
        Projection(f"p{i}", 0, f"p{i}", "p0", draw(st.integers(8, 64)), draw(st.integers(8, 64)))
        for i in range(draw(st.integers(1, 4)))
    ]
    fractions = draw(st.lists(st.sampled_from([0.1, 0.3, 0.5, 0.6, 0.8, 0.9]), min_size=1, max_size=4, unique=True))
    pairs = sorted((draw(st.floats(1, 100)), p.name, fraction) for p in projections for fraction in fractions)
    return projections, pairs, draw(st.sampled_from([0.05, 0.2, 0.35, 0.5, 0.7]))


def naive_bits(projections, pairs):
    """Each projection at its smallest accepted fraction, or dense: counted from scratch."""
    bits = 0
    for p in projections:
        fractions = [fraction for _, name, fraction in pairs if name == p.name]
        if fractions:
            rank = max(int(min(fractions) * p.d_in * p.d_out / (p.d_in + p.d_out) + 1e-9), 1)
            bits += 16 * rank * (p.d_in + p.d_out)
        else:
            bits += 16 * p.d_in * p.d_out
    return bits


@given(searches())
def test_the_fewest_truncations_that_fit_are_accepted(search):
    projections, pairs, ratio = search
    allowed = sum(budget.budget_bits(p.d_in, p.d_out, ratio) for p in projections)
    fitting = [count for count in range(len(pairs) + 1) if naive_bits(projections, pairs[:count]) <= allowed]
    if not fitting:
        with pytest.raises(UserError, match=r"truncation_ratios cannot reach factorization\.compression_ratio"):
            factorization_rank_search.fewest_that_fit(projections, pairs, ratio)
        return
    accepted = factorization_rank_search.fewest_that_fit(projections, pairs, ratio)
    assert accepted == min(fitting)
    kept = factorization_rank_search.smallest_accepted(pairs[:accepted])
    assert factorization_rank_search.bits_of(projections, kept) == naive_bits(projections, pairs[:accepted]) <= allowed


@given(searches(), st.integers(0, 16))
def test_each_projection_takes_its_smallest_accepted_fraction(search, count):
    _, pairs, _ = search
    kept = factorization_rank_search.smallest_accepted(pairs[:count])
    assert set(kept) == {name for _, name, _ in pairs[:count]}
    for _, name, fraction in pairs[:count]:
        assert kept[name] <= fraction
        assert (name, kept[name]) in {(n, f) for _, n, f in pairs[:count]}


@given(st.integers(1, 99), st.integers(1, 99), st.floats(0.01, 0.99))
def test_a_truncated_rank_keeps_the_fraction(d_in, d_out, kept):
    rank = factorization_rank_search.truncated_rank(Projection("p", 0, "p", "p", d_in, d_out), kept)
    assert rank >= 1
    assert rank == 1 or rank * (d_in + d_out) <= kept * d_in * d_out + 1e-6
    assert (rank + 1) * (d_in + d_out) > kept * d_in * d_out


# --- on a tiny model


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """``(config, model, documents, grams)`` of a tiny calibrated model."""
    folder = tmp_path_factory.mktemp("allocation")
    config = settings.load(
        [
            "study=smoke",
            "factorization=asvd_search",
            "factorization.rank_search.truncation_ratios=[0.3,0.6]",
            "factorization.rank_search.n_samples=2",
            "factorization.compression_ratio=0.3",
            "calibration.n_samples=4",
            "calibration.sample_length=32",
            "calibration.device=cpu",
        ]
    )
    prepare_model(config.model, folder / "model")
    documents = folder / "documents.json"
    sources.prepare_text(config.calibration.text, documents, folder / "text.json")
    calibration.calibrate(config, folder / "model", documents, folder / "grams", folder / "calibration.json")
    return config, folder / "model", documents, folder / "grams"


@pytest.fixture(scope="module")
def sensitivity(room, tmp_path_factory):
    config, model, documents, grams = room
    file = tmp_path_factory.mktemp("sensitivity") / "sensitivity.json"
    stages_rank_search.search_ranks(config, model, documents, grams, file)
    return read_json(file)


def test_a_search_that_was_cut_off_goes_on(room, sensitivity, tmp_path, monkeypatch):
    config, model, documents, grams = room
    measured = []
    perplexity = stages_rank_search._perplexity

    def cut(*arguments):
        measured.append(perplexity(*arguments))
        if len(measured) == 10:
            raise KeyboardInterrupt
        return measured[-1]

    monkeypatch.setattr(stages_rank_search, "_perplexity", cut)
    with pytest.raises(KeyboardInterrupt):
        stages_rank_search.search_ranks(config, model, documents, grams, tmp_path / "sensitivity.json")
    stages_rank_search.search_ranks(config, model, documents, grams, tmp_path / "sensitivity.json")
    assert read_json(tmp_path / "sensitivity.json")["perplexities"] == sensitivity["perplexities"]
    n_ratios = len(config.factorization.rank_search.truncation_ratios)
    again = 9 % n_ratios or n_ratios  # of the dense model, and of the projection in which it was cut off
    assert len(measured) == 1 + n_ratios * len(sensitivity["perplexities"]) + 1 + again
    assert [file.name for file in tmp_path.iterdir()] == ["sensitivity.json"]


def test_the_model_is_whole_again_after_each_truncation(room, tmp_path, monkeypatch):
    config, folder, _, grams = room
    loaded = []
    monkeypatch.setattr(models, "load", lambda *a, load=models.load: loaded.append(load(*a)) or loaded[-1])
    tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    result = stages_rank_search.perplexities_alone(config, folder, grams, tokens, FinishedRows(tmp_path / "once", ""))
    model, fresh = loaded.pop(), models.load(folder, "float32", torch.device("cpu"))
    state, expected = model.state_dict(), fresh.state_dict()
    assert all(state[name].equal(expected[name]) for name in expected)
    again = stages_rank_search.perplexities_alone(config, folder, grams, tokens, FinishedRows(tmp_path / "again", ""))
    assert again == result
    projections = models.find_projections(folder, config.model)
    assert set(result["perplexities"]) == {p.name for p in projections}
    p = projections[3]  # one entry, by hand
    plain = settings.load(["study=smoke", "factorization=asvd"]).factorization
    absolute_mean = stages_rank_search.read_statistics(grams, p.layer, p.shared_input, torch.device("cpu"))[1]
    weight = models.Checkpoint(folder).weight(p)
    rank = factorization_rank_search.truncated_rank(p, 0.3)
    problem = stages_rank_search.Problem(weight, torch.eye(p.d_in).double(), absolute_mean, rank)
    models.replace_weights(fresh, [(p.name, stages_rank_search.factorize(plain, problem).weight())])
    assert stages_rank_search._perplexity(fresh, tokens) == result["perplexities"][p.name]["0.3"]
    assert result["perplexities"][p.name]["0.3"] != result["dense_perplexity"]


def test_the_model_is_whole_again_after_a_failure(room):
    config, folder, _, grams = room
    model = models.load(folder, "float32", torch.device("cpu"))
    p = models.find_projections(folder, config.model)[0]
    before = model.get_submodule(p.name).weight.clone()
    truncated = stages_rank_search._truncated(model, config, folder, grams, [p], {p.name: 0.3})
    truncated.__enter__()
    assert not model.get_submodule(p.name).weight.equal(before)
    failure = RuntimeError("measuring failed")
    assert not truncated.__exit__(RuntimeError, failure, None)
    assert model.get_submodule(p.name).weight.equal(before)


def test_chosen_ranks_meet_the_bits(room, sensitivity):
    config, folder, documents, grams = room
    chosen = stages_rank_search.chosen_ranks(config, folder, documents, grams, sensitivity)
    projections = models.find_projections(folder, config.model)
    allowed = sum(budget.budget_bits(p.d_in, p.d_out, 0.3) for p in projections)
    stored = sum(
        budget.dense_bits(p.d_in, p.d_out) if rank is None else budget.low_rank_bits(p.d_in, p.d_out, rank)
        for p, rank in ((p, chosen["ranks"][p.name]) for p in projections)
    )
    assert stored == chosen["stored_bits"] <= allowed


def test_a_truncation_that_breaks_the_model_is_the_last_resort(room, sensitivity):
    config, folder, documents, grams = room
    rows = {name: dict(row) for name, row in sensitivity["perplexities"].items()}
    broken = next(iter(rows))
    rows[broken] = dict.fromkeys(rows[broken], float("nan"))
    chosen = stages_rank_search.chosen_ranks(config, folder, documents, grams, {"perplexities": rows})
    assert chosen["ranks"][broken] is None


def test_a_perplexity_budget_is_kept_or_refused(room, sensitivity):
    config, folder, documents, grams = room
    dense = sensitivity["dense_perplexity"]
    given_search = config.factorization.rank_search
    generous = factorization_settings.RankSearchConfig(list(given_search.truncation_ratios), 100 * dense, 2)
    strict = factorization_settings.RankSearchConfig(list(given_search.truncation_ratios), 1.0, 2)
    try:
        config.factorization.rank_search = generous
        chosen = stages_rank_search.chosen_ranks(config, folder, documents, grams, sensitivity)
        assert None not in chosen["ranks"].values()  # everything is accepted at its smallest ratio
        config.factorization.rank_search = strict
        with pytest.raises(UserError, match="perplexity_budget"):
            stages_rank_search.chosen_ranks(config, folder, documents, grams, sensitivity)
    finally:
        config.factorization.rank_search = given_search


def test_unreachable_ratios_and_missing_settings_are_refused(room, sensitivity):
    config, folder, documents, grams = room
    config.factorization.compression_ratio = 0.9
    try:
        with pytest.raises(UserError, match=r"compression_ratio=0\.9.*Add a truncation ratio of 0\.1"):
            stages_rank_search.chosen_ranks(config, folder, documents, grams, sensitivity)
    finally:
        config.factorization.compression_ratio = 0.3
    plain = settings.load(["study=smoke", "factorization=asvd"])
    with pytest.raises(UserError, match="rank_search is not set"):
        stages_rank_search.chosen_ranks(plain, folder, documents, grams, sensitivity)
