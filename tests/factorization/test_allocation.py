"""Ratios of projections against an exhaustive search."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.errors import UserError
from cospadi.factorization import allocation
from cospadi.factorization.allocation import allocate, expected

SIZES = {"a": 100, "b": 300, "c": 200}


def curves(scales, slopes) -> dict[str, dict[float, float]]:
    return {
        name: {ratio: scale * float(np.exp(slope * ratio)) for ratio in allocation.TRIED}
        for name, scale, slope in zip(SIZES, scales, slopes, strict=True)
    }


def test_projections_alike_get_the_same():
    ratios = allocate(curves([1, 3, 2], [9, 9, 9]), SIZES, 0.3)
    assert ratios == pytest.approx(dict.fromkeys(SIZES, 0.3), abs=0.01)


def test_what_matters_more_loses_less():
    ratios = allocate(curves([1, 30, 2], [9, 9, 9]), SIZES, 0.3)
    assert ratios["b"] < 0.3 < ratios["a"]


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.floats(0.01, 100), min_size=3, max_size=3),
    st.lists(st.floats(4, 12), min_size=3, max_size=3),
    st.sampled_from([0.2, 0.3, 0.5]),
)
def test_no_other_choice_of_the_same_bits_is_expected_to_lose_less(scales, slopes, ratio):
    """All choices of a coarse grid that remove as much."""
    losses = curves(scales, slopes)
    found = allocate(losses, SIZES, ratio)
    wanted = ratio * sum(SIZES.values())
    assert sum(SIZES[name] * r for name, r in found.items()) >= wanted - 1e-6
    choices = np.round(np.arange(allocation.LOWEST, allocation.HIGHEST + 1e-9, 0.1), 3)

    def loss(ratios) -> float:
        return sum(allocation._curve(losses[name], np.array([r]))[0] for name, r in zip(SIZES, ratios, strict=True))

    removing = (rs for rs in itertools.product(choices, repeat=3) if np.dot(list(SIZES.values()), rs) >= wanted - 1e-9)
    assert loss(found.values()) <= 1.02 * min(map(loss, removing))


def test_losses_that_fall_with_the_ratio_are_taken_as_flat():
    """A rough solve is not quite monotone; less is never better."""
    losses = {"a": {0.1: 1.0, 0.5: 0.9, 0.8: 2.0}, "b": {0.1: 1.0, 0.5: 3.0, 0.8: 9.0}}
    assert expected(losses, {"a": 0.5, "b": 0.1}) == pytest.approx(2.0)
    assert expected(losses, {"a": 0.3, "b": 0.3}) == pytest.approx(1.0 + 3**0.5)
    assert allocate(losses, {"a": 10, "b": 10}, 0.3)["a"] >= 0.5


def test_what_nothing_is_known_of_loses_as_much_as_all_together():
    """An expert that no token of the calibration chose."""
    losses = curves([1, 30, 2], [9, 9, 9]) | {"expert": {}}
    ratios = allocate(losses, SIZES | {"expert": 500}, 0.3)
    assert list(ratios) == [*SIZES, "expert"]
    assert ratios["expert"] == 0.3
    assert {name: ratios[name] for name in SIZES} == allocate(curves([1, 30, 2], [9, 9, 9]), SIZES, 0.3)
    assert allocate({"expert": {}}, {"expert": 5}, 0.3) == {"expert": 0.3}


@pytest.mark.parametrize("ratio", [0.01, 0.9])
def test_what_cannot_be_divided_is_refused(ratio):
    with pytest.raises(UserError, match=r"cannot be divided among projections.*allocation=uniform"):
        allocate(curves([1, 1, 1], [9, 9, 9]), SIZES, ratio)
