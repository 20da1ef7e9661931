"""Interpolation along one axis: a table of positions and weights, then a gather. ONNX Resize-19 semantics.

All coordinate arithmetic is float32. With ``x`` the coordinate of an output position in the input, an even number
``n`` of taps starts at ``ceil(x) - n / 2``: a point on a pixel belongs to the interval on its left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import te, tirx

from optc.backends.kernels.loops import index as as_index


def real(value: float) -> Any:
    """Return a float32 immediate."""
    return tirx.const(value, "float32")


@dataclass(frozen=True)
class Mapping:
    """How output positions of one axis map to the input. ``size`` and ``out`` are the extents.

    ``exact`` tells that the scale is ``out / size``: then no rounded scale moves a coordinate off a pixel's edge.
    """

    mode: str
    size: Any
    out: Any
    exact: bool

    def coordinate(self, i: Any, scale: Any, start: Any = None, end: Any = None) -> Any:
        """Return the input coordinate of output position ``i`` (integers in, float32 out)."""
        x, n = i.astype("float32"), as_index(self.size).astype("float32")
        width = scale * n
        one = width == real(1)
        if self.mode == "align_corners":
            step = x * (n - real(1)) / tirx.Select(one, real(1), width - real(1))
            return tirx.Select(one, real(0), step)
        if self.mode == "asymmetric":
            return self._shrink(x, scale)
        if self.mode == "tf_crop_and_resize":
            span = (end - start) * (n - real(1))
            step = x * span / tirx.Select(one, real(1), width - real(1))
            return tirx.Select(one, span / real(2), step) + start * (n - real(1))
        half = self._shrink(x + real(0.5), scale) - real(0.5)
        if self.mode == "pytorch_half_pixel":
            return tirx.Select(one, real(-0.5), half)
        if self.mode == "half_pixel_symmetric":
            adjustment = as_index(self.out).astype("float32") / width
            return n / real(2) * (real(1) - adjustment) + half
        return half

    def _shrink(self, x: Any, scale: Any) -> Any:
        if not self.exact:
            return x / scale
        return x * as_index(self.size).astype("float32") / as_index(self.out).astype("float32")


def nearest(x: Any, rounding: str) -> Any:
    """Return the index of the pixel that coordinate ``x`` takes."""
    if rounding == "floor":
        result = tirx.floor(x)
    elif rounding == "ceil":
        result = tirx.ceil(x)
    elif rounding == "round_prefer_ceil":
        result = tirx.floor(x + real(0.5))
    else:
        result = tirx.ceil(x - real(0.5))
    return result.astype("int64")


def clamp(position: Any, size: Any) -> Any:
    """Return ``position`` clamped into ``[0, size)``."""
    return tirx.max(tirx.min(position, as_index(size) - 1), as_index(0))


def linear_weight(distance: Any) -> Any:
    """Return the triangle filter at ``distance``."""
    return tirx.max(real(1) - tirx.abs(distance), real(0))


def cubic_weight(distance: Any, a: float) -> Any:
    """Return Keys' cubic filter with parameter ``a`` at ``distance``."""
    x = tirx.abs(distance)
    near = ((real(a + 2) * x - real(a + 3)) * x) * x + real(1)
    far = ((real(a) * x - real(5 * a)) * x + real(8 * a)) * x - real(4 * a)
    return tirx.Select(x <= real(1), near, tirx.Select(x < real(2), far, real(0)))


def tables(
    coordinate: Any, out: Any, size: Any, taps: Any, kind: str, *, a: float, shrink: Any, exclude: bool
) -> tuple[Any, Any]:
    """Return tensors of clamped indices (int64) and weights (float32), both ``[out, taps]``.

    ``shrink`` scales the filter for antialiasing (1 without); weights are normalized where that can matter.
    """

    def first(x: Any) -> Any:
        return tirx.ceil(x).astype("int64") - as_index(taps) // 2

    def weight(o: Any, t: Any) -> Any:
        x = coordinate(o)
        position = first(x) + t
        distance = position.astype("float32") - x
        if shrink is not None:
            distance = distance * shrink
        value = linear_weight(distance) if kind == "linear" else cubic_weight(distance, a)
        if exclude:
            inside = tirx.all(position >= 0, position < as_index(size))
            value = tirx.Select(inside, value, real(0))
        return value

    index = te.compute((out, taps), lambda o, t: clamp(first(coordinate(o)) + t, size), "indices")
    raw = te.compute((out, taps), weight, "weights")
    if shrink is None and not exclude:
        return index, raw
    t = te.reduce_axis((0, taps), "t")
    total = te.compute((out,), lambda o: te.sum(raw(o, t), axis=t), "total")

    def normalized(o: Any, t: Any) -> Any:
        return raw(o, t) / tirx.Select(total(o) == real(0), real(1), total(o))

    return index, te.compute((out, taps), normalized, "normalized")
