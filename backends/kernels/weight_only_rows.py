"""The schedule of products with packed weights for few rows: the weights are read once, as they lie in memory.

    left[row, k] = row operand * 16^-(k % 8), sums[row, chain] = -(sum of the row operand over a chain)
    for tile:                                      parallel
        for chain:
            acc[rows, slots] = zero * sums[rows, chain]
            for k of the chain: acc += left[rows, k] * float(words & mask)                         registers
            total[rows, slots] += acc * scale
        out = epilogue(total)

A slot is a vector of columns. As in ``few_rows.py`` a tile reads several panels at once where registers allow it.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from optc.backends.base import Target
from optc.backends.kernels import loops
from optc.backends.kernels.few_rows import STREAMS
from optc.backends.kernels.fused import Fused, Reader, bits
from optc.backends.kernels.loops import bind, load, loop, sequence, store
from optc.backends.kernels.register_tile import IN_FLIGHT
from optc.backends.kernels.weight_only import CHAIN, FIELDS

_MOST = 16


def most_rows(target: Target) -> int:
    """Return for how many rows the accumulators of one vector of columns stay in registers."""
    return min(_MOST, target.registers * 3 // 4)


class Matrix:
    """The packed matrix of a fused kernel: flat views of its tensors, and what its annotations say."""

    def __init__(self, fused: Fused, reader: Reader) -> None:
        notes = fused.core.annotations
        self.bits, self.block, self.zero = (int(notes[f"optc.{key}"]) for key in ("bits", "block", "zero"))
        found = {_role(str(x.source.dtype)): x.source for x in loops.loads(fused.core.body.value.b.b)}
        words = found["words"]
        self.panels, self.steps, self.width = (int(d) for d in words.shape)
        self.blocks = int(found["scales"].shape[1])
        self.words, self.scales = reader.flat_view(words), reader.flat_view(found["scales"])
        self.zeros = reader.flat_view(found["zeros"]) if "zeros" in found else None
        self.fields = FIELDS if self.bits == 4 else 1
        self.centred = self.zeros is None and self.zero == 0

    def integer(self, panel: Any, step: Any, field: int, lane: Any, *, in_place: bool = False) -> Any:
        """Return q as int32; ``in_place`` leaves it where it is in its word, but for the last field."""
        value = load(self.words, (panel * self.steps + step) * self.width + lane)
        if self.bits == 8:
            return value.astype("int32")
        if in_place and field < FIELDS - 1:
            return value & tirx.const(15 << 4 * field, "int32")
        shifted = value >> tirx.const(4 * field, "int32") if field else value
        return shifted & tirx.const(15, "int32")

    def scale(self, panel: Any, block: Any, lane: Any, dtype: str) -> Any:
        """Return the scale of a column in a block."""
        value = load(self.scales, (panel * self.blocks + block) * self.width + lane)
        return value if str(self.scales.dtype) == dtype else value.astype(dtype)

    def zero_point(self, panel: Any, block: Any, lane: Any) -> Any:
        """Return the zero point of a column in a block, as int32."""
        if self.zeros is None:
            return tirx.const(self.zero, "int32")
        stored = load(self.zeros, (panel * self.blocks + block) * self.width + lane).astype("int32")
        return stored if self.bits == 4 else stored - 128


def _role(dtype: str) -> str:
    return {"int32": "words", "int8": "words", "uint8": "zeros"}.get(dtype, "scales")


def _chain(matrix: Matrix) -> int:
    """Return how many products are summed before they are scaled: whole words, and whole chains make a block."""
    if matrix.blocks == 1:
        return CHAIN
    return next(n for n in range(CHAIN, 0, -matrix.fields) if matrix.block % n == 0)


class RowsGenerator:
    """Writes the loop nest of one product of ``rows`` rows."""

    def __init__(self, fused: Fused, reader: Reader, target: Target, rows: int) -> None:
        self.reader, self.m, self.registers = reader, rows, target.registers
        self.row_operand = fused.core.body.value.b.a
        annotations = fused.core.annotations
        self.rows, self.columns = (fused.spatial.pick(annotations[f"optc.{key}"]) for key in ("rows", "columns"))
        self.reduced = fused.reduced
        self.dtype = str(fused.accumulator.dtype)
        self.n, self.k = int(self.columns.total), int(self.reduced.total)
        self.matrix = Matrix(fused, reader)
        width = self.matrix.width
        self.lanes = min(target.lanes(bits(self.dtype)), width)
        vectors = width // self.lanes
        # Slots of one tile: vectors of several panels, or one vector of a panel after the other. Fields of a word are
        # taken out one after the other, so that words stay in registers beside sums, rows and masks.
        free, words = (target.registers * 3 // 8 + 2, 1) if self.matrix.bits == 4 else (target.registers * 3 // 4, 0)
        fit = max(1, free // (self.m + words))
        self.streams = max(1, min(STREAMS, fit // vectors, self.matrix.panels))
        self.parts = 1 if fit >= vectors else vectors
        self.tiles = -(-self.matrix.panels // self.streams)
        self.chain = _chain(self.matrix)
        self.chains = -(-self.k // self.chain)
        self.padded = self.matrix.steps * self.matrix.fields

    def statement(self, *, rows_known: bool = True) -> Any:
        """Return the loop nest.

        Where a run decides on rows, the bodies of parallel loops become functions (``cpu/tasks.py``). TVM tells LLVM
        that buffers do not overlap with parameters of functions, so each task prepares the row that it reads.
        """
        self.left, allocate_left = loops.scratch("left", self.m * self.padded, self.dtype)
        self.sums, allocate_sums = loops.scratch("sums", self.m * self.chains, self.dtype)
        self.tail, allocate_tail = loops.scratch("tail", self.matrix.width, self.dtype)
        spare = [allocate_tail] if self.n % self.matrix.width else []

        def row(i: Any) -> Any:
            return sequence(self._prepare(i), None if self.matrix.centred else self._sum(i))

        allocations = [allocate_left, *([] if self.matrix.centred else [allocate_sums])]
        first = [*allocations, loop("row", self.m, row)]
        before, inside = (first, []) if rows_known else ([], first)
        tasks = loop("task", self.tiles, lambda t: sequence(*inside, *spare, self._tile(t)), "parallel")
        return sequence(*before, tasks)

    def _operand(self, i: Any, k: Any) -> Any:
        where = {**self.rows.at(loops.index(i)), **self.reduced.at(k)}
        return self.reader.value(self.row_operand, where, flat=[(self.rows, loops.index(i)), (self.reduced, k)])

    def _prepare(self, i: Any) -> Any:
        """Copy one row, with the factors that undo where a field lies in its word."""
        fields, whole = self.matrix.fields, self.k // self.matrix.fields

        def one(k: Any, field: int) -> Any:
            factor = tirx.const(1.0 if field == FIELDS - 1 or fields == 1 else 16.0**-field, self.dtype)
            return store(self.left, i * self.padded + k, self._operand(i, k) * factor)

        def clear(k: int) -> Any:
            return store(self.left, i * self.padded + k, tirx.const(0, self.dtype))

        if fields == 1:
            return loop("k", self.k, lambda k: one(k, 0))
        return sequence(
            loop("word", whole, lambda w: sequence(*(one(w * fields + j, j) for j in range(fields))))
            if whole
            else None,
            *(one(loops.index(k), k % fields) for k in range(whole * fields, self.k)),
            *(clear(k) for k in range(self.k, self.padded)),
        )

    def _sum(self, i: Any) -> Any:
        """Sum one row over each chain, vector by vector."""
        lanes = self.lanes
        partial, allocate = loops.scratch("partial", lanes, self.dtype)

        def over(begin: Any, count: int) -> Any:
            def add(k: Any, lane: Any) -> Any:
                return store(partial, lane, load(partial, lane) + self._operand(i, k))

            whole, rest = divmod(count, lanes)
            vectors = loop(
                "v", whole, lambda v: self.reader.lanewise(lanes, lambda lane: add(begin + v * lanes + lane, lane))
            )
            total = load(partial, 0)
            for lane in range(1, lanes):
                total = total + load(partial, lane)
            return sequence(
                self.reader.lanewise(lanes, lambda lane: store(partial, lane, tirx.const(0, self.dtype))),
                vectors if whole else None,
                *(add(begin + whole * lanes + j, loops.index(j)) for j in range(rest)),
                store(self.sums, i * self.chains + begin // self.chain, tirx.const(0, self.dtype) - total),
            )

        whole, rest = divmod(self.k, self.chain)
        return sequence(
            allocate,
            loop("chain", whole, lambda c: over(c * self.chain, self.chain)) if whole else None,
            over(loops.index(whole * self.chain), rest) if rest else None,
        )

    def _tile(self, t: Any) -> Any:
        """Return one tile. The last streams may be shorter: their last panel is then computed again."""

        def named(panels: list[Any]) -> Any:
            s = len(panels)
            if s == self.streams:
                size = self.matrix.width // self.parts
                return sequence(*(self._panels(panels, p * size, size) for p in range(self.parts)))
            place = t + s * self.tiles
            if (s + 1) * self.tiles > self.matrix.panels:
                place = loops.smaller(place, self.matrix.panels - 1)
            return bind(f"panel{s}", place, lambda p: named([*panels, p]))

        return named([])

    def _panels(self, panels: list[Any], start: int, size: int) -> Any:
        """Return the product of all rows with ``size`` columns, from ``start`` on, of each of ``panels``."""
        m, lanes, matrix = self.m, self.lanes, self.matrix
        slots = [(s, v) for s in range(len(panels)) for v in range(0, size, lanes)]
        # Fields of a word take turns at few accumulators, which would wait for each other.
        twice = 2 * m * len(slots)
        room = twice <= IN_FLIGHT and (twice + len(slots)) * 3 // 2 <= self.registers
        copies = 2 if room and matrix.fields > 1 else 1
        acc = [loops.tile(f"acc{i}_", len(panels) * copies, size, self.dtype) for i in range(m)]
        total = [loops.tile(f"total{i}_", len(panels), size, self.dtype) for i in range(m)]
        allocations = [allocate for _, some in (*acc, *total) for allocate in some]
        sums, totals = ([buffers for buffers, _ in kind] for kind in (acc, total))

        nothing = tirx.const(0, self.dtype)

        def each(make: Any) -> list[Any]:
            """One vector loop for each row and slot: ``make(row, stream, position in the slot's panel part)``."""
            return [
                self.reader.lanewise(lanes, lambda lane, i=i, s=s, v=v: make(i, s, v + lane))
                for s, v in slots
                for i in range(m)
            ]

        def begin(chain: Any, i: int, s: int, j: Any) -> Any:
            others = [store(sums[i][s + c * len(panels)], j, nothing) for c in range(1, copies)]
            if matrix.centred:
                return sequence(store(sums[i][s], j, nothing), *others)
            zero = matrix.zero_point(panels[s], chain * self.chain // matrix.block, start + j).astype(self.dtype)
            return sequence(store(sums[i][s], j, zero * load(self.sums, i * self.chains + chain)), *others)

        def update(step: Any, field: int, i: int, s: int, j: Any) -> Any:
            q = matrix.integer(panels[s], step, field, start + j, in_place=True).astype(self.dtype)
            left = load(self.left, i * self.padded + step * matrix.fields + field)
            into = sums[i][s + field % copies * len(panels)]
            return store(into, j, load(into, j) + left * q)

        def finish(chain: Any, i: int, s: int, j: Any) -> Any:
            scale = matrix.scale(panels[s], chain * self.chain // matrix.block, start + j, self.dtype)
            summed = load(sums[i][s], j)
            for c in range(1, copies):
                summed = summed + load(sums[i][s + c * len(panels)], j)
            return store(totals[i][s], j, load(totals[i][s], j) + summed * scale)

        def over(chain: Any, steps: int) -> Any:
            first = chain * (self.chain // matrix.fields)

            def step(w: Any) -> Any:
                fields = range(matrix.fields)
                return sequence(
                    *(
                        self.reader.lanewise(
                            lanes,
                            lambda lane, f=field, i=i, s=s, v=v: update(first + w, f, i, s, v + lane),
                        )
                        for field in fields
                        for s, v in slots
                        for i in range(m)
                    )
                )

            return sequence(
                *each(lambda i, s, j: begin(chain, i, s, j)),
                loop("k", steps, step),
                *each(lambda i, s, j: finish(chain, i, s, j)),
            )

        whole, rest = divmod(matrix.steps, self.chain // matrix.fields)
        return sequence(
            *allocations,
            *each(lambda i, s, j: store(totals[i][s], j, nothing)),
            loop("chain", whole, lambda c: over(c, self.chain // matrix.fields)) if whole else None,
            over(loops.index(whole), rest) if rest else None,
            *(self._store(panels, totals, s, start, size) for s in range(len(panels))),
        )

    def _store(self, panels: list[Any], totals: list[Any], s: int, start: int, size: int) -> Any:
        """Return the epilogue of one stream: whole vectors, or element by element in the last, partial panel."""
        lanes, width = self.lanes, self.matrix.width

        def put(i: int, j: Any, value: Any) -> Any:
            position = panels[s] * width + start + j
            places = {**self.rows.at(loops.index(i)), **self.columns.at(position)}
            return self.reader.store(places, [(self.rows, loops.index(i)), (self.columns, position)], value)

        def vectors(i: int, make: Any) -> list[Any]:
            return [
                self.reader.lanewise(lanes, lambda lane, v=v: make(v + lane, load(totals[i][s], v + lane)))
                for v in range(0, size, lanes)
            ]

        whole = sequence(*(one for i in range(self.m) for one in vectors(i, lambda j, x, i=i: put(i, j, x))))
        rest = self.n % width
        if not rest or (s + 1) * self.tiles < self.matrix.panels:
            return whole
        here = max(0, min(size, rest - start))

        def copied(i: int) -> Any:
            # Totals indexed by a variable would not stay in registers.
            copies = vectors(i, lambda j, x: store(self.tail, j, x))
            return sequence(*copies, loop("j", here, lambda j: put(i, j, load(self.tail, j))))

        partly = sequence(*(copied(i) for i in range(self.m))) if here else None
        return tirx.IfThenElse(panels[s] < self.matrix.panels - 1, whole, partly)
