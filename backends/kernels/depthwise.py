"""The schedule of depthwise convolution: one channel a task, vectors along the last axis, window unrolled."""

from __future__ import annotations

from typing import Any

from tvm import s_tir

from optc.backends.base import Target

TEMPLATE = "depthwise"
_REDUCTION = 2


def schedule(function: Any, target: Target) -> Any:
    """Return ``function`` scheduled, or None if it is not one depthwise block with its element-wise epilogue."""
    sch = s_tir.Schedule(function, enable_check=False, error_render_level="none")
    root = sch.get_sblock("root")
    blocks = sch.get_child_blocks(root)
    marked = [b for b in blocks if sch.get(b).annotations.get("optc.template") == TEMPLATE]
    outputs = sch.get_output_blocks(root)
    if len(marked) != 1 or len(outputs) != 1:
        return None
    core, out = marked[0], outputs[0]
    ends = [sch.get(core), sch.get(out)]
    others = [b for b in blocks if not any(sch.get(b).same_as(end) for end in ends)]
    if sch.get(core).same_as(sch.get(out)):
        out = sch.cache_write(core, 0, "local")
    for block in others:
        try:
            sch.compute_inline(block)
        except s_tir.ScheduleError:
            return None
    reduced = sum(int(v.iter_type) == _REDUCTION for v in sch.get(core).iter_vars)
    loops = sch.get_loops(out)
    if len(loops) != len(sch.get(core).iter_vars) - reduced:
        return None
    sch.set_scope(core, 0, "local")
    lanes = max(1, target.vector_bits // 32)
    chunk, inner = sch.split(loops[-1], [None, 2 * lanes])
    task = sch.fuse(*loops[:2])
    sch.compute_at(core, chunk, preserve_unit_loops=True)
    nest = sch.get_loops(core)[-len(sch.get(core).iter_vars):]
    spatial, window = nest[:-reduced], nest[-reduced:]
    sch.reorder(*window, spatial[-1])
    for axis in window:
        sch.unroll(axis)
    sch.vectorize(spatial[-1])
    init = sch.decompose_reduction(core, window[0])
    sch.vectorize(sch.get_loops(init)[-1])
    sch.parallel(task)
    del inner
    return sch.mod["main"]
