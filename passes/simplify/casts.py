"""Casts: chains whose first step loses nothing, casts to the own type, CastLike with a known type."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import onnx_ir as oir

from optc.passes.match import producer
from optc.passes.rewrite import Miss, Ops, Outcome, Rewrite, RewritePass, rule

# float8 and narrower types saturate or overflow by attribute: chains of them stay as they are.
_FLOATS = frozenset({oir.DataType.FLOAT16, oir.DataType.BFLOAT16, oir.DataType.FLOAT, oir.DataType.DOUBLE})


def is_lossless(source: oir.DataType, target: oir.DataType) -> bool:
    """Tell whether every value of ``source`` is a value of ``target``."""
    if source == target:
        return True
    number = source.is_integer() or source in _FLOATS or source == oir.DataType.BOOL
    if not number or not (target.is_integer() or target in _FLOATS):
        return False
    if source == oir.DataType.BOOL:
        return True
    if source in _FLOATS:
        if target not in _FLOATS:
            return False
        a, b = _finfo(source), _finfo(target)
        return bool(a.nmant <= b.nmant and a.maxexp <= b.maxexp and a.minexp >= b.minexp)
    low, high = _range(source)
    if target in _FLOATS:
        # 0xFFFF fits in 16 bits of significand, but float16 ends at 65504.
        finfo = _finfo(target)
        return max(-low, high + 1) <= 2 ** (int(finfo.nmant) + 1) and high <= float(finfo.max)
    return _range(target)[0] <= low and high <= _range(target)[1]


def _finfo(dtype: oir.DataType) -> Any:
    return ml_dtypes.finfo(dtype.numpy())  # type: ignore[no-untyped-call]


def _range(dtype: oir.DataType) -> tuple[int, int]:
    bits = dtype.bitwidth
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if dtype.is_signed() else (0, (1 << bits) - 1)


@rule("cast(x, type of x) => x", "Cast", "CastLike")
def to_own_type(node: oir.Node, ops: Ops) -> Outcome:
    """Drop a cast to the type that the value has."""
    x = node.inputs[0]
    if x is None or x.dtype is None or x.dtype != node.outputs[0].dtype:
        return None
    return Rewrite([x])


@rule("castlike(x, y) => cast(x, type of y)", "CastLike")
def like(node: oir.Node, ops: Ops) -> Outcome:
    """Name the type, so that the node does not depend on a value it only takes the type of."""
    target = node.inputs[1].dtype if node.inputs[1] is not None else None
    if target is None:
        return None
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    return Rewrite([ops("Cast", node.inputs[0], to=int(target), **attributes)])


@rule("cast(cast(x, wider), t) => cast(x, t)", "Cast")
def chain(node: oir.Node, ops: Ops) -> Outcome:
    """Cast at once where the first cast keeps every value."""
    inner = producer(node.inputs[0], "Cast")
    if inner is None or inner.inputs[0] is None:
        return None
    x, target = inner.inputs[0], node.outputs[0].dtype
    middle = inner.outputs[0].dtype
    if x.dtype is None or middle is None or target is None:
        return None
    if not is_lossless(x.dtype, middle):
        return Miss(f"the cast from {x.dtype.name} to {middle.name} loses values")
    if x.dtype == target:
        return Rewrite([x])
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    return Rewrite([ops("Cast", x, **attributes)])


PASS = RewritePass("casts", [to_own_type, like, chain])
