"""Adapters for Upsample and Resize, whose coordinate conventions became attributes at opset 11."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from optc.frontend.upgrade import ALWAYS, Edit, Refused, until


def _known(value: oir.Value) -> np.ndarray | None:
    return value.const_value.numpy() if value.const_value is not None else None


@until(ALWAYS, "Upsample")
def upsample(edit: Edit) -> None:
    """Upsample-7 and 9 (deprecated at 10) -> Resize: asymmetric coordinates, nearest rounds down."""
    scales = edit.take("scales")
    if scales is not None:
        factors = edit.constant(np.asarray(scales.as_floats(), np.float32), "scales")
    else:
        factors = edit.input(1)
    edit.node.op_type = "Resize"
    edit.set_inputs(edit.input(0), None, factors)
    edit.set("coordinate_transformation_mode", "asymmetric")
    edit.set("nearest_mode", "floor")


@until(11, "Resize")
def resize_10(edit: Edit) -> None:
    """Resize-10 -> 11: asymmetric coordinates.

    Nearest rounds down along axes that grow and up along axes that shrink. That is two Resize nodes: the
    interpolation is separable, and each axis is changed by one of them and has scale 1 in the other.
    """
    data, scales = edit.input(0), edit.input(1)
    mode = edit.take("mode")
    mode_name = mode.as_string() if mode is not None else "nearest"
    edit.set("mode", mode_name)
    edit.set("coordinate_transformation_mode", "asymmetric")
    known = _known(scales)
    if mode_name != "nearest" or (known is not None and bool((known >= 1).all())):
        edit.set("nearest_mode", "floor")
    elif known is not None and bool((known <= 1).all()):
        edit.set("nearest_mode", "ceil")
    else:
        one = edit.constant(np.asarray(1, np.float32), "one")
        data = edit.op(
            "Resize",
            data,
            None,
            edit.op("Max", scales, one),
            mode=mode_name,
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )
        scales = edit.op("Min", scales, one)
        edit.set("nearest_mode", "ceil")
    edit.set_inputs(data, None, scales)


@until(13, "Resize")
def resize_11(edit: Edit) -> None:
    """Resize-11 -> 13: ``tf_half_pixel_for_nn`` was removed.

    It is (i + 0.5) / scale, half_pixel is the same minus 0.5: floor of the former is round_prefer_ceil of
    the latter.
    """
    attributes = edit.node.attributes
    if attributes.get_string("coordinate_transformation_mode", "half_pixel") != "tf_half_pixel_for_nn":
        return
    if attributes.get_string("mode", "nearest") != "nearest":
        raise Refused("coordinate_transformation_mode 'tf_half_pixel_for_nn' is for mode 'nearest' only")
    if attributes.get_string("nearest_mode", "round_prefer_floor") != "floor":
        raise Refused("coordinate_transformation_mode 'tf_half_pixel_for_nn' needs nearest_mode 'floor'")
    edit.set("coordinate_transformation_mode", "half_pixel")
    edit.set("nearest_mode", "round_prefer_ceil")


@until(ALWAYS, "Resize")
def empty_inputs(edit: Edit) -> None:
    """Resize of any version: an empty roi, scales or sizes means that it is absent, as opset 11 wrote it."""
    inputs = list(edit.node.inputs)
    for index, value in enumerate(inputs):
        if index and value is not None and (known := value.const_value) is not None and known.size == 0:
            inputs[index] = None
    edit.set_inputs(*inputs)


@until(16, "RoiAlign")
def roi_align(edit: Edit) -> None:
    """RoiAlign-10 -> 16: coordinates were not shifted by half a pixel, which became an attribute."""
    edit.set("coordinate_transformation_mode", "output_half_pixel")


@until(20, "GridSample")
def grid_sample(edit: Edit) -> None:
    """GridSample-16 -> 20: interpolation modes were renamed."""
    mode = edit.node.attributes.get_string("mode", "bilinear")
    assert mode is not None
    edit.set("mode", {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode))
