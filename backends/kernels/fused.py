"""Taking a fused kernel apart: its annotated core block, the element-wise epilogue behind it, flat buffer access."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as replace_fields
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from optc.backends.kernels import loops, rounding
from optc.backends.kernels.loops import load, plain, replace

REDUCTION = 2
"""The iteration type of reduced axes in TIR."""


@dataclass(frozen=True)
class Axes:
    """A run of neighbouring axes that is treated as one: its variables and their extents."""

    variables: list[Any]
    extents: list[Any]

    @property
    def total(self) -> Any:
        """The number of positions."""
        return loops.product(self.extents)

    def pick(self, positions: Sequence[Any]) -> Axes:
        """Return some of the axes."""
        chosen = [int(i) for i in positions]
        return Axes([self.variables[i] for i in chosen], [self.extents[i] for i in chosen])

    def at(self, flat: Any) -> dict[Any, Any]:
        """Return the value of each variable at flat position ``flat``."""
        if not self.variables:
            return {}
        return dict(zip(self.variables, loops.unravel(flat, self.extents), strict=True))


@dataclass(frozen=True)
class Fused:
    """A kernel that is one core block and an element-wise epilogue behind it.

    ``epilogue`` is the value stored to ``output``, in the spatial variables of the core; it reads the core's
    result from ``accumulator`` at exactly these variables. Where the last stage is of another form (it broadcasts the
    result, say), it is the ``tail``: the core then stores to ``accumulator`` and the tail gets loops of its own.
    ``stages`` are the blocks annotated with "optc.stage", by that name: those before the core that a template knows.
    """

    function: Any
    core: Any
    spatial: Axes
    reduced: Axes
    accumulator: Any
    output: Any
    epilogue: Any
    tail: Any
    stages: Mapping[str, Any] = field(default_factory=dict)


def take_apart(function: Any, template: str) -> Fused | None:
    """Inline all but the core annotated with ``template`` and its stages; None if it does not fit."""
    sch = s_tir.Schedule(function, enable_check=False, error_render_level="none")
    root = sch.get_sblock("root")
    children = sch.get_child_blocks(root)
    marked = [b for b in children if sch.get(b).annotations.get("optc.template") == template]
    outputs = sch.get_output_blocks(root)
    if len(marked) != 1 or len(outputs) != 1:
        return None
    core, out = marked[0], outputs[0]
    stages = {str(sch.get(b).annotations["optc.stage"]): b for b in children if "optc.stage" in sch.get(b).annotations}
    kept = [sch.get(b) for b in (core, out, *stages.values())]
    for block in [b for b in children if not any(sch.get(b).same_as(k) for k in kept)]:
        try:
            sch.compute_inline(block)
        except s_tir.ScheduleError:
            return None
    fused = _describe(function, sch.get(core), sch.get(out))
    return fused and replace_fields(fused, stages={name: sch.get(b) for name, b in stages.items()})


def element_wise(function: Any, block: Any) -> Fused | None:
    """Describe a function whose only block left is ``block``, which reduces nothing; None if it does not fit."""
    if not isinstance(block.body, tirx.BufferStore):
        return None
    fused = _describe(function, block, block)
    return fused if fused is not None and not fused.reduced.variables else None


def _describe(function: Any, core: Any, out: Any) -> Fused | None:
    accumulator = core.body.buffer
    spatial = _axes([v for v in core.iter_vars if int(v.iter_type) != REDUCTION])
    reduced = _axes([v for v in core.iter_vars if int(v.iter_type) == REDUCTION])
    epilogue, output, tail = tirx.BufferLoad(accumulator, spatial.variables), accumulator, None
    if not core.same_as(out):
        if any(int(v.iter_type) == REDUCTION for v in out.iter_vars):
            return None
        renamed = _rename(out, spatial, accumulator)
        if renamed is None:
            tail = out
        else:
            epilogue, output = renamed, out.body.buffer
    if not _same(core.body.indices, spatial.variables):
        return None
    return Fused(function, core, spatial, reduced, accumulator, output, epilogue, tail)


def _axes(iters: Sequence[Any]) -> Axes:
    return Axes([v.var for v in iters], [plain(v.dom.extent) for v in iters])


def _rename(out: Any, spatial: Axes, accumulator: Any) -> Any:
    """Return the value that block ``out`` stores, in the variables ``spatial``; None if it is not element-wise."""
    own, variables = [v.var for v in out.iter_vars], spatial.variables
    if len(own) != len(variables):
        return None
    # Padding behind the data reads the same indices, but stores more elements than the core has.
    analyzer = tvm.sym.Analyzer()
    extents = zip(out.iter_vars, spatial.extents, strict=True)
    if not all(analyzer.can_prove_equal(v.dom.extent, loops.index(extent)) for v, extent in extents):
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


class Reader:
    """Evaluates expressions of a kernel at given positions, with loads from one-dimensional views of its buffers."""

    def __init__(self, fused: Fused) -> None:
        self.analyzer = tvm.sym.Analyzer()
        self.views: dict[Any, Any] = {}
        self.sizes: list[tuple[Any, Any]] = []
        self.fused = replace_fields(fused, spatial=self._named(fused.spatial), reduced=self._named(fused.reduced))

    def _named(self, axes: Axes) -> Axes:
        return Axes(axes.variables, [self.size(e) for e in axes.extents])

    def size(self, extent: Any) -> Any:
        """Return a number, a variable, or a variable that stands for a longer expression.

        Symbolic sizes deep in a network are long expressions, and every address would repeat them. A variable bound
        to the expression itself would not help, because TVM's simplifier puts the expression back.
        """
        extent = plain(extent)
        if isinstance(extent, int | tvm.ir.Var):
            return extent
        if any(extent.same_as(variable) for variable, _ in self.sizes):
            return extent
        for variable, value in self.sizes:
            if tvm_ffi.structural_equal(value, extent):
                return variable
        for variable, value in self.sizes:
            if self.analyzer.can_prove_equal(value, extent):
                return variable
        self.sizes.append((tirx.Var(f"size{len(self.sizes)}", "int64"), extent))
        return self.sizes[-1][0]

    def finish(self, body: Any) -> Any:
        """Return the kernel with ``body``, which uses the views."""
        tail = self.fused.tail
        allocate = None
        if tail is not None:
            allocate, body = tirx.AllocBuffer(self.fused.accumulator), loops.sequence(body, self._tail(tail))
        views = [tirx.DeclBuffer(view, data=buffer.data) for buffer, view in self.views.items()]
        return self.fused.function.with_body(loops.sequence(*self._size_bindings(), allocate, *views, body))

    def _size_bindings(self) -> list[Any]:
        """Bind the sizes to what is read from memory, where the simplifier does not see the expressions."""
        if not self.sizes:
            return []
        memory, allocate = loops.scratch("sizes", len(self.sizes), "int64")
        bindings = [allocate]
        for i, (variable, value) in enumerate(self.sizes):
            bindings += [loops.store(memory, i, value), tirx.Bind(variable, load(memory, i))]
        return bindings

    def _tail(self, block: Any) -> Any:
        """Return the loops of the last stage: the innermost axis serial, the others in parallel."""
        axes = self._named(_axes(block.iter_vars))
        outer = Axes(axes.variables[:-1], axes.extents[:-1])
        target = tirx.BufferLoad(block.body.buffer, list(block.body.indices))

        def element(places: dict[Any, Any]) -> Any:
            slot = self.value(target, places)
            return tirx.BufferStore(slot.source, self.value(block.body.value, places), list(slot.indices))

        def row(position: Any) -> Any:
            places = outer.at(position)
            return loops.loop("j", axes.extents[-1], lambda j: element({**places, axes.variables[-1]: j}))

        return loops.loop("row", outer.total, row, "parallel")

    def lanewise(self, lanes: int, make: Any, kind: str = "vectorized") -> Any:
        """Return a loop over the lanes of one vector."""

        def body(lane: Any) -> Any:
            if isinstance(lane, tvm.ir.Var):
                self.analyzer.bind(lane, tvm.ir.Range(loops.index(0), loops.index(lanes)))
            return make(lane)

        return loops.loop("lane", lanes, body, kind)

    def value(
        self,
        expression: Any,
        places: Mapping[Any, Any],
        *,
        flat: Sequence[tuple[Axes, Any]] = (),
        given: Mapping[Any, Any] | None = None,
    ) -> Any:
        """Evaluate ``expression`` at ``places``.

        ``flat`` gives positions of whole runs of axes, so that loads that index with such a run stay contiguous.
        Loads from the buffers of ``given`` are replaced by values.
        """

        # Substitution goes on inside of what it put in: values come last.
        values = given or {}
        names = {buffer: tirx.Var("given", value.ty) for buffer, value in values.items()}

        def on_load(x: Any) -> Any:
            return names[x.source] if x.source in names else self.flatten(x, flat)

        result = replace(expression, places, on_load)
        if names:
            result = replace(result, {names[buffer]: value for buffer, value in values.items()})
        if isinstance(result, tvm.ir.TensorLoad):
            return load(result.source, self.analyzer.simplify(result.indices[0]))
        return result

    def store(
        self,
        places: Mapping[Any, Any],
        flat: Sequence[tuple[Axes, Any]],
        result: Any,
        given: Mapping[Any, Any] | None = None,
    ) -> Any:
        """Return the store of the epilogue at ``places``, where ``result`` is what the core computed there."""
        values = {self.fused.accumulator: result, **(given or {})}
        value = self.value(self.fused.epilogue, places, flat=flat, given=values)
        value = rounding.simplify(value)
        slot = tirx.BufferLoad(self.fused.output, self.fused.spatial.variables)
        position = self.value(slot, places, flat=flat)
        return tirx.BufferStore(position.source, value, list(position.indices))

    def flatten(self, x: Any, runs: Sequence[tuple[Axes, Any]]) -> Any:
        """Return a load from the flat view of its buffer; whole runs of axes become their flat position."""
        if x.source in self.views.values():
            return x
        indices, extents = list(x.indices), [self.size(e) for e in x.source.shape]
        for axes, position in runs:
            if len(axes.variables) < 2 or self.collapse(x, axes) is None:
                continue
            start = next(i for i, value in enumerate(indices) if value.same_as(axes.variables[0]))
            stop = start + len(axes.variables)
            extents[start:stop] = [loops.product(extents[start:stop])]
            indices[start:stop] = [loops.index(position)]
        offset: Any = loops.index(0)
        for value, extent in zip(indices, extents, strict=True):
            offset = offset * loops.index(extent) + value
        return load(self.flat_view(x.source), offset)

    def flat_view(self, buffer: Any) -> Any:
        """Return the one-dimensional view of ``buffer``."""
        if buffer not in self.views:
            size = loops.product([self.size(e) for e in buffer.shape])
            self.views[buffer] = tirx.decl_buffer([loops.index(size)], str(buffer.dtype), f"{buffer.name}_flat")
        return self.views[buffer]

    def collapse(self, x: Any, axes: Axes) -> int | None:
        """Return where a load indexes with exactly the variables of ``axes`` in a row over equal extents, or None."""
        indices = list(x.indices)
        first, count = axes.variables[0], len(axes.variables)
        starts = [i for i, value in enumerate(indices) if value.same_as(first)]
        if len(starts) != 1 or not _same(indices[starts[0] : starts[0] + count], axes.variables):
            return None
        start = starts[0]
        rest = indices[:start] + indices[start + count :]
        inner = list(x.source.shape)[start + 1 : start + count]
        equal = all(_identical(self.size(a), loops.plain(b)) for a, b in zip(inner, axes.extents[1:], strict=True))
        return start if equal and not any(loops.uses(i, axes.variables) for i in rest) else None

    def unit_step(self, offset: Any, variable: Any) -> bool:
        """Tell whether ``offset`` grows by one with ``variable``."""
        fresh = tirx.Var("next", "int64")
        moved = replace(replace(offset, {variable: fresh}), {fresh: variable + 1})
        return loops.static(self.analyzer.simplify(moved - offset)) == 1


def _identical(a: Any, b: Any) -> bool:
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return bool(a.same_as(b))


def bits(dtype: str) -> int:
    """Return the width of an element type."""
    return int("".join(ch for ch in dtype if ch.isdigit()) or 8)
