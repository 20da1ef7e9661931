"""The schedule of contractions of few rows whose columns are not packed: they are read once, as they lie.

    for (batch, block of columns):          parallel
        sums[rows, block] = 0
        for some k at a time:
            for vector of the block:
                sums[rows, vector] += row_operand[rows, k] * column_operand[k, vector]      all of these k
        out = epilogue(sums)

Packing would read and write what is needed only once. Sums stay in the first-level cache; each k is a stream of reads.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from optc.backends.base import Target
from optc.backends.kernels import loops
from optc.backends.kernels.contraction import TEMPLATE
from optc.backends.kernels.contraction_schedule import Generator
from optc.backends.kernels.few_rows import STREAMS
from optc.backends.kernels.fused import Fused, bits, take_apart
from optc.backends.kernels.loops import bind, load, loop, sequence, store

ROWS = 16
"""The most rows for which packing takes longer than it saves."""
_BLOCK = 1024
"""Columns of a block at most."""


def schedule(function: Any, target: Target) -> Any:
    """Return ``function`` as a loop nest, or None if it is not an unpacked contraction of a few rows over columns that
    are neighbours in memory.
    """
    fused = take_apart(function, TEMPLATE)
    if fused is None or int(fused.core.annotations["optc.packed"]):
        return None
    value = fused.core.body.value
    if not isinstance(value, tirx.Add) or not isinstance(value.b, tirx.Mul):
        return None
    if any(loops.static(e) == 0 for e in fused.spatial.extents) or len(fused.reduced.variables) != 1:
        return None
    generator = _Generator(fused, target)
    return generator.function() if generator.fits() else None


class _Generator(Generator):
    """Writes the loop nest of one contraction for one target."""

    def __init__(self, fused: Fused, target: Target) -> None:
        super().__init__(fused, target)
        columns = loops.static(self.n)
        # Two tasks at least, for two threads.
        share = -(-columns // 2) if columns is not None and loops.static(self.b) == 1 else columns or _BLOCK
        # Sums take half of the first-level cache.
        fit = target.caches.l1 // 2 // (bits(self.dtype) // 8 * (loops.static(self.r) or 1))
        self.width = max(self.lanes, min(_BLOCK, fit, share + self.lanes - 1) // self.lanes * self.lanes)

    def fits(self) -> bool:
        """Tell whether this schedule is for such a contraction."""
        rows = loops.static(self.r)
        return rows is not None and rows <= ROWS and len(self.columns.variables) == 1 and self.contiguous() == "flat"

    def function(self) -> Any:
        """Return the function with its body replaced."""
        self.whole_columns = True  # no tile sticks out
        blocks = self.reader.size(loops.ceildiv(self.n, self.width))

        def block(b: Any, position: Any) -> Any:
            here = loops.smaller(self.width, self.n - position * self.width)
            return bind("c", position * self.width, lambda c: bind("here", here, lambda h: self._block(b, c, h)))

        return self.reader.finish(self.tasks(blocks, block))

    def _block(self, b: Any, c: Any, here: Any) -> Any:
        places = self.batch.at(b)
        rows = int(self.r)
        sums, allocate = loops.scratch("sums", rows * self.width, self.dtype)
        zero = tirx.const(0, self.dtype)

        def product(i: int, j: Any, k: Any) -> Any:
            row, column = loops.index(i), c + j
            reduced = self.reduced.at(k)
            a = {**places, **self.rows.at(row), **reduced}
            b = {**places, **self.columns.at(column), **reduced}
            left = self.reader.value(self.row_operand, a, flat=[(self.rows, row), (self.reduced, k)])
            return left * self.reader.value(self.column_operand, b, flat=[(self.columns, column), (self.reduced, k)])

        def add(k: Any, count: int) -> Any:
            def element(i: int, j: Any) -> Any:
                total = load(sums, i * self.width + j)
                for u in range(count):
                    total = total + product(i, j, k + u)
                return store(sums, i * self.width + j, total)

            return self._over(here, element)

        def put(i: int, j: Any) -> Any:
            row, column = loops.index(i), c + j
            where = {**places, **self.rows.at(row), **self.columns.at(column)}
            value = load(sums, i * self.width + j)
            return self.reader.store(where, [(self.rows, row), (self.columns, column)], value)

        # With one row, factors of more streams fit in registers: sums are loaded and stored less often.
        streams = STREAMS * 2 if rows == 1 else STREAMS
        whole = self.k // streams
        return sequence(
            allocate,
            self._over(self.width, lambda i, j: store(sums, i * self.width + j, zero)),
            loop("k", whole, lambda k: add(k * streams, streams)),
            loop("k", self.k - whole * streams, lambda k: add(whole * streams + k, 1)),
            self._over(here, put),
        )

    def _over(self, columns: Any, element: Any) -> Any:
        """Return loops over vectors of ``columns``, then over single ones, of ``element(row, column)`` for all rows."""
        rows, vectors = range(int(self.r)), columns // self.lanes

        def vector(v: Any) -> Any:
            return sequence(
                *(self.reader.lanewise(self.lanes, lambda lane, i=i: element(i, v * self.lanes + lane)) for i in rows)
            )

        def single(j: Any) -> Any:
            return sequence(*(element(i, vectors * self.lanes + j) for i in rows))

        rest = loop("rest", columns - vectors * self.lanes, single) if columns is not self.width else None
        return sequence(loop("v", vectors, vector), rest)
