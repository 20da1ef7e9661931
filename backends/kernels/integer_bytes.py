"""Products of 8-bit integers from bytes as they are: four products for a lane in one instruction.

    for (batch, strip of rows, chunk of columns):        parallel
        strip[rows, K] = bytes of the row operand
        for column tile of the chunk:
            first[NR] -= sums of the columns times what rows have too much
            for row tile of the strip:
                acc[MR, NR] = first + sum over quads of depths of strip * columns         registers
                out = epilogue(acc)

``pmaddubsw`` of x86 adds pairs of products in 16 bits and saturates. For given columns it is exact for bytes in the
windows of ``integer_window.py``. So a byte is split into its place in its window and what is left, which is almost
always 0: activations lie around their zero point, and few are large. The quads that are left over, found once for a
strip, are listed for each row, and a second loop multiplies these alone:

        strip, left = clip(strip, windows) - first of the windows, strip - clip(strip, windows)
        for row tile of the strip:
            for row of the tile:  list[row] = places and values of the quads of left that are not 0
        ...
                acc += sum over the steps of the longest list of values * columns at places

The result is exact for all data. If much of it is outside of the windows, ``integer_dense.py`` takes words instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from math import gcd, prod
from operator import or_
from typing import Any

from tvm import tirx

from optc.backends.base import Target
from optc.backends.kernels import loops
from optc.backends.kernels.decisions import decide
from optc.backends.kernels.fused import Fused
from optc.backends.kernels.integer_contraction import QUAD
from optc.backends.kernels.integer_dense import Dense
from optc.backends.kernels.integer_dot import choose, choose_bytes, put, vector_at
from optc.backends.kernels.integer_form import Form
from optc.backends.kernels.integer_product import Product, Width
from optc.backends.kernels.integer_window import EXCESS, FIRST, LAST
from optc.backends.kernels.loops import bind, load, loop, sequence, static, store
from optc.backends.kernels.packed_schedule import far, prefetch

_UNROLL = 2
"""Steps of the reduction in one turn of its loop."""
_TILES = 8
"""Row tiles that the next columns are fetched in where their number is not known."""


class ByteProduct(Product):
    """Writes the loop nest of one product of bytes for one target that has an instruction for them."""

    def __init__(self, fused: Fused, target: Target) -> None:
        dot = choose_bytes(target)
        assert dot is not None
        notes = fused.core.annotations
        zero = int(notes["optc.zero"][0])
        splits, self.moved, self.exceeds, self.fours = (bool(v) for v in notes["optc.windows"])
        form = Form(dot.row, zero - 128 if dot.row == "int8" else zero)
        super().__init__(fused, target, dot, form, target.caches.l2 // (4 if splits else 2))
        self.byte_dot = dot
        self.run = int(self.rows.chunks) * self.rows.chunk
        self.words = self.rows.taps * self.run // QUAD
        (packed,) = loops.loads(self.column_operand)
        is_far = far(prod(int(d) for d in packed.source.shape), target)
        self.far = bool(decide("prefetch", int(is_far), (0, 1)))
        self.lists = _Lists(self) if splits else None
        if self.lists is not None:
            self.grain = self.lists.period * self.vector

    def _strip(self, b: Any, s: Any, first: Any, share: Any) -> Any:
        places = self.batch.at(b)
        rows, allocate_rows = self._allocate_rows()
        totals, allocate_totals = loops.scratch("totals", self.mr * self.nr, "int32")
        told = self._packed_tile(places, loops.index(self.tiles))
        split = None if self.lists is None else self.lists.fill(rows, self.rows.count(s), told)

        def tile(t: Any, width: Width) -> Any:
            packed = self._packed_tile(places, t)

            def all_rows(here: Any, origin: Any) -> Any:
                def one(i: Any) -> Any:
                    r = i * self.mr
                    count = loops.smaller(self.mr, here - r)
                    products, acc = self._products(rows, i, packed.source, origin, width)
                    finish = self._finish_tile(places, s * self.rows.height + r, count, t, width, acc, totals)
                    return sequence(products, finish)

                return sequence(
                    self._prepare(places, t, width),
                    self._start(packed.source, origin, told.indices[0], width),
                    loop("i", loops.ceildiv(here, self.mr), one),
                )

            return bind(
                "here", self.rows.count(s), lambda h: bind("origin", packed.indices[0], lambda o: all_rows(h, o))
            )

        return sequence(
            allocate_rows,
            self.rows.widen(places, s, rows),
            split,
            allocate_totals,
            *self.epilogue.allocations,
            self._over_columns(first, share, tile),
        )

    def _start(self, columns: Any, origin: Any, told: Any, width: Width) -> Any:
        """Return what is added to the first sums of a column tile, since rows have too much at each depth."""
        if not self.exceeds:
            return None
        lanes, first = self.dot.lanes, self.epilogue.first
        totals, allocate = loops.scratch("column_totals", self.nr, "int32")
        zero = tirx.Broadcast(tirx.const(0, "int32"), lanes)
        vectors = range(0, width.computed, lanes)

        def step(k: Any) -> Any:
            excess = _word(columns, told + (k * self.nr + EXCESS) * QUAD)

            def update(v: int) -> Any:
                column = vector_at(columns, origin + (k * self.nr + v) * QUAD, QUAD * lanes)
                return put(totals, v, lanes, self.dot.add(vector_at(totals, v, lanes), excess, column))

            return sequence(*(update(v) for v in vectors))

        return sequence(
            allocate,
            *(put(totals, v, lanes, zero) for v in vectors),
            loop("k", self.words, step),
            *(put(first, v, lanes, vector_at(first, v, lanes) - vector_at(totals, v, lanes)) for v in vectors),
        )

    def _products(self, rows: Any, i: Any, columns: Any, origin: Any, width: Width) -> tuple[Any, list[Any]]:
        """Return the statement that computes the register tile of row tile ``i``, and the buffers of its rows."""
        lanes, nr = self.dot.lanes, self.nr
        acc, allocate = loops.tile("acc", self.mr, nr, "int32")
        vectors = [(u, v) for u in range(self.mr) for v in range(0, width.computed, lanes)]
        named, bases = self._bases(i * self.mr)
        start = self.epilogue.first
        fetch, ahead = self._next_tile(columns, origin, i)

        def add(u: int, v: int, word: Any, at: Any, adds: Any = self.dot.add) -> Any:
            column = vector_at(columns, at + v * QUAD, QUAD * lanes)
            return put(acc[u], v, lanes, adds(vector_at(acc[u], v, lanes), word, column))

        def add_left(u: int, v: int, word: Any, at: Any) -> Any:
            return add(u, v, word, origin + at, self.byte_dot.add_signed if self.moved else self.byte_dot.add)

        def tap(g: Any) -> Any:
            def steps(offset: Any, begin: Any) -> Any:
                def step(k: Any) -> Any:
                    at = begin + k * (nr * QUAD)
                    words = [_word(rows, base + offset + k * QUAD) for base in bases]
                    return sequence(*(add(u, v, words[u], at) for u, v in vectors))

                def four(k: Any) -> Any:
                    ats = [begin + (k + i) * (nr * QUAD) for i in range(2)]
                    words = [[_word(rows, base + offset + (k + i) * QUAD) for i in range(2)] for base in bases]

                    def update(u: int, v: int) -> Any:
                        pair = [vector_at(columns, at + v * QUAD, QUAD * lanes) for at in ats]
                        total = vector_at(acc[u], v, lanes)
                        return put(acc[u], v, lanes, self.byte_dot.add_two(total, words[u], pair))

                    return sequence(*(update(u, v) for u, v in vectors))

                whole, rest = divmod(self.run // QUAD, _UNROLL)

                def block(k: Any) -> Any:
                    fetched = fetch(g * whole + k)
                    if self.fours:
                        return sequence(fetched, four(k * _UNROLL))
                    return sequence(fetched, *(step(k * _UNROLL + i) for i in range(_UNROLL)))

                return sequence(
                    loop("k", whole, block) if whole else None,
                    *(step(loops.index(whole * _UNROLL + i)) for i in range(rest)),
                )

            begin = origin + g * (self.run * nr)
            return bind("offset", self.rows.offset(g), lambda o: bind("begin", begin, lambda p: steps(o, p)))

        begin = [put(acc[u], v, lanes, vector_at(start, v, lanes)) for u, v in vectors]
        whole = loop("tap", self.rows.taps, tap)
        if self.lists is not None:
            whole = sequence(whole, self.lists.each(i, vectors, add_left))
            if self.lists.dense is not None:
                words = self._words(self.lists.dense, bases, acc, vectors, columns, origin)
                whole = tirx.IfThenElse(load(self.lists.dense.many, 0) != 0, words, whole)
        return sequence(named, ahead, *allocate, *begin, whole), acc

    def _next_tile(self, columns: Any, origin: Any, i: Any) -> tuple[Callable[[Any], Any], Any]:
        """Return the function that fetches, block by block of steps, part ``i`` of the column tile behind this one.

        Columns come from beyond the second-level cache, where the first row tile would wait for each line. The second
        result binds where the part begins.
        """
        if not self.far:
            return lambda _: None, None
        tiles = static(loops.ceildiv(self.rows.height, self.mr)) or _TILES
        blocks = self.rows.taps * (self.run // QUAD // _UNROLL)
        step = -(-_UNROLL * self.nr * QUAD // tiles)
        start = tirx.Var("ahead", "int64")
        where = origin + self.words * self.nr * QUAD + i * (blocks * step)
        return lambda block: prefetch(columns, start + block * step, step), tirx.Bind(start, where)

    def _words(
        self,
        dense: Dense,
        bases: Any,
        acc: Sequence[Any],
        vectors: Sequence[tuple[int, int]],
        columns: Any,
        origin: Any,
    ) -> Any:
        """Return the products of a register tile from the strip in 16 bits."""
        places = [(acc[u], v, bases[u]) for u, v in vectors]

        def tap(g: Any) -> Any:
            def step(k: Any) -> Any:
                quad = origin + (g * self.run + k * QUAD) * self.nr
                return dense.add(places, self.rows.offset(g) + k * QUAD, columns, quad)

            return loop("k", self.run // QUAD, step)

        return loop("tap", self.rows.taps, tap)


class _Lists:
    """The quads of a strip that have bytes outside of their windows, for each row: where its columns are, what is left.

    Windows repeat after ``period`` vectors of the strip.
    """

    def __init__(self, product: ByteProduct) -> None:
        self.product = product
        rows = product.rows
        self.tiles = loops.ceildiv(rows.height, product.mr)
        most = self.tiles * product.words * product.mr
        self.places, self.allocate_places = loops.scratch("quad_places", most, "int32")
        self.values, self.allocate_values = loops.scratch("quad_values", most, "int32")
        self.steps, self.allocate_steps = loops.scratch("quad_steps", self.tiles, "int64")
        # Channels of a pixel that are no quads all have the same window.
        self.pitch = QUAD if rows.channels % QUAD else int(rows.pitch)
        self.period = self.pitch // gcd(self.pitch, product.vector)
        block = self.period * product.vector
        self.size = loops.ceildiv(rows.size, block) * block
        # Quads of a row are words of the strip only where pixels are quads. Two ways to sums in vectors of 128 bits
        # are more than there are registers for.
        words = rows.pitch % QUAD == 0 and product.dot.lanes >= 8
        self.dense = Dense(self.size, product.vector, product.moved, choose(product.target)) if words else None

    def _windows(self, edge: Any, column: int, told: Any) -> Any:
        """Return the statement that copies one edge of the windows for all bytes of a period, word by word."""
        product = self.product
        known = min(-(-product.rows.channels // QUAD), self.pitch // QUAD)

        def word(i: Any) -> Any:
            quad = loops.smaller(i % (self.pitch // QUAD), known - 1)
            value = vector_at(told.source, told.indices[0] + (quad * product.nr + column) * QUAD, QUAD)
            return put(edge, i * QUAD, QUAD, tirx.reinterpret(f"uint8x{QUAD}", value))

        return loop("i", self.period * product.vector // QUAD, word)

    def fill(self, rows: Any, count: Any, told: Any) -> Any:
        """Return the statement that cuts the bytes of a strip at their windows and lists what is left of its rows.

        ``told`` is the tile that tells the windows.
        """
        product = self.product
        lanes = product.vector
        block = self.period * lanes
        left, allocate_left = loops.scratch("left", self.size, "uint8")
        low, allocate_low = loops.scratch("low", block, "uint8")
        high, allocate_high = loops.scratch("high", block, "uint8")

        def cut(at: Any, v: Any) -> Any:
            byte, top = vector_at(rows, at, lanes), vector_at(high, v * lanes, lanes)
            inside = tirx.min(byte, top)
            if not product.moved:
                return sequence(put(left, at, lanes, byte - inside), put(rows, at, lanes, inside))
            bottom = vector_at(low, v * lanes, lanes)
            inside = tirx.max(inside, bottom)
            return sequence(put(left, at, lanes, byte - inside), put(rows, at, lanes, inside - bottom))

        def tiles(here: Any) -> Any:
            mr, dense = self.product.mr, self.dense
            count = loops.ceildiv(here, mr)
            lists = loop("i", count, lambda i: self._tile(left, i, loops.smaller(mr, here - i * mr)))
            return lists if dense is None else sequence(lists, dense.decide(rows, left, count * product.words))

        return sequence(
            self.allocate_places,
            self.allocate_values,
            self.allocate_steps,
            allocate_left,
            allocate_low,
            allocate_high,
            self._windows(low, FIRST, told) if product.moved else None,
            self._windows(high, LAST, told),
            *([] if self.dense is None else self.dense.allocations),
            loop(
                "block", self.size // block, lambda b: loop("v", self.period, lambda v: cut(b * block + v * lanes, v))
            ),
            bind("here", count, tiles),
        )

    def _tile(self, left: Any, i: Any, count: Any) -> Any:
        """Return the statement that lists the quads of the ``count`` rows of row tile ``i``."""
        mr = self.product.mr
        lengths, allocate = loops.scratch("lengths", mr, "int64")
        longest, allocate_longest = loops.scratch("longest", 1, "int64")
        first = i * (self.product.words * mr)

        def row(u: Any) -> Any:
            scan = bind(
                "base", self.product.rows.base(i * mr + u), lambda base: self._scan(left, base, first + u, lengths, u)
            )
            return sequence(scan, store(longest, 0, tirx.max(load(longest, 0), load(lengths, u))))

        def fill(u: Any) -> Any:
            def one(e: Any) -> Any:
                at = first + (load(lengths, u) + e) * mr + u
                return sequence(
                    store(self.places, at, tirx.const(0, "int32")), store(self.values, at, tirx.const(0, "int32"))
                )

            return loop("e", load(longest, 0) - load(lengths, u), one)

        nothing = loops.index(0)
        return sequence(
            allocate,
            allocate_longest,
            store(longest, 0, nothing),
            loop("u", mr, lambda u: store(lengths, u, nothing)),
            loop("u", count, row),
            loop("u", mr, fill),
            store(self.steps, i, load(longest, 0)),
            None if self.dense is None else self.dense.count(load(longest, 0)),
        )

    def _scan(self, left: Any, base: Any, first: Any, lengths: Any, u: Any) -> Any:
        """Return the statement that lists the quads of one row: its entries are ``mr`` apart, from ``first``."""
        product = self.product
        lanes, mr = product.vector, product.mr
        wide = lanes // QUAD
        whole, rest = product.run // lanes, product.run % lanes // QUAD

        def quad(word: Any, number: Any) -> Any:
            at = first + load(lengths, u) * mr
            return sequence(
                store(self.places, at, (number * (product.nr * QUAD)).astype("int32")),
                store(self.values, at, word),
                store(lengths, u, load(lengths, u) + (word != 0).astype("int64")),
            )

        def tap(g: Any) -> Any:
            def run(start: Any, number: Any) -> Any:
                def vector(v: Any) -> Any:
                    every = vector_at(left, start + v * lanes, lanes)
                    some = tirx.call_llvm_pure_intrin("uint8", f"llvm.vector.reduce.or.v{lanes}i8", every)
                    quads = loop(
                        "q", wide, lambda q: quad(_word(left, start + v * lanes + q * QUAD), number + v * wide + q)
                    )
                    return tirx.IfThenElse(some != 0, quads, None)

                last = [_word(left, start + whole * lanes + q * QUAD) for q in range(rest)]
                quads = loop(
                    "q", rest, lambda q: quad(_word(left, start + whole * lanes + q * QUAD), number + whole * wide + q)
                )
                tail = tirx.IfThenElse(reduce(or_, last) != 0, quads, None) if rest else None
                return sequence(loop("v", whole, vector) if whole else None, tail)

            return bind(
                "start",
                base + product.rows.offset(g),
                lambda start: bind("number", g * (product.run // QUAD), lambda number: run(start, number)),
            )

        return loop("tap", product.rows.taps, tap)

    def each(self, i: Any, vectors: Any, add: Any) -> Any:
        """Return the loop that adds the listed quads of row tile ``i``."""
        mr = self.product.mr

        def step(e: Any) -> Any:
            at = (i * self.product.words + e) * mr

            def row(u: int) -> Any:
                word, place = load(self.values, at + u), load(self.places, at + u).astype("int64")
                return bind("place", place, lambda p: sequence(*(add(w, v, word, p) for w, v in vectors if w == u)))

            return sequence(*(row(u) for u in range(mr)))

        return loop("e", load(self.steps, i), step)


def _word(buffer: Any, position: Any) -> Any:
    """Return four neighbouring bytes as an int32."""
    return tirx.reinterpret("int32", vector_at(buffer, position, QUAD))
