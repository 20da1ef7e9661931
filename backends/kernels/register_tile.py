"""The register tile of matrix products: how many rows and vectors of columns are accumulated at once.

A step of the reduction loads one vector per column vector, broadcasts one element per row, and issues their products
as fused multiply-adds. Its cost in cycles is that of the scarcest: multiply-adds, loads, or the latency of an
accumulator, each on the usual two ports.
"""

from __future__ import annotations

from optc.backends.base import Target

_PORTS = 2
_LATENCY = 4
"""Cycles until an accumulator may be added to again."""
_MOST_ROWS = 12
_OVERHEAD = 24.0
"""Cycles around the reduction of a tile: clear, address, store."""


def registers(target: Target) -> int:
    """Return the number of vector registers."""
    wide = "avx512f" in target.features or target.triple.startswith(("aarch64", "riscv"))
    return 32 if wide else 16


def lanes(target: Target, bits: int) -> int:
    """Return how many elements of ``bits`` a vector register holds."""
    return max(1, target.vector_bits // bits)


def most_rows(vectors: int, count: int) -> int:
    """Return the rows whose accumulators fit ``count`` registers beside ``vectors`` columns and one broadcast."""
    return max(1, min(_MOST_ROWS, (count - vectors - 1) // vectors))


def cycles(rows: int, vectors: int) -> float:
    """Return the cycles of one step of the reduction."""
    return max(rows * vectors / _PORTS, (rows + vectors) / _PORTS, float(_LATENCY))


def tile_rows(rows: int | None, depth: int, vectors: int, count: int) -> int:
    """Return the tile's height for ``rows`` rows (None: unknown, many) and ``vectors`` columns."""
    most = most_rows(vectors, count)
    if rows is None:
        return most
    most = max(1, min(most, rows))

    def total(height: int) -> float:
        return -(-rows // height) * (depth * cycles(height, vectors) + _OVERHEAD)

    return min(range(most, 0, -1), key=total)


def tile_vectors(rows: int | None, depth: int, columns: int, lane_count: int, count: int) -> int:
    """Return how many vectors of columns make a tile, 1 to 4, for a product of ``rows`` x ``depth`` x ``columns``.

    The last tile of a row may have fewer; its height is that of the others.
    """
    vectors = -(-columns // lane_count)
    many = rows or 4 * _MOST_ROWS * 5 * 7

    def total(width: int) -> float:
        height = tile_rows(rows, depth, width, count)
        whole, rest = divmod(vectors, width)
        widths = [width] * whole + ([rest] if rest else [])
        return -(-many // height) * sum(depth * cycles(height, w) + _OVERHEAD for w in widths)

    return min(range(min(4, vectors), 0, -1), key=lambda w: (total(w), abs(w - 2)))
