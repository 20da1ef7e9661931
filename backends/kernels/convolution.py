"""Convolution computes: explicit padding, convolution as a contraction, and the scatter of a transposed convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import te, tirx

from optc.backends.kernels.contraction import ROW_BLOCK, accumulator, annotate, widen


def pad(x: Any, before: Sequence[Any], after: Sequence[Any], value: Any) -> Any:
    """Pad the trailing axes of ``x [N, C, *S]`` with ``value``."""
    rank = len(before)
    lead = len(x.shape) - rank
    sizes = x.shape[lead:]
    shape = [*x.shape[:lead], *(b + s + a for b, s, a in zip(before, sizes, after, strict=True))]

    def element(*index: Any) -> Any:
        outer, inner = index[:lead], [i - b for i, b in zip(index[lead:], before, strict=True)]
        inside = [
            c
            for i, s, b, a in zip(inner, sizes, before, after, strict=True)
            for c in ([i >= 0] if _may(b) else []) + ([i < s] if _may(a) else [])
        ]
        loaded = x(*outer, *inner)
        return tirx.if_then_else(tirx.all(*inside), loaded, value) if inside else loaded

    return te.compute(shape, element, "pad")


def _may(amount: Any) -> bool:
    return not (isinstance(amount, int) and amount == 0)


def conv(
    x: Any,
    w: Any,
    *,
    channels: int,
    groups: int,
    strides: Sequence[int],
    dilations: Sequence[int],
    out: Sequence[Any],
    packed: bool,
    kernel: Sequence[Any],
) -> Any:
    """Convolve padded ``x [N, C, *S]``: ``[N, M, *out]``, or ``[N, G, M/G, *out]`` with ``groups`` > 1.

    ``w`` is ``[M, C/G, *K]``, or packed by ``pack_rows`` as ``[G, M/G/6, C/G, *K, 6]``.
    """
    dtype = accumulator(str(x.dtype))
    per_group = channels // groups
    depth = w.shape[2] if packed else w.shape[1]
    c = te.reduce_axis((0, depth), "c")
    # An axis of extent 1 would hide that neighbouring pixels of a 1x1 convolution are neighbours in memory.
    ks = [0 if k == 1 else te.reduce_axis((0, k), f"k{i}") for i, k in enumerate(kernel)]
    reduced = [c, *(k for k in ks if not isinstance(k, int))]
    grouped = groups > 1

    def element(*index: Any) -> Any:
        n, g, m, *pixel = index if grouped else (index[0], 0, *index[1:])
        where = [_at(p, s, k, d) for p, s, k, d in zip(pixel, strides, ks, dilations, strict=True)]
        channel = g * depth + c if grouped else c
        weight = (
            w(g, m // ROW_BLOCK, c, *ks, m % ROW_BLOCK) if packed else w(g * per_group + m if grouped else m, c, *ks)
        )
        return te.sum(widen(weight, dtype) * widen(x(n, channel, *where), dtype), axis=reduced)

    lead = [x.shape[0], groups, per_group] if grouped else [x.shape[0], channels]
    first = len(lead)
    attributes = annotate([first - 1], range(first, first + len(out)), "rows" if packed else "")
    return te.compute((*lead, *out), element, "conv", attrs=attributes)


def _at(pixel: Any, stride: int, k: Any, dilation: int) -> Any:
    start = pixel if stride == 1 else pixel * stride
    return start if isinstance(k, int) else start + k * dilation


def add_bias(y: Any, bias: Any, axis: int, per_group: int) -> Any:
    """Add ``bias [M]`` to ``y`` whose axis ``axis`` is the channel (within the group on axis 1 when ``axis`` is 2)."""

    def element(*index: Any) -> Any:
        channel = index[1] * per_group + index[2] if axis == 2 else index[1]
        return y(*index) + widen(bias(channel), str(y.dtype))

    return te.compute(y.shape, element, "bias")


def spread(x: Any, w: Any, *, maps: int, groups: int, packed: bool) -> Any:
    """Multiply ``x [N, C, *S]`` by every kernel position: ``[N, G, M/G * prod(K), *S]``.

    ``w`` is ``[C, M/G, *K]`` flattened to ``[G, C/G, M/G * prod(K)]``, or that packed by rows ``[G, R/6, C/G, 6]``.
    """
    dtype = accumulator(str(x.dtype))
    depth = w.shape[2] if packed else w.shape[1]
    c = te.reduce_axis((0, depth), "c")

    def element(n: Any, g: Any, r: Any, *pixel: Any) -> Any:
        weight = w(g, r // ROW_BLOCK, c, r % ROW_BLOCK) if packed else w(g, c, r)
        return te.sum(widen(weight, dtype) * widen(x(n, g * depth + c, *pixel), dtype), axis=c)

    sizes = list(x.shape[2:])
    attributes = annotate([2], range(3, 3 + len(sizes)), "rows" if packed else "")
    return te.compute((x.shape[0], groups, maps, *sizes), element, "spread", attrs=attributes)


def gather(
    y: Any,
    bias: Any,
    *,
    channels: int,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    before: Sequence[Any],
    out: Sequence[Any],
    groups: int,
) -> Any:
    """Sum what ``spread`` made into the output of a transposed convolution, ``[N, M, *out]``.

    Output position ``o`` takes kernel position ``k`` of input ``i`` when ``o + before == i * stride + k * dilation``.
    """
    sizes = y.shape[3:]
    per_group = channels // groups
    positions = 1
    for k in kernel:
        positions *= k
    ks = [te.reduce_axis((0, k), f"k{i}") for i, k in enumerate(kernel)]

    def element(n: Any, m: Any, *pixel: Any) -> Any:
        flat: Any = tirx.IntImm("int64", 0)
        checks, where = [], []
        for o, k, extent, s, d, b, size in zip(pixel, ks, kernel, strides, dilations, before, sizes, strict=True):
            shifted = o + b - k * d
            flat = flat * extent + k
            checks += [shifted >= 0, tirx.indexmod(shifted, s) == 0, tirx.indexdiv(shifted, s) < size]
            where.append(tirx.indexdiv(shifted, s))
        value = y(n, m // per_group, (m % per_group) * positions + flat, *where)
        return te.sum(tirx.if_then_else(tirx.all(*checks), value, tirx.const(0, str(y.dtype))), axis=ks)

    total = te.compute((y.shape[0], channels, *out), element, "gather")
    if bias is None:
        return total
    return te.compute(total.shape, lambda *i: total(*i) + widen(bias(i[1]), str(y.dtype)), "bias")


def depthwise(
    x: Any,
    w: Any,
    *,
    channels: int,
    strides: Sequence[int],
    dilations: Sequence[int],
    out: Sequence[Any],
    kernel: Sequence[Any],
    before: Sequence[Any],
    after: Sequence[Any],
) -> Any:
    """Convolve each channel of ``x [N, C, *S]``, padded here, with its own ``M / C`` kernels ``w [M, 1, *K]``."""
    dtype = accumulator(str(x.dtype))
    padded = any(_may(p) for p in (*before, *after))
    image = pad(x, before, after, tirx.const(0, str(x.dtype))) if padded else x
    ks = [te.reduce_axis((0, k), f"k{i}") for i, k in enumerate(kernel)]
    multiplier = channels // int(x.shape[1])

    def element(n: Any, m: Any, *pixel: Any) -> Any:
        where = [p * s + k * d for p, s, k, d in zip(pixel, strides, ks, dilations, strict=True)]
        channel = m // multiplier if multiplier > 1 else m
        return te.sum(widen(w(m, 0, *ks), dtype) * widen(image(n, channel, *where), dtype), axis=ks)

    attributes = {
        "optc.template": "depthwise",
        "optc.strides": list(strides),
        "optc.dilations": list(dilations),
        "optc.multiplier": multiplier,
    }
    return te.compute((x.shape[0], channels, *out), element, "depthwise", attrs=attributes)
