"""The schedule of depthwise convolution and pooling on channels-last images: ``convolution.window``.

    for (chunk of rows of output pixels, group of blocks of channels):                         parallel
        for block of the group, for row of the chunk:
            for tile of P pixels whose windows are inside of the image:
                for vector of channels:
                    acc[P] = reduction over the rows of the window, its columns unrolled          registers
                    out = epilogue(acc)
            the same for the border columns, over the part of the window that is inside

Rows of the window outside of the image are skipped, so nothing is padded. The last tile of a row, and the last
vector of the channels, are moved back so that they end with the row: what they compute again is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import tvm
from tvm import tirx

from optc.backends.base import Target
from optc.backends.kernels import loops, sharing
from optc.backends.kernels.decisions import counts, decide
from optc.backends.kernels.fused import Axes, Fused, Reader, bits, take_apart
from optc.backends.kernels.loops import bind, load, loop, replace, sequence, static, store

TEMPLATE = "window"
_COLUMNS = 11
"""Window columns up to which they are unrolled."""
_PIXELS = (4, 6, 5, 7, 3, 2)
"""Numbers of pixels in a tile, the preferred ones first."""
_EDGE_PIXELS = 21
"""Pixels at both ends of a row up to which each gets code of its own."""
_LINE_BITS = 512
"""Of a line of the cache, which neighbouring pixels do not share if blocks of channels begin and end with it."""
_LINES, _SMALL_WINDOW = 4, 9
"""Lines of the cache to a pixel, or else pixels to a window, up to which all channels are better taken at once.

Blocks have no more lines: the first-level cache has other things to hold.
"""
_CHUNKS = 16
"""Chunks of rows where only a run knows how many rows there are."""
_AGAIN = 0.1
"""What reading a line of the image once more takes, where a row of outputs is 1: it is in the second-level cache."""
_HARDER = 4
"""How many times as long a multiply-add takes as one of a product of matrices."""
_APART = 1.1
"""What it costs if threads share channels: much of what each reads lies in the cache of another."""
_OPEN_SUMS = 6
"""Sums that are added to in turn: an addition waits four cycles or so for the one before."""


def schedule(function: Any, target: Target) -> Any:
    """Return ``function`` as vector loops, or None if its windows are too wide."""
    fused = take_apart(function, TEMPLATE)
    if fused is None or not fused.reduced.extents:
        return None
    window = [static(e) for e in fused.reduced.extents]
    if any(e is None or e == 0 for e in window) or (window[-1] or 1) > _COLUMNS:
        return None
    if len(fused.reduced.variables) != len(fused.spatial.variables) - 2:
        return None
    generator = _Generator(fused, target)
    return generator.function() if generator.image is not None else None


class _Generator:
    """Writes the loop nest of one reduction over windows for one target."""

    def __init__(self, fused: Fused, target: Target) -> None:
        self.reader = Reader(fused)
        self.fused = fused = self.reader.fused
        self.dtype = str(fused.accumulator.dtype)
        value = fused.core.body.value
        self.combine = type(value)
        term = value.b
        guarded = isinstance(term, tvm.ir.Call) and str(term.op.name) == "tirx.if_then_else"
        self.term = term.args[1] if guarded else term
        self.identity = fused.core.init.value
        self.strides = [int(s) for s in fused.core.annotations["optc.strides"]]
        self.dilations = [int(d) for d in fused.core.annotations["optc.dilations"]]
        self.window = [int(e) for e in fused.reduced.extents]
        _, *pixel, channel = fused.spatial.variables
        self.pixel, self.channel = pixel, channel
        self.image = self._image()
        self.channels = fused.spatial.extents[-1]
        lanes = target.lanes(bits(self.dtype))
        known = static(self.channels)
        while known is not None and lanes > max(known, 1):
            lanes //= 2
        self.lanes = lanes if known is not None else 1
        self.block = self._block(target)
        self.base: Any = loops.index(0)

    def _block(self, target: Target) -> Any:
        """Return how many channels are taken at a time: those whose weights and lines stay in the first-level cache.

        An image that comes from farther than the second level is better read pixel after pixel where that is possible:
        blocks leave parts of lines out, most of all where pixels do not begin with a line.
        """
        known = static(self.channels)
        if known is None or self.image is None:
            return self.channels
        size, caches = bits(self.dtype) // 8, target.caches
        columns = static(self.image.source.shape[-2]) or _COLUMNS
        window = prod(self.window)
        bytes_each = (window // self.window[-1] * columns + window) * size
        line = max(self.lanes, _LINE_BITS // 8 // size)
        pixels = static(loops.product(self.image.source.shape[:-1]))
        is_far = pixels is None or pixels * known * size > caches.l2 * 3 // 4
        narrow = known <= _LINES * line or (known % line > 0 and window <= _SMALL_WINDOW)
        if is_far and narrow and known * bytes_each <= caches.l2 // 2:
            best = known
        else:
            most = max(line, min(_LINES * line, caches.l1 * 3 // 4 // bytes_each // line * line))
            # The last block is moved back to end with the channels: what it repeats should be little.
            sizes = range(min(most, -(-known // line) * line), 0, -line)
            best = min(known, min(sizes, key=lambda block: -(-known // block) * block))
        return decide("block", best, [known, *(n * line for n in counts(12) if n * line < known)])

    def _image(self) -> Any:
        """Return the load from the image: the one whose places move with the pixel and the window."""
        window, pixel = self.fused.reduced.variables[-1], self.pixel[-1]
        for x in loops.loads(self.term):
            moving = len(x.indices) == len(self.pixel) + 2 and loops.uses(x.indices[-2], [window])
            if moving and loops.uses(x.indices[-2], [pixel]):
                return x
        return None

    def function(self) -> Any:
        """Return the function with its body replaced."""
        extents = self.fused.spatial.extents
        outer = Axes(self.fused.spatial.variables[:-2], extents[:-2])
        before, sizes = self._border()

        def row(position: Any) -> Any:
            places = outer.at(position)
            named = {v: tirx.Var(f"y{i}", "int64") for i, v in enumerate(outer.variables)}
            bindings = [tirx.Bind(named[v], loops.index(places[v])) for v in outer.variables]
            ranges, more = self._ranges(named, before, sizes)
            return sequence(*bindings, *more, self._row(named, ranges, before[-1], sizes[-1]))

        blocks = static(loops.ceildiv(self.channels, self.block)) if static(self.channels) is not None else 1
        if blocks in (None, 1) or static(outer.total) == 0:
            return self.reader.finish(loop("row", outer.total, row, "parallel"))
        return self.reader.finish(self._shared(outer, blocks, row))

    def _shared(self, outer: Axes, blocks: int, row: Callable[[Any], Any]) -> Any:
        """Return the rows in chunks, each for a group of blocks, one block after the other."""
        size = self.reader.size
        rows = size(outer.total)
        height, groups = self._tasks(static(rows), blocks)
        height = size(tirx.max(loops.index(1), (rows + _CHUNKS - 1) // _CHUNKS)) if height is None else height
        per_group = -(-blocks // groups)

        def task(position: Any) -> Any:
            begin = position // groups * height
            first = position % groups * per_group
            count = loops.smaller(per_group, blocks - first) if groups > 1 else blocks
            here = loops.smaller(height, rows - begin)

            def block(b: Any) -> Any:
                def there(base: Any) -> Any:
                    self.base = base
                    return loop("row", here, lambda r: row(begin + r))

                return bind("base", loops.smaller((first + b) * self.block, self.channels - self.block), there)

            return loop("block", count, block)

        return loop("task", loops.ceildiv(rows, height) * groups, task, "parallel")

    def _tasks(self, rows: int | None, blocks: int) -> tuple[int | None, int]:
        """Return how many rows make a chunk, None where only a run knows the rows, and the groups of blocks.

        Threads share rows rather than channels: rows are where the kernel before has left them.
        """
        if rows is None:
            return None, 1
        again = _AGAIN * max(0, self.window[-2] - self.strides[-2]) / self.strides[-2] if len(self.window) > 1 else 0.0
        work = rows * int(self.fused.spatial.extents[-1]) * (static(self.fused.spatial.extents[-2]) or _COLUMNS)
        product = sharing.Product(1, rows, blocks, 1.0, work * prod(self.window) * _HARDER, again)

        def cost(chunk: int, groups: int) -> float:
            return product.cost(chunk, groups) * (_APART if groups > 1 else 1.0)

        heights, numbers = sharing.chunks_of(rows), sharing.groups_of(blocks)
        best, groups = min(((h, g) for h in heights for g in numbers), key=lambda t: (cost(*t), -t[0], t[1]))
        chunk = decide("chunk", best, heights, lambda height: min(cost(height, g) for g in numbers))
        return chunk, groups

    def _border(self) -> tuple[list[Any], list[Any]]:
        """Return the padding before and the size of each axis of the image."""
        zeros = {v: loops.index(0) for v in (*self.pixel, *self.fused.reduced.variables)}
        simplify = self.reader.analyzer.simplify
        before = [loops.plain(simplify(loops.index(0) - replace(i, zeros))) for i in self.image.indices[1:-1]]
        return [self.reader.size(b) for b in before], [self.reader.size(e) for e in self.image.source.shape[1:-1]]

    def _ranges(self, places: dict[Any, Any], before: list[Any], sizes: list[Any]) -> tuple[list[Any], list[Any]]:
        """Return the first and last+1 window position inside of the image for all axes but the last, and bindings."""
        ranges, bindings = [], []
        for axis in range(len(self.pixel) - 1):
            found = self._inside(axis, places[self.pixel[axis]], before[axis], sizes[axis])
            if isinstance(found, int):
                ranges.append((0, found))
                continue
            names = tirx.Var(f"first{axis}", "int64"), tirx.Var(f"stop{axis}", "int64")
            bindings += [tirx.Bind(name, value) for name, value in zip(names, found, strict=True)]
            ranges.append(names)
        return ranges, bindings

    def _inside(self, axis: int, at: Any, before: Any, size: Any) -> Any:
        """Return the window positions inside of the image at output ``at``: (first, stop), or a number for all."""
        s, d, k = self.strides[axis], self.dilations[axis], self.window[axis]
        extent = static(self.fused.spatial.extents[1 + axis])
        known = static(size)
        if before == 0 and extent is not None and known is not None and (extent - 1) * s + (k - 1) * d < known:
            return k
        start = loops.index(before) - at * s
        first = tirx.floordiv(tirx.max(start, loops.index(0)) + (d - 1), loops.index(d))
        stop = tirx.min(loops.index(k), tirx.floordiv(tirx.max(start + size, loops.index(0)) + (d - 1), loops.index(d)))
        return first, tirx.max(stop, first)

    def _row(self, places: dict[Any, Any], ranges: list[Any], before: Any, size: Any) -> Any:
        """Return one row: the tiles between the borders, then the border pixels."""
        s, d, k = self.strides[-1], self.dilations[-1], self.window[-1]
        width = self.fused.spatial.extents[-2]
        zero, full = loops.index(0), loops.index(width)
        # Windows from ``first`` to before ``stop`` are inside.
        first = tirx.min(tirx.floordiv(loops.index(before) + (s - 1), loops.index(s)), full)
        last = loops.index(size) + before - (k - 1) * d - 1
        stop = tirx.min(tirx.floordiv(last, loops.index(s)) + 1, full)
        first, stop = (self.reader.analyzer.simplify(v) for v in (first, stop))
        count = static(self.reader.analyzer.simplify(stop - first))
        pixels = self._pixels(count)
        edges = self._edges(static(first), static(stop), pixels, before, size)
        if edges is not None:
            left, right, inner = edges
            sides = []
            for part in left + right:
                read = [[c for c in range(k) if 0 <= x * s - int(before) + c * d < int(size)] for x in part]
                sides.append(self._tile(places, [loops.index(x) for x in part], ranges, read))
            return sequence(*sides, self._inner(places, loops.index(inner[0]), loops.index(inner[1]), pixels, ranges))
        if count is not None and count < pixels:
            return loop("x", width, lambda x: self._pixel(places, x, ranges, before, size))
        enough = stop - first >= pixels
        first = self.reader.analyzer.simplify(tirx.Select(enough, first, full))
        stop = self.reader.analyzer.simplify(tirx.Select(enough, stop, full))

        def body(first: Any, stop: Any) -> Any:
            def edge(e: Any) -> Any:
                x = tirx.Select(e < first, e, e - first + stop)
                return bind("x", x, lambda x: self._pixel(places, x, ranges, before, size))

            border = self.reader.analyzer.simplify(first + (full - stop))
            return sequence(
                self._inner(places, first, stop, pixels, ranges),
                None if static(border) == 0 else loop("edge", border, edge),
            )

        return bind("first", tirx.max(first, zero), lambda a: bind("stop", stop, lambda b: body(a, b)))

    def _edges(self, first: int | None, stop: int | None, pixels: int, before: Any, size: Any) -> Any:
        """Return the tiles left and right of what is inside, as lists of pixels, and the first pixel inside and the
        one behind the last; None if they are not known or many.
        """
        width = static(self.fused.spatial.extents[-2])
        if width is None or first is None or stop is None or static(before) is None or static(size) is None:
            return None
        if stop - first < pixels:
            first = stop = width
        if first + width - stop > _EDGE_PIXELS:
            return None
        left, right = (list(range(*ends)) for ends in ((0, first), (stop, width)))
        most = max(_PIXELS)
        tiles = [[side[i : i + most] for i in range(0, len(side), most)] for side in (left, right)]
        return *tiles, (first, stop)

    def _inner(self, places: dict[Any, Any], first: Any, stop: Any, pixels: int, ranges: list[Any]) -> Any:
        """Return the tiles of the pixels from ``first`` to before ``stop``, whose windows are inside in this axis."""
        tiles = self.reader.analyzer.simplify(tirx.floordiv(stop - first + (pixels - 1), loops.index(pixels)))
        if static(tiles) == 0:
            return None

        def tile(t: Any) -> Any:
            start = tirx.min(first + t * pixels, stop - pixels)
            return bind("x", start, lambda x: self._tile(places, [x + p for p in range(pixels)], ranges))

        return loop("tile", tiles, tile)

    @staticmethod
    def _pixels(count: int | None) -> int:
        """Return how many pixels make a tile, of ``count`` in a row."""
        if count is None:
            return 4

        def cost(pixels: int) -> float:
            return -(-count // pixels) * pixels * (1 + 0.25 / pixels)

        best = min(_PIXELS, key=cost)
        return decide("pixels", best, [p for p in _PIXELS if p <= count] if best <= count else [], cost)

    def _vectors(self, pixels: int, body: Any) -> Any:
        """Return the loop over some vectors of channels at a time, so many that enough sums of ``pixels`` are open."""
        group = max(1, decide("sums", _OPEN_SUMS, (1, 4, 6, 8, 12)) // pixels)
        known = static(self.block)
        while group > 1 and (known is None or known < group * self.lanes):
            group -= 1
        together = group * self.lanes
        exact = known is not None and known % together == 0

        def vector(v: Any) -> Any:
            start = v * together
            first = start if exact else loops.smaller(start, self.block - together)
            return bind(
                "c", self.base + first, lambda c: body([c + offset for offset in range(0, together, self.lanes)])
            )

        return loop("v", loops.ceildiv(self.block, together), vector)

    def _tile(
        self, places: dict[Any, Any], xs: list[Any], ranges: list[Any], read: list[list[int]] | None = None
    ) -> Any:
        """Return the pixels ``xs``; their windows are inside in this axis, or ``read`` lists the columns that are."""

        def vectors(channels: list[Any]) -> Any:
            wheres = [{**places, self.pixel[-1]: x} for x in xs]
            sums = [(where, c) for where in wheres for c in channels]
            acc, allocate = loops.scratch("acc", len(sums) * self.lanes, self.dtype)

            def columns(at: dict[Any, Any]) -> Any:
                steps = []
                for column in range(self.window[-1]):
                    here = {**at, self.fused.reduced.variables[-1]: loops.index(column)}
                    for i, (where, c) in enumerate(sums):
                        if read is None or column in read[i // len(channels)]:
                            steps.append(self._accumulate(acc, i, {**where, **here}, c))
                # Where the padding is wider than the window, some see nothing of the image.
                return sequence(*steps) if steps else tirx.Evaluate(0)

            clear = [self._clear(acc, i) for i in range(len(sums))]
            put = [self._put(acc, i, where, c) for i, (where, c) in enumerate(sums)]
            return sequence(allocate, *clear, self._over(ranges, columns), *put)

        return self._vectors(len(xs), vectors)

    def _pixel(self, places: dict[Any, Any], x: Any, ranges: list[Any], before: Any, size: Any) -> Any:
        """Return one pixel, over the part of its window that is inside."""
        where = {**places, self.pixel[-1]: x}
        found = self._inside(len(self.pixel) - 1, x, before, size)
        first, stop = (loops.index(0), loops.index(found)) if isinstance(found, int) else found

        def pixel(first: Any, stop: Any) -> Any:
            def vectors(channels: list[Any]) -> Any:
                acc, allocate = loops.scratch("acc", len(channels) * self.lanes, self.dtype)

                def step(at: dict[Any, Any]) -> Any:
                    return sequence(*(self._accumulate(acc, i, {**where, **at}, c) for i, c in enumerate(channels)))

                clear = [self._clear(acc, i) for i in range(len(channels))]
                put = [self._put(acc, i, where, c) for i, c in enumerate(channels)]
                return sequence(allocate, *clear, self._over([*ranges, (first, stop)], step), *put)

            return self._vectors(1, vectors)

        return bind("left", first, lambda a: bind("right", stop, lambda b: pixel(a, b)))

    def _over(self, ranges: list[Any], body: Any) -> Any:
        """Return loops over window positions from first to before stop."""

        def nest(axis: int, at: dict[Any, Any]) -> Any:
            if axis == len(ranges):
                return body(at)
            first, stop = ranges[axis]
            variable = self.fused.reduced.variables[axis]
            return loop("k", stop - first, lambda k: nest(axis + 1, {**at, variable: first + k}))

        return nest(0, {})

    def _clear(self, acc: Any, p: int) -> Any:
        return self.reader.lanewise(self.lanes, lambda lane: store(acc, p * self.lanes + lane, self.identity))

    def _accumulate(self, acc: Any, p: int, where: dict[Any, Any], c: Any) -> Any:
        def lane(offset: Any) -> Any:
            value = self.reader.value(self.term, {**where, self.channel: c + offset})
            spot = p * self.lanes + offset
            return store(acc, spot, self.combine(load(acc, spot), value))

        return self.reader.lanewise(self.lanes, lane)

    def _put(self, acc: Any, p: int, where: dict[Any, Any], c: Any) -> Any:
        return self.reader.lanewise(
            self.lanes,
            lambda lane: self.reader.store({**where, self.channel: c + lane}, [], load(acc, p * self.lanes + lane)),
        )
