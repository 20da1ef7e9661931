"""MatMulInteger, ConvInteger, QLinearMatMul, QLinearConv: exact products of 8-bit integers in int32."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import te, tirx

from optc.backends.kernels import contraction, convolution
from optc.backends.lowering.convolution import pack_filters, padded
from optc.backends.lowering.emit import shape_of
from optc.backends.lowering.matmul import product
from optc.backends.lowering.site import Site, scalar
from optc.backends.lowering.table import Table
from optc.backends.lowering.windows import windows

TABLE = Table()
_LIMITS = {"int8": (-128, 127), "uint8": (0, 255)}


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


def _product(site: Site, a: Any, b: Any) -> Any:
    """Emit the int32 matrix product, NumPy's rules for rank 1."""
    left, right = shape_of(a), shape_of(b)
    a = site.reshape(a, [1, *left]) if len(left) == 1 else a
    b = site.reshape(b, [*right, 1]) if len(right) == 1 else b
    y = product(site, a, b)
    if len(left) > 1 and len(right) > 1:
        return y
    shape = shape_of(y)
    rows = [] if len(left) == 1 else [shape[-2]]
    columns = [] if len(right) == 1 else [shape[-1]]
    return site.reshape(y, [*shape[:-2], *rows, *columns])


@TABLE.lowers("MatMulInteger")
def matmul_integer(site: Site) -> Any:
    """MatMulInteger-10: ``(A - a_zero) @ (B - b_zero)`` in int32; zero points per row of A or column of B."""
    rank_a, rank_b = site.rank(0), site.rank(1)
    a = centered(site, 0, 2, axis=max(rank_a - 2, 0))
    return _product(site, a, centered(site, 1, 3, axis=rank_b - 1))


@TABLE.lowers("QLinearMatMul")
def qlinear_matmul(site: Site) -> Any:
    """QLinearMatMul-21: integer product, then requantization (round half to even, saturate)."""
    if site.output_dtype() not in _LIMITS:
        site.unsupported(f"output type {site.output_dtype()}")
    rank_a, rank_b = site.rank(0), site.rank(3)
    row_axis, column_axis = max(rank_a - 2, 0), rank_b - 1
    y = _product(site, centered(site, 0, 2, axis=row_axis), centered(site, 3, 5, axis=column_axis))
    rank = len(shape_of(y))
    return requantize(site, y, (1, rank - 2 if rank_a > 1 else None), (4, rank - 1), 6, 7)


@TABLE.lowers("ConvInteger")
def conv_integer(site: Site) -> Any:
    """ConvInteger-10: convolution of zero-centred integers in int32; padding stands for the zero point."""
    return _convolution(site, 0, 2, 1, 3, None)


@TABLE.lowers("QLinearConv")
def qlinear_conv(site: Site) -> Any:
    """QLinearConv-10: integer convolution with int32 bias, requantized per output channel."""
    y = _convolution(site, 0, 2, 3, 5, 8 if site.has(8) else None)
    return requantize(site, y, (1, None), (4, 1), 6, 7)


def _convolution(site: Site, x_at: int, x_zero: int, w_at: int, w_zero: int, bias_at: int | None) -> Any:
    filters = site.shape(w_at)
    groups, kernel = site.attr("group", 1), filters[2:]
    channels = filters[0]
    if not all(isinstance(d, int) for d in filters):
        site.unsupported("the shape of the convolution's weights must be known while compiling")
    x = centered(site, x_at, x_zero)
    shape = shape_of(x)
    x = site.check_equal(x, [shape[0], filters[1] * groups, *shape[2:]])
    geometry = windows(site, shape[2:], kernel)
    x = padded(site, x, geometry)
    weights, zeros = site.constant(w_at), site.constant(w_zero)
    packed = weights is not None and (zeros is not None or not site.has(w_zero))
    if packed:
        offset = np.zeros(1, np.int32) if zeros is None else zeros.astype(np.int32).reshape(-1)
        exact = weights.astype(np.int32) - offset.reshape(-1, *[1] * (len(filters) - 1))
        w = site.weight(pack_filters(exact, groups), "packed")
    else:
        w = centered(site, w_at, w_zero, axis=0)
    bias = [] if bias_at is None else [site.tensor(bias_at)]
    per_group = channels // groups

    def compute(a: Any, f: Any, *b: Any) -> Any:
        y = convolution.conv(
            a,
            f,
            channels=channels,
            groups=groups,
            strides=geometry.strides,
            dilations=geometry.dilations,
            out=geometry.out,
            packed=packed,
            kernel=kernel,
        )
        for term in b:
            y = convolution.add_bias(y, term, 2 if groups > 1 else 1, per_group)
        return y

    y = site.emit(compute, x, w, *bias, name="conv", attributes=contraction.FUSIBLE)
    return site.reshape(y, [shape[0], channels, *geometry.out]) if groups > 1 else y


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
