"""The attention kernel: awkward sizes, masks at block borders, other machines, and that it is one kernel."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from onnx import helper
from tvm import te, tirx

from optc.backends.cpu.build import CpuBackend, generate
from optc.backends.cpu.single import aligned
from optc.backends.cpu.target import resolve
from optc.backends.kernels import vector_math
from optc.backends.kernels.attention_schedule import column_tiles
from optc.backends.kernels.transpose import transpose
from optc.frontend.onnx import load

F = np.float32


def data(rng, *shape, dtype=F):
    return rng.standard_normal(shape).astype(dtype)


def expected(q, k, v, *, mask=None, bounds=(None, None)):
    """Attention in float64; ``bounds`` are the offsets of the first key and the end, from the query's position."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scores = q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5
    i, j = np.arange(q.shape[2])[:, None], np.arange(k.shape[2])[None]
    start, stop = bounds
    if start is not None:
        scores = np.where(j >= i + start, scores, -np.inf)
    if stop is not None:
        scores = np.where(j < i + stop, scores, -np.inf)
    if mask is not None:
        scores = scores + mask
    top = scores.max(-1, keepdims=True) if k.shape[2] else np.zeros((*scores.shape[:-1], 1))
    weights = np.exp(scores - np.where(np.isneginf(top), 0, top))
    total = weights.sum(-1, keepdims=True)
    return (weights / np.where(total == 0, 1, total)) @ v


def model(make_model, shapes, dtype=F, opset=24, **attributes):
    inputs = {name: (dtype, shape) for name, shape in shapes.items()}
    node = helper.make_node("Attention", list(shapes), ["y"], **attributes)
    return make_model([node], inputs, {"y": dtype}, opset=opset)


def sizes(rng):
    group, heads = int(rng.choice([1, 1, 2])), int(rng.integers(1, 4))
    rows, keys = int(rng.choice([1, 2, 4, 5, 8, 13, 16, 33, 70])), int(rng.choice([1, 3, 7, 40, 129, 300, 517]))
    return group * heads, heads, rows, keys, int(rng.choice([1, 3, 8, 20, 64])), int(rng.choice([1, 7, 8, 24, 64, 80]))


@pytest.mark.parametrize("seed", range(16))
def test_random_sizes(compile_model, make_model, seed):
    rng = np.random.default_rng(seed)
    hq, hk, s, t, d, w = sizes(rng)
    q, k, v = data(rng, 2, hq, s, d), data(rng, 2, hk, t, d), data(rng, 2, hk, t, w)
    mask = data(rng, *[(s, t), (1, 1, 1, t), (2, hq, s, t)][seed % 3])
    causal = bool(seed % 2)
    want = expected(q, k, v, mask=mask, bounds=(None, 1 if causal else None))
    if seed % 4 < 2:
        shapes = {"q": q.shape, "k": k.shape, "v": v.shape, "m": mask.shape}
        (y,) = compile_model(model(make_model, shapes, is_causal=causal))(q, k, v, mask)
    else:
        packed = [x.transpose(0, 2, 1, 3).reshape(2, x.shape[2], -1) for x in (q, k, v)]
        shapes = dict(zip("qkv", (x.shape for x in packed), strict=True)) | {"m": mask.shape}
        attributes = {"is_causal": causal, "q_num_heads": hq, "kv_num_heads": hk}
        (y,) = compile_model(model(make_model, shapes, **attributes))(*packed, mask)
        want = want.transpose(0, 2, 1, 3).reshape(2, s, -1)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("left, right", [(3, -1), (-1, 2), (40, 0), (300, 5), (0, 0)])
def test_windows_skip_keys(compile_model, make_model, left, right):
    rng = np.random.default_rng(0)
    symbolic = dict.fromkeys("qkv", (1, 2, "s", 16))
    run = compile_model(model(make_model, symbolic, opset=25, left_window_size=left, right_window_size=right))
    for s in (1, 4, 100, 333):
        q, k, v = (data(rng, 1, 2, s, 16) for _ in "qkv")
        bounds = (None if left < 0 else -left, None if right < 0 else right + 1)
        np.testing.assert_allclose(run(q, k, v)[0], expected(q, k, v, bounds=bounds), rtol=1e-4, atol=1e-5)


def test_masked_rows_are_zeros_and_large_scores_stay_finite(compile_model, make_model):
    rng = np.random.default_rng(0)
    q, k, v = (data(rng, 1, 1, 40, 8) * 100 for _ in "qkv")
    mask = np.where(rng.random((40, 40)) < 0.3, -np.inf, 0).astype(F)
    mask[[0, 7, 39]] = -np.inf
    mask[5] = np.finfo(F).min
    (y,) = compile_model(model(make_model, dict.fromkeys("qkv", q.shape) | {"m": mask.shape}))(q, k, v, mask)
    want = expected(q, k, v, mask=mask)
    assert not y[0, 0, [0, 7, 39]].any()
    kept = [i for i in range(40) if i != 5]  # all of row 5 is the lowest number: scores round to it
    np.testing.assert_allclose(y[:, :, kept], want[:, :, kept], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(y[0, 0, 5], v[0, 0].mean(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 20])
def test_nan_reaches_the_rows_that_see_it(compile_model, make_model, rows):
    rng = np.random.default_rng(0)
    q, k, v = data(rng, 1, 1, rows, 8), data(rng, 1, 1, 30, 8), data(rng, 1, 1, 30, 8)
    k[0, 0, 11, 3] = np.nan
    (y,) = compile_model(model(make_model, {"q": q.shape, "k": k.shape, "v": v.shape}))(q, k, v)
    assert np.isnan(y).all()


@pytest.mark.parametrize("dtype, tolerance", [(np.float16, 2e-3), (np.float64, 1e-12)])
@pytest.mark.parametrize("rows", [1, 21])
def test_other_types(compile_model, make_model, dtype, tolerance, rows):
    rng = np.random.default_rng(0)
    q, k, v = (data(rng, 1, 2, n, 16, dtype=dtype) for n in (rows, 37, 37))
    (y,) = compile_model(model(make_model, {"q": q.shape, "k": k.shape, "v": v.shape}, dtype))(q, k, v)
    assert y.dtype == dtype
    np.testing.assert_allclose(y, expected(q, k, v), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("target", ["x86-64-v2", "x86-64-v3", "x86-64-v4", "aarch64"])
def test_one_kernel_on_every_machine(make_model, target):
    shapes = {"q": (1, "s", 24), "k": (1, "t", 24), "v": (1, "t", 24)}
    machine = resolve(target)
    module = CpuBackend(machine).schedule(load(model(make_model, shapes, q_num_heads=2, kv_num_heads=2)))
    assert [(kernel.rule, kernel.wanted) for kernel in module.kernels] == [("attention", "attention")]
    generate(module.relax, machine)


@pytest.mark.parametrize("width", [1, 5, 16, 24, 63, 80])
@pytest.mark.parametrize("lanes", [1, 4, 8, 16])
def test_column_tiles_cover_every_column_once(width, lanes):
    runs = column_tiles(width, lanes)
    starts = [first for first, *_ in runs]
    ends = [first + count * vectors * size for first, count, vectors, size in runs]
    assert [*starts, width] == [0, *ends]


@pytest.mark.parametrize("lanes", [2, 4, 8])
def test_transposition_in_registers(lanes):
    x = te.placeholder((lanes * lanes,), "float32", "x")
    function = te.create_prim_func([x, te.compute(x.shape, lambda i: x[i])], "int64")
    copy = function.body.block.body.body.block.body
    a, b = copy.value.source, copy.buffer
    function = function.with_body(tirx.SeqStmt(transpose(a, lanes, lambda d: (b, d * lanes))))
    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})
    library = tvm.compile(function.with_attr("global_symbol", "main"), target=target)
    square = np.arange(lanes * lanes, dtype=F)
    out = aligned(np.zeros(lanes * lanes, F))
    library["main"](aligned(square), out)
    np.testing.assert_array_equal(out.numpy().reshape(lanes, lanes), square.reshape(lanes, lanes).T)


def test_exp_of_what_is_not_positive():
    x = np.concatenate([-np.geomspace(1e-8, 87, 4091), [0, -np.inf, np.nan, -88, -1e30]]).astype(F)
    a = te.placeholder(x.shape, "float32", "a")
    function = te.create_prim_func([a, te.compute(x.shape, lambda i: vector_math.exp_nonpositive(a(i)))])
    library = tvm.compile(function.with_attr("global_symbol", "main"), target="llvm")
    out = aligned(np.zeros(x.shape, F))
    library["main"](aligned(x), out)
    want = np.exp(x.astype(np.float64))
    np.testing.assert_allclose(out.numpy(), np.where(want < 2.0**-126, 0, want), rtol=1.5 * 2**-23)
