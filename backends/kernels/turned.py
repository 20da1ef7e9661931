"""The rule for element-wise kernels that read one operand across its rows, transpositions above all.

    for (outer axes, block of b):                        parallel
        for block of a:
            square = x[b, a] of the block, transposed in registers        whole vectors of both axes
            out[a, b] = f(square)
            what is less than a square, or of an unknown extent, element by element in the same blocks

``b`` is the last axis of the result and ``a`` the axis that is last in the operand. Blocks are a cache line wide both
ways, so each line of either is touched once. The last block of a known extent is moved back to end with it: what it
computes again is the same, and all squares are whole.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from optc.backends.base import Target
from optc.backends.kernels import loops
from optc.backends.kernels.fused import Axes, Reader, bits, element_wise
from optc.backends.kernels.loops import bind, load, loop, sequence, store
from optc.backends.kernels.transpose import transpose

_LINE_BYTES = 64
_SQUARE_BITS = 128
"""The vectors that squares of short integers are made of: shuffles across wider ones take several instructions."""
_LEAST_LANES = 4
"""The side of the smallest square that is worth its shuffles."""
_SHORT = ("int8", "uint8", "int16", "uint16")


def schedule(function: Any, block: Any, target: Target, parallel: bool) -> Any:
    """Return ``function``, of which only ``block`` is left, as a loop nest; None if no operand is read across."""
    fused = element_wise(function, block)
    if fused is None or len(fused.spatial.variables) < 2:
        return None
    across = [x for x in loops.loads(block.body.value) if _axis(x, fused.spatial) is not None]
    if len(across) != 1:
        return None
    (operand,) = across
    if sum(x.source.same_as(operand.source) for x in loops.loads(block.body.value)) != 1:
        return None
    return _Turned(Reader(fused), operand, block.body.value, target).function(parallel)


def _axis(read: Any, spatial: Axes) -> int | None:
    """Return the position of the axis that ``read`` ends with; None if that is the last one, or ``read`` lacks it."""
    *others, last = list(read.indices) or [None]
    found = [i for i, v in enumerate(spatial.variables) if v.same_as(last)]
    b = spatial.variables[-1]
    if not found or found[0] == len(spatial.variables) - 1 or loops.static(spatial.extents[-1]) == 1:
        return None
    if sum(index.same_as(b) for index in others) != 1 or loops.static(spatial.extents[found[0]]) == 1:
        return None
    return found[0]


def _lanes(dtype: str, target: Target) -> int:
    """Return the side of the squares that are transposed by shuffles, 1 for none."""
    if bits(dtype) == 32:
        return target.lanes(32)
    return _SQUARE_BITS // bits(dtype) if dtype in _SHORT and target.vector_bits >= _SQUARE_BITS else 1


def _moved_back(start: Any, size: int, extent: Any) -> Any:
    """Return where a block of ``size`` from ``start`` begins so that it ends within a known ``extent``."""
    known = loops.static(extent)
    return start if known is None or known < size else loops.smaller(start, known - size)


class _Turned:
    """Writes the loop nest."""

    def __init__(self, reader: Reader, operand: Any, value: Any, target: Target) -> None:
        self.reader, self.operand, self.value = reader, operand, value
        spatial = reader.fused.spatial
        at = _axis(operand, spatial)
        assert at is not None
        self.a, self.b = spatial.variables[at], spatial.variables[-1]
        self.rows, self.columns = spatial.extents[at], spatial.extents[-1]
        rest = [i for i in range(len(spatial.variables) - 1) if i != at]
        self.outer = Axes([spatial.variables[i] for i in rest], [spatial.extents[i] for i in rest])
        self.dtype = str(operand.source.dtype)
        self.lanes = _lanes(self.dtype, target)
        least = min(loops.static(extent) or self.lanes for extent in (self.rows, self.columns))
        while self.lanes > _LEAST_LANES and least < self.lanes:
            self.lanes //= 2
        size = max(self.lanes, _LINE_BYTES * 8 // bits(self.dtype))
        self.high, self.wide = (self._fit(extent, size) for extent in (self.rows, self.columns))

    def _fit(self, extent: Any, size: int) -> int:
        """Return the size of a block: whole squares, no more than there are."""
        known = loops.static(extent)
        return size if known is None or known >= size else max(self.lanes, known // self.lanes * self.lanes)

    def function(self, parallel: bool) -> Any:
        """Return the function with its body replaced."""
        blocks = self.reader.size(loops.ceildiv(self.columns, self.wide))
        square, allocate = loops.scratch("square", self.lanes**2, self.dtype)
        turned, allocate_turned = loops.scratch("turned", self.lanes**2, self.dtype)
        scratch = [allocate, allocate_turned] if self.lanes > 1 else []

        def task(t: Any) -> Any:
            first = _moved_back(t % blocks * self.wide, self.wide, self.columns)
            return bind("o", t // blocks, lambda o: bind("first", first, lambda b: body(o, b)))

        def body(o: Any, b: Any) -> Any:
            places = self.outer.at(o)

            def block(i: Any) -> Any:
                second = _moved_back(i * self.high, self.high, self.rows)
                return bind("second", second, lambda a: self._block(places, a, b, square, turned))

            return sequence(*scratch, loop("i", loops.ceildiv(self.rows, self.high), block))

        total = self.outer.total * blocks
        return self.reader.finish(loop("task", total, task, "parallel" if parallel else "serial"))

    def _block(self, places: dict[Any, Any], a: Any, b: Any, square: Any, turned: Any) -> Any:
        """Return the statement for one block from row ``a`` and column ``b`` of the result."""
        high, wide = loops.smaller(self.high, self.rows - a), loops.smaller(self.wide, self.columns - b)
        partial = loop("i", high, lambda i: loop("j", wide, lambda j: self._element(places, a + i, b + j)))
        if self.lanes == 1:
            whole = loop("i", self.high, lambda i: loop("j", self.wide, lambda j: self._element(places, a + i, b + j)))
        else:

            def one(i: Any, j: Any) -> Any:
                return self._square(places, a + i * self.lanes, b + j * self.lanes, square, turned)

            rows, columns = self.high // self.lanes, self.wide // self.lanes
            whole = loop("i", rows, lambda i: loop("j", columns, lambda j: one(i, j)))
        if (loops.static(self.rows) or 0) >= self.high and (loops.static(self.columns) or 0) >= self.wide:
            return whole
        inside = tirx.all(a + self.high <= loops.index(self.rows), b + self.wide <= loops.index(self.columns))
        return tirx.IfThenElse(inside, whole, partial)

    def _square(self, places: dict[Any, Any], a: Any, b: Any, square: Any, turned: Any) -> Any:
        """Return the statement for a square of vectors."""
        lanes = self.lanes

        def line(j: int) -> Any:
            def read(lane: Any) -> Any:
                at = {**places, self.a: a + lane, self.b: b + j}
                return store(square, j * lanes + lane, self.reader.value(self.operand, at))

            return self.reader.lanewise(lanes, read)

        def write(i: int) -> Any:
            def element(lane: Any) -> Any:
                return self._element(places, a + i, b + lane, load(turned, i * lanes + lane))

            return self.reader.lanewise(lanes, element)

        shuffled = transpose(square, lanes, lambda i: (turned, i * lanes))
        return sequence(*map(line, range(lanes)), *shuffled, *map(write, range(lanes)))

    def _element(self, places: dict[Any, Any], a: Any, b: Any, operand: Any = None) -> Any:
        at = {**places, self.a: a, self.b: b}
        given = {} if operand is None else {self.operand.source: operand}
        return self.reader.store(at, [], self.reader.value(self.value, at, given=given))
