"""Gathering what is not zero, against numpy and indexing."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cospadi.kernels.nonzeros import gather, scatter

DTYPES = [torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.float8_e4m3fn]
sizes = st.integers(0, 19)


@given(sizes, sizes, st.sampled_from(DTYPES), st.floats(0, 1), st.integers(0, 2**31))
def test_it_is_what_indexing_gives_and_comes_back(rows, columns, dtype, density, seed):
    draw = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=draw) < density
    numbers = (torch.randn(rows, columns, generator=draw) * 30 * kept).abs().to(dtype)
    mask, values = gather(numbers)
    nonzero = numbers.float() != 0
    assert mask.numpy().tobytes() == np.packbits(nonzero.numpy(), bitorder="little").tobytes()
    assert values.dtype == dtype
    assert values.float().equal(numbers.float()[nonzero])
    back = scatter(mask, values, rows, columns)
    assert back.dtype == dtype
    assert back.float().equal(numbers.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_a_zero_with_a_sign_is_a_zero_and_signs_stay(dtype):
    mask, values = gather(torch.tensor([[-0.0, -2.0, 0.0]]).to(dtype))
    assert mask.tolist() == [0b010]
    assert values.float().tolist() == [-2.0]


def test_the_lowest_whole_number_is_not_a_zero():
    """Its only set bit is that of the sign."""
    mask, values = gather(torch.tensor([[-128, 0]], dtype=torch.int8))
    assert mask.tolist() == [1]
    assert values.tolist() == [-128]


def test_columns_that_are_not_contiguous():
    numbers = torch.tensor([[1.0, 0.0], [2.0, 3.0]]).half().T
    mask, values = gather(numbers)
    assert values.tolist() == [1.0, 2.0, 3.0]
    assert scatter(mask, values, 2, 2).equal(numbers)


def test_a_mask_that_does_not_fit_is_refused():
    mask, values = gather(torch.ones(3, 4).half())
    with pytest.raises(ValueError, match="2 bytes for 4 × 5 numbers"):
        scatter(mask, values, 4, 5)
    with pytest.raises(ValueError, match="12 bits set for 11 values"):
        scatter(mask, values[:-1], 3, 4)
