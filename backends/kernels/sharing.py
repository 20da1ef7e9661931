"""How the tiles of a matrix product are shared: tasks of a chunk of row tiles times a group of column tiles.

A parallel loop gives each thread a run of neighbouring tasks, as many to each of them but the last ones. How long a
product takes is how long its busiest thread does. Nobody knows while compiling how many threads there will be, so what
counts is the mean over several numbers of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from optc.backends.kernels.decisions import counts

THREADS = (1, 2, 4, 8)
TASK_WORK = 200_000
"""Multiply-adds below which a task is not worth its own thread."""
_MOST = 128
_PANEL, _ROWS = 0.25, 0.02
"""What reading a panel for a chunk takes, and the rows of a tile for a group, where one tile of the product is 1."""
_BATCH = 64
"""A batch of more is as good as one of this many: there is something for every thread."""


@dataclass(frozen=True)
class Product:
    """A product for every element of ``batch``, in tiles; the last column tile may be the part ``last`` of a whole one.

    ``work`` are the multiply-adds of all. ``unpack`` is what making a panel ready takes, in tiles, for every chunk.
    """

    batch: int
    row_tiles: int
    column_tiles: int
    last: float
    work: int
    unpack: float = 0.0

    @property
    def threads(self) -> list[int]:
        """The numbers of threads for which there is work."""
        return [t for t in THREADS if t == 1 or t * TASK_WORK <= self.work]

    def cost(self, chunk: int, groups: int) -> float:
        """Return the mean, over numbers of threads, of the busiest one's time relative to an even share of tiles."""
        rows = np.full(-(-self.row_tiles // chunk), float(chunk))
        rows[-1] = self.row_tiles - chunk * (len(rows) - 1)
        group = -(-self.column_tiles // groups)
        columns = np.full(-(-self.column_tiles // group), float(group))
        columns[-1] = self.column_tiles - group * (len(columns) - 1) - 1 + self.last
        # A thread that goes on to the next group has its rows at hand; the next chunk needs all panels again.
        task = np.outer(rows + _PANEL + self.unpack, columns + _ROWS).ravel()
        done = np.concatenate([[0.0], np.cumsum(np.tile(task, min(self.batch, _BATCH)))])
        whole = min(self.batch, _BATCH) * self.row_tiles * (self.column_tiles - 1 + self.last)
        return float(np.mean([threads * _busiest(done, threads) / whole for threads in self.threads]))


def _busiest(done: np.ndarray, threads: int) -> float:
    """Return the work of the busiest of ``threads`` from the sums of that of the first tasks."""
    tasks = len(done) - 1
    bounds = np.minimum(np.arange(threads + 1) * -(-tasks // threads), tasks)
    return float(np.diff(done[bounds]).max())


def chunks_of(row_tiles: int) -> list[int]:
    """Return the heights of chunks to choose from, in row tiles."""
    return sorted({-(-row_tiles // n) for n in counts(min(_MOST, row_tiles))})


def groups_of(column_tiles: int) -> list[int]:
    """Return the numbers of groups to choose from; columns come in whole tiles, so some are the same as others."""
    most = min(_MOST, column_tiles)
    return sorted({-(-column_tiles // -(-column_tiles // n)) for n in (*counts(most), most)})


@lru_cache(maxsize=4096)
def best_chunk(product: Product, most: int) -> int:
    """Return the height of chunks, at most ``most`` row tiles, that with the best groups costs least."""
    heights = [chunk for chunk in chunks_of(product.row_tiles) if chunk <= most] or [most]
    return min(heights, key=lambda chunk: (product.cost(chunk, best_groups(product, chunk, 1)), -chunk))


@lru_cache(maxsize=4096)
def best_groups(product: Product, chunk: int, least: int) -> int:
    """Return the number of groups, at least ``least``, that costs least with chunks of this height."""
    numbers: Sequence[int] = [n for n in groups_of(product.column_tiles) if n >= least] or [least]
    return min(numbers, key=lambda groups: (product.cost(chunk, groups), groups))
