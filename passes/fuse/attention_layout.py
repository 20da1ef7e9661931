"""Attention where its operands lie: heads side by side as projections leave them, masks no larger than they need be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as oir

from optc.passes.fuse.pattern import integers, same_dim
from optc.passes.match import constant, producer
from optc.passes.rewrite import Miss, Ops, Outcome, Rewrite, RewritePass, rule

_SWAP = (0, 2, 1, 3)
_ELEMENTWISE = ("Add", "And", "Cast", "Equal", "Max", "Min", "Mul", "Not", "Or", "Sub", "Where")


@rule("Attention(q^T,k^T,v^T) => Reshape(Attention(Reshape(q),Reshape(k),Reshape(v)))^T", "Attention")
def packed_heads(node: oir.Node, ops: Ops) -> Outcome:
    """Drop the transpositions of ``[batch, sequence, heads, size]``, which Attention can read as it is."""
    operands = [_unswapped(value) for value in node.inputs[:3]]
    q, k, v = operands if len(operands) == 3 else (None, None, None)
    if q is None or k is None or v is None:
        return None
    if any(value is not None for value in node.inputs[4:6]) or any(out.uses() for out in node.outputs[1:]):
        return Miss("a cache has its heads before its positions")
    if any(out.is_graph_output() for out in node.outputs[1:]):
        return Miss("more than one output is used")
    assert q.shape is not None and k.shape is not None and v.shape is not None
    sizes = [size for value in (q, k, v) for size in _sizes(value)]
    if len(sizes) < 6:
        return Miss("numbers or sizes of heads are not known")
    heads, shared, width = sizes[0], sizes[2], sizes[5]
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    attributes |= {"q_num_heads": heads, "kv_num_heads": shared}
    packed = ops(
        "Attention",
        *(_merged(ops, value) for value in (q, k, v)),
        *node.inputs[3:],
        shape=oir.Shape([*q.shape[:2], heads * width]),
        dtype=q.dtype,
        **attributes,
    )
    shape = oir.Shape([*q.shape[:2], heads, width])
    split = ops("Reshape", packed, _target(ops, heads, width), allowzero=0, shape=shape, dtype=q.dtype)
    return Rewrite([ops("Transpose", split, perm=list(_SWAP))])


def _unswapped(value: oir.Value | None) -> oir.Value | None:
    swap = producer(value, "Transpose")
    source = swap.inputs[0] if swap is not None and integers(swap, "perm") == _SWAP else None
    return source if source is not None and source.shape is not None else None


def _sizes(value: oir.Value) -> list[int]:
    """Return the number and the size of heads, what is known of them."""
    return [size for size in (value.shape or ())[2:] if isinstance(size, int)]


def _target(ops: Ops, *sizes: int) -> oir.Value:
    """Return the shape that keeps batch and sequence."""
    return ops.constant(np.array([0, 0, *sizes], np.int64), "shape")


def _merged(ops: Ops, value: oir.Value) -> oir.Value:
    heads, size = _sizes(value)
    shape = oir.Shape([*(value.shape or ())[:2], heads * size])
    return ops("Reshape", value, _target(ops, heads * size), allowzero=0, shape=shape, dtype=value.dtype)


@rule("Attention(q,k,v,Expand(m)) => Attention(q,k,v,m)", "Attention")
def narrow_mask(node: oir.Node, ops: Ops) -> Outcome:
    """Compute a mask that is the same for all queries with one row only."""
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if mask is None or mask.shape is None or len(mask.shape) < 2 or mask.shape[-2] == 1:
        return None
    row = _row(mask, ops, depth=6)
    if row is None:
        return None
    if row.shape is None or len(row.shape) < 2 or not same_dim(row.shape[-1], mask.shape[-1]):
        return Miss(f"one row of the mask has shape {row.shape}, which does not state every key")
    inputs = [*node.inputs]
    inputs[3] = row
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    like = node.outputs[0]
    if any(out.uses() or out.is_graph_output() for out in node.outputs[1:]):
        return Miss("more than one output is used")
    return Rewrite([ops("Attention", *inputs, shape=like.shape, dtype=like.dtype, **attributes)])


def _row(value: oir.Value | None, ops: Ops, depth: int) -> oir.Value | None:
    """Return ``value`` with one row of its second last axis, None if rows differ or nobody knows."""
    if value is None or value.shape is None or depth == 0:
        return None
    if len(value.shape) < 2 or value.shape[-2] == 1:
        return value
    array = constant(value)
    if array is not None:
        same = array.size > 0 and bool((array == array[..., :1, :]).all())
        return ops.constant(array[..., :1, :], "row") if same else None
    expand = producer(value, "Expand")
    if expand is not None:
        return _row(expand.inputs[0], ops, depth - 1)
    node = producer(value, *_ELEMENTWISE)
    if node is None:
        return None
    rows = [_row(operand, ops, depth - 1) for operand in node.inputs]
    operands = [row for row in rows if row is not None]
    if len(operands) < len(rows):
        return None
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    shape = _broadcast([row.shape for row in operands])
    return ops(node.op_type, *operands, shape=shape, dtype=value.dtype, **attributes)


def _broadcast(shapes: Sequence[oir.Shape | None]) -> oir.Shape:
    """Return the shape of an element-wise result whose operands are known to fit."""
    known: list[list[int | oir.SymbolicDim]] = [list(shape) for shape in shapes if shape is not None]
    size = max(map(len, known))
    columns = zip(*([*[1] * (size - len(shape)), *shape] for shape in known), strict=True)
    return oir.Shape([next((d for d in column if d != 1), 1) for column in columns])


def attention_layout_pass() -> RewritePass:
    """Return the pass that simplifies what surrounds Attention."""
    return RewritePass("attention-layout", [narrow_mask, packed_heads])
