"""Contiguous stages whose slowest is as fast as it can be under memory caps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from optc.errors import PartitionError
from optc.passes.partition.chain import Chain, Device, Link, segments
from optc.passes.partition.dynamic import best_cuts, crossing_seconds
from optc.passes.partition.memory import Demand, MemoryModel


@dataclass(frozen=True)
class Split:
    """``cuts`` are the K - 1 positions between K stages, ``seconds`` each stage's compute plus communication."""

    cuts: tuple[int, ...]
    seconds: tuple[float, ...]

    @property
    def bottleneck(self) -> float:
        """Time of the slowest stage for one microbatch, in seconds."""
        return max(self.seconds)


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
    require_stages(chain, len(devices))
    cuts = best_cuts(chain, devices, link, in_flight, memory)
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


def misfit(chain: Chain, devices: Sequence[Device], in_flight: Sequence[int], memory: MemoryModel) -> PartitionError:
    """What does not fit: single units larger than the largest device, or all of it together."""
    largest = max(device.memory for device in devices)
    names, positions = chain.names, chain.positions()
    needs = Demand(chain, memory).pieces(min(in_flight))
    too_large = [
        (float(need), names[start] if stop == start + 1 else f"{names[start]} … {names[stop - 1]}")
        for need, (start, stop) in zip(needs, itertools.pairwise(positions), strict=True)
        if need > largest
    ]
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
