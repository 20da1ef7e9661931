"""What a splitter needs to know of a graph: its units in one topological order, and what crosses each cut."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from optc.passes.partition.weights import Floats, Weight, WeightBytes

_THINNING = 8


@dataclass(frozen=True)
class Chain:
    """N units in topological order. A cut at position p lies before unit p; positions 0 and N are the ends.

    Costs are those of one microbatch on a device of speed 1: ``forward``, ``backward_input`` and ``backward_weight``
    [N] in seconds, ``saved`` [N] in bytes kept from forward to backward. ``sent`` and ``returned`` [N + 1] are the
    bytes of activations that cross a cut forward and of gradients that cross it backward, ``messages`` [N + 1] the
    number of tensors that do either. ``legal`` [N + 1] says where may be cut.
    """

    names: tuple[str, ...]
    forward: Floats
    backward_input: Floats
    backward_weight: Floats
    saved: Floats
    sent: Floats
    returned: Floats
    messages: Floats
    legal: npt.NDArray[np.bool_]
    weights: tuple[Weight, ...]

    @property
    def seconds(self) -> Floats:
        """Compute of one microbatch, forward and backward, per unit; [N] in seconds."""
        return self.forward + self.backward_input + self.backward_weight

    @cached_property
    def weight_bytes(self) -> WeightBytes:
        """Bytes of weights between any two of ``positions()``."""
        return WeightBytes(self.weights, self.positions())

    @cached_property
    def thinned(self) -> Chain:
        """The same chain with one in eight of its legal cuts."""
        legal = np.zeros_like(self.legal)
        legal[self.positions()[::_THINNING]] = True
        return replace(self, legal=legal)

    def positions(self) -> npt.NDArray[np.int64]:
        """Both ends and every legal cut, increasing."""
        legal = self.legal.copy()
        legal[0] = legal[-1] = True
        return np.flatnonzero(legal)

    def bytes_of_weights(self, start: int, stop: int, state: float) -> float:
        """Bytes of the distinct weights read by units ``start`` to ``stop``, trainable ones times ``state``."""
        readers, read, sizes, trainable = self._reads
        there = np.unique(read[np.searchsorted(readers, start) : np.searchsorted(readers, stop)])
        return float((sizes[there] * np.where(trainable[there], state, 1.0)).sum())

    @cached_property
    def _reads(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Floats, npt.NDArray[np.bool_]]:
        """Units that read weights in increasing order, the numbers of those weights; sizes and kinds of all weights."""
        pairs = sorted((user, number) for number, weight in enumerate(self.weights) for user in weight.users)
        table = np.array(pairs, np.int64).reshape(-1, 2)
        sizes = np.array([weight.size for weight in self.weights], np.float64)
        return table[:, 0], table[:, 1], sizes, np.array([weight.trainable for weight in self.weights], np.bool_)


@dataclass(frozen=True)
class Device:
    """What a stage runs on: ``speed`` relative to the one that the costs are for, ``memory`` in bytes."""

    speed: float = 1.0
    memory: float = float("inf")


@dataclass(frozen=True)
class Link:
    """Between neighbouring stages: ``latency`` in seconds a message, ``bandwidth`` in bytes per second."""

    latency: float = 0.0
    bandwidth: float = float("inf")

    def seconds(self, size: float, messages: float) -> float:
        """Time that ``messages`` tensors of together ``size`` bytes take."""
        return messages * self.latency + size / self.bandwidth


def segments(cuts: Sequence[int], length: int) -> list[tuple[int, int]]:
    """The (start, stop) of each stage that ``cuts`` make of ``length`` units."""
    return list(itertools.pairwise([0, *cuts, length]))
