"""Contractions (matrix products and everything that is one): computes and weight packing.

A contraction is one reduction block ``acc[batch..., rows..., columns...] += row_operand * column_operand``, annotated
with what its axes are, so that the schedule (``contraction_schedule.py``) needs no pattern matching. The row
operand does not depend on the columns and the other way round. Without the schedule the block is ordinary TE.
Element-wise stages that follow (bias, cast, whatever fusion adds) run on the register tile.

Constant columns are packed while compiling, into panels ``[N/width, K, width]``, zero-padded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tvm import te, tirx

from optc.backends.kernels import vector_math

TEMPLATE = "contraction"
FUSIBLE = {"op_pattern": 4}
"""Kernel attribute: element-wise consumers may be fused behind this kernel (``kOutEWiseFusable``)."""


def accumulator(dtype: str) -> str:
    """Return the type that products of ``dtype`` are summed in: float32 for halves, else the type itself."""
    return "float32" if dtype in ("float16", "bfloat16") else dtype


def annotate(rows: Sequence[int], columns: Sequence[int], *, packed: bool = False) -> dict[str, Any]:
    """Return the block annotations of a contraction.

    ``rows`` and ``columns`` are positions of spatial axes, each a run of neighbours; the other axes are batch.
    ``packed`` tells that the column operand comes from ``pack_columns``.
    """
    return {
        "optc.template": TEMPLATE,
        "optc.rows": list(rows),
        "optc.columns": list(columns),
        "optc.packed": int(packed),
    }


def pack_columns(weights: np.ndarray, width: int) -> np.ndarray:
    """Pack ``[K..., N]`` into ``[ceil(N/width), K..., width]``, zero-padded."""
    *reduced, n = weights.shape
    blocks = -(-n // width)
    padded = np.zeros((*reduced, blocks * width), weights.dtype)
    padded[..., :n] = weights
    return np.ascontiguousarray(np.moveaxis(padded.reshape(*reduced, blocks, width), -2, 0))


def widen(value: Any, dtype: str) -> Any:
    """Return ``value`` converted to ``dtype`` where it is not that already."""
    return vector_math.convert(value, dtype)


def narrow(tensor: Any, dtype: str) -> Any:
    """Return a stage that converts ``tensor`` to ``dtype``; the tensor itself if it is that already."""
    if str(tensor.dtype) == dtype:
        return tensor
    return te.compute(tensor.shape, lambda *i: vector_math.convert(tensor(*i), dtype), "narrow")


def packed_matmul(a: Any, packed: Any, n: int, notes: Mapping[str, Any] | None = None) -> Any:
    """``a [..., M, K]`` times a matrix packed by ``pack_columns``: ``[..., M, N]`` in the accumulator's type.

    ``notes`` are more annotations of the block.
    """
    dtype = accumulator(str(a.dtype))
    k = te.reduce_axis((0, a.shape[-1]), "k")
    rank, width = len(a.shape), packed.shape[-1]

    def element(*index: Any) -> Any:
        *rows, j = index
        column = packed(j // width, k, j % width)
        return te.sum(widen(a(*rows, k), dtype) * widen(column, dtype), axis=k)

    attributes = annotate(range(rank - 1), [rank - 1], packed=True) | dict(notes or {})
    return te.compute((*a.shape[:-1], n), element, "matmul", attrs=attributes)


def matmul(a: Any, b: Any, batch: Sequence[Any], *, transpose_a: bool = False, transpose_b: bool = False) -> Any:
    """``a [..., M, K]`` times ``b [..., K, N]`` with broadcast leading axes ``batch``, in the accumulator's type.

    A transposed operand is given as ``[..., K, M]`` or ``[..., N, K]``.
    """
    dtype = accumulator(str(a.dtype))
    m, depth = (a.shape[-1], a.shape[-2]) if transpose_a else (a.shape[-2], a.shape[-1])
    n = b.shape[-2] if transpose_b else b.shape[-1]
    k = te.reduce_axis((0, depth), "k")

    def element(*index: Any) -> Any:
        *outer, i, j = index
        left = a(*broadcast(a, outer, batch), *((k, i) if transpose_a else (i, k)))
        right = b(*broadcast(b, outer, batch), *((j, k) if transpose_b else (k, j)))
        return te.sum(widen(left, dtype) * widen(right, dtype), axis=k)

    r = len(batch)
    return te.compute((*batch, m, n), element, "matmul", attrs=annotate([r], [r + 1]))


def broadcast(tensor: Any, outer: Sequence[Any], batch: Sequence[Any]) -> list[Any]:
    """Return the leading indices of ``tensor`` at ``outer``: 0 where its extent is 1, from the right."""
    leading = len(tensor.shape) - 2
    skip = len(batch) - leading
    index = []
    for extent, full, i in zip(tensor.shape[:leading], batch[skip:], list(outer)[skip:], strict=True):
        if isinstance(extent, tirx.IntImm):
            index.append(tirx.IntImm("int64", 0) if int(extent) == 1 else i)
        else:
            # A symbolic extent that is not the result's is 1 or equal to it.
            same = not isinstance(full, int) and extent.same_as(full)
            index.append(i if same else tirx.min(i, extent - 1))
    return index
