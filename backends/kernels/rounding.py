"""Rounding to small integers, in fewer instructions.

What quantization clamps and rounds is a small integer. Dequantized in the same kernel it stays a float. Bytes are
rounded to int32 and narrowed with saturation, step by step, as the instructions that pack vectors do. Other integers
are the bits at the end of ``x + 1.5 * 2^23``, a sum that the processor rounds to an integer, half to even.
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
    dtype = str(x.ty.dtype)
    if dtype == "float32":
        return _returned(x)
    if dtype in ("int8", "uint8"):
        return _byte(x, dtype)
    value = _rounded(x)
    if value is None:
        return x
    low, high = _limits(value.args[0])
    if low is None or high is None or max(-low, high) > _LARGEST:
        return x
    bits = tirx.reinterpret("int32", value.args[0] + tirx.const(_MAGIC, "float32"))
    return bits - tirx.const(_MAGIC_BITS, "int32")


def narrowed(x: Any) -> tuple[Any, int] | None:
    """Take ``narrow(int(r) + z)`` apart for an ``r`` clamped such that ``r + z`` fills the narrow type, 8 bits.

    The result is an int32 expression and z: ``x`` is the sum, after the first one saturates to int16, with saturation.
    None: ``x`` is something else.
    """
    dtype = str(x.ty.dtype)
    if not isinstance(x, tirx.Cast) or dtype not in ("int8", "uint8"):
        return None
    rounded, plus = _sum(x.value)
    value, info = _rounded(rounded), np.iinfo(dtype)
    if value is None or _limits(value.args[0]) != (info.min - plus, info.max - plus):
        return None
    clamped = value.args[0]
    total, low, high = clamped.a.a, clamped.a.b, clamped.b
    if not _fits_int32(total):
        # The bounds keep the conversion to int32 defined, no more. A lower one of 0 would be a comparison and a mask.
        total = tirx.min(tirx.max(total, low - tirx.const(1, "float32")), high)
    return tirx.call_llvm_pure_intrin("int32", "llvm.lrint", total), plus


def _byte(x: Any, dtype: str) -> Any:
    """Return what ``narrowed`` takes apart with saturation step by step; else ``x``."""
    parts = narrowed(x)
    if parts is None:
        return x
    short, plus = _saturated(parts[0], "int32", "int16"), parts[1]
    if plus:
        short = tirx.call_llvm_pure_intrin("int16", "llvm.sadd.sat", short, tirx.const(plus, "int16"))
    return _saturated(short, "int16", dtype)


def _fits_int32(x: Any) -> bool:
    """Tell whether ``x`` is surely a number that int32 holds: an int32 times less than 1, or made of small integers."""
    if isinstance(x, tirx.Mul) and isinstance(x.a, tirx.Cast) and x.a.value.ty.dtype == "int32":
        low, high = (float(x.b.value),) * 2 if isinstance(x.b, tirx.FloatImm) else _limits(x.b)
        if low is not None and high is not None and -1 < low <= high < 1:
            return True
    return _magnitude(x) < 2.0**30


def _magnitude(x: Any) -> float:
    """Return a bound of the magnitude of ``x``, which is no NaN then; infinite if none is known."""
    if isinstance(x, tirx.FloatImm | tirx.IntImm):
        return abs(float(x.value))
    if isinstance(x, tirx.Cast):
        return min(_magnitude(x.value), _largest(str(x.ty.dtype)))
    if isinstance(x, tirx.Add | tirx.Sub):
        return _magnitude(x.a) + _magnitude(x.b)
    if isinstance(x, tirx.Mul):
        return _magnitude(x.a) * _magnitude(x.b)
    if isinstance(x, tirx.Div) and isinstance(x.b, tirx.FloatImm) and float(x.b.value):
        return _magnitude(x.a) / abs(float(x.b.value))
    low, high = _limits(x)
    if low is not None and high is not None:
        return max(-low, high)
    if isinstance(x, tvm.ir.Call) and str(x.op.name).endswith(".nearbyint"):
        return _magnitude(x.args[0]) + 1
    return _largest(str(x.ty.dtype))


def _largest(dtype: str) -> float:
    """Return the largest magnitude of a type, infinite for floats."""
    if not dtype.startswith(("int", "uint")):
        return float("inf")
    return 2.0 ** (int(tvm_ffi.dtype(dtype).bits) - int(dtype.startswith("int")))


def _saturated(x: Any, wide: str, narrow: str) -> Any:
    info = np.iinfo(narrow)
    low, high = (tirx.const(int(bound), wide) for bound in (info.min, info.max))
    return tirx.min(tirx.max(x, low), high).astype(narrow)


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
    return value if _fits(value, plus, dtype) else x


def _fits(value: Any, plus: int, dtype: str) -> bool:
    """Tell whether ``dtype`` holds the rounded ``value`` and ``plus``, whatever the value."""
    low, high = _limits(value.args[0])
    info = np.iinfo(dtype)
    return low is not None and high is not None and info.min <= low + plus and high + plus <= info.max


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
