"""Expansion of operators by their ONNX function bodies."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx.reference import ReferenceEvaluator

from optc.backends.lowering import TABLE
from optc.backends.lowering.expand import expand_functions
from optc.errors import UnsupportedModelError
from optc.frontend.onnx import load
from optc.ir import provenance

X = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("f4")


def parse(text: str, opset: int = 26) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>' + text.replace("'", '"'))


def operators(model) -> list[str]:
    return [node.op_type for node in model.graph.all_nodes()]


def test_nothing_to_do_leaves_the_model_alone():
    model = load(parse("g (float[a, b] x) => (float[a, b] y) { y = Softplus(x) }"))
    before = list(model.graph)
    expand_functions(model, {("", "Softplus")})
    assert list(model.graph) == before


def test_body_with_attributes_constants_and_provenance():
    model = load(parse("g (float[a, b] x) => (float[a, b] y) { y = Elu<alpha = 0.5>(x) z = Elu<alpha = 2.0>(y) }"))
    expand_functions(model, TABLE.keys() - {("", "Elu")})
    assert "Elu" not in operators(model)
    assert "Constant" not in operators(model)
    assert not model.functions
    for node in model.graph:
        assert provenance.sources(node)
        assert node.outputs[0].type is not None
        assert node.outputs[0].shape is not None
    names = [node.name for node in model.graph] + [v.name for node in model.graph for v in node.outputs]
    assert len(names) == len(set(names))
    assert {0.5, 2.0} <= {float(v.const_value.numpy()) for v in model.graph.initializers.values()}


def test_bodies_are_expanded_in_turn():
    text = """g (float[n, c] x, int64[n] t) => (float y) {
        y = SoftmaxCrossEntropyLoss<reduction = 'mean'>(x, t) }"""
    model = load(parse(text))
    expand_functions(model, TABLE.keys())
    assert {("", op) for op in operators(model)} <= TABLE.keys()


def test_expansion_inside_of_a_branch():
    text = """g (float[a] x, bool c) => (float[a] y) {
        y = If(c) <then_branch = t () => (float[a] u) { u = MeanVarianceNormalization<axes = [0]>(x) },
                   else_branch = e () => (float[a] v) { v = MeanVarianceNormalization<axes = [0]>(x) }> }"""
    model = load(parse(text))
    expand_functions(model, TABLE.keys())
    assert "MeanVarianceNormalization" not in operators(model)


def test_an_operator_without_function_stays_and_is_refused(compile_model):
    proto = parse("g (float[a, b] x) => (float[a, b] y) { y = RandomNormalLike(x) }")
    model = load(proto)
    expand_functions(model, TABLE.keys())
    assert operators(model) == ["RandomNormalLike"]
    with pytest.raises(UnsupportedModelError, match=r"RandomNormalLike.*not supported"):
        compile_model(proto)


@pytest.mark.parametrize(
    "body",
    [
        "y = MeanVarianceNormalization<axes = [0, 2]>(x)",
        "n = Constant<value_int = 10>() y = HannWindow(n)",
        "n = Constant<value_int = 9>() y = BlackmanWindow<periodic = 0>(n)",
    ],
)
def test_results(compile_model, body):
    model = parse("g (float[a, b, 4] x) => (float y) { " + body + " }")
    (want,) = ReferenceEvaluator(model).run(None, {"x": X})
    (got,) = compile_model(model)(X)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_loss(compile_model):
    text = """g (float[n, c] x, int64[n] t, float[c] w) => (float y, float[n, c] l) {
        y, l = SoftmaxCrossEntropyLoss<reduction = 'mean', ignore_index = 1>(x, t, w) }"""
    model = parse(text)
    feed = {"x": X[0], "t": np.array([3, 1, 0]), "w": np.array([0.1, 0.2, 0.3, 0.4], "f4")}
    want = ReferenceEvaluator(model).run(None, feed)
    for a, b in zip(compile_model(model)(*feed.values()), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_subgraphs_of_the_operator_are_part_of_the_body(compile_model):
    text = """g (float[a, 4] x) => (float[p, q] y) {
        s = SequenceConstruct(x, x) two = Constant<value_float = 2.0>() k = Add(two, two)
        m = SequenceMap<body = b (float[a, 4] e) => (float[a, 4] o) { o = Mul(e, k) }>(s)
        y = ConcatFromSequence<axis = 0>(m) }"""
    (got,) = compile_model(parse(text))(X[0])
    np.testing.assert_array_equal(got, np.concatenate([X[0] * 4] * 2))
