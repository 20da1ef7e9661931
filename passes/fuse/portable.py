"""Rewrites standard operators into what onnxruntime executes: for models that leave optc, not for its own backends.

onnxruntime 1.31 has no kernel for Swish-24 outside opset 24, and its Attention wants a mask with one row for every
query, where the standard lets one row serve all.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from optc.passes.fuse.pattern import number
from optc.passes.rewrite import Miss, Ops, Outcome, Rewrite, RewritePass, rule


@rule("Swish(x,alpha) => x*Sigmoid(alpha*x)", "Swish")
def swish_expanded(node: oir.Node, ops: Ops) -> Outcome:
    """Write Swish with Sigmoid."""
    x, alpha = node.inputs[0], number(node, "alpha", 1.0)
    assert x is not None and x.dtype is not None
    if alpha == 1.0:
        argument = x
    else:
        argument = ops("Mul", x, ops.constant(np.array(alpha, x.dtype.numpy()), "alpha"), like=x)
    return Rewrite([ops("Mul", x, ops("Sigmoid", argument, like=x))])


@rule("Attention(q,k,v,m) => Attention(q,k,v,Expand(m))", "Attention")
def attention_mask_expanded(node: oir.Node, ops: Ops) -> Outcome:
    """Expand a mask that has one row for all queries."""
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    q, k = node.inputs[0], node.inputs[1]
    if mask is None or q is None or k is None or len([v for v in node.inputs[4:] if v is not None]):
        return None
    if q.shape is None or k.shape is None or mask.shape is None or len(mask.shape) < 2:
        return Miss("the shapes of queries, keys or mask are not known")
    axis = 2 if len(q.shape) == 4 else 1
    if mask.shape[-2] != 1 or q.shape[axis] == 1:
        return None
    parts = [_size(ops, q, axis), ops.constant(np.array([1], np.int64), "size")]
    target = ops("Concat", *parts, axis=0, shape=oir.Shape([2]), dtype=oir.DataType.INT64)
    shape = oir.Shape([*mask.shape[:-2], q.shape[axis], mask.shape[-1]])
    full = ops("Expand", mask, target, shape=shape, dtype=mask.dtype)
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    return Rewrite([ops("Attention", q, k, node.inputs[2], full, **attributes)])


def _size(ops: Ops, value: oir.Value, axis: int) -> oir.Value:
    assert value.shape is not None
    size = value.shape[axis]
    if isinstance(size, int):
        return ops.constant(np.array([size], np.int64), "size")
    return ops("Shape", value, start=axis, end=axis + 1, shape=oir.Shape([1]), dtype=oir.DataType.INT64)


def portable_pass() -> RewritePass:
    """Return the pass to run last on a model that onnxruntime has to execute."""
    return RewritePass("portable", [swish_expanded, attention_mask_expanded])
