"""How good a split is: against the least that any could reach, and against equal numbers of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from optc.passes.partition.chain import Chain, Device, Link
from optc.passes.partition.split import Split, stage_seconds


@dataclass(frozen=True)
class Balance:
    """Times of the slowest stage for one microbatch, in seconds.

    ``bound`` is what no split can go below: the larger of the even share and the longest part that cannot be cut.
    """

    bottleneck: float
    bound: float
    equal_layers: float | None

    def lines(self) -> list[str]:
        """The report in words, one statement a line."""
        lines = [f"slowest stage {self.bottleneck * 1e3:.3f} ms, lower bound {self.bound * 1e3:.3f} ms"]
        lines[0] += f" ({100 * (self.bottleneck / self.bound - 1):.1f} % above)" if self.bound > 0 else ""
        if self.equal_layers is not None:
            gain = 100 * (self.equal_layers / self.bottleneck - 1) if self.bottleneck > 0 else 0.0
            lines.append(f"equal layers would take {self.equal_layers * 1e3:.3f} ms ({gain:+.1f} %)")
        return lines


def lower_bound(chain: Chain, devices: Sequence[Device]) -> float:
    """Seconds that the slowest stage of any split takes at least, communication not counted."""
    total = np.concatenate([[0.0], np.cumsum(chain.seconds)])
    pieces = np.diff(total[chain.positions()])
    fastest = max(device.speed for device in devices)
    return max(float(total[-1]) / sum(device.speed for device in devices), float(pieces.max()) / fastest)


def equal_layer_cuts(chain: Chain, starts: Sequence[int], count: int) -> tuple[int, ...] | None:
    """Cuts that give each of ``count`` stages as many layers; ``starts`` are the first units of the layers.

    None if there are fewer layers than stages or if layers cannot be cut apart.
    """
    if len(starts) < count:
        return None
    positions = chain.positions()
    cuts = []
    for stage in range(1, count):
        at = int(np.searchsorted(positions, starts[round(stage * len(starts) / count)]))
        cuts.append(int(positions[min(at, len(positions) - 2)]))
    return tuple(cuts) if all(a < b for a, b in zip([0, *cuts], cuts, strict=False)) else None


def balance(chain: Chain, found: Split, devices: Sequence[Device], link: Link, starts: Sequence[int]) -> Balance:
    """Compare ``found`` with the lower bound and with equal layers."""
    equal = equal_layer_cuts(chain, starts, len(devices))
    return Balance(
        bottleneck=found.bottleneck,
        bound=lower_bound(chain, devices),
        equal_layers=None if equal is None else max(stage_seconds(chain, equal, devices, link)),
    )
