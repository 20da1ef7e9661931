"""The schedule of depthwise convolution of 8-bit integers: pairs of lines, multiplied and added by one instruction.

    for (image, strip of output rows, run of channels, span of columns):                parallel
        for row of the strip:
            lines[pairs, columns, channels, 2] = int16(image), for pairs that are new   zero point subtracted
            for block of channels:
                for some of the weights, one vector for each, in registers:
                    for tile of P pixels:
                        sums[P, lanes] += multiply_add(lines, weights)          registers, begin as the epilogue wants
                out = epilogue(sums)

Lines are widened and interleaved once, for all the windows that they are in, into a ring that stays in the first-level
cache. Padding is zeros among them, so that windows need no case of their own. The last span of columns and the last
block of channels are moved back so that they end where the image does: what they compute again is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import tirx

from optc.backends.base import Target
from optc.backends.kernels import integer_dot, loops
from optc.backends.kernels.fused import Axes, Fused, Reader, take_apart
from optc.backends.kernels.integer_depthwise import TEMPLATE, Lines
from optc.backends.kernels.integer_dot import put, vector_at
from optc.backends.kernels.integer_epilogue import Epilogue, Row
from optc.backends.kernels.loops import bind, load, loop, sequence, static, store

_RUN = 64
"""Channels whose lines are widened together: one cache line of each pixel."""
_ROWS = 16
"""Rows of a strip, about."""


def schedule(function: Any, target: Target) -> Any:
    """Return ``function`` as vector loops, or None if it is not one depthwise convolution with its epilogue."""
    fused = take_apart(function, TEMPLATE)
    return None if fused is None else _Generator(fused, target).function()


def least_channels(target: Target) -> int:
    """Return the channels that make a vector of sums."""
    return integer_dot.choose(target).lanes


@dataclass(frozen=True)
class _Task:
    """Output rows of image ``n`` from ``first`` on, columns from ``left``, channels from ``base``.

    ``lines`` is the ring of widened lines, ``sums`` one row of a block of channels.
    """

    n: Any
    first: Any
    left: Any
    base: Any
    lines: Any
    sums: Any


class _Generator:
    """Writes the loop nest of one convolution for one target."""

    def __init__(self, fused: Fused, target: Target) -> None:
        self.reader = Reader(fused)
        self.fused = fused = self.reader.fused
        self.target, self.dot = target, integer_dot.choose(target)
        notes = fused.core.annotations
        kernel, strides, dilations, self.before = (
            [int(v) for v in notes[f"optc.{name}"]] for name in ("kernel", "strides", "dilations", "before")
        )
        self.lines = Lines(kernel[0], strides[0], dilations[0], self.dot.group)
        self.columns, self.step, self.dilation = kernel[1], strides[1], dilations[1]
        factors = fused.core.body.value.b
        guard, (self.weights,) = factors.a, loops.loads(factors.b)
        self.inside = guard.args[1] if isinstance(guard, tvm.ir.Call) else guard
        self.image = max(loops.loads(self.inside), key=lambda x: len(x.indices))
        self.n, self.y, self.x, self.c = fused.spatial.variables
        batch, self.height, self.width, channels = fused.spatial.extents
        self.batch, self.channels = batch, int(channels)
        self.h, self.w = (self.reader.size(e) for e in self.image.source.shape[1:3])
        lanes = self.dot.lanes
        self.block = 2 * lanes if self.channels >= 2 * lanes else lanes
        self.blocks = -(-self.channels // self.block)
        self.runs = -(-self.blocks // max(1, _RUN // self.block))
        self.run = -(-self.blocks // self.runs)
        self.pixel = self.run * self.block * self.lines.group
        self.ring = self.lines.reach + 1
        self.span = self._span()
        self.spans = self.reader.size(loops.ceildiv(self.width, self.span))
        slots = max(1, (self.dot.registers - 2) // 2 // self.columns)
        self.passes = [range(i, min(i + slots, self.lines.slots)) for i in range(0, self.lines.slots, slots)]
        self.tile = self._tile(static(self.span))
        self.tiles = self.reader.size(loops.ceildiv(self.span, self.tile))
        self.padded = self.reader.size(self._reach(self.tiles * self.tile))
        self.pitch = self.padded * self.pixel
        height, alone = static(self.height), self.runs * (static(self.spans) or 1) == 1
        strips = 1 if height is None else max(-(-height // _ROWS), 2 if alone else 1)
        self.rows = _ROWS if height is None else -(-height // strips)
        self.strips = self.reader.size(loops.ceildiv(self.height, self.rows))
        self.epilogue = Epilogue(self.reader, [self.y, self.x], self.block, target)

    def _reach(self, columns: Any) -> Any:
        """Return how many columns of the image ``columns`` windows read."""
        return (columns - 1) * self.step + (self.columns - 1) * self.dilation + 1

    def _span(self) -> Any:
        """Return how many columns go together: the ring takes no more than most of the first-level cache."""
        size = 2 * self.pixel * self.ring
        fit = max(4, (self.target.caches.l1 * 3 // 4 // size - self._reach(1)) // self.step + 1)
        width = static(self.width)
        if width is None:
            return self.reader.size(tirx.min(self.width, loops.index(fit)))
        return max(1, -(-width // max(1, -(-width // fit))))

    def function(self) -> Any:
        """Return the function with its body replaced."""
        lines, allocate = loops.scratch("lines", self.ring * self.pitch, "int16")
        sums, allocate_sums = loops.scratch("sums", self.tiles * self.tile * self.block, "int32")
        axes = Axes([tirx.Var(name, "int64") for name in "nsrp"], [self.batch, self.strips, self.runs, self.spans])

        def task(t: Any) -> Any:
            n, s, run, part = axes.at(t).values()
            left = loops.smaller(part * self.span, self.width - self.span)
            starts = {"n": n, "first": s * self.rows, "left": left, "base": run * (self.run * self.block)}
            body = self._bound(
                starts, lambda n, first, left, base: self._strip(_Task(n, first, left, base, lines, sums))
            )
            return sequence(allocate, allocate_sums, *self.epilogue.allocations, body)

        return self.reader.finish(loop("task", axes.total, task, "parallel"))

    def _bound(self, values: dict[str, Any], body: Callable[..., Any]) -> Any:
        """Return ``body(*names)`` with each name bound to its value."""
        names: list[Any] = []

        def nest(rest: list[tuple[str, Any]]) -> Any:
            if not rest:
                return body(*names)
            name, value = rest[0]

            def use(variable: Any) -> Any:
                names.append(variable)
                return nest(rest[1:])

            return bind(name, value, use)

        return nest(list(values.items()))

    def _strip(self, task: _Task) -> Any:
        stride, group = self.lines.stride, self.lines.group

        def row(r: Any) -> Any:
            origin = r * stride // group
            # Of the first row all lines are new.
            known = tirx.Select(loops.index(r) == 0, loops.index(0), (r - 1) * stride // group + self.ring)
            phase = loops.index(0) if self.lines.phases == 1 else r * stride % group

            def body(origin: Any, known: Any, phase: Any) -> Any:
                fresh = loop("g", origin + self.ring - known, lambda g: self._fill(task, known + g))
                return sequence(fresh, self._row(task, task.first + r, origin, phase))

            return self._bound({"origin": origin, "known": known, "phase": phase}, body)

        return loop("row", loops.smaller(self.rows, self.height - task.first), row)

    def _blocks(self, task: _Task, body: Callable[[Any, Any], Any]) -> Any:
        """Return ``body(block, its first channel)`` for all blocks of a run."""

        def block(b: Any) -> Any:
            start = task.base + b * self.block
            if self.channels % self.block:
                start = loops.smaller(start, self.channels - self.block)
            return bind("c", start, lambda c: body(b, c))

        rest = self.run if self.runs == 1 else self.blocks - tirx.floordiv(task.base, self.block)
        return loop("b", loops.smaller(self.run, rest), block)

    def _fill(self, task: _Task, g: Any) -> Any:
        """Return the statement that widens group ``g`` of the lines that the windows of a strip read."""
        group = self.lines.group
        top = task.first * self.lines.stride - self.before[0] + g * group
        names = [tirx.Var(f"inside{i}", "bool") for i in range(group)]
        inside = [tirx.all(top + i >= 0, top + i < loops.index(self.h)) for i in range(group)]
        bindings = [tirx.Bind(name, value) for name, value in zip(names, inside, strict=True)]

        def body(slot: Any, x: Any, first: Any, stop: Any) -> Any:
            nothing = self._clear(task, slot, loops.index(0), self.padded)

            def part(lines: Sequence[Any], inside: Any) -> Any:
                return sequence(
                    self._clear(task, slot, loops.index(0), first),
                    loop("q", stop - first, lambda q: self._pixel(task, lines, x + first + q, slot, first + q, inside)),
                    self._clear(task, slot, stop, self.padded),
                )

            whole = part([top + i for i in range(group)], None)
            if group == 1:
                return tirx.IfThenElse(names[0], whole, nothing)
            # One of two lines is outside: it is read where the other one is, and made zero.
            near = tirx.Select(names[0], top, top + 1)
            border = tirx.IfThenElse(tirx.any(*names), part([near, near], names), nothing)
            return tirx.IfThenElse(tirx.all(*names), whole, border)

        zero, size = loops.index(0), loops.index(self.padded)
        x = task.left * self.step - self.before[1]
        first = tirx.min(tirx.max(zero, zero - x), size)
        stop = tirx.max(tirx.min(size, self.w - x), first)
        values = {"slot": g % self.ring * self.pitch, "x": x, "begin": first, "end": stop}
        return sequence(*bindings, self._bound(values, body))

    def _clear(self, task: _Task, slot: Any, begin: Any, end: Any) -> Any:
        """Return the statement that makes columns from ``begin`` to before ``end`` zero."""
        size = self.block * self.lines.group
        start, zero = slot + begin * self.pixel, tirx.Broadcast(tirx.const(0, "int16"), size)
        return loop("q", (end - begin) * self.run, lambda q: put(task.lines, start + q * size, size, zero))

    def _pixel(self, task: _Task, lines: Sequence[Any], q: Any, slot: Any, column: Any, inside: Any) -> Any:
        """Return the statement that widens pixel ``q`` of ``lines`` of the image."""
        size = self.block * self.lines.group

        def block(b: Any, c: Any) -> Any:
            firsts = [tirx.BufferLoad(self.image.source, [task.n, line, q, c]) for line in lines]
            to = slot + column * self.pixel + b * size
            return self._widen(task, [self.reader.value(x, {}) for x in firsts], to, inside)

        return self._blocks(task, block)

    def _widen(self, task: _Task, firsts: Sequence[Any], to: Any, inside: Any) -> Any:
        """Return the statement that widens one block of a pixel of each line, from the flat loads ``firsts`` on."""
        lanes, group, image = self.dot.lanes, self.lines.group, firsts[0].source
        raw, allocate = loops.scratch("raw", lanes * group, str(image.dtype))

        def lane(i: Any, v: int) -> Any:
            value = self.reader.value(self.inside, {self.n: task.n}, given={self.image.source: load(raw, i)})
            value = value.astype("int16")
            if inside is not None:
                value = tirx.Select(tirx.Select(i % 2 == 0, *inside), value, tirx.const(0, "int16"))
            return store(task.lines, to + v * group + i, value)

        def vector(v: int) -> Any:
            parts = [vector_at(image, first.indices[0] + v, lanes) for first in firsts]
            if group > 1:
                order = [tirx.IntImm("int32", i + part * lanes) for i in range(lanes) for part in range(group)]
                parts = [tirx.Shuffle(parts, order)]
            widened = self.reader.lanewise(lanes * group, lambda i: lane(i, v))
            return sequence(put(raw, 0, lanes * group, parts[0]), widened)

        return sequence(allocate, *(vector(v) for v in range(0, self.block, lanes)))

    def _row(self, task: _Task, y: Any, origin: Any, phase: Any) -> Any:
        """Return output row ``y``, whose windows begin in group ``origin`` with line ``phase``."""
        places = {
            f"line{i}": (origin + self.lines.offset(i, phase)) % self.ring * self.pitch for i in range(self.lines.slots)
        }

        def block(lines: Sequence[Any], b: Any, c: Any) -> Any:
            group = self.lines.group
            start = (phase * (self.lines.slots * self.columns * self.channels) + c) * group

            def sums(weight: Any) -> Any:
                vectors = range(0, self.block, self.dot.lanes)
                return sequence(*(self._sums(task, lines, b, weight, some, v) for some in self.passes for v in vectors))

            prepared = self.epilogue.prepare(lambda j: {self.n: task.n, self.c: c + j}, self.block)
            return sequence(prepared, bind("weight", start, sums), self._put(task, y, c))

        return self._bound(places, lambda *lines: self._blocks(task, lambda b, c: block(lines, b, c)))

    def _tile(self, span: int | None) -> int:
        """Return how many pixels make a tile: the least work in tiles whose sums stay in registers."""
        most = max(1, self.dot.registers - len(self.passes[0]) * self.columns - 2)
        if span is None:
            return min(most, 4)
        return min(range(min(most, span), 0, -1), key=lambda p: -(-span // p) * (p + 1))

    def _sums(self, task: _Task, lines: Sequence[Any], b: Any, weight: Any, slots: range, v: int) -> Any:
        """Return the loop that adds the products of ``slots`` for vector ``v`` of block ``b``, tile by tile."""
        lanes, group = self.dot.lanes, self.lines.group
        weights, pixels = self.reader.flat_view(self.weights.source), range(self.tile)
        uses: dict[int, list[tuple[int, int]]] = {}
        for p in pixels:
            for k in range(self.columns):
                uses.setdefault(p * self.step + k * self.dilation, []).append((p, k))

        def tile(t: Any) -> Any:
            acc, allocate = loops.scratch("acc", self.tile * lanes, "int32")
            kept = [(t * self.tile + p) * self.block + v for p in pixels]
            known = [(task.sums, at) for at in kept] if slots.start else [(self.epilogue.first, v)] * self.tile
            begin = [put(acc, p * lanes, lanes, vector_at(source, at, lanes)) for p, (source, at) in enumerate(known)]
            steps = []
            for slot in slots:
                start = lines[slot] + t * (self.tile * self.step * self.pixel) + (b * self.block + v) * group
                for column in sorted(uses):
                    data = vector_at(task.lines, start + column * self.pixel, lanes * group)
                    for p, k in uses[column]:
                        at = weight + ((slot * self.columns + k) * self.channels + v) * group
                        factor = vector_at(weights, at, lanes * group)
                        total = self._add(vector_at(acc, p * lanes, lanes), data, factor)
                        steps.append(put(acc, p * lanes, lanes, total))
            end = [put(task.sums, kept[p], lanes, vector_at(acc, p * lanes, lanes)) for p in pixels]
            return sequence(allocate, *begin, *steps, *end)

        return loop("tile", self.tiles, tile)

    def _add(self, total: Any, left: Any, right: Any) -> Any:
        """Return ``total`` plus the sums of ``group`` neighbouring products."""
        lanes = self.dot.lanes
        if self.lines.group == 1:
            return total + left.astype(f"int32x{lanes}") * right.astype(f"int32x{lanes}")
        return total + tirx.call_llvm_pure_intrin(f"int32x{lanes}", self.dot.name, left, right)

    def _put(self, task: _Task, y: Any, c: Any) -> Any:
        """Return the epilogue of a block of channels of row ``y``, some pixels together."""
        together = self.epilogue.together(self.block)

        def pixels(x: Any, count: int) -> Any:
            rows = [self._pixel_row(task, y, x + i, c) for i in range(count)]
            return self.epilogue.store(rows, self.block, self.dot.lanes)

        whole = self.span // together
        rest = self.span - whole * together
        return sequence(
            loop("x", whole, lambda x: pixels(x * together, together)) if static(whole) != 0 else None,
            loop("x", rest, lambda x: pixels(whole * together + x, 1)) if static(rest) != 0 else None,
        )

    def _pixel_row(self, task: _Task, y: Any, x: Any, c: Any) -> Row:
        """Return pixel ``x`` of the span, channels from ``c``."""
        where = {self.n: task.n, self.y: y, self.x: task.left + x}
        return Row(task.sums, x * self.block, lambda j: {**where, self.c: c + j})
