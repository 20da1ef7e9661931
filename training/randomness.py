"""Random numbers that do not depend on how a model is split.

Each random operator draws from a generator seeded by (seed, step, microbatch of the whole step, operator). The same
numbers come out of any number of stages, any schedule, a recomputed forward pass and a resumed run.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Clock:
    """Where training is: what random operators are seeded with besides their own names."""

    seed: int = 0
    step: int = 0
    microbatch: int = 0

    def now(self) -> tuple[int, int, int]:
        """The moment, to return to."""
        return self.seed, self.step, self.microbatch

    @contextlib.contextmanager
    def at(self, moment: tuple[int, int, int]) -> Iterator[None]:
        """Run the block as if it were ``moment`` again."""
        before = self.now()
        self.seed, self.step, self.microbatch = moment
        try:
            yield
        finally:
            self.seed, self.step, self.microbatch = before


class Seeded(torch.nn.Module):
    """Runs one random operator with numbers of its own; the state of the process's generators is not changed."""

    def __init__(self, operator: Any, name: str, clock: Clock) -> None:
        super().__init__()
        self._operator, self._name, self._clock = operator, name, clock

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the operator."""
        key = "/".join(map(str, (*self._clock.now(), self._name)))
        seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        devices = sorted({tensor.device.index or 0 for tensor in tensors if tensor.device.type == "cuda"})
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            return self._operator(*args, **kwargs)
