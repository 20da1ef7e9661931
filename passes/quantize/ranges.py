"""Which range of a tensor's values is worth representing, decided on a histogram of them.

min-max      everything, so outliers cost resolution
percentile   all but a fraction at either end
entropy      the range whose rounded distribution is the closest to the original by Kullback-Leibler divergence
             (Migacz, "8-bit inference with TensorRT", GTC 2017)
mse          the range with the least mean squared error of rounding and clipping together
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from optc.passes.quantize.encoding import Encoding, encode, limits

METHODS = ("min-max", "percentile", "entropy", "mse")
PERCENTILE = 99.99
"""Percent of the values that ``percentile`` keeps, half of the rest cut off at either end."""
BINS = 8192
"""Bins of a histogram: 32 for a step of 8 bits, so that ranges of a small part of it can still be judged."""
_FRACTIONS = np.geomspace(1.0, 0.03, 40)
_ROUNDS = 2


@dataclass
class Histogram:
    """Counts of values in equal bins from ``low`` to ``high``, which are the extremes that were seen."""

    low: float
    high: float
    counts: np.ndarray

    @classmethod
    def empty(cls, low: float, high: float) -> Histogram:
        """Return a histogram without values."""
        return cls(low, high, np.zeros(BINS, np.int64))

    def add(self, values: np.ndarray) -> None:
        """Count ``values``; none of them lies outside of the range."""
        width = self.high - self.low
        if width <= 0:
            self.counts[0] += values.size
            return
        index = ((values.reshape(-1) - np.float32(self.low)) * np.float32(BINS / width)).astype(np.int32)
        self.counts += np.bincount(np.clip(index, 0, BINS - 1), minlength=BINS)

    @property
    def centers(self) -> np.ndarray:
        """The middles of the bins."""
        width = (self.high - self.low) / BINS
        return self.low + width * (np.arange(BINS) + 0.5)


def choose(histogram: Histogram, method: str, dtype: str, *, symmetric: bool) -> Encoding:
    """Return the encoding of the range that ``method`` (one of METHODS) finds best for the values counted."""
    low, high = histogram.low, histogram.high
    if method == "percentile":
        low, high = _percentile(histogram)
    elif method == "entropy":
        low, high = _search(histogram, symmetric, lambda a, b: _divergence(histogram, a, b, dtype))
    elif method == "mse":
        low, high = _search(
            histogram, symmetric, lambda a, b: _error(histogram, encode(a, b, dtype, symmetric=symmetric))
        )
    return encode(low, high, dtype, symmetric=symmetric)


def _percentile(histogram: Histogram) -> tuple[float, float]:
    share = np.cumsum(histogram.counts) / max(int(histogram.counts.sum()), 1)
    cut = (1 - PERCENTILE / 100) / 2
    edges = np.linspace(histogram.low, histogram.high, BINS + 1)
    first, last = int(np.searchsorted(share, cut)), int(np.searchsorted(share, 1 - cut))
    return float(edges[min(first, BINS - 1)]), float(edges[min(last, BINS - 1) + 1])


def _search(histogram: Histogram, symmetric: bool, cost: Callable[[float, float], float]) -> tuple[float, float]:
    """Return the range with the least ``cost``: both ends shrunk together, then each of them by itself."""
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if symmetric:
        high = max(-low, high)
        low = -high
    costs = [cost(low * f, high * f) for f in _FRACTIONS]
    best = _FRACTIONS[int(np.argmin(costs))]
    a, b = low * best, high * best
    if symmetric:
        return float(a), float(b)
    least = min(costs)
    for _ in range(_ROUNDS):
        before = least
        for candidate in [(low * f, b) for f in _FRACTIONS] + [(a, high * f) for f in _FRACTIONS]:
            found = cost(*candidate)
            if found < least:
                least, (a, b) = found, candidate
        if least == before:
            break
    return float(a), float(b)


def _error(histogram: Histogram, encoding: Encoding) -> float:
    centers = histogram.centers
    low, high = limits(encoding.dtype)
    steps = np.clip(np.rint(centers / encoding.scale), low - encoding.zero, high - encoding.zero)
    return float((histogram.counts * (steps * encoding.scale - centers) ** 2).sum())


def _divergence(histogram: Histogram, low: float, high: float, dtype: str) -> float:
    """Return how much the counts differ from the same counts spread evenly over each step of the range.

    Zeros are left out: they are exact in every range, and where they are many (behind Relu) nothing else would count.
    """
    counts, centers = histogram.counts.astype(np.float64), histogram.centers
    counts[np.abs(centers).argmin()] = 0
    inside = (centers >= low) & (centers <= high)
    least, largest = limits(dtype)
    if inside.sum() <= largest - least:
        return float("inf")  # a step for every bin would reproduce them all, whatever is cut off
    kept = counts[inside]
    reference = kept.copy()
    reference[0] += counts[centers < low].sum()
    reference[-1] += counts[centers > high].sum()
    step = np.floor((centers[inside] - low) / max((high - low) / (largest - least + 1), 1e-30)).astype(np.int64)
    step -= step.min()
    nonzero = kept > 0
    filled = np.bincount(step, nonzero)
    spread = np.where(nonzero, (np.bincount(step, kept) / np.maximum(filled, 1))[step], 0.0)
    p, q = reference / max(reference.sum(), 1.0), spread / max(spread.sum(), 1.0)
    both = p > 0
    # A value that is clipped into an empty bin has a probability of its own; the small constant keeps it finite.
    return float((p[both] * np.log(p[both] / np.maximum(q[both], 1e-8))).sum())
