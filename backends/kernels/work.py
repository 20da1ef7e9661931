"""How much arithmetic a kernel is asked for, read off its blocks before they are scheduled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import s_tir, tirx

from optc.backends.kernels.fused import REDUCTION
from optc.backends.kernels.loops import collect, static

# "reinterpret": the bit operations inside the polynomials of vector_math.
_EXPENSIVE = (
    "reinterpret",
    "exp",
    "log",
    "tanh",
    "erf",
    "pow",
    "sqrt",
    "sin",
    "cos",
    "tan",
    "atan",
    "sigmoid",
    "rsqrt",
)


@dataclass(frozen=True)
class Work:
    """The multiply-adds of a kernel's sums of products: two operations each, and the extents of the largest sum.

    ``extents`` are those of the output's axes and of the summed axes; ``dtype`` is that of the sum.
    """

    operations: int
    outputs: tuple[int, ...]
    summed: tuple[int, ...]
    dtype: str

    def describe(self) -> dict[str, Any]:
        """Return the JSON form that the artifact's report carries."""
        extents = [list(self.outputs), list(self.summed)]
        return {"operations": self.operations, "extents": extents, "accumulates": self.dtype}


def work(function: Any) -> Work | None:
    """Return the work of an unscheduled kernel; None if it has no sums of products, or a size is symbolic."""
    found: list[Work] = []
    for block in collect(function.body, s_tir.SBlock):
        if not sums_products(block):
            continue
        outputs = [static(v.dom.extent) for v in block.iter_vars if int(v.iter_type) != REDUCTION]
        summed = [static(v.dom.extent) for v in block.iter_vars if int(v.iter_type) == REDUCTION]
        known = [extent for extent in outputs + summed if extent is not None]
        if len(known) < len(outputs) + len(summed):
            return None
        total = 2
        for extent in known:
            total *= extent
        split = len(outputs)
        found.append(Work(total, tuple(known[:split]), tuple(known[split:]), str(block.body.buffer.dtype)))
    if not found:
        return None
    largest = max(found, key=lambda w: w.operations)
    return Work(sum(w.operations for w in found), largest.outputs, largest.summed, largest.dtype)


def sums_products(block: Any) -> bool:
    """Tell whether a block is a sum of products."""
    body = block.body
    reduces = any(int(v.iter_type) == REDUCTION for v in block.iter_vars)
    if not reduces or not isinstance(body, tirx.BufferStore) or not isinstance(body.value, tirx.Add):
        return False
    factor = body.value.b
    while isinstance(factor, tirx.Cast):
        factor = factor.value
    return isinstance(factor, tirx.Mul)


def expensive(block: Any) -> bool:
    """Tell whether a block computes functions that take many instructions."""
    names = [str(call.op) for call in collect(block.body, tvm.ir.Call)]
    return any(word in name for name in names for word in _EXPENSIVE)
