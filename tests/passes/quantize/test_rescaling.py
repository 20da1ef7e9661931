"""Rescaling does not change what a model computes, and evens out ranges; bias correction restores means."""

import numpy as np
import onnx_ir as oir
import pytest

from optc.passes.quantize import smoothing
from optc.passes.quantize.bias import correction
from optc.passes.quantize.equalization import equalize
from optc.passes.quantize.products import product, products
from optc.passes.quantize.weights import per_channel

F = np.float32


def same(before, after):
    for want, got in zip(before, after, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_smoothing_moves_outliers_into_weights(rng):
    reach = np.array([1.0, 100.0, 1.0, 0.0])
    weight = rng.uniform(0.5, 1, (4, 3)).astype(F)
    factor = smoothing.smooth_factors(reach, [weight[None, :, :, None]], 0.5)
    assert factor[3] == 1
    assert (reach / factor)[:3].max() / (reach / factor)[:3].min() < 20


def test_the_best_exponent_is_one_that_helps(rng):
    x = rng.normal(0, 1, (400, 16)) * np.where(np.arange(16) == 3, 60, 1)
    weight = rng.normal(0, 1, (16, 8)).astype(F)

    def error(factor):
        a, w = x / factor, weight * factor[:, None]
        step, steps = (a.max() - a.min()) / 255, np.abs(w).max(0) / 127
        found = (np.rint(a / step) * step) @ (np.rint(w / steps) * steps)
        return ((found - x @ weight) ** 2).mean()

    factor = smoothing.best_factors(x.min(0), x.max(0), (x**2).mean(0), [weight[None, :, :, None]])
    assert error(factor) < 0.5 * error(np.ones(16))
    even = np.ones((16, 8), F)
    assert smoothing.best_factors(-np.ones(16), np.ones(16), np.full(16, 0.3), [even[None, :, :, None]]) is None


@pytest.mark.parametrize("own", [True, False])
def test_inputs_are_scaled_in_the_normalization_or_by_a_multiplication(own, build, run, verify, rng):
    last = "z = Relu(y)" if own else "z = Add(y, n)"
    model = build(
        f"""(float[3,8] x) => (float[3,8] z) {{
        n = LayerNormalization(x, g, b) a = MatMul(n, w) c = Gemm<transB=1>(n, v) y = Add(a, c) {last} }}""",
        **{name: rng.normal(1, 1, 8).astype(F) for name in "gb"},
        **{name: rng.normal(0, 1, (8, 8)).astype(F) for name in "wv"},
    )
    feeds = {"x": rng.normal(0, 1, (3, 8)).astype(F)}
    before = run(model, feeds)
    changed = smoothing.scale_inputs(model, {"n": rng.uniform(0.1, 10, 8).astype(F)})
    assert [old for old, _ in changed.values()] == ["n"]
    assert ("n" in changed) == own
    verify(model)
    same(before, run(model, feeds))
    assert any(node.op_type == "Mul" for node in model.graph) != own
    assert smoothing.scale_inputs(model, {"nothing": np.ones(8, F)}) == {}


MAKERS = {
    "r = LeakyRelu(a)": 0,
    "m = Mul(a, k) r = Add(k, m)": 0,
    "r = HardSwish(a)": 1,
    "m = Relu(a) r = Add(m, a)": 1,
}


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("maker", MAKERS)
def test_convolutions_read_channels_of_one_range(maker, group, build, run, verify, rng):
    model = build(
        f"""(float[1,3,6,6] x) => (float[1,4,6,6] y) {{
        a = Conv(x, w, b) {maker} y = Conv<pads=[1,1,1,1], group={group}>(r, v) }}""",
        w=rng.normal(0, 1, (4, 3, 1, 1)).astype(F),
        b=rng.normal(0, 1, 4).astype(F),
        v=rng.normal(0, 1, (4, 4 // group, 3, 3)).astype(F),
        **({"k": np.array(0.7, F)} if "k" in maker else {}),
    )
    feeds = {"x": rng.normal(0, 1, (1, 3, 6, 6)).astype(F)}
    before, muls = run(model, feeds), sum(node.op_type == "Mul" for node in model.graph)
    last = list(products(model))[-1]
    changed = smoothing.scale_inputs(model, {"r": rng.uniform(0.1, 10, 4).astype(F)}, {last.name})
    verify(model)
    same(before, run(model, feeds))
    assert len(changed) == 1
    assert sum(node.op_type == "Mul" for node in model.graph) == muls + MAKERS[maker]
    assert smoothing.scale_inputs(model, {"r": np.ones(4, F)}, {"another"}) == {}


def test_channels_of_a_depthwise_convolution_use_the_whole_range(build, rng):
    model = build(
        "(float[1,8,6,6] x) => (float[1,8,4,4] y) { y = Conv<group=8>(x, w) }",
        w=rng.normal(0, 1, (8, 1, 3, 3)).astype(F),
    )
    (group,) = smoothing.readers(model).values()
    reach = 10.0 ** rng.uniform(-2, 2, 8)
    factor = smoothing.best_factors(-reach, reach, reach**2 / 3, group.weights())
    np.testing.assert_allclose(factor / factor[0], reach / reach[0], rtol=1e-4)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_equalization(group, build, run, verify, rng):
    spread = 10.0 ** rng.uniform(-1, 1, (4, 1, 1, 1))
    model = build(
        f"""(float[1,3,6,6] x) => (float[1,4,6,6] y) {{
        a = Conv(x, w, b) r = Relu(a) y = Conv<pads=[1,1,1,1], group={group}>(r, v) }}""",
        w=(rng.normal(0, 1, (4, 3, 1, 1)) * spread).astype(F),
        b=rng.normal(0, 1, 4).astype(F),
        v=rng.normal(0, 1, (4, 4 // group, 3, 3)).astype(F),
    )
    feeds = {"x": rng.normal(0, 1, (1, 3, 6, 6)).astype(F)}
    before = run(model, feeds)
    assert equalize(model) == 1
    verify(model)
    same(before, run(model, feeds))
    first, second = (p.array() for p in products(model))
    a = np.abs(first).max((1, 2, 3))
    b = np.abs(second).reshape(group, 4 // group, 4 // group, -1).max((1, 3)).reshape(-1)
    assert np.allclose(a, b, rtol=0.05)


@pytest.mark.parametrize("between", ["Sigmoid(a)", "Clip(a, l, h)", "Relu(a) z = Exp(r)"])
def test_what_cannot_be_equalized(between, build, rng):
    outputs = "float[1,4,6,6] y, float[1,4,6,6] z" if "z" in between else "float[1,4,6,6] y"
    extra = {"l": F(0), "h": F(6)} if "Clip" in between else {}
    model = build(
        f"(float[1,3,6,6] x) => ({outputs}) {{ a = Conv(x, w) r = {between} y = Conv(r, v) }}",
        w=rng.normal(0, 1, (4, 3, 1, 1)).astype(F),
        v=rng.normal(0, 1, (4, 4, 1, 1)).astype(F),
        **extra,
    )
    assert equalize(model) == 0


@pytest.mark.parametrize("call", ["Gemm(x, w, b)", "Gemm<transB=1>(x, w, b)", "Conv<group=2>(x, w, b)"])
def test_bias_correction_restores_means(call, build, run, rng):
    conv = call.startswith("Conv")
    shape, weight = ("[40,8,1,1]", (6, 4, 1, 1)) if conv else ("[40,8]", (6, 8) if "transB" in call else (8, 6))
    model = build(
        f"(float{shape} x) => (float{'[40,6,1,1]' if conv else '[40,6]'} y) {{ y = {call} }}",
        w=rng.normal(0, 1, weight).astype(F),
        b=np.zeros(6, F),
    )
    found = product(next(iter(model.graph)))
    array = per_channel(found.array(), found.channels, bits=3)
    x = rng.normal(1, 1, (40, 8, 1, 1) if conv else (40, 8)).astype(F)
    mean = x.reshape(40, 8).mean(0)
    shift = correction(found, array, mean, mean)
    (exact,) = run(model, {"x": x})
    model.graph.initializers["w"].const_value = oir.tensor(array.dequantized(), name="w")
    (rough,) = run(model, {"x": x})
    assert np.allclose((exact - rough).reshape(40, 6).mean(0), shift, atol=1e-4)
