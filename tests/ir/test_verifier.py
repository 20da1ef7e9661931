from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import onnx_ir as oir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.errors import IRError
from optc.ir import provenance, schemas, shapes
from optc.ir.verifier import verify, violations

FLOAT = oir.TensorType(oir.DataType.FLOAT)


def test_a_canonical_model_is_accepted(mlp: oir.Model) -> None:
    assert violations(mlp) == []
    verify(mlp)


def test_subgraphs_read_values_of_outer_graphs(canonical: Callable[..., oir.Model]) -> None:
    model = canonical(
        """
        g (bool c, float[n] x) => (float[] y) <float[1] one = {1}>
        {
            h = Relu(x)
            y = If(c) <then_branch = t () => (float[] a) { a = Add(h, one) },
                       else_branch = e () => (float[] b) { b = Neg(x) }>
        }
        """
    )
    assert violations(model) == []


def break_opset(m: oir.Model) -> None:
    m.opset_imports[""] = 17


def break_node_name(m: oir.Model) -> None:
    m.graph[1].name = m.graph[0].name


def break_empty_node_name(m: oir.Model) -> None:
    m.graph[1].name = ""


def break_value_name(m: oir.Model) -> None:
    m.graph[0].outputs[0].name = "x"


def break_no_value_name(m: oir.Model) -> None:
    m.graph[0].outputs[0].name = ""


def break_type(m: oir.Model) -> None:
    m.graph[0].outputs[0].type = None


def break_dim(m: oir.Model) -> None:
    m.graph[0].outputs[0].shape = oir.Shape([None, 3])


def break_dim_text(m: oir.Model) -> None:
    m.graph[0].outputs[0].shape = oir.Shape(["a b", 3])


def break_negative_dim(m: oir.Model) -> None:
    m.graph.inputs[0].shape = oir.Shape([-1, 4])


def break_order(m: oir.Model) -> None:
    node = m.graph[2]
    m.graph.remove(node)
    m.graph.insert_before(m.graph[0], node)


def break_foreign_value(m: oir.Model) -> None:
    stranger = oir.Value(name="stranger", shape=oir.Shape([3]), type=FLOAT)
    m.graph[1].replace_input_with(0, stranger)


def break_removed_user(m: oir.Model) -> None:
    oir.node("Relu", [m.graph[1].outputs[0]], name="ghost")


def break_unknown_operator(m: oir.Model) -> None:
    m.graph[1].op_type = "Rleu"


def break_domain(m: oir.Model) -> None:
    m.graph[1].domain = "com.example"


def break_arity(m: oir.Model) -> None:
    m.graph[1].resize_inputs(0)


def break_missing_input(m: oir.Model) -> None:
    m.graph[2].replace_input_with(0, None)


def break_trailing_input(m: oir.Model) -> None:
    m.graph[0].replace_input_with(2, None)


def break_output_count(m: oir.Model) -> None:
    m.graph[1].resize_outputs(2)


def break_attribute(m: oir.Model) -> None:
    m.graph[1].attributes["colour"] = oir.AttrString("colour", "red")


def break_attribute_type(m: oir.Model) -> None:
    m.graph[0].attributes["alpha"] = oir.AttrInt64("alpha", 1)


def break_default(m: oir.Model) -> None:
    del m.graph[0].attributes["alpha"]


def break_required_attribute(m: oir.Model) -> None:
    m.graph[1].op_type = "Concat"


def break_operand_type(m: oir.Model) -> None:
    m.graph.initializers["b1"].const_value = oir.tensor(np.zeros(3, np.float64))
    m.graph.initializers["b1"].type = oir.TensorType(oir.DataType.DOUBLE)


def break_disallowed_type(m: oir.Model) -> None:
    m.graph[1].op_type = "Not"


def break_initializer_shape(m: oir.Model) -> None:
    m.graph.initializers["b1"].shape = oir.Shape([4])


def break_initializer_data(m: oir.Model) -> None:
    m.graph.initializers["b1"].const_value = None


def break_input_initializer(m: oir.Model) -> None:
    m.graph.inputs.append(m.graph.initializers["b1"])


def break_constant_node(m: oir.Model) -> None:
    node = oir.node("Constant", [], attributes={"value": oir.tensor(np.zeros(3, np.float32))}, name="k")
    node.outputs[0].name, node.outputs[0].type = "kv", FLOAT
    provenance.stamp(node, "k")
    m.graph.insert_before(m.graph[0], node)


def break_provenance(m: oir.Model) -> None:
    m.graph[1].metadata_props.clear()


def break_output_twice(m: oir.Model) -> None:
    m.graph.outputs.append(m.graph.outputs[0])


def break_foreign_output(m: oir.Model) -> None:
    m.graph.outputs.append(oir.Value(name="nowhere", shape=oir.Shape([3]), type=FLOAT))


BREAKS = {
    break_opset: "opset 17",
    break_node_name: "node name 'n0' is used twice",
    break_empty_node_name: "has no name",
    break_value_name: "value name 'x' is used twice",
    break_no_value_name: "without a name",
    break_type: "'h' has no type",
    break_dim: "'h' has an anonymous dimension",
    break_dim_text: "neither name nor expression",
    break_negative_dim: "'x' has the size -1",
    break_order: "'r', is not defined before it",
    break_foreign_value: "'stranger', is not defined before it",
    break_removed_user: "'r' is still used by the removed node Relu 'ghost'",
    break_unknown_operator: "Rleu 'n1': opset 26 has no such operator",
    break_domain: "does not import domain 'com.example'",
    break_arity: "Relu 'n1': 0 inputs, its schema wants 1",
    break_missing_input: r"MatMul 'n2': input 0 \(A\) is missing",
    break_trailing_input: "missing optional input at the end",
    break_output_count: "2 outputs, its schema wants 1",
    break_attribute: "has no attribute 'colour'",
    break_attribute_type: "'alpha' is of type",
    break_default: "default of attribute 'alpha' is not explicit",
    break_required_attribute: "attribute 'axis' is required",
    break_operand_type: r"'b1', is tensor\(double\) where tensor\(float\) is expected",
    break_disallowed_type: r"'h', cannot be tensor\(float\)",
    break_initializer_shape: r"initializer 'b1' is declared FLOAT\[4\]",
    break_initializer_data: "'b1' has no data",
    break_input_initializer: "'b1' is a graph input and an initializer",
    break_constant_node: "should be an initializer",
    break_provenance: "does not say where it comes from",
    break_output_twice: "'y' is a graph output twice",
    break_foreign_output: "'nowhere' is not a value of its graph",
}


@pytest.mark.parametrize("mutate", BREAKS, ids=lambda f: f.__name__)
def test_each_violation_is_named(mlp: oir.Model, mutate: Callable[[oir.Model], None]) -> None:
    mutate(mlp)
    with pytest.raises(IRError, match=BREAKS[mutate]):
        verify(mlp)


def test_violations_of_subgraphs_and_functions_are_found(canonical: Callable[..., oir.Model]) -> None:
    model = canonical(
        """
        g (bool c, float[n] x) => (float[] y)
        {
            y = If(c) <then_branch = t () => (float[] a) { a = Relu(x) },
                       else_branch = e () => (float[] b) { b = Neg(x) }>
        }
        """
    )
    branch = model.graph[0].attributes["then_branch"].as_graph()
    weight = oir.Value(
        name="w", shape=oir.Shape([1]), type=FLOAT, const_value=oir.tensor(np.ones(1, np.float32), name="w")
    )
    branch.initializers.add(weight)
    branch[0].name = model.graph[0].name
    found = "\n".join(violations(model))
    assert "initializer 'w' is not in the outermost graph" in found
    assert "is used twice" in found
    function = oir.Function("own", "f", graph=oir.Graph([], [], nodes=[]), attributes=[])
    model.functions[function.identifier()] = function
    assert any("functions are not inlined: f" in line for line in violations(model))


def test_values_of_one_branch_are_unknown_in_the_other(canonical: Callable[..., oir.Model]) -> None:
    model = canonical(
        """
        g (bool c, float[n] x) => (float[] y)
        {
            y = If(c) <then_branch = t () => (float[] a) { h = Relu(x) a = Neg(h) },
                       else_branch = e () => (float[] b) { b = Neg(x) }>
        }
        """
    )
    then_branch, else_branch = (model.graph[0].attributes[n].as_graph() for n in ("then_branch", "else_branch"))
    else_branch[0].replace_input_with(0, then_branch[0].outputs[0])
    assert any("'h', is not defined before it" in line for line in violations(model))


def test_all_violations_are_listed_at_once(mlp: oir.Model) -> None:
    for mutate in (break_type, break_provenance, break_default):
        mutate(mlp)
    assert len(violations(mlp)) == 3


@st.composite
def graphs(draw: st.DrawFn) -> oir.Model:
    """Random legal graphs of unary and binary operators over one symbolic shape."""
    x = oir.Value(name="x", shape=oir.Shape(["n", 4]), type=FLOAT)
    w = oir.Value(name="w", shape=oir.Shape([4]), type=FLOAT, const_value=oir.tensor(np.ones(4, np.float32), name="w"))
    values, nodes = [x, w], []
    for index in range(draw(st.integers(1, 12))):
        op = draw(
            st.sampled_from(["Relu", "Neg", "LeakyRelu", "Add", "Mul", "Softmax", "Identity", "LayerNormalization"])
        )
        arity = 2 if op in ("Add", "Mul") else 1
        inputs = [draw(st.sampled_from(values)) for _ in range(arity)]
        node = oir.node(op, [*inputs, w] if op == "LayerNormalization" else inputs, name=f"node{index}")
        schemas.state_defaults(node, 26)
        provenance.stamp(node, f"source{index}")
        node.outputs[0].name = f"v{index}"
        values.append(node.outputs[0])
        nodes.append(node)
    graph = oir.Graph([x], [nodes[-1].outputs[0]], nodes=nodes, initializers=[w], opset_imports={"": 26}, name="g")
    model = oir.Model(graph, ir_version=13)
    shapes.infer(model)
    return model


@settings(deadline=None)
@given(graphs())
def test_random_legal_graphs_are_accepted(model: oir.Model) -> None:
    assert violations(model) == []


MUTATIONS: dict[str, Callable[[oir.Node], None]] = {
    "type": lambda node: setattr(node.outputs[0], "type", None),
    "name": lambda node: setattr(node.outputs[0], "name", "x"),
    "operator": lambda node: setattr(node, "op_type", "NoSuchOperator"),
    "dimension": lambda node: setattr(node.outputs[0], "shape", oir.Shape([None])),
    "input": lambda node: node.replace_input_with(0, None),
    "itself": lambda node: node.replace_input_with(0, node.outputs[0]),
    "source": lambda node: node.metadata_props.clear(),
}


@settings(deadline=None)
@given(graphs(), st.data())
def test_mutated_graphs_are_rejected(model: oir.Model, data: st.DataObject) -> None:
    node = data.draw(st.sampled_from(list(model.graph)))
    MUTATIONS[data.draw(st.sampled_from(sorted(MUTATIONS)))](node)
    assert violations(model)


def test_a_thousand_nodes_take_less_than_a_third_of_a_second() -> None:
    x = oir.Value(name="x", shape=oir.Shape(["n", 4]), type=FLOAT)
    nodes, last = [], x
    for index in range(1000):
        node = oir.node("Relu", [last], name=f"node{index}")
        provenance.stamp(node, node.name or "")
        last = node.outputs[0]
        last.name, last.type, last.shape = f"v{index}", FLOAT, x.shape
        nodes.append(node)
    model = oir.Model(oir.Graph([x], [last], nodes=nodes, opset_imports={"": 26}, name="g"), ir_version=13)
    start = time.process_time()
    assert violations(model) == []
    assert time.process_time() - start < 0.3
