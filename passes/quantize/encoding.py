"""How numbers are written as integers: ``x`` stands for ``(round(x / scale) + zero, saturated)``."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

DTYPES = {
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "int16": np.dtype(np.int16),
    "uint16": np.dtype(np.uint16),
    "int4": np.dtype(ml_dtypes.int4),
    "uint4": np.dtype(ml_dtypes.uint4),
}


def limits(dtype: str) -> tuple[int, int]:
    """Return the least and the largest integer of a type."""
    bits = int(dtype.lstrip("uint"))
    return (0, (1 << bits) - 1) if dtype.startswith("u") else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)


@dataclass(frozen=True)
class Encoding:
    """One scale and zero point for a whole tensor."""

    scale: float
    zero: int
    dtype: str

    def round(self, x: np.ndarray) -> np.ndarray:
        """Return what is left of float32 ``x`` after QuantizeLinear and DequantizeLinear, as float32."""
        low, high = limits(self.dtype)
        scale = np.float32(self.scale)
        steps = np.clip(np.rint(x / scale), low - self.zero, high - self.zero)
        return np.asarray(steps * scale, np.float32)


def encode(low: float, high: float, dtype: str, *, symmetric: bool) -> Encoding:
    """Return the encoding whose range is that from ``low`` to ``high``, widened to hold 0 exactly.

    Symmetric encodings have the zero point in the middle of the type; -128 of int8 stays unused. A range that is
    empty has the scale 1.
    """
    least, largest = limits(dtype)
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        zero = (least + largest + 1) // 2
        scale = max(-low, high) / (largest - zero)
    else:
        scale = (high - low) / (largest - least)
        zero = 0
    scale = float(np.float32(scale))
    if scale < float(np.finfo(np.float32).tiny):
        return Encoding(1.0, (least + largest + 1) // 2 if symmetric else max(least, 0), dtype)
    if not symmetric:
        zero = int(np.clip(round(least - low / scale), least, largest))
    return Encoding(scale, zero, dtype)
