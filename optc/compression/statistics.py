"""What calibration finds out about the values that products read: extremes, means and correlations of channels."""

from __future__ import annotations

import numpy as np

from optc.passes.prune.layers import Layer
from optc.passes.quantize.encoding import Encoding
from optc.passes.quantize.products import Product

_ROWS, _PLACES = 4096, 1024
"""Rows of a call, and places of a convolution, that go into a gram matrix at most: more tell little about columns."""


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
    """The mean of ``x^T x`` over the rows that a product multiplies its weights with, ``[depth, depth]``.

    The rows of a convolution are what its kernel sees at a place; of these some are taken, the same in each call.
    """

    def __init__(self, found: Product) -> None:
        self._found, self._sum, self._count = found, np.zeros(()), 0

    @staticmethod
    def takes(found: Product) -> bool:
        """Tell whether the product is one matrix: convolutions with groups are several."""
        node = found.node
        plain = (
            node.attributes.get_int("group", 1) == 1 and node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
        )
        return node.op_type != "Conv" or plain

    @staticmethod
    def seen(found: Product) -> str:
        """Return a text that is the same for products that read the same rows of a value."""
        if found.node.op_type != "Conv":
            return ""
        attributes = sorted(f"{name}={attribute.value}" for name, attribute in found.node.attributes.items())
        return f"{attributes} {found.array().shape[1:]}"

    def add(self, values: np.ndarray) -> None:
        """Take note of ``values``."""
        if self._found.node.op_type == "Conv":
            layer = Layer(self._found.node, self._found.weight)
            places = np.random.default_rng(0).permutation(layer.places(values))[:_PLACES]
            rows = layer.rows(values, np.sort(places)).astype(np.float32)
        else:
            rows = values.reshape(-1, values.shape[-1])
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
