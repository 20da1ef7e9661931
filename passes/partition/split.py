"""Contiguous stages whose slowest is as fast as it can be: exact dynamic programming under memory caps.

``best[s][j]`` is the least possible time of the slowest of s stages that cover the units before position j:
``min over i of max(best[s-1][i], time(i, j))``. A greedy bound keeps the range of i that can matter short, so that
4,000 units into 8 stages take well under a second where the plain recursion takes fifteen.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from optc.errors import PartitionError
from optc.passes.partition.chain import Chain, Device, Floats, Link, segments
from optc.passes.partition.memory import MemoryModel


@dataclass(frozen=True)
class Split:
    """``cuts`` are the K - 1 positions between K stages, ``seconds`` each stage's compute plus communication."""

    cuts: tuple[int, ...]
    seconds: tuple[float, ...]

    @property
    def bottleneck(self) -> float:
        """Time of the slowest stage for one microbatch, in seconds."""
        return max(self.seconds)


def crossing_seconds(chain: Chain, link: Link) -> Floats:
    """Time that one microbatch spends crossing a cut, forward and back; [N + 1], zero at both ends."""
    seconds = chain.messages * link.latency + (chain.sent + chain.returned) / link.bandwidth
    seconds[0] = seconds[-1] = 0.0
    return seconds


def stage_seconds(chain: Chain, cuts: Sequence[int], devices: Sequence[Device], link: Link) -> tuple[float, ...]:
    """Compute and communication of each stage for one microbatch."""
    crossing = crossing_seconds(chain, link)
    total = np.concatenate([[0.0], np.cumsum(chain.seconds)])
    return tuple(
        float((total[stop] - total[start]) / device.speed + crossing[start] + crossing[stop])
        for (start, stop), device in zip(segments(cuts, len(chain.names)), devices, strict=True)
    )


def split(
    chain: Chain,
    devices: Sequence[Device],
    link: Link | None = None,
    *,
    in_flight: Sequence[int] | None = None,
    memory: MemoryModel | None = None,
) -> Split:
    """Cut ``chain`` into one stage per device; ``in_flight`` is the number of live microbatches of each stage.

    Raises PartitionError if there are fewer legal cuts than needed or no split fits into memory.
    """
    link, memory = link or Link(), memory or MemoryModel()
    in_flight = in_flight or [1] * len(devices)
    positions = chain.positions()
    require_stages(chain, len(devices))
    table = _Table(chain, positions, link, memory)
    capped = any(np.isfinite(device.memory) for device in devices)
    # Memory may force a split that is slower than any that ignores it; it keeps the search short itself.
    cuts = table.solve(devices, in_flight, np.inf if capped else table.greedy_bound(devices))
    if cuts is None:
        raise misfit(chain, devices, in_flight, memory)
    return Split(cuts, stage_seconds(chain, cuts, devices, link))


def require_stages(chain: Chain, count: int) -> None:
    """PartitionError if ``chain`` cannot be cut into ``count`` stages."""
    most = len(chain.positions()) - 1
    if most < count:
        raise PartitionError(
            f"the graph can be cut into {most} stages at most, not into {count}", hint="ask for fewer stages"
        )


class _Table:
    """The dynamic program over the positions that may be cut."""

    def __init__(self, chain: Chain, positions: np.ndarray, link: Link, memory: MemoryModel) -> None:
        self.chain, self.positions, self.memory = chain, positions, memory
        self.compute = np.concatenate([[0.0], np.cumsum(chain.seconds)])[positions]
        self.crossing = crossing_seconds(chain, link)[positions]
        self.saved = np.concatenate([[0.0], np.cumsum(chain.saved)])[positions]
        self.sent, self.returned = chain.sent[positions].copy(), chain.returned[positions].copy()
        for array in (self.sent, self.returned):
            array[0] = array[-1] = 0.0

    def greedy_bound(self, devices: Sequence[Device]) -> float:
        """The bottleneck of a split that follows the even share of compute: no best split is slower."""
        count, last = len(devices), len(self.positions) - 1
        share = np.cumsum([d.speed for d in devices]) / sum(d.speed for d in devices)
        ends: list[int] = []
        for index in range(count - 1):
            nearest = int(np.searchsorted(self.compute, share[index] * self.compute[-1]))
            ends.append(min(max(nearest, (ends[-1] if ends else 0) + 1), last - (count - 1 - index)))
        times = [
            (self.compute[b] - self.compute[a]) / d.speed + self.crossing[a] + self.crossing[b]
            for (a, b), d in zip(segments(ends, last), devices, strict=True)
        ]
        return float(max(times)) * (1 + 1e-9)  # rounding must not exclude the split it came from

    def solve(self, devices: Sequence[Device], in_flight: Sequence[int], bound: float) -> tuple[int, ...] | None:
        """The best cuts whose slowest stage takes at most ``bound``; None if there are none.

        All stages advance together: row s is the s-th stage, and what it builds on lies to the left.
        """
        count, stages = len(self.positions), np.arange(len(devices))
        speed, live, cap = (
            _rows(values) for values in ([d.speed for d in devices], in_flight, [d.memory for d in devices])
        )
        capped = bool(np.isfinite(cap).any())
        tracker = _DistinctWeights(self.chain, self.positions, self.memory.state)
        best = np.full((len(devices) + 1, count), np.inf)
        best[0, 0] = 0.0
        choices = np.zeros((len(devices), count), np.int64)
        lows = np.searchsorted(self.compute, self.compute - bound * speed.max(), "left")
        for j in range(1, count):
            low = int(lows[j])
            if capped:
                tracker.advance(j)
                low = self._first_that_fits(low, j, 1.0 if self.memory.recompute else live.min(), cap.max(), tracker)
            if low >= j:
                continue  # a single unit slower than the bound, or larger than any device
            window = slice(low, j)
            time = (self.compute[j] - self.compute[window]) / speed + (self.crossing[window] + self.crossing[j])
            value = np.maximum(best[:-1, window], time)
            if capped:
                value = np.where(self._bytes(window, j, live, tracker) > cap, np.inf, value)
            index = value.argmin(axis=1)
            reached = value[stages, index]
            best[1:, j] = np.where(reached <= bound, reached, np.inf)
            choices[:, j] = low + index
        if not np.isfinite(best[-1, -1]):
            return None
        cuts, j = [], count - 1
        for stage in reversed(stages[1:]):
            j = int(choices[stage, j])
            cuts.append(int(self.positions[j]))
        return tuple(reversed(cuts))

    def _first_that_fits(self, low: int, j: int, live: float, cap: float, weights: _DistinctWeights) -> int:
        """The first start from ``low`` on whose weights and activations fit, buffers aside: fewer units need less."""
        need = weights.bytes[low:j] + live * (self.saved[j] - self.saved[low:j])
        return low + int(np.searchsorted(-need, -cap, "left"))

    def _bytes(self, window: slice, j: int, live: Floats, weights: _DistinctWeights) -> Floats:
        saved = self.saved[j] - self.saved[window]
        kept = saved if self.memory.recompute else live * saved
        buffers = self.memory.microbatches * (self.sent[window] + self.returned[j])
        total: Floats = weights.bytes[window] + kept + buffers + live * self.sent[j]
        return total


def _rows(values: Sequence[float]) -> Floats:
    """A column with a row for each stage; a single row if all are the same."""
    column = np.array(values, np.float64)[:, None]
    return column[:1] if (column == column[0]).all() else column


class _DistinctWeights:
    """Bytes of distinct weights between every start and one stop that only advances."""

    def __init__(self, chain: Chain, positions: np.ndarray, state: float) -> None:
        self.bytes: Floats = np.zeros(len(positions))
        self._added: list[list[tuple[int, int, float]]] = [[] for _ in positions]
        for weight in chain.weights:
            size = weight.size * (state if weight.trainable else 1.0)
            previous = -1
            for user in weight.users:
                # A stage that starts after the previous user and not after this one sees the weight first here.
                low = int(np.searchsorted(positions, previous, "right")) if previous >= 0 else 0
                high = int(np.searchsorted(positions, user, "right"))
                self._added[high].append((low, high, size))
                previous = user

    def advance(self, stop: int) -> None:
        """Take the units before position number ``stop``; called with 1, 2, 3 and so on."""
        for low, high, size in self._added[stop]:
            self.bytes[low:high] += size


def misfit(chain: Chain, devices: Sequence[Device], in_flight: Sequence[int], memory: MemoryModel) -> PartitionError:
    """What does not fit: single units larger than the largest device, or all of it together."""
    largest = max(device.memory for device in devices)
    positions = chain.positions()
    too_large = []
    for start, stop in itertools.pairwise(positions):
        need = memory.total(chain, int(start), int(stop), min(in_flight))
        if need > largest:
            too_large.append(
                (need, chain.names[start] if stop == start + 1 else f"{chain.names[start]} … {chain.names[stop - 1]}")
            )
    if too_large:
        listed = ", ".join(f"{name} ({need / 2**20:.1f} MiB)" for need, name in sorted(too_large, reverse=True)[:5])
        return PartitionError(
            f"{len(too_large)} operators need more memory than a device has ({largest / 2**20:.1f} MiB): {listed}",
            hint="shard the weights over dp, use a smaller microbatch, or write such an operator as several smaller",
        )
    need = memory.fixed(chain, 0, len(chain.names)) / 2**20
    have = sum(device.memory for device in devices) / 2**20
    return PartitionError(
        f"no split into {len(devices)} stages fits: the model's state takes {need:.1f} MiB besides activations, "
        f"the devices have {have:.1f} MiB together",
        hint="use more stages, recomputation, a smaller microbatch, or fewer microbatches",
    )
