"""Products of 8-bit integers, exact in int32: computes and weight packing.

A product is one reduction block ``acc += (row - row_zero) * column``, annotated for ``integer_schedule.py``. Without
that schedule the block is ordinary TE. Constant columns have their zero point subtracted while compiling and are
packed as ``[N/B, K/2, B, 2]`` or ``[N/B, K/4, B, 4]``: the factors that one lane of a multiply-add instruction takes
lie next to each other. A block is B columns, 16 or two vectors of sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tvm import te, tirx

from optc.backends.base import Target
from optc.backends.kernels.contraction import broadcast

TEMPLATE = "integer_contraction"
COLUMN_BLOCK = 16
"""Columns packed together, at least."""
PAIR = 2
QUAD = 4
"""Depths packed together: two int16 or four bytes for one lane of an instruction."""
PANEL_DEPTH = 1024
"""Depths of a column tile that are widened together: as int16 they fill the first-level cache."""

Read = Any
"""A function of an index that returns an int32 expression."""


def column_block(target: Target, columns: int | None) -> int:
    """Return how many columns are packed together: two vectors of sums, if there are more than one has (None: many)."""
    lanes = target.lanes(32)
    return max(COLUMN_BLOCK, 2 * lanes if columns is None or columns > lanes else lanes)


def split_depth(depth: int, group: int) -> tuple[int, int]:
    """Return into how many chunks a run of ``depth`` is split, and the length of each, padding included.

    A chunk is a multiple of ``group``, and of two.
    """
    chunks, block = max(1, -(-depth // PANEL_DEPTH)), max(group, PAIR)
    return chunks, max(1, -(-depth // (chunks * block))) * block


def pack_columns(matrix: np.ndarray, group: int = PAIR, block: int = COLUMN_BLOCK) -> np.ndarray:
    """Pack integers ``[K, N]`` or ``[T, K, N]`` into ``[ceil(N/block), T * K'/group, block, group]``, zero-padded.

    ``K'`` is what ``split_depth`` makes of K. The result is int8 if that holds all values, else int16. Raises
    OverflowError for values beyond int16.
    """
    runs = matrix.reshape(-1, *matrix.shape[-2:])
    taps, k, n = runs.shape
    chunks, chunk = split_depth(k, group)
    blocks = -(-n // block)
    padded = np.zeros((taps, chunks * chunk, blocks * block), _narrowest(matrix))
    padded[:, :k, :n] = runs
    split = padded.reshape(taps * chunks * chunk // group, group, blocks, block)
    return np.ascontiguousarray(split.transpose(2, 0, 3, 1))


def _narrowest(values: np.ndarray) -> type[np.int8] | type[np.int16]:
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    if low >= -128 and high <= 127:
        return np.int8
    if low >= -32768 and high <= 32767:
        return np.int16
    raise OverflowError(f"weights from {low} to {high} do not fit 16 bits")


def annotate(rows: Sequence[int], packed: int, **more: Sequence[int]) -> dict[str, Any]:
    """Return the block annotations: ``rows`` are positions of spatial axes; the last axis is the columns.

    ``packed`` is how many depths of columns are packed together, 0 if they are not.
    """
    notes = {f"optc.{name}": list(values) for name, values in more.items()}
    return {"optc.template": TEMPLATE, "optc.rows": list(rows), "optc.packed": packed, **notes}


def packed_matmul(shape: Sequence[Any], row: Read, packed: Any, n: int, notes: Mapping[str, Sequence[int]]) -> Any:
    """``row [..., M, K]`` (of ``shape``) times columns packed by ``pack_columns``: ``[..., M, N]`` in int32.

    ``notes`` tell how the rows may be held.
    """
    block, group = (int(d) for d in packed.shape[-2:])
    k = te.reduce_axis((0, shape[-1]), "k")

    def element(*index: Any) -> Any:
        *rows, j = index
        column = packed(j // block, k // group, j % block, k % group)
        return te.sum(row(*rows, k) * column.astype("int32"), axis=k)

    return te.compute((*shape[:-1], n), element, "product", attrs=annotate(range(len(shape) - 1), group, **notes))


def matmul(a: Any, b: Any, row: Read, column: Read, batch: Sequence[Any]) -> Any:
    """``a [..., M, K]`` times ``b [..., K, N]`` with broadcast leading axes ``batch``, in int32.

    ``row`` and ``column`` read them at an index as int32, their zero points subtracted.
    """
    k = te.reduce_axis((0, a.shape[-1]), "k")

    def element(*index: Any) -> Any:
        *outer, i, j = index
        left, right = row(*broadcast(a, outer, batch), i, k), column(*broadcast(b, outer, batch), k, j)
        return te.sum(left * right, axis=k)

    attributes = annotate([len(batch)], 0)
    return te.compute((*batch, a.shape[-2], b.shape[-1]), element, "product", attrs=attributes)


def merged(kernel: Sequence[int], dilations: Sequence[int], channels: int) -> bool:
    """Tell whether the pixels of one line of a window make one run of neighbours that is not too long."""
    return dilations[-1] == 1 and kernel[-1] * channels <= PANEL_DEPTH


def pack_filters(
    weights: np.ndarray, dilations: Sequence[int], group: int = PAIR, block: int = COLUMN_BLOCK
) -> np.ndarray:
    """Pack filters ``[M, C, KH, KW]`` for ``conv``: a run of depth for each line of the window, or each pixel."""
    maps, channels, height, width = weights.shape
    runs = height if merged((height, width), dilations, channels) else height * width
    # [KH, KW, C, M]: channels of neighbouring pixels follow each other, as in the image.
    return pack_columns(weights.transpose(2, 3, 1, 0).reshape(runs, -1, maps), group, block)


def conv(
    x: Any,
    packed: Any,
    centre: Read,
    *,
    maps: int,
    groups: int,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    before: Sequence[int],
    out: Sequence[Any],
    magnitude: int,
    notes: Mapping[str, Sequence[int]],
) -> Any:
    """Convolve ``x [N, H, W, C]`` with filters of ``pack_filters``, stacked over groups: ``[N, *out, M]`` in int32.

    With ``groups`` > 1 the result is ``[N, *out, G, M/G]``. ``centre`` subtracts the zero point from an int32 value;
    what lies outside of the image counts as 0 after that. ``magnitude`` is the largest sum of the magnitudes of the
    weights of one output, 0 if they have more than 8 bits. ``notes`` tell how the rows may be held.
    """
    block, together = (int(d) for d in packed.shape[-2:])
    height, width = x.shape[1:3]
    depth = int(x.shape[3]) // groups
    one_run = merged(kernel, dilations, depth)
    length = int(np.prod(split_depth(depth * (kernel[1] if one_run else 1), together)))
    ky, kx, c = (te.reduce_axis((0, e), name) for e, name in ((kernel[0], "ky"), (kernel[1], "kx"), (depth, "c")))

    def element(n: Any, oy: Any, ox: Any, *index: Any) -> Any:
        group, m = index if groups > 1 else (0, index[0])
        iy = oy * strides[0] + ky * dilations[0] - before[0]
        ix = ox * strides[1] + kx * dilations[1] - before[1]
        value = centre(x(n, iy, ix, group * depth + c if groups > 1 else c).astype("int32"))
        inside = tirx.all(iy >= 0, iy < height, ix >= 0, ix < width)
        value = tirx.if_then_else(inside, value, tirx.const(0, "int32"))
        at = ky * length + kx * depth + c if one_run else (ky * kernel[1] + kx) * length + c
        weight = packed(group, m // block, at // together, m % block, at % together)
        return te.sum(value * weight.astype("int32"), axis=[ky, kx, c])

    geometry = {
        "kernel": kernel,
        "strides": strides,
        "dilations": dilations,
        "before": before,
        "merged": [int(one_run)],
        "magnitude": [magnitude],
        **notes,
    }
    shape = [*out, groups, maps // groups] if groups > 1 else [*out, maps]
    return te.compute((x.shape[0], *shape), element, "product", attrs=annotate([1, 2], together, **geometry))
