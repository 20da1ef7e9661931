"""Depthwise convolution of 8-bit integers on channels-last images, exact in int32: compute and weight packing.

The schedule is in ``integer_depthwise_schedule.py``. Where an instruction multiplies and adds pairs of int16, the
lines of the image are taken two by two and interleaved, so that a pair is one channel of two lines, and the weights
lie alike. A window may begin with the second line of a pair: the weights are there for both ``phases``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import te, tirx

TEMPLATE = "integer_depthwise"


@dataclass(frozen=True)
class Lines:
    """How the lines of a window fall into groups of ``group`` neighbouring lines (1 or 2).

    ``kernel``, ``stride`` and ``dilation`` are those of the axis of lines. A window of phase p begins with line p of
    its first group; its weights fill ``slots`` groups, with zeros for lines that are not its own.
    """

    kernel: int
    stride: int
    dilation: int
    group: int

    @property
    def phases(self) -> int:
        """The number of phases that occur."""
        return 1 if self.stride % self.group == 0 else self.group

    @property
    def dense(self) -> bool:
        """Whether lines of one window share groups: else each has a slot of its own."""
        return self.dilation < self.group

    @property
    def slots(self) -> int:
        """The number of groups that a window reads."""
        return (self.phases + self.kernel - 2) // self.group + 1 if self.dense else self.kernel

    def place(self, line: Any, phase: int = 0) -> tuple[Any, Any]:
        """Return the slot of line ``line`` of the window, and which line of that group it is."""
        at = phase + line * self.dilation
        return (at // self.group if self.dense else line), at % self.group

    def offset(self, slot: Any, phase: Any) -> Any:
        """Return how many groups behind the first one of the window slot ``slot`` is."""
        return slot if self.dense else (phase + slot * self.dilation) // self.group

    @property
    def reach(self) -> int:
        """The largest offset."""
        return int(self.offset(self.slots - 1, self.phases - 1))


def pack(weights: np.ndarray, lines: Lines) -> np.ndarray:
    """Pack ``[C, KH, KW]`` into int16 ``[phases, slots, KW, C, group]``. Raises OverflowError beyond int16."""
    channels, height, width = weights.shape
    if weights.size and not -32768 <= weights.min() <= weights.max() <= 32767:
        raise OverflowError(f"weights from {weights.min()} to {weights.max()} do not fit 16 bits")
    packed = np.zeros((lines.phases, lines.slots, width, channels, lines.group), np.int16)
    for phase in range(lines.phases):
        for line in range(height):
            slot, half = lines.place(line, phase)
            packed[phase, slot, :, :, half] = weights[:, line].T
    return packed


def depthwise(
    x: Any,
    packed: Any,
    centre: Callable[[Any], Any],
    *,
    lines: Lines,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    before: Sequence[int],
    out: Sequence[Any],
) -> Any:
    """Convolve each channel of ``x [N, H, W, C]`` with weights of ``pack``: ``[N, *out, C]`` in int32.

    ``centre`` subtracts the zero point from an int32 value; what lies outside of the image counts as 0 after that.
    """
    height, width = x.shape[1:3]
    ky, kx = (te.reduce_axis((0, extent), name) for extent, name in zip(kernel, ("ky", "kx"), strict=True))
    slot, half = lines.place(ky)

    def element(n: Any, oy: Any, ox: Any, c: Any) -> Any:
        iy = oy * strides[0] + ky * dilations[0] - before[0]
        ix = ox * strides[1] + kx * dilations[1] - before[1]
        inside = tirx.all(iy >= 0, iy < height, ix >= 0, ix < width)
        value = tirx.if_then_else(inside, centre(x(n, iy, ix, c).astype("int32")), tirx.const(0, "int32"))
        return te.sum(value * packed(0, slot, kx, c, half).astype("int32"), axis=[ky, kx])

    geometry = {"kernel": kernel, "strides": strides, "dilations": dilations, "before": before}
    notes = {"optc.template": TEMPLATE, **{f"optc.{name}": list(values) for name, values in geometry.items()}}
    return te.compute((x.shape[0], *out, x.shape[3]), element, "depthwise", attrs=notes)
