"""Adapters for operators whose meaning changed, and for renamed ones."""

from __future__ import annotations

import onnx_ir as oir

from optc.frontend.upgrade import ALWAYS, Edit, Refused, until
from optc.ir import provenance


@until(13, "Softmax", "LogSoftmax", "Hardmax")
def softmax(edit: Edit) -> None:
    """Softmax, LogSoftmax, Hardmax -> 13: before, all axes from ``axis`` (default 1) on were one axis."""
    data = edit.input(0)
    taken = edit.take("axis")
    axis = taken.as_int() if taken is not None else 1
    rank = len(data.shape) if data.shape is not None else None
    edit.set("axis", -1)
    if axis == -1 or (rank is not None and axis == rank - 1):
        return
    kind = edit.node.op_type
    rows = edit.op(kind, edit.op("Flatten", data, axis=axis), axis=-1)
    # allowzero: a size of 0 in the shape of the data is a size of 0, not "copy from the matrix".
    edit.replace(edit.op("Reshape", rows, edit.op("Shape", data), allowzero=1))


@until(14, "BatchNormalization")
def batch_normalization(edit: Edit) -> None:
    """BatchNormalization-7 and 9 -> 14: inference form only; ``spatial=0`` (version 7) is elementwise."""
    if len(edit.node.outputs) > 1:
        raise Refused("statistics as outputs mean training mode, whose definition changed at opset 14")
    spatial = edit.take("spatial")
    if spatial is None or spatial.as_int() != 0:
        return
    data, scale, bias, mean, variance = (edit.input(index) for index in range(5))
    epsilon = edit.scalar_like(edit.node.attributes.get_float("epsilon", 1e-5) or 0.0, data, "epsilon")
    deviation = edit.op("Sqrt", edit.op("Add", variance, epsilon))
    normal = edit.op("Div", edit.op("Sub", data, mean), deviation)
    edit.replace(edit.op("Add", edit.op("Mul", normal, scale), bias))


@until(21, "GroupNormalization")
def group_normalization(edit: Edit) -> None:
    """GroupNormalization-18 -> 21: scale and bias per group become scale and bias per channel."""
    data = edit.input(0)
    groups = edit.node.attributes["num_groups"].as_int()
    channels = edit.op("Shape", data, start=1, end=2)
    width = edit.op("Div", channels, edit.ints([groups], "groups"))
    target = edit.op("Concat", edit.ints([groups], "rows"), width, axis=0)

    def spread(value: oir.Value) -> oir.Value:
        column = edit.op("Unsqueeze", value, edit.ints([1], "axis"))
        return edit.op("Reshape", edit.op("Expand", column, target), edit.ints([-1], "flat"))

    edit.set_inputs(data, spread(edit.input(1)), spread(edit.input(2)))


@until(ALWAYS, "Scatter")
def scatter(edit: Edit) -> None:
    """Scatter-9 (deprecated at 11) was renamed to ScatterElements."""
    edit.node.op_type = "ScatterElements"


@until(9, "Scan")
def scan(edit: Edit) -> None:
    """Scan-8 -> 9: the version 8 runs over axis 1 of every sample of a batch (axis 0) on its own.

    That is a Scan over the batch whose body is the Scan over the sequence.
    """
    node = edit.node
    if node.inputs[0] is not None:
        raise Refused("sequence lengths of a Scan have no equivalent since opset 9")
    body = node.attributes["body"].as_graph()
    scanned = node.attributes["num_scan_inputs"].as_int()
    directions = edit.take_ints("directions")
    values = [edit.input(index) for index in range(1, len(node.inputs))]
    # The outer body: the same inputs without the batch axis.
    arguments = [oir.Value(name=edit.value_name("sample"), type=value.type) for value in values]
    inner = oir.node("Scan", arguments, attributes={"num_scan_inputs": scanned}, num_outputs=len(node.outputs))
    inner.name = edit.node_name("Scan")
    provenance.inherit(inner, [node], made_by="opset upgrade")
    node.attributes.pop("body")
    inner.attributes["body"] = oir.AttrGraph("body", body)
    if directions is not None:
        inner.attributes["scan_input_directions"] = oir.AttrInt64s("scan_input_directions", directions)
    for output, outer in zip(inner.outputs, node.outputs, strict=True):
        output.name, output.type = edit.value_name("result"), outer.type
    sample = oir.Graph(arguments, list(inner.outputs), nodes=[inner], name=f"{node.name}_sample")
    edit.set_inputs(*values)
    edit.set("body", sample)
    edit.set("num_scan_inputs", len(values))
