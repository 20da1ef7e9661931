"""Operators that work on every element alone, and those that put elements of one axis in relation: those stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from optc.passes.match import input_or_none, int_attribute, integers
from optc.passes.prune.axes import Axes, Kept, NotUnderstoodError, couples, updates

_UNARY = """
    Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast Ceil Celu Clip Cos Cosh Dropout Elu Erf Exp Floor Gelu
    HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid Sign
    Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu
"""
_BROADCAST = """
    Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod
    Mul Or PRelu Pow Sub Sum Where Xor
"""


@couples(*_UNARY.split())
def unary(node: oir.Node, axes: Axes) -> None:
    """Every output has the slices of the first input; further inputs (bounds, ratios) are scalars."""
    for value in node.outputs:
        axes.set(value, axes.of(node.inputs[0]))


@couples(*_BROADCAST.split())
def broadcast(node: oir.Node, axes: Axes) -> None:
    """Operands broadcast against each other share their slices."""
    axes.set(node.outputs[0], axes.broadcast([axes.of(value) for value in node.inputs]))


@couples("BatchNormalization", "InstanceNormalization")
def per_channel(node: oir.Node, axes: Axes) -> None:
    """Axis 1 has one scale, bias, mean and variance per channel."""
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        raise NotUnderstoodError("it is in training mode")
    x = axes.of(node.inputs[0])
    for value in node.inputs[1:]:
        axes.couple_vector(value, x[1])
    if node.op_type == "BatchNormalization" and node.inputs[1] is not None:
        axes.scales.append(node.inputs[1])
    axes.set(node.outputs[0], x)


@couples("GroupNormalization")
def group_normalization(node: oir.Node, axes: Axes) -> None:
    """Statistics are taken over groups of channels, so a group goes as a whole."""
    x = list(axes.of(node.inputs[0]))
    axes.unite_blocks(x[1], node.attributes["num_groups"].as_int(), "statistics are taken over the group")
    for value in node.inputs[1:]:
        axes.couple_vector(value, x[1])
    axes.set(node.outputs[0], x)


@updates("GroupNormalization")
def fewer_groups(node: oir.Node, kept: Kept) -> None:
    """Groups keep their size."""
    mask = kept.mask(node.inputs[0], 1)
    assert mask is not None
    groups = node.attributes["num_groups"].as_int()
    node.attributes["num_groups"] = oir.AttrInt64("num_groups", int(mask.reshape(groups, -1)[:, 0].sum()))


def _keep(node: oir.Node, axes: Axes, which: range | tuple[int, ...], text: str) -> None:
    """Let some axes of the first input stay; the first output is like it. Further inputs stay too."""
    x = axes.of(node.inputs[0])
    for axis in which:
        axes.pin(x[axis], text)
    for value in node.inputs[1:]:
        if value is not None:
            axes.pin_value(value, text)
    axes.set(node.outputs[0], x)
    for value in node.outputs[1:]:
        axes.leave(value)


@couples("LayerNormalization", "RMSNormalization")
def layer_normalization(node: oir.Node, axes: Axes) -> None:
    """Statistics would be those of fewer elements: no weights make up for that."""
    rank = len(axes.of(node.inputs[0]))
    _keep(node, axes, range(int_attribute(node, "axis", -1) % rank, rank), "it normalizes over this axis")


@couples("Softmax", "LogSoftmax", "Hardmax", "LpNormalization", "CumSum", "CumProd")
def along_one_axis(node: oir.Node, axes: Axes) -> None:
    """Each result depends on all slices along the axis."""
    rank = len(axes.of(node.inputs[0]))
    if node.op_type.startswith("Cum"):
        chosen = integers(input_or_none(node, 1))
        if chosen is None:
            raise NotUnderstoodError("its axis is computed")
        axis = chosen[0]
    else:
        axis = int_attribute(node, "axis", -1)
    _keep(node, axes, (axis % rank,), "its results depend on all slices along this axis")


@couples("LRN", "MeanVarianceNormalization")
def across_channels(node: oir.Node, axes: Axes) -> None:
    """They mix channels, or axes given by an attribute that is never the batch alone."""
    _keep(node, axes, range(len(axes.of(node.inputs[0]))), "it normalizes over this axis")


@couples("Trilu")
def triangle(node: oir.Node, axes: Axes) -> None:
    """What is zero depends on positions along the last two axes."""
    _keep(node, axes, (-2, -1), "the positions along this axis matter")


_REDUCTIONS = """
    ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare
"""


@couples(*_REDUCTIONS.split(), "ArgMax", "ArgMin")
def reduce(node: oir.Node, axes: Axes) -> None:
    """Reduced axes stay; the others are as they were."""
    x = axes.of(node.inputs[0])
    rank = len(x)
    given = input_or_none(node, 1)
    if node.op_type in ("ArgMax", "ArgMin"):
        chosen: tuple[int, ...] | None = (int_attribute(node, "axis", 0),)
    elif given is not None:
        chosen = integers(given)
    else:
        chosen = ()
    if chosen is None:
        raise NotUnderstoodError("its axes are computed")
    if not chosen and not int_attribute(node, "noop_with_empty_axes", 0):
        chosen = tuple(range(rank))
    reduced = {axis % rank for axis in chosen}
    for axis in reduced:
        axes.pin(x[axis], "it reduces this axis")
    one = np.zeros(1, np.int64)
    if int_attribute(node, "keepdims", 1):
        axes.set(node.outputs[0], [one if axis in reduced else labels for axis, labels in enumerate(x)])
    else:
        axes.set(node.outputs[0], [labels for axis, labels in enumerate(x) if axis not in reduced])


@couples("QuantizeLinear", "DequantizeLinear")
def rounding(node: oir.Node, axes: Axes) -> None:
    """Scales and zero points are those of the tensor, or lie along one axis."""
    x = axes.of(node.inputs[0])
    if int_attribute(node, "block_size", 0):
        raise NotUnderstoodError("its scales belong to blocks")
    for value in node.inputs[1:]:
        if value is not None and value.shape is not None and value.shape.rank() and value.shape[0] != 1:
            axes.couple_vector(value, x[int_attribute(node, "axis", 1) % len(x)])
    axes.set(node.outputs[0], x)
