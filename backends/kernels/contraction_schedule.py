"""The schedule of contractions: packed panels, a register tile of accumulators, the epilogue on the tile.

    for (batch, chunk of columns):      parallel
        pack the chunk's column operand into panels [tile, K, NR]      (not when it is packed already)
        for row tile, for column tile of the chunk:
            acc[MR, NR] = sum over k of row_operand[MR, k] * panel[k, NR]       registers
            out = epilogue(acc)

This is the structure of Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (2008), without
blocking of K. Extents may be symbolic: tiles that stick out read clamped rows and columns and store what is inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from optc.backends.base import Target
from optc.backends.kernels import loops
from optc.backends.kernels.contraction import COLUMN_BLOCK, ROW_BLOCK, TEMPLATE
from optc.backends.kernels.loops import load, loop, plain, replace, sequence, store

PANEL_BYTES = 256 * 1024
"""Bytes of packed columns that stay in the second-level cache while all rows pass over them."""
_REDUCTION = 2


@dataclass(frozen=True)
class Axes:
    """A run of neighbouring axes that is treated as one: its variables, their extents and the product."""

    variables: list[Any]
    extents: list[Any]

    @property
    def total(self) -> Any:
        """The number of positions."""
        return loops.product(self.extents)

    def at(self, flat: Any) -> dict[Any, Any]:
        """Return the value of each variable at flat position ``flat``."""
        return dict(zip(self.variables, loops.unravel(flat, self.extents), strict=True)) if self.variables else {}


@dataclass(frozen=True)
class Contraction:
    """What the schedule needs to know of a function."""

    function: Any
    batch: Axes
    rows: Axes
    columns: Axes
    reduced: Axes
    row_operand: Any
    column_operand: Any
    padded: str
    accumulator: Any
    output: Any
    epilogue: Any


def schedule(function: Any, target: Target) -> Any:
    """Return ``function`` as a tiled loop nest, or None if it is not one annotated contraction with its epilogue."""
    found = analyze(function)
    return None if found is None else Generator(found, target).function()


def analyze(function: Any) -> Contraction | None:
    """Inline everything around the contraction and take it apart; None if something does not fit."""
    sch = s_tir.Schedule(function, enable_check=False, error_render_level="none")
    root = sch.get_sblock("root")
    marked = [b for b in sch.get_child_blocks(root) if sch.get(b).annotations.get("optc.template") == TEMPLATE]
    outputs = sch.get_output_blocks(root)
    if len(marked) != 1 or len(outputs) != 1:
        return None
    core, out = marked[0], outputs[0]
    ends = [sch.get(core), sch.get(out)]
    others = [b for b in sch.get_child_blocks(root) if not any(sch.get(b).same_as(end) for end in ends)]
    for block in others:
        try:
            sch.compute_inline(block)
        except s_tir.ScheduleError:
            return None
    return _describe(function, sch.get(core), sch.get(out))


def _describe(function: Any, core: Any, out: Any) -> Contraction | None:
    spatial = [v for v in core.iter_vars if int(v.iter_type) != _REDUCTION]
    reduced = [v for v in core.iter_vars if int(v.iter_type) == _REDUCTION]
    value = core.body.value
    if not isinstance(value, tirx.Add) or not isinstance(value.b, tirx.Mul):
        return None
    rows = [int(i) for i in core.annotations["optc.rows"]]
    columns = [int(i) for i in core.annotations["optc.columns"]]
    batch = [i for i in range(len(spatial)) if i not in rows and i not in columns]
    variables = [v.var for v in spatial]
    accumulator = core.body.buffer
    if core.same_as(out):
        epilogue: Any = load_of(accumulator, variables)
        target_buffer = accumulator
    else:
        renamed = _rename(out, spatial, accumulator)
        if renamed is None:
            return None
        epilogue, target_buffer = renamed, out.body.buffer

    def axes(positions: Sequence[int]) -> Axes:
        return Axes([spatial[i].var for i in positions], [plain(spatial[i].dom.extent) for i in positions])

    return Contraction(
        function,
        axes(batch),
        axes(rows),
        axes(columns),
        Axes([v.var for v in reduced], [plain(v.dom.extent) for v in reduced]),
        value.b.a,
        value.b.b,
        str(core.annotations["optc.padded"]),
        accumulator,
        target_buffer,
        epilogue,
    )


def load_of(buffer: Any, indices: Sequence[Any]) -> Any:
    """Return ``buffer[indices]``."""
    return tirx.BufferLoad(buffer, list(indices))


def _rename(out: Any, spatial: list[Any], accumulator: Any) -> Any:
    """Return the value that block ``out`` stores, in the variables of the contraction; None if not element-wise."""
    own, variables = [v.var for v in out.iter_vars], [v.var for v in spatial]
    if len(own) != len(variables) or any(int(v.iter_type) == _REDUCTION for v in out.iter_vars):
        return None
    # Padding behind the data reads the same indices, but stores more elements than the contraction has.
    extents = [(a.dom.extent, b.dom.extent) for a, b in zip(out.iter_vars, spatial, strict=True)]
    if not all(tvm_ffi.structural_equal(a, b) for a, b in extents):
        return None
    if not _same(out.body.indices, own):
        return None
    reads: list[Any] = []
    tvm_ffi.structural_walk(out.body.value, (tvm.ir.TensorLoad, lambda x: reads.append(x)))
    if not all(_same(x.indices, own) for x in reads if x.source.same_as(accumulator)):
        return None
    return replace(out.body.value, dict(zip(own, variables, strict=True)))


def _same(indices: Any, variables: Sequence[Any]) -> bool:
    return len(indices) == len(variables) and all(i.same_as(v) for i, v in zip(indices, variables, strict=True))


class Generator:
    """Writes the loop nest of one contraction for one target."""

    def __init__(self, contraction: Contraction, target: Target) -> None:
        self.c = contraction
        self.dtype = str(contraction.accumulator.dtype)
        self.analyzer = tvm.sym.Analyzer()
        self.lanes = max(1, target.vector_bits // _bits(self.dtype))
        self.r, self.n = contraction.rows.total, contraction.columns.total
        self.k, self.b = contraction.reduced.total, contraction.batch.total
        self.mr, self.nr = self._tile()
        self.lanes = min(self.lanes, self.nr)
        self.views: dict[Any, Any] = {}
        self.tiles = loops.ceildiv(self.n, self.nr)
        self.row_tiles = loops.ceildiv(self.r, self.mr)

    def _tile(self) -> tuple[int, int]:
        """Choose the register tile: least work in partial row tiles, taller tiles preferred."""
        rows, columns = loops.static(self.r), loops.static(self.n)
        few = columns is not None and columns <= COLUMN_BLOCK // 2
        if self.c.padded == "columns":
            candidates = [(m, COLUMN_BLOCK) for m in (6, 5, 4, 3, 2, 1)]
        elif self.c.padded == "rows":
            candidates = [(2 * ROW_BLOCK, 8) if few else (ROW_BLOCK, COLUMN_BLOCK)]
        else:
            candidates = [(m, 8 if few else COLUMN_BLOCK) for m in (6, 5, 4, 3, 2, 1)]

        def cost(tile: tuple[int, int]) -> float:
            m = tile[0]
            work = 1.0 if rows is None else -(-rows // m) * m / max(rows, 1)
            return work * (1 + 0.3 / m)

        if rows is not None and rows < ROW_BLOCK and self.c.padded == "rows":
            return max(rows, 1), COLUMN_BLOCK
        return min(candidates, key=cost)

    def function(self) -> Any:
        """Return the function with its body replaced."""
        body = self._packed_columns() if self.c.padded == "columns" else self._chunks()
        views = [tirx.DeclBuffer(view, data=buffer.data) for buffer, view in self.views.items()]
        return self.c.function.with_body(sequence(*views, body))

    def _packed_columns(self) -> Any:
        """Columns are packed already: column tiles outside, all rows inside (rows outside if there are few columns)."""
        over_rows = (loops.static(self.tiles) or 8) < 4

        def tile(b: Any, t: Any, r: Any) -> Any:
            places = {**self.c.batch.at(b)}
            return self._micro(places, r, t, lambda k, lane: self._value(
                self.c.column_operand, {**places, **self.c.columns.at(t * self.nr + lane)}, k=k,
                flat=[(self.c.columns, t * self.nr + lane)],
            ))

        outer, inner = (self.row_tiles, self.tiles) if over_rows else (self.tiles, self.row_tiles)
        return loop("tile", self.b * outer, lambda o: loop("inner", inner, lambda i: tile(
            o // outer if self.b != 1 else 0,
            i if over_rows else _mod(o, outer, self.b),
            _mod(o, outer, self.b) if over_rows else i,
        )), "parallel")

    def _chunks(self) -> Any:
        count = self._chunk_tiles()
        chunks = loops.ceildiv(self.tiles, count)

        def chunk(o: Any) -> Any:
            b = o // chunks if self.b != 1 else 0
            first = _mod(o, chunks, self.b) * count
            here = loops.smaller(count, self.tiles - first) if count != 1 else 1
            places = self.c.batch.at(b)
            panel, allocate = loops.scratch("panel", self.k * (count * self.nr), self.dtype, "global")

            def micro(r: Any, t: Any) -> Any:
                return self._micro(places, r, first + t, lambda k, lane: load(
                    panel, (t * self.k + k) * self.nr + lane))

            return sequence(
                allocate,
                loop("t", here, lambda t: self._pack(places, panel, first, t)),
                loop("r", self.row_tiles, lambda r: loop("t", here, lambda t: micro(r, t))),
            )

        return loop("chunk", self.b * chunks, chunk, "parallel")

    def _chunk_tiles(self) -> int:
        """Return how many column tiles are packed together."""
        depth, tiles = loops.static(self.k), loops.static(self.tiles)
        fit = 4 if depth is None else PANEL_BYTES // max(1, depth * self.nr * _bits(self.dtype) // 8)
        if tiles is None:
            return max(1, min(fit, 8))
        batch = loops.static(self.b)
        if batch == 1:
            fit = min(fit, -(-tiles // 2))
        fit = max(1, min(fit, tiles))
        return -(-tiles // -(-tiles // fit))

    def _pack(self, places: dict[Any, Any], panel: Any, first: Any, t: Any) -> Any:
        """Copy one column tile into its panel."""
        start = (first + t) * self.nr
        columns, lanes = self.c.columns, self.lanes
        last = columns.variables[-1]

        def copy(vector: bool, segment: Any) -> Any:
            c = start + segment * lanes

            def element(k: Any, at_k: dict[Any, Any], lane: Any) -> Any:
                column = c + lane if vector else loops.smaller(c + lane, self.n - 1)
                where = columns.at(column)
                if vector and len(columns.variables) > 1:
                    where = columns.at(c)
                    where[last] = where[last] + lane
                value = self._value(self.c.column_operand, {**places, **where, **at_k}, flat=[(columns, column)])
                return store(panel, (t * self.k + k) * self.nr + segment * lanes + lane, value)

            return self._reduced(lambda k, at_k: self._lanewise(
                lambda lane: element(k, at_k, lane), "vectorized" if vector else "unrolled"))

        def segment(v: Any) -> Any:
            contiguous = self._contiguous()
            if contiguous is None:
                return copy(False, v)
            c = start + v * lanes
            inside = loops.index(c + lanes) <= loops.index(self.n)
            if contiguous == "row":
                inside = tirx.all(inside, loops.index(c) % loops.index(columns.extents[-1]) + lanes
                                  <= loops.index(columns.extents[-1]))
            if loops.static(self.n) is not None and contiguous == "flat" and self.n % self.nr == 0:
                return copy(True, v)
            return tirx.IfThenElse(inside, copy(True, v), copy(False, v))

        return loop("segment", self.nr // lanes, segment)

    def _contiguous(self) -> str | None:
        """Tell whether neighbouring columns are neighbours in memory: all ("flat"), within a "row", or None."""
        columns = self.c.columns
        calls: list[Any] = []
        tvm_ffi.structural_walk(self.c.column_operand, (tvm.ir.Call, lambda call: calls.append(call)))
        if calls:
            return None
        loads: list[Any] = []
        tvm_ffi.structural_walk(self.c.column_operand, (tvm.ir.TensorLoad, lambda x: loads.append(x)))
        if all(self._collapse(x, columns) is not None or not loops.uses(x, columns.variables) for x in loads):
            flat = tirx.Var("flat", "int64")
            units = [self._step(replace(x, {}, lambda y: self._flatten(y, [(columns, flat)])).indices[0], flat)
                     for x in loads]
            return "flat" if all(units) else None
        steps = [self._step(self._flatten(x, []).indices[0], columns.variables[-1]) for x in loads]
        return "row" if all(steps) else None

    def _step(self, offset: Any, variable: Any) -> bool:
        """Tell whether ``offset`` grows by one with ``variable``."""
        difference = self.analyzer.simplify(_advance(offset, variable) - offset)
        return loops.static(difference) == 1

    def _micro(self, places: dict[Any, Any], r: Any, t: Any, column: Any) -> Any:
        """Return the register tile of row tile ``r`` and column tile ``t``, with its epilogue."""
        mr, nr, lanes = self.mr, self.nr, self.lanes
        acc, allocate = loops.scratch("acc", mr * nr, self.dtype)
        vectors = [(i, v) for i in range(mr) for v in range(nr // lanes)]
        exact = loops.static(self.r) is not None and self.r % mr == 0

        def row(i: int, k: Any) -> Any:
            position = r * mr + i
            if self.c.padded != "rows" and not exact:
                position = loops.smaller(position, self.r - 1)
            return self._value(self.c.row_operand, {**places, **self.c.rows.at(position)}, k=k,
                               flat=[(self.c.rows, position)])

        lanewise = self._lanewise
        zero = sequence(*(lanewise(lambda lane, i=i, v=v: store(
            acc, i * nr + v * lanes + lane, tirx.const(0, self.dtype))) for i, v in vectors))

        def update(k: Any) -> Any:
            return sequence(*(lanewise(lambda lane, i=i, v=v: store(
                acc, i * nr + v * lanes + lane,
                load(acc, i * nr + v * lanes + lane) + row(i, k) * column(k, v * lanes + lane),
            )) for i, v in vectors))

        return sequence(allocate, zero, loop("k", self.k, update), self._store(places, r, t, acc, exact))

    def _lanewise(self, make: Any, kind: str = "vectorized") -> Any:
        """Return a loop over the lanes of one vector."""

        def body(lane: Any) -> Any:
            if isinstance(lane, tvm.ir.Var):
                self.analyzer.bind(lane, tvm.ir.Range(loops.index(0), loops.index(self.lanes)))
            return make(lane)

        return loop("lane", self.lanes, body, kind)

    def _store(self, places: dict[Any, Any], r: Any, t: Any, acc: Any, exact: bool) -> Any:
        mr, nr, lanes = self.mr, self.nr, self.lanes
        full_columns = loops.static(self.n) is not None and self.n % nr == 0

        def put(source: Any, i: Any, column: Any, position: Any) -> Any:
            row = r * mr + i
            where = {**places, **self.c.rows.at(row), **self.c.columns.at(column)}
            flat = [(self.c.rows, row), (self.c.columns, column)]
            value = self._value(self.c.epilogue, where, flat=flat, accumulated=load(source, position))
            slot = self._value(load_of(self.c.output, self._variables()), where, flat=flat)
            return tirx.BufferStore(slot.source, value, list(slot.indices))

        def guarded(i: Any, statement: Any) -> Any:
            return statement if exact else tirx.IfThenElse(
                loops.index(r * mr + i) < loops.index(self.r), statement, None)

        whole = sequence(*(guarded(i, sequence(*(
            self._lanewise(lambda lane, i=i, v=v: put(
                acc, i, t * nr + v * lanes + lane, i * nr + v * lanes + lane))
            for v in range(nr // lanes)))) for i in range(mr)))
        if full_columns:
            return whole
        tail, allocate = loops.scratch("tail", mr * nr, self.dtype)
        copies = [self._lanewise(lambda lane, p=p: store(tail, p * lanes + lane, load(acc, p * lanes + lane)))
                  for p in range(mr * nr // lanes)]
        partial = sequence(allocate, *copies, loop("i", mr, lambda i: guarded(i, loop(
            "j", loops.smaller(nr, self.n - t * nr),
            lambda j: put(tail, i, t * nr + j, i * nr + j)))))
        inside = loops.index((t + 1) * nr) <= loops.index(self.n)
        return tirx.IfThenElse(inside, whole, partial)

    def _variables(self) -> list[Any]:
        axes = [v for group in (self.c.batch, self.c.rows, self.c.columns) for v in group.variables]
        order = {v: i for i, v in enumerate(self._spatial_order())}
        return sorted(axes, key=lambda v: order[v])

    def _spatial_order(self) -> list[Any]:
        found: list[Any] = []

        def visit(x: Any) -> None:
            if x.source.same_as(self.c.accumulator) and not found:
                found.extend(x.indices)

        tvm_ffi.structural_walk(self.c.epilogue, (tvm.ir.TensorLoad, visit))
        return found

    def _reduced(self, body: Any) -> Any:
        """Loops over the reduced axes, giving the flat position and the value of each variable."""
        axes = self.c.reduced

        def nest(position: int, flat: Any, at: dict[Any, Any]) -> Any:
            if position == len(axes.variables):
                return body(flat, at)
            extent = axes.extents[position]
            return loop("k", extent, lambda k: nest(
                position + 1, flat * extent + k, {**at, axes.variables[position]: k}))

        return nest(0, loops.index(0), {})

    def _value(
        self,
        expression: Any,
        places: dict[Any, Any],
        *,
        flat: Sequence[tuple[Axes, Any]] = (),
        k: Any = None,
        accumulated: Any = None,
    ) -> Any:
        """Evaluate an expression of the function at ``places``, with loads from flat views of the buffers."""
        known = dict(places)
        runs = list(flat)
        if k is not None:
            known.update(self.c.reduced.at(k))
            runs.append((self.c.reduced, k))

        def on_load(x: Any) -> Any:
            if x.source.same_as(self.c.accumulator) and accumulated is not None:
                return accumulated
            return self._flatten(x, runs)

        result = replace(expression, known, on_load)
        if isinstance(result, tvm.ir.TensorLoad):
            return load(result.source, self.analyzer.simplify(result.indices[0]))
        return result

    def _flatten(self, x: Any, runs: Sequence[tuple[Axes, Any]]) -> Any:
        """Return a load from the flat view of its buffer; whole runs of axes become their flat position."""
        if x.source in self.views.values():
            return x
        indices, extents = list(x.indices), [plain(e) for e in x.source.shape]
        for axes, position in runs:
            start = self._collapse(load_of(x.source, x.indices), axes) if len(axes.variables) > 1 else None
            if start is None:
                continue
            start = next(i for i, value in enumerate(indices) if value.same_as(axes.variables[0]))
            stop = start + len(axes.variables)
            extents[start:stop] = [loops.product(extents[start:stop])]
            indices[start:stop] = [loops.index(position)]
        offset: Any = loops.index(0)
        for value, extent in zip(indices, extents, strict=True):
            offset = offset * loops.index(extent) + value
        return load(self._view(x.source), offset)

    def _view(self, buffer: Any) -> Any:
        if buffer not in self.views:
            size = loops.product(buffer.shape)
            self.views[buffer] = tirx.decl_buffer([loops.index(size)], str(buffer.dtype), f"{buffer.name}_flat")
        return self.views[buffer]

    def _collapse(self, x: Any, axes: Axes) -> int | None:
        """Return where a load indexes with exactly the variables of ``axes`` in a row over equal extents, or None."""
        indices = list(x.indices)
        first, count = axes.variables[0], len(axes.variables)
        starts = [i for i, value in enumerate(indices) if value.same_as(first)]
        if len(starts) != 1 or not _same(indices[starts[0] : starts[0] + count], axes.variables):
            return None
        start = starts[0]
        rest = indices[:start] + indices[start + count :]
        inner = list(x.source.shape)[start + 1 : start + count]
        equal = all(self.analyzer.can_prove_equal(loops.index(a), loops.index(b))
                    for a, b in zip(inner, axes.extents[1:], strict=True))
        return start if equal and not any(loops.uses(i, axes.variables) for i in rest) else None


def _advance(offset: Any, variable: Any) -> Any:
    """Return ``offset`` with ``variable`` one larger."""
    fresh = tirx.Var("next", "int64")
    return replace(replace(offset, {variable: fresh}), {fresh: variable + 1})


def _mod(value: Any, extent: Any, batch: Any) -> Any:
    return value if batch == 1 else value % extent


def _bits(dtype: str) -> int:
    return int("".join(ch for ch in dtype if ch.isdigit()) or 8)
