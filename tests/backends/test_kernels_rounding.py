"""Cheaper conversions of rounded numbers: equal bit by bit, and only where the bounds allow them."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import te, tirx

from optc.backends.kernels import rounding
from optc.backends.lowering.quantization import saturate


def compute(a, make, change):
    return lambda i: change(make(a(i)))


def run(make, x, dtype):
    """Return ``make`` of every element, simplified."""
    a = te.placeholder((len(x),), str(x.dtype), "a")
    results = []
    for change in (lambda e: e, rounding.simplify):
        b = te.compute((len(x),), compute(a, make, change), "b")
        library = tvm.compile(te.create_prim_func([a, b]).with_attr("global_symbol", "main"), target="llvm")
        out = tvm.runtime.tensor(np.zeros(len(x), dtype))
        library["main"](tvm.runtime.tensor(x), out)
        results.append(out.numpy())
    return results


def values():
    rng = np.random.default_rng(0)
    ties = np.arange(-70000, 70000, dtype=np.float32) + np.float32(0.5)
    near = np.nextafter(ties, np.float32(0))
    odd = np.array([0, -0.0, 1e-40, np.inf, -np.inf, np.nan, 3e38, -3e38, 2**31, -(2.0**31)], np.float32)
    return np.concatenate([ties, near, odd, rng.normal(0, 300, 4096).astype(np.float32)])


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16"])
@pytest.mark.parametrize("zero", [None, 3, -7])
def test_quantized(dtype, zero):
    zero = None if zero is None else tirx.const(zero, "int32")
    x = values()
    plain, simple = run(lambda v: saturate(v, zero, dtype), x, dtype)
    np.testing.assert_array_equal(plain, simple)
    info, offset = np.iinfo(dtype), 0 if zero is None else int(zero.value)
    expected = np.clip(np.rint(np.nan_to_num(x, nan=-np.inf).astype(np.float64)) + offset, info.min, info.max)
    np.testing.assert_array_equal(simple, expected.astype(dtype))


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize(("zero", "other"), [(0, 0), (5, 5), (5, 4)])
def test_quantized_and_dequantized(dtype, zero, other):
    def there_and_back(v):
        q = saturate(v, tirx.const(zero, "int32"), dtype)
        return (q.astype("int32") - tirx.const(other, "int32")).astype("float32") * tirx.const(0.3, "float32")

    np.testing.assert_array_equal(*run(there_and_back, values(), "float32"))
    v = tirx.Var("v", "float32")
    casts = str(rounding.simplify(there_and_back(v))).count("Cast")
    assert casts == 0 if zero == other else casts > 0


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize(("scale", "bounded"), [(0.25, True), (1e-8, False)])
def test_sums_of_small_integers_need_no_bounds_of_their_own(dtype, scale, bounded):
    """A residual: two dequantized bytes, whose sum is quantized again. A tiny scale makes more than int32 holds."""

    def add(v):
        first = saturate(v, tirx.const(3, "int32"), dtype).astype("int32") - tirx.const(3, "int32")
        second = v.astype("int8").astype("int32") - tirx.const(-7, "int32")
        both = first.astype("float32") * tirx.const(0.3, "float32") + second.astype("float32") * tirx.const(
            0.2, "float32"
        )
        return saturate(both / tirx.const(scale, "float32"), tirx.const(5, "int32"), dtype)

    small = values()
    np.testing.assert_array_equal(*run(add, small[np.abs(small) < 100], dtype))
    # Two clamps of floats: of what is rounded first, and of the sum if nothing else bounds it.
    text = rounding.simplify(add(tirx.Var("v", "float32"))).script()
    assert (text.count("T.max("), text.count("T.min(")) == ((3, 3) if bounded else (4, 4))


def test_what_has_no_bounds_stays():
    v = tirx.Var("v", "float32")
    free = tirx.nearbyint(v).astype("int32")
    wide = tirx.nearbyint(tirx.min(tirx.max(v, tirx.const(-1e9, "float32")), tirx.const(1e9, "float32"))).astype(
        "int32"
    )
    half = tirx.nearbyint(tirx.min(v, tirx.const(9.0, "float32"))).astype("int32")
    for expression in (free, wide, half):
        tvm.ir.assert_structural_equal(rounding.simplify(expression), expression)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_bytes_are_narrowed_with_saturation(dtype):
    v = tirx.Var("v", "float32")
    text = str(rounding.simplify(saturate(v, tirx.const(5, "int32"), dtype)))
    assert "lrint" in text and "nearbyint" not in text


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("zero", [0, 3, 128, -128])
@pytest.mark.parametrize("factor", [1 - 2.0**-24, 0.003, -0.7])
def test_scaled_sums_need_no_bounds(dtype, zero, factor):
    info = np.iinfo(np.int32)
    x = np.concatenate([np.arange(-70000, 70000, 7), [info.min, info.min + 1, info.max, info.max - 1]]).astype(np.int32)

    def scaled(v):
        return saturate(v.astype("float32") * tirx.const(factor, "float32"), tirx.const(zero, "int32"), dtype)

    plain, simple = run(scaled, x, dtype)
    np.testing.assert_array_equal(plain, simple)


def test_bounds_of_a_factor_count():
    v, f = tirx.Var("v", "int32"), tirx.Var("f", "float32")

    def clamped(bound):
        return tirx.min(tirx.max(f, tirx.const(-bound, "float32")), tirx.const(bound, "float32"))

    def bounds(factor):
        text = str(rounding.simplify(saturate(v.astype("float32") * factor, tirx.const(0, "int32"), "uint8")))
        assert "lrint" in text
        return "255.0" in text

    assert not bounds(clamped(0.5))
    assert bounds(clamped(1.0))
    assert bounds(f)
