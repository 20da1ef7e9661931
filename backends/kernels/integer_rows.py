"""Where the rows of an integer product come from: a matrix, or the windows of an image.

Both are copied strip by strip in the form that the instruction takes, so that every row is a few runs of neighbours:
one of a matrix, one for each line (or pixel) of a window.
"""

from __future__ import annotations

from typing import Any, Protocol

import tvm
from tvm import tirx

from optc.backends.kernels import loops
from optc.backends.kernels.fused import Axes, Fused, Reader
from optc.backends.kernels.integer_contraction import PANEL_DEPTH, QUAD, split_depth
from optc.backends.kernels.integer_form import Form
from optc.backends.kernels.loops import bind, load, loop, sequence, static, store

_LEAST_ROWS = 64
"""Rows that pay for widening the columns once more."""
_MANY = 8
"""Products in a batch that make about as many for each thread, if not as many."""


class Rows(Protocol):
    """The rows of a product, in strips. A row is ``taps`` runs of ``chunks * chunk`` neighbours.

    Values of ``channels`` follow each other in each ``pitch`` of the strip.
    A strip of ``strip_bytes`` stays in the second-level cache while all columns pass over it.
    """

    form: Form
    axes: Axes
    total: Any
    strips: Any
    height: int | Any
    taps: int
    chunks: Any
    chunk: int
    channels: int
    pitch: Any

    def count(self, s: Any) -> Any:
        """Return the number of rows in strip ``s``."""

    @property
    def size(self) -> Any:
        """The number of values that a strip's buffer holds."""

    def widen(self, places: dict[Any, Any], s: Any, rows: Any) -> Any:
        """Return the statement that fills the buffer."""

    @property
    def stride(self) -> Any:
        """The distance of neighbouring rows, None if it varies."""

    def base(self, r: Any) -> Any:
        """Return where row ``r`` of the strip begins in the buffer; rows behind the last one may lie beyond its end
        where the distance does not vary, else they are that of the last one.
        """

    def offset(self, tap: Any) -> Any:
        """Return where run ``tap`` of a row begins, from the base."""


def tile_rows(rows: int | None, most: int) -> int:
    """Choose the rows of the register tile: least work in partial tiles, taller tiles preferred."""
    if rows is None:
        return most
    return min(range(most, 0, -1), key=lambda m: -(-rows // m) * m * (1 + 0.3 / m))


def spans(reader: Reader, extent: Any, lanes: int, element: Any) -> Any:
    """Return vector loops over ``extent``, then single elements."""
    vectors, rest = extent // lanes, extent % lanes
    whole = None
    if static(vectors) != 0:
        whole = loop("v", vectors, lambda v: reader.lanewise(lanes, lambda lane: element(v * lanes + lane)))
    if static(rest) == 0:
        return whole
    return sequence(whole, loop("rest", rest, lambda j: element(vectors * lanes + j)))


def _apart(pitch: Any, size: int) -> Any:
    """Return a distance of ``pitch`` values or more at which rows do not fall into the same few sets of the cache."""
    return pitch + 64 // size if static(pitch) is not None and pitch * size % 512 == 0 else pitch


def strip_height(total: int, fit: int, enough: int, batch: int | None) -> int:
    """Return the height of equal strips of at most ``fit``: an even number of them, where ``enough`` stay in each.

    A ``batch`` that threads share evenly needs none: each strip reads, and may widen, all columns again.
    """
    count = -(-total // fit)
    if total >= 2 * enough and (batch is None or (batch % 2 and batch < _MANY)):
        count = max(2, count + count % 2)
    return max(1, -(-total // max(1, count)))


class MatrixRows:
    """Rows of a matrix: one run each."""

    taps = 1

    def __init__(
        self,
        fused: Fused,
        reader: Reader,
        axes: Axes,
        operand: Any,
        form: Form,
        lanes: int,
        strip_bytes: int,
        batch: int | None,
    ) -> None:
        self.reader, self.axes, self.operand, self.form, self.lanes = reader, axes, operand, form, lanes
        self.reduced = fused.reduced
        self.total = reader.size(axes.total)
        self.k = reader.size(self.reduced.total)
        depth = static(self.k)
        self.channels = depth or 0
        if depth is None:
            self.chunks, self.chunk = reader.size(loops.ceildiv(self.k, PANEL_DEPTH)), PANEL_DEPTH
        else:
            self.chunks, self.chunk = split_depth(depth, int(fused.core.annotations["optc.packed"]))
        self.pitch = _apart(self.chunks * self.chunk, form.size)
        fit = max(_LEAST_ROWS, strip_bytes // (form.size * (static(self.pitch) or PANEL_DEPTH)))
        rows = static(self.total)
        self.height = fit if rows is None else strip_height(rows, fit, _LEAST_ROWS, batch)
        self.strips = reader.size(loops.ceildiv(self.total, self.height))

    def count(self, s: Any) -> Any:
        """Return the number of rows in strip ``s``."""
        return loops.smaller(self.height, self.total - s * self.height)

    @property
    def size(self) -> Any:
        """The number of values that a strip's buffer holds."""
        return self.height * self.pitch

    def widen(self, places: dict[Any, Any], s: Any, rows: Any) -> Any:
        """Return the statement that fills the buffer."""

        def row(r: Any) -> Any:
            where = {**places, **self.axes.at(s * self.height + r)}
            flat = [(self.axes, s * self.height + r)]

            def element(k: Any) -> Any:
                value = self.reader.value(self.operand, {**where, **self.reduced.at(k)}, flat=flat)
                return store(rows, r * self.pitch + k, self.form.of(value))

            return spans(self.reader, self.k, self.lanes, element)

        return loop("r", self.count(s), row)

    @property
    def stride(self) -> Any:
        """The distance of neighbouring rows."""
        return self.pitch

    def base(self, r: Any) -> Any:
        """Return where row ``r`` of the strip begins in the buffer."""
        return r * self.pitch

    def offset(self, tap: Any) -> Any:
        """Return where run ``tap`` of a row begins, from the base."""
        return loops.index(0)


class WindowRows:
    """Windows over lines of an image ``[N, H, W, C]``: output pixels are rows, strips are whole lines of them."""

    def __init__(
        self,
        fused: Fused,
        reader: Reader,
        axes: Axes,
        operand: Any,
        form: Form,
        lanes: int,
        strip_bytes: int,
        batch: int | None,
    ) -> None:
        self.reader, self.axes, self.form, self.lanes = reader, axes, form, lanes
        notes = {
            name: [int(v) for v in fused.core.annotations[f"optc.{name}"]]
            for name in ("kernel", "strides", "dilations", "before", "merged")
        }
        self.kernel, self.dilations = notes["kernel"], notes["dilations"]
        self.merged = bool(notes["merged"][0])
        # Beside the padding, the operand reads the image less its zero point.
        guarded = isinstance(operand, tvm.ir.Call) and str(operand.op.name).endswith("if_then_else")
        inside = operand.args[1] if guarded else operand
        self.inside = inside
        self.image = max(loops.loads(inside), key=lambda x: len(x.indices))
        self.channel = fused.reduced.variables[-1]
        self.c = self.channels = int(fused.reduced.extents[-1])
        self.h, self.w = (reader.size(e) for e in self.image.source.shape[1:3])
        # Pixels of wider windows have to be neighbours.
        self.pitch = _apart(self.c, form.size) if self.kernel[1] == 1 else self.c
        self.whole_pixels = static(self.image.source.shape[-1]) == self.c
        self.lines, self.columns = axes.extents
        # A window of one line or pixel skips what lies between: only what is read gets widened.
        self.skip = [s if k == 1 else 1 for s, k in zip(notes["strides"], self.kernel, strict=True)]
        self.strides = [1 if k == 1 else s for s, k in zip(notes["strides"], self.kernel, strict=True)]
        self.before = notes["before"]
        self.taps = self.kernel[0] * (1 if self.merged else self.kernel[1])
        length = self.c * (self.kernel[1] if self.merged else 1)
        self.chunks, self.chunk = split_depth(length, int(fused.core.annotations["optc.packed"]))
        self.reach = [(k - 1) * d for k, d in zip(self.kernel, self.dilations, strict=True)]
        self.width = reader.size((self.columns - 1) * self.strides[1] + self.reach[1] + 1)
        self.block = self._block(strip_bytes, batch)
        self.height = reader.size(self.block * self.columns)
        self.total = reader.size(axes.total)
        self.strips = reader.size(loops.ceildiv(self.lines, self.block))

    def _block(self, strip_bytes: int, batch: int | None) -> int:
        """Return how many lines of output a strip has."""
        columns, lines = static(self.columns), static(self.lines)
        line = self.form.size * self.c * (static(self.width) or 64) * self.strides[0]
        fit = max(strip_bytes // max(1, line), -(-_LEAST_ROWS // max(1, columns or _LEAST_ROWS)))
        if lines is None:
            return max(1, fit)
        return strip_height(lines, max(1, fit), -(-_LEAST_ROWS // max(1, columns or _LEAST_ROWS)), batch)

    def count(self, s: Any) -> Any:
        """Return the number of rows in strip ``s``."""
        return loops.smaller(self.block, self.lines - s * self.block) * self.columns

    @property
    def size(self) -> Any:
        """The number of values that a strip's buffer holds: the last run may read beyond its window."""
        lines = (self.block - 1) * self.strides[0] + self.reach[0] + 1
        return lines * self.width * self.pitch + QUAD * self.chunks

    def widen(self, places: dict[Any, Any], s: Any, rows: Any) -> Any:
        """Return the statement that fills the buffer: lines of the image with their padding."""
        here = loops.smaller(self.block, self.lines - s * self.block)
        count = (here - 1) * self.strides[0] + self.reach[0] + 1
        return self.fill(places, s * self.block * self.strides[0], count, rows)

    def fill(self, places: dict[Any, Any], first: Any, count: Any, rows: Any) -> Any:
        """Return the statement that widens ``count`` lines of the padded image from line ``first``."""

        def line(i: Any) -> Any:
            h = (first + i) * self.skip[0] - self.before[0]
            start = i * self.width * self.pitch
            return bind("h", h, lambda h: bind("start", start, lambda start: self._line(places, h, start, rows)))

        return loop("line", count, line)

    def _line(self, places: dict[Any, Any], h: Any, start: Any, rows: Any) -> Any:
        left, total = self.before[1], self.width
        if self.skip[1] > 1 and left:
            # A window of one pixel under padding: pixel by pixel.
            first = loops.index(-(-left // self.skip[1]))
        else:
            first = loops.index(left)
        stop = loops.smaller((self.w + left + self.skip[1] - 1) // self.skip[1], total)
        zero = self.form.zero

        def clear(begin: Any, end: Any) -> Any:
            size = (end - begin) * self.pitch
            return spans(self.reader, size, self.lanes, lambda j: store(rows, start + begin * self.pitch + j, zero))

        def pixels() -> Any:
            if self.whole_pixels and self.skip[1] == 1 and self.pitch == self.c:
                return self._copy(places, h, loops.index(0), (stop - first) * self.c, start + first * self.pitch, rows)
            return loop(
                "x",
                stop - first,
                lambda x: self._copy(
                    places, h, (first + x) * self.skip[1] - left, self.c, start + (first + x) * self.pitch, rows
                ),
            )

        begins = None if static(first) == 0 else clear(loops.index(0), first)
        ends = None if self.reader.analyzer.can_prove_equal(stop, total) else clear(stop, total)
        body = sequence(begins, pixels(), ends)
        if self._never_outside():
            return body
        inside = tirx.all(h >= 0, h < loops.index(self.h))
        return tirx.IfThenElse(inside, body, clear(loops.index(0), total))

    def _never_outside(self) -> bool:
        """Tell whether all lines that are read are known to be of the image."""
        lines, height = static(self.lines), static(self.h)
        if self.before[0] or lines is None or height is None:
            return False
        return ((lines - 1) * self.strides[0] + self.reach[0]) * self.skip[0] < height

    def _copy(self, places: dict[Any, Any], h: Any, w: Any, size: Any, start: Any, rows: Any) -> Any:
        """Copy ``size`` values from pixel ``(h, w)`` on."""
        indices = list(self.image.indices)
        first = tirx.BufferLoad(self.image.source, [indices[0], h, w, indices[-1]])
        origin = self.reader.value(first, {**places, self.channel: loops.index(0)})

        def copy(position: Any) -> Any:
            def element(j: Any) -> Any:
                read = load(origin.source, position + j)
                value = self.reader.value(self.inside, places, given={self.image.source: read})
                return store(rows, start + j, self.form.of(value))

            return spans(self.reader, size, self.lanes, element)

        return bind("origin", origin.indices[0], copy)

    @property
    def stride(self) -> Any:
        """The distance of neighbouring rows, None if it varies."""
        return self.pitch if self.strides == [1, 1] and self.reach[1] == 0 else None

    def base(self, r: Any) -> Any:
        """Return where row ``r`` of the strip begins in the buffer."""
        if self.stride is not None:
            return r * self.stride
        r = loops.smaller(r, self.height - 1)
        step = self.strides[1] * self.pitch
        return r // self.columns * (self.strides[0] * self.width * self.pitch) + r % self.columns * step

    def offset(self, tap: Any) -> Any:
        """Return where run ``tap`` of a row begins, from the base."""
        if self.merged:
            return tap * (self.dilations[0] * self.width * self.pitch)
        y, x = tap // self.kernel[1], tap % self.kernel[1]
        return (y * (self.dilations[0] * self.width) + x * self.dilations[1]) * self.pitch
