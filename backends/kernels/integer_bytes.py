"""Products of 8-bit integers from bytes as they are: four products for a lane in one instruction.

    for (batch, strip of rows, chunk of columns):        parallel
        strip[rows, K] = bytes of the row operand
        for column tile of the chunk:
            start[16] = -shift * sums of the columns                    where 0 is not the byte 0
            for row tile of the strip:
                acc[MR, 16] = start + sum over quads of depths of strip * columns         registers
                out = epilogue(acc)

``pmaddubsw`` of x86 adds pairs of products in 16 bits and saturates. For given columns it is exact while the bytes of
the rows stay below a limit, which is at least half of their range. So a byte is split into its place in a window of
this size around the zero point and what is left, which is almost always 0: activations lie around their zero point, and
few are large. The quads that are left over, found once for a strip, are listed for each row, and a second loop
multiplies these alone:

        strip, left = clip(strip, window), strip - clip(strip, window)
        for row tile of the strip:
            for row of the tile:  list[row] = places and values of the quads of left that are not 0
        ...
                acc += sum over the steps of the longest list of values * columns at places

The result is exact for all data; if all of it is large, the second loop is as long as the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx

from optc.backends.base import Target
from optc.backends.kernels import loops
from optc.backends.kernels.fused import Fused
from optc.backends.kernels.integer_contraction import PAIR, QUAD
from optc.backends.kernels.integer_dot import choose_bytes, put, vector_at
from optc.backends.kernels.integer_form import Form
from optc.backends.kernels.integer_product import Product, Width
from optc.backends.kernels.loops import bind, load, loop, sequence, store

_LARGEST = 255
_LEAST_CHANNELS = 8
"""Fewer channels are those of data that a network begins with, pixels for example, of which many are large."""
_LEAST_DEPTH = 192
"""The depth of columns from which values are taken to crowd around a zero point amid their range."""
_UNROLL = 2
"""Steps of the reduction in one turn of its loop."""
_LEAST_COLUMNS = 32
"""Columns that pay for looking for large bytes."""


@dataclass(frozen=True)
class Bytes:
    """The byte that stands for 0, counted from the least one, and the largest byte for which products are exact."""

    zero: int
    limit: int

    @property
    def first(self) -> int:
        """The byte at which the window of exact products begins."""
        return min(max(self.zero - self.limit // 2, 0), _LARGEST - self.limit)

    def notes(self) -> dict[str, list[int]]:
        """Return the annotations of the block."""
        return {"zero": [self.zero], "limit": [self.limit]}


def choose(target: Target, element: str, zero: int | None, channels: int, packed: np.ndarray) -> Bytes | None:
    """Return how rows of ``element`` (int8 or uint8) with zero point ``zero`` are multiplied as bytes.

    ``packed`` are the columns in quads; their depths are those of ``channels`` at one or more pixels. None: rows are
    widened to 16 bits, because the target has no instruction for bytes, something is not known while compiling or not
    of 8 bits, or too many bytes would be above the limit.
    """
    dot = choose_bytes(target)
    if dot is None or zero is None or packed.dtype != np.int8 or element not in ("int8", "uint8"):
        return None
    raw = zero + 128 if element == "int8" else zero
    if not 0 <= raw <= _LARGEST:
        return None
    chosen = Bytes(raw, _LARGEST if dot.widen is None else exact_limit(packed))
    if chosen.limit == _LARGEST:
        return chosen
    if packed.shape[-4] * packed.shape[-2] < _LEAST_COLUMNS or channels < _LEAST_CHANNELS:
        return None
    # Signs of what is left change those of the columns.
    if chosen.first and (packed.shape[-3] * QUAD < _LEAST_DEPTH or packed.min() < -127):
        return None
    return chosen


def pack(
    target: Target, element: str, zero: int | None, channels: int, make: Callable[[int], np.ndarray]
) -> tuple[np.ndarray, dict[str, list[int]]]:
    """Return columns as ``make`` packs them by fours or by twos, as ``choose`` decides, and the block's annotations."""
    if choose_bytes(target) is not None:
        quads = make(QUAD)
        chosen = choose(target, element, zero, channels, quads)
        if chosen is not None:
            return quads, chosen.notes()
    return make(PAIR), {}


def exact_limit(packed: np.ndarray) -> int:
    """Return the largest byte, at most 255, with which no sum of two products ``[..., 4]`` leaves 16 bits."""
    pairs = packed.reshape(-1, 2).astype(np.int32)
    high, low = int(np.maximum(pairs, 0).sum(1).max(initial=1)), int(np.minimum(pairs, 0).sum(1).min(initial=-1))
    return min(_LARGEST, 32767 // max(high, 1), 32768 // max(-low, 1))


class ByteProduct(Product):
    """Writes the loop nest of one product of bytes for one target that has an instruction for them."""

    def __init__(self, fused: Fused, target: Target) -> None:
        dot = choose_bytes(target)
        assert dot is not None
        notes = fused.core.annotations
        self.bytes_ = Bytes(int(notes["optc.zero"][0]), int(notes["optc.limit"][0]))
        splits = self.bytes_.limit < _LARGEST
        form = Form(dot.row, self.bytes_.zero - 128 if dot.row == "int8" else self.bytes_.zero)
        super().__init__(fused, target, dot, form, target.caches.l2 // (4 if splits else 2))
        self.byte_dot, self.shift = dot, form.shift - self.bytes_.first
        self.run = int(self.rows.chunks) * self.rows.chunk
        self.words = self.rows.taps * self.run // QUAD
        self.lists = _Lists(self) if splits else None

    def _strip(self, b: Any, s: Any, first: Any, share: Any) -> Any:
        places = self.batch.at(b)
        rows, allocate_rows = self._allocate_rows()
        start, allocate_start = loops.scratch("start", self.nr, "int32")
        totals, allocate_totals = loops.scratch("totals", self.mr * self.nr, "int32")
        split = None if self.lists is None else self.lists.fill(rows, self.rows.count(s))

        def tile(t: Any, width: Width) -> Any:
            packed = self._packed_tile(places, t)

            def all_rows(here: Any, origin: Any) -> Any:
                def one(i: Any) -> Any:
                    r = i * self.mr
                    count = loops.smaller(self.mr, here - r)
                    products, acc = self._products(rows, i, packed.source, origin, width, start)
                    finish = self._finish_tile(places, s * self.rows.height + r, count, t, width, acc, totals)
                    return sequence(products, finish)

                return sequence(
                    self._start(packed.source, origin, width, start),
                    loop("i", loops.ceildiv(here, self.mr), one),
                )

            return bind(
                "here", self.rows.count(s), lambda h: bind("origin", packed.indices[0], lambda o: all_rows(h, o))
            )

        return sequence(
            allocate_rows,
            self.rows.widen(places, s, rows),
            split,
            allocate_start,
            allocate_totals,
            self._over_columns(first, share, tile),
        )

    def _start(self, columns: Any, origin: Any, width: Width, start: Any) -> Any:
        """Return what the sums of a column tile begin with, since ``shift`` was added to every row's values."""
        if not self.shift:
            return None
        lanes = self.dot.lanes
        ones = tirx.const(0x01010101, "int32")
        zero = tirx.Broadcast(tirx.const(0, "int32"), lanes)
        vectors = range(0, width.computed, lanes)

        def step(k: Any) -> Any:
            def update(v: int) -> Any:
                column = vector_at(columns, origin + (k * self.nr + v) * QUAD, QUAD * lanes)
                return put(start, v, lanes, self.dot.add(vector_at(start, v, lanes), ones, column))

            return sequence(*(update(v) for v in vectors))

        factor = tirx.Broadcast(tirx.const(-self.shift, "int32"), lanes)
        return sequence(
            *(put(start, v, lanes, zero) for v in vectors),
            loop("k", self.words, step),
            *(put(start, v, lanes, vector_at(start, v, lanes) * factor) for v in vectors),
        )

    def _products(self, rows: Any, i: Any, columns: Any, origin: Any, width: Width, start: Any) -> tuple[Any, Any]:
        """Return the statement that computes the register tile of row tile ``i``, and the tile's buffer."""
        lanes, nr = self.dot.lanes, self.nr
        acc, allocate = loops.scratch("acc", self.mr * nr, "int32")
        vectors = [(u, v) for u in range(self.mr) for v in range(0, width.computed, lanes)]
        named, bases = self._bases(i * self.mr)
        zero = tirx.Broadcast(tirx.const(0, "int32"), lanes)

        def add(u: int, v: int, word: Any, at: Any, adds: Any = self.dot.add) -> Any:
            column = vector_at(columns, at + v * QUAD, QUAD * lanes)
            return put(acc, u * nr + v, lanes, adds(vector_at(acc, u * nr + v, lanes), word, column))

        def add_left(u: int, v: int, word: Any, at: Any) -> Any:
            signed = self.bytes_.first > 0
            return add(u, v, word, origin + at, self.byte_dot.add_signed if signed else self.byte_dot.add)

        def tap(g: Any) -> Any:
            def steps(offset: Any, begin: Any) -> Any:
                def step(k: Any) -> Any:
                    at = begin + k * (nr * QUAD)
                    words = [_word(rows, base + offset + k * QUAD) for base in bases]
                    return sequence(*(add(u, v, words[u], at) for u, v in vectors))

                def block(k: Any) -> Any:
                    return sequence(*(step(k * _UNROLL + i) for i in range(_UNROLL)))

                whole, rest = divmod(self.run // QUAD, _UNROLL)
                return sequence(
                    loop("k", whole, block) if whole else None,
                    *(step(loops.index(whole * _UNROLL + i)) for i in range(rest)),
                )

            begin = origin + g * (self.run * nr)
            return bind("offset", self.rows.offset(g), lambda o: bind("begin", begin, lambda p: steps(o, p)))

        begin = [put(acc, u * nr + v, lanes, vector_at(start, v, lanes) if self.shift else zero) for u, v in vectors]
        rest = None if self.lists is None else self.lists.each(i, vectors, add_left)
        return sequence(named, allocate, *begin, loop("tap", self.rows.taps, tap), rest), acc


class _Lists:
    """The quads of a strip that have bytes above the limit, for each row: where its columns are, and what is left."""

    def __init__(self, product: ByteProduct) -> None:
        self.product = product
        self.tiles = loops.ceildiv(product.rows.height, product.mr)
        most = self.tiles * product.words * product.mr
        self.places, self.allocate_places = loops.scratch("quad_places", most, "int32")
        self.values, self.allocate_values = loops.scratch("quad_values", most, "int32")
        self.steps, self.allocate_steps = loops.scratch("quad_steps", self.tiles, "int64")

    def fill(self, rows: Any, count: Any) -> Any:
        """Return the statement that cuts the bytes of a strip at the limit and lists what is left of its rows."""
        lanes = self.product.vector
        size = loops.ceildiv(self.product.rows.size, lanes) * lanes
        left, allocate_left = loops.scratch("left", size, "uint8")
        window = self.product.bytes_
        low, high = (tirx.Broadcast(tirx.const(v, "uint8"), lanes) for v in (window.first, window.first + window.limit))

        def cut(v: Any) -> Any:
            byte = vector_at(rows, v * lanes, lanes)
            inside = tirx.max(tirx.min(byte, high), low) if window.first else tirx.min(byte, high)
            return sequence(
                put(left, v * lanes, lanes, byte - inside),
                put(rows, v * lanes, lanes, inside - low if window.first else inside),
            )

        def tiles(here: Any) -> Any:
            mr = self.product.mr
            return loop("i", loops.ceildiv(here, mr), lambda i: self._tile(left, i, loops.smaller(mr, here - i * mr)))

        return sequence(
            self.allocate_places,
            self.allocate_values,
            self.allocate_steps,
            allocate_left,
            loop("v", size // lanes, cut),
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

                tail = loop(
                    "q", rest, lambda q: quad(_word(left, start + whole * lanes + q * QUAD), number + whole * wide + q)
                )
                return sequence(loop("v", whole, vector) if whole else None, tail if rest else None)

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
