"""Operators of com.microsoft that move data, older spellings of operators that ONNX has by now."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as oir

from optc.frontend.contrib_node import ContribEdit
from optc.frontend.upgrade import Refused

_MODES = {"bilinear": "linear", "nearest": "nearest", "bicubic": "cubic"}


def expand_dims(edit: ContribEdit) -> None:
    """ExpandDims => Unsqueeze."""
    axis = edit.op("Cast", edit.input(1), to=oir.DataType.INT64.value)
    edit.replace(edit.op("Unsqueeze", edit.input(0), edit.op("Reshape", axis, edit.ints([1], "shape"))))


def gather_nd(edit: ContribEdit) -> None:
    """GatherND => GatherND, whose indices are int64."""
    indices = edit.op("Cast", edit.input(1), to=oir.DataType.INT64.value)
    edit.replace(edit.op("GatherND", edit.input(0), indices))


def grid_sample(edit: ContribEdit) -> None:
    """GridSample => GridSample, whose modes have other names."""
    mode = edit.text("mode", "bilinear")
    if mode not in _MODES:
        raise Refused(f"mode {mode} is not supported")
    kept = edit.kept("align_corners", "padding_mode")
    edit.replace(edit.op("GridSample", edit.input(0), edit.input(1), mode=_MODES[mode], **kept))


def pad(edit: ContribEdit) -> None:
    """Pad => Pad; its pads may have two dimensions and its value one."""
    pads = edit.op("Reshape", edit.input(1), edit.ints([-1], "shape"))
    value = edit.optional(2)
    inputs = [edit.input(0), pads, *([_scalar(edit, value)] if value is not None else [])]
    edit.replace(edit.op("Pad", *inputs, **edit.kept("mode")))


def sequence(edit: ContribEdit) -> None:
    """Range => Range; its inputs may be vectors of one number, and the step is 1 unless given."""
    start, limit, step = edit.input(0), edit.input(1), edit.optional(2)
    given = edit.scalar(1, start) if step is None else _scalar(edit, step)
    edit.replace(edit.op("Range", _scalar(edit, start), _scalar(edit, limit), given))


def _scalar(edit: ContribEdit, x: oir.Value) -> oir.Value:
    return edit.op("Reshape", x, edit.constant(np.zeros(0, np.int64), "shape"))


def trilu(edit: ContribEdit) -> None:
    """Trilu => Trilu."""
    edit.replace(edit.op("Trilu", *edit.node.inputs, **edit.kept("upper")))


def unique(edit: ContribEdit) -> None:
    """Unique => Unique in the order of the input, without the first places."""
    y, _, index, counts = edit.insert("Unique", [edit.input(0)], 4, {"sorted": 0})
    edit.finish(y, index, counts)


OPERATORS: dict[str, Callable[[ContribEdit], None]] = {
    "ExpandDims": expand_dims,
    "GatherND": gather_nd,
    "GridSample": grid_sample,
    "Pad": pad,
    "Range": sequence,
    "Trilu": trilu,
    "Unique": unique,
}
"""How each operator is expanded, by its name."""
