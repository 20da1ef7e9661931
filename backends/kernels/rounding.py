"""Rounding to small integers, in fewer instructions.

What quantization clamps and rounds is a small integer. Dequantized in the same kernel it stays a float; else its bits
are those at the end of ``x + 1.5 * 2^23``, a sum that the processor rounds to an integer, half to even.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import tirx

_MAGIC = 1.5 * 2.0**23
_MAGIC_BITS = 0x4B400000
_LARGEST = 1 << 22


def simplify(expression: Any) -> Any:
    """Return ``expression``, equal bit by bit, with cheaper conversions of rounded numbers."""
    return tvm_ffi.structural_map(expression, [(tirx.Cast, _cast)], order="pre")


def _cast(x: Any) -> Any:
    if x.ty.dtype == "float32":
        return _returned(x)
    value = _rounded(x)
    if value is None:
        return x
    low, high = _limits(value.args[0])
    if low is None or high is None or max(-low, high) > _LARGEST:
        return x
    bits = tirx.reinterpret("int32", value.args[0] + tirx.const(_MAGIC, "float32"))
    return bits - tirx.const(_MAGIC_BITS, "int32")


def _returned(x: Any) -> Any:
    """Return ``r`` for ``float(int(narrow(int(r) + z)) - z)`` where the narrow type holds ``r + z``; else ``x``."""
    inner, minus = _sum(x.value)
    if not isinstance(inner, tirx.Cast) or not isinstance(inner.value, tirx.Cast):
        return x
    narrow = inner.value
    rounded, plus = _sum(narrow.value)
    value = _rounded(rounded)
    dtype = str(narrow.ty.dtype)
    if value is None or plus + minus or dtype not in ("int8", "uint8", "int16", "uint16"):
        return x
    low, high = _limits(value.args[0])
    info = np.iinfo(dtype)
    fits = low is not None and high is not None and info.min <= low + plus and high + plus <= info.max
    return value if fits else x


def _sum(x: Any) -> tuple[Any, int]:
    """Take a constant off a sum."""
    if isinstance(x, tirx.Add | tirx.Sub) and isinstance(x.b, tirx.IntImm):
        return x.a, int(x.b.value) * (1 if isinstance(x, tirx.Add) else -1)
    return x, 0


def _rounded(x: Any) -> Any:
    """Return the call of ``nearbyint`` in float32 that ``x`` converts to int32, or None."""
    if not isinstance(x, tirx.Cast) or x.ty.dtype != "int32" or not isinstance(x.value, tvm.ir.Call):
        return None
    call = x.value
    return call if str(call.op.name).endswith(".nearbyint") and call.ty.dtype == "float32" else None


def _limits(x: Any) -> tuple[float | None, float | None]:
    """Return bounds of ``min(max(value, low), high)`` with constants, None for none. NaN counts as a bound."""
    if not isinstance(x, tirx.Min) or not isinstance(x.b, tirx.FloatImm):
        return None, None
    if not isinstance(x.a, tirx.Max) or not isinstance(x.a.b, tirx.FloatImm):
        return None, None
    low, high = float(x.a.b.value), float(x.b.value)
    return min(low, high), high
