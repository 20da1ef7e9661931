"""Scaled-dot-product attention becomes the Attention operator (Attention-24, arXiv:1706.03762).

The operator gets queries, keys and values as ``[batch, heads, sequence, size]``; keys and values may have fewer heads
(arXiv:2305.13245). Layout changes stay outside, as Transpose nodes that a compiler can merge into strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as oir

from optc.passes.fuse.attention_mask import Mask, Select, combine, uniform
from optc.passes.fuse.pattern import integer, integers, is_float, leak, same_dim, same_shape, scalings
from optc.passes.match import producer, rank
from optc.passes.rewrite import Miss, Ops, Outcome, Rewrite, RewritePass, rule


@dataclass(frozen=True)
class _Scores:
    """``scale * q @ kt`` with ``masks`` applied to it, the last one first."""

    q: oir.Value
    kt: oir.Value
    scale: float = 1.0
    masks: tuple[Mask, ...] = ()


def _scores(value: oir.Value | None, scaled: float, masks: tuple[Mask, ...], depth: int = 6) -> _Scores | Miss | None:
    """Read the argument of the softmax down to the product of queries and keys."""
    node = producer(value, "MatMul", "Mul", "Div", "Add", "Where")
    if node is None or value is None or depth == 0:
        return None
    if node.op_type == "MatMul":
        q, kt = node.inputs[0], node.inputs[1]
        return _Scores(q, kt, scaled, masks) if q is not None and kt is not None else None
    if node.op_type in ("Mul", "Div"):
        *_, (base, factor) = scalings(value)
        return _scores(base, scaled * factor, masks, depth - 1) if base is not value else None
    if node.op_type == "Add":
        choices: list[tuple[oir.Value | None, Mask | None]] = [
            (node.inputs[0], node.inputs[1]),
            (node.inputs[1], node.inputs[0]),
        ]
    else:
        choices = [_selection(node, keep=True), _selection(node, keep=False)]
    for inner, mask in choices:
        found = _scores(inner, 1.0, (*masks, mask), depth - 1) if mask is not None else None
        if isinstance(found, _Scores) and scaled != 1.0:
            return Miss("the scores are scaled after the mask was applied")
        if found is not None:
            return found
    return None


def _selection(node: oir.Node, *, keep: bool) -> tuple[oir.Value | None, Mask | None]:
    """Read a Where as scores and the mask that replaces some of them."""
    condition = node.inputs[0]
    inner, filling = (node.inputs[1], node.inputs[2]) if keep else (node.inputs[2], node.inputs[1])
    fill = uniform(filling)
    if condition is None or fill is None or inner is None or filling is None or filling.shape is None:
        return None, None
    if any(d != 1 for d in filling.shape) and not same_shape(filling, inner):
        return None, None
    return inner, Select(condition, fill, keep)


def _probabilities(value: oir.Value | None) -> tuple[oir.Node, oir.Value | None, oir.DataType | None] | None:
    """Find the Softmax that ``value`` is, seen through casts and through a guard against rows of NaN.

    Returns it with its argument before the cast and with the type it computes in, if that is another.
    """
    guard = producer(value, "Where")
    test = producer(guard.inputs[0], "IsNaN") if guard is not None else None
    if guard is not None and test is not None and uniform(guard.inputs[1]) == 0.0:
        value = guard.inputs[2] if guard.inputs[2] is test.inputs[0] else None
    narrow = producer(value, "Cast")
    softmax = producer(narrow.inputs[0] if narrow is not None else value, "Softmax")
    if softmax is None or narrow is None:
        return (softmax, softmax.inputs[0], None) if softmax is not None else None
    widen = producer(softmax.inputs[0], "Cast")
    if widen is None or widen.inputs[0] is None or widen.inputs[0].dtype != narrow.outputs[0].dtype:
        return None
    return softmax, widen.inputs[0], softmax.outputs[0].dtype


@dataclass
class _Layout:
    """Builds the 4-D operands, and remembers the dims of what it built."""

    ops: Ops
    axes: oir.Value | None = field(default=None)

    def transposed(self, value: oir.Value, perm: Sequence[int]) -> oir.Value:
        """Return ``Transpose(value, perm)``, merged with a Transpose that made ``value``."""
        before = producer(value, "Transpose")
        source = before.inputs[0] if before is not None else None
        if before is not None and source is not None and source.shape is not None:
            inner = integers(before, "perm")
            perm, value = [inner[axis] for axis in perm], source
        if list(perm) == list(range(len(perm))):
            return value
        assert value.shape is not None and value.dtype is not None
        shape = oir.Shape([value.shape[axis] for axis in perm])
        return self.ops("Transpose", value, perm=list(perm), shape=shape, dtype=value.dtype)

    def with_heads(self, value: oir.Value) -> oir.Value:
        """Give a 3-D value a dimension of one head."""
        if rank(value) != 3:
            return value
        if self.axes is None:
            self.axes = self.ops.constant(np.array([1], np.int64), "axes")
        assert value.shape is not None and value.dtype is not None
        first, *rest = value.shape
        return self.ops("Unsqueeze", value, self.axes, shape=oir.Shape([first, 1, *rest]), dtype=value.dtype)


def _repeated(value: oir.Value) -> tuple[oir.Value, int] | None:
    """Return ``(source, times)`` if ``value`` repeats each head of ``source`` (Unsqueeze, Expand, Reshape)."""
    merge = producer(value, "Reshape")
    expand = producer(merge.inputs[0], "Expand") if merge is not None else None
    split = producer(expand.inputs[0], "Unsqueeze", "Reshape") if expand is not None else None
    source = split.inputs[0] if split is not None else None
    if expand is None or split is None or source is None or source.shape is None or value.shape is None:
        return None
    wide, narrow = expand.outputs[0].shape, split.outputs[0].shape
    if wide is None or narrow is None or (len(source.shape), len(narrow), len(wide), len(value.shape)) != (4, 5, 5, 4):
        return None
    batch, heads, sequence, size = source.shape
    times = wide[2]
    if not isinstance(times, int) or not isinstance(heads, int):
        return None
    expected = ((batch, heads, 1, sequence, size), (batch, heads, times, sequence, size))
    final = (batch, heads * times, sequence, size)
    pairs = ((narrow, expected[0]), (wide, expected[1]), (value.shape, final))
    return (source, times) if all(all(map(same_dim, a, b)) for a, b in pairs) else None


def _mismatch(q: oir.Value, k: oir.Value, v: oir.Value) -> str | None:
    """Say why the batch and head dimensions of 4-D operands are not those of Attention."""
    assert q.shape is not None and k.shape is not None and v.shape is not None
    if not same_dim(q.shape[0], k.shape[0]) or not same_dim(q.shape[0], v.shape[0]):
        return f"batch sizes {q.shape[0]}, {k.shape[0]} and {v.shape[0]} are not known to be equal"
    heads, shared = q.shape[1], k.shape[1]
    if not same_dim(shared, v.shape[1]):
        return f"keys have {shared} heads, values {v.shape[1]}"
    if same_dim(heads, shared):
        return None
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared == 0:
        return None
    return f"queries have {heads} heads, keys {shared}"


@rule("Softmax(s*q@k^T+mask)@v => Attention(q,k,v,mask)", "MatMul")
def attention(node: oir.Node, ops: Ops) -> Outcome:
    """Fuse attention over 4-D (or 3-D, one head) operands, with scale, masks and repeated heads."""
    probabilities, v = _probabilities(node.inputs[0]), node.inputs[1]
    if probabilities is None or v is None or not is_float(v):
        return None
    softmax, argument, precision = probabilities
    found = _scores(argument, 1.0, ())
    if found is None:
        return None
    if isinstance(found, Miss):
        return found
    *_, (q, q_scale) = scalings(found.q)
    *_, (kt, k_scale) = scalings(found.kt)
    if q.shape is None or kt.shape is None or v.shape is None:
        return Miss("the rank of queries, keys or values is not known")
    dims = len(q.shape)
    if dims not in (3, 4) or len(kt.shape) != dims or len(v.shape) != dims:
        return Miss(f"queries, keys and values have ranks {dims}, {len(kt.shape)} and {len(v.shape)}")
    if rank(softmax.outputs[0]) != dims:
        return Miss(f"a constant widens the scores to {softmax.outputs[0].shape}")
    if integer(softmax, "axis", -1) not in (-1, dims - 1):
        return Miss(f"the softmax runs over axis {integer(softmax, 'axis', -1)}, not over the keys")
    if q.dtype is None or q.dtype != kt.dtype or q.dtype != v.dtype:
        return Miss(f"the types of queries, keys and values differ: {q.dtype}, {kt.dtype}, {v.dtype}")
    leaves = [m.condition if isinstance(m, Select) else m for m in found.masks]
    if (reason := leak(node, found.q, found.kt, v, *leaves)) is not None:
        return Miss(reason)
    layout = _Layout(ops)
    *_, (k, more_scale) = scalings(layout.transposed(kt, [*range(dims - 2), dims - 1, dims - 2]))
    if rank(k) != dims:
        return Miss(f"the rank of the keys '{k.name}' is {rank(k)}")
    heads = _repeated(k), _repeated(v)
    if heads[0] is not None and heads[1] is not None and heads[0][1] == heads[1][1]:
        k, v = heads[0][0], heads[1][0]
    q, k, v = layout.with_heads(q), layout.with_heads(k), layout.with_heads(v)
    if (reason := _mismatch(q, k, v)) is not None:
        return Miss(reason)
    assert q.shape is not None and k.shape is not None and q.dtype is not None
    batch, sequence = ([q.shape[0]] if dims == 3 else [q.shape[0], q.shape[1]]), [q.shape[2], k.shape[2]]
    mask = combine(found.masks, [*batch, *sequence], k, ops)
    if isinstance(mask, Miss):
        return mask
    inputs = [q, k, v] if mask.value is None else [q, k, v, _mask_input(mask.value, layout, dims)]
    assert v.shape is not None
    computed_in: dict[str, Any] = {} if precision is None else {"softmax_precision": int(precision)}
    fused = ops(
        "Attention",
        *inputs,
        shape=oir.Shape([q.shape[0], q.shape[1], q.shape[2], v.shape[3]]),
        dtype=q.dtype,
        scale=found.scale * q_scale * k_scale * more_scale,
        is_causal=int(mask.causal),
        **computed_in,
    )
    return Rewrite([fused if dims == 4 else ops("Squeeze", fused, layout.axes)])


def _mask_input(mask: oir.Value, layout: _Layout, dims: int) -> oir.Value:
    """Give the mask a rank of at least two, and a head dimension where the operands got one."""
    if rank(mask) == 3 and dims == 3:
        return layout.with_heads(mask)
    if rank(mask) in (0, 1):
        assert mask.shape is not None and mask.dtype is not None
        target = layout.ops.constant(np.array([1, -1], np.int64), "shape")
        shape = oir.Shape([1, *(mask.shape or [1])])
        return layout.ops("Reshape", mask, target, shape=shape, dtype=mask.dtype)
    return mask


@rule("Reshape(Transpose(x,[0,2,1]),[..,D,S]) => Transpose(Reshape(x,[..,S,D]),[0,1,3,2])", "Reshape")
def transpose_after_split(node: oir.Node, ops: Ops) -> Outcome:
    """Swap the last dimensions after the split of the first one: K^T as PyTorch's exporter writes it."""
    swap = producer(node.inputs[0], "Transpose")
    x, out = swap.inputs[0] if swap is not None else None, node.outputs[0].shape
    if (
        swap is None
        or x is None
        or x.shape is None
        or out is None
        or len(out) != 4
        or integers(swap, "perm") != (0, 2, 1)
    ):
        return None
    if not same_dim(out[2], x.shape[2]) or not same_dim(out[3], x.shape[1]):
        return Miss(f"{x.shape}, swapped, is not split into {out} before its last two dimensions")
    if (reason := leak(node, x, node.inputs[1])) is not None:
        return Miss(reason)
    merge, dims = producer(x, "Reshape"), [out[0], out[1], out[3], out[2]]
    source = (merge.inputs[0] if merge is not None else None) or x
    before = list(source.shape) if source.shape is not None else []
    if len(before) == 4 and all(map(same_dim, before, dims)):
        return Rewrite([ops("Transpose", source, perm=[0, 1, 3, 2])])
    if sum(not isinstance(d, int) for d in dims) > 1:
        return Miss(f"{dims} has more than one symbolic dimension")
    target = np.array([d if isinstance(d, int) else -1 for d in dims], np.int64)
    shape = ops.constant(target, "shape")
    split = ops("Reshape", source, shape, allowzero=0, shape=oir.Shape(dims), dtype=x.dtype)
    return Rewrite([ops("Transpose", split, perm=[0, 1, 3, 2])])


def attention_pass() -> RewritePass:
    """Return the pass that recognises attention."""
    return RewritePass("fuse-attention", [transpose_after_split, attention])
