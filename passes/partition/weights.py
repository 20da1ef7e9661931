"""Weights of a chain, and what the distinct ones between any two cuts take together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer: ``size`` in bytes, the units that read it in increasing order."""

    name: str
    size: int
    trainable: bool
    users: tuple[int, ...]


class WeightBytes:
    """Bytes of the distinct weights that are read between two of P ``positions``, for all pairs of them at once.

    Every read counts in a running sum; what a part reads again is subtracted: ``again[i, j]`` [P, P] are the weights
    that are read from i on and once more before j.
    """

    def __init__(self, weights: Sequence[Weight], positions: npt.NDArray[np.int64]) -> None:
        self._kinds = [
            _Kind([w for w in weights if w.trainable is trainable], positions) for trainable in (True, False)
        ]

    def block(self, starts: slice, stops: slice, state: float) -> Floats:
        """Bytes from each of the positions ``starts`` to each of ``stops``; trainable weights count ``state`` times.

        [number of stops, number of starts]; meaningless where the start is not before the stop.
        """
        trainable, frozen = self._kinds
        return state * trainable.block(starts, stops) + frozen.block(starts, stops)

    def pieces(self, state: float) -> Floats:
        """Bytes between each position and the next; [P - 1]."""
        trainable, frozen = self._kinds
        return state * np.diff(trainable.total) + np.diff(frozen.total)


class _Kind:
    def __init__(self, weights: Sequence[Weight], positions: npt.NDArray[np.int64]) -> None:
        count = len(positions)
        reads, again = np.zeros(count), None
        for weight in weights:
            pieces = np.unique(np.searchsorted(positions, weight.users, "right") - 1)
            reads[pieces + 1] += weight.size
            if len(pieces) > 1:
                again = np.zeros((count, count)) if again is None else again
                again[pieces[:-1], pieces[1:] + 1] += weight.size
        self.total: Floats = np.cumsum(reads)
        if again is not None:
            again = np.cumsum(np.cumsum(again[::-1], axis=0)[::-1], axis=1)
        self._again = again

    def block(self, starts: slice, stops: slice) -> Floats:
        found: Floats = self.total[stops, None] - self.total[None, starts]
        return found if self._again is None else found - self._again[starts, stops].T
