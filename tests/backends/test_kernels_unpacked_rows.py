"""Contractions of few rows over columns as they lie: awkward sizes, batches, epilogues, and what is left to others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tvm import te, tirx

from optc.backends.cpu.single import aligned, compile_kernel
from optc.backends.cpu.target import resolve
from optc.backends.kernels import contraction, unpacked_rows

F = np.float32
n, k = tirx.Var("n", "int64"), tirx.Var("k", "int64")


def data(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(F)


def function(a: tuple[Any, ...], b: tuple[Any, ...], *, relu: bool = False, dtype: str = "float32") -> Any:
    left, right = te.placeholder(a, dtype, "a"), te.placeholder(b, dtype, "b")
    result = contraction.narrow(contraction.matmul(left, right, a[:-2]), dtype)
    if relu:
        total = result
        result = te.compute(total.shape, lambda *i: tirx.max(total(*i), tirx.const(0, dtype)), "relu")
    return te.create_prim_func([left, right, result], "int64")


def call(scheduled: Any, target: str, *arrays: np.ndarray) -> np.ndarray:
    tensors = [aligned(a) for a in arrays]
    compile_kernel(scheduled, resolve(target))(*tensors)
    return tensors[-1].numpy()


@pytest.mark.parametrize("target", ["x86-64-v2", "x86-64-v3"])
@pytest.mark.parametrize(
    ("m", "depth", "columns"),
    [(1, 1, 1), (1, 64, 16), (1, 9, 2500), (2, 96, 130), (3, 34, 1031), (5, 8, 7), (8, 40, 600), (16, 21, 530)],
)
def test_sizes(target, m, depth, columns):
    scheduled = unpacked_rows.schedule(function((m, depth), (depth, columns)), resolve(target))
    a, b = data(m, depth), data(depth, columns, seed=1)
    got = call(scheduled, target, a, b, np.full((m, columns), np.nan, F))
    np.testing.assert_allclose(got, a.astype(np.float64) @ b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 1), (7, 3), (1100, 30), (16, 8)])
def test_symbolic_sizes_batches_and_an_epilogue(sizes):
    columns, depth = sizes
    scheduled = unpacked_rows.schedule(function((3, 2, k), (3, k, n), relu=True), resolve("x86-64-v3"))
    a, b = data(3, 2, depth), data(3, depth, columns, seed=1)
    got = call(scheduled, "x86-64-v3", a, b, np.full((3, 2, columns), np.nan, F))
    np.testing.assert_allclose(got, np.maximum(a.astype(np.float64) @ b, 0), rtol=1e-4, atol=1e-5)


def test_half_precision_sums_in_float32():
    scheduled = unpacked_rows.schedule(function((2, 50), (50, 40), dtype="float16"), resolve("x86-64-v3"))
    a, b = data(2, 50).astype(np.float16), data(50, 40, seed=1).astype(np.float16)
    got = call(scheduled, "x86-64-v3", a, b, np.zeros((2, 40), np.float16))
    np.testing.assert_allclose(got, a.astype(F) @ b.astype(F), rtol=2e-3)


def test_what_is_left_to_others():
    target = resolve("x86-64-v3")
    assert unpacked_rows.schedule(function((17, 8), (8, 32)), target) is None
    assert unpacked_rows.schedule(function((n, 8), (8, 32)), target) is None
    a, b = te.placeholder((2, 8), "float32", "a"), te.placeholder((2, 8, 16), "float32", "b")
    packed = te.create_prim_func([a, b, contraction.packed_matmul(a, b, 32)], "int64")
    assert unpacked_rows.schedule(packed, target) is None
