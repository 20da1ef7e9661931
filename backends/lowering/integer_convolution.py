"""ConvInteger and QLinearConv: exact convolutions of 8-bit integers in int32, on channels-last values."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import te

from optc.backends.kernels import (
    contraction,
    convolution,
    integer_contraction,
    integer_depthwise,
    integer_dot,
    integer_window,
    integer_winograd,
)
from optc.backends.kernels.integer_depthwise import Lines
from optc.backends.kernels.integer_depthwise_schedule import least_channels
from optc.backends.lowering.convolution import padded
from optc.backends.lowering.emit import shape_of
from optc.backends.lowering.integer_matmul import centered, known_zero, requantize, zero_point
from optc.backends.lowering.known import Known
from optc.backends.lowering.layout import channels_last, permuted
from optc.backends.lowering.site import Site, scalar
from optc.backends.lowering.table import Table
from optc.backends.lowering.windows import Windows, windows

TABLE = Table()


@TABLE.lowers("ConvInteger")
def conv_integer(site: Site) -> Any:
    """ConvInteger-10: convolution of zero-centred integers in int32; padding stands for the zero point."""
    y, last = _convolution(site, 0, 2, 1, 3, None)
    return Known(last=y) if last else y


@TABLE.lowers("QLinearConv")
def qlinear_conv(site: Site) -> Any:
    """QLinearConv-10: integer convolution with int32 bias, requantized per output channel."""
    y, last = _convolution(site, 0, 2, 3, 5, 8 if site.has(8) else None)
    y = requantize(site, y, (1, None), (4, len(shape_of(y)) - 1 if last else 1), 6, 7)
    return Known(last=y) if last else y


def _convolution(site: Site, x_at: int, x_zero: int, w_at: int, w_zero: int, bias_at: int | None) -> tuple[Any, bool]:
    """Emit the int32 convolution; tells whether the result is channels-last."""
    filters, shape = site.shape(w_at), site.shape(x_at)
    groups = site.attr("group", 1)
    if not all(isinstance(d, int) for d in filters):
        site.unsupported("the shape of the convolution's weights must be known while compiling")
    geometry = windows(site, shape[2:], filters[2:])
    weights = _constant_filters(site, w_at, w_zero)
    fixed = all(isinstance(b, int) and b >= 0 for b in geometry.before)
    if weights is None or len(shape) > 4 or not fixed:
        return _general(site, (x_at, x_zero), (w_at, w_zero), bias_at, groups, geometry), False
    wanted = [shape[0], filters[1] * groups, *shape[2:]]
    x = site.check_equal(site.last(x_at), permuted(wanted, channels_last(len(shape))))
    if filters[1] == 1 and groups > 1:
        y = _depthwise(site, x, x_zero, weights, bias_at, geometry)
    else:
        y = _product(site, x, x_zero, weights, bias_at, groups, geometry)
    return y, True


def _constant_filters(site: Site, at: int, zero: int) -> np.ndarray | None:
    """Return constant weights less their zero points, or None."""
    weights, zeros = site.constant(at), site.constant(zero)
    if weights is None or (zeros is None and site.has(zero)):
        return None
    offset = np.zeros(1, np.int32) if zeros is None else zeros.astype(np.int32).reshape(-1)
    exact: np.ndarray = weights.astype(np.int32) - offset.reshape(-1, *[1] * (weights.ndim - 1))
    return exact


def _product(
    site: Site, x: Any, zero: int, weights: np.ndarray, bias_at: int | None, groups: int, geometry: Windows
) -> Any:
    shape = shape_of(x)
    maps = weights.shape[0]
    # One spatial axis is a line.
    line = [1] * (4 - len(shape))
    lead = [0] * len(line)
    x = site.reshape(x, [shape[0], *line, *shape[1:]]) if line else x
    strides, dilations = [*line, *geometry.strides], [*line, *geometry.dilations]
    before, kernel = [*lead, *geometry.before], [*line, *geometry.kernel]
    split = weights.reshape(groups, maps // groups, weights.shape[1], *kernel)

    def pack(group: int) -> np.ndarray:
        block = integer_contraction.column_block(site.target, maps // groups)
        return np.stack([integer_contraction.pack_filters(filters, dilations, group, block) for filters in split])

    channels = weights.shape[1]
    out = [*line, *geometry.out]
    fixed = groups == 1 and all(isinstance(size, int) for size in out)
    magnitude = integer_winograd.magnitude(weights)
    suits = fixed and integer_winograd.suits(kernel, strides, dilations, channels, maps)
    if suits and integer_winograd.pays(site.target, out, maps, magnitude):
        packed, notes = pack(integer_contraction.PAIR), dict[str, list[int]]()
    else:
        number = known_zero(site, zero)
        taps = kernel[0] if integer_contraction.merged(kernel, dilations, channels) else kernel[0] * kernel[1]
        packed, notes = integer_window.pack(site.target, str(x.ty.dtype), number, channels, pack, taps)
    w = site.weight(packed, "packed")
    subtract, points = zero_point(site, zero, None)
    bias = [] if bias_at is None else [site.tensor(bias_at)]

    def compute(a: Any, f: Any, *rest: Any) -> Any:
        y = integer_contraction.conv(
            a,
            f,
            lambda value: subtract(value, (), rest),
            maps=maps,
            groups=groups,
            kernel=kernel,
            strides=strides,
            dilations=dilations,
            before=before,
            out=out,
            magnitude=magnitude,
            notes=notes,
        )
        for term in rest[len(points) :]:
            y = convolution.add_channels(y, term, groups)
        return y

    y = site.emit(compute, x, w, *points, *bias, name="integer_conv", attributes=contraction.FUSIBLE)
    return site.reshape(y, [shape[0], *geometry.out, maps]) if groups > 1 or line else y


def _depthwise(site: Site, x: Any, zero: int, weights: np.ndarray, bias_at: int | None, geometry: Windows) -> Any:
    channels, shape = weights.shape[0], shape_of(x)
    if channels != shape[-1] or channels < least_channels(site.target):
        return _windows(site, x, zero, weights, bias_at, geometry)
    # One spatial axis is a line.
    line, lead = [1] * (4 - len(shape)), [0] * (4 - len(shape))
    x = site.reshape(x, [shape[0], *line, *shape[1:]]) if line else x
    kernel, strides, dilations = ([*line, *v] for v in (geometry.kernel, geometry.strides, geometry.dilations))
    lines = Lines(kernel[0], strides[0], dilations[0], integer_dot.choose(site.target).group)
    w = site.weight(integer_depthwise.pack(weights.reshape(channels, *kernel), lines), "depthwise")
    subtract, points = zero_point(site, zero, None)
    bias = [] if bias_at is None else [site.tensor(bias_at)]

    def compute(a: Any, f: Any, *rest: Any) -> Any:
        y = integer_depthwise.depthwise(
            a,
            f,
            lambda value: subtract(value, (), rest),
            lines=lines,
            kernel=kernel,
            strides=strides,
            dilations=dilations,
            before=[*lead, *geometry.before],
            out=[*line, *geometry.out],
        )
        for term in rest[len(points) :]:
            y = convolution.add_channels(y, term, 1)
        return y

    y = site.emit(compute, x, w, *points, *bias, name="integer_depthwise", attributes=contraction.FUSIBLE)
    return site.reshape(y, [shape[0], *geometry.out, channels]) if line else y


def _windows(site: Site, x: Any, zero: int, weights: np.ndarray, bias_at: int | None, geometry: Windows) -> Any:
    """Convolve depthwise with few channels, or several maps for each: products one by one."""
    narrow = np.int8 if weights.min() >= -128 and weights.max() <= 127 else np.int16
    w = site.weight(np.ascontiguousarray(np.moveaxis(weights[:, 0], 0, -1)).astype(narrow), "depthwise")
    subtract, points = zero_point(site, zero, None)
    bias = [] if bias_at is None else [site.tensor(bias_at)]
    multiplier = weights.shape[0] // shape_of(x)[-1]

    def compute(a: Any, f: Any, *rest: Any) -> Any:
        def term(n: Any, where: Any, ks: Any, m: Any) -> Any:
            value = subtract(a(n, *where, m // multiplier if multiplier > 1 else m).astype("int32"), (), rest)
            return f(*ks, m).astype("int32") * value

        out = [*geometry.out, weights.shape[0]]
        y = convolution.window(
            a,
            term,
            te.sum,
            scalar(0, "int32"),
            geometry.kernel,
            geometry.strides,
            geometry.dilations,
            geometry.before,
            out,
            "depthwise",
        )
        for extra in rest[len(points) :]:
            y = convolution.add_channels(y, extra, 1)
        return y

    return site.emit(compute, x, w, *points, *bias, name="integer_depthwise", attributes=contraction.FUSIBLE)


def _general(
    site: Site, data: tuple[int, int], filters: tuple[int, int], bias_at: int | None, groups: int, geometry: Windows
) -> Any:
    """Convolve ``[N, C, *S]`` of any rank, with weights that need not be known."""
    shape, sizes = site.shape(filters[0]), site.shape(data[0])
    channels, per_group = shape[0], shape[0] // groups
    x = site.check_equal(centered(site, *data), [sizes[0], shape[1] * groups, *sizes[2:]])
    x = padded(site, x, geometry)
    weights = _constant_filters(site, *filters)
    w = site.weight(weights, "filters") if weights is not None else centered(site, *filters, axis=0)
    bias = [] if bias_at is None else [site.tensor(bias_at)]

    def compute(a: Any, f: Any, *b: Any) -> Any:
        y = convolution.conv(
            a,
            f,
            channels=channels,
            groups=groups,
            strides=geometry.strides,
            dilations=geometry.dilations,
            out=geometry.out,
            kernel=shape[2:],
        )
        for term in b:
            y = convolution.add_bias(y, term, 2 if groups > 1 else 1, per_group)
        return y

    y = site.emit(compute, x, w, *bias, name="conv", attributes=contraction.FUSIBLE)
    return site.reshape(y, [sizes[0], channels, *geometry.out]) if groups > 1 else y
