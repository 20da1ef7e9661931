"""Winograd's algorithm for 3x3 convolution of 8-bit integers: exact, with 2.25 or 4 times fewer products.

    for (image, strip of tile lines, chunk of columns):          parallel
        strip = int16 lines of the image, V[(m+2)^2, tiles, C] = B' d B of each tile
        for column tile of the chunk:
            for block of channels:
                U[(m+2)^2, C/2, NR, 2] = G g G' of the filters
                for point, for row tile:  M[point, tiles, NR] += V * U          registers, as in every product
            out = epilogue(A' M A) of each tile

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016). G has fractions; its rows are scaled to
integers here, A makes up for that, and the result is the sum times a number known beforehand. Everything is modulo
2^32, where odd factors have inverses: what is left is a shift, exact while the sum fits the bits that it leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx

from optc.backends.base import Target
from optc.backends.kernels import loops
from optc.backends.kernels.fused import Axes, Fused, Reader
from optc.backends.kernels.integer_contraction import COLUMN_BLOCK, PAIR, column_block
from optc.backends.kernels.integer_dot import Dot, choose_bytes, put, vector_at
from optc.backends.kernels.integer_rows import WindowRows, spans, tile_rows
from optc.backends.kernels.loops import bind, load, loop, sequence, static, store

_CHANNEL_BYTES = 4 * 1024
"""Bytes of the second-level cache for each channel of a block of transformed filters."""
Matrix = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Transform:
    """F(m x m, 3 x 3): integer transforms of data, filters and sums, whose result is ``scale`` times the sum."""

    m: int
    data: Matrix
    filters: Matrix
    sums: Matrix
    scale: int

    @property
    def shift(self) -> int:
        """The power of two in the scale."""
        return (self.scale & -self.scale).bit_length() - 1

    @property
    def inverse(self) -> int:
        """The inverse, modulo 2^32, of the odd factor of the scale, as a signed number."""
        number = pow(self.scale >> self.shift, -1, 1 << 32)
        return number - (1 << 32) if number >= 1 << 31 else number


SMALL = Transform(
    2,
    ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    ((1, 0, 0), (1, 1, 1), (1, -1, 1), (0, 0, 1)),
    ((2, 1, 1, 0), (0, 1, -1, -2)),
    4,
)
LARGE = Transform(
    4,
    (
        (4, 0, -5, 0, 1, 0),
        (0, -4, -4, 1, 1, 0),
        (0, 4, -4, -1, 1, 0),
        (0, -2, -1, 2, 1, 0),
        (0, 2, -1, -2, 1, 0),
        (0, 4, 0, -5, 0, 1),
    ),
    ((1, 0, 0), (-1, -1, -1), (-1, 1, -1), (1, 2, 4), (1, -2, 4), (0, 0, 1)),
    ((6, 4, 4, 1, 1, 0), (0, 4, -4, 2, -2, 0), (0, 4, 4, 4, 4, 0), (0, 4, -4, 8, -8, 24)),
    576,
)


def suits(kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], channels: int, columns: int) -> bool:
    """Tell whether a convolution of ``channels`` to ``columns`` maps is of the kind that this makes faster."""
    plain = list(kernel) == [3, 3] and all(step == 1 for step in (*strides, *dilations))
    return plain and channels % 16 == 0 and channels >= 32 and columns >= COLUMN_BLOCK


def pays(target: Target, out: Sequence[int], columns: int, magnitude: int) -> bool:
    """Tell whether a convolution to ``out`` (lines, width) that ``suits`` takes less work than direct products of
    bytes. A single instruction for these does twice the products of one for words; two do as many.

    ``magnitude`` is that of the weights.
    """
    lines, width = out
    dot = choose_bytes(target)
    products = 9.0 / 2 if dot is not None and dot.widen is None else 9.0
    return _best(lines, width, columns, column_block(target, columns), magnitude, products) is not None


def _best(lines: int, width: int, columns: int, block: int, magnitude: int, products: float) -> Transform | None:
    """Return the transform that takes less than ``products`` a pixel, and the least, and is exact; None for none."""
    work: dict[Transform | None, float] = {None: products * lines * width}
    # The last tile of columns is computed whole.
    padded = -(-columns // block) * block / columns
    for transform in (SMALL, LARGE):
        points = (transform.m + 2) ** 2
        # Sums of a product of 255 with weights of this magnitude must fit what the shift leaves of int32.
        if magnitude and 255 * magnitude < 1 << (31 - transform.shift):
            # The transforms of data and sums are about a fifth of the products; those of filters as good as two tiles.
            work[transform] = padded * points * (1.2 * -(-lines // transform.m) * -(-width // transform.m) + 2)
    return min(work, key=lambda chosen: work[chosen])


def choose(fused: Fused, image: WindowRows, columns: int | None) -> Transform | None:
    """Return the transform that takes the least work and is exact for these weights; None for direct convolution."""
    notes = fused.core.annotations
    lines, width = static(image.lines), static(image.columns)
    magnitude = int(notes["optc.magnitude"][0]) if "optc.magnitude" in notes else 0
    if lines is None or width is None or columns is None or not magnitude or int(notes["optc.packed"]) != PAIR:
        return None
    if not suits(image.kernel, image.strides, image.dilations, image.c, columns) or not image.whole_pixels:
        return None
    # Channels of neighbouring window positions follow each other in the packed filters.
    if image.chunks * image.chunk != image.c * (3 if image.merged else 1):
        return None
    (packed,) = loops.loads(fused.core.body.value.b.b)
    return _best(lines, width, columns, int(packed.source.shape[-2]), magnitude, 9.0)


class Winograd:
    """Writes the loop nest of one convolution."""

    def __init__(
        self,
        reader: Reader,
        dot: Dot,
        image: WindowRows,
        transform: Transform,
        columns: Axes,
        batch: Axes,
        packed: Any,
        target: Target,
    ) -> None:
        self.reader, self.dot, self.image, self.transform = reader, dot, image, transform
        self.columns, self.batch, self.packed = columns, batch, packed
        self.m, self.points = transform.m, (transform.m + 2) ** 2
        self.c, self.nr = image.c, int(packed.source.shape[-2])
        self.lines, self.width = int(image.lines), int(image.columns)
        self.across, self.down = -(-self.width // self.m), -(-self.lines // self.m)
        # Transformed tiles and filters stay in the second-level cache.
        most = max(1, target.caches.l2 * 3 // 4 // (2 * self.points * self.c * self.across))
        strips = -(-self.down // most)
        self.block = -(-self.down // (strips + strips % 2 if strips > 1 else 1))
        self.strips = -(-self.down // self.block)
        self.tiles = self.block * self.across
        self.mr = tile_rows(self.tiles, dot.rows(self.nr))
        self.rows = -(-self.tiles // self.mr) * self.mr
        image.width = self.across * self.m + 2
        blocks = -(-self.c // max(16, target.caches.l2 // _CHANNEL_BYTES))
        self.depth = -(-self.c // (16 * blocks)) * 16
        self.blocks = -(-self.c // self.depth)
        # What lies at one place of all points must not lie in one set of the cache: a line more between points.
        self.v_step, self.u_step = self.rows * self.c + 32, self.depth * self.nr + 32
        self.sum_step = self.rows * self.nr + 16

    def function(self) -> Any:
        """Return the function with its body replaced."""
        tiles = -(-int(self.columns.total) // self.nr)
        parts = 2 if self.strips * (static(self.batch.total) or 1) == 1 and tiles > 1 else 1
        share = -(-tiles // parts)
        inner = self.strips * parts

        def task(o: Any) -> Any:
            return bind("b", o // inner, lambda b: bind("rest", o % inner, lambda rest: strip(b, rest)))

        def strip(b: Any, rest: Any) -> Any:
            def part(s: Any, first: Any) -> Any:
                return self._strip(self.batch.at(b), s, first, loops.smaller(share, tiles - first))

            return bind("strip", rest // parts, lambda s: bind("part", rest % parts * share, lambda c: part(s, c)))

        return self.reader.finish(loop("task", self.batch.total * inner, task, "parallel"))

    def _strip(self, places: dict[Any, Any], s: Any, first: Any, count: Any) -> Any:
        height = self.block * self.m + 2
        lines, allocate_lines = loops.scratch("lines", height * self.image.width * self.c, "int16")
        v, allocate_v = loops.scratch("v", self.points * self.v_step, "int16")
        u, allocate_u = loops.scratch("u", self.points * self.u_step, "int16")
        out, allocate_out = loops.scratch("out", self.m * self.m * self.nr, "int32")
        sums, allocate_sums = loops.scratch("sums", self.points * self.sum_step, "int32")

        def tile(t: Any) -> Any:
            def block(k: Any) -> Any:
                channel = k * self.depth
                deep = loops.smaller(self.depth, self.c - channel)

                def body(channel: Any, deep: Any) -> Any:
                    return sequence(
                        self._filters(places, t, channel, deep, u), self._products(v, channel, deep, u, sums)
                    )

                return bind("channel", channel, lambda c: bind("deep", deep, lambda d: body(c, d)))

            zero = tirx.const(0, "int32")
            return sequence(
                loop("i", self.points * self.sum_step, lambda i: store(sums, i, zero)),
                loop("k", self.blocks, block),
                self._results(places, s, t, sums, out),
            )

        return sequence(
            allocate_lines,
            allocate_v,
            self.image.fill(places, s * (self.block * self.m), height, lines),
            self._data(lines, v),
            allocate_u,
            allocate_sums,
            allocate_out,
            loop("t", count, lambda t: bind("tile", first + t, tile)),
        )

    def _twice(self, matrix: Matrix, lanes: int, dtype: str, read: Any, write: Any) -> Any:
        """Return the statements of ``write(i, j, lane, y)``: y is ``matrix x matrix'``, x is ``read(i, j, lane)``."""
        size = len(matrix[0])
        column, allocate = loops.scratch("column", size * lanes, dtype)
        # A buffer for each row: those of less than 1 KiB become registers.
        halves = [loops.scratch("half", size * lanes, dtype) for _ in matrix]

        def combine(row: tuple[int, ...], source: Any, lane: Any) -> Any:
            total: Any = None
            for factor, i in sorted(((f, i) for i, f in enumerate(row) if f), key=lambda x: -x[0]):
                term = _times(abs(factor), load(source, i * lanes + lane), dtype)
                if total is None:
                    total = term if factor > 0 else tirx.const(0, dtype) - term
                else:
                    total = total + term if factor > 0 else total - term
            return total

        def fetch(i: int, j: int) -> Any:
            return self.reader.lanewise(lanes, lambda lane: store(column, i * lanes + lane, read(i, j, lane)))

        def first(half: Any, row: tuple[int, ...], j: int) -> Any:
            return self.reader.lanewise(lanes, lambda lane: store(half, j * lanes + lane, combine(row, column, lane)))

        def second(r: int, half: Any, q: int, row: tuple[int, ...]) -> Any:
            return self.reader.lanewise(lanes, lambda lane: write(r, q, lane, combine(row, half, lane)))

        statements: list[Any] = [allocate, *(reserve for _, reserve in halves)]
        for j in range(size):
            statements += [fetch(i, j) for i in range(size)]
            statements += [first(half, row, j) for (half, _), row in zip(halves, matrix, strict=True)]
        for r, (half, _) in enumerate(halves):
            statements += [second(r, half, q, row) for q, row in enumerate(matrix)]
        return sequence(*statements)

    def _data(self, lines: Any, v: Any) -> Any:
        """Return the transform of all tiles of the strip."""
        lanes, m, width = 2 * self.dot.lanes, self.m, self.image.width
        lanes = min(lanes, 16)
        side = m + 2

        def tile(y: Any, x: Any, c: Any) -> Any:
            def at(origin: Any, to: Any) -> Any:
                def read(i: int, j: int, lane: Any) -> Any:
                    return load(lines, origin + (i * width + j) * self.c + lane)

                def write(r: int, q: int, lane: Any, value: Any) -> Any:
                    return store(v, to + (r * side + q) * self.v_step + lane, value)

                return self._twice(self.transform.data, lanes, "int16", read, write)

            origin = (y * m * width + x * m) * self.c + c * lanes
            to = (y * self.across + x) * self.c + c * lanes
            return bind("origin", origin, lambda o: bind("to", to, lambda d: at(o, d)))

        return loop(
            "y",
            self.block,
            lambda y: loop("x", self.across, lambda x: loop("c", self.c // lanes, lambda c: tile(y, x, c))),
        )

    def _filters(self, places: dict[Any, Any], t: Any, channel: Any, deep: Any, u: Any) -> Any:
        """Return the transform of the filters of column tile ``t`` over ``deep`` channels from ``channel``."""
        lanes = min(2 * self.dot.lanes, 16)
        side, group = self.m + 2, 2
        shape = self.packed.source.shape
        first = tirx.BufferLoad(self.packed.source, [*self.packed.indices[: len(shape) - 4], t, 0, 0, 0])
        start = self.reader.value(first, places)

        def vector(origin: Any, to: Any) -> Any:
            def read(i: int, j: int, lane: Any) -> Any:
                return load(start.source, origin + (i * 3 + j) * (self.c * self.nr) + lane).astype("int16")

            def write(r: int, q: int, lane: Any, value: Any) -> Any:
                return store(u, to + (r * side + q) * self.u_step + lane, value)

            return self._twice(self.transform.filters, lanes, "int16", read, write)

        def step(k: Any) -> Any:
            origin = start.indices[0] + channel * self.nr + k * lanes
            return bind("origin", origin, lambda o: bind("to", k * lanes, lambda d: vector(o, d)))

        assert group == self.dot.group
        return loop("k", deep * self.nr // lanes, step)

    def _products(self, v: Any, channel: Any, deep: Any, u: Any, sums: Any) -> Any:
        """Return the products of all points over ``deep`` channels from ``channel``, added to the sums."""
        lanes, nr, group = self.dot.lanes, self.nr, self.dot.group
        vectors = [(i, w) for i in range(self.mr) for w in range(0, nr, lanes)]

        def tile(point: Any, r: Any) -> Any:
            def body(left: Any, right: Any, total: Any) -> Any:
                acc, allocate = loops.tile("acc", self.mr, nr, "int32")

                def step(k: Any) -> Any:
                    def update(i: int, w: int) -> Any:
                        a = vector_at(v, left + i * self.c + k * group, group)
                        b = vector_at(u, right + (k * nr + w) * group, lanes * group)
                        return put(acc[i], w, lanes, self.dot.add(vector_at(acc[i], w, lanes), a, b))

                    return sequence(*(update(i, w) for i, w in vectors))

                begin = [put(acc[i], w, lanes, vector_at(sums, total + i * nr + w, lanes)) for i, w in vectors]
                end = [put(sums, total + i * nr + w, lanes, vector_at(acc[i], w, lanes)) for i, w in vectors]
                return sequence(*allocate, *begin, loop("k", deep // group, step), *end)

            row = r * self.mr
            return bind(
                "left",
                point * self.v_step + row * self.c + channel,
                lambda a: bind(
                    "right",
                    point * self.u_step,
                    lambda b: bind("total", point * self.sum_step + row * nr, lambda t: body(a, b, t)),
                ),
            )

        return loop("point", self.points, lambda p: loop("r", self.rows // self.mr, lambda r: tile(p, r)))

    def _results(self, places: dict[Any, Any], s: Any, t: Any, sums: Any, out: Any) -> Any:
        """Return the transform of the sums and the epilogue."""
        lanes, m, side = self.dot.lanes, self.m, self.m + 2
        first_line = s * (self.block * m)

        def tile(y: Any, x: Any) -> Any:
            statements: list[Any] = []
            for w in range(0, self.nr, lanes):
                spot = (y * self.across + x) * self.nr + w

                def read(i: int, j: int, lane: Any, spot: Any = spot) -> Any:
                    return load(sums, (i * side + j) * self.sum_step + spot + lane)

                def write(r: int, q: int, lane: Any, value: Any, w: int = w) -> Any:
                    whole = (
                        value if self.transform.inverse == 1 else value * tirx.const(self.transform.inverse, "int32")
                    )
                    return store(
                        out, (r * m + q) * self.nr + w + lane, whole >> tirx.const(self.transform.shift, "int32")
                    )

                statements.append(self._twice(self.transform.sums, lanes, "int32", read, write))
            here = loops.smaller(m, self.lines - (first_line + y * m))
            across = loops.smaller(m, self.width - x * m)

            def put_pixel(i: Any, j: Any) -> Any:
                pixel = dict(zip(self.image.axes.variables, (first_line + y * m + i, x * m + j), strict=True))

                def element(lane: Any) -> Any:
                    where = {**places, **pixel, **self.columns.at(t * self.nr + lane)}
                    return self.reader.store(where, [], load(out, (i * m + j) * self.nr + lane))

                full, rest = divmod(int(self.columns.total), self.nr)
                whole = self.reader.lanewise(self.nr, element)
                if not rest:
                    return whole
                return tirx.IfThenElse(t < full, whole, spans(self.reader, rest, lanes, element))

            return sequence(
                *statements,
                loop("i", loops.smaller(here, m), lambda i: loop("j", across, lambda j: put_pixel(i, j))),
            )

        return loop("y", self.block, lambda y: loop("x", self.across, lambda x: tile(y, x)))


def _times(factor: int, value: Any, dtype: str) -> Any:
    """Return ``factor * value``: int32 by shifts, since vectors multiply 32 bits slowly."""
    if factor == 1:
        return value
    if dtype != "int32":
        return value * tirx.const(factor, dtype)
    terms = [value << tirx.const(bit, dtype) if bit else value for bit in range(6) if factor >> bit & 1]
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def magnitude(weights: np.ndarray) -> int:
    """Return the largest sum of magnitudes of the weights ``[M, ...]`` of one output; 0 if they are not 8 bits."""
    if weights.size == 0 or weights.min() < -128 or weights.max() > 127:
        return 0
    return int(np.abs(weights.reshape(weights.shape[0], -1)).sum(1, dtype=np.int64).max())
