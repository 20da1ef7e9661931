"""Winograd's minimal filtering for 3x3 convolution with stride 1, on channels-last images.

F(m x m, 3 x 3) after Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016): tiles of
``a = m + 2`` pixels square are transformed (``V = B^T d B``), multiplied channel-wise with transformed filters as
``a * a`` matrix products, and transformed back (``A^T M A``). F(4x4) needs a quarter of the multiplications of the
direct sum, F(2x2) four ninths.

Rounding: with inputs of like magnitude the error relative to the largest output is about 1e-6 for F(2x2) and below
1e-4 for F(4x4) (measured 5e-6 to 2e-5), because the transforms scale values up and down; direct summation has 3e-7.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from tvm import te, tirx

from optc.backends.base import Target
from optc.backends.kernels import register_tile
from optc.backends.kernels.decisions import decide
from optc.backends.kernels.loops import static

TEMPLATE = "winograd"

# B^T, G and A^T of F(2, 3) and F(4, 3) with the interpolation points 0, 1, -1, (2, -2,) infinity.
INPUT = {
    2: np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], float),
    4: np.array(
        [
            [4, 0, -5, 0, 1, 0],
            [0, -4, -4, 1, 1, 0],
            [0, 4, -4, -1, 1, 0],
            [0, -2, -1, 2, 1, 0],
            [0, 2, -1, -2, 1, 0],
            [0, 4, 0, -5, 0, 1],
        ],
        float,
    ),
}
FILTER = {
    2: np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]),
    4: np.array(
        [
            [1 / 4, 0, 0],
            [-1 / 6, -1 / 6, -1 / 6],
            [-1 / 6, 1 / 6, -1 / 6],
            [1 / 24, 1 / 12, 1 / 6],
            [1 / 24, -1 / 12, 1 / 6],
            [0, 0, 1],
        ]
    ),
}
OUTPUT = {
    2: np.array([[1, 1, 1, 0], [0, 1, -1, -1]], float),
    4: np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], float),
}

_FETCH_BYTES = 4.0
"""Bytes of weights that one core gets from memory in a cycle."""
_LARGE = 56
"""Pixels to a side assumed where only a run knows."""


def choose(height: Any, width: Any, depth: int, maps: int, target: Target) -> int | None:
    """Return the output tile (4 or 2) that should be fastest for an image of ``height`` x ``width``, None for direct.

    Products, weights from memory, and transforms are counted in cycles of one core. The knob ``winograd``, 0 is direct.
    """
    lanes = target.lanes(32)
    products_in_a_cycle = min(target.multipliers, register_tile.multiply_adds(target)) * lanes
    # Bytes of intermediate values that one core moves through its caches in a cycle: half a vector.
    moved_in_a_cycle = target.vector_bits / 16
    if depth < lanes or maps < lanes:
        return None
    together = register_tile.column_lanes(maps, 32, target)
    panels = -(-maps // together) * together
    rows, columns = static(height) or _LARGE, static(width) or _LARGE

    def cycles(m: int) -> float:
        area, tiles = (m + 2) ** 2, -(-rows // m) * -(-columns // m)
        products = area * tiles * depth * panels / products_in_a_cycle
        weights = area * depth * maps * 4 / _FETCH_BYTES
        # Each transform touches every value of a tile about three times.
        moved = area * tiles * (depth + maps) * 4 * 3 / moved_in_a_cycle
        return max(products, weights) + moved

    direct = max(rows * columns * 9 * depth * panels / products_in_a_cycle, 9 * depth * maps * 4 / _FETCH_BYTES)
    costs = {0: direct, 2: cycles(2), 4: cycles(4)}
    return decide("winograd", min(costs, key=lambda m: costs[m]), costs, lambda m: costs[m]) or None


def transform_filters(weights: np.ndarray, m: int) -> np.ndarray:
    """Return ``[M, C, 3, 3]`` as ``[a * a, C, M]``, computed in float64."""
    g = FILTER[m]
    u: np.ndarray = np.einsum("ar,ocrs,bs->abco", g, weights.astype(np.float64), g)
    return u.reshape(-1, *u.shape[2:]).astype(np.float32)


def convolve(
    x: Any,
    u: Any,
    input_table: Any,
    output_table: Any,
    maps: int,
    before: tuple[int, int],
    out: tuple[Any, Any],
    notes: Mapping[str, Any],
) -> Any:
    """Convolve ``x [N, H, W, C]``, padded with zeros ``before`` and behind: ``[N, *out, maps]``.

    ``u [a * a, ceil(maps/width), C, width]`` are packed transformed filters; the tables are ``B^T`` and ``A^T``. This
    defines the result; the order of its sums is the schedule's (``winograd_schedule.py``). ``notes`` are annotations.
    """
    m, a = (int(d) for d in output_table.shape)
    width, (height, across) = u.shape[-1], x.shape[1:3]
    e, c = te.reduce_axis((0, a * a), "e"), te.reduce_axis((0, x.shape[-1]), "c")
    i, j = te.reduce_axis((0, a), "i"), te.reduce_axis((0, a), "j")

    def element(n: Any, h: Any, w: Any, o: Any) -> Any:
        row, column = h // m * m + i - before[0], w // m * m + j - before[1]
        inside = tirx.all(row >= 0, row < height, column >= 0, column < across)
        pixel = tirx.if_then_else(inside, x[n, row, column, c], tirx.const(0, "float32"))
        forward = input_table[e // a, i] * input_table[e % a, j] * pixel
        back = output_table[h % m, e // a] * output_table[w % m, e % a]
        return te.sum(back * u[e, o // width, c, o % width] * forward, axis=[e, c, i, j])

    attributes = {"optc.template": TEMPLATE, "optc.m": m, "optc.before": list(before), **notes}
    return te.compute((x.shape[0], *out, maps), element, "winograd", attrs=attributes)
