"""MatMul, Gemm: constant weights of 4 or 8 bits stay packed (``kernels/weight_only.py``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from optc.backends.kernels import few_rows, register_tile, weight_only, weight_only_rows
from optc.backends.kernels.fused import bits
from optc.backends.kernels.loops import product, static
from optc.backends.lowering.emit import shape_of
from optc.backends.lowering.known import Dequantized
from optc.backends.lowering.site import Site

Compute = Callable[..., Any]
_CENTRES = {
    np.dtype(ml_dtypes.uint4): (4, 0),
    np.dtype(ml_dtypes.int4): (4, 8),
    np.dtype(np.int8): (8, 0),
    np.dtype(np.uint8): (8, -128),
}
"""The bits of the types that stay packed, and what brings them to the range of the kernel."""
_ROWS = ("float32", "float16", "bfloat16")


def operand(site: Site, index: int, a: Any, *, transposed: bool = False) -> tuple[Compute, list[Any]] | None:
    """Return how to multiply rows ``a [..., M, K]`` by input ``index``, and the tensors that this takes beside them.

    None if the input is no constant matrix of 4 or 8 bits, or is quantized in another way: the scales may vary
    with the columns, and from block to block of 8 or more rows. ``transposed`` tells that the input is ``[N, K]``.
    """
    constant = site.dequantized(index)
    if constant is None or str(a.ty.dtype) not in _ROWS or 0 in constant.values.shape:
        return None
    found = _matrix(constant, transposed)
    if found is None:
        return None
    values, scales, zeros, block = found
    kind, shift = _CENTRES[constant.values.dtype]
    packed = weight_only.pack(
        values.astype(np.int16) + shift,
        scales,
        zeros.astype(np.int16) + shift,
        bits=kind,
        block=block,
        width=_width(site, a, *values.shape),
    )
    arrays = {"words": packed.words, "scales": packed.scales, "zeros": packed.zeros}
    tensors = [site.weight(array, name) for name, array in arrays.items() if array is not None]

    def compute(x: Any, words: Any, scales: Any, *zeros: Any) -> Any:
        return weight_only.matmul(x, packed, words, scales, zeros)

    return compute, tensors


def _matrix(constant: Dequantized, transposed: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, int] | None:
    """Return values ``[K, N]``, scales and zero points ``[blocks, N]``, and the block; None for any other form."""
    values, scale, axis = constant.values, constant.scale, constant.axis
    if values.ndim != 2 or values.dtype not in _CENTRES:
        return None
    zero = np.zeros(scale.shape, np.int16) if constant.zero is None else constant.zero
    if transposed:
        values, axis = values.T, 1 - axis
        scale, zero = scale.T, zero.T
    depth, columns = values.shape
    if scale.size == 1:
        whole = (1, columns)
        return values, np.full(whole, scale.reshape(())), np.full(whole, zero.reshape(())), depth
    if not constant.block:
        return (values, scale.reshape(1, -1), zero.reshape(1, -1), depth) if axis == 1 else None
    if axis != 0 or (constant.block % weight_only.FIELDS and constant.block < depth):
        return None
    return values, scale, zero, constant.block


def _width(site: Site, a: Any, depth: int, columns: int) -> int:
    """Return how many columns make a panel."""
    lanes = site.target.lanes(bits("float32"))
    rows = static(product(shape_of(a)[:-1]))
    if rows is not None and rows <= weight_only_rows.most_rows(site.target):
        return few_rows.VECTORS * lanes
    return lanes * register_tile.tile_vectors(rows, depth, columns, lanes, site.target)
