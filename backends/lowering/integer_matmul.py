"""MatMulInteger and QLinearMatMul: exact products of 8-bit integers in int32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from tvm import te, tirx

from optc.backends.kernels import contraction, integer_contraction, integer_window
from optc.backends.lowering.broadcasting import broadcast_shapes, checked
from optc.backends.lowering.emit import shape_of
from optc.backends.lowering.pointwise import immediate
from optc.backends.lowering.site import Site, scalar
from optc.backends.lowering.table import Table

TABLE = Table()
_LIMITS = {"int8": (-128, 127), "uint8": (0, 255)}
Zero = tuple[Callable[..., Any], list[Any]]
"""How to subtract a zero point from a value at an index, and the tensors that this reads."""


def centered(site: Site, index: int, zero: int, *, axis: int | None = None) -> Any:
    """Return input ``index`` as int32 minus its zero point (input ``zero``, scalar or one per position of ``axis``)."""
    x = site.tensor(index)
    points = [site.tensor(zero)] if site.has(zero) else []

    def compute(a: Any, *z: Any) -> Any:
        def element(*i: Any) -> Any:
            value = a(*i).astype("int32")
            for point in z:
                value = value - parameter(point, i, axis).astype("int32")
            return value

        return te.compute(a.shape, element, "centered")

    return site.emit(compute, x, *points, name="center")


def parameter(tensor: Any, index: Any, axis: int | None) -> Any:
    """Read a quantization parameter: a scalar, one element, one per position of ``axis``, or a broadcast tensor."""
    rank = len(tensor.shape)
    if rank == 0:
        return tensor()
    single = [isinstance(d, tirx.IntImm) and int(d) == 1 for d in tensor.shape]
    if rank == 1:
        return tensor(0) if single[0] or axis is None else tensor(index[axis])
    tail = list(index)[len(index) - rank :]
    return tensor(*(0 if one else i for one, i in zip(single, tail, strict=True)))


def _product(site: Site, a_at: int, a_zero: int, b_at: int, b_zero: int) -> Any:
    """Emit the int32 matrix product, NumPy's rules for rank 1; zero points per row of the left, column of the right."""
    a, left, right = site.tensor(a_at), site.shape(a_at), site.shape(b_at)
    row_axis = max(len(left) - 2, 0)
    if len(left) == 1:
        a = site.reshape(a, [1, *left])
    rows, row_tensors = zero_point(site, a_zero, row_axis if len(left) > 1 else None)
    weights = _constant_columns(site, b_at, b_zero)
    if weights is not None:
        y = _packed(site, a, weights, known_zero(site, a_zero), rows, row_tensors)
    else:
        b = site.reshape(site.tensor(b_at), [*right, 1]) if len(right) == 1 else site.tensor(b_at)
        columns, column_tensors = zero_point(site, b_zero, len(right) - 1 if len(right) > 1 else None)
        y = _general(site, a, b, (rows, row_tensors), (columns, column_tensors))
    if len(left) > 1 and len(right) > 1:
        return y
    shape = shape_of(y)
    kept = shape[:-2] + ([] if len(left) == 1 else [shape[-2]]) + ([] if len(right) == 1 else [shape[-1]])
    return site.reshape(y, kept)


def known_zero(site: Site, at: int) -> int | None:
    """Return the zero point that is input ``at`` if it is one number known while compiling; 0 if there is none."""
    if not site.has(at):
        return 0
    known = immediate(site, at)
    return None if known is None else int(known)


def zero_point(site: Site, at: int, axis: int | None) -> Zero:
    """Return ``subtract(value, index, tensors)`` for the zero point that is input ``at``, and the tensors it reads."""
    number = known_zero(site, at)
    if number is not None:
        return (lambda value, index, tensors: value - number if number else value), []
    return lambda value, index, tensors: value - parameter(tensors[0], index, axis).astype("int32"), [site.tensor(at)]


def _constant_columns(site: Site, at: int, zero: int) -> np.ndarray | None:
    """Return a constant matrix less its zero points, None if it is not known or not a matrix."""
    matrix, zeros = site.constant(at), site.constant(zero)
    if matrix is None or (zeros is None and site.has(zero)) or not 1 <= matrix.ndim <= 2:
        return None
    exact: np.ndarray = matrix.astype(np.int32)
    if zeros is not None:
        exact = exact - zeros.astype(np.int32).reshape(-1)
    return exact.reshape(exact.shape[0], -1)


def _packed(
    site: Site, a: Any, matrix: np.ndarray, number: int | None, zero: Callable[..., Any], points: list[Any]
) -> Any:
    block = integer_contraction.column_block(site.target, matrix.shape[1])
    pack = partial(integer_contraction.pack_columns, matrix, block=block)
    packed, notes = integer_window.pack(site.target, str(a.ty.dtype), number, matrix.shape[0], pack)
    weight = site.weight(packed, "packed")
    a = site.check_equal(a, [*shape_of(a)[:-1], matrix.shape[0]])
    n = matrix.shape[1]

    def compute(x: Any, w: Any, *z: Any) -> Any:
        def row(*index: Any) -> Any:
            return zero(x(*index).astype("int32"), index, z)

        return integer_contraction.packed_matmul(x.shape, row, w, n, notes)

    return site.emit(compute, a, weight, *points, name="integer_matmul", attributes=contraction.FUSIBLE)


def _general(site: Site, a: Any, b: Any, row_zero: Zero, column_zero: Zero) -> Any:
    left, right = shape_of(a), shape_of(b)
    batch = broadcast_shapes(site, left[:-2], right[:-2])
    a = checked(site, a, left, [*batch, *left[-2:]])
    inner = [left[-1], right[-1]]
    b = checked(site, site.check_equal(b, [*right[:-2], *inner]), [*right[:-2], *inner], [*batch, *inner])

    def compute(x: Any, y: Any, *z: Any) -> Any:
        mine, theirs = z[: len(row_zero[1])], z[len(row_zero[1]) :]

        def row(*index: Any) -> Any:
            return row_zero[0](x(*index).astype("int32"), index, mine)

        def column(*index: Any) -> Any:
            return column_zero[0](y(*index).astype("int32"), index, theirs)

        return integer_contraction.matmul(x, y, row, column, batch)

    points = [*row_zero[1], *column_zero[1]]
    return site.emit(compute, a, b, *points, name="integer_matmul", attributes=contraction.FUSIBLE)


@TABLE.lowers("MatMulInteger")
def matmul_integer(site: Site) -> Any:
    """MatMulInteger-10: ``(A - a_zero) @ (B - b_zero)`` in int32; zero points per row of A or column of B."""
    return _product(site, 0, 2, 1, 3)


@TABLE.lowers("QLinearMatMul")
def qlinear_matmul(site: Site) -> Any:
    """QLinearMatMul-21: integer product, then requantization (round half to even, saturate)."""
    if site.output_dtype() not in _LIMITS:
        site.unsupported(f"output type {site.output_dtype()}")
    y = _product(site, 0, 2, 3, 5)
    rank = len(shape_of(y))
    return requantize(site, y, (1, rank - 2 if site.rank(0) > 1 else None), (4, rank - 1), 6, 7)


def requantize(
    site: Site, y: Any, left: tuple[int, int | None], right: tuple[int, int | None], scale_at: int, zero_at: int
) -> Any:
    """Emit ``saturate(round(y * (left_scale * right_scale / scale)) + zero)``; pairs are (input, axis of the scale)."""
    dtype = site.output_dtype()
    low, high = _LIMITS[dtype]
    zeros = [site.tensor(zero_at)] if site.has(zero_at) else []

    def compute(a: Any, s: Any, t: Any, u: Any, *z: Any) -> Any:
        def element(*i: Any) -> Any:
            factor = (
                parameter(s, i, left[1]).astype("float32")
                * parameter(t, i, right[1]).astype("float32")
                / parameter(u, i, None).astype("float32")
            )
            value = tirx.nearbyint(a(*i).astype("float32") * factor)
            for point in z:
                value = value + parameter(point, i, None).astype("float32")
            value = tirx.min(tirx.max(value, scalar(low, "float32")), scalar(high, "float32"))
            return value.astype(dtype)

        return te.compute(a.shape, element, "requantize")

    scales: list[Any] = [site.tensor(left[0]), site.tensor(right[0]), site.tensor(scale_at)]
    return site.emit(compute, y, *scales, *zeros, name="requantize", attributes={"op_pattern": 0})
