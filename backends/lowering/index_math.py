"""Integer arithmetic on sizes and positions that are Python ints or int64 expressions; ints stay ints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tvm_ffi
from tvm import tirx

from optc.backends.lowering.emit import as_index, plain


def known(*values: Any) -> bool:
    """Tell whether all ``values`` are numbers."""
    return all(isinstance(v, int) for v in values)


def maximum(a: Any, b: Any) -> Any:
    """The larger value."""
    return max(a, b) if known(a, b) else tirx.max(as_index(a), as_index(b))


def minimum(a: Any, b: Any) -> Any:
    """The smaller value."""
    return min(a, b) if known(a, b) else tirx.min(as_index(a), as_index(b))


def clamp(value: Any, low: Any, high: Any) -> Any:
    """``value`` limited to ``low .. high``; ``low`` wins if the limits cross."""
    return maximum(minimum(value, high), low)


def less(a: Any, b: Any) -> Any:
    """``a < b`` as a bool or a condition."""
    return a < b if known(a, b) else as_index(a) < as_index(b)


def select(condition: Any, a: Any, b: Any) -> Any:
    """``a`` if ``condition`` else ``b``; both are evaluated."""
    if isinstance(condition, bool):
        return a if condition else b
    if known(a, b) and a == b:
        return a
    return tirx.Select(condition, as_index(a), as_index(b))


def floor_div(a: Any, b: Any) -> Any:
    """``a / b`` rounded down."""
    if known(a, b):
        return a // b
    return a if known(b) and b == 1 else plain(tirx.floordiv(as_index(a), as_index(b)))


def floor_mod(a: Any, b: Any) -> Any:
    """``a`` modulo ``b``, with the sign of ``b``."""
    if known(b) and b == 1:
        return 0
    return a % b if known(a, b) else plain(tirx.floormod(as_index(a), as_index(b)))


def ceil_div(a: Any, b: Any) -> Any:
    """``a / b`` rounded up, for ``b > 0``."""
    return floor_div(a + b - 1, b)


def product(values: Sequence[Any]) -> Any:
    """The product; 1 for none. A zero among the values makes it 0."""
    if any(known(v) and v == 0 for v in values):
        return 0
    number = math.prod(v for v in values if known(v))
    result: Any = None
    for value in values:
        if not known(value):
            result = value if result is None else result * value
    if result is None:
        return number
    return result if number == 1 else result * number


def quotient(dims: Sequence[Any], divisors: Sequence[Any]) -> Any:
    """``product(dims) / product(divisors)`` with common factors cancelled; it is known to have no remainder."""
    above = [d for d in dims if not known(d)]
    below = []
    for divisor in divisors:
        if known(divisor):
            continue
        match = next((i for i, d in enumerate(above) if tvm_ffi.structural_equal(d, divisor)), None)
        if match is None:
            below.append(divisor)
        else:
            above.pop(match)
    number = math.prod(d for d in dims if known(d))
    by = math.prod(d for d in divisors if known(d))
    if by == 0:
        return 0
    common = math.gcd(number, by) or 1
    top, bottom = product([*above, number // common]), product([*below, by // common])
    return floor_div(top, bottom)


def wrap_negative(index: Any, size: Any) -> Any:
    """Return a position that may count from the end, as one from the front, and never outside of ``0 .. size-1``.

    A position outside of the tensor is an error in ONNX; here it cannot be one, and must not read foreign memory.
    """
    index = index if isinstance(index, int) else as_index(index)
    wrapped = select(less(index, 0), index + size, index)
    return maximum(minimum(wrapped, size - 1), 0)


def strides(shape: Sequence[Any]) -> list[Any]:
    """Return the distance between neighbours along each axis of a dense tensor."""
    return [product(shape[axis + 1 :]) for axis in range(len(shape))]


def flatten(index: Sequence[Any], shape: Sequence[Any]) -> Any:
    """Return the position of ``index`` in the elements of a dense tensor of ``shape``."""
    position: Any = 0
    for i, extent in zip(index, shape, strict=True):
        position = position * extent + i
    return position


def axis_of(axis: int, rank: int) -> int:
    """Return a non-negative axis."""
    return axis + rank if axis < 0 else axis
