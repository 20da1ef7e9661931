"""Encodings hold zero, cover their range, and round as QuantizeLinear does."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.ir.reference import evaluate
from optc.passes.quantize.encoding import DTYPES, encode, limits
from optc.passes.quantize.weights import per_channel, round_bias

TYPES = ("uint8", "int8", "uint16", "int16")
BOUNDS = st.floats(-1e6, 1e6, width=32)


@settings(deadline=None, max_examples=60)
@given(a=BOUNDS, b=BOUNDS, dtype=st.sampled_from(TYPES), symmetric=st.booleans())
def test_the_range_is_covered_and_zero_is_exact(a, b, dtype, symmetric):
    low, high = min(a, b), max(a, b)
    encoding = encode(low, high, dtype, symmetric=symmetric)
    least, largest = limits(dtype)
    assert least <= encoding.zero <= largest
    assert encoding.scale > 0
    values = np.array([low, 0.0, high], np.float32)
    rounded = encoding.round(values)
    assert rounded[1] == 0
    # The zero point is rounded too, so an end may lose half a step besides its own half.
    assert np.all(np.abs(rounded - values) <= encoding.scale * 1.001 + 1e-30)


@pytest.mark.parametrize("dtype", TYPES)
def test_rounding_is_that_of_the_operators(dtype, build, rng):
    encoding = encode(-1.3, 2.9, dtype, symmetric=False)
    x = rng.normal(0, 3, (4, 5)).astype(np.float32)
    model = build(
        "(float[4,5] x) => (float[4,5] y) { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }",
        s=np.float32(encoding.scale),
        z=np.array(encoding.zero, DTYPES[dtype]),
    )
    assert np.array_equal(encoding.round(x), evaluate(model, {"x": x})["y"])


def test_an_empty_range_has_a_scale():
    assert encode(0.0, 0.0, "uint8", symmetric=False).scale == 1.0
    assert encode(0.0, 0.0, "int8", symmetric=True).zero == 0


@pytest.mark.parametrize(("axis", "single", "bits"), [(0, False, 8), (1, False, 7), (0, True, 8)])
def test_weights_are_off_by_half_a_step(axis, single, bits, rng):
    weight = rng.normal(0, 1, (6, 5)).astype(np.float32)
    found = per_channel(weight, axis, single=single, bits=bits)
    assert np.abs(found.values.astype(int)).max() == (1 << (bits - 1)) - 1
    step = found.scale if single else np.expand_dims(found.scale, 1 - axis)
    assert np.all(np.abs(found.dequantized() - weight) <= step * 0.50001)


def test_channels_of_zeros_and_huge_biases():
    weight = np.array([[0.0, 0.0], [1e-6, 2e-6], [1.0, -1.0]], np.float32)
    bias = np.array([3.0, 1e6, 0.5], np.float32)
    found = per_channel(weight, 0, bias=bias, x_scale=0.01)
    integers = round_bias(bias, found.scale * np.float32(0.01))
    assert np.allclose(integers * (found.scale * 0.01), bias, rtol=1e-6)
    assert per_channel(weight, 0).scale[0] == 1.0
