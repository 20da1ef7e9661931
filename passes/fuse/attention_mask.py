"""What is done to attention scores between the two products: masks, read into what Attention can express."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from optc.passes.fuse.pattern import integer, same_dim
from optc.passes.match import constant, producer, scalar
from optc.passes.rewrite import Miss, Ops

_VANISHES = -1e4
"""A score this far below the others has probability zero in float32."""
_ABSORBS = -1e9
"""Added to scores, this leaves nothing of them in float32: a wholly masked row becomes uniform either way."""


@dataclass(frozen=True)
class Select:
    """``Where(condition, scores, fill)``, or ``Where(condition, fill, scores)`` if not ``keep``."""

    condition: oir.Value
    fill: float
    keep: bool


Mask = oir.Value | Select
"""A value that is added to the scores, or a selection."""


@dataclass(frozen=True)
class MaskInput:
    """What Attention gets: the ``attn_mask`` input, if any, and ``is_causal``."""

    value: oir.Value | None
    causal: bool


def combine(masks: Sequence[Mask], dims: Sequence[object], keys: oir.Value, ops: Ops) -> MaskInput | Miss:
    """Express ``masks`` by one mask input and the causal flag.

    ``dims`` is the shape of the scores (batch, ..., q, kv), ``keys`` has four axes. Boolean masks stay boolean where
    they are alone and fill with minus infinity; there a row without any key gives zeros, as the operator defines, where
    the separate operators gave NaN.
    """
    dtype = keys.dtype
    assert dtype is not None
    causal = False
    booleans: list[oir.Value] = []
    additive: list[oir.Value] = []
    for mask in masks:
        value = mask.condition if isinstance(mask, Select) else mask
        if (reason := _illegal(value, dims)) is not None:
            return Miss(reason)
        if _is_causal(mask, dims):
            causal = True
        elif isinstance(mask, Select):
            if mask.fill == -np.inf:
                booleans.append(value if mask.keep else ops("Not", value, like=value))
            elif (added := _added(mask, dtype, ops)) is not None:
                additive.append(added)
            else:
                return Miss(f"masked scores become {mask.fill:g}, which a wholly masked row would show")
        elif value.dtype != dtype:
            return Miss(f"the mask is {value.dtype}, the queries are {dtype}")
        elif uniform(value) != 0.0:
            additive.append(value)
    if booleans and not additive and not causal:
        total = _fold(ops, "And", booleans)
    else:
        converted = [_converted(ops, value, dtype) for value in booleans]
        total = _fold(ops, "Add", [*additive, *converted])
    # The operator does not broadcast the last dimension: it pads a shorter mask with minus infinity.
    if total is not None and total.shape and total.shape[-1] == 1:
        total = _for_every_key(total, dims[-1], keys, ops)
    if total is not None and not (total.shape and same_dim(total.shape[-1], dims[-1])):
        return Miss(f"the mask of shape {total.shape} does not state every key")
    return MaskInput(total, causal)


def _fold(ops: Ops, op_type: str, values: Sequence[oir.Value]) -> oir.Value | None:
    total: oir.Value | None = None
    for value in values:
        total = value if total is None else _broadcast(ops, op_type, total, value)
    return total


def _for_every_key(mask: oir.Value, size: object, keys: oir.Value, ops: Ops) -> oir.Value:
    """Repeat a mask along its last axis, which is of size one."""
    assert mask.shape is not None
    shape = oir.Shape([*list(mask.shape)[:-1], size])  # type: ignore[list-item]
    ones = ops.constant(np.ones(len(shape) - 1, np.int64), "ones")
    count = ops("Shape", keys, start=2, end=3, shape=oir.Shape([1]), dtype=oir.DataType.INT64)
    target = ops("Concat", ones, count, axis=0, shape=oir.Shape([len(shape)]), dtype=oir.DataType.INT64)
    return ops("Expand", mask, target, shape=shape, dtype=mask.dtype)


def _broadcast(ops: Ops, op_type: str, a: oir.Value, b: oir.Value) -> oir.Value:
    assert a.shape is not None and b.shape is not None and a.dtype is not None
    size = max(len(a.shape), len(b.shape))
    pairs = [[*[1] * (size - len(shape)), *shape] for shape in (a.shape, b.shape)]
    shape = oir.Shape([q if p == 1 else p for p, q in zip(*pairs, strict=True)])
    return ops(op_type, a, b, shape=shape, dtype=a.dtype)


def _illegal(mask: oir.Value, dims: Sequence[object]) -> str | None:
    """Say why ``mask`` does not broadcast to ``dims``: it would make the scores larger, or nobody knows."""
    if mask.shape is None or len(mask.shape) > len(dims):
        return f"the mask '{mask.name}' has shape {mask.shape}, the scores have rank {len(dims)}"
    for found, wanted in zip(reversed(list(mask.shape)), reversed(dims), strict=False):
        if found != 1 and not same_dim(found, wanted):
            return f"the mask '{mask.name}' of shape {mask.shape} is not known to broadcast to {list(map(str, dims))}"
    return None


def _added(mask: Select, dtype: oir.DataType, ops: Ops) -> oir.Value | None:
    """Return what to add to the scores for a selection with a finite fill, or None where that differs."""
    array = constant(mask.condition)
    numpy_dtype = dtype.numpy()
    if array is not None:
        kept = array if mask.keep else ~array
        if kept.ndim == 0 or mask.fill > _VANISHES or not kept.any(axis=-1).all():
            return None
        return ops.constant(np.where(kept, 0.0, mask.fill).astype(numpy_dtype), "mask")
    if mask.fill > max(_ABSORBS, float(np.finfo(numpy_dtype).min)):
        return None
    zero, fill = ops.constant(np.array(0, numpy_dtype), "zero"), ops.constant(np.array(mask.fill, numpy_dtype), "fill")
    branches = (zero, fill) if mask.keep else (fill, zero)
    return ops("Where", mask.condition, *branches, shape=mask.condition.shape, dtype=dtype)


def _converted(ops: Ops, kept: oir.Value, dtype: oir.DataType) -> oir.Value:
    zero = ops.constant(np.array(0, dtype.numpy()), "zero")
    fill = ops.constant(np.array(-np.inf, dtype.numpy()), "fill")
    return ops("Where", kept, zero, fill, shape=kept.shape, dtype=dtype)


def _is_causal(mask: Mask, dims: Sequence[object]) -> bool:
    """Tell whether ``mask`` allows exactly the keys up to the query's own position, for all heads and batches."""
    value = mask.condition if isinstance(mask, Select) else mask
    assert value.shape is not None
    shape = list(value.shape)
    array = constant(value)
    if len(shape) < 2 or not all(map(same_dim, shape[-2:], dims[-2:])):
        return False
    if array is None and any(d != 1 for d in shape[:-2]):
        return False
    if isinstance(mask, Select):
        if mask.fill > _VANISHES:
            return False
        if array is not None:
            return _is_lower(array if mask.keep else ~array)
        return mask.keep and _is_lower_triangle(value)
    if array is not None:
        return bool(((array == 0) | (array <= _VANISHES)).all()) and _is_lower(array == 0)
    where = producer(value, "Where")
    if where is None:
        return False
    kept, fill = scalar(where.inputs[1]), scalar(where.inputs[2])
    inverted = producer(where.inputs[0], "Equal")
    if inverted is not None and scalar(inverted.inputs[1]) == 0.0:
        return fill == 0.0 and kept is not None and kept <= _VANISHES and _is_lower_triangle(inverted.inputs[0])
    return kept == 0.0 and fill is not None and fill <= _VANISHES and _is_lower_triangle(where.inputs[0])


def _is_lower(kept: np.ndarray) -> bool:
    return bool((kept == np.tril(np.ones(kept.shape[-2:], bool))).all())


def _is_lower_triangle(value: oir.Value | None) -> bool:
    """Tell whether ``value`` is Trilu of ones (or of true)."""
    cast = producer(value, "Cast")
    node = producer(cast.inputs[0] if cast is not None else value, "Trilu")
    if node is None or integer(node, "upper", 1) != 0:
        return False
    if len(node.inputs) > 1 and node.inputs[1] is not None and scalar(node.inputs[1]) != 0.0:
        return False
    return uniform(node.inputs[0]) == 1.0


def uniform(value: oir.Value | None) -> float | None:
    """Return the number that fills ``value`` completely, seen through movements of data and Where; else None."""
    array = constant(value)
    if array is not None:
        return float(array.reshape(-1)[0]) if array.size and (array == array.reshape(-1)[0]).all() else None
    moved = producer(value, "Expand", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Identity")
    if moved is not None:
        return uniform(moved.inputs[0])
    where = producer(value, "Where")
    if where is None:
        return None
    chosen = uniform(where.inputs[0])
    return None if chosen is None else uniform(where.inputs[1 if chosen else 2])
