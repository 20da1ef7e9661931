"""The schedule of contractions whose column operand was packed into panels while compiling.

    for (batch, chunk of row tiles, group of column tiles):      parallel
        for block of k, for column tile of the group, for row tile of the chunk:
            acc[MR, NR] = sums[tile] + sum over k of row_operand[MR, k] * panel[k, NR]       registers
            sums[tile] = acc, or after the last block: out = epilogue(acc)

A chunk's rows stay in the second-level cache while all panels of the group pass over them, and each panel is read
once for each chunk. Few terms are one block, and there are no sums in memory. The row operand may gather (a
convolution reads pixels): an address is the sum of a part that depends on the row, computed once per tile, and one
that depends on k. Rows may be symbolic: a tile that sticks out reads the last row again and stores what is inside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

from optc.backends.base import Target
from optc.backends.kernels import loops, register_tile, sharing
from optc.backends.kernels.border import border_of
from optc.backends.kernels.decisions import counts, decide
from optc.backends.kernels.fused import Axes, Fused, Reader, bits
from optc.backends.kernels.loops import bind, load, loop, replace, sequence, static, store

_TASKS = 8
"""Tasks to make where only a run knows the rows: they divide evenly among 2, 4 or 8 threads."""
_LINE = 64
"""Bytes of a cache line."""
_CHUNK_TILES = 8
"""Row tiles of a chunk that pay for reading the panels once more."""
_CHUNK_ROWS = 64
"""Rows that a chunk has room for at least: k is cut into blocks so that they fit."""


def _cost(product: sharing.Product, chunk: int) -> float:
    return product.cost(chunk, sharing.best_groups(product, chunk, 1))


def far(size: int, target: Target) -> bool:
    """Tell whether ``size`` bytes of panels are worth fetching ahead, if they are not for the first-level cache.

    In each run of a network they come from beyond the second-level one, which the kernels before have filled.
    """
    return size > target.caches.l1


def _larger(a: Any, b: Any) -> Any:
    return tirx.max(loops.index(a), loops.index(b))


def prefetch(view: Any, start: Any, count: int) -> Any:
    """Return the statement that moves ``count`` elements of a flat buffer to the second-level cache."""
    read, locality, data = (tirx.const(v, "int32") for v in (0, 2, 1))

    def line(at: int) -> Any:
        address = tirx.address_of(load(view, start + at))
        return tirx.Evaluate(tirx.call_intrin("void", "tirx.prefetch", address, read, locality, data))

    return sequence(*(line(at) for at in range(0, count, _LINE * 8 // bits(str(view.dtype)))))


@dataclass(frozen=True)
class Block:
    """Steps of the outermost reduced axis."""

    begin: Any
    count: Any


class PackedGenerator:
    """Writes the loop nest of one contraction with packed columns for one target."""

    unpack_cost = 0.0
    """What ``_unpack`` takes for a panel, in the time of a tile of the product."""

    def __init__(self, fused: Fused, target: Target) -> None:
        self.reader = Reader(fused)
        self.fused = fused = self.reader.fused
        self.row_operand, self.column_operand = fused.core.body.value.b.a, fused.core.body.value.b.b
        annotations = fused.core.annotations
        rows, columns = ([int(i) for i in annotations[f"optc.{key}"]] for key in ("rows", "columns"))
        batch = [i for i in range(len(fused.spatial.variables)) if i not in rows and i not in columns]
        self.rows, self.columns, self.batch = (_pick(fused.spatial, axes) for axes in (rows, columns, batch))
        self.reduced = fused.reduced
        self.dtype = str(fused.accumulator.dtype)
        size = self.reader.size
        self.r, self.b = size(self.rows.total), size(self.batch.total)
        self.n, self.k = int(self.columns.total), int(self.reduced.total)
        # Bytes of the row operand that stay in the second-level cache while panels pass over them, and of sums.
        self.chunk_bytes, self.sums_bytes = target.caches.l2 * 3 // 8, target.caches.l2 // 2
        self.outer = int(self.reduced.extents[0]) if self.reduced.extents else 1
        self.inner = self.k // max(1, self.outer)
        # Blocks are whole steps of the outermost axis: k itself, or lines of a convolution's window.
        depth = max(1, self.chunk_bytes // (4 * _CHUNK_ROWS))
        blocks = min(self.outer, -(-self.k // depth)) if self.k else 1
        self.step = -(-self.outer // max(1, decide("blocks", blocks, counts(min(8, self.outer)))))
        self.blocks = -(-self.outer // self.step)
        self.nr = int(loops.loads(self.column_operand)[0].source.shape[-1])
        self.lanes = register_tile.panel_lanes(self.nr, bits(self.dtype), target)
        vectors = -(-self.nr // self.lanes)
        self.mr = register_tile.decide_rows(static(self.r), self.k, min(vectors, -(-self.n // self.lanes)), target)
        self.row_tiles = size(loops.ceildiv(self.r, self.mr))
        self.whole_tiles, self.column_tiles = self.n // self.nr, -(-self.n // self.nr)
        self.exact = static(self.r) is not None and self.r % self.mr == 0
        self.buffers: list[Any] = []
        """Allocations of what a task needs to unpack panels."""
        self.address = self._separate()
        self.border = border_of(fused, self.row_operand, self.rows, self.mr)
        operand = loops.loads(self.column_operand)[0].source
        is_far = far(prod(int(d) for d in operand.shape) * bits(str(operand.dtype)) // 8, target)
        self.far = bool(decide("prefetch", int(is_far), (0, 1)))
        # Rows outside and panels inside is for few columns: then rows, not panels, are read and written once.
        self.rows_first = self.blocks == 1 and bool(decide("rows_first", 0, (0, 1)))
        last = static(self.reduced.extents[-1]) if self.reduced.extents else 1
        self.unroll = decide("unroll", 1, [u for u in (2, 4) if last and last % u == 0 and self.step * self.inner > u])

    def function(self) -> Any:
        """Return the function with its body replaced."""
        return self.reader.finish(self.statement())

    def statement(self) -> Any:
        """Return the loop nest."""
        chunk, groups = self._chunk_tiles(), self._groups()
        chunks, tiles = self._chunks(chunk)
        self.tail, allocate = loops.scratch("tail", self.mr * self.lanes, self.dtype)
        self.chunk, self.per_group = chunk, -(-self.column_tiles // groups)
        size = chunk * self.mr * self.per_group * self.nr
        self.sums, allocate_sums = loops.scratch("sums", size, self.dtype)
        allocations = [*self.buffers, *([allocate] if self.n % self.lanes else [])]
        allocations += [allocate_sums] if self.blocks > 1 else []

        def body(b: Any, c: Any, g: Any) -> Any:
            first = c * tiles
            here = self.row_tiles if chunk == static(self.row_tiles) else loops.smaller(tiles, self.row_tiles - first)
            return sequence(
                *allocations,
                bind("first", first, lambda start: self._blocks(self.batch.at(b), start, here, g, groups)),
            )

        def task(o: Any) -> Any:
            coordinates = [self.b, chunks, groups]
            b, c, g = loops.unravel(o, coordinates)
            return bind("batch", b, lambda b: bind("chunk", c, lambda c: bind("group", g, lambda g: body(b, c, g))))

        return loop("task", self.b * chunks * groups, task, "parallel")

    def _chunks(self, most: int) -> tuple[Any, Any]:
        """Return the number of chunks of at most ``most`` row tiles, and how many each has but the last ones.

        Where only a run knows the rows, it makes equal chunks, and more than needed if there are rows for them.
        """
        if static(self.row_tiles) is not None:
            return self.reader.size(loops.ceildiv(self.row_tiles, most)), most
        size, tiles = self.reader.size, self.row_tiles
        useful = loops.smaller(_TASKS // 2, tiles // (_CHUNK_TILES if self.column_tiles > 1 else 2))
        chunks = size(tirx.max(loops.index(1), tirx.max(loops.ceildiv(tiles, most), useful)))
        return chunks, size((tiles + chunks - 1) // chunks)

    def _chunk_tiles(self) -> int:
        """Return how many row tiles make a chunk, at most where only a run knows how many there are."""
        row_bytes = max(1, self._row_elements() * bits(self.dtype) // 8)
        fit = max(4, self.chunk_bytes // (row_bytes * self.mr))
        product = self._product()
        if product is None:
            return fit
        tiles = product.row_tiles
        best = sharing.best_chunk(product, min(fit, tiles))
        return decide("chunk", best, sharing.chunks_of(tiles), lambda chunk: _cost(product, chunk))

    def _product(self) -> sharing.Product | None:
        """Return the product in tiles; None where only a run knows its size, or there is nothing to do."""
        tiles, batch = static(self.row_tiles), static(self.b)
        if not tiles or not batch:
            return None
        vectors = -(-self.nr // self.lanes)
        last = -(-(self.n - (self.column_tiles - 1) * self.nr) // self.lanes)
        work = batch * self.r * self.n * self.k
        return sharing.Product(batch, tiles, self.column_tiles, last / vectors, work, self.unpack_cost)

    def _row_elements(self) -> int:
        """Return about how many elements of the row operand one row adds to those of the row before."""
        own = static(self.reduced.extents[-1]) if self.reduced.extents else 1
        if self.address is None or own is None:
            return self.step * self.inner
        _, _, x = self.address
        total, rows = static(self.reader.size(loops.product(list(x.source.shape)))), static(self.r)
        return min(self.step * self.inner, max(own, total // rows)) if total and rows else own

    def _groups(self) -> int:
        """Return into how many groups the column tiles are divided, so that there are tasks for all threads."""
        chunk, least = self._chunk_tiles(), 1
        if self.blocks > 1:
            panel = chunk * self.mr * self.nr * bits(self.dtype) // 8
            least = min(self.column_tiles, -(-self.column_tiles * panel // self.sums_bytes))
        product = self._product()
        if product is None:
            groups = decide("groups", min(self.column_tiles, max(2, least)), sharing.groups_of(self.column_tiles))
        else:
            groups = decide(
                "groups",
                sharing.best_groups(product, chunk, least),
                sharing.groups_of(self.column_tiles),
                lambda groups: product.cost(chunk, groups),
            )
        return -(-self.column_tiles // -(-self.column_tiles // groups))

    def _blocks(self, places: dict[Any, Any], first: Any, here: Any, group: Any, groups: int) -> Any:
        """Pass all panels of a group over the rows of a chunk, block by block of the reduced axes."""
        if self.blocks == 1:
            return self._panels(places, first, here, group, groups, Block(loops.index(0), self.outer))

        def block(i: Any) -> Any:
            begin = i * self.step
            count = loops.smaller(self.step, self.outer - begin)
            return bind(
                "begin",
                begin,
                lambda b: bind("count", count, lambda c: self._panels(places, first, here, group, groups, Block(b, c))),
            )

        return loop("block", self.blocks, block)

    def _panels(self, places: dict[Any, Any], first: Any, here: Any, group: Any, groups: int, block: Block) -> Any:
        """Pass the panels of a group over the rows of a chunk; the last panel may be narrower."""
        begin = 0 if groups == 1 else group * self.per_group
        if self.rows_first:
            return self._rows_first(places, first, here, group, groups, block)

        def rows(t: Any, width: int, position: Any) -> Any:
            # Of the loop's variable alone: TVM cuts buffers to what it believes is used.
            sums = position * (self.chunk * self.mr * self.nr)
            ready = self._unpack(t, block)
            return sequence(ready, loop("r", here, lambda r: self._tile(places, first, r, t, width, block, sums)))

        whole = self.whole_tiles if groups == 1 else loops.smaller((group + 1) * self.per_group, self.whole_tiles)
        count = whole if groups == 1 else tirx.max(loops.index(whole) - begin, loops.index(0))
        inner = None
        if self.whole_tiles:
            inner = loop("t", count, lambda t: bind("panel", begin + t, lambda panel: rows(panel, self.nr, t)))
        if self.n % self.nr == 0:
            return inner
        last = rows(self.whole_tiles, self.n % self.nr, self.whole_tiles - (groups - 1) * self.per_group)
        if groups > 1:
            last = tirx.IfThenElse(loops.index(group) == groups - 1, last, None)
        return sequence(inner, last)

    def _rows_first(self, places: dict[Any, Any], first: Any, here: Any, group: Any, groups: int, block: Block) -> Any:
        """Pass the rows of a chunk over the panels of a group; all terms are one block."""
        begin = group * self.per_group
        whole = loops.smaller((group + 1) * self.per_group, self.whole_tiles)
        count = tirx.max(loops.index(whole) - begin, loops.index(0))

        def row(r: Any) -> Any:
            def panel(t: Any, width: int) -> Any:
                return self._tile(places, first, r, t, width, block, loops.index(0))

            inner = None
            if self.whole_tiles:
                inner = loop("t", count, lambda t: bind("panel", begin + t, lambda p: panel(p, self.nr)))
            if self.n % self.nr == 0:
                return inner
            last = panel(loops.index(self.whole_tiles), self.n % self.nr)
            return sequence(inner, tirx.IfThenElse(loops.index(group) == groups - 1, last, None))

        return loop("r", here, row)

    def _unpack(self, t: Any, block: Block) -> Any:
        """Return what makes a block of panel ``t`` ready before rows pass under it: None, it lies as it is read."""

    def _next_panel(self, places: dict[Any, Any], r: Any, t: Any, block: Block) -> tuple[Any, list[Any]]:
        """Return the function that fetches, step by step, part ``r`` of the next panel into the second-level cache.

        Panels come from beyond it, where the first rows of a chunk would wait for each line. In memory the next batch
        follows the last panel of this one.
        """
        operand = loops.loads(self.column_operand)[0].source
        if not self.far or self.rows_first:
            return lambda _: None, []
        tiles = min(self._chunk_tiles(), static(self.row_tiles) or 2**30)
        step = -(-self.nr // tiles)
        first = self._column(places, t + 1, loops.index(0), 0)
        start = tirx.Var("ahead", "int64")
        view = self.reader.flatten(tirx.BufferLoad(operand, [loops.index(0)] * len(operand.shape)), []).source
        place = loops.loads(first)[0].indices[0]
        before = block.begin * self.inner * (self.nr - step)
        return lambda k: prefetch(view, start + k * step, step), [
            tirx.Bind(start, place + before + r * (self.step * self.inner * step))
        ]

    def _tile(self, places: dict[Any, Any], first: Any, step: Any, t: Any, width: int, block: Block, sums: Any) -> Any:
        """Return the register tile of row tile ``first + step`` and ``width`` columns of column tile ``t``.

        Sums of a block that others follow are kept behind ``sums``.
        """
        mr, lanes, r = self.mr, self.lanes, first + step
        ahead, ahead_bindings = self._next_panel(places, step, t, block)
        vectors = -(-width // lanes)
        acc, allocate = loops.tile("acc", mr, vectors * lanes, self.dtype)
        zero = tirx.const(0, self.dtype)
        spots = [(i, v * lanes) for i in range(mr) for v in range(vectors)]
        rows = [self._row_places(places, r, i) for i in range(mr)]
        starts, bindings = self._starts(rows)

        def update(k: Any, at: dict[Any, Any]) -> Any:
            step = self._step(k, at, places)
            left = [step(rows[i], starts[i] if starts else None) for i in range(mr)]

            def element(i: int, spot: int) -> Any:
                def lane(offset: Any) -> Any:
                    right = self._column(places, t, k, spot + offset)
                    return store(acc[i], spot + offset, load(acc[i], spot + offset) + left[i] * right)

                return self.reader.lanewise(lanes, lane)

            return sequence(ahead(k), *(element(*spot) for spot in spots))

        begin = [self.reader.lanewise(lanes, lambda lane, i=i, s=s: store(acc[i], s + lane, zero)) for i, s in spots]
        end = self._store(places, r, t, acc, width)
        if self.blocks > 1:
            kept = [sums + step * (mr * self.nr) + i * (vectors * lanes) for i in range(mr)]
            read = [_copy_lanes(self.reader, lanes, self.sums, kept[i] + s, acc[i], s) for i, s in spots]
            write = [_copy_lanes(self.reader, lanes, acc[i], s, self.sums, kept[i] + s) for i, s in spots]
            begin = [tirx.IfThenElse(block.begin > 0, sequence(*read), sequence(*begin))]
            end = tirx.IfThenElse(block.begin + block.count < self.outer, sequence(*write), end)
        products = self._inside(r, block, lambda inside: self._over_reduced(update, inside))
        return sequence(*allocate, *bindings, *ahead_bindings, *begin, products, end)

    def _inside(self, r: Any, block: Block, body: Callable[[Block], Any]) -> Any:
        """Return ``body`` of the part of a block of window rows that row tile ``r`` has inside of the image."""
        if self.border is None:
            return body(block)
        first = loops.index(r) * self.mr
        last = loops.smaller(first + self.mr, self.r) - 1
        low, high = self.border.inside(first, last, loops.smaller, _larger)
        low, high = _larger(low, block.begin), loops.smaller(high, block.begin + block.count)
        return bind("low", low, lambda begin: bind("rows", _larger(high - begin, 0), lambda n: body(Block(begin, n))))

    def _row_places(self, places: dict[Any, Any], r: Any, i: int) -> tuple[dict[Any, Any], Any]:
        position = r * self.mr + i
        if not self.exact:
            position = loops.smaller(position, self.r - 1)
        return {**places, **self.rows.at(position)}, position

    def _separate(self) -> tuple[list[Any], list[Any], Any] | None:
        """Split the indices of the row operand's only load into parts of the row and of the reduced axes."""
        found = loops.loads(self.row_operand)
        if len(found) != 1:
            return None
        (x,) = found
        zeros = {v: loops.index(0) for v in self.reduced.variables}
        own, rest = [], []
        for value in x.indices:
            part = replace(value, zeros)
            difference = self.reader.analyzer.simplify(value - part)
            if loops.uses(difference, self.rows.variables + self.batch.variables):
                return None
            own.append(part)
            rest.append(difference)
        return own, rest, x

    def _starts(self, rows: list[tuple[dict[Any, Any], Any]]) -> tuple[list[Any], list[Any]]:
        """Return a variable with the address of each row, and the statements that bind them."""
        if self.address is None:
            return [], []
        own, _, x = self.address
        slot = tirx.BufferLoad(x.source, own)
        memory, allocate = loops.scratch("rows", self.mr, "int64")
        names, writes, reads = [], [], []
        for i, (where, position) in enumerate(rows):
            offset = self.reader.value(slot, where, flat=[(self.rows, position)]).indices[0]
            names.append(tirx.Var(f"row{i}", "int64"))
            writes.append(store(memory, i, offset))
            reads.append(tirx.Bind(names[i], load(memory, i)))
        return names, [allocate, *writes, *reads]

    def _step(self, k: Any, at: dict[Any, Any], places: dict[Any, Any]) -> Any:
        """Return the function that gives the row operand of one row at ``k``."""
        if self.address is None:
            return lambda row, _: self.reader.value(
                self.row_operand, {**row[0], **at}, flat=[(self.rows, row[1]), (self.reduced, k)]
            )
        _, rest, x = self.address
        offset = self.reader.value(tirx.BufferLoad(x.source, rest), {**places, **at}).indices[0]
        view = self.reader.flatten(x, []).source

        def value(_: Any, start: Any) -> Any:
            element = load(view, start + offset)
            return tvm_ffi.structural_map(self.row_operand, [(tvm.ir.TensorLoad, lambda _: element)], order="pre")

        return value

    def _column(self, places: dict[Any, Any], t: Any, k: Any, offset: Any) -> Any:
        position = t * self.nr + offset
        where = {**places, **self.columns.at(position), **self.reduced.at(k)}
        return self.reader.value(self.column_operand, where, flat=[(self.columns, position), (self.reduced, k)])

    def _over_reduced(self, body: Any, block: Block) -> Any:
        """Loops over a block of the reduced axes, giving the flat position and the value of each variable."""
        axes = self.reduced

        def nest(position: int, flat: Any, at: dict[Any, Any]) -> Any:
            if position == len(axes.variables):
                return body(flat, at)
            extent, variable = axes.extents[position], axes.variables[position]
            last = position == len(axes.variables) - 1

            def turn(k: Any) -> Any:
                if position:
                    return nest(position + 1, flat * extent + k, {**at, variable: k})
                return nest(1, block.begin + k, {variable: block.begin + k})

            turns = extent if position else block.count
            if not last or self.unroll == 1 or (not position and self.step % self.unroll):
                return loop("k", turns, turn)
            several = range(self.unroll)
            return loop("k", turns // self.unroll, lambda k: sequence(*(turn(k * self.unroll + u) for u in several)))

        return nest(0, loops.index(0), {})

    def _store(self, places: dict[Any, Any], r: Any, t: Any, acc: Any, width: int) -> Any:
        """Return the epilogue: whole vectors, and the rest of a row element by element."""
        lanes = self.lanes
        whole, rest = divmod(width, lanes)

        def put(value: Any, i: Any, j: Any) -> Any:
            row, column = r * self.mr + i, t * self.nr + j
            where = {**places, **self.rows.at(row), **self.columns.at(column)}
            return self.reader.store(where, [(self.rows, row), (self.columns, column)], value)

        def guarded(i: Any, statement: Any) -> Any:
            if self.exact:
                return statement
            return tirx.IfThenElse(loops.index(r * self.mr + i) < loops.index(self.r), statement, None)

        def vectors(i: int) -> Any:
            starts = [v * lanes for v in range(whole)]
            return sequence(
                *(
                    self.reader.lanewise(lanes, lambda lane, j=j: put(load(acc[i], j + lane), i, j + lane))
                    for j in starts
                )
            )

        full = [guarded(i, vectors(i)) for i in range(self.mr)] if whole else []
        if not rest:
            return sequence(*full)
        # Accumulators indexed by a variable would leave their registers, so these are copied first.
        copies = [
            self.reader.lanewise(
                lanes,
                lambda lane, i=i: store(self.tail, i * lanes + lane, load(acc[i], whole * lanes + lane)),
            )
            for i in range(self.mr)
        ]

        def element(i: Any, j: Any) -> Any:
            return put(load(self.tail, i * lanes + j), i, whole * lanes + j)

        partial = loop("i", self.mr, lambda i: guarded(i, loop("j", rest, lambda j: element(i, j))))
        return sequence(*full, *copies, partial)


def _copy_lanes(reader: Reader, lanes: int, source: Any, start: Any, target: Any, to: Any) -> Any:
    return reader.lanewise(lanes, lambda lane: store(target, to + lane, load(source, start + lane)))


def _pick(axes: Axes, positions: list[int]) -> Axes:
    return Axes([axes.variables[i] for i in positions], [axes.extents[i] for i in positions])
