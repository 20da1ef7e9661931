"""No-ops: operators that give back their input.

Neutral elements are removed also where that changes the sign of a zero: ``x + 0`` is +0 for x = -0, and x is -0;
the two compare equal. NaN passes through both forms. Neutral constants count only where they do not broadcast ``x``.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from optc.passes.match import (
    constant,
    input_or_none,
    int_attribute,
    integers,
    producer,
    same_dim,
    same_shape,
)
from optc.passes.rewrite import Miss, Ops, Outcome, Rewrite, RewritePass, rule

_REDUCTIONS = ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum")
_BROADCASTING = (
    "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Mod", "Mul", "Or", "Pow",
    "Sub", "Where", "Xor",
)  # fmt: skip


def _pass_through(node: oir.Node) -> Outcome:
    """Replace the node by its first input."""
    x = node.inputs[0]
    return Rewrite([x]) if x is not None else None


@rule("identity(x) => x", "Identity")
def identity(node: oir.Node, ops: Ops) -> Outcome:
    """Drop Identity, unless it is what gives a graph output its name."""
    x, y = node.inputs[0], node.outputs[0]
    if x is None:
        return None
    maker = x.producer()
    if y.is_graph_output() and (maker is None or maker.graph is not node.graph or x.is_graph_output()):
        return None
    return Rewrite([x])


@rule("dropout(x) => x", "Dropout")
def dropout(node: oir.Node, ops: Ops) -> Outcome:
    """Drop Dropout outside of training."""
    training = input_or_none(node, 2)
    if training is not None:
        flag = constant(training)
        if flag is None or bool(flag.reshape(())):
            return Miss("training mode is on, or decided at run time")
    if len(node.outputs) > 1:
        return Miss("the mask is used")  # an unused one is removed with dead code
    return _pass_through(node)


@rule("reshape(x, shape of x) => x", "Reshape", "Expand", "Flatten", "Tile")
def same_shape_result(node: oir.Node, ops: Ops) -> Outcome:
    """Drop an operator that keeps all elements in order and gives the shape of its input."""
    if not same_shape(node.inputs[0], node.outputs[0]):
        return None
    if node.op_type == "Tile" and set(integers(node.inputs[1]) or [0]) != {1}:
        return None
    return _pass_through(node)


@rule("slice(x, everything) => x", "Slice")
def whole_slice(node: oir.Node, ops: Ops) -> Outcome:
    """Drop a Slice that keeps every element: the shape stays, and no step is negative."""
    steps = input_or_none(node, 4)
    values = integers(steps) if steps is not None else (1,)
    if values is None or min(values, default=1) < 1 or not same_shape(node.inputs[0], node.outputs[0]):
        return None
    return _pass_through(node)


@rule("pad(x, 0) => x", "Pad")
def zero_pad(node: oir.Node, ops: Ops) -> Outcome:
    """Drop a Pad of nothing."""
    pads = integers(node.inputs[1])
    return _pass_through(node) if pads is not None and not any(pads) else None


@rule("resize(x, scales = 1) => x", "Resize")
def unit_resize(node: oir.Node, ops: Ops) -> Outcome:
    """Drop a Resize whose scales are all 1, or whose sizes are those of its input."""
    scales = constant(input_or_none(node, 2))
    attribute = node.attributes.get("coordinate_transformation_mode")
    mode = attribute.as_string() if attribute is not None else ""
    by_scales = scales is not None and scales.size > 0
    if np.any(scales != 1) if by_scales else not same_shape(node.inputs[0], node.outputs[0]):
        return None
    if not by_scales and input_or_none(node, 3) is None:
        return None
    if mode == "tf_crop_and_resize":
        return Miss("a region of interest is cut out")
    if mode == "tf_half_pixel_for_nn":
        return Miss("pixels are read half a pixel away")
    return _pass_through(node)


@rule("op(x) of one operand => x", "Concat", "Max", "Mean", "Min", "Sum")
def single_operand(node: oir.Node, ops: Ops) -> Outcome:
    """Drop a variadic operator with one operand."""
    return _pass_through(node) if len(node.inputs) == 1 else None


@rule("split(x) into one => x", "Split")
def single_split(node: oir.Node, ops: Ops) -> Outcome:
    """Drop a Split with one output."""
    return _pass_through(node) if len(node.outputs) == 1 else None


_NEUTRAL = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1, "Pow": 1, "Or": False, "And": True, "Xor": False}


@rule("x op neutral => x", *_NEUTRAL)
def neutral(node: oir.Node, ops: Ops) -> Outcome:
    """Drop arithmetic with a neutral constant."""
    expected = _NEUTRAL[node.op_type]
    orders = ((0, 1),) if node.op_type in ("Sub", "Div", "Pow") else ((0, 1), (1, 0))
    for kept, other in orders:
        array, x = constant(node.inputs[other]), node.inputs[kept]
        if array is None or x is None or array.size == 0 or not np.all(array == np.array(expected).astype(array.dtype)):
            continue
        if not same_shape(x, node.outputs[0]):
            return Miss("the neutral constant broadcasts the other operand")
        return Rewrite([x])
    return None


@rule("reduce(x) over axes of size 1 => reshape(x)", *_REDUCTIONS)
def unit_reduction(node: oir.Node, ops: Ops) -> Outcome:
    """Replace a reduction of single elements; one that keeps the axes gives back its input."""
    x, axes = node.inputs[0], input_or_none(node, 1)
    if x is None or x.shape is None:
        return None
    chosen = integers(axes) if axes is not None else ()
    if chosen is None:
        return None
    if not chosen:
        chosen = () if int_attribute(node, "noop_with_empty_axes", 0) else tuple(range(len(x.shape)))
    if any(x.shape[axis] != 1 for axis in chosen):
        return None
    if int_attribute(node, "keepdims", 1) or not chosen:
        return Rewrite([x])
    return Rewrite([ops("Squeeze", x, ops.constant(np.array(chosen, np.int64), hint="axes"))])


@rule("op(expand(x), y) => op(x, y)", *_BROADCASTING)
def expanded_operand(node: oir.Node, ops: Ops) -> Outcome:
    """Leave the broadcast of an operand to the operator, where the other operands already have the full shape."""
    shape = node.outputs[0].shape
    for index, value in enumerate(node.inputs):
        expand = producer(value, "Expand")
        if expand is None or shape is None or expand.inputs[0] is None:
            continue
        operands = [v for i, v in enumerate(node.inputs) if i != index and v is not None]
        if all(_reaches(axis, len(shape), shape, [*operands, expand.inputs[0]]) for axis in range(len(shape))):
            inputs = [expand.inputs[0] if i == index else v for i, v in enumerate(node.inputs)]
            attributes = {name: attribute.value for name, attribute in node.attributes.items()}
            return Rewrite([ops(node.op_type, *inputs, **attributes)])
    return None


def _reaches(axis: int, rank: int, shape: oir.Shape, operands: list[oir.Value]) -> bool:
    """Tell whether one of the operands has the full size of the result along ``axis``."""
    for value in operands:
        if value.shape is None:
            return False
        own = axis - (rank - len(value.shape))
        if own >= 0 and same_dim(value.shape[own], shape[axis]):
            return True
    return shape[axis] == 1


@rule("relu(relu(x)) => relu(x)", "Abs", "Ceil", "Floor", "Relu", "Round", "Sign")
def idempotent(node: oir.Node, ops: Ops) -> Outcome:
    """Drop the second of two equal idempotent operators."""
    return _pass_through(node) if producer(node.inputs[0], node.op_type) is not None else None


@rule("--x => x", "Neg", "Not")
def involution(node: oir.Node, ops: Ops) -> Outcome:
    """Drop two equal operators that undo each other."""
    inner = producer(node.inputs[0], node.op_type)
    return Rewrite([inner.inputs[0]]) if inner is not None and inner.inputs[0] is not None else None


@rule("pool(x) of 1x1 => x", "AveragePool", "MaxPool")
def unit_pool(node: oir.Node, ops: Ops) -> Outcome:
    """Drop a pooling that looks at one element and keeps the shape."""
    kernel = node.attributes["kernel_shape"].as_ints()
    if set(kernel) != {1} or len(node.outputs) > 1:
        return None
    padding = node.attributes.get("pads"), node.attributes.get("auto_pad")
    if (padding[0] is not None and any(padding[0].as_ints())) or (
        padding[1] is not None and padding[1].as_string() not in ("NOTSET", "VALID")
    ):
        return None
    return _pass_through(node) if same_shape(node.inputs[0], node.outputs[0]) else None


PASS = RewritePass(
    "identities",
    [
        identity,
        dropout,
        same_shape_result,
        whole_slice,
        zero_pad,
        unit_resize,
        single_operand,
        single_split,
        neutral,
        unit_reduction,
        expanded_operand,
        idempotent,
        involution,
        unit_pool,
    ],
)
