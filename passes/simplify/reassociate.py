"""Reassociation: the constants of a chain are combined.

They are combined in the precision of their type, which may change the last digit of a result, but not if the combined
constant overflows or vanishes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from optc.passes.match import commuted, constant, is_float, producer, used_once
from optc.passes.rewrite import Miss, Ops, Outcome, Rewrite, RewritePass, rule


def _with_constant(node: oir.Node | None) -> tuple[oir.Value, np.ndarray] | None:
    """Return ``(x, c)`` of a two-input node ``x op c``; ``c op x`` counts if the operator commutes."""
    if node is None or len(node.inputs) != 2:
        return None
    for x, c in commuted(node) if node.op_type in ("Add", "Mul") else ((node.inputs[0], node.inputs[1]),):
        array = constant(c)
        if array is not None and x is not None and constant(x) is None:
            return x, array
    return None


@rule("(x + c1) + c2 => x + (c1+c2)", "Add", "Sub")
def add_constants(node: oir.Node, ops: Ops) -> Outcome:
    """Add constants to each other first; subtractions count as additions of the negative."""
    return _combine(node, ops, ("Add", "Sub"))


@rule("(x * c1) * c2 => x * (c1*c2)", "Mul", "Div")
def multiply_constants(node: oir.Node, ops: Ops) -> Outcome:
    """Multiply constants with each other first; floating point divisions count as products."""
    return _combine(node, ops, ("Mul", "Div")) if is_float(node.outputs[0]) else None


def _combine(node: oir.Node, ops: Ops, op_types: tuple[str, str]) -> Outcome:
    forward, backward = op_types
    outer = _with_constant(node)
    inner_node = producer(outer[0], *op_types) if outer is not None else None
    inner = _with_constant(inner_node)
    if outer is None or inner is None or inner_node is None:
        return None
    if not used_once(inner_node.outputs[0]):
        return Miss("the inner result is needed elsewhere too")
    (_, c2), (x, c1) = outer, inner
    shape = np.broadcast_shapes(c1.shape, c2.shape)
    if shape not in (c1.shape, c2.shape):
        return Miss("the combined constant would be larger than both")
    signs = (inner_node.op_type == backward, node.op_type == backward)
    with np.errstate(all="ignore"):
        if forward == "Add":
            first = c1 if not signs[0] else np.negative(c1)
            combined = first - c2 if signs[1] else first + c2
        elif signs == (False, False) or signs == (True, True):
            combined = c1 * c2
        elif signs == (False, True):
            combined = c1 / c2
        else:
            combined = c2 / c1
    combined = np.asarray(combined).astype(c1.dtype)
    if forward == "Add" and _may_round(c1, c2, combined):
        return Miss("large constants that cancel may be there to round")
    if not _is_healthy(combined, *((c1, c2) if forward == "Mul" else ())):
        return Miss("the combined constant overflows or vanishes")
    op_type = backward if forward == "Mul" and signs == (True, True) else forward
    return Rewrite([ops(op_type, x, ops.constant(combined))])


def _may_round(c1: np.ndarray, c2: np.ndarray, combined: np.ndarray) -> bool:
    """Tell whether adding both constants may be the idiom ``(x + 2^23) - 2^23``, which rounds ``x``."""
    if combined.dtype.kind in "iub":
        return False
    largest = max(float(np.abs(c).max(initial=0)) for c in (c1, c2))
    cancels = np.abs(combined.astype(np.float64)).min(initial=np.inf) < largest
    half_of_the_digits = 2.0 ** (11 if combined.dtype.itemsize > 2 else 3)
    return bool(cancels) and largest > half_of_the_digits


def _is_healthy(result: np.ndarray, *factors: np.ndarray) -> bool:
    """Tell whether a float result is finite, and is no subnormal, nor 0 where it is a product of other numbers."""
    if result.dtype.kind in "iub":
        return True
    if not np.all(np.isfinite(result.astype(np.float64))):
        return False
    tiny = float(np.finfo(np.float32).tiny if result.dtype.itemsize > 2 else 1e-4)
    magnitude = np.abs(result.astype(np.float64))
    if np.any((magnitude > 0) & (magnitude < tiny)):
        return False
    return not (factors and np.any(magnitude == 0) and all(np.all(f != 0) for f in factors))


PASS = RewritePass("reassociate", [add_constants, multiply_constants])
