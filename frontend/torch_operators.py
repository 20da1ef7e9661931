"""Operators of torch that its ONNX exporter lacks, in operators of ONNX.

The functions are traced by onnxscript; their signatures are those of the operators in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def translations(torch: Any) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what ``torch.onnx.export`` takes as ``custom_translation_table``."""
    from onnxscript import opset18 as op  # what torch exports in

    def median(self: Any, dim: int, keepdim: bool = False) -> Any:
        # The lower one of two in the middle.
        size = op.Gather(op.Shape(self), op.Constant(value_ints=[dim]))
        half = op.Div(op.Add(size, op.Constant(value_ints=[1])), op.Constant(value_ints=[2]))
        values, places = op.TopK(self, half, axis=dim, largest=0)
        last = op.Sub(half, op.Constant(value_ints=[1]))
        value, place = (op.Gather(x, last, axis=dim) for x in (values, places))
        if keepdim:
            return value, place
        axes = op.Constant(value_ints=[dim])
        return op.Squeeze(value, axes), op.Squeeze(place, axes)

    def product(inp: Any, dims: Sequence[int], output_dtype: int | None = None) -> Any:
        # What cumprod decomposes into; it comes without another type.
        assert output_dtype is None
        return op.ReduceProd(inp, op.Constant(value_ints=list(dims)), keepdims=0)

    return {torch.ops.aten.median.dim: median, torch.ops.prims.prod.default: product}
