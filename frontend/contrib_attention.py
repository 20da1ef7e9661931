"""Attention, MultiHeadAttention and QAttention of com.microsoft become Attention of ONNX.

Masks of numbers become what is added to the scores: 0 where a key counts, ``mask_filter_value`` (-10000) where not, so
that a row in which no key counts sees all of them, as in onnxruntime. Causal attention has no later keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as oir

from optc.frontend.contrib_node import ContribEdit
from optc.frontend.contrib_quantized import scaled_product
from optc.frontend.upgrade import AttributeValue, Refused

_FILTER = -10000.0


def attention(edit: ContribEdit) -> None:
    """Attention => Attention(input @ weights + bias, mask, past)."""
    edit.refuse_attributes(do_rotary=0, past_present_share_buffer=0)
    edit.refuse_inputs(past_sequence_length=6)
    heads, sizes = edit.integer("num_heads"), _hidden_sizes(edit, 1)
    mask = _Mask(edit, 3, edit.optional(5))
    x, bias = edit.input(0), edit.optional(2)
    weights = edit.split(edit.input(1), sizes, 1)
    biases = edit.split(bias, sizes, 0) if bias is not None else [None] * 3
    pieces = [edit.plus(edit.op("MatMul", x, w), b) for w, b in zip(weights, biases, strict=True)]
    _with_cache(edit, pieces, heads, mask, edit.optional(4))


def quantized_attention(edit: ContribEdit) -> None:
    """QAttention => Attention(MatMulInteger(input, weight) * scales + bias, mask, past)."""
    edit.refuse_attributes(do_rotary=0, past_present_share_buffer=0)
    heads, sizes = edit.integer("num_heads"), _hidden_sizes(edit, 1)
    mask = _Mask(edit, 5)
    columns = edit.split(edit.input(1), sizes, 1)
    biases = edit.split(edit.input(2), sizes, 0)
    scales, zeros = (_by_column(edit, index, sizes) for index in (4, 7))
    pieces = []
    for weight, bias, scale, zero in zip(columns, biases, scales, zeros, strict=True):
        factor = edit.op("Mul", edit.input(3), scale)
        pieces.append(scaled_product(edit, [edit.input(0), weight, edit.optional(6), zero], factor, bias))
    _with_cache(edit, pieces, heads, mask, edit.optional(8))


def _by_column(edit: ContribEdit, index: int, sizes: Sequence[int]) -> Sequence[oir.Value | None]:
    """Return a parameter of the weights for the columns of queries, keys and values: split if there is one for each."""
    value = edit.optional(index)
    if value is None or all(size == 1 for size in edit.dims(value)):
        return [value] * 3
    return edit.split(value, sizes, 0)


def _hidden_sizes(edit: ContribEdit, weights: int) -> list[int]:
    given = edit.node.attributes.get("qkv_hidden_sizes")
    if given is not None:
        return list(given.as_ints())
    return [edit.size(edit.input(weights), 1) // 3] * 3


def _with_cache(
    edit: ContribEdit, pieces: Sequence[oir.Value], heads: int, mask: _Mask, past: oir.Value | None
) -> None:
    """Finish with attention over ``pieces``; ``past`` and the second output hold keys and values in one tensor."""
    first = edit.ints([0], "axes")
    caches = None
    if past is not None:
        halves = edit.insert("Split", [past], 2, {"axis": 0, "num_outputs": 2})
        caches = edit.op("Squeeze", halves[0], first), edit.op("Squeeze", halves[1], first)
    y, key, value, _ = attend(edit, pieces, heads, mask, past=caches, present=edit.wants(1))
    both = [edit.op("Unsqueeze", x, first) for x in (key, value) if x is not None]
    edit.finish(y, edit.op("Concat", *both, axis=0) if both else None)


def multi_head(edit: ContribEdit) -> None:
    """MultiHeadAttention => Attention(query + bias, key + bias, value + bias, mask, past)."""
    edit.refuse_inputs(past_sequence_length=8, cache_indirection=9)
    heads = edit.integer("num_heads")
    query, key, value, bias = edit.input(0), edit.optional(1), edit.optional(2), edit.optional(3)
    masks = _Mask(edit, 4, edit.optional(5), keys=key)
    past = edit.optional(6), edit.optional(7)
    caches = (past[0], past[1]) if past[0] is not None and past[1] is not None else None
    if edit.wants(3) and (masks.given or edit.integer("unidirectional", 0)):
        raise Refused("scores as an output, with a mask, are not supported")
    rank = 3 if bias is not None and key is not None else len(edit.dims(query if key is None else key))
    causal = key is not None and edit.integer("unidirectional", 0)
    if causal and edit.dims(query)[1] != edit.dims(key)[2 if rank == 4 else 1]:
        raise Refused("unidirectional attention to keys that are not as many as queries is not supported")
    sizes = _bias_sizes(edit, query, bias, heads, rank) if bias is not None else []
    if key is None and rank == 5:
        pieces = [_merged(edit, x) for x in edit.insert("Split", [query], 3, {"axis": 3, "num_outputs": 3})]
    elif key is not None and value is None and rank == 5:
        pieces = [query, *(_merged(edit, x) for x in edit.insert("Split", [key], 2, {"axis": 3, "num_outputs": 2}))]
    elif key is not None and value is not None and rank in (3, 4):
        pieces = [query, key, value]
    else:
        raise Refused("this form of query, key and value is not supported")
    if bias is not None:
        if rank == 4:
            raise Refused("a bias for keys of rank 4 is not supported")
        parts = edit.split(bias, sizes, 0)
        pieces = [edit.plus(x, part) for x, part in zip(pieces, parts, strict=True)]
    if rank == 4:
        pieces[0] = heads_first(edit, pieces[0], heads)
    present = edit.wants(1) or edit.wants(2)
    edit.finish(*attend(edit, pieces, heads, masks, past=caches, packed=rank != 4, present=present))


def _bias_sizes(edit: ContribEdit, query: oir.Value, bias: oir.Value, heads: int, rank: int) -> list[int]:
    total = edit.size(bias, 0)
    hidden = edit.size(query, 2) if rank != 5 else heads * edit.size(query, 4)
    return [hidden, hidden, total - 2 * hidden]


def _merged(edit: ContribEdit, x: oir.Value) -> oir.Value:
    """Return ``[batch, position, heads, 1, size]`` as ``[batch, position, heads * size]``."""
    return edit.op("Reshape", x, edit.ints([0, 0, -1], "shape"))


def heads_first(edit: ContribEdit, x: oir.Value, heads: int) -> oir.Value:
    """Return ``[batch, position, heads * size]`` as ``[batch, heads, position, size]``."""
    split = edit.op("Reshape", x, edit.ints([0, 0, heads, -1], "shape"))
    return edit.op("Transpose", split, perm=[0, 2, 1, 3])


def heads_last(edit: ContribEdit, x: oir.Value) -> oir.Value:
    """Return ``[batch, heads, position, size]`` as ``[batch, position, heads * size]``."""
    return _merged(edit, edit.op("Transpose", x, perm=[0, 2, 1, 3]))


class _Mask:
    """What is added to the scores: a mask of numbers (input ``index``), a bias, both or nothing.

    ``keys`` is what the keys are made of, None if they are made of input 0. What has to be known of shapes is looked
    up at once, nodes are made when the mask is asked for.
    """

    def __init__(
        self, edit: ContribEdit, index: int, bias: oir.Value | None = None, keys: oir.Value | None = None
    ) -> None:
        self._edit, self._bias, self._keys = edit, bias, keys if keys is not None else edit.input(0)
        self._mask, self._rank, self._ends = edit.optional(index), 0, 1
        if self._mask is None:
            return
        edit.settled(edit.input(0) if bias is None else bias)
        dims = edit.dims(self._mask)
        self._rank = len(dims)
        if self._rank == 2 and dims[1] == 1:
            # The same for every key: no mask.
            self._mask = None
        elif self._rank == 1:
            batch = edit.dims(edit.input(0))[0]
            if isinstance(batch, int) and dims[0] == 2 * batch:
                self._ends = 2
            elif dims[0] != batch:
                raise Refused(f"a mask of shape {dims} for a batch of {batch} is not supported")
        elif self._rank not in (2, 3):
            raise Refused(f"a mask of {self._rank} dimensions is not supported")

    @property
    def given(self) -> bool:
        """Tell whether anything is added."""
        return self._mask is not None or self._bias is not None

    def added(self, past: oir.Value | None, key_axis: int) -> oir.Value | None:
        """Return what is added, ``[batch, heads or 1, queries or 1, keys]``; ``past`` are cached keys."""
        edit, mask = self._edit, self._mask
        if mask is None:
            return self._bias
        if self._rank == 1:
            kept = self._between(mask, past, key_axis)
        else:
            kept = edit.op("Greater", mask, edit.scalar(0, mask))
        axes = edit.ints([1, 2] if self._rank < 3 else [1], "axes")
        like = self._bias if self._bias is not None else edit.input(0)
        filling = edit.real("mask_filter_value", _FILTER)
        dtype = oir.DataType.FLOAT if edit.settled(like).is_integer() else edit.settled(like)
        zero, low = (edit.constant(np.array(number, dtype.numpy()), "scalar") for number in (0.0, filling))
        return edit.plus(edit.op("Where", edit.op("Unsqueeze", kept, axes), zero, low), self._bias)

    def _between(self, mask: oir.Value, past: oir.Value | None, key_axis: int) -> oir.Value:
        """Return which keys lie before the end of each sequence, and from its start on where that is given."""
        edit = self._edit
        length = edit.length(self._keys, key_axis)
        if past is not None:
            length = edit.plus(length, edit.length(past, 2))
        places = edit.counted(length)
        ends = edit.op("Cast", mask, to=oir.DataType.INT64.value)
        axes = edit.ints([1], "axes")
        if self._ends == 1:
            return edit.op("Less", places, edit.op("Unsqueeze", ends, axes))
        end, start = edit.insert("Split", [ends], 2, {"axis": 0, "num_outputs": 2})
        before = edit.op("Less", places, edit.op("Unsqueeze", end, axes))
        return edit.op("And", before, edit.op("GreaterOrEqual", places, edit.op("Unsqueeze", start, axes)))


def attend(
    edit: ContribEdit,
    pieces: Sequence[oir.Value],
    heads: int,
    mask: _Mask,
    *,
    past: tuple[oir.Value, oir.Value] | None,
    present: bool,
    packed: bool = True,
) -> list[oir.Value | None]:
    """Insert Attention over ``pieces``: queries, and keys and values with heads side by side if ``packed``.

    Return its result with heads side by side, keys and values together with the cached ones if ``present``, and the
    scores that a node without mask may be asked for.
    """
    added = mask.added(past[0] if past is not None else None, 1 if packed else 2)
    attributes: dict[str, AttributeValue] = {"is_causal": edit.integer("unidirectional", 0)}
    if packed:
        attributes |= {"q_num_heads": heads, "kv_num_heads": heads}
    if (scale := edit.real("scale", 0.0)) != 0.0:
        attributes["scale"] = scale
    inputs: list[oir.Value | None] = [*pieces, added, *(past or ())]
    while inputs[-1] is None:
        inputs.pop()
    count = 4 if edit.wants(3) else 3 if past is not None and present else 1
    y, *rest = edit.insert("Attention", inputs, count, attributes)
    scores = rest.pop() if count == 4 else None
    if past is None:
        # Without a cache, Attention of ONNX has none to return.
        rest = [heads_first(edit, x, heads) if packed else edit.op("Identity", x) for x in pieces[1:] if present]
    return [y if packed else heads_last(edit, y), *(rest if present else (None, None)), scores]


OPERATORS: dict[str, Callable[[ContribEdit], None]] = {
    "Attention": attention,
    "MultiHeadAttention": multi_head,
    "QAttention": quantized_attention,
}
"""How each operator is expanded, by its name."""
