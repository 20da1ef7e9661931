"""The functions that compute sizes at run time, written in one order.

TVM's VMShapeLower emits their stores in the order of a hash table keyed by addresses, so the bytes of an artifact
would depend on where the compiler's memory lies. Each store fills a slot of its own and reads only slots that were
filled before the function is called: any order is right.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx


@tvm.transform.module_pass(opt_level=0, name="OrderShapeFunctions")  # type: ignore[untyped-decorator]
def order_shape_functions(module: Any, _context: Any) -> Any:
    """Return ``module`` with the stores of its shape functions in the order of their slots."""
    for var, function in module.functions.items():
        if isinstance(function, tirx.PrimFunc) and str(var.name_hint).startswith("shape_func"):
            module.update_func(var, function.with_body(_ordered(function.body)))
    return module


def _ordered(body: Any) -> Any:
    if not isinstance(body, tirx.SeqStmt) or not all(isinstance(s, tirx.BufferStore) for s in body.seq):
        return body
    return tirx.SeqStmt(sorted(body.seq, key=lambda store: int(store.indices[0])))
