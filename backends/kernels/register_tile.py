"""The register tile of matrix products: how many rows and vectors of columns are accumulated at once.

A step of the reduction loads one vector per column vector, broadcasts one element per row, and adds their products.
Its cost in cycles is that of the scarcest: products, loads, or the latency of an accumulator, each on the usual two
ports. Without fused multiply-adds a product takes both ports, one to multiply and one to add, and a register between.
"""

from __future__ import annotations

from optc.backends.base import Target
from optc.backends.kernels.decisions import decide

_PORTS = 2
_LATENCY = 4
"""Cycles until an accumulator may be added to again."""
IN_FLIGHT = _PORTS * _LATENCY
"""Accumulators that keep the ports busy."""
_MOST_ROWS = 12
_OVERHEAD = 24.0
"""Cycles around the reduction of a tile: clear, address, store."""
_WORTH_HALVES = 1.1
"""How much padding halves of vectors have to save: there are twice as many of them."""
DEPTH = 64
"""The depth assumed where only a run knows."""


def column_lanes(columns: int, element_bits: int, target: Target) -> int:
    """Return how many columns make a vector: all that a register holds, or half of them.

    Where a whole vector takes both halves of a unit (``Target.multipliers``), halves are as fast; few columns may fill
    them better.
    """
    whole = target.lanes(element_bits)
    if target.multipliers > 1 or whole == 1:
        return whole
    half = whole // 2
    padded = {lanes: -(-columns // lanes) * lanes for lanes in (half, whole)}
    return half if padded[half] * _WORTH_HALVES <= padded[whole] else whole


def panel_lanes(panel: int, element_bits: int, target: Target) -> int:
    """Return the elements of the vectors that a panel of packed columns consists of."""
    lanes = min(target.lanes(element_bits), panel)
    while panel % lanes:
        lanes //= 2
    return lanes


def most_rows(vectors: int, target: Target) -> int:
    """Return the rows whose accumulators fit the registers beside ``vectors`` columns, a broadcast and a product.

    Each row has an address of its own.
    """
    others = vectors + (1 if target.fuses else 2)
    return max(1, min(_MOST_ROWS, target.addresses, (target.registers - others) // vectors))


def multiply_adds(target: Target) -> int:
    """Return how many vectors of products are added in a cycle, at best.

    Where halves of a unit make one (``Target.multipliers``), tiles are as tall all the same: a low one would be as good
    for the multiplier alone, but reads each panel once for each of its few rows.
    """
    return _PORTS if target.fuses else 1


def cycles(rows: int, vectors: int, target: Target) -> float:
    """Return the cycles of one step of the reduction."""
    return max(rows * vectors / multiply_adds(target), (rows + vectors) / _PORTS, float(_LATENCY))


def tile_rows(rows: int | None, depth: int | None, vectors: int, target: Target) -> int:
    """Return the tile's height for ``rows`` rows of ``depth`` (None: unknown, many) and ``vectors`` columns."""
    most = most_rows(vectors, target)
    if rows is None:
        return most
    return min(range(max(1, min(most, rows)), 0, -1), key=lambda h: _all_cycles(h, rows, depth, vectors, target))


def decide_rows(rows: int | None, depth: int | None, vectors: int, target: Target) -> int:
    """Return the height that ``tile_rows`` finds best, or what was decided: the knob ``rows``."""
    most = most_rows(vectors, target)
    many = most if rows is None else rows
    return decide(
        "rows",
        tile_rows(rows, depth, vectors, target),
        range(1, max(1, min(most, many)) + 1),
        lambda height: _all_cycles(height, many, depth, vectors, target),
    )


def _all_cycles(height: int, rows: int, depth: int | None, vectors: int, target: Target) -> float:
    return -(-rows // height) * ((depth or DEPTH) * cycles(height, vectors, target) + _OVERHEAD)


def tile_vectors(
    rows: int | None, depth: int, columns: int, lane_count: int, target: Target, *, padded: bool = False
) -> int:
    """Return how many vectors of columns make a tile, 1 to 4, for a product of ``rows`` x ``depth`` x ``columns``.

    The knob ``vectors``. The last tile of a row may have fewer, but if ``padded`` it is computed as the others are;
    its height is theirs.
    """
    vectors = -(-columns // lane_count)
    many = rows or 4 * _MOST_ROWS * 5 * 7

    def total(width: int) -> float:
        height = tile_rows(rows, depth, width, target)
        whole, rest = divmod(vectors, width)
        widths = [width] * whole + ([width if padded else rest] if rest else [])
        return -(-many // height) * sum(depth * cycles(height, w, target) + _OVERHEAD for w in widths)

    widths = range(min(4, vectors), 0, -1)
    return decide("vectors", min(widths, key=lambda w: (total(w), abs(w - 2))), widths, total)
