"""Where intermediate tensors lie in one block of memory: those alive at the same time never overlap.

Sizes may be expressions of sizes that only a run knows. So a plan is made for typical sizes (greedy by size, best fit:
Pisarchyk and Lee, "Efficient memory management for deep neural net inference", 2020), and what is kept of it is its
order from bottom to top: at run time each tensor starts where the highest of those below it ends that are alive
together with it. That is right for all sizes, and for known sizes it is the plan itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Life:
    """A tensor that is written first in step ``first`` and used last in step ``last``; ``size`` is a typical one."""

    first: int
    last: int
    size: int

    def meets(self, other: Life) -> bool:
        """Tell whether both are alive in one step."""
        return self.first <= other.last and other.first <= self.last


def stack(lives: Sequence[Life]) -> list[tuple[int, list[int]]]:
    """Return the tensors from bottom to top, each with those that it must lie directly above."""
    offsets: dict[int, int] = {}
    for i in sorted(range(len(lives)), key=lambda i: (-lives[i].size, i)):
        taken = sorted((offsets[j], offsets[j] + lives[j].size) for j in offsets if lives[i].meets(lives[j]))
        offsets[i] = _best_gap(taken, lives[i].size)
    order = sorted(offsets, key=lambda i: (offsets[i], i))
    under: dict[int, set[int]] = {}  # all that a tensor lies above, directly or not
    result = []
    for n, i in enumerate(order):
        direct: list[int] = []
        under[i] = set()
        for j in reversed(order[:n]):
            if lives[i].meets(lives[j]) and j not in under[i]:
                direct.append(j)
                under[i] |= under[j] | {j}
        result.append((i, direct))
    return result


def top(order: Sequence[tuple[int, list[int]]]) -> list[int]:
    """Return the tensors of a ``stack`` that nothing lies above."""
    covered = {j for _, below in order for j in below}
    return [i for i, _ in order if i not in covered]


def bound(lives: Sequence[Life]) -> int:
    """Return the bytes of all tensors in the step that has most of them alive: no plan takes less."""
    return max(
        (sum(life.size for life in lives if life.first <= n <= life.last) for n in {x.first for x in lives}), default=0
    )


def _best_gap(taken: Sequence[tuple[int, int]], size: int) -> int:
    """Return the start of the smallest gap between the intervals ``taken`` that fits, else the end of all."""
    best, smallest, end = None, 0, 0
    for start, stop in taken:
        gap = start - end
        if gap >= size and (best is None or gap < smallest):
            best, smallest = end, gap
        end = max(end, stop)
    return end if best is None else best
