"""The schedule of packed contractions with one to four rows: all time goes into reading the weights once.

    for tile:                                      parallel
        acc[rows, streams, W] = sum over k of row_operand[rows, k] * packed[streams, k, W]         registers
        out = epilogue(acc)

One stream of reads does not use what memory can give: prefetchers in hardware follow each stream only within a page.
So a tile reads several panels at once, and where registers allow too few, a panel at several k. The panels of a stream
follow each other from tile to tile.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm import tirx

from optc.backends.base import Target
from optc.backends.kernels import loops
from optc.backends.kernels.contraction import TEMPLATE
from optc.backends.kernels.fused import Axes, Fused, Reader, bits, take_apart
from optc.backends.kernels.loops import bind, load, loop, sequence, store

ROWS = 4
"""The most rows that are bound by memory rather than by arithmetic."""
STREAMS = 4
"""Places of the weights that are read at the same time."""
VECTORS = 2
"""Vectors to a panel: as many accumulators in a row as fit beside those of other rows and streams."""


def schedule(function: Any, target: Target) -> Any:
    """Return ``function`` as a loop nest, or None if it is not a packed contraction of a few rows."""
    fused = take_apart(function, TEMPLATE)
    if fused is None or not int(fused.core.annotations["optc.packed"]):
        return None
    value = fused.core.body.value
    if not isinstance(value, tirx.Add) or not isinstance(value.b, tirx.Mul):
        return None
    rows = _pick(fused, "optc.rows").total
    columns = _pick(fused, "optc.columns")
    static = loops.static(rows), loops.static(columns.total)
    if None in static or static[0] not in range(1, ROWS + 1) or len(columns.variables) != 1:
        return None
    if len(fused.spatial.variables) != len(fused.core.annotations["optc.rows"]) + 1:
        return None
    return _Generator(fused, target).function()


def _pick(fused: Fused, key: str) -> Axes:
    return fused.spatial.pick(fused.core.annotations[key])


class _Generator:
    """Writes the loop nest of one contraction for one target."""

    def __init__(self, fused: Fused, target: Target) -> None:
        self.reader = Reader(fused)
        self.fused = fused = self.reader.fused
        self.row_operand, self.column_operand = fused.core.body.value.b.a, fused.core.body.value.b.b
        self.rows, self.columns, self.reduced = _pick(fused, "optc.rows"), _pick(fused, "optc.columns"), fused.reduced
        self.dtype = str(fused.accumulator.dtype)
        self.m, self.n = int(self.rows.total), int(self.columns.total)
        self.width = int(loops.loads(self.column_operand)[0].source.shape[-1])
        self.lanes = min(target.lanes(bits(self.dtype)), self.width)
        self.panels = -(-self.n // self.width)
        fit = target.registers * 3 // 4 // (self.m * (self.width // self.lanes))
        self.streams = max(1, min(STREAMS, fit, self.panels))
        self.tiles = -(-self.panels // self.streams)
        depth = loops.static(fused.reduced.total)
        wanted = range(STREAMS // self.streams, 0, -1)
        self.parts = 1 if depth is None else next(parts for parts in wanted if depth % parts == 0)
        self.depth = fused.reduced.total if depth is None else depth // self.parts

    def function(self) -> Any:
        """Return the function with its body replaced."""
        # Partial results indexed by a variable would not stay in registers: the last panel copies them here.
        self.tail, allocate = loops.scratch("tail", self.width, self.dtype)
        spare = [allocate] if self.n % self.width else []
        return self.reader.finish(loop("task", self.tiles, lambda t: sequence(*spare, self._tile(t)), "parallel"))

    def _tile(self, t: Any) -> Any:
        """Return one tile. The last streams may be shorter: their last panel is then computed again."""

        def named(panels: list[Any]) -> Any:
            if len(panels) == self.streams:
                return self._panels(panels)
            s = len(panels)
            place = t + s * self.tiles
            if (s + 1) * self.tiles > self.panels:
                place = loops.smaller(place, self.panels - 1)
            return bind(f"panel{s}", place, lambda p: named([*panels, p]))

        return named([])

    def _panels(self, panels: list[Any]) -> Any:
        m, lanes = self.m, self.lanes
        tiles = [loops.tile(f"acc{i}_", len(panels), self.width, self.dtype) for i in range(m)]
        acc = [buffers for buffers, _ in tiles]
        slots = [(i, s, v) for i in range(m) for s in range(len(panels)) for v in range(0, self.width, lanes)]

        def row(i: int, k: Any) -> Any:
            where = {**self.rows.at(loops.index(i)), **self.reduced.at(k)}
            return self.reader.value(self.row_operand, where, flat=[(self.rows, loops.index(i)), (self.reduced, k)])

        def update(k: Any, i: int, s: int, v: Any) -> Any:
            return store(acc[i][s], v, load(acc[i][s], v) + row(i, k) * self._weight(panels[s], k, v))

        def put(i: int, s: int, j: Any, value: Any) -> Any:
            position = panels[s] * self.width + j
            places = {**self.rows.at(loops.index(i)), **self.columns.at(position)}
            return self.reader.store(places, [(self.rows, loops.index(i)), (self.columns, position)], value)

        def each(make: Callable[[int, int, Any], Any]) -> list[Any]:
            def lane(i: int, s: int, v: int, lane: Any) -> Any:
                return make(i, s, v + lane)

            return [self.reader.lanewise(lanes, partial(lane, i, s, v)) for i, s, v in slots]

        def step(k: Any) -> Any:
            return sequence(*(s for part in range(self.parts) for s in each(partial(update, k + part * self.depth))))

        def result(s: int) -> Any:
            def vector(i: int, v: int) -> Any:
                return self.reader.lanewise(lanes, lambda lane: put(i, s, v + lane, load(acc[i][s], v + lane)))

            whole = sequence(*(vector(i, v) for i in range(m) for v in range(0, self.width, lanes)))
            if not self.n % self.width or (s + 1) * self.tiles < self.panels:
                return whole
            partly = sequence(*(copied(i, s) for i in range(m)))
            return tirx.IfThenElse(panels[s] < self.panels - 1, whole, partly)

        def copied(i: int, s: int) -> Any:
            def copy(v: int) -> Any:
                return self.reader.lanewise(lanes, lambda lane: store(self.tail, v + lane, load(acc[i][s], v + lane)))

            rest = self.n % self.width
            stores = loop("j", rest, lambda j: put(i, s, j, load(self.tail, j)))
            return sequence(*map(copy, range(0, self.width, lanes)), stores)

        zero = tirx.const(0, self.dtype)
        return sequence(
            *(allocate for _, allocations in tiles for allocate in allocations),
            *each(lambda i, s, v: store(acc[i][s], v, zero)),
            loop("k", self.depth, step),
            *(result(s) for s in range(len(panels))),
        )

    def _weight(self, panel: Any, k: Any, v: Any) -> Any:
        position = panel * self.width + v
        where = {**self.columns.at(position), **self.reduced.at(k)}
        return self.reader.value(self.column_operand, where, flat=[(self.reduced, k)])
