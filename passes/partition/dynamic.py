"""The dynamic program of ``split``: exact, and fast because most of its table cannot matter.

``best[s][j]`` is the least possible time of the slowest of the first s stages if they end before position j:
``min over i of max(best[s-1][i], time(i, j))``. The best split at one in eight of the positions, found in the same
way, bounds that time. With the bound, and with the memory that there is, stages that are made as long as they can be,
from the front and from the back, show where the s-th cut can lie at all. What they leave out, messages and buffers,
only makes a stage worse, so that nothing which could be best is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from optc.passes.partition.chain import Chain, Device, Link
from optc.passes.partition.memory import Demand, MemoryModel
from optc.passes.partition.weights import Floats

# Chains with fewer positions are not worth a bound.
_SMALL = 64
# Rows of the table that are computed together.
_ROWS = 64
# Rounding must not exclude the split that a bound came from.
_SLACK = 1 + 1e-9


@dataclass(frozen=True)
class _Stage:
    speed: float
    memory: float
    in_flight: int


def crossing_seconds(chain: Chain, link: Link) -> Floats:
    """Time that one microbatch spends crossing a cut, forward and back; [N + 1], zero at both ends."""
    seconds = chain.messages * link.latency + (chain.sent + chain.returned) / link.bandwidth
    seconds[0] = seconds[-1] = 0.0
    return seconds


def best_cuts(
    chain: Chain, devices: Sequence[Device], link: Link, in_flight: Sequence[int], memory: MemoryModel
) -> tuple[int, ...] | None:
    """The cuts with the fastest slowest stage of one stage per device that fits; None if none does."""
    found = _solve(chain, link, [_Stage(d.speed, d.memory, n) for d, n in zip(devices, in_flight, strict=True)], memory)
    return None if found is None else found[1]


def _solve(
    chain: Chain, link: Link, stages: Sequence[_Stage], memory: MemoryModel
) -> tuple[float, tuple[int, ...]] | None:
    """Time of the slowest stage, and the cuts."""
    bound = np.inf
    if len(chain.positions()) > _SMALL:
        rough = _solve(chain.thinned, link, stages, memory)
        bound = np.inf if rough is None else rough[0] * _SLACK
    return _Table(chain, link, stages, memory, bound).solve()


class _Table:
    """Numbers of positions, P of them, stand for the cuts."""

    def __init__(self, chain: Chain, link: Link, stages: Sequence[_Stage], memory: MemoryModel, bound: float) -> None:
        self._positions = chain.positions()
        self._compute = np.concatenate([[0.0], np.cumsum(chain.seconds)])[self._positions]
        self._crossing = crossing_seconds(chain, link)[self._positions]
        self._demand = Demand(chain, memory)
        self._stages, self._bound = stages, bound
        self._last = len(self._positions) - 1

    def solve(self) -> tuple[float, tuple[int, ...]] | None:
        """The best split with no stage slower than the bound; None if there is none."""
        if len(self._stages) > self._last:
            return None
        lows, highs = self._bands()
        if lows[0] > 0 or any(low > high for low, high in zip(lows, highs, strict=True)):
            return None
        best, chosen = np.zeros(1), []
        for number, stage in enumerate(self._stages):
            best, choices = self._advance(stage, best, lows[number], lows[number + 1], highs[number + 1])
            chosen.append(choices)
        if not np.isfinite(best[-1]):
            return None
        cuts, at = [], self._last
        for number in range(len(self._stages) - 1, 0, -1):
            at = int(chosen[number][at - lows[number + 1]])
            cuts.append(int(self._positions[at]))
        return float(best[-1]), tuple(reversed(cuts))

    def _bands(self) -> tuple[list[int], list[int]]:
        """The lowest and the highest position that each number of stages can end at."""
        count = len(self._stages)
        highs, lows = [0], [self._last]
        for stage in self._stages:
            highs.append(min(self._farthest(stage, highs[-1]), self._last - (count - len(highs))))
        for stage in reversed(self._stages):
            lows.append(max(self._nearest(stage, lows[-1]), count - len(lows)))
        return lows[::-1], highs

    def _farthest(self, stage: _Stage, start: int) -> int:
        """The last position that ``stage`` can reach from ``start``."""
        stop = int(np.searchsorted(self._compute, self._compute[start] + self._bound * stage.speed, "right")) - 1
        if np.isfinite(stage.memory):
            needs = self._demand.least(slice(start, start + 1), slice(start, stop + 1), stage.in_flight)[:, 0]
            stop = start + int(np.searchsorted(needs, stage.memory * _SLACK, "right")) - 1
        return max(stop, start)

    def _nearest(self, stage: _Stage, stop: int) -> int:
        """The first position from which ``stage`` can reach ``stop``."""
        start = int(np.searchsorted(self._compute, self._compute[stop] - self._bound * stage.speed, "left"))
        if np.isfinite(stage.memory):
            needs = self._demand.least(slice(start, stop + 1), slice(stop, stop + 1), stage.in_flight)[0]
            start += int(np.searchsorted(-needs, -stage.memory * _SLACK, "left"))
        return min(start, stop)

    def _advance(self, stage: _Stage, before: Floats, first: int, low: int, high: int) -> tuple[Floats, np.ndarray]:
        """Row ``low`` to ``high`` of the table with one more stage; ``before`` begins at position ``first``."""
        best = np.full(high - low + 1, np.inf)
        choices = np.zeros(len(best), np.int64)
        for bottom in range(low, high + 1, _ROWS):
            top = min(bottom + _ROWS - 1, high)
            starts = slice(max(first, self._nearest(stage, bottom)), min(first + len(before), top))
            if starts.start >= starts.stop:
                continue
            stops = slice(bottom, top + 1)
            value = (self._compute[stops, None] - self._compute[None, starts]) / stage.speed
            value += self._crossing[stops, None] + self._crossing[None, starts]
            np.maximum(value, before[None, starts.start - first : starts.stop - first], out=value)
            if np.isfinite(stage.memory):
                value[self._demand.block(starts, stops, stage.in_flight) > stage.memory] = np.inf
            if starts.stop > bottom:
                value[np.arange(bottom, top + 1)[:, None] <= np.arange(starts.start, starts.stop)] = np.inf
            index = value.argmin(axis=1)
            reached = value[np.arange(len(index)), index]
            best[bottom - low : top + 1 - low] = np.where(reached <= self._bound, reached, np.inf)
            choices[bottom - low : top + 1 - low] = starts.start + index
        return best, choices
