"""The schedule of depthwise convolution over two spatial axes.

    for (batch, channel):               parallel
        copy the padded channel into a local plane, columns of equal remainder by the stride next to each other
        for row, for vector of columns:
            acc = sum over the window of weight * plane vector        all loads contiguous
            out = epilogue(acc)

The last vector of a row is moved left so that it ends with the row; what it computes again is the same. Rows shorter
than a vector use a shorter one.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from optc.backends.base import Target
from optc.backends.kernels import loops
from optc.backends.kernels.fused import Axes, Fused, Reader, bits, take_apart
from optc.backends.kernels.loops import load, loop, sequence, static, store

TEMPLATE = "depthwise"
_WINDOW_LIMIT = 121
"""Window positions up to which the window is unrolled."""


def schedule(function: Any, target: Target) -> Any:
    """Return ``function`` as vector loops, or None if it is not a two-dimensional depthwise convolution."""
    fused = take_apart(function, TEMPLATE)
    if fused is None or len(fused.spatial.variables) != 4 or len(fused.reduced.variables) != 2:
        return None
    window = [static(e) for e in fused.reduced.extents]
    if any(e is None or e == 0 for e in window) or (window[0] or 1) * (window[1] or 1) > _WINDOW_LIMIT:
        return None
    value = fused.core.body.value
    if not isinstance(value, tirx.Add) or not isinstance(value.b, tirx.Mul):
        return None
    return _Generator(fused, target).function()


class _Generator:
    """Writes the loop nest of one depthwise convolution for one target."""

    def __init__(self, fused: Fused, target: Target) -> None:
        self.reader = Reader(fused)
        self.fused = fused = self.reader.fused
        self.dtype = str(fused.accumulator.dtype)
        self.weight, self.image = fused.core.body.value.b.a, fused.core.body.value.b.b
        self.strides = [int(s) for s in fused.core.annotations["optc.strides"]]
        self.dilations = [int(d) for d in fused.core.annotations["optc.dilations"]]
        self.multiplier = int(fused.core.annotations["optc.multiplier"])
        self.height, self.width = fused.spatial.extents[2:]
        self.window = [int(e) for e in fused.reduced.extents]
        self.lanes = max(1, target.vector_bits // bits(self.dtype))
        source = _source(self.image)
        self.source = source
        padded = list(fused.padding.body.buffer.shape) if fused.padding is not None else list(source.source.shape)
        self.rows, self.columns = (self.reader.size(e) for e in padded[2:])
        step = self.strides[1]
        self.pitch = self.reader.size(loops.ceildiv(self.columns, step))
        self.direct = fused.padding is None and step == 1

    def function(self) -> Any:
        """Return the function with its body replaced."""
        batch, channels = self.fused.spatial.extents[:2]
        task = Axes(self.fused.spatial.variables[:2], [batch, channels])
        return self.reader.finish(loop("task", task.total, lambda t: self._channel(task.at(t)), "parallel"))

    def _channel(self, places: dict[Any, Any]) -> Any:
        window = self.window[0] * self.window[1]
        weights, allocate = loops.scratch("weights", window, self.dtype)
        kept = [store(weights, i, self._weight(places, i)) for i in range(window)]
        if self.direct:
            return sequence(allocate, *kept, self._rows(places, weights, None))
        size = self.strides[1] * self.rows * self.pitch
        plane, reserve = loops.scratch("plane", size, self.dtype)
        return sequence(reserve, self._fill(places, plane), allocate, *kept, self._rows(places, weights, plane))

    def _weight(self, places: dict[Any, Any], position: int) -> Any:
        y, x = divmod(position, self.window[1])
        at = dict(zip(self.fused.reduced.variables, (loops.index(y), loops.index(x)), strict=True))
        return self.reader.value(self.weight, {**places, **at})

    def _fill(self, places: dict[Any, Any], plane: Any) -> Any:
        """Copy the channel into the plane, zeros around it."""
        step, padding = self.strides[1], self.fused.padding
        channel = places[self.fused.spatial.variables[1]]
        if self.multiplier > 1:
            channel = channel // self.multiplier
        batch = places[self.fused.spatial.variables[0]]

        def copy(value: Any, phase: int, y: Any, j: Any) -> Any:
            return store(plane, (phase * self.rows + y) * self.pitch + j, value)

        if padding is None:
            inner, before = self.source.source, [loops.index(0), loops.index(0)]
        else:
            stage = _source(padding.body.value)
            own = [v.var for v in padding.iter_vars]
            inner = stage.source
            offsets = [self.reader.analyzer.simplify(own[i] - stage.indices[i]) for i in (2, 3)]
            before = [loops.index(self.reader.size(offset)) for offset in offsets]
        height, width = (loops.index(self.reader.size(e)) for e in inner.shape[2:])

        def element(phase: int, y: Any, j: Any) -> Any:
            x = tirx.BufferLoad(inner, [batch, channel, y, j * step + phase - before[1]])
            value = self.reader.value(x, {})
            return copy(value.astype(self.dtype) if self.dtype != str(inner.dtype) else value, phase, y + before[0], j)

        def phase_rows(phase: int) -> Any:
            # Columns j with 0 <= j * step + phase - before < width.
            first = tirx.floordiv(tirx.max(before[1] - phase, loops.index(0)) + (step - 1), loops.index(step))
            stop = tirx.floordiv(width + before[1] - phase + (step - 1), loops.index(step))
            return loop(
                "y",
                height,
                lambda y: loop("j", tirx.max(stop - first, loops.index(0)), lambda j: element(phase, y, j + first)),
            )

        clear = None
        if padding is not None:
            zero = tirx.const(0, self.dtype)
            clear = loop("i", step * self.rows * self.pitch, lambda i: store(plane, i, zero))
        return sequence(clear, *(phase_rows(phase) for phase in range(step)))

    def _rows(self, places: dict[Any, Any], weights: Any, plane: Any) -> Any:
        width = static(self.width)
        lanes = self.lanes
        if width is not None:
            while lanes > max(width, 1):
                lanes //= 2
            return self._with_lanes(places, weights, plane, lanes)
        enough = loops.index(self.width) >= lanes
        return tirx.IfThenElse(
            enough, self._with_lanes(places, weights, plane, lanes), self._with_lanes(places, weights, plane, 1)
        )

    def _with_lanes(self, places: dict[Any, Any], weights: Any, plane: Any, lanes: int) -> Any:
        exact = static(self.width) is not None and self.width % lanes == 0

        def vector(y: Any, v: Any) -> Any:
            start = tirx.Var("start", "int64")
            place = v * lanes if exact else loops.smaller(v * lanes, self.width - lanes)
            acc, allocate = loops.scratch("acc", lanes, self.dtype)

            bases, fill = self._bases(plane, y, start)

            def total(lane: Any) -> Any:
                window = range(self.window[0] * self.window[1])
                terms = [load(weights, i) * self._image(places, plane, bases, y, start, lane, i) for i in window]
                value = terms[0]
                for term in terms[1:]:
                    value = value + term
                return store(acc, lane, value)

            def put(lane: Any) -> Any:
                variables = self.fused.spatial.variables
                where = {**places, variables[2]: y, variables[3]: start + lane}
                return self.reader.store(where, [], load(acc, lane))

            bind = tirx.Bind(start, loops.index(place))
            return sequence(bind, *fill, allocate, self.reader.lanewise(lanes, total), self.reader.lanewise(lanes, put))

        count = loops.ceildiv(self.width, lanes)
        return loop("y", self.height, lambda y: loop("v", count, lambda v: vector(y, v)))

    def _bases(self, plane: Any, y: Any, start: Any) -> tuple[Any, list[Any]]:
        """Return where in the plane the vector begins for each phase and window row, and the statements for that.

        Read from memory, these positions are opaque to TVM's region analysis, which takes seconds to relate them.
        """
        if plane is None:
            return None, []
        rows = self.window[0]
        bases, allocate = loops.scratch("bases", self.strides[1] * rows, "int64")
        fill = [allocate]
        for phase in range(self.strides[1]):
            for a in range(rows):
                row = phase * self.rows + y * self.strides[0] + a * self.dilations[0]
                fill.append(store(bases, phase * rows + a, row * self.pitch + start))
        return bases, fill

    def _image(self, places: dict[Any, Any], plane: Any, bases: Any, y: Any, x: Any, lane: Any, position: int) -> Any:
        """Return the input under window position ``position`` for output ``(y, x + lane)``."""
        a, b = divmod(position, self.window[1])
        if plane is None:
            at = dict(zip(self.fused.reduced.variables, (loops.index(a), loops.index(b)), strict=True))
            where = dict(zip(self.fused.spatial.variables[2:], (y, x + lane), strict=True))
            return self.reader.value(self.image, {**places, **where, **at})
        shift, phase = divmod(b * self.dilations[1], self.strides[1])
        return load(plane, load(bases, phase * self.window[0] + a) + shift + lane)


def _source(expression: Any) -> Any:
    """Return the one tensor load of an expression."""
    found = loops.loads(expression)
    return found[0]
