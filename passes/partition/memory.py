"""Bytes that a stage holds while it trains."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from optc.passes.partition.chain import Chain
from optc.passes.partition.weights import Floats


@dataclass(frozen=True)
class MemoryModel:
    """How a schedule and an optimizer use memory.

    ``state`` is how many times its own size a trainable weight takes (weight, gradient, optimizer state: 4 for Adam);
    ``microbatches`` receive buffers are kept for activations and as many for gradients; ``recompute`` keeps only a
    stage's inputs between forward and backward, and one microbatch's activations while it goes back.
    """

    state: float = 4.0
    microbatches: int = 1
    recompute: bool = False

    def fixed(self, chain: Chain, start: int, stop: int) -> float:
        """Weights, gradients, optimizer state and receive buffers of units ``start`` to ``stop``; bytes."""
        last = len(chain.names)
        received = chain.sent[start] if start else 0.0
        returned = chain.returned[stop] if stop < last else 0.0
        weights = chain.bytes_of_weights(start, stop, self.state)
        return (
            weights
            + self.microbatches * float(received + returned)
            + (float(chain.saved[start:stop].sum()) if self.recompute else 0.0)
        )

    def per_microbatch(self, chain: Chain, start: int, stop: int) -> float:
        """What each microbatch in flight adds to ``fixed``; bytes."""
        outputs = float(chain.sent[stop]) if stop < len(chain.names) else 0.0
        return outputs + (0.0 if self.recompute else float(chain.saved[start:stop].sum()))

    def total(self, chain: Chain, start: int, stop: int, in_flight: int) -> float:
        """Peak bytes of a stage with ``in_flight`` microbatches between their forward and backward."""
        return self.fixed(chain, start, stop) + in_flight * self.per_microbatch(chain, start, stop)


class Demand:
    """Peak bytes of the stages between any two of the P positions that ``chain`` can be cut at.

    Starts and stops are numbers of positions; results are [number of stops, number of starts].
    """

    def __init__(self, chain: Chain, memory: MemoryModel) -> None:
        positions = chain.positions()
        self._memory, self._weights = memory, chain.weight_bytes
        self._saved = np.concatenate([[0.0], np.cumsum(chain.saved)])[positions]
        self._sent, self._returned = chain.sent[positions], chain.returned[positions]
        for crossing in (self._sent, self._returned):
            crossing[0] = crossing[-1] = 0.0

    def least(self, starts: slice, stops: slice, in_flight: int) -> Floats:
        """What weights and activations take; it only grows with the stage."""
        saved = self._saved[stops, None] - self._saved[None, starts]
        kept = saved if self._memory.recompute else in_flight * saved
        found: Floats = self._weights.block(starts, stops, self._memory.state) + kept
        return found

    def block(self, starts: slice, stops: slice, in_flight: int) -> Floats:
        """As ``MemoryModel.total``."""
        return self.least(starts, stops, in_flight) + self._buffers(starts, stops, in_flight)

    def pieces(self, in_flight: int) -> Floats:
        """Of the stages between each position and the next; [P - 1]."""
        saved = np.diff(self._saved)
        kept = saved if self._memory.recompute else in_flight * saved
        received = self._memory.microbatches * (self._sent[:-1] + self._returned[1:])
        found: Floats = self._weights.pieces(self._memory.state) + kept + received + in_flight * self._sent[1:]
        return found

    def _buffers(self, starts: slice, stops: slice, in_flight: int) -> Floats:
        received = self._memory.microbatches * (self._sent[None, starts] + self._returned[stops, None])
        found: Floats = received + in_flight * self._sent[stops, None]
        return found
