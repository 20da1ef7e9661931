"""Attention with a cache of keys and values in one buffer, and rotary embeddings, of com.microsoft.

A cache is a buffer into which TensorScatter writes the new positions; Attention of ONNX is told how much of it is
valid. What lies behind is left as it was, which the definitions leave open.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as oir

from optc.frontend.contrib_attention import heads_first, heads_last
from optc.frontend.contrib_node import ContribEdit
from optc.frontend.upgrade import AttributeValue, Refused


def rotary(edit: ContribEdit) -> None:
    """RotaryEmbedding => RotaryEmbedding, with a position for each row."""
    edit.refuse_attributes(is_packed_batching=0)
    if edit.real("scale", 1.0) != 1.0:
        raise Refused(f"scale={edit.real('scale', 1.0)} is not supported")
    x, positions, cosine = edit.input(0), edit.input(1), edit.input(2)
    rank, heads = len(edit.dims(x)), edit.integer("num_heads", 0)
    if rank == 3 and not heads:
        heads = edit.size(x, 2) // (2 * edit.size(cosine, 1))
    if len(edit.dims(positions)) == 1:
        # The position of the first row, the same for all of the batch.
        rows = edit.op("Add", edit.counted(edit.length(x, 1 if rank == 3 else 2)), positions)
        # Expand leaves alone what is 1 in the shape.
        shape = edit.op("Concat", edit.length(x, 0), edit.ints([1], "rest"), axis=0)
        positions = edit.op("Expand", rows, shape)
    kept = edit.kept("interleaved", "rotary_embedding_dim")
    if heads:
        kept["num_heads"] = heads
    edit.replace(edit.op("RotaryEmbedding", x, cosine, edit.input(3), positions, **kept))


def grouped_query(edit: ContribEdit) -> None:
    """GroupQueryAttention => RotaryEmbedding, TensorScatter into the cache, Attention over what is valid of it."""
    edit.refuse_inputs(head_sink=11, k_scale=12, v_scale=13)
    edit.refuse_attributes(smooth_softmax=0, qk_output=0, sliding_window_cache=0, kv_cache_bit_width=0)
    heads, key_heads = edit.integer("num_heads"), edit.integer("kv_num_heads")
    causal, window = edit.integer("causal", 1), edit.integer("local_window_size", -1)
    past = edit.optional(3), edit.optional(4)
    q, k, v = _heads(edit, heads, key_heads)
    lengths = edit.op("Reshape", _int64(edit, edit.input(5)), edit.ints([-1], "shape"))
    totals = edit.op("Add", lengths, edit.ints([1], "one"))
    total = edit.op("Reshape", _int64(edit, edit.input(6)), edit.ints([1], "shape"))
    steps = edit.length(q, 2)
    # The first rows are a prompt, which may be shorter than they are.
    first = edit.op("Sub", totals, steps)
    first = edit.op("Where", edit.op("Equal", steps, total), edit.ints([0], "zero"), first)
    if edit.optional(14) is not None and edit.optional(15) is not None:
        epsilon = edit.real("qk_norm_epsilon", 1e-6)
        q, k = (edit.op("RMSNormalization", x, edit.input(i), axis=-1, epsilon=epsilon) for x, i in ((q, 14), (k, 15)))
    if edit.integer("do_rotary", 0):
        places = edit.optional(9) or _places(edit, first, steps)
        inputs = [edit.input(7), edit.input(8), places]
        kept: dict[str, AttributeValue] = {"interleaved": edit.integer("rotary_interleaved", 0)}
        width = 2 * edit.size(edit.input(7), 1)
        q, k = (edit.op("RotaryEmbedding", x, *inputs, rotary_embedding_dim=width, **kept) for x in (q, k))
    if past[0] is not None and past[1] is not None:
        k, v = (_written(edit, old, new, first, total) for old, new in ((past[0], k), (past[1], v)))
    attributes: dict[str, AttributeValue] = {"is_causal": causal, "softcap": edit.real("softcap", 0.0)}
    if (scale := edit.real("scale", 0.0)) != 0.0:
        attributes["scale"] = scale
    if window > 0:
        # The window holds the position itself, too.
        attributes["left_window_size"] = window - 1
    valid = edit.op("Add", first, steps) if causal else totals
    y = edit.op("Attention", q, k, v, edit.optional(10), None, None, valid, **attributes)
    edit.finish(heads_last(edit, y), *(edit.op("Identity", x) for x in (k, v)))


def _heads(edit: ContribEdit, heads: int, key_heads: int) -> list[oir.Value]:
    """Return queries, keys and values as ``[batch, heads, position, size]``; they may come in one tensor."""
    counts, key, value = (heads, key_heads, key_heads), edit.optional(1), edit.optional(2)
    if key is not None and value is not None:
        tensors = (edit.input(0), key, value)
        return [heads_first(edit, x, count) for x, count in zip(tensors, counts, strict=True)]
    whole = heads_first(edit, edit.input(0), sum(counts))
    return list(edit.insert("Split", [whole, edit.ints(counts, "sizes")], 3, {"axis": 1}))


def _int64(edit: ContribEdit, x: oir.Value) -> oir.Value:
    return edit.op("Cast", x, to=oir.DataType.INT64.value)


def _places(edit: ContribEdit, first: oir.Value, steps: oir.Value) -> oir.Value:
    """Return the position of each row, ``[batch, rows]``."""
    column = edit.op("Unsqueeze", first, edit.ints([1], "axes"))
    return edit.op("Add", column, edit.counted(steps))


def _written(edit: ContribEdit, old: oir.Value, new: oir.Value, first: oir.Value, total: oir.Value) -> oir.Value:
    """Return a cache with new positions in it, ``first`` by sequence; it grows to ``total`` where it is smaller."""
    more = edit.op("Max", edit.op("Sub", total, edit.length(old, 2)), edit.ints([0], "zero"))
    shape = edit.op("Concat", edit.op("Shape", new, start=0, end=2), more, edit.length(new, 3), axis=0)
    room = edit.op("Expand", edit.scalar_like(0.0, new, "zero"), shape)
    return edit.op("TensorScatter", edit.op("Concat", old, room, axis=2), new, first, axis=2)


OPERATORS: dict[str, Callable[[ContribEdit], None]] = {
    "GroupQueryAttention": grouped_query,
    "RotaryEmbedding": rotary,
}
"""How each operator is expanded, by its name."""
