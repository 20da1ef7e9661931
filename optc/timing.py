"""Times several programs on the same inputs in alternating runs of one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter, sleep

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Times of one contestant in milliseconds."""

    name: str
    samples: tuple[float, ...]

    def percentile(self, q: float) -> float:
        """Return the ``q``-th percentile in milliseconds."""
        return float(np.percentile(self.samples, q))

    @property
    def median(self) -> float:
        """Median in milliseconds."""
        return self.percentile(50)

    def describe(self) -> dict[str, object]:
        """Return the JSON form."""
        percentiles = {f"p{q}": self.percentile(q) for q in (10, 90, 99)}
        return {"name": self.name, "median_ms": self.median, **percentiles, "runs": len(self.samples)}


PAUSE = 0.02
"""Seconds between contestants: the thread pool of the last one spins for work for a while before it sleeps."""
BLOCK = 0.05
"""Seconds that a contestant runs for in one turn, at least one run."""


def alternate(
    contestants: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    warmup: int = 2,
    min_runs: int = 5,
    progress: Callable[[float], None] = lambda _: None,
) -> list[Timing]:
    """Run all contestants in turns for ``seconds`` in all (at least ``min_runs`` turns) after ``warmup`` turns.

    Turns cancel the drift of a machine's clock and of its other tenants. In each, a contestant has the machine for
    itself: a pause, one run that is not counted, then a block of runs that are.
    """
    for _ in range(warmup):
        for function in contestants.values():
            function()
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    start = perf_counter()
    turns = 0
    while turns < min_runs or perf_counter() - start < seconds:
        for name, function in contestants.items():
            sleep(PAUSE)
            function()
            begin = end = perf_counter()
            while end - begin < BLOCK:
                last = end
                function()
                end = perf_counter()
                samples[name].append((end - last) * 1e3)
        turns += 1
        progress(min(1.0, (perf_counter() - start) / max(seconds, 1e-9)))
    return [Timing(name, tuple(values)) for name, values in samples.items()]
