"""The rule for kernels without a template: inline, share rows, parallel outside, vector inside.

1. Spatial stages that are cheap or read once are inlined into their consumers.
2. The stages that remain are computed at the rows of the last one where the accesses allow it, so that
   intermediate values stay in cache; otherwise they get loops of their own.
3. Outer spatial loops are fused and run in parallel when the work is worth a thread; the innermost loop is
   vectorized when its extent is a multiple of the vector, else left to LLVM's vectorizer, which handles
   remainders and symbolic extents.

A tuning log may have a trace for such a kernel, which then takes the place of all that.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from optc.backends.base import Target
from optc.backends.kernels import traces, turned
from optc.backends.kernels.decisions import decide, traced
from optc.backends.kernels.loops import uses
from optc.backends.kernels.work import expensive

GENERIC, TURNED, SERIAL = RULES = ("generic", "turned", "serial")
"""The names of the rules: the one above, transpositions in squares, loops that are left as they are."""
TRACED = "traced"
"""The rule of kernels that a trace schedules."""
SEARCHED = (GENERIC, TURNED)
"""Rules of kernels for which TVM's search may find a better schedule."""
_SPATIAL, _REDUCTION = 0, 2
_TASKS = 64
"""Tasks that threads share evenly enough."""
_SCALARS = (".nearbyint", ".isnan", ".isinf", ".isfinite", ".rsqrt")
"""Operators that TVM's vectorizer takes apart into lanes."""
_SUMS = 8
"""Vectors of sums that are kept in registers."""
_LEAST_LANES = 4
"""Lanes that make a vector of sums."""


def schedule(function: Any, target: Target, parallel: bool) -> tuple[Any, str]:
    """Return ``function`` scheduled and the name of the rule that did it, one of ``RULES`` or ``TRACED``."""
    replayed = traced(lambda text: traces.replay(function, text))
    if replayed is not None:
        return replayed, TRACED
    sch = s_tir.Schedule(function, enable_check=False, error_render_level="none")
    blocks = sch.get_child_blocks(sch.get_sblock("root"))
    if not blocks or not all(_regular(sch, block) for block in blocks):
        return function, SERIAL
    blocks = _inline(sch, blocks)
    if len(blocks) == 1:
        scheduled = turned.schedule(function, sch.get(blocks[0]), target, parallel)
        if scheduled is not None:
            return scheduled, TURNED
    lanes = _lanes(sch, blocks, target)
    shared = _share_rows(sch, blocks, lanes)
    if shared is not None:
        sch, row = shared
        if parallel:
            sch.parallel(row)
    else:
        for block in blocks:
            _schedule_alone(sch, block, lanes, parallel)
    return sch.mod["main"], GENERIC


def _regular(sch: Any, block: Any) -> bool:
    """Tell whether ``block`` is a plain spatial or reduction block under simple loops."""
    if sch.get_child_blocks(block):
        return False
    iters = sch.get(block).iter_vars
    return {int(v.iter_type) for v in iters} <= {_SPATIAL, _REDUCTION} and len(sch.get_loops(block)) == len(iters)


def _lanes(sch: Any, blocks: list[Any], target: Target) -> int:
    """Return how many of the widest elements written fit a vector register."""
    widths = [_bits(str(region.source.dtype)) for block in blocks for region in sch.get(block).writes]
    return target.lanes(max([*widths, 8]))


def _bits(dtype: str) -> int:
    digits = "".join(c for c in dtype if c.isdigit())
    return int(digits) if digits else 8


def _inline(sch: Any, blocks: list[Any]) -> list[Any]:
    kept: list[Any] = []
    for block in blocks:
        consumers = sch.get_consumers(block)
        inlinable = consumers and not _reductions(sch, block) and not _repeats_work(sch, block, consumers)
        if inlinable and _try(sch.compute_inline, block):
            continue
        kept.append(block)
    return kept


def _repeats_work(sch: Any, block: Any, consumers: list[Any]) -> bool:
    """Tell whether inlining would repeat expensive work: several readers, or one that revisits values."""
    if not expensive(sch.get(block)):
        return False
    revisits = len(sch.get(consumers[0]).iter_vars) > len(sch.get(block).iter_vars)
    return len(consumers) > 1 or revisits


def _try(primitive: Any, *arguments: Any) -> bool:
    """Run a schedule primitive; a refusal (the primitive checks before it edits) means "not possible here"."""
    try:
        primitive(*arguments)
    except s_tir.ScheduleError:
        return False
    return True


def _reductions(sch: Any, block: Any) -> list[Any]:
    kinds = [int(v.iter_type) for v in sch.get(block).iter_vars]
    loops = sch.get_loops(block)[-len(kinds) :] if kinds else []
    return [loop for loop, kind in zip(loops, kinds, strict=True) if kind == _REDUCTION]


def _extent(sch: Any, loop: Any) -> int | None:
    extent = sch.get(loop).extent
    return int(extent) if isinstance(extent, tirx.IntImm) else None


def _share_rows(sch: Any, blocks: list[Any], lanes: int) -> tuple[Any, Any] | None:
    """Compute all stages at the rows of the last one; returns the new schedule and the fused row loop.

    Rows are the leading loops that all stages have with the same extents, so nothing is computed twice. None where
    the accesses do not allow it, or where sizes written in different ways leave predicates that no loop transform
    can look through.
    """
    if len(blocks) < 2 or _reductions(sch, blocks[-1]):
        return None
    depth = min(_common_prefix(sch, block, blocks[-1]) for block in blocks[:-1])
    if depth == 0:
        return None
    trial = sch.copy()
    loops = trial.get_loops(blocks[-1])
    row = trial.fuse(*loops[:depth]) if depth > 1 else loops[0]
    for block in reversed(blocks[:-1]):
        if not _try(lambda block=block: trial.compute_at(block, row, preserve_unit_loops=True)):
            return None
    if not all(_try(_schedule_inside, trial, block, row, lanes) for block in blocks):
        return None
    return trial, row


def _common_prefix(sch: Any, block: Any, last: Any) -> int:
    reductions = [sch.get(loop) for loop in _reductions(sch, block)]
    ours, theirs = sch.get_loops(block), sch.get_loops(last)[:-1]
    depth = 0
    for a, b in zip(ours, theirs, strict=False):
        same = tvm_ffi.structural_equal(sch.get(a).extent, sch.get(b).extent)
        if not same or any(sch.get(a).same_as(loop) for loop in reductions):
            break
        depth += 1
    return depth


def _schedule_inside(sch: Any, block: Any, row: Any, lanes: int) -> None:
    loops = sch.get_loops(block)
    position = next(i for i, loop in enumerate(loops) if sch.get(loop).same_as(sch.get(row)))
    inner = loops[position + 1 :]
    kinds = [int(v.iter_type) for v in sch.get(block).iter_vars]
    reduction = inner[len(inner) - kinds.count(_REDUCTION) :] if _REDUCTION in kinds else []
    _vectorize(sch, block, inner[: len(inner) - len(reduction)], reduction, lanes)


def _schedule_alone(sch: Any, block: Any, lanes: int, parallel: bool) -> None:
    reduction = _reductions(sch, block)
    loops = sch.get_loops(block)
    spatial = loops[: len(loops) - len(reduction)]
    outer = _vectorize(sch, block, spatial, reduction, lanes)
    if parallel and outer:
        tasks = outer[: _tasks([_extent(sch, loop) for loop in outer])]
        sch.parallel(sch.fuse(*tasks) if len(tasks) > 1 else tasks[0])


def _tasks(extents: list[int | None]) -> int:
    """Return how many of the outermost loops make the tasks of threads: as few as give enough of them.

    A turn of a fused loop divides for its place in each of them, which would take longer than a vector does.
    """
    best, count = 0, 1
    while best < len(extents) and count < _TASKS:
        # A batch that only a run knows may be one image; an axis further inside is longer.
        count *= extents[best] or (_TASKS if best else 1)
        best += 1
    return min(decide("fused", best, range(1, len(extents) + 1)), len(extents))


def _vectorize(sch: Any, block: Any, spatial: list[Any], reduction: list[Any], lanes: int) -> list[Any]:
    """Vectorize the innermost spatial loop where its extent allows; returns the loops left outside."""
    outer = list(spatial)
    extent = _extent(sch, spatial[-1]) if spatial else None
    if reduction and extent is not None and extent % lanes and _walks(sch, block):
        # Half a vector of sums is far more than one sum after the other.
        lanes = max(_LEAST_LANES, extent & -extent)
    if extent is not None and lanes > 1 and extent % lanes == 0 and not _scalar_only(sch.get(block)):
        # Several sums at once: an addition does not wait for the one before, and whole cache lines are read.
        sums = next(n for n in range(_SUMS, 0, -1) if extent // lanes % n == 0) if reduction else 1
        outer[-1], several, vector = sch.split(spatial[-1], [None, sums, lanes], preserve_unit_iters=True)
        if reduction:
            sch.reorder(*reduction, several, vector)
        sch.unroll(several)
        sch.vectorize(vector)
    elif reduction and len(outer) > 1 and _walks(sch, block):
        # All sums once for each term: LLVM's vectors, of any number of sums.
        sch.reorder(*reduction, outer.pop())
    elif len(outer) > 1 and not reduction:
        outer = outer[:-1]  # the innermost loop stays whole, for LLVM's vectorizer
    if reduction:
        sch.decompose_reduction(block, reduction[0])
    return outer


def _walks(sch: Any, block: Any) -> bool:
    """Tell whether all that ``block`` reads lies next to each other along its last spatial axis."""
    content = sch.get(block)
    axis = [v.var for v in content.iter_vars if int(v.iter_type) == _SPATIAL][-1]
    regions = [region for region in content.reads if list(region.region)]
    return all(region.region[-1].min.same_as(axis) for region in regions)


def _scalar_only(block: Any) -> bool:
    """Tell whether a vector loop of the block is one over scalars: it branches from lane to lane, or calls out.

    Left whole, LLVM makes vectors of the loop; lanes that TVM has unrolled it would gather from the loop around them.
    """
    lane = [v.var for v in block.iter_vars if int(v.iter_type) == _SPATIAL][-1:]
    calls: list[Any] = []
    tvm_ffi.structural_walk(block.body, (tvm.ir.Call, lambda call: calls.append(call)))
    names = [str(getattr(call.op, "name", call.op)) for call in calls]
    branches = (call.args[0] for call, name in zip(calls, names, strict=True) if "if_then_else" in name)
    return any(_scalar(name) for name in names) or any(uses(test, lane) for test in branches)


def _scalar(name: str) -> bool:
    """Tell whether TVM's vectorizer takes calls of ``name`` apart."""
    return "extern" in name or "packed" in name or name.endswith(_SCALARS)
