"""The schedule of products of 8-bit integers: factors widened to int16 in scratch memory, a register tile of int32.

    for (batch, strip of rows, chunk of columns):        parallel
        strip[rows, K] = int16(row operand)              zero point subtracted
        for column tile of the chunk:
            panel[K/2, 16, 2] = int16(column operand)
            for row tile of the strip:
                acc[MR, 16] = sum over pairs of depths of strip * panel         registers
                out = epilogue(acc)

Widening takes one conversion per factor, where the tile uses it 16 (a row's) or as often as there are rows (a
column's); in memory both stay 8 bits wide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from optc.backends.base import Target
from optc.backends.kernels import integer_dot, loops
from optc.backends.kernels.contraction import COLUMN_BLOCK
from optc.backends.kernels.fused import Axes, Fused, Reader, take_apart
from optc.backends.kernels.integer_contraction import DEPTH_BLOCK, TEMPLATE
from optc.backends.kernels.loops import bind, load, loop, sequence, static, store

STRIP_BYTES = 256 * 1024
"""Bytes of widened rows that stay in the second-level cache while all columns pass over them."""
_LEAST_ROWS = 64
"""Rows that pay for widening the columns once more."""
_ACCUMULATORS = 12
PANEL_DEPTH = 1024
"""Depths of a column tile that are widened together, into half of the first-level cache."""


def schedule(function: Any, target: Target) -> Any:
    """Return ``function`` as a tiled loop nest, or None if it is not one annotated product with its epilogue."""
    fused = take_apart(function, TEMPLATE)
    if fused is None or fused.padding is not None or len(fused.reduced.variables) != 1:
        return None
    value = fused.core.body.value
    if not isinstance(value, tirx.Add) or not isinstance(value.b, tirx.Mul):
        return None
    return _Generator(fused, target).function()


class _Generator:
    """Writes the loop nest of one integer product for one target."""

    def __init__(self, fused: Fused, target: Target) -> None:
        self.reader = Reader(fused)
        fused = self.reader.fused
        size = self.reader.size
        self.dot = integer_dot.choose(target)
        self.row_operand, self.column_operand = fused.core.body.value.b.a, fused.core.body.value.b.b
        self.packed = bool(int(fused.core.annotations["optc.packed"]))
        positions = [int(i) for i in fused.core.annotations["optc.rows"]]
        axes, last = fused.spatial, len(fused.spatial.variables) - 1
        others = [i for i in range(last) if i not in positions]
        self.rows, self.columns, self.batch = (
            Axes([axes.variables[i] for i in chosen], [axes.extents[i] for i in chosen])
            for chosen in (positions, [last], others)
        )
        self.reduced = fused.reduced
        self.r, self.n, self.b = size(self.rows.total), size(self.columns.total), size(self.batch.total)
        self.k = size(self.reduced.total)
        self.depth = size(loops.ceildiv(self.k, DEPTH_BLOCK) * DEPTH_BLOCK)
        self.nr = COLUMN_BLOCK
        self.mr = self._tile()
        self.whole_columns = static(self.n) is not None and self.n % self.nr == 0
        self.tiles = size(loops.ceildiv(self.n, self.nr))
        self.blocks, self.block = self._depth_blocks()
        self.height = self._strip_rows()
        self.strips = size(loops.ceildiv(self.r, self.height))

    def _tile(self) -> int:
        """Choose the rows of the register tile: least work in partial tiles, taller tiles preferred."""
        most = max(1, _ACCUMULATORS // (self.nr // self.dot.lanes))
        rows = static(self.r)
        if rows is None:
            return most
        return min(range(most, 0, -1), key=lambda m: -(-rows // m) * m * (1 + 0.3 / m))

    def _depth_blocks(self) -> tuple[Any, Any]:
        """Return the number of blocks of depth and how deep each is (the last may be less)."""
        depth = static(self.depth)
        if depth is None:
            return self.reader.size(loops.ceildiv(self.depth, PANEL_DEPTH)), PANEL_DEPTH
        blocks = max(1, -(-depth // PANEL_DEPTH))
        return blocks, -(-depth // (blocks * DEPTH_BLOCK)) * DEPTH_BLOCK

    def _strip_rows(self) -> int:
        """Return how many rows, whole tiles, are widened together."""
        depth, rows = static(self.depth), static(self.r)
        fit = max(_LEAST_ROWS, STRIP_BYTES // (2 * max(1, depth or 1024)))
        if rows is not None:
            # Strips of equal height.
            fit = -(-rows // max(1, -(-rows // fit)))
        return -(-fit // self.mr) * self.mr

    def function(self) -> Any:
        """Return the function with its body replaced."""
        # At least two tasks, for two threads.
        alone = (static(self.strips) or 1) * (static(self.b) or 1) == 1
        parts = 2 if alone and (static(self.tiles) or 2) > 1 else 1
        share = self.reader.size(loops.ceildiv(self.tiles, parts))

        def task(o: Any) -> Any:
            inner = self.strips * parts
            return bind("b", o // inner, lambda b: bind("rest", o % inner, lambda rest: strip(b, rest)))

        def strip(b: Any, rest: Any) -> Any:
            return bind(
                "strip",
                rest // parts,
                lambda s: bind("part", rest % parts, lambda c: self._strip(b, s, c * share, share)),
            )

        return self.reader.finish(loop("task", self.b * self.strips * parts, task, "parallel"))

    def _strip(self, b: Any, s: Any, first: Any, share: Any) -> Any:
        """Return the work of one task: ``share`` column tiles from ``first`` of strip ``s``."""
        places = self.batch.at(b)
        rows, allocate_rows = loops.scratch("rows", self.height * self.depth, "int16")
        panel, allocate_panel = loops.scratch("panel", self.block * self.nr, "int16")
        several = static(self.blocks) != 1
        totals, allocate_totals = loops.scratch("totals", (self.height if several else self.mr) * self.nr, "int32")
        start = s * self.height
        here = loops.smaller(self.height, self.r - start)
        row_tiles = loops.ceildiv(here, self.mr)

        def at_once(t: Any) -> Any:
            def one(i: Any) -> Any:
                count = loops.smaller(self.mr, here - i * self.mr)

                def finish(acc: Any) -> Any:
                    return self._finish_tile(places, start + i * self.mr, count, t, acc, totals)

                return self._product(rows, i * self.mr, loops.index(0), self.block, panel, None, 0, finish)

            return sequence(self._widen_columns(places, t, 0, self.block, panel), loop("i", row_tiles, one))

        def block_by_block(t: Any) -> Any:
            def block(k: Any) -> Any:
                depth = loops.smaller(self.block, self.depth - k * self.block)

                def part(i: Any) -> Any:
                    row = i * self.mr
                    return self._product(
                        rows,
                        row,
                        k * self.block,
                        depth,
                        panel,
                        totals,
                        row,
                        lambda acc: self._copy(acc, 0, totals, row * self.nr),
                    )

                return sequence(
                    self._widen_columns(places, t, k * self.block, depth, panel), loop("i", row_tiles, part)
                )

            zero = tirx.const(0, "int32")
            return sequence(
                loop("i", self.height * self.nr, lambda i: store(totals, i, zero)),
                loop("k", self.blocks, block),
                self._store(places, start, here, t, totals),
            )

        tile = block_by_block if several else at_once
        return sequence(
            allocate_rows,
            loop("r", here, lambda r: self._widen_row(places, start + r, r, rows)),
            allocate_panel,
            allocate_totals,
            loop("t", loops.smaller(share, self.tiles - first), lambda t: bind("tile", first + t, tile)),
        )

    def _widen_row(self, places: dict[Any, Any], row: Any, r: Any, rows: Any) -> Any:
        where = {**places, **self.rows.at(row)}

        def element(k: Any) -> Any:
            value = self.reader.value(self.row_operand, {**where, **self.reduced.at(k)}, flat=[(self.rows, row)])
            return store(rows, r * self.depth + k, value.astype("int16"))

        return self._spans(self.k, element)

    def _spans(self, extent: Any, element: Any) -> Any:
        """Return vector loops over ``extent``, then single elements."""
        lanes = 2 * self.dot.lanes
        vectors, rest = extent // lanes, extent % lanes
        whole = loop("v", vectors, lambda v: self.reader.lanewise(lanes, lambda lane: element(v * lanes + lane)))
        if static(vectors) == 0:
            whole = None
        if static(rest) == 0:
            return whole
        return sequence(whole, loop("rest", rest, lambda j: element(vectors * lanes + j)))

    def _widen_columns(self, places: dict[Any, Any], t: Any, first: Any, depth: Any, panel: Any) -> Any:
        """Return the copy of ``depth`` depths from ``first`` of column tile ``t`` into the panel."""
        group = self.dot.group
        packed = self.reader.flat_view(loops.loads(self.column_operand)[0].source) if self.packed else None
        if packed is not None and group == 2:
            origin = (t * self.depth + first) * self.nr
            return self._spans(depth * self.nr, lambda i: store(panel, i, load(packed, origin + i).astype("int16")))

        def element(k: Any, j: Any) -> Any:
            at = first + k
            if packed is not None:
                value = load(packed, ((t * (self.depth // 2) + at // 2) * self.nr + j) * 2 + at % 2)
            else:
                column = loops.smaller(t * self.nr + j, self.n - 1)
                where = {**places, **self.columns.at(column), **self.reduced.at(loops.smaller(at, self.k - 1))}
                value = self.reader.value(self.column_operand, where)
                if static(self.k) is None or self.k % DEPTH_BLOCK:
                    value = tirx.Select(loops.index(at) < loops.index(self.k), value, tirx.const(0, "int32"))
            return store(panel, ((k // group) * self.nr + j) * group + k % group, value.astype("int16"))

        return loop("k", depth, lambda k: loop("j", self.nr, lambda j: element(k, j)))

    def _product(
        self, rows: Any, r: Any, first: Any, depth: Any, panel: Any, totals: Any, at: Any, finish: Callable[[Any], Any]
    ) -> Any:
        """Return the register tile of strip rows ``r`` and following over ``depth`` depths from ``first``.

        It starts from the totals of rows ``at`` and following, or from 0 where there are none, and is handed to
        ``finish``.
        """
        lanes, group, nr = self.dot.lanes, self.dot.group, self.nr
        acc, allocate = loops.scratch("acc", self.mr * nr, "int32")
        vectors = [(i, v) for i in range(self.mr) for v in range(0, nr, lanes)]

        def step(k: Any) -> Any:
            def update(i: int, v: int) -> Any:
                left = _vector(rows, (r + i) * self.depth + first + k * group, group)
                right = _vector(panel, (k * nr + v) * group, lanes * group)
                return _put(acc, i * nr + v, lanes, self.dot.add(_vector(acc, i * nr + v, lanes), left, right))

            return sequence(*(update(i, v) for i, v in vectors))

        if totals is None:
            zero = tirx.Broadcast(tirx.const(0, "int32"), lanes)
            begin = sequence(*(_put(acc, i * nr + v, lanes, zero) for i, v in vectors))
        else:
            begin = self._copy(totals, at * nr, acc, 0)
        return sequence(allocate, begin, loop("k", depth // group, step), finish(acc))

    def _copy(self, source: Any, start: Any, target: Any, to: Any) -> Any:
        """Return the copy of one register tile."""
        lanes = self.dot.lanes
        positions = range(0, self.mr * self.nr, lanes)
        return sequence(*(_put(target, to + p, lanes, _vector(source, start + p, lanes)) for p in positions))

    def _finish_tile(self, places: dict[Any, Any], first: Any, count: Any, t: Any, acc: Any, totals: Any) -> Any:
        """Return the epilogue of one register tile, of which ``count`` rows exist: from registers if it is whole."""
        partial = sequence(self._copy(acc, 0, totals, 0), self._store(places, first, count, t, totals))
        if not self.whole_columns:
            return partial
        rows = static(self.r)
        whole = sequence(*(self._store(places, first + i, 1, t, acc, i) for i in range(self.mr)))
        if rows is not None and rows % self.height == 0 and self.height % self.mr == 0:
            return whole
        return tirx.IfThenElse(loops.index(count) >= self.mr, whole, partial)

    def _store(self, places: dict[Any, Any], first: Any, count: Any, t: Any, totals: Any, at: int = 0) -> Any:
        """Return the epilogue of ``count`` rows from ``first``, which are in ``totals`` from row ``at``."""
        nr = self.nr

        def put(i: Any, j: Any) -> Any:
            row, column = first + i, t * nr + j
            where = {**places, **self.rows.at(row), **self.columns.at(column)}
            return self.reader.store(where, [(self.rows, row), (self.columns, column)], load(totals, (at + i) * nr + j))

        whole = loop("i", count, lambda i: self.reader.lanewise(nr, lambda j: put(i, j)))
        if self.whole_columns:
            return whole
        partial = loop("i", count, lambda i: loop("j", self.n - t * nr, lambda j: put(i, j)))
        return tirx.IfThenElse(loops.index((t + 1) * nr) <= loops.index(self.n), whole, partial)


def _vector(buffer: Any, position: Any, lanes: int) -> Any:
    """Return the load of ``lanes`` neighbours."""
    if lanes == 1:
        return load(buffer, position)
    return tirx.BufferLoad(buffer, [tirx.Ramp(loops.index(position), loops.index(1), lanes)])


def _put(buffer: Any, position: Any, lanes: int, value: Any) -> Any:
    """Return the store of ``lanes`` neighbours."""
    if lanes == 1:
        return store(buffer, position, value)
    return tirx.BufferStore(buffer, value, [tirx.Ramp(loops.index(position), loops.index(1), lanes)])
