"""The schedule of Winograd convolution (``winograd.py``).

    for chunk of tiles:                                     parallel
        for tile: V[e, tile, C] = B^T d B                   vectors of channels
        for e: M[e, tile, O] = V[e] U[e]                    register tiles, packed panels of U
        for tile: out = epilogue(A^T M A)

V and M of a chunk stay in the second-level cache. Where there are few tiles (small images, many channels) the three
steps run over all tiles instead, each in parallel: every panel of U is then read once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from tvm import tirx

from optc.backends.base import Target
from optc.backends.kernels import loops, register_tile
from optc.backends.kernels.decisions import decide
from optc.backends.kernels.fused import Fused, Reader, take_apart
from optc.backends.kernels.loops import bind, load, loop, sequence, static, store
from optc.backends.kernels.packed_schedule import far, prefetch
from optc.backends.kernels.winograd import INPUT, OUTPUT, TEMPLATE

_CHUNK_TILES = 12
"""Tiles in a chunk: for each panel of U that comes from the third-level cache they keep the arithmetic busy."""
_CHUNKS = 8
"""Chunks from which on chunks are the tasks of threads."""


def schedule(function: Any, target: Target) -> Any:
    """Return ``function`` as loops over tiles, or None if it is fused in a way that is not known."""
    fused = take_apart(function, TEMPLATE)
    if fused is None:
        return None
    return _Generator(fused, target).function()


def _chunks_of(tiles: int) -> list[int]:
    """Return numbers of tiles to a chunk to try."""
    return [0, *(size for size in (6, 8, 12, 16, 18, 24, 36, 48, 64) if 2 * size <= tiles)]


def _combine(coefficients: np.ndarray, values: list[Any]) -> Any:
    """Return the sum of ``coefficients * values`` without the terms that are zero."""
    total: Any = None
    for coefficient, value in zip(coefficients, values, strict=True):
        if coefficient == 0:
            continue
        term = value if abs(coefficient) == 1 else value * tirx.const(abs(coefficient), "float32")
        if total is None:
            total = term if coefficient > 0 else tirx.const(0, "float32") - term
        else:
            total = total + term if coefficient > 0 else total - term
    return total


class _Generator:
    """Writes the loop nest of one convolution for one target."""

    def __init__(self, fused: Fused, target: Target) -> None:
        self.reader = Reader(fused)
        self.fused = fused = self.reader.fused
        self.m = int(fused.core.annotations["optc.m"])
        self.before = [int(b) for b in fused.core.annotations["optc.before"]]
        self.a = self.m + 2
        batch, _, _, channel = fused.spatial.variables
        found = loops.loads(fused.core.body.value.b)
        self.image = next(x.source for x in found if loops.uses(x.indices[0], [batch]))
        self.filters = next(x.source for x in found if loops.uses(x.indices[1], [channel]))
        size = self.reader.size
        _, self.rows, self.columns, depth = (size(loops.plain(d)) for d in self.image.shape)
        self.depth, self.maps = int(depth), int(fused.spatial.extents[-1])
        self.height, self.width = fused.spatial.extents[1:3]
        self.down, self.across = (size(loops.ceildiv(e, self.m)) for e in (self.height, self.width))
        self.tiles = size(loops.product([fused.spatial.extents[0], self.down, self.across]))
        self.lanes = target.lanes(32)
        _, self.panels, _, self.panel = (int(d) for d in self.filters.shape)
        self.panel_lanes = register_tile.panel_lanes(self.panel, 32, target)
        self.vectors = self.panel // self.panel_lanes
        tile_bytes = self.a**2 * (self.depth + self.panels * self.panel) * 4
        known = static(self.tiles)
        fits = tile_bytes * _CHUNK_TILES <= target.caches.l2 * 3 // 4
        chunked = fits and (known is None or known > _CHUNKS * _CHUNK_TILES)
        # Tiles in a chunk, 0 to do each step for all of them.
        self.chunk = decide("chunk", _CHUNK_TILES if chunked else 0, [] if known is None else _chunks_of(known))
        self.chunked = self.chunk > 0
        rows = self.chunk if self.chunked else known
        self.mr = register_tile.decide_rows(rows, self.depth, self.vectors, target)
        self.chunk = -(-self.chunk // self.mr) * self.mr
        is_far = far(self.a**2 * self.panels * self.depth * self.panel * 4, target)
        self.far = bool(decide("prefetch", int(is_far), (0, 1)))
        image = static(loops.product(list(self.image.shape)))
        self.image_far = image is None or image * 4 > target.caches.l2

    def function(self) -> Any:
        """Return the function with its body replaced."""
        function = self.reader.finish(self._chunks() if self.chunked else self._phases())
        # Transforms take whole vectors, products may take halves of them.
        return function.with_attr(loops.SEPARATE, True)

    def _workspace(self, slots: Any) -> tuple[Any, Any, list[Any]]:
        """Return V and M with room for ``slots`` tiles, and their allocations."""
        area = self.a**2
        v, allocate_v = loops.scratch("v", slots * (area * self.depth), "float32")
        m, allocate_m = loops.scratch("m", slots * (area * self.panels * self.panel), "float32")
        return v, m, [allocate_v, allocate_m]

    def _chunks(self) -> Any:
        slots = self.chunk

        def chunk(position: Any) -> Any:
            v, m, allocate = self._workspace(slots)

            def body(first: Any) -> Any:
                here = loops.smaller(slots, self.tiles - first)
                blocks = loops.ceildiv(here, self.mr)
                products = loop(
                    "e",
                    self.a**2,
                    lambda e: loop("p", self.panels, lambda p: self._products(v, m, slots, e, p, blocks)),
                )
                return sequence(
                    loop("t", here, lambda t: self._forward(v, slots, first + t, t)),
                    products,
                    loop("t", here, lambda t: self._inverse(m, slots, first + t, t)),
                )

            return sequence(*allocate, bind("first", position * slots, body))

        return loop("chunk", loops.ceildiv(self.tiles, slots), chunk, "parallel")

    def _phases(self) -> Any:
        blocks = self.reader.size(loops.ceildiv(self.tiles, self.mr))
        slots = self.reader.size(blocks * self.mr)
        v, m, allocate = self._workspace(slots)
        area = self.a**2

        def product(position: Any) -> Any:
            e, p = loops.unravel(position, [area, self.panels])
            return bind("e", e, lambda e: bind("p", p, lambda p: self._products(v, m, slots, e, p, blocks)))

        return sequence(
            *allocate,
            loop("t", self.tiles, lambda t: self._forward(v, slots, t, t), "parallel"),
            loop("product", area * self.panels, product, "parallel"),
            loop("t", self.tiles, lambda t: self._inverse(m, slots, t, t), "parallel"),
        )

    def _at(self, tile: Any, body: Callable[[Any, Any, Any], Any]) -> Any:
        """Return ``body`` with the image and the output position of a tile."""
        n, y, x = loops.unravel(tile, [self.fused.spatial.extents[0], self.down, self.across])
        return bind("n", n, lambda n: bind("y", y * self.m, lambda y: bind("x", x * self.m, lambda x: body(n, y, x))))

    def _over_channels(self, channels: int, body: Callable[[Any], Any]) -> Any:
        """Return the loop over vectors of channels; the last is moved back to end with them."""
        lanes = self.lanes

        def start(k: Any) -> Any:
            exact = channels % lanes == 0
            return bind("c", k * lanes if exact else loops.smaller(k * lanes, channels - lanes), body)

        return loop("k", -(-channels // lanes), start)

    def _forward(self, v: Any, slots: Any, tile: Any, slot: Any) -> Any:
        """Transform one tile of the image into ``v``."""

        def at(n: Any, y: Any, x: Any) -> Any:
            top, left = y - self.before[0], x - self.before[1]
            inside = tirx.all(
                top >= 0,
                top + self.a <= loops.index(self.rows),
                left >= 0,
                left + self.a <= loops.index(self.columns),
            )
            return tirx.IfThenElse(
                inside,
                self._over_channels(self.depth, partial(self._forward_vector, v, slots, slot, n, top, left, False)),
                self._over_channels(self.depth, partial(self._forward_vector, v, slots, slot, n, top, left, True)),
            )

        return self._at(tile, at)

    def _forward_vector(self, v: Any, slots: Any, slot: Any, n: Any, top: Any, left: Any, checked: bool, c: Any) -> Any:
        a, lanes = self.a, self.lanes
        # A buffer per row of the tile: TVM keeps small ones on the stack.
        buffers = [loops.scratch(f"row{i}", a * lanes, "float32") for i in range(a)]

        def read(j: int, loaded: Any, i: int) -> Any:
            def lane(o: Any) -> Any:
                pixel = self.reader.value(tirx.BufferLoad(self.image, [n, top + i, left + j, c + o]), {})
                return store(loaded, i * lanes + o, pixel)

            whole = self.reader.lanewise(lanes, lane)
            if not checked:
                return whole
            inside = tirx.all(
                top + i >= 0,
                top + i < loops.index(self.rows),
                left + j >= 0,
                left + j < loops.index(self.columns),
            )
            zero = self.reader.lanewise(lanes, lambda o: store(loaded, i * lanes + o, tirx.const(0, "float32")))
            return tirx.IfThenElse(inside, whole, zero)

        def column(j: int) -> Any:
            loaded, allocate = loops.scratch("column", a * lanes, "float32")

            def combined(i: int, o: Any) -> Any:
                values = [load(loaded, k * lanes + o) for k in range(a)]
                return store(buffers[i][0], j * lanes + o, _combine(INPUT[self.m][i], values))

            writes = [self.reader.lanewise(lanes, partial(combined, i)) for i in range(a)]
            return sequence(allocate, *(read(j, loaded, i) for i in range(a)), *writes)

        def put(i: int, j: int, o: Any) -> Any:
            values = [load(buffers[i][0], k * lanes + o) for k in range(a)]
            place = ((i * a + j) * loops.index(slots) + slot) * self.depth + c + o
            return store(v, place, _combine(INPUT[self.m][j], values))

        results = [self.reader.lanewise(lanes, partial(put, i, j)) for i in range(a) for j in range(a)]
        ahead = None if checked else self._next_tile(n, top, left + a, c)
        return sequence(ahead, *(allocate for _, allocate in buffers), *(column(j) for j in range(a)), *results)

    def _next_tile(self, n: Any, top: Any, left: Any, c: Any) -> Any:
        """Fetch what the next tile to the right reads beyond this one, if the image is not in the second-level cache.

        Lines of several rows, each a page or more from the other, are more than the processor follows by itself.
        """
        if not self.image_far:
            return None
        view = self.reader.flatten(tirx.BufferLoad(self.image, [loops.index(0)] * 4), []).source
        row = loops.index(self.columns) * self.depth
        start = (n * self.rows + top) * row + left * self.depth + c
        pixels = [(i, j) for i in range(self.a) for j in range(self.m)]
        return bind(
            "next",
            start,
            lambda at: sequence(*(prefetch(view, at + i * row + j * self.depth, self.lanes) for i, j in pixels)),
        )

    def _products(self, v: Any, m: Any, slots: Any, e: Any, p: Any, blocks: Any) -> Any:
        """Multiply all rows of ``v[e]`` with panel ``p`` of ``u[e]``."""
        view = self.reader.flatten(tirx.BufferLoad(self.filters, [loops.index(0)] * 4), []).source
        size = self.depth * self.panel
        known = static(blocks)
        step = -(-self.panel // (-(-(self.chunk or _CHUNK_TILES) // self.mr) if known is None else known))

        def block(r: Any, start: Any) -> Any:
            lanes, mr, width = self.panel_lanes, self.mr, self.vectors
            acc, allocate = loops.tile("acc", mr, self.panel, "float32")
            zero = tirx.const(0, "float32")
            spots = [(i, k * lanes) for i in range(mr) for k in range(width)]
            row, bind_row = tirx.Var("row", "int64"), (e * slots + r * mr) * self.depth
            out, bind_out = tirx.Var("out", "int64"), (e * slots + r * mr) * (self.panels * self.panel) + p * self.panel
            ahead, bind_ahead = tirx.Var("ahead", "int64"), start + size + r * (self.depth * step)

            def update(c: Any) -> Any:
                def lane(i: int, spot: int, o: Any) -> Any:
                    left = load(v, row + i * self.depth + c)
                    right = load(view, start + c * self.panel + spot + o)
                    return store(acc[i], spot + o, load(acc[i], spot + o) + left * right)

                fetch = prefetch(view, ahead + c * step, step) if self.far else None
                return sequence(fetch, *(self.reader.lanewise(lanes, partial(lane, *spot)) for spot in spots))

            def put(i: int, spot: int, o: Any) -> Any:
                return store(m, out + i * (self.panels * self.panel) + spot + o, load(acc[i], spot + o))

            return sequence(
                *allocate,
                tirx.Bind(row, loops.index(bind_row)),
                tirx.Bind(out, loops.index(bind_out)),
                tirx.Bind(ahead, loops.index(bind_ahead)) if self.far else None,
                *(self.reader.lanewise(lanes, lambda o, i=i, s=s: store(acc[i], s + o, zero)) for i, s in spots),
                loop("c", self.depth, update),
                *(self.reader.lanewise(lanes, partial(put, *spot)) for spot in spots),
            )

        return bind("panel", (e * self.panels + p) * size, lambda start: loop("r", blocks, lambda r: block(r, start)))

    def _inverse(self, m: Any, slots: Any, tile: Any, slot: Any) -> Any:
        """Transform one tile of products back; its last rows and columns may be outside of the image."""
        whole = all(static(e) is not None and e % self.m == 0 for e in (self.height, self.width))

        def at(n: Any, y: Any, x: Any) -> Any:
            def vector(c: Any) -> Any:
                buffers = [loops.scratch(f"row{i}", self.a * self.lanes, "float32") for i in range(self.m)]
                columns = [self._inverse_column(buffers, m, slots, slot, c, j) for j in range(self.a)]
                inside = self._put(buffers, n, y, x, c, False)
                if not whole:
                    fits = tirx.all(y + self.m <= loops.index(self.height), x + self.m <= loops.index(self.width))
                    inside = tirx.IfThenElse(fits, inside, self._put(buffers, n, y, x, c, True))
                return sequence(*(allocate for _, allocate in buffers), *columns, inside)

            return self._over_channels(self.maps, vector)

        return self._at(tile, at)

    def _inverse_column(self, buffers: Any, m: Any, slots: Any, slot: Any, c: Any, j: int) -> Any:
        lanes, a = self.lanes, self.a
        loaded, allocate = loops.scratch("column", a * lanes, "float32")

        def read(i: int, o: Any) -> Any:
            place = ((i * a + j) * loops.index(slots) + slot) * (self.panels * self.panel) + c + o
            return store(loaded, i * lanes + o, load(m, place))

        def combined(i: int, o: Any) -> Any:
            values = [load(loaded, k * lanes + o) for k in range(a)]
            return store(buffers[i][0], j * lanes + o, _combine(OUTPUT[self.m][i], values))

        reads = [self.reader.lanewise(lanes, partial(read, i)) for i in range(a)]
        writes = [self.reader.lanewise(lanes, partial(combined, i)) for i in range(self.m)]
        return sequence(allocate, *reads, *writes)

    def _put(self, buffers: Any, n: Any, y: Any, x: Any, c: Any, checked: bool) -> Any:
        batch, row, column, channel = self.fused.spatial.variables
        result, allocate = loops.scratch("pixel", self.lanes, "float32")

        def element(i: int, j: int, o: Any) -> Any:
            values = [load(buffers[i][0], k * self.lanes + o) for k in range(self.a)]
            return store(result, o, _combine(OUTPUT[self.m][j], values))

        def put(i: int, j: int, o: Any) -> Any:
            where = {batch: n, row: y + i, column: x + j, channel: c + o}
            return self.reader.store(where, [], load(result, o))

        def pixel(i: int, j: int) -> Any:
            statement = sequence(
                self.reader.lanewise(self.lanes, partial(element, i, j)),
                self.reader.lanewise(self.lanes, partial(put, i, j)),
            )
            if not checked:
                return statement
            inside = tirx.all(y + i < loops.index(self.height), x + j < loops.index(self.width))
            return tirx.IfThenElse(inside, statement, None)

        return sequence(allocate, *(pixel(i, j) for i in range(self.m) for j in range(self.m)))
