"""Winograd's minimal filtering for 3x3 convolution with stride 1, on channels-last images.

F(m x m, 3 x 3) after Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016): tiles of
``a = m + 2`` pixels square are transformed (``V = B^T d B``), multiplied channel-wise with transformed filters as
``a * a`` matrix products, and transformed back (``A^T M A``). F(4x4) needs a quarter of the multiplications of the
direct sum, F(2x2) four ninths.

Rounding: with inputs of like magnitude the error relative to the largest output is about 1e-6 for F(2x2) and below
1e-4 for F(4x4) (measured 5e-6 to 2e-5), because the transforms scale values up and down; direct summation has 3e-7.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from tvm import te, tirx

from optc.backends.base import Target
from optc.backends.kernels import loops, register_tile
from optc.backends.kernels.contraction import annotate
from optc.backends.kernels.fused import Axes, Fused, Reader, take_apart
from optc.backends.kernels.loops import bind, load, loop, sequence, static, store

TEMPLATE = "winograd_output"

# B^T, G and A^T of F(2, 3) and F(4, 3) with the interpolation points 0, 1, -1, (2, -2,) infinity.
INPUT = {
    2: np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], float),
    4: np.array(
        [
            [4, 0, -5, 0, 1, 0],
            [0, -4, -4, 1, 1, 0],
            [0, 4, -4, -1, 1, 0],
            [0, -2, -1, 2, 1, 0],
            [0, 2, -1, -2, 1, 0],
            [0, 4, 0, -5, 0, 1],
        ],
        float,
    ),
}
FILTER = {
    2: np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]),
    4: np.array(
        [
            [1 / 4, 0, 0],
            [-1 / 6, -1 / 6, -1 / 6],
            [-1 / 6, 1 / 6, -1 / 6],
            [1 / 24, 1 / 12, 1 / 6],
            [1 / 24, -1 / 12, 1 / 6],
            [0, 0, 1],
        ]
    ),
}
OUTPUT = {
    2: np.array([[1, 1, 1, 0], [0, 1, -1, -1]], float),
    4: np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], float),
}

_FETCH_BYTES = 4.0
"""Bytes of weights that one core gets from memory in a cycle."""
_CACHE_BYTES = 16.0
"""Bytes of intermediate values that one core moves through its caches in a cycle."""
_LARGE = 56
"""Pixels to a side assumed where only a run knows."""


def choose(height: Any, width: Any, depth: int, maps: int, target: Target) -> int | None:
    """Return the output tile (4 or 2) that should be fastest for an image of ``height`` x ``width``, None for direct.

    Products, weights from memory, and transforms are counted in cycles of one core.
    """
    lanes = register_tile.lanes(target, 32)
    if depth < 2 * lanes or maps < 2 * lanes:
        return None
    rows, columns = static(height) or _LARGE, static(width) or _LARGE

    def cycles(m: int) -> float:
        area, tiles = (m + 2) ** 2, -(-rows // m) * -(-columns // m)
        products = area * tiles * depth * maps / (2 * lanes)
        weights = area * depth * maps * 4 / _FETCH_BYTES
        # Each transform touches every value of a tile about three times.
        moved = area * tiles * (depth + maps) * 4 * 3 / _CACHE_BYTES
        return max(products, weights) + moved

    direct = max(rows * columns * 9 * depth * maps / (2 * lanes), 9 * depth * maps * 4 / _FETCH_BYTES)
    costs = {2: cycles(2), 4: cycles(4)}
    best = min(costs, key=lambda m: costs[m])
    return best if costs[best] < direct else None


def transform_filters(weights: np.ndarray, m: int) -> np.ndarray:
    """Return ``[M, C, 3, 3]`` as ``[a * a, C, M]``, computed in float64."""
    g = FILTER[m]
    u: np.ndarray = np.einsum("ar,ocrs,bs->abco", g, weights.astype(np.float64), g)
    return u.reshape(-1, *u.shape[2:]).astype(np.float32)


def products(v: Any, u: Any, maps: int) -> Any:
    """Multiply ``v [a * a, tiles, C]`` with packed ``u [a * a, ceil(M/width), C, width]``: ``[a * a, tiles, M]``."""
    width = u.shape[-1]
    c = te.reduce_axis((0, v.shape[-1]), "c")
    return te.compute(
        (*v.shape[:2], maps),
        lambda e, t, o: te.sum(v[e, t, c] * u[e, o // width, c, o % width], axis=c),
        "winograd",
        attrs=annotate([1], [2], "columns"),
    )


def inverse(products: Any, table: Any, height: Any, width: Any, batch: Any) -> Any:
    """Transform ``products [a * a, tiles, M]`` back to ``[N, height, width, M]``; ``table`` is ``A^T``."""
    m, a = int(table.shape[0]), int(table.shape[1])
    across, down = loops.ceildiv(width, m), loops.ceildiv(height, m)
    e = te.reduce_axis((0, a * a), "e")

    def element(n: Any, h: Any, w: Any, o: Any) -> Any:
        tile = (n * down + h // m) * across + w // m
        return te.sum(products[e, tile, o] * table[h % m, e // a] * table[w % m, e % a], axis=e)

    attributes = {"optc.template": TEMPLATE}
    shape = (batch, height, width, products.shape[-1])
    return te.compute(shape, element, "winograd_output", attrs=attributes)


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


def forward(x: Any, m: int, before: tuple[int, int], tiles: tuple[Any, Any], target: Target) -> Any:
    """Transform ``x [N, H, W, C]``, padded with zeros, into ``[a * a, N * tiles down * tiles across, C]``."""
    batch, _, _, depth = x.shape
    down, across = tiles
    lanes = register_tile.lanes(target, 32)
    shape = [loops.index(d) for d in ((m + 2) ** 2, batch * down * across, depth)]

    def generate(ins: Any, outs: Any) -> Any:
        return _Forward(ins[0], outs[0], m, before, tiles, lanes).function()

    return te.extern(
        [shape],
        [x],
        generate,
        name="winograd_input",
        dtype=["float32"],
        in_buffers=[tirx.decl_buffer(x.shape, x.dtype, "x", layout=None)],
        out_buffers=[tirx.decl_buffer(shape, "float32", "v", layout=None)],
    )


class _Forward:
    """Writes the loop nest of the input transform."""

    def __init__(self, x: Any, v: Any, m: int, before: tuple[int, int], tiles: tuple[Any, Any], lanes: int) -> None:
        self.x, self.v, self.m, self.before, self.tiles, self.lanes = x, v, m, before, tiles, lanes
        self.a = m + 2
        _, self.height, self.width, depth = (loops.plain(d) for d in x.shape)
        self.depth = int(depth)

    def function(self) -> Any:
        """Return the loops over all tiles."""
        down, _ = self.tiles
        rows = loops.plain(self.x.shape[0]) * down

        def row(r: Any) -> Any:
            return bind("y", r % down * self.m - self.before[0], lambda y: self._across(r, y))

        return loop("row", rows, row, "parallel")

    def _across(self, r: Any, y: Any) -> Any:
        down, across = self.tiles
        image = r // down

        def tile(t: Any) -> Any:
            def at(x: Any) -> Any:
                inside = tirx.all(
                    loops.index(y) >= 0,
                    loops.index(y) + self.a <= loops.index(self.height),
                    loops.index(x) >= 0,
                    loops.index(x) + self.a <= loops.index(self.width),
                )
                place = r * across + t
                return bind(
                    "tile",
                    place,
                    lambda p: tirx.IfThenElse(
                        inside, self._vectors(image, y, x, p, False), self._vectors(image, y, x, p, True)
                    ),
                )

            return bind("x", t * self.m - self.before[1], at)

        return loop("t", across, tile)

    def _vectors(self, n: Any, y: Any, x: Any, tile: Any, checked: bool) -> Any:
        """Transform one tile: rows first, then columns, for each vector of channels."""

        def vector(c: Any) -> Any:
            # A buffer per row of the tile: TVM keeps small ones on the stack.
            buffers = [loops.scratch(f"row{i}", self.a * self.lanes, "float32") for i in range(self.a)]
            halves = [self._columns(buffers, n, y, x, c, j, checked) for j in range(self.a)]
            results = [self._rows(buffers[i][0], tile, c, i) for i in range(self.a)]
            return sequence(*(allocate for _, allocate in buffers), *halves, *results)

        def start(k: Any) -> Any:
            exact = self.depth % self.lanes == 0
            return bind(
                "c", k * self.lanes if exact else loops.smaller(k * self.lanes, self.depth - self.lanes), vector
            )

        return loop("v", -(-self.depth // self.lanes), start)

    def _columns(self, buffers: Any, n: Any, y: Any, x: Any, c: Any, j: int, checked: bool) -> Any:
        """Transform column ``j`` of the tile."""

        loaded, allocate = loops.scratch("column", self.a * self.lanes, "float32")

        def read(i: int, offset: Any) -> Any:
            value = tirx.BufferLoad(self.x, [n, y + i, x + j, c + offset])
            if checked:
                inside = tirx.all(
                    loops.index(y) + i >= 0,
                    loops.index(y) + i < loops.index(self.height),
                    loops.index(x) + j >= 0,
                    loops.index(x) + j < loops.index(self.width),
                )
                value = tirx.if_then_else(inside, value, tirx.const(0, "float32"))
            return store(loaded, i * self.lanes + offset, value)

        transform = INPUT[self.m]
        reads = [loop("lane", self.lanes, partial(read, i), "vectorized") for i in range(self.a)]

        def combined(i: int, o: Any) -> Any:
            values = [load(loaded, k * self.lanes + o) for k in range(self.a)]
            return store(buffers[i][0], j * self.lanes + o, _combine(transform[i], values))

        writes = [loop("lane", self.lanes, partial(combined, i), "vectorized") for i in range(self.a)]
        return sequence(allocate, *reads, *writes)

    def _rows(self, buffer: Any, tile: Any, c: Any, i: int) -> Any:
        """Transform row ``i`` of what the columns gave, and store it."""

        def element(j: int, o: Any) -> Any:
            values = [load(buffer, k * self.lanes + o) for k in range(self.a)]
            place = [loops.index(i * self.a + j), loops.index(tile), c + o]
            return tirx.BufferStore(self.v, _combine(INPUT[self.m][j], values), place)

        return sequence(*(loop("lane", self.lanes, partial(element, j), "vectorized") for j in range(self.a)))


def schedule(function: Any, target: Target) -> Any:
    """Return the inverse transform with its epilogue as vector loops, or None if it is fused in another way."""
    fused = take_apart(function, TEMPLATE)
    if fused is None or fused.padding is not None or fused.tail is not None:
        return None
    return _Inverse(fused, target).function()


class _Inverse:
    """Writes the loop nest of the inverse transform."""

    def __init__(self, fused: Fused, target: Target) -> None:
        self.reader = Reader(fused)
        self.fused = self.reader.fused
        products, first, _ = loops.loads(self.fused.core.body.value)[1:]
        self.products = products.source
        self.m, self.a = (int(d) for d in first.source.shape)
        self.lanes = register_tile.lanes(target, 32)
        self.height, self.width, self.depth = self.fused.spatial.extents[1:]

    def function(self) -> Any:
        """Return the function with its body replaced."""
        size = self.reader.size
        down, across = (size(loops.ceildiv(e, self.m)) for e in (self.height, self.width))
        rows = Axes(self.fused.spatial.variables[:2], [self.fused.spatial.extents[0], down])

        def row(r: Any) -> Any:
            n, y = (rows.at(r)[v] for v in rows.variables)

            def tile(top: Any, t: Any) -> Any:
                return bind("tile", r * across + t, lambda p: bind("x", t * self.m, lambda x: self._tile(n, top, x, p)))

            return bind("y", y * self.m, lambda top: loop("t", across, lambda t: tile(top, t)))

        return self.reader.finish(loop("row", rows.total, row, "parallel"))

    def _tile(self, n: Any, y: Any, x: Any, tile: Any) -> Any:
        """Return one tile, whose last rows and columns may be outside of the image."""
        whole = all(static(e) is not None and e % self.m == 0 for e in (self.height, self.width))
        lanes, depth = self.lanes, int(self.depth)

        def vector(c: Any) -> Any:
            buffers = [loops.scratch(f"row{i}", self.a * lanes, "float32") for i in range(self.m)]
            columns = [self._column(buffers, tile, c, j) for j in range(self.a)]
            inside = self._put(buffers, n, y, x, c, False)
            if not whole:
                fits = tirx.all(y + self.m <= loops.index(self.height), x + self.m <= loops.index(self.width))
                inside = tirx.IfThenElse(fits, inside, self._put(buffers, n, y, x, c, True))
            return sequence(*(allocate for _, allocate in buffers), *columns, inside)

        def start(k: Any) -> Any:
            return bind("c", k * lanes if depth % lanes == 0 else loops.smaller(k * lanes, depth - lanes), vector)

        return loop("v", -(-depth // lanes), start)

    def _column(self, buffers: Any, tile: Any, c: Any, j: int) -> Any:
        lanes = self.lanes
        loaded, allocate = loops.scratch("column", self.a * lanes, "float32")

        def read(i: int, o: Any) -> Any:
            x = tirx.BufferLoad(self.products, [loops.index(i * self.a + j), loops.index(tile), c + o])
            return store(loaded, i * lanes + o, self.reader.value(x, {}))

        def combined(i: int, o: Any) -> Any:
            values = [load(loaded, k * lanes + o) for k in range(self.a)]
            return store(buffers[i][0], j * lanes + o, _combine(OUTPUT[self.m][i], values))

        reads = [self.reader.lanewise(lanes, partial(read, i)) for i in range(self.a)]
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
