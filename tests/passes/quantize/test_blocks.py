"""Rounding of weight matrices: errors are bounded, and rounding by calibration data is never worse on it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.passes.quantize.blocks import adaround, gptq, loss, nearest
from optc.passes.quantize.encoding import limits

TYPES = ("int4", "uint4", "int8", "uint8")


def gram(rng, depth, rows=200):
    x = rng.normal(0, 1, (rows, depth)) @ rng.normal(0, 1, (depth, depth))
    return x.T @ x / rows


@settings(deadline=None, max_examples=40)
@given(
    depth=st.integers(1, 70),
    columns=st.integers(1, 9),
    block=st.sampled_from([0, 16, 32]),
    dtype=st.sampled_from(TYPES),
    seed=st.integers(0, 99),
)
def test_nearest_is_off_by_about_half_a_step(depth, columns, block, dtype, seed):
    rng = np.random.default_rng(seed)
    matrix = (rng.normal(0, 1, (depth, columns)) * 10.0 ** rng.integers(-3, 4)).astype(np.float32)
    found = nearest(matrix, dtype, block)
    assert found.values.shape == matrix.shape
    assert found.scale.shape == ((-(-depth // block), columns) if block else (columns,))
    assert (found.zero is not None) == dtype.startswith("u")
    low, high = limits(dtype)
    extent = np.abs(matrix).max(0)
    # Whole ranges are among those tried, so the mean error is at most that of them: half a step, of the whole extent.
    step = 2 * extent / (high - low - 1)
    error = np.sqrt(((found.dequantized() - matrix) ** 2).mean(0))
    assert np.all(error <= step * 0.51 + 1e-12)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_short_last_block_is_rounded_as_a_whole_one(dtype, rng):
    matrix = rng.normal(0, 1, (35, 50)).astype(np.float32)
    matrix[-1] *= 0.1
    last, alone = nearest(matrix, dtype, 32), nearest(matrix[32:], dtype)
    np.testing.assert_array_equal(last.values[32:], alone.values)
    np.testing.assert_array_equal(last.scale[1], alone.scale)


def test_zeros_stay_zeros():
    for dtype in TYPES:
        assert not nearest(np.zeros((20, 3), np.float32), dtype, 16).dequantized().any()


@pytest.mark.parametrize("block", [0, 16])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("algorithm", [gptq, adaround])
def test_calibrated_rounding_makes_products_better(algorithm, dtype, block, rng):
    matrix = rng.normal(0, 1, (48, 12)).astype(np.float32)
    second = gram(rng, 48)
    plain, found = nearest(matrix, dtype, block), algorithm(matrix, dtype, second, block)
    assert loss(matrix, found, second) < 0.8 * loss(matrix, plain, second)
    assert np.array_equal(found.scale, plain.scale)


def test_gptq_without_correlations_is_nearest(rng):
    matrix = rng.normal(0, 1, (40, 5)).astype(np.float32)
    found, plain = gptq(matrix, "int4", np.eye(40), 16), nearest(matrix, "int4", 16)
    assert np.array_equal(found.values, plain.values)


def test_channels_that_are_always_zero_do_no_harm(rng):
    matrix = rng.normal(0, 1, (20, 4)).astype(np.float32)
    second = gram(rng, 20)
    second[3], second[:, 3] = 0, 0
    for algorithm in (gptq, adaround):
        assert np.isfinite(algorithm(matrix, "int4", second).dequantized()).all()
        assert np.isfinite(algorithm(matrix, "int4", np.zeros((20, 20))).dequantized()).all()
