"""Packed contractions of one to four rows: awkward sizes, epilogues, other machines, and what is left to others."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import te, tirx

from optc.backends.cpu.single import aligned
from optc.backends.cpu.target import resolve, to_tvm
from optc.backends.kernels import contraction, few_rows

F = np.float32


def data(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(F)


def function(rows, k, n, dtype="float32", epilogue=lambda acc: acc):
    a = te.placeholder((*rows, k), dtype, "a")
    b = te.placeholder((-(-n // 16), k, 16), dtype, "b")
    return te.create_prim_func([a, b, epilogue(contraction.packed_matmul(a, b, n))], "int64")


def relu(acc):
    return te.compute(acc.shape, lambda *i: tirx.max(acc(*i), tirx.const(0, "float32")), "relu")


def call(scheduled, *arrays, target="x86-64-v3"):
    library = tvm.compile(scheduled.with_attr("global_symbol", "main"), target=to_tvm(resolve(target)))
    tensors = [aligned(a) for a in arrays]
    library["main"](*tensors)
    return tensors[-1].numpy()


@pytest.mark.parametrize("target", ["x86-64-v2", "x86-64-v3"])
@pytest.mark.parametrize(
    "m, k, n",
    [(1, 1, 1), (1, 64, 16), (1, 7, 17), (1, 30, 257), (2, 96, 130), (2, 5, 48), (3, 34, 100), (4, 64, 64), (4, 9, 33)],
)
def test_sizes(target, m, k, n):
    scheduled = few_rows.schedule(function((m,), k, n), resolve(target))
    a, w = data(m, k), data(k, n, seed=1)
    got = call(scheduled, a, contraction.pack_columns(w, 16), np.full((m, n), np.nan, F), target=target)
    np.testing.assert_allclose(got, a @ w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [(1, 1), (2, 2), (1, 3)])
@pytest.mark.parametrize("n", [50, 64])
def test_several_row_axes_and_an_epilogue(rows, n):
    scheduled = few_rows.schedule(function(rows, 20, n, epilogue=relu), resolve("x86-64-v3"))
    a, w = data(*rows, 20), data(20, n, seed=1)
    got = call(scheduled, a, contraction.pack_columns(w, 16), np.zeros((*rows, n), F))
    np.testing.assert_allclose(got, np.maximum(a @ w, 0), rtol=1e-4, atol=1e-5)


def test_half_precision_sums_in_float32():
    def narrow(acc):
        return contraction.narrow(acc, "float16")

    scheduled = few_rows.schedule(function((1,), 300, 40, "float16", narrow), resolve("x86-64-v3"))
    a, w = data(1, 300).astype(np.float16), data(300, 40, seed=1).astype(np.float16)
    got = call(scheduled, a, contraction.pack_columns(w, 16), np.zeros((1, 40), np.float16))
    np.testing.assert_allclose(got, (a.astype(F) @ w.astype(F)).astype(np.float16), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("target", ["x86-64-v4", "aarch64", "riscv64"])
def test_it_compiles_for_other_machines(target):
    machine = resolve(target)
    for m in (1, 4):
        tvm.compile(
            few_rows.schedule(function((m,), 8, 40), machine).with_attr("global_symbol", "main"),
            target=to_tvm(machine),
        )


def test_other_functions_are_declined():
    target = resolve("x86-64-v3")
    assert few_rows.schedule(function((5,), 8, 16), target) is None
    assert few_rows.schedule(function((te.var("m", "int64"),), 8, 16), target) is None
    a, b = te.placeholder((1, 4), "float32", "a"), te.placeholder((4, 4), "float32", "b")
    plain = te.create_prim_func([a, b, contraction.matmul(a, b, [])], "int64")
    assert few_rows.schedule(plain, target) is None
