"""The loop nest of products of 8-bit integers: factors widened to int16 in scratch memory, a register tile of int32.

    for (batch, strip of rows, chunk of columns):        parallel
        strip[rows, K] = int16(row operand)              zero point subtracted
        for column tile of the chunk:
            for row tile of the strip:
                acc[MR, NR] = sum over pairs of depths of strip * int16(column operand)         registers
                out = epilogue(acc)

A factor of a row is widened once for all columns. Columns packed for the instruction are widened where they are read,
a vector for each vector of the tile; others are first gathered into a panel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from optc.backends.base import Target
from optc.backends.kernels import loops
from optc.backends.kernels.fused import Axes, Fused, Reader
from optc.backends.kernels.integer_contraction import PANEL_DEPTH, column_block
from optc.backends.kernels.integer_dot import ByteDot, Dot, put, vector_at
from optc.backends.kernels.integer_epilogue import Epilogue, Row
from optc.backends.kernels.integer_form import Form
from optc.backends.kernels.integer_rows import MatrixRows, Rows, WindowRows, tile_rows
from optc.backends.kernels.loops import bind, load, loop, sequence, static, store

Columns = tuple[Any, Any]
"""A buffer of packed columns and where those of a tile begin."""


@dataclass(frozen=True)
class Width:
    """How many columns of a tile are computed, a multiple of the vector, and how many there are: None if not known."""

    computed: int
    columns: int | None


class Product:
    """Writes the loop nest of one integer product for one target."""

    def __init__(self, fused: Fused, target: Target, dot: Dot | ByteDot, form: Form, strip_bytes: int) -> None:
        self.reader = Reader(fused)
        fused = self.reader.fused
        size = self.reader.size
        self.dot, self.target = dot, target
        notes = fused.core.annotations
        row_operand, self.column_operand = fused.core.body.value.b.a, fused.core.body.value.b.b
        self.packed = int(notes["optc.packed"])
        # Packed for the instruction: they are widened as they are read.
        self.direct = self.packed == self.dot.group
        positions = [int(i) for i in notes["optc.rows"]]
        axes, last = fused.spatial, len(fused.spatial.variables) - 1
        others = [i for i in range(last) if i not in positions]
        row_axes, self.columns, self.batch = (
            Axes([axes.variables[i] for i in chosen], [axes.extents[i] for i in chosen])
            for chosen in (positions, [last], others)
        )
        self.reduced = fused.reduced
        make = WindowRows if "optc.kernel" in notes else MatrixRows
        self.vector = self.grain = target.lanes(8 * form.size)
        self.n, self.b = size(self.columns.total), size(self.batch.total)
        batch = static(self.b)
        self.rows: Rows = make(fused, self.reader, row_axes, row_operand, form, self.vector, strip_bytes, batch)
        self.nr = self._column_block()
        self.mr = tile_rows(static(self.rows.height), self.dot.rows(self.nr))
        self.tiles = size(loops.ceildiv(self.n, self.nr))
        segments, chunk = self.rows.taps * self.rows.chunks, self.rows.chunk
        self.segments = size(segments)
        self.depth = size(segments * chunk)
        # Blocks of depth, of equal numbers of segments.
        most = max(1, PANEL_DEPTH // chunk)
        known = static(segments)
        self.per_block = most if known is None else -(-known // max(1, -(-known // most)))
        self.blocks = size(loops.ceildiv(self.segments, self.per_block))

    def _column_block(self) -> int:
        """Return how many columns make a tile: those that are packed together."""
        if not self.packed:
            return column_block(self.target, static(self.n))
        (source,) = loops.loads(self.column_operand)
        return int(source.source.shape[-2])

    def function(self) -> Any:
        """Return the function with its body replaced."""
        self.epilogue = Epilogue(self.reader, self.rows.axes.variables, self.nr, self.target)
        # At least two tasks, for two threads.
        alone = (static(self.rows.strips) or 1) * (static(self.b) or 1) == 1
        parts = 2 if alone and (static(self.tiles) or 2) > 1 else 1
        share = self.reader.size(loops.ceildiv(self.tiles, parts))
        inner = self.rows.strips * parts

        def task(o: Any) -> Any:
            return bind("b", o // inner, lambda b: bind("rest", o % inner, lambda rest: strip(b, rest)))

        def strip(b: Any, rest: Any) -> Any:
            def part(s: Any, c: Any) -> Any:
                return self._strip(b, s, c * share, share)

            return bind("strip", rest // parts, lambda s: bind("part", rest % parts, lambda c: part(s, c)))

        return self.reader.finish(loop("task", self.b * inner, task, "parallel"))

    def _strip(self, b: Any, s: Any, first: Any, share: Any) -> Any:
        """Return the work of one task: ``share`` column tiles from ``first`` of strip ``s``."""
        places = self.batch.at(b)
        rows, allocate_rows = self._allocate_rows()
        panel, allocate_panel = None, None
        if not self.direct:
            panel, allocate_panel = loops.scratch("panel", self.per_block * self.rows.chunk * self.nr, "int16")
        several = static(self.blocks) != 1
        row_tiles = loops.ceildiv(self.rows.count(s), self.mr)
        size = (loops.ceildiv(self.rows.height, self.mr) * self.mr if several else self.mr) * self.nr
        totals, allocate_totals = loops.scratch("totals", size, "int32")
        start = s * self.rows.height

        def body(here: Any, t: Any, width: Width) -> Any:
            def one(i: Any, columns: Columns) -> Any:
                def finish(acc: Any) -> Any:
                    count = loops.smaller(self.mr, here - i * self.mr)
                    return self._finish_tile(places, start + i * self.mr, count, t, width, acc, totals)

                return self._product(rows, i * self.mr, loops.index(0), self.segments, columns, width, None, finish)

            return self._with_columns(
                places,
                t,
                loops.index(0),
                self.segments,
                panel,
                lambda columns: loop("i", row_tiles, lambda i: one(i, columns)),
            )

        def body_in_blocks(here: Any, t: Any, width: Width) -> Any:
            def block(k: Any) -> Any:
                first = k * self.per_block
                count = loops.smaller(self.per_block, self.segments - first)

                def part(i: Any, columns: Columns) -> Any:
                    at = i * self.mr * self.nr
                    keep = (totals, at)

                    def finish(acc: Any) -> Any:
                        return self._keep(acc, totals, at, width)

                    return self._product(rows, i * self.mr, first, count, columns, width, keep, finish)

                return self._with_columns(
                    places, t, first, count, panel, lambda columns: loop("i", row_tiles, lambda i: part(i, columns))
                )

            begin = loop(
                "i",
                size // self.nr,
                lambda i: self.reader.lanewise(
                    self.nr, lambda j: store(totals, i * self.nr + j, load(self.epilogue.first, j))
                ),
            )
            return sequence(
                begin,
                loop("k", self.blocks, block),
                self._store(places, start, here, t, width, totals),
            )

        def tile(t: Any, width: Width) -> Any:
            make = body_in_blocks if several else body
            return sequence(
                self._prepare(places, t, width),
                bind("here", self.rows.count(s), lambda here: make(here, t, width)),
            )

        return sequence(
            allocate_rows,
            self.rows.widen(places, s, rows),
            allocate_panel,
            allocate_totals,
            *self.epilogue.allocations,
            self._over_columns(first, share, tile),
        )

    def _prepare(self, places: dict[Any, Any], t: Any, width: Width) -> Any:
        """Return the statement that makes the epilogue ready for column tile ``t``."""
        count = loops.smaller(self.nr, self.n - t * self.nr) if width.columns is None else width.columns
        return self.epilogue.prepare(lambda j: {**places, **self.columns.at(t * self.nr + j)}, count)

    def _over_columns(self, first: Any, share: Any, tile: Callable[[Any, Width], Any]) -> Any:
        """Return ``tile(t, width)`` for ``share`` column tiles from ``first``; only the last may be narrower."""
        n, nr, lanes = static(self.n), self.nr, self.dot.lanes

        def over(count: Any, width: Width) -> Any:
            return loop("t", count, lambda t: bind("tile", first + t, lambda t: tile(t, width)))

        if n is None or n % nr == 0:
            return over(loops.smaller(share, self.tiles - first), Width(nr, None if n is None else nr))
        full = n // nr
        last = tile(loops.index(full), Width(-(-(n % nr) // lanes) * lanes, n % nr))
        if static(share) == self.tiles:
            return sequence(over(loops.index(full), Width(nr, nr)) if full else None, last)
        whole = over(loops.smaller(share, full - first), Width(nr, nr)) if full else None
        return sequence(whole, tirx.IfThenElse(loops.index(first + share) > full, last, None))

    def _with_columns(
        self, places: dict[Any, Any], t: Any, first: Any, count: Any, panel: Any, use: Callable[[Columns], Any]
    ) -> Any:
        """Return ``use`` of ``count`` segments from ``first`` of column tile ``t``: packed ones where they lie."""
        if not self.direct:
            return sequence(self._widen_columns(places, t, first, count, panel), use((panel, loops.index(0))))
        packed = self._packed_tile(places, t)
        origin = packed.indices[0] + first * (self.rows.chunk * self.nr)
        return bind("origin", origin, lambda o: use((packed.source, o)))

    def _packed_tile(self, places: dict[Any, Any], t: Any) -> Any:
        """Return the flat read of the first element of packed column tile ``t``."""
        (source,) = loops.loads(self.column_operand)
        shape = source.source.shape
        first = tirx.BufferLoad(source.source, [*source.indices[: len(shape) - 4], t, 0, 0, 0])
        return self.reader.value(first, places)

    def _widen_columns(self, places: dict[Any, Any], t: Any, first: Any, count: Any, panel: Any) -> Any:
        """Return the copy of ``count`` segments from ``first`` of column tile ``t`` into the panel."""
        group, chunk = self.dot.group, self.rows.chunk

        def copy(packed: Any, origin: Any) -> Any:
            def element(k: Any, j: Any) -> Any:
                value = load(packed, origin + ((k // self.packed) * self.nr + j) * self.packed + k % self.packed)
                return store(panel, k * self.nr + j, value.astype("int16"))

            return groups(element)

        def groups(element: Callable[[Any, Any], Any]) -> Any:
            # Those that share a lane are written together: LLVM makes vectors of them.
            def lane(k: Any, j: Any) -> Any:
                return sequence(*(element(k * group + i, j) for i in range(group)))

            return loop("k", count * chunk // group, lambda k: loop("j", self.nr, lambda j: lane(k, j)))

        if self.packed:
            packed = self._packed_tile(places, t)
            origin = packed.indices[0] + first * (chunk * self.nr)
            return bind("origin", origin, lambda o: copy(packed.source, o))
        k_total = self.reader.size(self.reduced.total)

        def element(k: Any, j: Any) -> Any:
            at = first * chunk + k
            column = loops.smaller(t * self.nr + j, self.n - 1)
            where = {**places, **self.columns.at(column), **self.reduced.at(loops.smaller(at, k_total - 1))}
            value = self.reader.value(self.column_operand, where)
            if static(k_total) is None or static(self.depth) != static(k_total):
                value = tirx.Select(loops.index(at) < loops.index(k_total), value, tirx.const(0, "int32"))
            return store(panel, ((k // group) * self.nr + j) * group + k % group, value.astype("int16"))

        return groups(element)

    def _product(
        self,
        rows: Any,
        r: Any,
        first: Any,
        count: Any,
        columns: Columns,
        width: Width,
        keep: Any,
        finish: Callable[[Any], Any],
    ) -> Any:
        """Return the register tile of strip rows ``r`` and following over ``count`` segments from ``first``.

        It starts from what was kept, ``(buffer, position)``, or from the first sums where that is None, and goes to
        ``finish``.
        """
        lanes, group, nr, chunk = self.dot.lanes, self.dot.group, self.nr, self.rows.chunk
        acc, allocate = loops.tile("acc", self.mr, nr, "int32")
        vectors = [(i, v) for i in range(self.mr) for v in range(0, width.computed, lanes)]
        named, bases = self._bases(r)

        def segment(g: Any) -> Any:
            at = first + g
            offset = self.rows.offset(at // self.rows.chunks) + at % self.rows.chunks * chunk

            def step(k: Any, offset: Any, origin: Any) -> Any:
                def update(i: int, v: int) -> Any:
                    left = vector_at(rows, bases[i] + offset + k * group, group)
                    right = vector_at(columns[0], origin + (k * nr + v) * group, lanes * group)
                    right = right.astype(f"int16x{lanes * group}")
                    return put(acc[i], v, lanes, self.dot.add(vector_at(acc[i], v, lanes), left, right))

                return sequence(*(update(i, v) for i, v in vectors))

            def steps(offset: Any, origin: Any) -> Any:
                return loop("k", chunk // group, lambda k: step(k, offset, origin))

            return bind("offset", offset, lambda o: bind("start", columns[1] + g * (chunk * nr), lambda p: steps(o, p)))

        if keep is None:
            start = self.epilogue.first
            begin = sequence(*(put(acc[i], v, lanes, vector_at(start, v, lanes)) for i, v in vectors))
        else:
            kept, at = keep
            begin = sequence(*(put(acc[i], v, lanes, vector_at(kept, at + i * nr + v, lanes)) for i, v in vectors))
        return sequence(named, *allocate, begin, loop("segment", count, segment), finish(acc))

    def _allocate_rows(self) -> tuple[Any, Any]:
        """Return the buffer of a strip, with room for the rows that its last tile lacks, and its allocation.

        Its size is a multiple of ``grain``.
        """
        stride = self.rows.stride
        size = self.rows.size if stride is None else self.rows.size + stride * (self.mr - 1)
        return loops.scratch("rows", loops.ceildiv(size, self.grain) * self.grain, self.rows.form.dtype)

    def _bases(self, r: Any) -> tuple[Any, list[Any]]:
        """Return the statement that names where the rows of a tile from strip row ``r`` begin, and the names."""
        stride = self.rows.stride
        if stride is not None:
            first = tirx.Var("base", "int64")
            memory, allocate = loops.scratch("places", 1, "int64")
            named = [store(memory, 0, self.rows.base(r)), tirx.Bind(first, load(memory, 0))]
            return sequence(allocate, *named), [first + i * stride for i in range(self.mr)]
        bases = [tirx.Var(f"base{i}", "int64") for i in range(self.mr)]
        # Read from memory, where TVM's simplifier does not see what they are.
        places, allocate = loops.scratch("places", self.mr, "int64")
        named = [store(places, i, self.rows.base(r + i)) for i in range(self.mr)]
        named += [tirx.Bind(base, load(places, i)) for i, base in enumerate(bases)]
        return sequence(allocate, *named), bases

    def _keep(self, acc: Sequence[Any], memory: Any, to: Any, width: Width) -> Any:
        """Return the copy of the computed columns of a register tile to ``memory``, from position ``to``."""
        lanes = self.dot.lanes
        places = [(i, v) for i in range(self.mr) for v in range(0, width.computed, lanes)]
        return sequence(*(put(memory, to + i * self.nr + v, lanes, vector_at(acc[i], v, lanes)) for i, v in places))

    def _finish_tile(
        self, places: dict[Any, Any], first: Any, count: Any, t: Any, width: Width, acc: Sequence[Any], totals: Any
    ) -> Any:
        """Return the epilogue of one register tile, of which ``count`` rows exist: from registers if it is whole."""
        partial = sequence(self._keep(acc, totals, 0, width), self._store(places, first, count, t, width, totals))
        if width.columns is None or width.columns % self.dot.lanes:
            return partial
        rows = [self._row(places, first + i, t, acc[i], 0) for i in range(self.mr)]
        whole = self.epilogue.store(rows, width.columns, self.dot.lanes)
        total, height = static(self.rows.total), static(self.rows.height)
        if total is not None and height is not None and total % height == 0 and height % self.mr == 0:
            return whole
        return tirx.IfThenElse(loops.index(count) >= self.mr, whole, partial)

    def _row(self, places: dict[Any, Any], row: Any, t: Any, sums: Any, at: Any) -> Row:
        """Return row ``row`` of column tile ``t``, whose sums are in ``sums`` from ``at``."""
        axes, columns, first = self.rows.axes, self.columns, t * self.nr
        return Row(
            sums,
            at,
            lambda j: {**places, **axes.at(row), **columns.at(first + j)},
            lambda j: [(axes, row), (columns, first + j)],
        )

    def _store(self, places: dict[Any, Any], first: Any, count: Any, t: Any, width: Width, totals: Any) -> Any:
        """Return the epilogue of ``count`` rows from ``first``, which are in ``totals``."""
        nr, epilogue = self.nr, self.epilogue

        def each(one: Callable[[Row], Any]) -> Any:
            return loop("i", count, lambda i: one(self._row(places, first + i, t, totals, i * nr)))

        if width.columns is not None:
            columns = width.columns
            return each(lambda row: epilogue.store([row], columns, self.dot.lanes))
        whole = each(lambda row: epilogue.store([row], nr, self.dot.lanes))
        partial = each(lambda row: loop("j", self.n - t * nr, lambda j: epilogue.element(row, j)))
        return tirx.IfThenElse(loops.index((t + 1) * nr) <= loops.index(self.n), whole, partial)
