"""Slices and concatenations of each other."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from optc.passes.match import input_or_none, int_attribute, integers, producer, used_once
from optc.passes.rewrite import Miss, Ops, Outcome, Rewrite, rule


def _parameters(node: oir.Node, rank: int) -> dict[int, tuple[int, int, int]] | None:
    """Return ``{axis: (start, end, step)}`` of a Slice whose parameters are constant."""
    starts, ends = integers(node.inputs[1]), integers(node.inputs[2])
    axes, steps = input_or_none(node, 3), input_or_none(node, 4)
    if starts is None or ends is None:
        return None
    chosen = integers(axes) if axes is not None else tuple(range(len(starts)))
    strides = integers(steps) if steps is not None else (1,) * len(starts)
    if chosen is None or strides is None:
        return None
    return {axis % rank: part for axis, *part in zip(chosen, starts, ends, strides, strict=True)}  # type: ignore[misc]


@rule("slice(slice(x)) of other axes => slice(x)", "Slice")
def merge_slices(node: oir.Node, ops: Ops) -> Outcome:
    """Cut along several axes at once."""
    inner = producer(node.inputs[0], "Slice")
    if inner is None or inner.inputs[0] is None or node.outputs[0].shape is None:
        return None
    rank = len(node.outputs[0].shape)
    first, second = _parameters(inner, rank), _parameters(node, rank)
    if first is None or second is None:
        return None
    if first.keys() & second.keys():
        return Miss("both slices cut the same axis")
    if not used_once(inner.outputs[0]):
        return Miss("the inner result is needed elsewhere too")
    merged = {**first, **second}
    columns = [list(merged), *([part[i] for part in merged.values()] for i in range(3))]
    axes, starts, ends, steps = (ops.constant(np.array(c, np.int64), hint="slice") for c in columns)
    return Rewrite([ops("Slice", inner.inputs[0], starts, ends, axes, steps)])


@rule("concat(concat(a, b), c) => concat(a, b, c)", "Concat")
def flatten_concat(node: oir.Node, ops: Ops) -> Outcome:
    """Copy every operand once."""
    shape = node.outputs[0].shape
    if shape is None:
        return None
    axis = int_attribute(node, "axis", 0) % len(shape)
    inputs: list[oir.Value | None] = []
    for value in node.inputs:
        inner = producer(value, "Concat")
        if (
            inner is not None
            and value is not None
            and used_once(value)
            and int_attribute(inner, "axis", 0) % len(shape) == axis
        ):
            inputs.extend(inner.inputs)
        else:
            inputs.append(value)
    return Rewrite([ops("Concat", *inputs, axis=axis)]) if len(inputs) > len(node.inputs) else None


SLICE_RULES = (merge_slices, flatten_concat)
