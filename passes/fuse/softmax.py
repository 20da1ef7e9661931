"""Softmax and LogSoftmax spelled with Exp, Max, Sum and Log, and transposes around them."""

from __future__ import annotations

import onnx_ir as oir

from optc.passes.fuse.pattern import (
    integer,
    integers,
    is_float,
    leak,
    reduced_axes,
    same_dim,
    same_shape,
)
from optc.passes.match import commuted, producer
from optc.passes.rewrite import Miss, Ops, Outcome, Rewrite, RewritePass, rule


def _one_axis(node: oir.Node) -> int | None:
    """Return the only axis of a Reduce node that keeps its dimensions."""
    axes = reduced_axes(node)
    return axes[0] if axes is not None and len(axes) == 1 and integer(node, "keepdims", 1) else None


def _unshifted(value: oir.Value, axis: int) -> oir.Value:
    """Return ``x`` if ``value`` is ``x - ReduceMax(x, axis)``, else ``value``: a shift changes nothing."""
    node = producer(value, "Sub")
    peak = producer(node.inputs[1], "ReduceMax") if node is not None else None
    if node is None or peak is None or node.inputs[0] is None:
        return value
    return node.inputs[0] if peak.inputs[0] is node.inputs[0] and _one_axis(peak) == axis else value


@rule("Exp(x)/Sum(Exp(x)) => Softmax(x)", "Div", "Mul")
def softmax(node: oir.Node, ops: Ops) -> Outcome:
    """Fuse a softmax over one axis, with or without the subtraction of the maximum."""
    for power, other in commuted(node) if node.op_type == "Mul" else (tuple(node.inputs),):
        if node.op_type == "Mul":
            reciprocal = producer(other, "Reciprocal")
            other = reciprocal.inputs[0] if reciprocal is not None else None
        exponential, total = producer(power, "Exp"), producer(other, "ReduceSum")
        if exponential is None or total is None or total.inputs[0] is not power:
            continue
        if not is_float(power) or exponential.inputs[0] is None:
            return None
        axis = _one_axis(total)
        if axis is None:
            return Miss(f"the sum is not over one known axis with keepdims=1: {reduced_axes(total)}")
        x = _unshifted(exponential.inputs[0], axis)
        if (reason := leak(node, x)) is not None:
            return Miss(reason)
        return Rewrite([ops("Softmax", x, axis=axis)])
    return None


@rule("Log(Softmax(x)) => LogSoftmax(x)", "Log")
def log_of_softmax(node: oir.Node, ops: Ops) -> Outcome:
    """Fuse the logarithm, which also keeps it finite where the probability underflows."""
    inner = producer(node.inputs[0], "Softmax")
    if inner is None or inner.inputs[0] is None:
        return None
    if (reason := leak(node, inner.inputs[0])) is not None:
        return Miss(reason)
    return Rewrite([ops("LogSoftmax", inner.inputs[0], axis=integer(inner, "axis", -1))])


@rule("x-Log(Sum(Exp(x))) => LogSoftmax(x)", "Sub")
def log_softmax(node: oir.Node, ops: Ops) -> Outcome:
    """Fuse log-sum-exp subtracted from its own argument."""
    z = node.inputs[0]
    whole, logarithm = producer(node.inputs[1], "ReduceLogSumExp"), producer(node.inputs[1], "Log")
    if logarithm is not None:
        whole = producer(logarithm.inputs[0], "ReduceSum")
        power = producer(whole.inputs[0], "Exp") if whole is not None else None
        argument = power.inputs[0] if power is not None else None
    else:
        argument = whole.inputs[0] if whole is not None else None
    if whole is None or argument is None or argument is not z or not is_float(z):
        return None
    axis = _one_axis(whole)
    if axis is None:
        return Miss(f"the sum is not over one known axis with keepdims=1: {reduced_axes(whole)}")
    x = _unshifted(z, axis)
    if (reason := leak(node, x)) is not None:
        return Miss(reason)
    return Rewrite([ops("LogSoftmax", x, axis=axis)])


@rule("Transpose(Softmax(Transpose(x))) => Softmax(x)", "Transpose")
def transposed_softmax(node: oir.Node, ops: Ops) -> Outcome:
    """Cancel two inverse transposes around Softmax or LogSoftmax by moving its axis."""
    inner = producer(node.inputs[0], "Softmax", "LogSoftmax")
    first = producer(inner.inputs[0], "Transpose") if inner is not None else None
    if inner is None or first is None or first.inputs[0] is None:
        return None
    x, before, after = first.inputs[0], integers(first, "perm"), integers(node, "perm")
    if [before[i] for i in after] != list(range(len(before))):
        return Miss(f"perm {list(after)} does not undo perm {list(before)}")
    if (reason := leak(node, x)) is not None:
        return Miss(reason)
    return Rewrite([ops(inner.op_type, x, axis=before[integer(inner, "axis", -1)])])


@rule("Reshape(Softmax(Flatten(x))) => Softmax(x)", "Reshape")
def flattened_softmax(node: oir.Node, ops: Ops) -> Outcome:
    """Drop the flattening to a matrix that the Softmax of opset 12 implied, where it keeps the last dimension."""
    inner = producer(node.inputs[0], "Softmax", "LogSoftmax")
    flat = producer(inner.inputs[0], "Flatten", "Reshape") if inner is not None else None
    x = flat.inputs[0] if flat is not None else None
    if inner is None or flat is None or x is None or x.shape is None or len(x.shape) == 0:
        return None
    matrix = flat.outputs[0].shape
    if matrix is None or integer(inner, "axis", -1) not in (-1, len(matrix) - 1):
        return None
    if not same_dim(matrix[-1], x.shape[-1]) or not same_shape(node.outputs[0], x):
        return Miss(f"{x.shape} is flattened to {matrix} and reshaped to {node.outputs[0].shape}")
    if (reason := leak(node, x, node.inputs[1], *flat.inputs[1:])) is not None:
        return Miss(reason)
    return Rewrite([ops(inner.op_type, x, axis=len(x.shape) - 1)])


def softmax_pass() -> RewritePass:
    """Return the pass that recognises softmax variants."""
    return RewritePass("fuse-softmax", [softmax, flattened_softmax, log_softmax, log_of_softmax, transposed_softmax])
