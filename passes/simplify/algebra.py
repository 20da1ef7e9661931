"""Algebra on values: cheaper spellings, clips, conditions, slices. All are exact.

A division becomes a multiplication only where the divisor is a power of two.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from optc.passes.match import (
    commuted,
    constant,
    input_or_none,
    int_attribute,
    integers,
    is_float,
    is_scalar,
    producer,
    same_shape,
    used_once,
)
from optc.passes.rewrite import Miss, Ops, Outcome, Rewrite, RewritePass, rule
from optc.passes.simplify.slices import SLICE_RULES


@rule("x / 2^k => x * 2^-k", "Div")
def divide_by_power_of_two(node: oir.Node, ops: Ops) -> Outcome:
    """Multiply by the reciprocal where it is exact."""
    array = constant(node.inputs[1])
    if array is None or not is_float(node.outputs[0]) or array.size == 0:
        return None
    mantissa, exponent = np.frexp(array.astype(np.float64))
    limit = 14 if array.dtype.itemsize == 2 else 126
    if np.any(np.abs(mantissa) != 0.5) or np.any(np.abs(exponent) >= limit):
        return None
    reciprocal = (1.0 / array.astype(np.float64)).astype(array.dtype)
    return Rewrite([ops("Mul", node.inputs[0], ops.constant(reciprocal))])


@rule("1 / x => reciprocal(x)", "Div")
def reciprocal(node: oir.Node, ops: Ops) -> Outcome:
    """Name the reciprocal."""
    x = node.inputs[1]
    if not is_float(x) or not is_scalar(node.inputs[0], 1.0, 0.0) or not same_shape(x, node.outputs[0]):
        return None
    return Rewrite([ops("Reciprocal", x)])


@rule("pow(x, 2) => x * x", "Pow")
def square(node: oir.Node, ops: Ops) -> Outcome:
    """Multiply in place of calling the power function."""
    x = node.inputs[0]
    if not is_float(x) or not is_scalar(node.inputs[1], 2.0, 0.0) or not same_shape(x, node.outputs[0]):
        return None
    return Rewrite([ops("Mul", x, x)])


@rule("x * -1 => -x", "Mul")
def negate(node: oir.Node, ops: Ops) -> Outcome:
    """Name the negation."""
    for x, c in commuted(node):
        if is_scalar(c, -1.0, 0.0) and same_shape(x, node.outputs[0]):
            return Rewrite([ops("Neg", x)])
    return None


@rule("x + -y => x - y", "Add", "Sub")
def add_negated(node: oir.Node, ops: Ops) -> Outcome:
    """Subtract in place of adding the negative, and add in place of subtracting it."""
    for x, y in commuted(node) if node.op_type == "Add" else ((node.inputs[0], node.inputs[1]),):
        negation = producer(y, "Neg")
        if negation is not None:
            return Rewrite([ops("Sub" if node.op_type == "Add" else "Add", x, negation.inputs[0])])
    return None


def _bounds(node: oir.Node | None) -> tuple[oir.Value, np.ndarray | None, np.ndarray | None] | None:
    """Return ``(x, low, high)`` of a Relu, a Clip or a Min/Max with a scalar constant, None for no bound."""
    x = node.inputs[0] if node is not None and node.inputs else None
    if node is None or x is None or x.dtype is None:
        return None
    if node.op_type == "Relu":
        return x, np.zeros((), x.dtype.numpy()), None
    if node.op_type == "Clip":
        low, high = input_or_none(node, 1), input_or_none(node, 2)
        bounds = [constant(v) if v is not None else None for v in (low, high)]
        if (low is not None and bounds[0] is None) or (high is not None and bounds[1] is None):
            return None
        return x, bounds[0], bounds[1]
    if node.op_type in ("Max", "Min") and len(node.inputs) == 2:
        for value, bound in commuted(node):
            array = constant(bound)
            if array is not None and array.size == 1 and same_shape(value, node.outputs[0]) and value is not None:
                scalar = array.reshape(())
                return (value, scalar, None) if node.op_type == "Max" else (value, None, scalar)
    return None


@rule("clip(clip(x)) => clip(x)", "Clip", "Max", "Min", "Relu")
def clip_chain(node: oir.Node, ops: Ops) -> Outcome:
    """Clip once, to the bounds that remain of both."""
    outer = _bounds(node)
    inner_node = producer(outer[0], "Clip", "Max", "Min", "Relu") if outer is not None else None
    inner = _bounds(inner_node)
    if outer is None or inner is None or inner_node is None:
        return None
    if not used_once(inner_node.outputs[0]):
        return Miss("the inner result is needed elsewhere too")
    (_, low, high), (x, low0, high0) = outer, inner
    if any(b is not None and np.isnan(b) for b in (low, high, low0, high0) if b is None or b.dtype.kind == "f"):
        return Miss("a bound is not a number")
    if any(a is not None and b is not None and a > b for a, b in ((low, high), (low0, high0))):
        return Miss("the bounds are the wrong way round")

    def clipped(bound: np.ndarray | None) -> np.ndarray | None:
        if bound is None:
            return None
        bound = np.maximum(bound, low) if low is not None else bound
        return np.minimum(bound, high) if high is not None else bound

    new_low = clipped(low0) if low0 is not None else low
    new_high = clipped(high0) if high0 is not None else high
    if new_low is not None and not new_low.any() and new_high is None and is_float(x):
        return Rewrite([ops("Relu", x)])
    bounds = [ops.constant(np.asarray(b), hint="bound") if b is not None else None for b in (new_low, new_high)]
    return Rewrite([ops("Clip", x, *(bounds if bounds[1] is not None else bounds[:1]))])


@rule("clip(x, 0) => relu(x)", "Clip")
def clip_to_relu(node: oir.Node, ops: Ops) -> Outcome:
    """Name the Relu."""
    low, high = constant(input_or_none(node, 1)), input_or_none(node, 2)
    if low is None or low.any() or high is not None or not is_float(node.inputs[0]):
        return None
    return Rewrite([ops("Relu", node.inputs[0])])


@rule("where(constant, a, b) => a or b", "Where")
def constant_condition(node: oir.Node, ops: Ops) -> Outcome:
    """Take the operand that is always chosen, if it has the shape of the result."""
    condition = constant(node.inputs[0])
    if condition is None or condition.size == 0 or condition.any() != condition.all():
        return None
    chosen = node.inputs[1 if condition.any() else 2]
    if chosen is None or not same_shape(chosen, node.outputs[0]):
        return Miss("the operand that is always chosen is broadcast")
    return Rewrite([chosen])


@rule("where(!c, a, b) => where(c, b, a)", "Where")
def negated_condition(node: oir.Node, ops: Ops) -> Outcome:
    """Swap the operands in place of negating the condition."""
    negation = producer(node.inputs[0], "Not")
    if negation is None:
        return None
    return Rewrite([ops("Where", negation.inputs[0], node.inputs[2], node.inputs[1])])


@rule("gather(x, [k, k+1, ...]) => slice(x)", "Gather")
def gather_to_slice(node: oir.Node, ops: Ops) -> Outcome:
    """Slice where the indices are consecutive; the whole axis is the input itself."""
    x, indices = node.inputs[0], integers(node.inputs[1])
    array = constant(node.inputs[1])
    if x is None or indices is None or array is None or array.ndim != 1 or not indices:
        return None
    start, stop = indices[0], indices[-1] + 1
    if start < 0 <= indices[-1] or indices != tuple(range(start, stop)):
        return None
    axis = int_attribute(node, "axis", 0)
    if start == 0 and same_shape(x, node.outputs[0]):
        return Rewrite([x])
    end = stop if stop != 0 else np.iinfo(np.int64).max
    vectors = (ops.constant(np.array([n], np.int64), hint="slice") for n in (start, end, axis))
    return Rewrite([ops("Slice", x, *vectors)])


PASS = RewritePass(
    "algebra",
    [
        divide_by_power_of_two,
        reciprocal,
        square,
        negate,
        add_negated,
        clip_chain,
        clip_to_relu,
        constant_condition,
        negated_condition,
        gather_to_slice,
        *SLICE_RULES,
    ],
)
