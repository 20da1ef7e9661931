"""The rewrite engine: names, graph outputs, subgraph uses, dead producers, records."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from optc.ir import provenance
from optc.passes.match import producer
from optc.passes.rewrite import ANY, Miss, Ops, Outcome, Rewrite, RewritePass, rule

X = {"x": np.array([[1.0, -2.0, 3.0]], np.float32)}


@rule("--x => x", "Neg")
def double_neg(node: oir.Node, ops: Ops) -> Outcome:
    inner = producer(node.inputs[0], "Neg")
    if inner is None:
        return None
    assert inner.inputs[0] is not None
    return Rewrite([inner.inputs[0]])


@rule("x+x => 2x", "Add")
def double(node: oir.Node, ops: Ops) -> Outcome:
    if node.inputs[0] is not node.inputs[1]:
        return None
    return Rewrite([ops("Mul", node.inputs[0], ops.constant(np.float32(2.0)))])


@rule("abs(x) => relu(x) + relu(-x)", "Abs")
def split_abs(node: oir.Node, ops: Ops) -> Outcome:
    x = node.inputs[0]
    return Rewrite([ops("Add", ops("Relu", x), ops("Relu", ops("Neg", x)))])


@rule("relu(neg(x)) => abs(x)", "Relu")
def join_two(node: oir.Node, ops: Ops) -> Outcome:
    inner = producer(node.inputs[0], "Neg")
    return Rewrite([ops("Abs", inner.inputs[0])]) if inner is not None else None


@rule("refuse", ANY)
def refuse(node: oir.Node, ops: Ops) -> Outcome:
    ops("Relu", node.inputs[0])
    return Miss("never")


def test_fires_and_removes_dead_producers(build, check):
    model = build("(float[b,3] x) => (float[b,3] y) { a = Neg(x) b = Neg(a) y = Relu(b) }")
    check(model, RewritePass("p", [double_neg]), X, fired={"--x => x": 1}, ops=["Relu"])


def test_keeps_producer_with_other_use(build, check):
    model = build("(float[b,3] x) => (float[b,3] y) { a = Neg(x) b = Neg(a) y = Add(a, b) }")
    check(model, RewritePass("p", [double_neg]), X, fired={"--x => x": 1}, ops=["Add", "Neg"])


def test_output_that_becomes_an_input_gets_identity(build, check):
    model = build("(float[b,3] x) => (float[b,3] y) { a = Neg(x) y = Neg(a) }")
    check(model, RewritePass("p", [double_neg]), X, ops=["Identity"])


def test_two_outputs_with_one_value_get_identity(build, check):
    model = build("(float[b,3] x) => (float[b,3] y, float[b,3] z) { y = Relu(x) a = Neg(y) z = Neg(a) }")
    check(model, RewritePass("p", [double_neg]), X, ops=["Identity", "Relu"])


def test_output_name_moves_to_the_replacement(build, check):
    model = build("(float[b,3] x) => (float[b,3] y) { r = Relu(x) a = Neg(r) y = Neg(a) }")
    check(model, RewritePass("p", [double_neg]), X, ops=["Relu"])
    assert model.graph.outputs[0].name == "y"


def test_output_that_is_also_used_inside(build, check):
    model = build("(float[b,3] x) => (float[b,3] y, float[b,3] z) { y = Add(x, x) z = Relu(y) }")
    check(model, RewritePass("p", [double]), X, fired={"x+x => 2x": 1}, ops=["Mul", "Relu"])


def test_constants_of_a_subgraph_go_to_the_outermost_graph(build, check, op_types):
    model = build(
        """(bool c, float[b,3] x) => (float[b,3] y) {
          y = If (c) <then_branch = t () => (float[b,3] p) { p = Add(x, x) },
                      else_branch = e () => (float[b,3] q) { q = Neg(x) }> }"""
    )
    feeds = {"c": np.array(True), **X}
    check(
        model,
        RewritePass("p", [double]),
        feeds,
        fired={"x+x => 2x": 1},
        ops=["If", "Mul", "Neg"],
        more_feeds=({"c": np.array(False), **X},),
    )
    assert len(model.graph.initializers) == 1


def test_a_use_in_a_subgraph_keeps_the_producer(build, check):
    model = build(
        """(bool c, float[b,3] x) => (float[b,3] y, float[b,3] z) {
          a = Neg(x)
          z = Neg(a)
          y = If (c) <then_branch = t () => (float[b,3] p) { p = Relu(a) },
                      else_branch = e () => (float[b,3] q) { q = Abs(x) }> }"""
    )
    feeds = {"c": np.array(True), **X}
    check(model, RewritePass("p", [double_neg]), feeds, ops=["Abs", "Identity", "If", "Neg", "Relu"])


def test_branch_output_that_becomes_an_outer_value_gets_identity(build, check):
    model = build(
        """(bool c, float[b,3] x) => (float[b,3] y) {
          r = Relu(x)
          y = If (c) <then_branch = t () => (float[b,3] p) { a = Neg(r) p = Neg(a) },
                      else_branch = e () => (float[b,3] q) { q = Abs(r) }> }"""
    )
    feeds = {"c": np.array(True), **X}
    check(model, RewritePass("p", [double_neg]), feeds, ops=["Abs", "Identity", "If", "Relu"])


def test_removing_a_node_with_subgraphs_frees_what_they_capture(build, check):
    @rule("if => x", "If")
    def drop(node: oir.Node, ops: Ops) -> Outcome:
        return Rewrite([model.graph.inputs[1]])

    model = build(
        """(bool c, float[b,3] x) => (float[b,3] y) {
          a = Neg(x)
          y0 = If (c) <then_branch = t () => (float[b,3] p) { p = Relu(a) },
                       else_branch = e () => (float[b,3] q) { q = Abs(a) }>
          y = Identity(y0) }"""
    )
    RewritePass("p", [drop]).call(model)
    assert [n.op_type for n in model.graph.all_nodes()] == ["Identity"]


def test_new_nodes_are_typed_named_and_stamped(build, check):
    model = build("(float[b,3] x) => (float[b,3] y) { y = Abs(x) }")
    check(model, RewritePass("p", [split_abs]), X, ops=["Add", "Neg", "Relu", "Relu"])
    for node in model.graph:
        assert node.outputs[0].shape == ["b", 3]
        assert node.outputs[0].const_value is None
        assert not node.outputs[0].metadata_props
        assert provenance.sources(node) == ("n0",)
        assert node.metadata_props[provenance.MADE_BY] == "abs(x) => relu(x) + relu(-x)"


def test_miss_is_recorded_and_leaves_no_uses(build, check):
    model = build("(float[b,3] x) => (float[b,3] y) { y = Abs(x) }")
    result = check(model, RewritePass("p", [refuse]), X, fired={}, ops=["Abs"])
    assert [(s.rule, s.node, s.reason) for s in result.skipped] == [("refuse", "n0", "never")]
    assert len(model.graph.inputs[0].uses()) == 1


def test_other_domains_are_left_alone(build):
    model = build("(float[b,3] x) => (float[b,3] y) { y = Abs(x) }")
    model.graph[0].domain = "custom"
    assert not RewritePass("p", [split_abs]).call(model).modified


def test_the_interface_is_not_refined(build):
    model = build("(float[b,3] x) => (float[b,3] y) { a = Neg(x) c = Neg(a) y = Abs(c) }")
    model.graph.node("n1").outputs[0].shape = oir.Shape([7, 3])
    RewritePass("p", [double_neg]).call(model)
    assert model.graph.inputs[0].shape == ["b", 3]


def test_a_replacement_keeps_the_more_precise_shape(build):
    model = build("(float[b,3] x) => (float[b,3] y) { a = Relu(x) b = Neg(a) c = Neg(b) y = Abs(c) }")
    model.graph.node("n2").outputs[0].shape = oir.Shape([7, 3])
    RewritePass("p", [double_neg]).call(model)
    assert model.graph.node("n0").outputs[0].shape == [7, 3]


def test_a_node_that_replaces_several_names_them_all(build):
    model = build("(float[b,3] x) => (float[b,3] y) { a = Neg(x) y = Relu(a) }")
    RewritePass("p", [join_two]).call(model)
    (node,) = model.graph
    assert provenance.sources(node) == ("n0", "n1")
