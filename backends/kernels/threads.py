"""Which kernels are worth more than one thread: those that take longer than it takes to start one.

A worker begins about 5 us after it is told to, and the one that waits for it loses as much. Sizes that only a run
knows leave the decision to the run: the kernel then carries what it takes as an expression of them.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import s_tir, tirx

from optc.backends.base import Target
from optc.backends.kernels import loops
from optc.backends.kernels.decisions import decide
from optc.backends.kernels.work import expensive, sums_products

LEAST_CYCLES = 40_000
"""Cycles of one thread below which a second one does not help: two starts."""
CYCLES = "optc.cycles"
"""The attribute of a kernel with the cycles that it takes, if that depends on sizes of the run."""

LAUNCH = "pragma_parallel_launch_point"
"""TVM's attribute of statements that all threads run together."""


def cycles(function: Any, target: Target, template: bool) -> Any:
    """Return about how many cycles an unscheduled kernel takes on one thread: an int, or an expression of its sizes.

    A template multiplies and adds two vectors per cycle; all else is taken to handle one vector per cycle for every
    tensor it reads or writes.
    """
    lanes = target.lanes(32)
    blocks = loops.collect(function.body, s_tir.SBlock)
    total: Any = 0
    for block in blocks:
        if not block.iter_vars:
            continue
        weight = 2 * (len(block.reads) + 1) * (8 if expensive(block) else 1)
        if template and sums_products(block):
            weight = 1
        total = total + loops.product([v.dom.extent for v in block.iter_vars]) * weight
    if not any(block.iter_vars for block in blocks):
        tensors = [p for p in function.params if isinstance(p.ty, tirx.buffer.BufferType)]
        for tensor in tensors:
            total = total + loops.product(list(tensor.ty.shape)) * 2
    return total // (2 * lanes)


def settle(scheduled: Any, needed: Any) -> Any:
    """Return a scheduled kernel that takes ``needed`` cycles without its parallel loops if they do not pay.

    Where sizes of the run decide, the kernel keeps them and gets the attribute ``CYCLES``. Kernels that start their
    threads themselves have decided.
    """
    if any(str(statement.attr_key) == LAUNCH for statement in loops.collect(scheduled.body, tirx.AttrStmt)):
        return scheduled
    if loops.static(needed) is None:
        return scheduled.with_attr(CYCLES, needed)
    return scheduled if worth(needed) else scheduled.with_body(serial(scheduled.body))


def worth(needed: int) -> bool:
    """Tell whether ``needed`` cycles are worth threads: the knob ``parallel`` where that is not clear."""
    open_question = LEAST_CYCLES // 8 <= needed <= LEAST_CYCLES * 8
    return bool(decide("parallel", int(needed >= LEAST_CYCLES), (0, 1) if open_question else ()))


def serial(body: Any) -> Any:
    """Return ``body`` with every parallel loop made serial."""
    return tvm_ffi.structural_map(body, [(tirx.For, _serial)], order="post")


def is_parallel(loop: Any) -> bool:
    """Tell whether the turns of a loop are shared among threads."""
    return int(loop.kind) == int(tirx.ForKind.PARALLEL)


def _serial(loop: Any) -> Any:
    if not is_parallel(loop):
        return loop
    return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)
