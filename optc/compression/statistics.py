"""What calibration finds out about the values that products read: extremes, means and correlations of channels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from optc.passes.quantize.encoding import Encoding
from optc.passes.quantize.products import Product

_ROWS = 4096
"""Rows of a call that go into a gram matrix at most: more tell little about the correlations of their columns."""


class Extremes:
    """The least and the largest value."""

    def __init__(self) -> None:
        self.low, self.high = np.inf, -np.inf

    def add(self, values: np.ndarray) -> None:
        """Take note of ``values``."""
        if values.size:
            self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))


class ChannelRanges:
    """The extremes (0 among them) and the mean square of each channel, along ``axis``."""

    def __init__(self, axis: int) -> None:
        self.axis, self.low, self.high = axis, np.zeros(()), np.zeros(())
        self._squares, self._count = np.zeros(()), 0

    def add(self, values: np.ndarray) -> None:
        """Take note of ``values``."""
        rows = _channels(values, self.axis)
        self.low, self.high = np.minimum(self.low, rows.min(0)), np.maximum(self.high, rows.max(0))
        self._squares = self._squares + (rows.astype(np.float64) ** 2).sum(0)
        self._count += len(rows)

    @property
    def reach(self) -> np.ndarray:
        """The largest magnitudes."""
        return np.maximum(-self.low, self.high)

    @property
    def power(self) -> np.ndarray:
        """The mean squares."""
        return self._squares / max(self._count, 1)


class ChannelMean:
    """The mean of each channel, along ``axis``, of the values and of what is left of them when rounded."""

    def __init__(self, axis: int, encoding: Encoding) -> None:
        self.axis, self.encoding = axis, encoding
        self._sums: list[np.ndarray] = [np.zeros(()), np.zeros(())]
        self._count = 0

    def add(self, values: np.ndarray) -> None:
        """Take note of ``values``."""
        rows = _channels(values, self.axis)
        self._count += len(rows)
        for number, array in enumerate((rows, self.encoding.round(rows))):
            self._sums[number] = self._sums[number] + array.sum(0, dtype=np.float64)

    @property
    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """Both means ``[channels]``."""
        return self._sums[0] / max(self._count, 1), self._sums[1] / max(self._count, 1)


class Gram:
    """The mean of ``x^T x`` over the rows that a product multiplies its weights with, ``[depth, depth]``."""

    def __init__(self, found: Product) -> None:
        self._rows, self._sum, self._count = _reader(found), np.zeros(()), 0

    def add(self, values: np.ndarray) -> None:
        """Take note of ``values``."""
        rows = self._rows(values)
        rows = rows[:: -(-len(rows) // _ROWS)].astype(np.float32)
        self._sum = self._sum + (rows.T @ rows).astype(np.float64)
        self._count += len(rows)

    @property
    def matrix(self) -> np.ndarray:
        """The mean."""
        return np.asarray(self._sum / max(self._count, 1))


def _channels(values: np.ndarray, axis: int) -> np.ndarray:
    """Return ``[elements, channels]``."""
    return np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis])


def _reader(found: Product) -> Callable[[np.ndarray], np.ndarray]:
    depth = found.matrix().shape[1]
    return lambda values: values.reshape(-1, depth)
