"""The schedule of contractions: packed panels, a register tile of accumulators, the epilogue on the tile.

    for (batch, chunk of columns):      parallel
        pack the chunk's column operand into panels [tile, K, NR]
        for row tile, for column tile of the chunk:
            acc[MR, NR] = sum over k of row_operand[MR, k] * panel[k, NR]       registers
            out = epilogue(acc)

This is the structure of Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (2008), without
blocking of K. Extents may be symbolic: tiles that stick out read clamped rows and columns and store what is inside.
Columns that were packed while compiling take ``packed_schedule.py``.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

from optc.backends.base import Target
from optc.backends.kernels import loops, register_tile, sharing
from optc.backends.kernels.contraction import TEMPLATE
from optc.backends.kernels.fused import Axes, Fused, Reader, bits, take_apart
from optc.backends.kernels.loops import bind, load, loop, replace, sequence, store
from optc.backends.kernels.packed_schedule import PackedGenerator


def schedule(function: Any, target: Target) -> Any:
    """Return ``function`` as a tiled loop nest, or None if it is not one annotated contraction with its epilogue."""
    fused = take_apart(function, TEMPLATE)
    if fused is None:
        return None
    value = fused.core.body.value
    if not isinstance(value, tirx.Add) or not isinstance(value.b, tirx.Mul):
        return None
    if any(loops.static(e) == 0 for e in fused.spatial.extents):
        return function.with_body(tirx.Evaluate(0)) if fused.tail is None else None
    if int(fused.core.annotations["optc.packed"]):
        return PackedGenerator(fused, target).function()
    return Generator(fused, target).function()


class Generator:
    """Writes the loop nest of one contraction for one target."""

    def __init__(self, fused: Fused, target: Target) -> None:
        self.reader = Reader(fused)
        fused = self.reader.fused
        self.row_operand, self.column_operand = fused.core.body.value.b.a, fused.core.body.value.b.b
        rows = [int(i) for i in fused.core.annotations["optc.rows"]]
        across = [int(i) for i in fused.core.annotations["optc.columns"]]
        batch = [i for i in range(len(fused.spatial.variables)) if i not in rows and i not in across]
        self.rows, self.columns, self.batch = (self._pick(fused, axes) for axes in (rows, across, batch))
        self.reduced = fused.reduced
        self.dtype = str(fused.accumulator.dtype)
        size = self.reader.size
        self.r, self.n = size(self.rows.total), size(self.columns.total)
        self.k, self.b = size(self.reduced.total), size(self.batch.total)
        self.lanes = target.lanes(bits(self.dtype))
        columns = loops.static(self.n)
        vectors = 1 if columns is not None and columns <= self.lanes else 2
        self.mr = register_tile.tile_rows(loops.static(self.r), loops.static(self.k), vectors, target)
        self.nr = vectors * self.lanes
        # Packed columns stay in the second-level cache while all rows pass over them.
        self.panel_bytes = target.caches.l2 // 2
        self.whole_columns = loops.static(self.n) is not None and self.n % self.nr == 0
        self.tiles = size(loops.ceildiv(self.n, self.nr))
        self.row_tiles = size(loops.ceildiv(self.r, self.mr))

    @staticmethod
    def _pick(fused: Fused, positions: list[int]) -> Axes:
        axes = fused.spatial
        return Axes([axes.variables[i] for i in positions], [axes.extents[i] for i in positions])

    def function(self) -> Any:
        """Return the function with its body replaced."""
        return self.reader.finish(self._chunks())

    def tasks(self, inner: Any, body: Any) -> Any:
        """Return the parallel loop over batch and ``inner``: ``body(batch position, inner position)``."""

        def task(o: Any) -> Any:
            if loops.static(self.b) == 1:
                return sequence(*self.spare, body(loops.index(0), o))
            rest = bind("b", o // inner, lambda b: bind("position", o % inner, lambda i: body(b, i)))
            return sequence(*self.spare, rest)

        # Accumulators indexed by a variable would leave their registers: a partial column tile copies them here.
        self.tail, allocate = loops.scratch("tail", self.mr * self.nr, self.dtype)
        self.spare = [] if self.whole_columns else [allocate]
        return loop("task", self.b * inner, task, "parallel")

    def _chunks(self) -> Any:
        """Pack a chunk of columns, pass all rows over it."""
        count = self._chunk_tiles()
        chunks = self.reader.size(loops.ceildiv(self.tiles, count))

        def chunk(b: Any, position: Any) -> Any:
            return bind("first", position * count, lambda first: body(b, first))

        def body(b: Any, first: Any) -> Any:
            here = loops.smaller(count, self.tiles - first) if count != 1 else 1
            places = self.batch.at(b)
            panel, allocate = loops.scratch("panel", self.k * (count * self.nr), self.dtype)

            def micro(r: Any, t: Any) -> Any:
                def tile(position: Any, origin: Any) -> Any:
                    return self._micro(places, r, position, lambda k, lane: load(panel, origin + k * self.nr + lane))

                return bind("tile", first + t, lambda p: bind("origin", t * self.k * self.nr, lambda o: tile(p, o)))

            return sequence(
                allocate,
                loop("t", here, lambda t: self._pack(places, panel, first, t)),
                loop("r", self.row_tiles, lambda r: loop("t", here, lambda t: micro(r, t))),
            )

        return self.tasks(chunks, chunk)

    def _chunk_tiles(self) -> int:
        """Return how many column tiles are packed together."""
        depth, tiles = loops.static(self.k), loops.static(self.tiles)
        fit = 4 if depth is None else self.panel_bytes // max(1, depth * self.nr * bits(self.dtype) // 8)
        if tiles is None:
            return max(1, min(fit, 8))
        fit = max(1, min(fit, tiles))
        batch, rows, row_tiles = (loops.static(v) for v in (self.b, self.r, self.row_tiles))
        if not batch or not rows or not row_tiles or not tiles:
            groups = max(-(-tiles // fit), 1 if batch and batch > 1 else 2)
        else:
            work = batch * rows * tiles * self.nr * (depth or register_tile.DEPTH)
            product = sharing.Product(batch, row_tiles, tiles, 1.0, work)
            groups = sharing.best_groups(product, row_tiles, -(-tiles // fit))
        return max(1, -(-tiles // groups))

    def _pack(self, places: dict[Any, Any], panel: Any, first: Any, t: Any) -> Any:
        """Copy one column tile into its panel, vector by vector where neighbours in memory allow it."""
        lanes, columns = self.lanes, self.columns
        contiguous = self.contiguous()

        def element(v: Any, lane: Any, k: Any, at_k: dict[Any, Any], column: Any, where: dict[Any, Any]) -> Any:
            value = self.reader.value(
                self.column_operand, {**places, **where, **at_k}, flat=[(columns, column), (self.reduced, k)]
            )
            return store(panel, (t * self.k + k) * self.nr + v * lanes + lane, value)

        def vector(v: Any, c: Any) -> Any:
            named, bindings = _name(columns, c)
            last = columns.variables[-1]

            def at(k: Any, at_k: dict[Any, Any]) -> Any:
                return self.reader.lanewise(
                    lanes, lambda lane: element(v, lane, k, at_k, c + lane, {**named, last: named[last] + lane})
                )

            return sequence(*bindings, self._over_reduced(at))

        def scalars(v: Any, c: Any) -> Any:
            # The coordinates of each lane are computed once, not for every k.
            placed = []
            for lane in range(lanes):
                column = tirx.Var("column", "int64")
                named, bindings = _name(columns, column)
                clamped = tirx.Bind(column, loops.index(loops.smaller(c + lane, self.n - 1)))
                placed.append((lane, column, named, [clamped, *bindings]))

            def at(k: Any, at_k: dict[Any, Any]) -> Any:
                return sequence(*(element(v, lane, k, at_k, col, where) for lane, col, where, _ in placed))

            return sequence(*(b for *_, bindings in placed for b in bindings), self._over_reduced(at))

        def segment(v: Any, c: Any) -> Any:
            if contiguous is None:
                return scalars(v, c)
            if contiguous == "flat" and self.whole_columns:
                return vector(v, c)
            inside = c + lanes <= loops.index(self.n)
            if contiguous == "row":
                width = loops.index(columns.extents[-1])
                inside = tirx.all(inside, c % width + lanes <= width)
            return tirx.IfThenElse(inside, vector(v, c), scalars(v, c))

        def place(v: Any) -> Any:
            return bind("c", (first + t) * self.nr + v * lanes, lambda c: segment(v, c))

        return loop("segment", self.nr // lanes, place)

    def contiguous(self) -> str | None:
        """Tell whether neighbouring columns are neighbours in memory: all ("flat"), within a "row", or None."""
        reader, columns = self.reader, self.columns
        calls: list[Any] = []
        tvm_ffi.structural_walk(self.column_operand, (tvm.ir.Call, lambda call: calls.append(call)))
        if calls:
            return None
        loads: list[Any] = []
        tvm_ffi.structural_walk(self.column_operand, (tvm.ir.TensorLoad, lambda x: loads.append(x)))
        if all(reader.collapse(x, columns) is not None for x in loads):
            flat = tirx.Var("flat", "int64")
            # A run of one axis is not replaced by its flat position, so its variable is.
            names = {columns.variables[0]: flat} if len(columns.variables) == 1 else {}
            offsets = [replace(reader.flatten(x, [(columns, flat)]).indices[0], names) for x in loads]
            return "flat" if all(reader.unit_step(offset, flat) for offset in offsets) else None
        last = columns.variables[-1]
        return "row" if all(reader.unit_step(reader.flatten(x, []).indices[0], last) for x in loads) else None

    def _over_reduced(self, body: Any) -> Any:
        """Loops over the reduced axes, giving the flat position and the value of each variable."""
        axes = self.reduced

        def nest(position: int, flat: Any, at: dict[Any, Any]) -> Any:
            if position == len(axes.variables):
                return body(flat, at)
            extent, variable = axes.extents[position], axes.variables[position]
            return loop("k", extent, lambda k: nest(position + 1, flat * extent + k, {**at, variable: k}))

        return nest(0, loops.index(0), {})

    def _micro(self, places: dict[Any, Any], r: Any, t: Any, column: Any) -> Any:
        """Return the register tile of row tile ``r`` and column tile ``t``, with its epilogue."""
        lanes = self.lanes
        acc, allocate = loops.tile("acc", self.mr, self.nr, self.dtype)
        vectors = [(i, v) for i in range(self.mr) for v in range(0, self.nr, lanes)]
        zero = tirx.const(0, self.dtype)
        exact = loops.static(self.r) is not None and self.r % self.mr == 0

        def row(i: int, k: Any) -> Any:
            position = r * self.mr + i
            if not exact:
                position = loops.smaller(position, self.r - 1)
            where = {**places, **self.rows.at(position), **self.reduced.at(k)}
            return self.reader.value(self.row_operand, where, flat=[(self.rows, position), (self.reduced, k)])

        def clear(i: int, v: int) -> Any:
            return self.reader.lanewise(lanes, lambda lane: store(acc[i], v + lane, zero))

        def update(i: int, v: int, k: Any) -> Any:
            def element(lane: Any) -> Any:
                return store(acc[i], v + lane, load(acc[i], v + lane) + row(i, k) * column(k, v + lane))

            return self.reader.lanewise(lanes, element)

        return sequence(
            *allocate,
            *(clear(i, v) for i, v in vectors),
            loop("k", self.k, lambda k: sequence(*(update(i, v, k) for i, v in vectors))),
            self._store(places, r, t, acc, exact),
        )

    def _store(self, places: dict[Any, Any], r: Any, t: Any, acc: Any, exact: bool) -> Any:
        """Return the epilogue: vectors in a whole column tile, element by element in the last, partial one."""
        mr, nr, lanes = self.mr, self.nr, self.lanes

        def put(value: Any, i: Any, j: Any) -> Any:
            row, column = r * mr + i, t * nr + j
            where = {**places, **self.rows.at(row), **self.columns.at(column)}
            flat = [(self.rows, row), (self.columns, column)]
            return self.reader.store(where, flat, value)

        def guarded(i: Any, statement: Any) -> Any:
            if exact:
                return statement
            return tirx.IfThenElse(loops.index(r * mr + i) < loops.index(self.r), statement, None)

        def vectors(i: int) -> Any:
            return sequence(
                *(
                    self.reader.lanewise(lanes, lambda lane, v=v: put(load(acc[i], v + lane), i, v + lane))
                    for v in range(0, nr, lanes)
                )
            )

        whole = sequence(*(guarded(i, vectors(i)) for i in range(mr)))
        if self.whole_columns:
            return whole
        tail = self.tail
        copies = [
            self.reader.lanewise(lanes, lambda lane, i=i, v=v: store(tail, i * nr + v + lane, load(acc[i], v + lane)))
            for i in range(mr)
            for v in range(0, nr, lanes)
        ]
        here = loops.smaller(nr, self.n - t * nr)
        partial = loop("i", mr, lambda i: guarded(i, loop("j", here, lambda j: put(load(tail, i * nr + j), i, j))))
        inside = loops.index((t + 1) * nr) <= loops.index(self.n)
        return tirx.IfThenElse(inside, whole, sequence(*copies, partial))


def _name(axes: Axes, flat: Any) -> tuple[dict[Any, Any], list[Any]]:
    """Return a fresh variable for each coordinate of position ``flat``, and the statements that bind them."""
    named = {variable: tirx.Var(f"c{i}", "int64") for i, variable in enumerate(axes.variables)}
    places = axes.at(flat)
    return named, [tirx.Bind(named[variable], loops.index(places[variable])) for variable in axes.variables]
