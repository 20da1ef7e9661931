from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from onnx.helper import make_node as node
from onnx.helper import make_opsetid, make_tensor_value_info

from optc.errors import InvalidModelError, UnsupportedModelError
from optc.frontend.canonicalize import canonicalize
from optc.frontend.onnx import load
from optc.ir import CANONICAL_OPSET, IR_VERSION, provenance

F32 = np.float32
X = {"x": np.arange(6, dtype=F32).reshape(2, 3) - 2}


def ops(model: oir.Model) -> list[str]:
    return [n.op_type for n in model.graph]


def info(name: str, kind: int = 1, shape: object = None) -> onnx.ValueInfoProto:
    return make_tensor_value_info(name, kind, shape)


def function(name: str, inputs: list[str], outputs: list[str], nodes: list, opset: int = 17, **options):
    imports = [make_opsetid("", opset), make_opsetid("f", 1)]
    return onnx.helper.make_function("f", name, inputs, outputs, nodes, imports, **options)


IMPORTS = [make_opsetid("", 17), make_opsetid("f", 1)]


# --- functions ----------------------------------------------------------------------------------------------


def test_nested_functions_with_their_own_opset(build, same_results):
    inner = function("inner", ["a"], ["b"], [node("Softmax", ["a"], ["b"], axis=0)], opset=11)
    body = [node("inner", ["p"], ["t"], domain="f"), node("Mul", ["t", "t"], ["q"])]
    outer = function("outer", ["p"], ["q"], body, opset=13)
    nodes = [
        node("outer", ["x"], ["h"], domain="f", name="call1"),
        node("outer", ["h"], ["y"], domain="f", name="call2"),
    ]
    model = build(nodes, {"x": [2, 3]}, ["y"], imports=IMPORTS, functions=[inner, outer])
    canonical = load(model)
    assert not canonical.functions
    # The Softmax of opset 11 runs over both axes.
    flat = np.exp(X["x"] - X["x"].max())
    once = (flat / flat.sum()) ** 2
    flat = np.exp(once - once.max())
    from onnx.reference import ReferenceEvaluator

    result = ReferenceEvaluator(oir.to_proto(canonical)).run(None, X)[0]
    np.testing.assert_allclose(result, (flat / flat.sum()) ** 2, rtol=1e-5)
    assert {s for n in canonical.graph for s in provenance.sources(n)} == {"call1", "call2"}


def test_attribute_references_and_their_defaults(build, same_results):
    body = [node("Elu", ["a"], ["b"])]
    reference = onnx.AttributeProto(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT)
    body[0].attribute.append(reference)
    given = function("given", ["a"], ["b"], body, attributes=["slope"])
    default = function("default", ["a"], ["b"], body, attribute_protos=[onnx.helper.make_attribute("slope", 0.25)])
    nodes = [
        node("given", ["x"], ["p"], domain="f", slope=0.5),
        node("given", ["x"], ["q"], domain="f"),
        node("default", ["x"], ["r"], domain="f"),
    ]
    model = build(nodes, {"x": [2, 3]}, ["p", "q", "r"], imports=IMPORTS, functions=[given, default])
    canonical = same_results(model, X)
    assert [n.attributes.get_float("alpha") for n in canonical.graph] == [0.5, 1.0, 0.25]


def test_function_that_returns_its_parameter(build, same_results):
    swap = function("swap", ["a", "b"], ["b", "a", "a"], [])
    nodes = [node("swap", ["x", "z"], ["p", "q", "r"], domain="f"), node("Relu", ["p"], ["s"])]
    model = build(nodes, {"x": [2, 3], "z": [1]}, ["p", "q", "r", "s"], imports=IMPORTS, functions=[swap])
    canonical = load(model)
    assert {s for n in canonical.graph if n.op_type == "Identity" for s in provenance.sources(n)} == {"swap#0"}
    assert [v.name for v in canonical.graph.inputs] == ["x", "z"]
    assert [v.name for v in canonical.graph.outputs] == ["p", "q", "r", "s"]


def test_function_called_in_a_subgraph_and_missing_optional_input(build, same_results):
    body = [node("Clip", ["a", "low"], ["b"])]
    clip = function("clip", ["a", "low"], ["b"], body)
    branches = {
        f"{kind}_branch": onnx.helper.make_graph([node("clip", args, ["o"], domain="f")], kind, [], [info("o")])
        for kind, args in {"then": ["x", "zero"], "else": ["x"]}.items()
    }
    model = build(
        [node("If", ["c"], ["y"], **branches)],
        {"c": [], "x": [2, 3]},
        ["y"],
        weights={"zero": np.zeros((), F32)},
        types={"c": 9},
        imports=IMPORTS,
        functions=[clip],
    )
    same_results(model, {"c": np.array(True), **X})
    same_results(model, {"c": np.array(False), **X})


def test_recursive_functions(build):
    a = function("a", ["x"], ["y"], [node("b", ["x"], ["y"], domain="f")])
    b = function("b", ["x"], ["y"], [node("a", ["x"], ["y"], domain="f")])
    with pytest.raises(InvalidModelError, match="circle"):
        load(build([node("a", ["x"], ["y"], domain="f")], {"x": [2]}, ["y"], imports=IMPORTS, functions=[a, b]))


def test_function_with_a_graph_parameter(build):
    graph = onnx.helper.make_graph([node("Relu", ["x"], ["o"])], "g", [], [info("o")])
    f = function("f", ["x"], ["y"], [node("Relu", ["x"], ["y"])], attributes=["g"])
    with pytest.raises(UnsupportedModelError, match="cannot be inlined"):
        load(build([node("f", ["x"], ["y"], domain="f", g=graph)], {"x": [2]}, ["y"], imports=IMPORTS, functions=[f]))


def test_unused_functions_are_dropped(build):
    unused = function("unused", ["x"], ["y"], [node("Relu", ["x"], ["y"])])
    model = load(build([node("Relu", ["x"], ["y"])], {"x": [2]}, ["y"], imports=IMPORTS, functions=[unused]))
    assert not model.functions


# --- constants and initializers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"value_int": 3}, np.array(3, np.int64)),
        ({"value_ints": [1, 2]}, np.array([1, 2], np.int64)),
        ({"value_float": 0.5}, np.array(0.5, F32)),
        ({"value_floats": [0.5, 1.0]}, np.array([0.5, 1.0], F32)),
        ({"value": onnx.numpy_helper.from_array(np.eye(2, dtype=np.float64))}, np.eye(2)),
    ],
)
def test_constant_nodes(build, attributes, expected):
    nodes = [node("Constant", [], ["c"], **attributes), node("Identity", ["c"], ["y"])]
    model = load(build(nodes, {}, ["y"], 13, types={"y": int(onnx.helper.np_dtype_to_tensor_dtype(expected.dtype))}))
    assert ops(model) == ["Identity"]
    value = model.graph.initializers["c"]
    np.testing.assert_array_equal(value.const_value.numpy(), expected)
    assert value.dtype == model.graph.outputs[0].dtype and list(value.shape) == list(expected.shape)


def test_string_constants(build):
    nodes = [
        node("Constant", [], ["s"], value_string="a"),
        node("Constant", [], ["t"], value_strings=["b", "c"]),
        node("Concat", ["s1", "t"], ["y"], axis=0),
        node("Unsqueeze", ["s", "zero"], ["s1"]),
    ]
    model = load(build(nodes, {}, ["y"], 13, {"zero": np.array([0])}, types={"y": 8}))
    assert model.graph.initializers["t"].const_value.numpy().tolist() == [b"b", b"c"]


def test_constants_of_subgraphs_move_to_the_outermost_graph(build, same_results):
    def branch(number: float) -> onnx.GraphProto:
        return onnx.helper.make_graph(
            [node("Constant", [], ["k"], value_float=float(number)), node("Sum", ["x", "k", "w"], ["o"])],
            "branch",
            [],
            [info("o")],
            [onnx.numpy_helper.from_array(np.full(3, number, F32), "w")],
        )

    nodes = [node("If", ["c"], ["y"], then_branch=branch(1), else_branch=branch(2))]
    model = build(nodes, {"c": [], "x": [2, 3]}, ["y"], types={"c": 9})
    canonical = same_results(model, {"c": np.array(True), **X})
    same_results(model, {"c": np.array(False), **X})
    assert len(canonical.graph.initializers) == 4
    assert all(not g.initializers for g in canonical.graph.subgraphs())


def test_weights_listed_as_inputs(build, same_results):
    """ONNX IR version 3 lists every weight as an input."""
    model = build(
        [node("MatMul", ["x", "w"], ["y"])],
        {"w": [3, 2], "x": [2, 3]},
        ["y"],
        7,
        weights={"w": np.ones((3, 2), F32)},
    )
    model.ir_version = 3
    canonical = same_results(model, X)
    assert [v.name for v in canonical.graph.inputs] == ["x"]
    assert canonical.ir_version == IR_VERSION


# --- outputs ------------------------------------------------------------------------------------------------


def test_outputs_that_no_node_computes(build, same_results):
    model = build(
        [node("Constant", [], ["k"], value_floats=[1.0]), node("Relu", ["x"], ["r"])],
        {"x": [2, 3]},
        ["x", "w", "k", "r", "r"],
        weights={"w": np.ones(2, F32)},
    )
    canonical = load(model)
    assert [v.name for v in canonical.graph.outputs] == ["x_output", "w", "k", "r", "r_output"]
    assert all(v.producer() is not None for v in canonical.graph.outputs)
    assert canonical.graph.inputs[0].name == "x"


def test_branch_that_returns_a_weight(build):
    then = onnx.helper.make_graph([node("Relu", ["x"], ["r"])], "then", [], [info("r")])
    weight = onnx.numpy_helper.from_array(np.ones((2, 3), F32), "w")
    other = onnx.helper.make_graph([], "else", [], [info("w")], [weight])
    nodes = [node("If", ["c"], ["y"], then_branch=then, else_branch=other)]
    model = load(build(nodes, {"c": [], "x": [2, 3]}, ["y"], types={"c": 9}))
    assert sorted(n.op_type for n in model.graph.all_nodes()) == ["Identity", "If", "Relu"]
    assert list(model.graph.initializers) == ["w_source"]


def test_branch_that_returns_what_it_does_not_compute(build):
    branch = onnx.helper.make_graph([], "branch", [], [info("r")])
    nodes = [node("Relu", ["x"], ["r"]), node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)]
    with pytest.raises(InvalidModelError, match="'r', an output of the graph 'branch'"):
        load(build(nodes, {"c": [], "x": [2, 3]}, ["y"], types={"c": 9}))


def test_missing_and_unused_optional_outputs(build):
    nodes = [
        node("MaxPool", ["x"], ["p", ""], kernel_shape=[1]),
        node("Dropout", ["p"], ["d", "unused_mask"]),
        node("Split", ["d"], ["", "y", ""], axis=1, num_outputs=3),
    ]
    model = load(build(nodes, {"x": [1, 3, 4]}, ["y"], 18))
    assert [len(n.outputs) for n in model.graph] == [1, 1, 3]
    assert all(v.name for n in model.graph for v in n.outputs)


# --- names, order, metadata ---------------------------------------------------------------------------------


def test_names_are_unique_in_the_whole_model(build):
    """Branches that use the same names, nodes without name, a branch that hides an outer name."""
    branch = onnx.helper.make_graph(
        [node("Relu", ["x"], ["h"]), node("Neg", ["h"], ["h2"], name="7")], "branch", [], [info("h2")]
    )
    nodes = [
        node("Abs", ["x"], ["h"], name="7"),
        node("If", ["c"], ["1"], then_branch=branch, else_branch=branch),
        node("Add", ["h", "1"], ["2"], name="7"),
    ]
    model = load(build(nodes, {"c": [], "x": [2, 3]}, ["2"], types={"c": 9}))
    nodes_ = list(model.graph.all_nodes())
    assert len({n.name for n in nodes_}) == len(nodes_) == 7
    values = [v.name for n in nodes_ for v in n.outputs] + [v.name for v in model.graph.inputs]
    assert len(set(values)) == len(values) and all(values)
    assert model.graph.outputs[0].name == "2"
    assert provenance.sources(nodes_[1]) == ("If#1",) and provenance.sources(nodes_[0]) == ("7",)


def test_unsorted_nodes(build, same_results):
    nodes = [node("Neg", ["a"], ["y"]), node("Relu", ["x"], ["a"])]
    assert ops(load(build(nodes, {"x": [2, 3]}, ["y"]))) == ["Relu", "Neg"]


def test_stale_value_info(build, same_results):
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("Relu", ["a"], ["y"])]
    model = build(nodes, {"x": ["n", 3]}, ["y"], weights={"w": np.ones((3, 5), F32)})
    model.graph.value_info.append(info("a", onnx.TensorProto.DOUBLE, [9, 9, 9]))
    model.graph.output[0].CopyFrom(info("y", onnx.TensorProto.FLOAT, ["out_0", "out_1"]))
    canonical = load(model)
    for value in canonical.graph.node(0).outputs[0], canonical.graph.outputs[0]:
        assert value.dtype == oir.DataType.FLOAT
        assert str(value.shape) == "[n,5]"


def test_declared_shapes_of_custom_operators_are_kept(build):
    model = build(
        [node("Magic", ["x"], ["a"], domain="f"), node("Relu", ["a"], ["y"])],
        {"x": ["n", 3]},
        ["y"],
        imports=IMPORTS,
    )
    model.graph.value_info.append(info("a", onnx.TensorProto.FLOAT, ["n", "other", 4]))
    shape = load(model).graph.outputs[0].shape
    assert shape[0] == "n" and shape[2] == 4 and shape[1].value not in (None, "other", "n")


def test_default_attributes_are_explicit(build):
    model = load(build([node("Gemm", ["x", "w"], ["y"])], {"x": [2, 3], "w": [3, 4]}, ["y"]))
    attributes = model.graph[0].attributes
    assert {k: a.value for k, a in attributes.items()} == {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}


def test_trailing_missing_inputs_are_dropped(build):
    model = load(build([node("Clip", ["x", "", ""], ["y"])], {"x": [2]}, ["y"]))
    assert len(model.graph[0].inputs) == 1


@pytest.mark.parametrize("text", ["?", "-1", "0", "", "None", "unknown"])
def test_dimensions_without_name_are_distinct(build, text):
    model = build(
        [node("Relu", ["x"], ["y"]), node("Relu", ["z"], ["w"])], {"x": [text, text], "z": [text]}, ["y", "w"]
    )
    loaded = load(model)
    names = [d.value for v in loaded.graph.inputs for d in v.shape]
    assert len(set(names)) == 3 and None not in names
    assert [d.value for v in loaded.graph.outputs for d in v.shape] == names


def test_a_size_of_zero_is_a_size(build):
    assert list(load(build([node("Relu", ["x"], ["y"])], {"x": [0, 3]}, ["y"])).graph.outputs[0].shape) == [0, 3]


def test_equal_illegal_names_stay_one_dimension(build):
    model = load(build([node("Add", ["x", "z"], ["y"])], {"x": ["batch size", "a"], "z": ["batch size", "a"]}, ["y"]))
    first, second, out = ([d.value for d in v.shape] for v in [*model.graph.inputs, *model.graph.outputs])
    assert first == second == out and " " not in first[0]


# --- the contract -------------------------------------------------------------------------------------------


def test_canonicalize_is_idempotent(build):
    nodes = [
        node("Softmax", ["x"], ["s"], axis=1),
        node("Constant", [], ["k"], value=onnx.numpy_helper.from_array(np.ones(3, F32))),
        node("Add", ["s", "k"], ["y"]),
    ]
    model = load(build(nodes, {"x": [2, "?", 3]}, ["y"], 11))
    assert model.opset_imports == {"": CANONICAL_OPSET}
    before = oir.to_proto(model).SerializeToString(deterministic=True)
    canonicalize(model)
    assert oir.to_proto(model).SerializeToString(deterministic=True) == before


def test_used_domains_of_functions_are_imported(build):
    magic = onnx.helper.make_function(
        "f", "m", ["x"], ["y"], [node("Magic", ["x"], ["y"], domain="q")], [make_opsetid("q", 3)]
    )
    model = load(build([node("m", ["x"], ["y"], domain="f")], {"x": [2]}, ["y"], imports=IMPORTS, functions=[magic]))
    assert model.opset_imports == {"": CANONICAL_OPSET, "q": 3}


def test_constants_of_a_function_called_twice(build, same_results):
    body = [
        node("Constant", [], ["k"], value=onnx.numpy_helper.from_array(np.full(3, 2, F32), "k")),
        node("Add", ["a", "k"], ["b"]),
    ]
    add = function("add", ["a"], ["b"], body)
    nodes = [node("add", ["x"], ["h"], domain="f"), node("add", ["h"], ["y"], domain="f")]
    canonical = same_results(build(nodes, {"x": [2, 3]}, ["y"], imports=IMPORTS, functions=[add]), X)
    assert len(canonical.graph.initializers) == 2
