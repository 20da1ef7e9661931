"""Products of 8-bit integers, exact in int32: computes and weight packing.

A product is one reduction block ``acc += (row - row_zero) * column``, annotated for ``integer_schedule.py``. Without
that schedule the block is ordinary TE. Constant columns have their zero point subtracted while compiling and are
packed as ``[N/16, K/2, 16, 2]``: the two factors that one multiply-add instruction takes lie next to each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import te

from optc.backends.kernels.contraction import COLUMN_BLOCK, broadcast

TEMPLATE = "integer_contraction"
DEPTH_BLOCK = 4
"""Depths packed together at most: four bytes for one lane of a dot product instruction."""
PAIR = 2

Read = Any
"""A function of an index that returns an int32 expression."""


def pack_columns(matrix: np.ndarray) -> np.ndarray:
    """Pack integers ``[K, N]`` into ``[ceil(N/16), ceil(K/4)*2, 16, 2]``, zero-padded: int8 if they fit, else int16.

    Raises OverflowError for values beyond int16.
    """
    k, n = matrix.shape
    dtype = _narrowest(matrix)
    depth = -(-k // DEPTH_BLOCK) * DEPTH_BLOCK
    blocks = -(-n // COLUMN_BLOCK)
    padded = np.zeros((depth, blocks * COLUMN_BLOCK), dtype)
    padded[:k, :n] = matrix
    split = padded.reshape(depth // PAIR, PAIR, blocks, COLUMN_BLOCK)
    return np.ascontiguousarray(split.transpose(2, 0, 3, 1))


def _narrowest(values: np.ndarray) -> type[np.int8] | type[np.int16]:
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    if low >= -128 and high <= 127:
        return np.int8
    if low >= -32768 and high <= 32767:
        return np.int16
    raise OverflowError(f"weights from {low} to {high} do not fit 16 bits")


def annotate(rows: Sequence[int], packed: bool) -> dict[str, Any]:
    """Return the block annotations: ``rows`` are positions of spatial axes; the last axis is the columns."""
    return {"optc.template": TEMPLATE, "optc.rows": list(rows), "optc.packed": int(packed)}


def packed_matmul(shape: Sequence[Any], row: Read, packed: Any, n: int) -> Any:
    """``row [..., M, K]`` (of ``shape``) times columns packed by ``pack_columns``: ``[..., M, N]`` in int32."""
    k = te.reduce_axis((0, shape[-1]), "k")

    def element(*index: Any) -> Any:
        *rows, j = index
        column = packed(j // COLUMN_BLOCK, k // PAIR, j % COLUMN_BLOCK, k % PAIR)
        return te.sum(row(*rows, k) * column.astype("int32"), axis=k)

    return te.compute((*shape[:-1], n), element, "product", attrs=annotate(range(len(shape) - 1), packed=True))


def matmul(a: Any, b: Any, row: Read, column: Read, batch: Sequence[Any]) -> Any:
    """``a [..., M, K]`` times ``b [..., K, N]`` with broadcast leading axes ``batch``, in int32.

    ``row`` and ``column`` read them at an index as int32, their zero points subtracted.
    """
    k = te.reduce_axis((0, a.shape[-1]), "k")

    def element(*index: Any) -> Any:
        *outer, i, j = index
        left, right = row(*broadcast(a, outer, batch), i, k), column(*broadcast(b, outer, batch), k, j)
        return te.sum(left * right, axis=k)

    attributes = annotate([len(batch)], packed=False)
    return te.compute((*batch, a.shape[-2], b.shape[-1]), element, "product", attrs=attributes)
