"""Operators of torch that its ONNX exporter lacks or takes in part, in operators of ONNX.

The functions are traced by onnxscript; their signatures are those of the operators in torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from onnx_ir import DataType


def translations(torch: Any) -> dict[Any, Callable[..., Any]]:
    """Return what ``torch.onnx.export`` takes as ``custom_translation_table``."""
    from onnxscript import opset18 as op  # what torch exports in

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    def median(self: Any, dim: int, keepdim: bool = False) -> Any:
        # The lower one of two in the middle.
        size = op.Gather(op.Shape(self), ints(dim))
        half = op.Div(op.Add(size, ints(1)), ints(2))
        values, places = op.TopK(self, half, axis=dim, largest=0)
        last = op.Sub(half, ints(1))
        value, place = (op.Gather(x, last, axis=dim) for x in (values, places))
        if keepdim:
            return value, place
        return op.Squeeze(value, ints(dim)), op.Squeeze(place, ints(dim))

    def product(inp: Any, dims: Sequence[int], output_dtype: int | None = None) -> Any:
        # What cumprod decomposes into; it comes without another type.
        assert output_dtype is None
        return op.ReduceProd(inp, ints(*dims), keepdims=0)

    # The exporter's own make sequences, which no rule looks through.
    def split(self: Any, split_size: Any, dim: int = 0) -> Any:
        size = self.shape[dim]
        if not isinstance(size, int) or not isinstance(split_size, int):
            return op.SplitToSequence(self, split_size, axis=dim)
        whole, rest = divmod(size, split_size)
        return parts(self, [split_size] * whole + [rest] * (rest > 0), dim)

    def split_with_sizes(self: Any, split_sizes: Any, dim: int = 0) -> Any:
        if not all(isinstance(size, int) for size in split_sizes):
            return op.SplitToSequence(self, split_sizes, axis=dim)
        return parts(self, split_sizes, dim)

    def parts(x: Any, sizes: Sequence[int], dim: int) -> Any:
        if len(sizes) <= 1:  # torch splits nothing into one part
            return [op.Identity(x)]
        if len(set(sizes)) == 1 and isinstance(x.shape[dim], int):
            return op.Split(x, axis=dim, num_outputs=len(sizes))
        ends = list(itertools.accumulate(sizes))
        return [op.Slice(x, ints(end - size), ints(end), ints(dim)) for size, end in zip(sizes, ends, strict=True)]

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        # The exporter's own takes four axes and no others, and makes a mean or NaN of rows without a key: torch, zero.
        # Dropout is left out: what is captured is for inference.
        rank = len(query.shape)
        heads, shared = (query.shape[-3], key.shape[-3]) if enable_gqa else (1, 1)
        if heads != shared:
            key, value = (repeat_heads(x, rank, heads, shared) for x in (key, value))
        boolean = attn_mask is not None and attn_mask.dtype == DataType.BOOL
        lead = query.shape[:-2]
        if rank <= 4 or not (heads == shared and lead == key.shape[:-2] == value.shape[:-2]):
            return composed(query, key, value, rank, attn_mask, boolean, is_causal, scale)
        # As one of four, which is a single kernel.
        outer = op.Shape(query, start=0, end=rank - 2)
        if attn_mask is not None and len(attn_mask.shape) > 3:
            attn_mask = join(op.Expand(attn_mask, op.Concat(outer, ints(1, 1), axis=0)), rank)
        joined = [join(x, rank) for x in (query, key, value)]
        found = composed(joined[0], joined[1], joined[2], 4, attn_mask, boolean, is_causal, scale)
        inner = (op.Shape(query, start=rank - 2, end=rank - 1), op.Shape(value, start=rank - 1))
        return op.Reshape(found, op.Concat(outer, *inner, axis=0))

    def repeat_heads(x: Any, rank: int, heads: int, shared: int) -> Any:
        before, after = op.Shape(x, start=0, end=rank - 3), op.Shape(x, start=rank - 2)
        wide = op.Concat(before, ints(shared, heads // shared), after, axis=0)
        repeated = op.Expand(op.Unsqueeze(x, ints(rank - 2)), wide)
        return op.Reshape(repeated, op.Concat(before, ints(heads), after, axis=0))

    def join(x: Any, rank: int) -> Any:
        return op.Reshape(x, op.Concat(ints(-1), op.Shape(x, start=rank - 3), axis=0))

    def composed(
        query: Any, key: Any, value: Any, rank: int, mask: Any, boolean: bool, is_causal: bool, scale: float | None
    ) -> Any:
        if scale is None:
            factor = op.Reciprocal(op.Sqrt(op.CastLike(op.Shape(query, start=rank - 1), query)))
        else:
            factor = op.CastLike(op.Constant(value_float=scale), query)
        scores = op.MatMul(op.Mul(query, factor), op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2]))
        zero, never = (op.CastLike(op.Constant(value_float=x), query) for x in (0.0, -math.inf))
        if is_causal:
            sizes = (op.Shape(x, start=rank - 2, end=rank - 1) for x in (query, key))
            ones = op.Expand(op.Constant(value_int=1), op.Concat(*sizes, axis=0))
            mask = op.Cast(op.Trilu(ones, upper=0), to=DataType.BOOL)
        if is_causal or boolean:
            scores = op.Where(mask, scores, never)
        elif mask is not None:
            scores = op.Add(scores, mask)
        shares = op.Softmax(scores, axis=-1)
        if mask is not None and not is_causal:
            shares = op.Where(op.IsNaN(shares), zero, shares)
        return op.MatMul(shares, value)

    def grouped_product(input: Any, weight: Any, offs: Any) -> Any:
        # Rows up to the first end are multiplied with the first matrix, those up to the second with the second: the
        # experts of a mixture. Rows behind the last end are zero.
        ends, start, found = op.Cast(offs, to=DataType.INT64), ints(0), []
        for expert in range(weight.shape[0]):
            end = op.Slice(ends, ints(expert), ints(expert + 1), ints(0))
            matrix = op.Gather(weight, op.Constant(value_int=expert), axis=0)
            found.append(op.MatMul(op.Slice(input, start, end, ints(0)), matrix))
            start = end
        rows, columns = op.Shape(input, start=0, end=1), op.Shape(weight, start=2)
        zero = op.CastLike(op.Constant(value_float=0.0), input)
        found.append(op.Expand(zero, op.Concat(op.Sub(rows, start), columns, axis=0)))
        return op.Reshape(op.Concat(*found, axis=0), op.Concat(rows, columns, axis=0))

    def grouped_mm(self: Any, mat2: Any, offs: Any = None, bias: Any = None, out_dtype: int | None = None) -> Any:
        plain = offs is not None and bias is None and out_dtype is None
        if not plain or (len(self.shape), len(mat2.shape)) != (2, 3):
            raise NotImplementedError("grouped products of other than one matrix with a stack of matrices")
        return grouped_product(self, mat2, offs)

    def all_true(self: Any) -> Any:
        return op.Cast(op.ReduceMin(op.Cast(self, to=DataType.INT64), keepdims=0), to=DataType.BOOL)

    def running(beyond: Callable[[Any, Any], Any]) -> Callable[[Any, int], Any]:
        """Values and places of the running extreme along an axis, the last of equals, in steps of 1, 2, 4, ..."""

        def extreme(self: Any, dim: int) -> Any:
            rank = len(self.shape)
            size = self.shape[dim] if rank else 1
            if not isinstance(size, int):
                raise NotImplementedError("running extremes along an axis of no fixed size")
            axes = ints(dim)
            ones = [1] * rank
            if rank:
                ones[dim] = size
            places = op.Reshape(op.Constant(value_ints=list(range(size))), ints(*ones))
            values, places = op.Identity(self), op.Expand(places, op.Shape(self))
            step = 1
            while step < size:
                later, earlier = (ints(step), ints(size)), (ints(0), ints(size - step))
                head = (ints(0), ints(step))
                new, old, place, before = (
                    op.Slice(x, *part, axes) for x in (values, places) for part in (later, earlier)
                )
                better = beyond(old, new)
                values, places = (
                    op.Concat(op.Slice(x, *head, axes), op.Where(better, b, a), axis=dim)
                    for x, a, b in ((values, new, old), (places, place, before))
                )
                step *= 2
            return values, places

        return extreme

    table: dict[Any, Callable[..., Any]] = {
        torch.ops.aten.split.Tensor: split,
        torch.ops.aten.split_with_sizes.default: split_with_sizes,
        torch.ops.aten._is_all_true.default: all_true,
        torch.ops.aten.cummax.default: running(op.Greater),
        torch.ops.aten.cummin.default: running(op.Less),
        torch.ops.aten.median.dim: median,
        torch.ops.prims.prod.default: product,
        torch.ops.aten.scaled_dot_product_attention.default: attention,
        torch.ops.aten._grouped_mm.default: grouped_mm,
    }
    # Transformers' own, there once its library is imported.
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        table[torch.ops.transformers.grouped_mm_fallback.default] = grouped_product
    return table
