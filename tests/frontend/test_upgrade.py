"""Each adapter against onnxruntime's old operator, and the table against the history in onnx.defs."""

from __future__ import annotations

import itertools
from collections import defaultdict

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from onnx import TensorProto
from onnx.helper import make_node as node
from onnx.reference import ReferenceEvaluator

from optc.errors import UnsupportedModelError
from optc.frontend import canonicalize  # noqa: F401 (registers the adapters)
from optc.frontend.check import OLDEST_OPSET
from optc.frontend.onnx import load
from optc.frontend.upgrade import adapters
from optc.ir import CANONICAL_OPSET

F32 = np.float32


def data(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape).astype(F32)


def ops(model) -> list[str]:
    return [n.op_type for n in model.graph]


# --- completeness -------------------------------------------------------------------------------------------


def _changes():
    """Yield (operator, version) for each change of a schema that an old node would not survive unchanged."""
    history = defaultdict(dict)
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "" and schema.since_version <= CANONICAL_OPSET:
            history[schema.name][schema.since_version] = schema

    def default(attribute):
        value = attribute.default_value
        return onnx.helper.get_attribute_value(value) if value.type else None

    for name, versions in history.items():
        kept = sorted(versions)
        for before, after in itertools.pairwise(kept):
            if after <= OLDEST_OPSET:
                continue
            old, new = versions[before], versions[after]
            removed = set(old.attributes) - set(new.attributes)
            changed = any(
                default(a) != default(new.attributes[key])
                for key, a in old.attributes.items()
                if key in new.attributes and not a.required
            )
            # An input may be appended; existing ones keep their place.
            moved = [i.name for i in old.inputs] != [i.name for i in new.inputs][: len(old.inputs)]
            if removed or changed or (moved and after not in _RENAMED.get(name, ())) or new.deprecated:
                yield name, after


# Inputs that only got another name.
_RENAMED = {"BatchNormalization": (14, 15)}


@pytest.mark.parametrize(("name", "version"), sorted(set(_changes())))
def test_every_breaking_change_has_an_adapter(name, version):
    assert adapters(name, version - 1)


# --- attributes that became inputs --------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [6, 7, 10])
@pytest.mark.parametrize("bounds", [{"min": -0.5, "max": 0.5}, {"min": 0.0}, {"max": 0.1}, {}])
def test_clip(build, same_results, opset, bounds):
    model = build([node("Clip", ["x"], ["y"], **bounds)], {"x": ["n", 4]}, ["y"], opset)
    canonical = same_results(model, {"x": data(3, 4)})
    assert ops(canonical) == ["Clip"]


def test_clip_bounds_take_the_type_of_a_computed_value(build, same_results):
    nodes = [node("Cast", ["x"], ["d"], to=TensorProto.DOUBLE), node("Clip", ["d"], ["y"], min=0.0)]
    model = build(nodes, {"x": [4]}, ["y"], 9, types={"y": TensorProto.DOUBLE})
    # onnxruntime has no double Clip of opset 6: compare with NumPy.
    canonical = load(model)
    bound = canonical.graph.node(1).inputs[1]
    assert bound.const_value.numpy().dtype == np.float64
    assert ops(canonical) == ["Cast", "Clip"]


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
@pytest.mark.parametrize("value", [0.0, 1.5])
def test_pad(build, same_results, mode, value):
    nodes = [node("Pad", ["x"], ["y"], mode=mode, pads=[0, 1, 2, 1], value=value)]
    same_results(build(nodes, {"x": ["n", 4]}, ["y"], 10), {"x": data(3, 4)})


@pytest.mark.parametrize("axes", [{}, {"axes": [1]}])
def test_slice(build, same_results, axes):
    ends = [1, 9] if not axes else [-1]
    nodes = [node("Slice", ["x"], ["y"], starts=[0, 1][: len(ends)], ends=ends, **axes)]
    same_results(build(nodes, {"x": [3, 4]}, ["y"], 9), {"x": data(3, 4)})


@pytest.mark.parametrize("opset", [9, 12])
def test_squeeze_and_unsqueeze(build, same_results, opset):
    nodes = [
        node("Squeeze", ["x"], ["a"], axes=[1]),
        node("Unsqueeze", ["a"], ["b"], axes=[0, 3]),
        node("Squeeze", ["b"], ["y"]),
    ]
    same_results(build(nodes, {"x": [3, 1, 4]}, ["y", "b"], opset), {"x": data(3, 1, 4)})


@pytest.mark.parametrize(
    "kind",
    ["L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"],
)
@pytest.mark.parametrize("opset", [7, 12, 17])
@pytest.mark.parametrize("axes", [None, [1], [0, 2]])
def test_reductions(build, same_results, kind, opset, axes):
    if kind == "Sum" and opset == 17:
        opset = 12
    attributes = {"keepdims": 0} if axes is None else {"axes": axes}
    nodes = [node(f"Reduce{kind}", ["x"], ["y"], **attributes)]
    same_results(build(nodes, {"x": [2, 3, 4]}, ["y"], opset), {"x": np.abs(data(2, 3, 4)) + 0.1})


@pytest.mark.parametrize(("opset", "attributes"), [(7, {"split": [1, 3]}), (11, {}), (12, {"split": [2, 2]})])
def test_split(build, same_results, opset, attributes):
    nodes = [node("Split", ["x"], ["a", "b"], axis=1, **attributes)]
    same_results(build(nodes, {"x": [3, 4]}, ["a", "b"], opset), {"x": data(3, 4)})


def test_split_13_without_sizes(build, same_results):
    nodes = [node("Split", ["x"], ["a", "b"], axis=1)]
    canonical = same_results(build(nodes, {"x": [3, 4]}, ["a", "b"], 13), {"x": data(3, 4)})
    assert canonical.graph[0].attributes.get_int("num_outputs") == 2


def test_top_k(build, same_results):
    model = build([node("TopK", ["x"], ["v", "i"], k=2)], {"x": [3, 5]}, ["v", "i"], 9, types={"i": 7})
    same_results(model, {"x": data(3, 5)})


@pytest.mark.parametrize("axis", [{}, {"axis": 2}])
def test_dft(build, same_results, axis):
    nodes = [node("DFT", ["x", ""], ["y"], **axis)]
    same_results(build(nodes, {"x": [1, 4, 6, 1]}, ["y"], 17), {"x": data(1, 4, 6, 1)})


@pytest.mark.parametrize("opset", [7, 10])
def test_dropout_is_the_identity(build, evaluate, opset):
    model = build([node("Dropout", ["x"], ["y"], ratio=0.3)], {"x": [8]}, ["y"], opset)
    x = data(8)
    np.testing.assert_array_equal(evaluate(load(model), {"x": x})[0], x)


def test_dropout_7_mask_has_the_type_of_the_data(build, evaluate):
    model = build([node("Dropout", ["x"], ["y", "m"])], {"x": [8]}, ["y", "m"], 7)
    _, mask = evaluate(load(model), {"x": data(8)})
    np.testing.assert_array_equal(mask, np.ones(8, F32))


# --- changed meaning ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize("attributes", [{}, {"axis": 0}, {"axis": 2}, {"axis": 3}])
def test_softmax_of_flattened_axes(build, same_results, kind, attributes):
    model = build([node(kind, ["x"], ["y"], **attributes)], {"x": [2, 3, 4, 5]}, ["y"], 11)
    canonical = same_results(model, {"x": data(2, 3, 4, 5)})
    assert len(ops(canonical)) == (1 if attributes.get("axis") == 3 else 4)


def test_softmax_rank_is_inferred(build, same_results):
    nodes = [node("Relu", ["x"], ["r"]), node("Softmax", ["r"], ["y"], axis=1)]
    assert ops(same_results(build(nodes, {"x": ["n", 4]}, ["y"], 9), {"x": data(3, 4)})) == [
        "Relu",
        "Softmax",
    ]


def test_softmax_of_unknown_rank(build, evaluate):
    model = build([node("Softmax", ["x"], ["y"], axis=1)], {"x": None}, ["y"], 9)
    x = data(2, 3, 4)
    np.testing.assert_array_equal(evaluate(load(model), {"x": x}), evaluate(model, {"x": x}))


def test_batch_normalization(build, same_results):
    weights = {name: np.abs(data(3)) + 0.1 for name in ("s", "b", "m", "v")}
    nodes = [node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"])]
    same_results(build(nodes, {"x": [2, 3, 4]}, ["y"], 9, weights), {"x": data(2, 3, 4)})
    # onnxruntime crashes on missing outputs that are listed.
    nodes = [node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y", "", "", "", ""])]
    assert len(load(build(nodes, {"x": [2, 3, 4]}, ["y"], 9, weights)).graph[0].outputs) == 1


def test_batch_normalization_not_spatial(build, evaluate):
    weights = {name: np.abs(data(3, 4)) + 0.1 for name in ("s", "b", "m", "v")}
    nodes = [node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"], spatial=0, epsilon=1e-3)]
    x = data(2, 3, 4)
    canonical = load(build(nodes, {"x": [2, 3, 4]}, ["y"], 7, weights))
    w = weights
    expected = (x - w["m"]) / np.sqrt(w["v"] + 1e-3) * w["s"] + w["b"]
    np.testing.assert_allclose(evaluate(canonical, {"x": x})[0], expected, rtol=1e-5, atol=1e-6)


def test_batch_normalization_in_training_is_refused(build):
    weights = {name: np.ones(3, F32) for name in ("s", "b", "m", "v")}
    nodes = [
        node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y", "m2", "v2", "m3", "v3"], name="bn"),
        node("BatchNormalization", ["y", "s", "b", "m", "v"], ["z", "m4", "v4", "m5", "v5"], name="again"),
    ]
    with pytest.raises(UnsupportedModelError, match=r"(?s)'bn'.*training.*'again'"):
        load(build(nodes, {"x": [2, 3, 4]}, ["z"], 9, weights))


def test_group_normalization(build):
    weights = {"s": np.array([1, 2], F32), "b": np.array([0.5, -0.5], F32)}
    nodes = [node("GroupNormalization", ["x", "s", "b"], ["y"], num_groups=2)]
    model = build(nodes, {"x": ["n", 6, 5]}, ["y"], 18, weights)
    x = data(2, 6, 5)
    groups = x.reshape(2, 2, 15)
    normal = (groups - groups.mean(2, keepdims=True)) / np.sqrt(groups.var(2, keepdims=True) + 1e-5)
    scale, bias = (np.repeat(weights[k], 3)[:, None] for k in "sb")
    expected = normal.reshape(2, 6, 5) * scale + bias
    result = ReferenceEvaluator(oir.to_proto(load(model))).run(None, {"x": x})[0]
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_scatter(build, same_results):
    weights = {"i": np.array([[0, 1]], np.int64), "u": np.array([[5, 6]], F32)}
    nodes = [node("Scatter", ["x", "i", "u"], ["y"], axis=1)]
    assert ops(same_results(build(nodes, {"x": [2, 3]}, ["y"], 9, weights), {"x": data(2, 3)})) == ["ScatterElements"]


def test_scan_8(build, same_results):
    body = onnx.helper.make_graph(
        [node("Add", ["s", "e"], ["s2"]), node("Mul", ["s2", "two"], ["o"])],
        "body",
        [onnx.helper.make_tensor_value_info(n, 1, [2]) for n in ("s", "e")],
        [onnx.helper.make_tensor_value_info(n, 1, [2]) for n in ("s2", "o")],
        [onnx.numpy_helper.from_array(np.array(2, F32), "two")],
    )
    nodes = [node("Scan", ["", "init", "x"], ["final", "all"], num_scan_inputs=1, directions=[1], body=body)]
    model = build(nodes, {"init": [3, 2], "x": [3, 5, 2]}, ["final", "all"], 8)
    same_results(model, {"init": data(3, 2), "x": data(3, 5, 2)})


def test_scan_8_with_lengths_is_refused(build):
    body = onnx.helper.make_graph(
        [node("Identity", ["e"], ["o"])],
        "body",
        [onnx.helper.make_tensor_value_info("e", 1, [2])],
        [onnx.helper.make_tensor_value_info("o", 1, [2])],
    )
    nodes = [node("Scan", ["lengths", "x"], ["y"], num_scan_inputs=1, body=body)]
    model = build(nodes, {"lengths": [3], "x": [3, 5, 2]}, ["y"], 8, types={"lengths": 7})
    with pytest.raises(UnsupportedModelError, match="lengths"):
        load(model)


# --- resize -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("opset", [7, 9])
def test_upsample(build, same_results, mode, opset):
    scales = [1.0, 1.0, 2.0, 1.5]
    if opset == 7:
        nodes, weights = [node("Upsample", ["x"], ["y"], mode=mode, scales=scales)], {}
    else:
        nodes, weights = [node("Upsample", ["x", "s"], ["y"], mode=mode)], {"s": np.array(scales, F32)}
    model = build(nodes, {"x": [1, 2, 4, 6]}, ["y"], opset, weights)
    assert ops(same_results(model, {"x": data(1, 2, 4, 6)})) == ["Resize"]


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("scales", [[1, 1, 2, 1.7], [1, 1, 0.6, 0.6], [1, 1, 1, 1]])
def test_resize_10(build, same_results, mode, scales):
    weights = {"s": np.array(scales, F32)}
    model = build([node("Resize", ["x", "s"], ["y"], mode=mode)], {"x": [1, 1, 5, 7]}, ["y"], 10, weights)
    assert ops(same_results(model, {"x": data(1, 1, 5, 7)})) == ["Resize"]


@pytest.mark.parametrize("scales", [[1, 1, 2, 0.6], [1, 1, 0.5, 0.7], [1, 1, 1.3, 3]])
def test_resize_10_with_scales_known_at_run_time(build, same_results, scales):
    model = build([node("Resize", ["x", "s"], ["y"])], {"x": [1, 1, 5, 7], "s": [4]}, ["y"], 10)
    same_results(model, {"x": data(1, 1, 5, 7), "s": np.array(scales, F32)})


def test_resize_11_tf_half_pixel_for_nn(build, same_results):
    weights = {"r": np.zeros(0, F32), "e": np.zeros(0, F32), "z": np.array([1, 1, 9, 3], np.int64)}
    mode = {"coordinate_transformation_mode": "tf_half_pixel_for_nn", "nearest_mode": "floor"}
    model = build([node("Resize", ["x", "r", "e", "z"], ["y"], **mode)], {"x": [1, 1, 5, 7]}, ["y"], 11, weights)
    canonical = same_results(model, {"x": data(1, 1, 5, 7)})
    assert [v is None for v in canonical.graph[0].inputs] == [False, True, True, False]


def test_resize_11_tf_half_pixel_for_nn_refused(build):
    mode = {"coordinate_transformation_mode": "tf_half_pixel_for_nn", "nearest_mode": "ceil"}
    weights = {"r": np.zeros(0, F32), "s": np.ones(4, F32)}
    with pytest.raises(UnsupportedModelError, match="nearest_mode"):
        load(build([node("Resize", ["x", "r", "s"], ["y"], **mode)], {"x": [1, 1, 5, 7]}, ["y"], 11, weights))


def test_roi_align_10(build, evaluate):
    weights = {"r": np.array([[0, 0, 3, 3]], F32), "i": np.zeros(1, np.int64)}
    nodes = [node("RoiAlign", ["x", "r", "i"], ["y"], output_height=2, output_width=2, sampling_ratio=2)]
    model, feeds = build(nodes, {"x": [1, 1, 5, 5]}, ["y"], 10, weights), {"x": data(1, 1, 5, 5)}
    # onnxruntime has no RoiAlign of the canonical opset.
    result = ReferenceEvaluator(oir.to_proto(load(model))).run(None, feeds)
    np.testing.assert_allclose(result, evaluate(model, feeds), rtol=1e-5)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest"])
def test_grid_sample_16(build, same_results, mode):
    nodes = [node("GridSample", ["x", "g"], ["y"], mode=mode)]
    model = build(nodes, {"x": [1, 1, 5, 5], "g": [1, 2, 3, 2]}, ["y"], 16)
    same_results(model, {"x": data(1, 1, 5, 5), "g": np.tanh(data(1, 2, 3, 2))})


# --- opset 6 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "attributes"), [((3, 4), {"axis": 1}), ((2,), {"axis": 0}), ((5,), {})])
def test_broadcast_6(build, evaluate, shape, attributes):
    a, b = data(2, 3, 4, 5), data(*shape)
    model = build([node("Add", ["a", "b"], ["y"], broadcast=1, **attributes)], {"a": a.shape, "b": shape}, ["y"], 6)
    expected = a + b.reshape(*shape, *[1] * (4 - attributes["axis"] - len(shape)) if attributes else ())
    np.testing.assert_array_equal(evaluate(load(model), {"a": a, "b": b})[0], expected)


def test_prelu_6(build, evaluate):
    x, slope = data(2, 3, 4, 4), data(3)
    model = build([node("PRelu", ["x", "s"], ["y"])], {"x": x.shape}, ["y"], 6, {"s": slope})
    expected = np.where(x < 0, x * slope[:, None, None], x)
    np.testing.assert_array_equal(evaluate(load(model), {"x": x})[0], expected)


def test_gemm_batch_normalization_and_dropout_6(build, same_results):
    weights = {n: np.abs(data(4)) for n in ("c", "s", "b", "m", "v")} | {"w": data(3, 4)}
    nodes = [
        node("Gemm", ["x", "w", "c"], ["g"], broadcast=1),
        node("BatchNormalization", ["g", "s", "b", "m", "v"], ["n"], is_test=1),
        node("Dropout", ["n"], ["y"], is_test=1),
    ]
    canonical = load(build(nodes, {"x": [2, 3]}, ["y"], 6, weights))
    assert ops(canonical) == ["Gemm", "BatchNormalization", "Dropout"]


def test_dropout_6_in_training_is_refused(build):
    with pytest.raises(UnsupportedModelError, match="random"):
        load(build([node("Dropout", ["x"], ["y"])], {"x": [2]}, ["y"], 6))


def test_upsample_1(build, evaluate):
    nodes = [node("Upsample", ["x"], ["y"], height_scale=2.0, width_scale=3.0)]
    x = data(1, 1, 2, 2)
    result = evaluate(load(build(nodes, {"x": [1, 1, 2, 2]}, ["y"], 6)), {"x": x})[0]
    np.testing.assert_array_equal(result, x.repeat(2, 2).repeat(3, 3))


# --- the driver ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [27, 28])
def test_newer_opsets_keep_their_number(build, opset):
    assert load(build([node("Relu", ["x"], ["y"])], {"x": [2]}, ["y"], opset)).opset_imports[""] == opset


@pytest.mark.parametrize("opset", [1, 5, 29, 99])
def test_opsets_out_of_range(build, opset):
    with pytest.raises(UnsupportedModelError, match=f"opset {opset}"):
        load(build([node("Relu", ["x"], ["y"])], {"x": [2]}, ["y"], opset))


def test_new_nodes_name_their_source(build):
    from optc.ir import provenance

    model = build([node("Softmax", ["x"], ["y"], axis=1, name="sm")], {"x": [2, 3, 4]}, ["y"], 9)
    assert {provenance.sources(n) for n in load(model).graph} == {("sm",)}


def test_upgrade_inside_a_subgraph(build, same_results):
    def branch(kind: str) -> onnx.GraphProto:
        nodes = [node(kind, ["x"], ["t"], axes=[0]), node("Clip", ["t"], [f"{kind}_out"], min=0.0)]
        return onnx.helper.make_graph(nodes, kind, [], [onnx.helper.make_tensor_value_info(f"{kind}_out", 1, None)])

    nodes = [node("If", ["c"], ["y"], then_branch=branch("ReduceSum"), else_branch=branch("ReduceMean"))]
    model = build(nodes, {"c": [], "x": [3, 4]}, ["y"], 10, types={"c": 9})
    same_results(model, {"c": np.array(True), "x": data(3, 4)})
    same_results(model, {"c": np.array(False), "x": data(3, 4)})
