"""Reading an image at fractional positions: borders, reflection, filter taps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx

from optc.backends.kernels.interpolation import clamp, cubic_weight, linear_weight, real
from optc.backends.kernels.loops import index as as_index


def reflect(x: Any, low: Any, high: Any) -> Any:
    """Mirror a float32 coordinate at ``low`` and ``high`` until it is between them."""
    span = high - low
    safe = tirx.Select(span == real(0), real(1), span)
    below = x < low
    distance = tirx.Select(below, low - x, x - high)
    turns = tirx.floor(distance / safe)
    rest = distance - turns * safe
    even = tirx.floor(turns / real(2)) * real(2) == turns
    from_low = tirx.Select(below, even, tirx.Not(even))
    mirrored = tirx.Select(from_low, low + rest, high - rest)
    inside = tirx.all(x >= low, x <= high)
    return tirx.Select(inside, x, tirx.Select(span == real(0), low, mirrored))


def borders(size: Any, align_corners: bool) -> tuple[Any, Any]:
    """Return where an axis of ``size`` pixels begins and ends."""
    last = (as_index(size) - 1).astype("float32")
    return (real(0), last) if align_corners else (real(-0.5), last + real(0.5))


def pixel(position: Any, size: Any, padding: str, align_corners: bool) -> tuple[Any, Any]:
    """Return a legal index for integer ``position``, and the condition under which it counts (None: always)."""
    if padding == "zeros":
        return clamp(position, size), tirx.all(position >= 0, position < as_index(size))
    if padding == "reflection":
        mirrored = reflect(position.astype("float32"), *borders(size, align_corners))
        position = mirrored.astype("int64")
    return clamp(position, size), None


def tap(x: Any, k: Any, kind: str) -> tuple[Any, Any]:
    """Return integer position and weight of tap ``k`` around coordinate ``x``: 2 taps for linear, 4 for cubic."""
    first = tirx.floor(x).astype("int64") - (0 if kind == "linear" else 1)
    position = first + k
    distance = position.astype("float32") - x
    return position, linear_weight(distance) if kind == "linear" else cubic_weight(distance, -0.75)


def gather(
    a: Any,
    lead: Sequence[Any],
    taps: Sequence[tuple[Any, Any]],
    sizes: Sequence[Any],
    padding: str,
    align_corners: bool,
    dtype: str,
) -> Any:
    """Return the weighted element of ``a`` at one combination of taps, ``(position, weight)`` an axis."""
    where, checks, weight = [], [], real(1)
    for (position, w), size in zip(taps, sizes, strict=True):
        at, condition = pixel(position, size, padding, align_corners)
        where.append(at)
        weight = weight * w
        checks += [] if condition is None else [condition]
    value = a(*lead, *where).astype(dtype) * weight.astype(dtype)
    return tirx.if_then_else(tirx.all(*checks), value, tirx.const(0, dtype)) if checks else value
