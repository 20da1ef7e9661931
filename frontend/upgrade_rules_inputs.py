"""Adapters for operators whose attributes became inputs."""

from __future__ import annotations

import numpy as np

from optc.frontend.upgrade import Edit, until

_REDUCTIONS_18 = (
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSumSquare",
)


@until(11, "Clip")
def clip(edit: Edit) -> None:
    """Clip-6 -> 11: min and max become inputs; both defaults are the limits of the type, as before."""
    data = edit.input(0)
    low, high = edit.take("min"), edit.take("max")
    edit.set_inputs(
        data,
        edit.scalar_like(low.as_float(), data, "min") if low is not None else None,
        edit.scalar_like(high.as_float(), data, "max") if high is not None else None,
    )


@until(12, "Dropout")
def dropout(edit: Edit) -> None:
    """Dropout-7 and 10 -> 12: inference only, so the ratio has no effect; before 10 the mask was a float."""
    edit.take("ratio")
    if edit.version >= 10 or len(edit.node.outputs) < 2:
        return
    data = edit.input(0)
    output, mask = edit.insert("Dropout", [data], 2, {})
    edit.replace(output, edit.op("CastLike", mask, data))


@until(11, "Pad")
def pad(edit: Edit) -> None:
    """Pad-2 -> 11: pads and value become inputs."""
    data = edit.input(0)
    pads, value = edit.take_ints("pads"), edit.take("value")
    number = value.as_float() if value is not None else 0.0
    fill = edit.scalar_like(number, data, "value") if number != 0.0 else None
    edit.set_inputs(data, edit.ints(pads or [], "pads"), fill)


@until(10, "Slice")
def slice_(edit: Edit) -> None:
    """Slice-1 -> 10: starts, ends and axes become inputs."""
    starts, ends, axes = (edit.take_ints(name) for name in ("starts", "ends", "axes"))
    edit.set_inputs(
        edit.input(0),
        edit.ints(starts or [], "starts"),
        edit.ints(ends or [], "ends"),
        edit.ints(axes, "axes") if axes is not None else None,
    )


@until(13, "Squeeze", "Unsqueeze", "ReduceSum")
@until(18, *_REDUCTIONS_18)
def axes_input(edit: Edit) -> None:
    """Squeeze, Unsqueeze and ReduceSum -> 13, other reductions -> 18: axes become an input."""
    axes = edit.take_ints("axes")
    if axes is not None:
        edit.set_inputs(edit.input(0), edit.ints(axes, "axes"))


@until(13, "Split")
def split_13(edit: Edit) -> None:
    """Split-2 and 11 -> 13: the sizes become an input."""
    sizes = edit.take_ints("split")
    if sizes is not None:
        edit.set_inputs(edit.input(0), edit.ints(sizes, "split"))


@until(18, "Split")
def split_18(edit: Edit) -> None:
    """Split-13 -> 18: without sizes, the number of parts is stated."""
    if len(edit.node.inputs) < 2 or edit.node.inputs[1] is None:
        edit.set("num_outputs", len(edit.node.outputs))


@until(10, "TopK")
def top_k(edit: Edit) -> None:
    """TopK-1 -> 10: k becomes an input."""
    k = edit.take("k")
    edit.set_inputs(edit.input(0), edit.ints([k.as_int() if k is not None else 1], "k"))


@until(20, "DFT")
def dft(edit: Edit) -> None:
    """DFT-17 -> 20: the axis becomes an input, and its default changes from 1 to -2."""
    axis = edit.take("axis")
    length = edit.node.inputs[1] if len(edit.node.inputs) > 1 else None
    number = np.asarray(axis.as_int() if axis is not None else 1, np.int64)
    edit.set_inputs(edit.input(0), length, edit.constant(number, "axis"))
