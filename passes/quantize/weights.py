"""Weights as integers: rounded to nearest, with a scale for each output channel, or for each block of the depth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BIAS_LIMIT = 2.0**31 - 2
"""The largest integer of a bias, which is added to a sum in int32."""


@dataclass(frozen=True)
class Integers:
    """``(values - zero) * scale``; scale and zero have the rank of ``values`` where there are blocks along ``axis``."""

    values: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None
    axis: int
    block: int = 0

    def dequantized(self) -> np.ndarray:
        """Return the float32 numbers that the integers stand for."""
        values, scale, zero = self.values.astype(np.float32), self.scale, self.zero
        if self.block:
            size = self.values.shape[self.axis]
            scale = np.repeat(scale, self.block, self.axis).take(np.arange(size), self.axis)
            if zero is not None:
                zero = np.repeat(zero.astype(np.int32), self.block, self.axis).take(np.arange(size), self.axis)
        elif scale.ndim:
            scale = scale.reshape([-1 if a == self.axis else 1 for a in range(values.ndim)])
        return np.asarray((values if zero is None else values - zero.astype(np.float32)) * scale, np.float32)


def per_channel(
    weight: np.ndarray,
    axis: int,
    *,
    bits: int = 8,
    single: bool = False,
    bias: np.ndarray | None = None,
    x_scale: float = 1.0,
) -> Integers:
    """Round to signed integers with one scale along ``axis``, or a ``single`` one, and the zero point 0.

    ``bits`` below 8 use a part of int8. A channel whose ``bias`` is huge beside its weights gets a larger scale, so
    that the bias, an int32 with the scale ``x_scale`` times that of the weight, does not overflow.
    """
    largest = (1 << (bits - 1)) - 1
    others = tuple(a for a in range(weight.ndim) if a != axis)
    extent = np.abs(weight).max(axis=None if single else others).astype(np.float64)
    scale = extent / largest
    if bias is not None:
        needed = np.abs(bias.astype(np.float64)) / (BIAS_LIMIT / 2 * x_scale)
        scale = np.maximum(scale, needed.max() if single else needed)
    tiny = float(np.finfo(np.float32).tiny)
    scale = np.where(scale < tiny, 1.0, scale).astype(np.float32)
    spread = scale if single else scale.reshape([-1 if a == axis else 1 for a in range(weight.ndim)])
    values = np.clip(np.rint(weight / spread), -largest, largest).astype(np.int8)
    return Integers(values, np.asarray(scale, np.float32), None, axis)


def round_bias(bias: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return a bias as int32 with ``scale``."""
    wide = np.rint(bias.astype(np.float64) / scale.astype(np.float64))
    return np.clip(wide, -BIAS_LIMIT, BIAS_LIMIT).astype(np.int32)
