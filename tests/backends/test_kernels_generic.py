"""The generic schedule and the naming of sizes: same numbers, expected structure, symbolic sizes included."""

import re

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import s_tir, te, tirx, topi

from optc.backends.cpu.target import resolve, to_tvm
from optc.backends.kernels import generic
from optc.backends.kernels.name_dims import name_dims
from optc.backends.kernels.schedule import schedule_kernel

TARGET = resolve("cpu")
n = tirx.Var("n", "int64")


def function(shapes, compute):
    holders = [te.placeholder(shape, "float32", name=f"a{i}") for i, shape in enumerate(shapes)]
    return te.create_prim_func([*holders, compute(*holders)], "int64")


def softmax(x, axis=-1):
    shifted = np.exp(x - x.max(axis, keepdims=True))
    return shifted / shifted.sum(axis, keepdims=True)


def diagonal(x):
    return np.diagonal(x, axis1=1, axis2=2)[:, None, :] + np.arange(5)[None, :, None]


CASES = {
    "element-wise": ([(n, 33), (33,)], lambda a, b: topi.tanh(topi.add(a, b)), lambda a, b: np.tanh(a + b)),
    "vector": ([(16, 64)], lambda a: topi.exp(a), np.exp),
    "rows": ([(n, 12, n * 2)], lambda a: topi.nn.softmax(a, axis=-1), softmax),
    "columns": ([(5, 12, 64)], lambda a: topi.nn.softmax(a, axis=1), lambda a: softmax(a, 1)),
    "contraction": (
        [(n, 33), (33, 64)],
        lambda a, b: topi.nn.relu(topi.matmul(a, b)),
        lambda a, b: np.maximum(a @ b, 0),
    ),
    "reduction": ([(n, 4, 330)], lambda a: topi.sum(a, axis=(1, 2)), lambda a: a.sum((1, 2))),
    "several sums": ([(n, 192)], lambda a: topi.sum(a, axis=0), lambda a: a.sum(0)),
    "all": ([(n, 4, 33)], lambda a: topi.sum(a), lambda a: a.sum()),
    "odd rows": (
        [(3, 16, 7), (3, 16, 7)],
        lambda a, b: te.compute(a.shape, lambda *i: a(*i) * b(*i)),
        lambda a, b: a * b,
    ),
    "odd channels": (
        [(2, 16, 5, 3), (1, 16, 1, 1), (2, 1, 5, 3)],
        lambda a, b, c: te.compute(a.shape, lambda i, j, y, x: a[i, j, y, x] * b[0, j, 0, 0] + c[i, 0, y, x]),
        lambda a, b, c: a * b + c,
    ),
    "cropped": ([(6, 9, 10)], lambda a: te.compute((6, 8, 9), lambda i, y, x: a[i, y + 1, x]), lambda a: a[:, 1:, :-1]),
    "turned": ([(16, 5, 5)], lambda a: te.compute((16, 5, 5), lambda i, y, x: a[i, x, y]), lambda a: a.swapaxes(1, 2)),
    "diagonal": ([(16, 5, 5)], lambda a: te.compute((16, 5, 5), lambda i, y, x: a[i, x, x] + y), diagonal),
    "nothing": ([(n, 7)], lambda a: te.compute((n, 7), lambda i, j: a[i, j]), lambda a: a),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 8, 19])
def test_a_scheduled_kernel_computes_the_same(case, size):
    shapes, compute, expected = CASES[case]
    scheduled, rule, wanted = schedule_kernel(function(shapes, compute), TARGET)
    assert wanted is None and rule == ("turned" if case == "turned" else "generic")
    generator = np.random.default_rng(size)
    concrete = [[size if d is n else size * 2 if not isinstance(d, int) else d for d in shape] for shape in shapes]
    arrays = [generator.standard_normal(shape, np.float32) for shape in concrete]
    reference = expected(*(a.astype(np.float64) for a in arrays))
    output = tvm.runtime.tensor(np.full(np.shape(reference), np.nan, np.float32))
    tvm.compile(scheduled, target=to_tvm(TARGET))["main"](*map(tvm.runtime.tensor, arrays), output)
    np.testing.assert_allclose(output.numpy(), reference, rtol=2e-5, atol=2e-5)


def kinds(function):
    found = []

    def visit(loop):
        found.append(int(loop.kind))

    import tvm_ffi

    tvm_ffi.structural_walk(function.body, (tirx.For, visit))
    return found


def test_large_kernels_are_parallel_and_vectorized_and_small_ones_are_serial():
    large, *_ = schedule_kernel(function([(1024, 64)], topi.exp), TARGET)
    assert {tirx.ForKind.PARALLEL, tirx.ForKind.VECTORIZED} <= set(kinds(large))
    small, *_ = schedule_kernel(function([(2, 64)], topi.exp), TARGET)
    assert tirx.ForKind.PARALLEL not in kinds(small)


@pytest.mark.parametrize("axis, vectors", [(0, True), (1, False)])
def test_branches_that_all_lanes_take_together_are_vectorized(axis, vectors):
    def shifted(a):
        def element(*i):
            return tirx.if_then_else(i[axis] > 0, a[i[0] - (axis == 0), i[1] - (axis == 1)], tirx.const(0, "float32"))

        return te.compute(a.shape, element)

    scheduled, _ = generic.schedule(function([(8, 64)], shifted), TARGET, parallel=False)
    assert (tirx.ForKind.VECTORIZED in kinds(scheduled)) == vectors


@pytest.mark.parametrize("operator", [tirx.nearbyint, tirx.rsqrt, lambda x: tirx.Select(tirx.isnan(x), x, -x)])
@pytest.mark.parametrize("name", ["x86-64-v3", "x86-64-v4"])
def test_operators_without_vectors_in_tvm_get_them_from_llvm(operator, name):
    target = resolve(name)
    kernel = function([(64, 768)], lambda a: te.compute(a.shape, lambda i, j: operator(a[i, j] * 3.0) + 1.0))
    scheduled, _, _ = schedule_kernel(kernel, target)
    code = tvm.compile(scheduled, target=to_tvm(target)).mod.inspect_source("asm")
    assert "gather" not in code and "scatter" not in code
    assert "ymm" in code or "zmm" in code


@pytest.mark.parametrize("name", ["x86-64-v3", "x86-64-v4", "znver4", "skylake-avx512"])
def test_short_rows_are_not_gathered(name):
    target, shape = resolve(name), (1, 64, 7, 7)
    scaled = function(
        [shape, (1, 64, 1, 1)], lambda a, b: te.compute(shape, lambda n, c, y, x: a[n, c, y, x] * b[n, c, 0, 0])
    )
    scheduled, _, _ = schedule_kernel(scaled, target)
    code = tvm.compile(scheduled, target=to_tvm(target)).mod.inspect_source("asm")
    assert "gather" not in code and "scatter" not in code
    assert "prefer-no-gather" not in target.features, "a preference is no instruction"


def test_expensive_stages_are_not_repeated():
    scheduled, _ = generic.schedule(function([(64, 64)], lambda a: topi.nn.softmax(a, axis=-1)), TARGET, parallel=True)
    assert scheduled.script().count("T.exp(") == 1


def test_equal_kernels_get_equal_schedules():
    """Reduced axes are told from spatial ones by what they are, not by where they happen to lie in memory."""

    def centered(a):
        k = te.reduce_axis((0, 40), "k")
        total = te.compute((2, 8), lambda i, j: te.sum(a[i, j, k], axis=k), "total")
        return te.compute((2, 8, 40), lambda i, j, c: a[i, j, c] - total(i, j), "centered")

    kept = []
    for i in range(40):
        kept.append((schedule_kernel(function([(2, 8, 40)], centered), TARGET)[0], [object() for _ in range(i % 7)]))
        if i % 3 == 2:
            kept.pop(1)
    assert all(tvm_ffi.structural_equal(kept[0][0], other) for other, _ in kept)


def test_compound_sizes_get_names_and_equal_kernels_are_merged():
    deep = ((n - 1) // 2 + 1 - 1) // 2 + 1
    other = (n - 1) // 16 + 1

    def double(size):
        holder = te.placeholder((size, 4), "float32", name="a")
        result = te.compute((size, 4), lambda i, j: holder[size - 1 - i, j] * 2.0)
        return s_tir.renew_defs(te.create_prim_func([holder, n, result], "int64"))

    names = [tvm.ir.GlobalVar("first"), tvm.ir.GlobalVar("second")]
    module = name_dims(tvm.IRModule(dict(zip(names, (double(deep), double(other)), strict=True))))
    (kept,) = module.functions.values()
    assert "//" not in kept.script()
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    output = tvm.runtime.tensor(np.zeros((3, 4), np.float32))
    compiled = tvm.compile(kept.with_attr("global_symbol", "main"), target=to_tvm(TARGET))
    compiled["main"](tvm.runtime.tensor(x), 9, output)
    np.testing.assert_array_equal(output.numpy(), x[::-1] * 2)


@pytest.mark.parametrize(("columns", "sums"), [(256, 8), (96, 6), (48, 6), (24, 3), (136, 1), (20, 5)])
def test_reductions_keep_several_vectors_of_sums(columns, sums):
    summed = function([(50, columns)], lambda a: topi.sum(a, axis=0))
    scheduled, *_ = schedule_kernel(summed, resolve("haswell"))
    loops = []
    tvm_ffi.structural_walk(scheduled.body, (tirx.For, loops.append))
    assert {int(loop.extent) for loop in loops if loop.kind == tirx.ForKind.UNROLLED} == {sums}


@pytest.mark.parametrize("name", ["x86-64-v2", "haswell", "znver4"])
@pytest.mark.parametrize("channels", [4, 7, 24, 33, 49, 72, 200, 240])
def test_sums_over_pixels_are_vectors_of_channels(channels, name):
    pooled = function([(2, 9, 11, channels)], lambda a: topi.sum(a, axis=(1, 2)))
    scheduled, *_ = schedule_kernel(pooled, resolve(name))
    code = tvm.compile(scheduled, target=to_tvm(resolve(name))).mod.inspect_source("asm")
    packed, single = len(re.findall(r"addps", code)), len(re.findall(r"addss", code))
    assert packed >= 2 * single, "no sum is alone but those that are left over"
    if name != "znver4" or TARGET.vector_bits == 512:
        x = np.random.default_rng(0).standard_normal((2, 9, 11, channels), np.float32)
        output = tvm.runtime.tensor(np.zeros((2, channels), np.float32))
        tvm.compile(scheduled, target=to_tvm(resolve(name)))["main"](tvm.runtime.tensor(x), output)
        np.testing.assert_allclose(output.numpy(), x.astype(np.float64).sum((1, 2)), rtol=1e-5, atol=1e-5)
