"""Bytes that a stage holds while it trains."""

from __future__ import annotations

from dataclasses import dataclass

from optc.passes.partition.chain import Chain


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
