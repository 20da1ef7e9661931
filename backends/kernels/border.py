"""Rows of a padded image that are zeros: a dilated window multiplies many of them, which its product may leave out."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import tvm

from optc.backends.kernels.fused import Axes, Fused
from optc.backends.kernels.loops import static

BORDER = "optc.border"
"""The annotation of a convolution with the first row of the image behind padding, rows, stride and dilation."""
_WORTH_SKIPPING = 0.9
"""The part of a convolution's products up to which those with rows of zeros are left out."""


@dataclass(frozen=True)
class Border:
    """A convolution over rows of which ``size`` follow ``before`` rows of zeros; others follow them.

    Windows have ``window`` rows, ``dilation`` apart; outputs have ``height`` rows of ``width`` pixels.
    """

    before: int
    size: int
    stride: int
    dilation: int
    window: int
    height: int
    width: int

    def inside(self, first: Any, last: Any, smaller: Any, larger: Any) -> tuple[Any, Any]:
        """Return the first row of the window, and the one behind the last, that pixels ``first`` to ``last`` need.

        All of them where the pixels are not of one image. ``smaller`` and ``larger`` are minimum and maximum.
        """
        top, bottom = first // self.width, last // self.width
        more_images = bottom // self.height - top // self.height
        above = larger(top % self.height - more_images * self.height, 0)
        below = smaller(top % self.height + bottom - top, self.height - 1)
        missing = larger(self.before - below * self.stride, 0)
        reach = larger(self.before + self.size - 1 - above * self.stride + self.dilation, 0)
        return (missing + self.dilation - 1) // self.dilation, smaller(reach // self.dilation, self.window)


def border_of(fused: Fused, row_operand: Any, pixels: Axes, tile: int) -> Border | None:
    """Return where a convolution's rows of zeros are, if it is worth leaving them out for tiles of ``tile`` pixels."""
    notes, window = fused.core.annotations, fused.reduced.extents
    rows = [size for size in map(static, pixels.extents) if size]
    plain = isinstance(row_operand, tvm.ir.TensorLoad)
    if BORDER not in notes or not plain or len(rows) < max(3, len(pixels.extents)):
        return None
    before, size, stride, dilation = (int(v) for v in notes[BORDER])
    border = Border(before, size, stride, dilation, int(window[0]), rows[1], prod(rows[2:]))
    first = np.arange(0, prod(rows), tile)
    low, high = border.inside(first, np.minimum(first + tile, prod(rows)) - 1, np.minimum, np.maximum)
    done = float(np.maximum(high - low, 0).mean()) / border.window
    return border if done <= _WORTH_SKIPPING else None
