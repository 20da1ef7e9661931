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
PANEL_DEPTH = 1024
"""Depths of a column tile that are widened together: as int16 they fill the first-level cache."""

Read = Any
"""A function of an index that returns an int32 expression."""


def split_depth(depth: int) -> tuple[int, int]:
    """Return into how many chunks a run of ``depth`` is split, and the length of each, padding included."""
    chunks = max(1, -(-depth // PANEL_DEPTH))
    return chunks, max(1, -(-depth // (chunks * DEPTH_BLOCK))) * DEPTH_BLOCK


def pack_columns(matrix: np.ndarray) -> np.ndarray:
    """Pack integers ``[K, N]`` or ``[T, K, N]`` into ``[ceil(N/16), T * K'/2, 16, 2]``, zero-padded.

    ``K'`` is what ``split_depth`` makes of K. The result is int8 if that holds all values, else int16. Raises
    OverflowError for values beyond int16.
    """
    runs = matrix.reshape(-1, *matrix.shape[-2:])
    taps, k, n = runs.shape
    chunks, chunk = split_depth(k)
    blocks = -(-n // COLUMN_BLOCK)
    padded = np.zeros((taps, chunks * chunk, blocks * COLUMN_BLOCK), _narrowest(matrix))
    padded[:, :k, :n] = runs
    split = padded.reshape(taps * chunks * chunk // PAIR, PAIR, blocks, COLUMN_BLOCK)
    return np.ascontiguousarray(split.transpose(2, 0, 3, 1))


def _narrowest(values: np.ndarray) -> type[np.int8] | type[np.int16]:
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    if low >= -128 and high <= 127:
        return np.int8
    if low >= -32768 and high <= 32767:
        return np.int16
    raise OverflowError(f"weights from {low} to {high} do not fit 16 bits")


def annotate(rows: Sequence[int], packed: bool, **more: Sequence[int]) -> dict[str, Any]:
    """Return the block annotations: ``rows`` are positions of spatial axes; the last axis is the columns."""
    notes = {f"optc.{name}": list(values) for name, values in more.items()}
    return {"optc.template": TEMPLATE, "optc.rows": list(rows), "optc.packed": int(packed), **notes}


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
