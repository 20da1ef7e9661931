"""The schedule of attention: blocks of queries in vector lanes, keys in blocks, the softmax online.

    for (batch, head, group of query blocks):      parallel
        q^T[d, QB] of each block = queries, transposed
        for blocks of keys:
            v = values as panels [columns, keys, NC]
            for blocks of QB queries:
                p[keys, QB] = mask(key . q^T)                   register tiles of keys x queries
                top, p, total = online softmax                  down the columns: nothing crosses lanes
                out[QB, d] = out * correction + p^T . v         register tiles of queries x columns
        out / total

After Dao et al., "FlashAttention" (arXiv:2205.14135), with the softmax of Milakov and Gimelshein (arXiv:1805.02867).
Keys are read where they lie, row by row. Few queries take ``attention_rows.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm import tirx

from optc.backends.base import Target
from optc.backends.kernels import attention_rows, loops, register_tile
from optc.backends.kernels.attention import TEMPLATE
from optc.backends.kernels.attention_operands import LOWEST, Operands
from optc.backends.kernels.decisions import counts, decide
from optc.backends.kernels.fused import bits, take_apart
from optc.backends.kernels.loops import bind, load, loop, sequence, store
from optc.backends.kernels.transpose import transpose
from optc.backends.kernels.vector_math import exp_nonpositive, maximum

GROUP = 4
"""Blocks of queries that share a copy of the values."""
TASKS = 16
"""Tasks that there should be before blocks are grouped."""


def schedule(function: Any, target: Target) -> Any:
    """Return ``function`` as a tiled loop nest, or None if it is not annotated attention with its epilogue."""
    fused = take_apart(function, TEMPLATE)
    if fused is None:
        return None
    operands = Operands(fused, target)
    rows, limit = loops.static(operands.rows), attention_rows.limit(operands)
    few = None if rows is not None and rows > limit else attention_rows.Rows(operands).body()
    if rows is not None and rows <= limit:
        return operands.reader.finish(few)
    many = _Tiles(operands).body()
    if few is not None:
        many = tirx.IfThenElse(loops.index(operands.rows) <= limit, few, many)
    return operands.reader.finish(many)


class _Tiles:
    """Writes the loop nest for many queries."""

    def __init__(self, operands: Operands) -> None:
        self.o = operands
        self.lanes = operands.lanes
        rows, keys = loops.static(operands.rows), loops.static(operands.keys)
        vectors = decide("vectors", 1 if rows is not None and rows <= self.lanes else 2, (1, 2))
        self.block = vectors * self.lanes
        tallest = register_tile.most_rows(vectors, operands.target)
        best = tallest if keys is None else _least_waste(keys, tallest)
        self.mr = decide("rows", best, range(max(1, tallest // 2), tallest + 1))
        # The second product's tile: some queries, a divisor of the block, and two vectors of columns.
        fit = register_tile.most_rows(2, operands.target)
        divisors = [rows for rows in range(min(fit, self.block), 0, -1) if self.block % rows == 0]
        self.qr = decide("query_rows", divisors[0], divisors)
        # The weights of a block of keys take half of the first-level cache.
        size = bits(operands.dtype) // 8
        most = max(1, operands.target.caches.l1 // 2 // (self.block * size * self.mr))
        if keys is not None:
            tiles = max(1, -(-keys // self.mr))
            most = -(-tiles // -(-tiles // most))
            most = decide("key_tiles", most, [-(-tiles // n) for n in counts(min(16, tiles))])
        self.kb = most * self.mr
        self.exact = rows is not None and rows % self.block == 0
        self.blocks = operands.reader.size(loops.ceildiv(operands.rows, self.block))
        self.group = self._group()

    def _group(self) -> int:
        """Return how many blocks of queries make a task."""
        heads, blocks = loops.static(loops.index(self.o.batch * self.o.heads)), loops.static(self.blocks)
        if blocks is None:
            return GROUP
        tasks = blocks * (1 if heads is None else heads)
        most = max(1, min(GROUP, tasks // TASKS))
        return decide("group", -(-blocks // -(-blocks // most)), [-(-blocks // n) for n in counts(min(8, blocks))])

    def body(self) -> Any:
        """Return the loops."""
        return self.o.tasks(self.o.reader.size(loops.ceildiv(self.blocks, self.group)), self._task)

    def _row(self, i: Any) -> Any:
        return i if self.exact else loops.smaller(i, self.o.rows - 1)

    def _vectors(self, make: Callable[[Any], Any]) -> Any:
        """Return ``make(lane)`` for all lanes of a block of queries, vector by vector."""
        return sequence(*(self._lanes(lambda lane, v=v: make(v + lane)) for v in range(0, self.block, self.lanes)))  # type: ignore[misc]

    def _lanes(self, make: Callable[[Any], Any]) -> Any:
        return self.o.reader.lanewise(self.lanes, make)

    def _task(self, b: Any, h: Any, t: Any) -> Any:
        o, size = self.o, self.block
        self.at = (b, h)
        sizes = {
            "query": self.group * o.depth * size,
            "out": self.group * o.width * size,
            "top": self.group * size,
            "total": self.group * size,
            "weight": self.kb * size,
            "panel": self.kb * o.width,
        }
        made = {name: loops.scratch(name, count, o.dtype) for name, count in sizes.items()}
        self.query, self.out, self.top, self.total, self.weight, self.panel = (buffer for buffer, _ in made.values())

        def group(first: Any, count: Any) -> Any:
            start = o.start(b, self._row(first * size))
            stop = o.stop(b, loops.smaller((first + count) * size, o.rows) - 1)
            return bind("start", start, lambda s: bind("stop", stop, lambda e: blocks(first, count, s, e)))

        def blocks(first: Any, count: Any, start: Any, stop: Any) -> Any:
            def each(make: Callable[[Any, Any], Any]) -> Any:
                return loop("g", count, lambda g: bind("row", (first + g) * size, lambda row: make(g, row)))

            def keys(origin: Any, here: Any) -> Any:
                return sequence(self._panels(origin, here), each(lambda g, row: self._block(g, row, origin, here)))

            def step(k: Any) -> Any:
                return bind(
                    "origin",
                    start + k * self.kb,
                    lambda j: bind("here", loops.smaller(self.kb, stop - j), partial(keys, j)),
                )

            steps = loops.ceildiv(tirx.max(loops.index(0), loops.index(stop - start)), self.kb)
            return sequence(each(self._begin), loop("k", steps, step), each(self._finish))

        count = loops.smaller(self.group, self.blocks - t * self.group)
        body = bind("first", t * self.group, lambda f: bind("count", count, lambda n: group(f, n)))
        return sequence(*(allocate for _, allocate in made.values()), body)

    def _begin(self, g: Any, row: Any) -> Any:
        """Copy a block of queries, transposed; clear its sums."""
        o, lanes, size = self.o, self.lanes, self.block
        whole = o.depth // lanes
        scratch, allocate = loops.scratch("square", lanes * lanes, o.dtype)
        base, cleared = g * (o.depth * size), o.width * size // lanes

        def read(q: Any, d: Any) -> Any:
            return o.query(*self.at, self._row(row + q), d)

        def squares(v: int, c: Any) -> Any:
            def line(q: int) -> Any:
                return self._lanes(lambda lane: store(scratch, q * lanes + lane, read(v + q, c * lanes + lane)))

            def place(d: int) -> tuple[Any, Any]:
                return self.query, base + (c * lanes + d) * size + v

            return sequence(*map(line, range(lanes)), *transpose(scratch, lanes, place))

        def rest(v: int, d: Any) -> Any:
            at = d + whole * lanes
            return loop("q", lanes, lambda q: store(self.query, base + at * size + v + q, read(v + q, at)))

        def clear(c: Any) -> Any:
            return self._lanes(lambda q: store(self.out, (g * cleared + c) * lanes + q, o.const(0.0)))

        vectors = range(0, size, lanes)
        return sequence(
            allocate,
            *(loop("c", whole, partial(squares, v)) for v in vectors if whole),
            *(loop("d", o.depth - whole * lanes, partial(rest, v)) for v in vectors if o.depth % lanes),
            loop("c", cleared, clear),
            self._vectors(lambda q: store(self.top, g * size + q, o.const(LOWEST))),
            self._vectors(lambda q: store(self.total, g * size + q, o.const(0.0))),
        )

    def _panels(self, origin: Any, here: Any) -> Any:
        """Copy a block of values, each tile of columns by itself: rows far apart would evict each other."""
        o = self.o

        def tile(first: Any, span: int, lanes: int) -> Any:
            def vector(j: Any, v: int, lane: Any) -> Any:
                column = first + v + lane
                return store(self.panel, self.kb * first + j * span + v + lane, o.value(*self.at, origin + j, column))

            def row(j: Any) -> Any:
                return sequence(*(o.reader.lanewise(lanes, partial(vector, j, v)) for v in range(0, span, lanes)))

            return loop("j", here, row)

        return self._columns(tile)

    def _columns(self, make: Callable[[Any, int, int], Any]) -> Any:
        """Return ``make(first column, columns, lanes)`` for all register tiles of columns."""

        def run(first: int, span: int, lanes: int, c: Any) -> Any:
            return make(first + c * span, span, lanes)

        runs = column_tiles(self.o.width, self.lanes)
        return sequence(*(loop("c", count, partial(run, first, n * lanes, lanes)) for first, count, n, lanes in runs))

    def _block(self, g: Any, row: Any, origin: Any, here: Any) -> Any:
        """Return the work of one block of queries on one block of keys, those that it sees."""
        o = self.o
        if o.stops is None:
            return self._weigh(g, row, origin, here)
        stop = o.stop(self.at[0], self._row(row + self.block - 1))

        def seen(count: Any) -> Any:
            return tirx.IfThenElse(loops.index(count) > 0, self._weigh(g, row, origin, count), None)

        return bind("seen", loops.smaller(here, stop - origin), seen)

    def _weigh(self, g: Any, row: Any, origin: Any, here: Any) -> Any:
        """Return the scores, their weights and the second product."""
        o, size, base = self.o, self.block, g * self.block
        made = [loops.scratch(name, size, o.dtype) for name in ("best", "correction", "sum")]
        (best, _), (correction, _), (total, _) = made

        def correct(q: Any) -> Any:
            return store(correction, q, exp_nonpositive(load(self.top, base + q) - o.peak(load(best, q))))

        def weigh(j: Any, q: Any) -> Any:
            at = j * size + q
            return store(self.weight, at, exp_nonpositive(load(self.weight, at) - load(best, q)))

        def add(j: Any, q: Any) -> Any:
            return store(total, q, load(total, q) + load(self.weight, j * size + q))

        return sequence(
            *(allocate for _, allocate in made),
            self._vectors(lambda q: store(best, q, load(self.top, base + q))),
            loop("tile", loops.ceildiv(here, self.mr), lambda t: self._scores(g, row, origin, t, best)),
            self._vectors(correct),
            self._vectors(lambda q: store(self.top, base + q, load(best, q))),
            self._vectors(lambda q: store(best, q, o.peak(load(best, q)))),
            self._vectors(lambda q: store(total, q, load(self.total, base + q) * load(correction, q))),
            loop("j", here, lambda j: sequence(self._vectors(partial(weigh, j)), self._vectors(partial(add, j)))),
            self._vectors(lambda q: store(self.total, base + q, load(total, q))),
            self._columns(partial(self._sums, g, here, correction)),
        )

    def _scores(self, g: Any, row: Any, origin: Any, t: Any, best: Any) -> Any:
        """Return one register tile of the first product, masked, and the maximum of each query."""
        o, mr, size, lanes = self.o, self.mr, self.block, self.lanes
        acc, allocate = loops.tile("acc", mr, size, o.dtype)
        keys = [tirx.Var(f"j{i}", "int64") for i in range(mr)]
        places = [loops.smaller(origin + t * mr + i, o.keys - 1) for i in range(mr)]
        bindings = [tirx.Bind(key, loops.index(place)) for key, place in zip(keys, places, strict=True)]
        base = g * (o.depth * size)
        slots = [(i, v) for i in range(mr) for v in range(0, size, lanes)]

        def clear(i: int, v: int, lane: Any) -> Any:
            return store(acc[i], v + lane, o.const(0.0))

        def update(d: Any, i: int, v: int, lane: Any) -> Any:
            product = o.key(*self.at, keys[i], d) * load(self.query, base + d * size + v + lane)
            return store(acc[i], v + lane, load(acc[i], v + lane) + product)

        def step(d: Any) -> Any:
            return sequence(*(self._lanes(partial(update, d, i, v)) for i, v in slots))

        def finish(i: int, q: Any) -> Any:
            score = o.mask(load(acc[i], q), *self.at, self._row(row + q), keys[i])
            return store(self.weight, (t * mr + i) * size + q, score)

        def compare(i: int, q: Any) -> Any:
            return store(best, q, maximum(load(best, q), load(self.weight, (t * mr + i) * size + q)))

        return sequence(
            *bindings,
            *allocate,
            *(self._lanes(partial(clear, i, v)) for i, v in slots),
            loop("d", o.depth, step),
            *(self._vectors(partial(finish, i)) for i in range(mr)),
            *(self._vectors(partial(compare, i)) for i in range(mr)),
        )

    def _sums(self, g: Any, here: Any, correction: Any, first: Any, span: int, lanes: int) -> Any:
        """Return the second product for some columns: weights times values, added to the corrected sums."""
        o, size, qr = self.o, self.block, self.qr
        acc, allocate = loops.tile("sums", qr, span, o.dtype)
        slots = [(i, v) for i in range(qr) for v in range(0, span, lanes)]

        def each(make: Callable[[int, Any], Any]) -> list[Any]:
            return [o.reader.lanewise(lanes, lambda lane, i=i, v=v: make(i, v + lane)) for i, v in slots]

        def tile(q: Any) -> Any:
            def place(i: int, v: Any) -> Any:
                return (g * size + q * qr + i) * o.width + first + v

            def begin(i: int, v: Any) -> Any:
                return store(acc[i], v, load(self.out, place(i, v)) * load(correction, q * qr + i))

            def update(j: Any, i: int, v: Any) -> Any:
                value = load(self.panel, self.kb * first + j * span + v)
                product = load(self.weight, j * size + q * qr + i) * value
                return store(acc[i], v, load(acc[i], v) + product)

            return sequence(
                *allocate,
                *each(begin),
                loop("j", here, lambda j: sequence(*each(partial(update, j)))),
                *each(lambda i, v: store(self.out, place(i, v), load(acc[i], v))),
            )

        return loop("q", size // qr, tile)

    def _finish(self, g: Any, row: Any) -> Any:
        """Return the stores of a block of queries: sums over totals, through the epilogue."""
        o, size = self.o, self.block

        def line(q: Any) -> Any:
            def put(first: Any, v: int, lane: Any) -> Any:
                d = first + v + lane
                value = load(self.out, (g * size + q) * o.width + d) * load(self.total, g * size + q)
                return o.store(*self.at, row + q, d, value)

            def tile(first: Any, span: int, lanes: int) -> Any:
                return sequence(*(o.reader.lanewise(lanes, partial(put, first, v)) for v in range(0, span, lanes)))

            return self._columns(tile)

        def share(q: Any) -> Any:
            return store(self.total, g * size + q, o.share(load(self.total, g * size + q)))

        here = size if self.exact else loops.smaller(size, o.rows - row)
        return sequence(self._vectors(share), loop("q", here, line))


def column_tiles(width: int, lanes: int) -> list[tuple[int, int, int, int]]:
    """Cut columns into runs of equal tiles: (first column, tiles, vectors per tile, lanes), widest first."""
    runs, first = [], 0
    for vectors, size in [(2, lanes), *((1, lanes >> s) for s in range(lanes.bit_length()))]:
        count = (width - first) // (vectors * size)
        if count:
            runs.append((first, count, vectors, size))
            first += count * vectors * size
    return runs


def _least_waste(keys: int, tallest: int) -> int:
    """Return the height of a register tile that wastes least in the last one, taller preferred."""
    return min(range(tallest, tallest // 2, -1), key=lambda m: -(-keys // m) * m * (1 + 0.3 / m))
