"""Values travel as integers through operators that only move or select elements.

``Q(f(DQ(x)))`` with the same scale and zero point on both sides is ``f(x)`` where f moves elements, or selects one of
several by their order; a pair that meets again cancels; Relu and Clip behind the rounding are bounds on integers.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from optc.passes.fuse.bias import copied
from optc.passes.integer.parameters import EIGHT_BITS, Quantized, dequantized, read
from optc.passes.match import input_or_none, producer, scalar, used_once
from optc.passes.rewrite import Miss, Ops, Outcome, Rewrite, RewritePass, rule

# Operators whose first input gives all elements of their only output. The order of integers is that of the numbers.
_MOVING = (
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Gather", "GatherND", "GatherElements",
    "Expand", "Tile", "DepthToSpace", "SpaceToDepth", "MaxPool", "ReduceMax", "ReduceMin", "GlobalMaxPool",
)  # fmt: skip


def _eight_bits(node: oir.Node) -> Quantized | None:
    """Return the parameters of a QuantizeLinear to 8 bits with one scale, or None."""
    output = read(node)
    return output if output is not None and output.per_tensor and node.outputs[0].dtype in EIGHT_BITS else None


@rule("q(dq(x)) => x", "QuantizeLinear")
def round_trip(node: oir.Node, ops: Ops) -> Outcome:
    """The rounding of (x - z) * s / s is far smaller than half a step."""
    output = _eight_bits(node)
    source = dequantized(node.inputs[0]) if output is not None else None
    if output is None or source is None:
        return None
    if not source.same_as(output):
        return Miss("the parameters differ")
    return Rewrite([source.x])


@rule("q(move(dq(x))) => move(x)", "QuantizeLinear")
def moved(node: oir.Node, ops: Ops) -> Outcome:
    """Move the integers."""
    output, mover = _eight_bits(node), producer(node.inputs[0], *_MOVING)
    if output is None or mover is None:
        return None
    source = dequantized(mover.inputs[0])
    if source is None:
        return None
    if not source.same_as(output):
        return Miss("the parameters differ")
    if len([v for v in mover.outputs if v.name and (v.uses() or v.is_graph_output())]) > 1:
        return Miss("another output of the operator is used")
    if mover.op_type in ("ReduceMax", "ReduceMin", "Reshape") and _may_be_empty(source.x):
        return Miss("the input may be empty")
    return Rewrite([copied(ops, mover, source.x, *mover.inputs[1:])])


def _may_be_empty(value: oir.Value) -> bool:
    return value.shape is None or any(d == 0 for d in value.shape)


@rule("q(concat(dq(a), dq(b), ...)) => concat(a, b, ...)", "QuantizeLinear")
def joined(node: oir.Node, ops: Ops) -> Outcome:
    """All parts must have the parameters of the result."""
    output, concat = _eight_bits(node), producer(node.inputs[0], "Concat")
    if output is None or concat is None:
        return None
    parts = [dequantized(value) for value in concat.inputs]
    if not all(part is not None and part.same_as(output) for part in parts):
        return Miss("a part is not quantized, or has other parameters")
    return Rewrite([copied(ops, concat, *(part.x for part in parts if part is not None))])


@rule("q(clip(x, low, high)) => clip(q(x), q(low), q(high))", "QuantizeLinear")
def clipped(node: oir.Node, ops: Ops) -> Outcome:
    """Quantization keeps the order, so bounds hold on either side of it; those of the type itself need no operator."""
    output, clip = _eight_bits(node), producer(node.inputs[0], "Relu", "Clip")
    if output is None or clip is None or clip.inputs[0] is None:
        return None
    if not used_once(clip.outputs[0]):
        return Miss("the bounded value is used elsewhere too")
    bounds: list[float | None] = [0.0, None]
    if clip.op_type == "Clip":
        given = [input_or_none(clip, i) for i in (1, 2)]
        bounds = [scalar(value) for value in given]
        if any(value is not None and bound is None for value, bound in zip(given, bounds, strict=True)):
            return Miss("a bound is not constant")
    low, high = bounds
    if low is not None and high is not None and low > high:
        return Miss("the bounds are in the wrong order")
    assert node.outputs[0].dtype is not None
    kind = node.outputs[0].dtype.numpy()
    limits = np.iinfo(kind)
    result = copied(ops, node, clip.inputs[0], *node.inputs[1:])
    result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
    for operator, bound, limit in (("Max", low, limits.min), ("Min", high, limits.max)):
        if bound is None:
            continue
        if not np.isfinite(bound):
            return Miss("a bound is not finite")
        step = np.rint(np.float32(bound) / output.scale) + np.float32(output.zero)
        number = int(np.clip(step, limits.min, limits.max))
        if number != limit:
            result = ops(operator, result, ops.constant(np.array(number, kind), "bound"), like=node.outputs[0])
    return Rewrite([result])


def passage_pass() -> RewritePass:
    """Return the pass that lets values travel as integers."""
    return RewritePass("integer_passage", [round_trip, moved, joined, clipped])
