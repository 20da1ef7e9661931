"""Layers as matrices, what single weights matter, and layers fitted to the original's activations."""

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import optc
from optc.compression.prune import normalized
from optc.compression.reconstruct import reconstruct
from optc.compression.saliency import saliency
from optc.compression.stages import Stages, bound
from optc.errors import UsageError
from optc.passes.prune.layers import find, shift
from optc.passes.prune.select import Structured
from optc.passes.prune.structured import prune
from optc.peers import OnnxRuntime


def build(text, **arrays):
    model = onnx.parser.parse_model('<ir_version: 10, opset_import: ["": 21]> g ' + text)
    for name, array in arrays.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return optc.capture(oir.from_proto(model))


def run(model, feeds):
    return next(iter(OnnxRuntime(model, 1).run(feeds).values()))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 2), st.integers(1, 2), st.integers(0, 2), st.integers(1, 2))
def test_a_convolution_is_a_product_of_rows(kernel, stride, dilation, pad, batch):
    rng = np.random.default_rng(kernel)
    w, b = (rng.standard_normal(s).astype(np.float32) for s in ((5, 3, kernel, 2), (5,)))
    attributes = f"<strides=[{stride},1], dilations=[{dilation},1], pads=[{pad},1,0,{pad}]>"
    model = build(f"(float[{batch},3,9,7] x) => (float[a,b,c,d] y) {{ y = Conv {attributes} (x, w, b) }}", w=w, b=b)
    (layer,) = find(model)
    x = rng.standard_normal((batch, 3, 9, 7)).astype(np.float32)
    y = run(model, {"x": x})
    places = rng.permutation(layer.places(x))[:20]
    assert layer.places(x) == y.size // 5
    found = layer.rows(x, places) @ layer.matrix() + layer.bias()
    np.testing.assert_allclose(found, layer.outputs(y, places), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(layer.like_weight(layer.matrix()), w)


PRODUCTS = {
    "Gemm": "y = Gemm <transB=1> (x, w, b)",
    "no bias": "y = Gemm <transB=1> (x, w)",
    "MatMul": "t = Transpose <perm=[1,0]> (w) y = MatMul(x, t)",
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_shifted(name):
    rng = np.random.default_rng(0)
    arrays = {"w": rng.standard_normal((5, 3)).astype(np.float32), "b": np.ones(5, np.float32)}
    body = PRODUCTS[name]
    arrays = {key: value for key, value in arrays.items() if key != "b" or "b)" in body}
    model = build(f"(float[4,3] x) => (float[4,5] y) {{ {body} }}", **arrays)
    normalized(model)
    x = rng.standard_normal((4, 3)).astype(np.float32)
    before = run(model, {"x": x})
    (layer,) = find(model)
    shift(model, layer.node, np.arange(5, dtype=np.float32))
    np.testing.assert_allclose(run(model, {"x": x}), before + np.arange(5), rtol=1e-5, atol=1e-5)
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_what_a_weight_is_worth():
    """Without it, the layer's output differs by as much; when the others make up for it, by what is left."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((600, 4)) @ rng.standard_normal((4, 4))
    w = rng.standard_normal((4, 3)).astype(np.float32)
    model = build("(float[50,4] x) => (float[50,3] y) { y = MatMul(x, w) }", w=w)
    calls = [{"x": part.astype(np.float32)} for part in np.split(x, 12)]
    direct = saliency(model, calls, "activation")["w"]
    expanded = saliency(model, calls, "taylor")["w"]
    gram = x.T @ x / len(x)
    gram += np.eye(4) * 0.01 * np.trace(gram) / 4
    for row in range(4):
        contribution = np.outer(x[:, row], w[row])
        np.testing.assert_allclose(direct[row], np.square(contribution).mean(axis=0), rtol=1e-4)
        # What is left of the feature where the others, with a ridge, explain as much of it as they can.
        rest = [i for i in range(4) if i != row]
        explained = gram[row, rest] @ np.linalg.solve(gram[np.ix_(rest, rest)], gram[rest, row])
        np.testing.assert_allclose(expanded[row], np.square(w[row]) * (gram[row, row] - explained), rtol=1e-3)


def network(rng, hidden=16):
    """Half of the hidden channels are weak copies of the other half, so nothing is lost without them."""
    half = rng.standard_normal((hidden // 2, 3, 3, 3)).astype(np.float32)
    arrays = {
        "w": np.concatenate([half, half * 0.5]),
        "b": np.zeros(hidden, np.float32),
        "v": rng.standard_normal((4, hidden, 1, 1)).astype(np.float32),
        "u": rng.standard_normal((4, 5)).astype(np.float32),
    }
    text = """(float[n,3,8,8] x) => (float[n,5] y) {
        h = Conv(x, w, b) r = Relu(h) g = Conv(r, v) p = GlobalAveragePool(g)
        f = Flatten(p) y = MatMul(f, u) }"""
    model = build(text, **arrays)
    normalized(model)
    return model


def samples(rng, count=8, size=8):
    return [{"x": rng.standard_normal((1, 3, size, size)).astype(np.float32)} for _ in range(count)]


def test_what_copies_computed_is_recovered():
    rng = np.random.default_rng(0)
    model = network(rng)
    small = model.clone()
    worth = {"w": np.concatenate([np.ones((8, 3, 3, 3)), np.zeros((8, 3, 3, 3))])}
    report = prune(small, Structured(0.5, layers={"u": 0}, multiple=1), saliency=worth)
    calls = samples(rng, 24)
    x = rng.standard_normal((5, 3, 8, 8)).astype(np.float32)
    expected, before = run(model, {"x": x}), run(small, {"x": x})
    seen = []
    fits = reconstruct(model, small, report.kept, calls, progress=seen.append)
    assert len(seen) == len(fits) == 1
    # The weak copies went: the others make up for all that they gave.
    assert fits[0].before > 0.05 > 1e-4 > fits[0].after
    error = np.square(run(small, {"x": x}) - expected).sum()
    assert error < 1e-3 * np.square(before - expected).sum()
    assert str(small.graph.inputs[0].shape) == "[n,3,8,8]"


def test_a_fit_that_does_not_help_is_not_kept():
    rng = np.random.default_rng(0)
    model = network(rng)
    model.graph.initializers["v"].const_value = oir.tensor(np.zeros((4, 16, 1, 1), np.float32), name="v")
    small = model.clone()
    report = prune(small, Structured(0.5, multiple=1))
    fits = reconstruct(model, small, report.kept, samples(rng))
    assert fits[0].ridge is None and fits[0].after == fits[0].before == 0


def test_stages_compute_what_the_model_does():
    rng = np.random.default_rng(0)
    model = network(rng)
    calls = samples(rng, 2)
    concrete = bound(model, calls)
    names = [str(layer.node.name) for layer in find(concrete)][1:]
    stages = Stages(concrete, names, calls)
    for _ in range(len(names) + 1):
        stages.advance(["y"])
    for call, values in zip(calls, stages.values, strict=True):
        np.testing.assert_allclose(values["y"], run(model, call), rtol=1e-4, atol=1e-5)
        assert set(values) == {"y"}


def test_samples_of_different_shapes():
    rng = np.random.default_rng(0)
    calls = [{"x": np.ones((n, 3, 8, 8), np.float32)} for n in (1, 2)]
    with pytest.raises(UsageError, match="different shapes"):
        bound(network(rng), calls)


def test_calibration_from_the_interface(tmp_path):
    rng = np.random.default_rng(0)
    model = network(rng)
    x = np.concatenate([call["x"] for call in samples(rng, 8)])
    result = optc.prune(model, structured=Structured(0.5, criterion="activation", multiple=1), calibrate={"x": x})
    assert {fit["name"] for fit in result.report["recovery"]}
    with pytest.raises(UsageError, match="taylor needs calibration data"):
        optc.prune(model, structured=Structured(0.5, criterion="taylor"))
    with pytest.raises(UsageError, match="no layers with constant weights"):
        saliency(build("(float[2,3] x) => (float[2,3] y) { y = Relu(x) }"), [{"x": x[:2, 0, 0, :3]}], "taylor")


def test_layers_that_change_little_are_left_out():
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((4, 4)).astype(np.float32) * scale for name, scale in (("a", 1), ("b", 0.01))}
    model = build(
        """(float[n,4] x) => (float[n,4] y) {
        h = MatMul(x, a) r = Relu(h) s = Add(x, r) g = MatMul(s, b) t = Tanh(g) y = Add(s, t) }""",
        **arrays,
    )
    x = rng.standard_normal((20, 4)).astype(np.float32)
    result = optc.prune(model, drop_layers=1, calibrate={"x": x})
    ((_, change),) = result.report["dropped"].items()
    assert 0 < change < 0.01
    np.testing.assert_allclose(run(result.model, {"x": x}), x + np.maximum(x @ arrays["a"], 0), rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="has 2 residual branches"):
        optc.prune(model, drop_layers=3, calibrate={"x": x})
    with pytest.raises(UsageError, match="calibration data"):
        optc.prune(model, drop_layers=1)
