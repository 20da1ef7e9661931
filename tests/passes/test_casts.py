"""Casts."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir
import pytest

from optc.passes.simplify.casts import PASS, is_lossless

D = oir.DataType
CHAIN = "cast(cast(x, wider), t) => cast(x, t)"


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (D.FLOAT16, D.FLOAT, True),
        (D.BFLOAT16, D.FLOAT, True),
        (D.FLOAT, D.DOUBLE, True),
        (D.FLOAT, D.FLOAT16, False),
        (D.FLOAT16, D.BFLOAT16, False),
        (D.BFLOAT16, D.FLOAT16, False),
        (D.DOUBLE, D.FLOAT, False),
        (D.INT32, D.INT64, True),
        (D.INT64, D.INT32, False),
        (D.UINT8, D.INT16, True),
        (D.UINT8, D.INT8, False),
        (D.INT8, D.UINT8, False),
        (D.INT8, D.FLOAT16, True),
        (D.INT16, D.FLOAT16, False),
        (D.UINT16, D.FLOAT16, False),
        (D.INT32, D.FLOAT, False),
        (D.INT32, D.DOUBLE, True),
        (D.INT64, D.DOUBLE, False),
        (D.BOOL, D.INT64, True),
        (D.BOOL, D.FLOAT16, True),
        (D.INT64, D.BOOL, False),
        (D.FLOAT, D.INT64, False),
        (D.FLOAT8E4M3FN, D.FLOAT, False),
        (D.FLOAT, D.STRING, False),
    ],
)
def test_is_lossless(source, target, expected):
    assert is_lossless(source, target) == expected


@pytest.mark.parametrize("source", [D.INT8, D.UINT8, D.INT16, D.UINT16, D.BOOL])
@pytest.mark.parametrize("target", [D.INT8, D.UINT8, D.INT16, D.FLOAT16, D.FLOAT, D.BFLOAT16])
def test_is_lossless_by_enumeration(source, target):
    bits = 1 if source == D.BOOL else source.bitwidth
    low = -(1 << bits - 1) if source.is_signed() and source != D.BOOL else 0
    every = np.arange(low, low + (1 << bits)).astype(source.numpy())
    with np.errstate(all="ignore"):
        survives = np.array_equal(every.astype(target.numpy()).astype(np.float64), every.astype(np.float64))
    assert is_lossless(source, target) == survives


def test_cast_to_own_type(build, check):
    model = build("(float[b] x) => (float[b] y) { a = Neg(x) c = Cast<to=1>(a) y = Relu(c) }")
    check(model, PASS, {"x": np.float32([1, -1])}, fired={"cast(x, type of x) => x": 1}, ops=["Neg", "Relu"])


def test_lossless_chain(build, check):
    model = build("(float16[b] x) => (int64[b] y) { c = Cast<to=11>(x) y = Cast<to=7>(c) }")
    check(model, PASS, {"x": np.float16([1.5, -1.5])}, fired={CHAIN: 1}, ops=["Cast"])


def test_there_and_back(build, check):
    model = build("(int32[b] x) => (int32[b] y) { c = Cast<to=7>(x) d = Cast<to=6>(c) y = Neg(d) }")
    check(model, PASS, {"x": np.int32([1, -5])}, fired={CHAIN: 1}, ops=["Neg"])


def test_first_cast_with_other_use_stays(build, check):
    model = build("(int32[b] x) => (int64[b] z, float[b] y) { c = Cast<to=7>(x) y = Cast<to=1>(c) z = Neg(c) }")
    check(model, PASS, {"x": np.int32([1, -5])}, fired={CHAIN: 1}, ops=["Cast", "Cast", "Neg"])


def test_lossy_chain_stays(build, check):
    model = build("(float[b] x) => (float[b] y) { c = Cast<to=7>(x) y = Cast<to=1>(c) }")
    result = check(model, PASS, {"x": np.float32([1.5, -1.5])}, fired={})
    assert result.skipped[0].reason == "the cast from FLOAT to INT64 loses values"


def test_cast_like(build, check):
    model = build("(float[b] x, double[b] z) => (double[b] y) { y = CastLike(x, z) }")
    check(model, PASS, {"x": np.float32([1.5]), "z": np.float64([0])}, ops=["Cast"])
    model = build("(float[b] x, float[b] z) => (float[b] y) { c = CastLike(x, z) y = Relu(c) }")
    check(model, PASS, {"x": np.float32([1.5]), "z": np.float32([0])}, ops=["Relu"])
