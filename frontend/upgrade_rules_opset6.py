"""Adapters from opset 6 to 7: explicit broadcasting became NumPy's, and test modes went away."""

from __future__ import annotations

import numpy as np

from optc.frontend.upgrade import Edit, Refused, until

BROADCASTING = ("Add", "And", "Div", "Equal", "Greater", "Less", "Mul", "Or", "Pow", "Sub", "Xor")


@until(7, *BROADCASTING)
def broadcast(edit: Edit) -> None:
    """Binary operators -> 7: ``axis`` says where the second shape starts in the first one."""
    enabled, axis = edit.take("broadcast"), edit.take("axis")
    if enabled is None or enabled.as_int() == 0 or axis is None:
        return
    left, right = edit.rank(0), edit.rank(1)
    start = axis.as_int() + left if axis.as_int() < 0 else axis.as_int()
    _append_axes(edit, left - start - right)


@until(7, "PRelu")
def prelu(edit: Edit) -> None:
    """PRelu-6 -> 7: a vector of slopes belongs to the channels, axis 1."""
    shape = edit.input(1).shape
    if edit.rank(1) == 1 and shape is not None and shape[0] != 1:
        _append_axes(edit, edit.rank(0) - 2)


def _append_axes(edit: Edit, count: int) -> None:
    if count > 0:
        rank = edit.rank(1)
        axes = edit.ints(range(rank, rank + count), "axes")
        edit.set_inputs(edit.input(0), edit.op("Unsqueeze", edit.input(1), axes))


@until(7, "Gemm")
def gemm(edit: Edit) -> None:
    """Gemm-6 -> 7: the third operand always broadcasts."""
    edit.take("broadcast")


@until(7, "BatchNormalization")
def batch_normalization(edit: Edit) -> None:
    """BatchNormalization-6 -> 7: the number of outputs alone tells test mode from training."""
    edit.take("is_test")


@until(7, "Dropout")
def dropout(edit: Edit) -> None:
    """Dropout-6 -> 7: test mode only."""
    test = edit.take("is_test")
    if test is None or test.as_int() == 0:
        raise Refused("is_test is 0, so that it drops values at random")


@until(7, "GRU", "LSTM", "RNN")
def recurrent(edit: Edit) -> None:
    """GRU-3, LSTM-1, RNN-1 -> 7: whether there is a sequence of outputs is told by the first output."""
    edit.take("output_sequence")


@until(7, "Upsample")
def upsample(edit: Edit) -> None:
    """Upsample-1 -> 7: one factor per dimension; ``bilinear`` was renamed."""
    height, width = edit.take("height_scale"), edit.take("width_scale")
    assert height is not None
    assert width is not None
    edit.set("scales", np.asarray([1, 1, height.as_float(), width.as_float()], np.float32).tolist())
    if edit.node.attributes.get_string("mode", "nearest") == "bilinear":
        edit.set("mode", "linear")
