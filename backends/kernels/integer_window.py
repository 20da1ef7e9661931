"""Windows of bytes for which products of columns are exact where an instruction ends at 16 bits.

``pmaddubsw`` adds two products of a byte of the rows with one of the columns and saturates. The columns are known: for
each depth there is a largest byte, at least 128, up to which no sum of two saturates. A window of so many bytes lies
around the zero point, where most data is; its first byte is subtracted from the rows. Behind the columns lies one
block more that tells the windows: the first and last byte for each channel, and what the rows have too much at each
depth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from optc.backends.base import Target
from optc.backends.kernels.integer_contraction import PAIR, QUAD
from optc.backends.kernels.integer_dot import choose_bytes

FIRST, LAST, EXCESS = range(3)
"""Columns of the tile that tells the windows."""
_LARGEST = 255
_LEAST_CHANNELS = 8
"""Fewer channels are those of data that a network begins with, pixels for example, of which many are large."""
_LEAST_DEPTH = 24
"""The depth of columns from which values are taken to crowd around a zero point amid their range."""
_LEAST_OF_FOUR = 128
"""The mean of the largest bytes from which sums of four products pay: data above it is rare."""
_LEAST_COLUMNS = 32
"""Columns that pay for looking for large bytes."""


@dataclass(frozen=True)
class Windows:
    """How rows are multiplied as bytes.

    ``zero`` is the byte that stands for 0, counted from the least one; ``splits`` tells whether bytes outside of their
    window need care, ``moved`` whether some window begins above 0, ``exceeds`` whether 0 is another number in the rows,
    ``fours`` whether sums of four products are exact too: those of neighbouring quads of a run, two by two.
    ``packed`` are the columns and behind them, as one more tile, the windows.
    """

    zero: int
    splits: bool
    moved: bool
    exceeds: bool
    fours: bool
    packed: np.ndarray

    def notes(self) -> dict[str, list[int]]:
        """Return the annotations of the block."""
        return {"zero": [self.zero], "windows": [int(self.splits), int(self.moved), int(self.exceeds), int(self.fours)]}


def choose(
    target: Target, element: str, zero: int | None, channels: int, packed: np.ndarray, taps: int = 1
) -> Windows | None:
    """Return how rows of ``element`` (int8 or uint8) with zero point ``zero`` are multiplied as bytes.

    ``packed`` are the columns in quads ``[..., N/B, K/4, B, 4]``; their depths are ``taps`` runs, each those of
    ``channels`` at one or more pixels. None: rows are widened to 16 bits, because the target has no instruction for
    bytes, something is not known while compiling or not of 8 bits, or too many bytes would be outside of the windows.
    """
    dot = choose_bytes(target)
    if dot is None or zero is None or packed.dtype != np.int8 or element not in ("int8", "uint8"):
        return None
    raw = zero + 128 if element == "int8" else zero
    if not 0 <= raw <= _LARGEST:
        return None
    depths = packed.shape[-3] * QUAD
    channel = np.arange(depths) % max(1, depths // taps) % channels
    limits, fours = np.full((*packed.shape[:-4], channels), _LARGEST), False
    if dot.widen is not None:
        limits = _of_channels(exact_limits(packed), channel, channels)
        of_four = _of_channels(exact_limits(packed, taps), channel, channels)
        # The columns of two quads in vectors of 128 bits are more than there are registers for.
        fours = dot.lanes >= 8 and bool(raw <= of_four.min(initial=_LARGEST) // 2 and of_four.mean() >= _LEAST_OF_FOUR)
        limits = of_four if fours else limits
    first = np.minimum(np.maximum(raw - limits // 2, 0), _LARGEST - limits) if dot.widen else np.zeros_like(limits)
    splits, moved = bool((limits < _LARGEST).any()), bool(first.any())
    if splits:
        if packed.shape[-4] * packed.shape[-2] < _LEAST_COLUMNS or channels < _LEAST_CHANNELS:
            return None
        # Signs of what is left change those of the columns.
        if moved and (depths < _LEAST_DEPTH or packed.min() < -127):
            return None
    excess = (raw - 128 if dot.row == "int8" else raw) - first[..., channel]
    told = np.zeros((*packed.shape[:-4], 1, *packed.shape[-3:]), np.int8)
    for column, values in ((FIRST, first[..., channel]), (LAST, (first + limits)[..., channel]), (EXCESS, excess)):
        told[..., 0, :, column, :] = values.astype(np.uint8).view(np.int8).reshape(*told.shape[:-4], -1, QUAD)
    return Windows(raw, splits, moved, bool(excess.any()), fours, np.concatenate([packed, told], axis=-4))


def pack(
    target: Target, element: str, zero: int | None, channels: int, make: Callable[[int], np.ndarray], taps: int = 1
) -> tuple[np.ndarray, dict[str, list[int]]]:
    """Return columns as ``make`` packs them by fours or by twos, as ``choose`` decides, and the block's annotations."""
    if choose_bytes(target) is not None:
        chosen = choose(target, element, zero, channels, make(QUAD), taps)
        if chosen is not None:
            return chosen.packed, chosen.notes()
    return make(PAIR), {}


def _of_channels(limits: np.ndarray, channel: np.ndarray, channels: int) -> np.ndarray:
    """Return ``[..., channels]`` of ``[..., K]``: the least limit of the depths of each channel."""
    least = np.full((*limits.shape[:-1], channels), _LARGEST)
    np.minimum.at(np.moveaxis(least, -1, 0), channel, np.moveaxis(limits, -1, 0))
    return np.broadcast_to(least.min(initial=_LARGEST), least.shape) if channels % QUAD else least


def exact_limits(packed: np.ndarray, taps: int = 0) -> np.ndarray:
    """Return for each depth of columns ``[..., N/B, K/4, B, 4]`` the largest byte, at most 255, up to which no sum of
    two products leaves 16 bits: ``[..., K]``. With ``taps`` runs of depths it is for sums of four: those of two
    neighbouring quads of a run, from its first two on.
    """
    pairs = packed.reshape(*packed.shape[:-1], 2, 2).astype(np.int32)
    above, below = np.maximum(pairs, 0).sum(-1), np.minimum(pairs, 0).sum(-1)
    if taps:
        above, below = _with_neighbours(above, taps), _with_neighbours(below, taps)
    most, least = above.max((-4, -2), initial=1), below.min((-4, -2), initial=-1)
    limits = np.minimum(np.minimum(32767 // most, 32768 // -least), _LARGEST)
    return np.repeat(limits.reshape(*limits.shape[:-2], -1), 2, axis=-1)


def _with_neighbours(sums: np.ndarray, taps: int) -> np.ndarray:
    """Return ``[..., quads, 16, 2]`` with the sum of two neighbouring quads of a run in the place of both."""
    runs = sums.reshape(*sums.shape[:-3], taps, sums.shape[-3] // taps, *sums.shape[-2:]).copy()
    even = runs.shape[-3] // 2 * 2
    two = runs[..., :even, :, :].reshape(*runs.shape[:-3], even // 2, 2, *runs.shape[-2:])
    runs[..., :even, :, :] = np.repeat(two.sum(-3), 2, axis=-3)
    return runs.reshape(sums.shape)
