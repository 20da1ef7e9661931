"""MatMul and Gemm."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from tvm import te

from optc.backends.kernels import contraction, few_rows, register_tile
from optc.backends.kernels.fused import bits
from optc.backends.kernels.loops import product as product_of
from optc.backends.kernels.loops import static
from optc.backends.kernels.workload import annotation
from optc.backends.lowering import weight_only
from optc.backends.lowering.broadcasting import broadcast_shapes, checked, read_index
from optc.backends.lowering.emit import shape_of
from optc.backends.lowering.site import Site, scalar
from optc.backends.lowering.table import Table

TABLE = Table()


@TABLE.lowers("MatMul")
def matmul(site: Site) -> Any:
    """MatMul-13: NumPy's matmul, ranks 1 to n with broadcast leading axes."""
    a = site.tensor(0)
    left = shape_of(a)
    if len(left) == 1:
        a = site.reshape(a, [1, left[0]])
    weights = weight_only.operand(site, 1, a)
    constant = site.constant(1) if weights is None else None
    right = list(constant.shape) if constant is not None else site.shape(1)
    if weights is not None:
        result = _weight_only(site, a, right, *weights)
    elif constant is not None and len(right) <= 2 and constant.size:
        result = packed(site, a, constant.reshape(constant.shape[0], -1))
    else:
        b = site.tensor(1)
        result = product(site, a, site.reshape(b, [right[0], 1]) if len(right) == 1 else b)
    if len(left) > 1 and len(right) > 1:
        return result
    shape = shape_of(result)
    kept = shape[:-2] + ([] if len(left) == 1 else shape[-2:-1]) + ([] if len(right) == 1 else shape[-1:])
    return site.reshape(result, kept)


def _weight_only(site: Site, a: Any, shape: Sequence[int], multiply: weight_only.Compute, tensors: list[Any]) -> Any:
    """Emit ``a [..., M, K]`` times a dequantized constant of ``shape`` ``[K, N]``."""
    a = site.check_equal(a, [*shape_of(a)[:-1], shape[0]])
    dtype = str(a.ty.dtype)

    def compute(x: Any, *w: Any) -> Any:
        return contraction.narrow(multiply(x, *w), dtype)

    return site.emit(compute, a, *tensors, name="matmul", attributes=contraction.FUSIBLE)


def packed(site: Site, a: Any, matrix: np.ndarray, name: str = "matmul") -> Any:
    """Emit ``a [..., M, K]`` times a constant ``[K, N]``."""
    rows = static_product(shape_of(a)[:-1])
    n, dtype = matrix.shape[1], str(a.ty.dtype)
    core = {"op": "matmul", "m": rows, "k": matrix.shape[0], "n": n, "dtype": dtype}
    with site.layout(core) as layout:
        width = panel_width(site, rows, matrix.shape[0], n, dtype)
    weight, notes = site.weight(contraction.pack_columns(matrix, width), "packed"), annotation(core, layout.decisions)
    a = site.check_equal(a, [*shape_of(a)[:-1], matrix.shape[0]])

    def compute(x: Any, w: Any) -> Any:
        return contraction.narrow(contraction.packed_matmul(x, w, n, notes), dtype)

    return site.emit(compute, a, weight, name=name, attributes=contraction.FUSIBLE)


def product(
    site: Site, a: Any, b: Any, *, transpose_b: bool = False, scale: float | None = None, name: str = "matmul"
) -> Any:
    """Emit ``scale * a @ b`` with broadcast leading axes, neither operand known."""
    left, right = shape_of(a), shape_of(b)
    batch = broadcast_shapes(site, left[:-2], right[:-2])
    a = checked(site, a, left, [*batch, *left[-2:]])
    inner = [right[-2], left[-1]] if transpose_b else [left[-1], right[-1]]
    b = checked(site, site.check_equal(b, [*right[:-2], *inner]), [*right[:-2], *inner], [*batch, *inner])
    dtype = str(a.ty.dtype)

    def compute(x: Any, y: Any) -> Any:
        acc = contraction.matmul(x, y, batch, transpose_b=transpose_b)
        if scale is not None and scale != 1.0:
            total = acc
            acc = te.compute(total.shape, lambda *i: total(*i) * scalar(scale, str(total.dtype)), "scale")
        return contraction.narrow(acc, dtype)

    return site.emit(compute, a, b, name=name, attributes=contraction.FUSIBLE)


@TABLE.lowers("Gemm")
def gemm(site: Site) -> Any:
    """Gemm-13: ``alpha * op(A) @ op(B) + beta * C`` with C broadcast to the result."""
    a, dtype = site.tensor(0), site.dtype(0)
    trans_a, trans_b = bool(site.attr("transA", 0)), bool(site.attr("transB", 0))
    alpha, beta = site.attr("alpha", 1.0), site.attr("beta", 1.0)
    constant = site.constant(1) if site.dequantized(1) is None else None
    right = list(site.shape(1) if constant is None else constant.shape)
    columns, depth = right if trans_b else right[::-1]
    rows = site.shape(0)[1 if trans_a else 0]
    addend = site.shape(2) if site.has(2) and beta != 0.0 else []
    addends = [checked(site, site.tensor(2), addend, [rows, columns])] if site.has(2) and beta != 0.0 else []
    a = site.check_equal(a, [depth, rows] if trans_a else [rows, depth])
    multiply, factors = _factors(site, a, rows, trans_a=trans_a, trans_b=trans_b)

    def compute(x: Any, *tensors: Any) -> Any:
        acc, c = multiply(x, *tensors[: len(factors)]), tensors[len(factors) :]
        if not c and alpha == 1.0:
            return contraction.narrow(acc, dtype)
        return te.compute(acc.shape, lambda i, j: finish(acc, i, j, *c).astype(dtype), "addend")

    def finish(acc: Any, i: Any, j: Any, *c: Any) -> Any:
        wide = str(acc.dtype)
        value = acc[i, j] if alpha == 1.0 else acc[i, j] * scalar(alpha, wide)
        for term in c:
            added = term(*read_index(site, addend, [rows, columns], [i, j])).astype(wide)
            value = value + (added if beta == 1.0 else added * scalar(beta, wide))
        return value

    return site.emit(compute, a, *factors, *addends, name="gemm", attributes=contraction.FUSIBLE)


def _factors(site: Site, a: Any, rows: Any, *, trans_a: bool, trans_b: bool) -> tuple[weight_only.Compute, list[Any]]:
    """Return how a Gemm multiplies ``a``, and the tensors of its second factor."""
    weights = None if trans_a else weight_only.operand(site, 1, a, transposed=trans_b)
    if weights is not None:
        return weights
    constant = site.constant(1)
    if constant is None or trans_a or not constant.size:
        return partial(contraction.matmul, batch=[], transpose_a=trans_a, transpose_b=trans_b), [site.tensor(1)]
    matrix = constant.T if trans_b else constant
    depth, columns = matrix.shape
    core = {"op": "matmul", "m": static(rows), "k": depth, "n": columns, "dtype": site.dtype(0)}
    with site.layout(core) as layout:
        width = panel_width(site, static(rows), depth, columns, site.dtype(0))
    weight = site.weight(contraction.pack_columns(matrix, width), "packed")
    return partial(contraction.packed_matmul, n=columns, notes=annotation(core, layout.decisions)), [weight]


def panel_width(site: Site, rows: int | None, depth: int, columns: int, dtype: str, *, padded: bool = False) -> int:
    """Return how many columns of a constant operand make a panel; ``padded`` is that of ``tile_vectors``."""
    element_bits = bits(contraction.accumulator(dtype))
    if rows is not None and rows <= few_rows.ROWS:
        return few_rows.VECTORS * site.target.lanes(element_bits)
    lanes = register_tile.column_lanes(columns, element_bits, site.target)
    return lanes * register_tile.tile_vectors(rows, depth, columns, lanes, site.target, padded=padded)


def static_product(sizes: Sequence[Any]) -> int | None:
    """Return the product of sizes, None if one is symbolic."""
    return static(product_of(list(sizes)))
