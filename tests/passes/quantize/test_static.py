"""Where QuantizeLinear and DequantizeLinear are put, and that what they stand around computes nearly the same."""

import numpy as np
import pytest

from optc.passes import pipeline
from optc.passes.quantize.encoding import encode
from optc.passes.quantize.products import products
from optc.passes.quantize.static import Plan, StaticPass
from optc.passes.quantize.switchable import SwitchablePass, switches

F = np.float32


def quantize(model, run, feeds, *, only=None, **options):
    """Quantize all products by the extremes of one run."""
    chosen = [p for p in products(model) if only is None or p.name in only]
    opened = model.clone()
    for node in opened.graph.all_nodes():
        for value in node.outputs:
            if not value.is_graph_output():
                opened.graph.outputs.append(value)
    values = dict(zip((v.name for v in opened.graph.outputs), run(opened, feeds), strict=True)) | dict(feeds)
    encodings = {
        p.x.name: encode(values[p.x.name].min(), values[p.x.name].max(), "uint8", symmetric=False) for p in chosen
    }
    before = run(model, feeds)
    result = StaticPass(Plan(frozenset(p.name for p in chosen), encodings, **options)).call(model)
    assert result.modified == bool(chosen)
    return before, encodings


def close(before, after, steps=0.05):
    for want, got in zip(before, after, strict=True):
        assert np.abs(want - got).max() <= steps * np.abs(want).max()


def count(model, op):
    return sum(node.op_type == op for node in model.graph)


@pytest.fixture
def weights(rng):
    return lambda *shape: (rng.uniform(-1, 1, shape) / np.sqrt(np.prod(shape[1:]))).astype(F)


def test_conv_with_bias(build, run, verify, rng, weights):
    model = build(
        "(float[1,3,8,8] x) => (float[1,4,8,8] y) { c = Conv<pads=[1,1,1,1]>(x, w, b) y = Relu(c) }",
        w=weights(4, 3, 3, 3),
        b=weights(4),
    )
    feeds = {"x": rng.uniform(-1, 1, (1, 3, 8, 8)).astype(F)}
    before, _ = quantize(model, run, feeds, bits=7)
    verify(model)
    assert [n.op_type for n in model.graph].count("QuantizeLinear") == 1
    bias = next(n for n in model.graph if n.op_type == "Conv").inputs[2].producer()
    assert bias.inputs[0].dtype.name == "INT32"
    close(before, run(model, feeds))
    pipeline.run(model)
    assert count(model, "ConvInteger") == 1
    close(before, run(model, feeds))


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_and_matmul(transposed, build, run, verify, rng, weights):
    matrix = weights(5, 6)
    model = build(
        f"(float[n,6] x) => (float[n,4] y) {{ h = Gemm<transB={transposed}>(x, w, b) r = Relu(h) y = MatMul(r, v) }}",
        w=matrix if transposed else matrix.T.copy(),
        b=weights(5),
        v=weights(5, 4),
    )
    feeds = {"x": rng.uniform(-1, 1, (7, 6)).astype(F)}
    before, _ = quantize(model, run, feeds, bits=7)
    verify(model)
    close(before, run(model, feeds))
    pipeline.run(model)
    assert count(model, "MatMulInteger") == 2


def test_integers_travel_through_what_moves_elements(build, run, verify, rng, weights):
    model = build(
        """(float[1,3,8,8] x) => (float[1,5] y) {
        c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c) p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
        f = Flatten(p) y = MatMul(f, v) }""",
        w=weights(4, 3, 3, 3),
        v=weights(64, 5),
    )
    feeds = {"x": rng.uniform(-1, 1, (1, 3, 8, 8)).astype(F)}
    before, _ = quantize(model, run, feeds, bits=7)
    verify(model)
    close(before, run(model, feeds))
    pipeline.run(model)
    pool = next(n for n in model.graph if n.op_type == "MaxPool")
    assert pool.inputs[0].dtype.name == "UINT8"


def test_joined_values_share_an_encoding(build, run, verify, rng, weights):
    model = build(
        """(float[1,3,6,6] x) => (float[1,2,6,6] y) {
        a = Conv(x, w) b = Conv(x, v) c = Concat<axis=1>(a, b) y = Conv(c, u) }""",
        w=weights(2, 3, 1, 1),
        v=weights(3, 3, 1, 1),
        u=weights(2, 5, 1, 1),
    )
    feeds = {"x": rng.uniform(-1, 1, (1, 3, 6, 6)).astype(F)}
    before, _ = quantize(model, run, feeds, bits=7)
    verify(model)
    close(before, run(model, feeds))
    pipeline.run(model)
    concat = next(n for n in model.graph if n.op_type == "Concat")
    assert all(value.dtype.name == "UINT8" for value in concat.inputs)


def test_a_residual_sum_reads_integers_unless_it_is_normalized(build, run, rng, weights):
    text = """(float[1,4,6,6] x) => (float[1,4,6,6] y) {
        a = Conv(x, w) s = Add(a, x) y = %s }"""
    feeds = {"x": rng.uniform(-1, 1, (1, 4, 6, 6)).astype(F)}
    for last, rounded in (("Relu(s)", True), ("LayerNormalization(s, g)", False)):
        model = build(text % last, w=weights(4, 4, 1, 1), g=np.ones(6, F))
        before, _ = quantize(model, run, feeds, bits=7)
        add = next(n for n in model.graph if n.op_type == "Add")
        assert (add.inputs[1].producer() is not None) == rounded
        close(before, run(model, feeds))


def test_other_readers_and_outputs_keep_their_floats(build, run, verify, rng, weights):
    model = build(
        "(float[2,6] x) => (float[2,6] r, float[2,3] y, float[2,6] z) { r = Relu(x) y = MatMul(r, w) z = Exp(r) }",
        w=weights(6, 3),
    )
    feeds = {"x": rng.uniform(-1, 1, (2, 6)).astype(F)}
    before, _ = quantize(model, run, feeds, bits=7)
    verify(model)
    after = run(model, feeds)
    assert np.array_equal(before[0], after[0])
    assert np.array_equal(before[2], after[2])


def test_weights_that_are_shared_or_stay(build, run, verify, rng, weights):
    model = build(
        "(float[2,6] x, float[2,6] k) => (float[2,6] y, float[2,6] z) { y = MatMul(x, w) z = MatMul(k, w) }",
        w=weights(6, 6),
    )
    feeds = {name: rng.uniform(-1, 1, (2, 6)).astype(F) for name in "xk"}
    before, _ = quantize(model, run, feeds, only={"n0"}, bits=7)
    verify(model)
    after = run(model, feeds)
    assert np.array_equal(before[1], after[1])
    assert not np.array_equal(before[0], after[0])


def test_what_is_no_product(build, weights):
    model = build(
        """(float[2,6] x, float[6,2] k, float[6] c) => (float[2,2] y, float[2,6] z, float[2,6] u) {
        y = MatMul(x, k) z = Gemm<alpha=2.0>(x, w) u = Gemm(x, w, c) }""",
        w=weights(6, 6),
    )
    assert not list(products(model))
    assert not StaticPass(Plan(frozenset(), {})).call(model).modified


def test_a_switchable_model_is_any_mixture(build, run, verify, rng, weights):
    model = build(
        """(float[1,4,6,6] x) => (float[1,5] y) {
        a = Conv(x, w, b) s = Add(a, x) r = Relu(s) f = Flatten(r) y = Gemm(f, v, d) }""",
        w=weights(4, 4, 1, 1),
        b=weights(4),
        v=weights(144, 5),
        d=weights(5),
    )
    feeds = {"x": rng.uniform(-1, 1, (1, 4, 6, 6)).astype(F)}
    original = model.clone()
    _, encodings = quantize(model, run, feeds, bits=4)
    names = frozenset(p.name for p in products(original))
    plan = Plan(names, encodings, bits=4)
    switchable = original.clone()
    SwitchablePass(plan).call(switchable)
    verify(switchable)
    for layers in ([], ["n0"], ["n4"], ["n0", "n4"]):
        part = original.clone()
        StaticPass(plan.restricted(frozenset(layers))).call(part)
        (want,) = run(part, feeds)
        (got,) = run(switchable, feeds | switches(original, names, frozenset(layers), True))
        np.testing.assert_allclose(got, want, atol=1e-5)
