"""Reads the planned activation memory off a module after static memory planning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import relax, tirx


def planned_bytes(module: Any, blocks: Sequence[int | None]) -> int | None:
    """Return the bytes of all planned buffers of ``main`` and the largest of its segments' ``blocks``.

    None if one of them has a symbolic size.
    """
    sizes: list[int | None] = [None if None in blocks else max((b for b in blocks if b is not None), default=0)]

    def visit(node: Any) -> None:
        if not isinstance(node, relax.Call) or not hasattr(node.op, "name"):
            return
        if node.op.name == "relax.memory.alloc_storage":
            sizes.append(_static(list(node.args[0].values)))
        elif node.op.name == "relax.builtin.alloc_tensor":
            elements = _static(list(node.args[0].values))
            width = tirx.const(0, str(node.args[1].value)).ty.dtype
            sizes.append(None if elements is None else elements * ((_bits(str(width)) + 7) // 8))

    relax.analysis.post_order_visit(module["main"], visit)
    if any(size is None for size in sizes):
        return None
    return sum(size for size in sizes if size is not None)


def _bits(dtype: str) -> int:
    digits = "".join(c for c in dtype if c.isdigit())
    return int(digits) if digits else 8


def _static(dims: list[Any]) -> int | None:
    total = 1
    for dim in dims:
        if not isinstance(dim, tirx.IntImm):
            return None
        total *= int(dim)
    return total
