"""Convolution computes: explicit padding, convolution as a contraction, and the scatter of a transposed convolution."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tvm import te, tirx

from optc.backends.kernels import loops
from optc.backends.kernels.contraction import accumulator, annotate, widen


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
    kernel: Sequence[Any],
) -> Any:
    """Convolve padded ``x [N, C, *S]``: ``[N, M, *out]``, or ``[N, G, M/G, *out]`` with ``groups`` > 1.

    ``w`` is ``[M, C/G, *K]``.
    """
    dtype = accumulator(str(x.dtype))
    per_group = channels // groups
    depth = w.shape[1]
    c = te.reduce_axis((0, depth), "c")
    # An axis of extent 1 would hide that neighbouring pixels of a 1x1 convolution are neighbours in memory.
    ks = [0 if k == 1 else te.reduce_axis((0, k), f"k{i}") for i, k in enumerate(kernel)]
    reduced = [c, *(k for k in ks if not isinstance(k, int))]
    grouped = groups > 1

    def element(*index: Any) -> Any:
        n, g, m, *pixel = index if grouped else (index[0], 0, *index[1:])
        where = [_at(p, s, k, d) for p, s, k, d in zip(pixel, strides, ks, dilations, strict=True)]
        channel = g * depth + c if grouped else c
        weight = w(g * per_group + m if grouped else m, c, *ks)
        return te.sum(widen(weight, dtype) * widen(x(n, channel, *where), dtype), axis=reduced)

    lead = [x.shape[0], groups, per_group] if grouped else [x.shape[0], channels]
    first = len(lead)
    attributes = annotate([first - 1], range(first, first + len(out)))
    return te.compute((*lead, *out), element, "conv", attrs=attributes)


def conv_last(
    x: Any,
    w: Any,
    *,
    channels: int,
    groups: int,
    strides: Sequence[int],
    dilations: Sequence[int],
    out: Sequence[Any],
    last: bool,
    notes: Mapping[str, Any],
) -> Any:
    """Convolve padded ``x``, ``[N, *S, C]`` if ``last``, else ``[N, C, *S]``; ``notes`` are more annotations.

    The result is ``[N, *out, M]``, or ``[N, *out, G, M/G]`` with ``groups`` > 1.

    ``w`` is packed: ``[ceil(M/width), *K, C, width]``, with groups ``[G, ceil(M/G/width), *K, C/G, width]``.
    """
    dtype = accumulator(str(x.dtype))
    grouped, width = groups > 1, w.shape[-1]
    lead = 2 if grouped else 1
    depth = w.shape[-2]
    # An axis of extent 1 would hide that neighbouring pixels of a 1x1 convolution are neighbours in memory.
    sizes = [int(d) for d in w.shape[lead:-2]]
    ks = [0 if k == 1 else te.reduce_axis((0, k), f"k{i}") for i, k in enumerate(sizes)]
    c = te.reduce_axis((0, depth), "c")
    rank = len(out)

    def element(n: Any, *index: Any) -> Any:
        pixel, g, m = index[:rank], index[rank] if grouped else 0, index[-1]
        where = [_at(p, s, k, d) for p, s, k, d in zip(pixel, strides, ks, dilations, strict=True)]
        channel = g * depth + c if grouped else c
        weight = w(*([g] if grouped else []), m // width, *ks, c, m % width)
        reduced = [*(k for k in ks if not isinstance(k, int)), c]
        pixel_value = x(n, *where, channel) if last else x(n, channel, *where)
        return te.sum(widen(pixel_value, dtype) * widen(weight, dtype), axis=reduced)

    tail = [groups, channels // groups] if grouped else [channels]
    shape = (x.shape[0], *out, *tail)
    attributes = annotate(range(rank + 1), [len(shape) - 1], packed=True) | dict(notes)
    return te.compute(shape, element, "conv", attrs=attributes)


def pad_rows(x: Any, before: Sequence[Any], after: Sequence[Any], value: Any, *, last: bool) -> Any:
    """Pad the spatial axes of ``x``, ``[N, *S, C]`` if ``last``, else ``[N, C, *S]``, row by row.

    A row is what lies together in memory along the last spatial axis: it is filled, or copied between two borders.
    """
    rank, shape = len(before), list(x.shape)
    first = 1 if last else 2
    for i, (b, a) in enumerate(zip(before, after, strict=True)):
        shape[first + i] = shape[first + i] + b + a
    unit = x.shape[-1] if last else 1
    outer = first + rank - 1

    def generate(ins: Any, outs: Any) -> Any:
        source, target = ins[0], outs[0]
        width = source.shape[outer] * unit
        left, right = loops.index(before[-1]) * unit, loops.index(after[-1]) * unit

        def place(buffer: Any, where: Sequence[Any], position: Any) -> Any:
            rest = [position // unit, position % unit] if last else [position]
            return tirx.BufferLoad(buffer, [*where, *rest])

        def put(where: Sequence[Any], position: Any, element: Any) -> Any:
            return tirx.BufferStore(target, element, list(place(target, where, position).indices))

        def row(flat: Any) -> Any:
            where = loops.unravel(flat, target.shape[:outer])
            inner = [w if i < first else w - before[i - first] for i, w in enumerate(where)]
            inside = [
                check
                for i, (b, a) in enumerate(zip(before[:-1], after[:-1], strict=True))
                for check in ([inner[first + i] >= 0] if _may(b) else [])
                + ([inner[first + i] < source.shape[first + i]] if _may(a) else [])
            ]

            def fill(start: Any, count: Any) -> Any:
                return loops.loop("j", count, lambda j: put(where, start + j, value))

            copy = loops.loop("j", width, lambda j: put(where, left + j, place(source, inner, j)))
            copied = loops.sequence(fill(0, left), copy, fill(left + width, right))
            return tirx.IfThenElse(tirx.all(*inside), copied, fill(0, left + width + right)) if inside else copied

        return loops.loop("row", loops.product(target.shape[:outer]), row, "parallel")

    sizes = [loops.index(d) for d in shape]
    return te.extern(
        [sizes],
        [x],
        generate,
        name="pad",
        dtype=[str(x.dtype)],
        in_buffers=[tirx.decl_buffer(x.shape, x.dtype, "x", layout=None)],
        out_buffers=[tirx.decl_buffer(sizes, x.dtype, "y", layout=None)],
    )


def add_channels(y: Any, bias: Any, groups: int) -> Any:
    """Add ``bias [M]`` to ``y [..., M]``, or ``[..., G, M/G]`` with ``groups`` > 1."""

    def element(*index: Any) -> Any:
        channel = index[-2] * y.shape[-1] + index[-1] if groups > 1 else index[-1]
        return y(*index) + widen(bias(channel), str(y.dtype))

    return te.compute(y.shape, element, "bias")


def _at(pixel: Any, stride: int, k: Any, dilation: int) -> Any:
    start = pixel if stride == 1 else pixel * stride
    return start if isinstance(k, int) else start + k * dilation


def add_bias(y: Any, bias: Any, axis: int, per_group: int) -> Any:
    """Add ``bias [M]`` to ``y`` whose axis ``axis`` is the channel (within the group on axis 1 when ``axis`` is 2)."""

    def element(*index: Any) -> Any:
        channel = index[1] * per_group + index[2] if axis == 2 else index[1]
        return y(*index) + widen(bias(channel), str(y.dtype))

    return te.compute(y.shape, element, "bias")


def spread(x: Any, w: Any, *, maps: int, groups: int) -> Any:
    """Multiply ``x [N, *S, C]`` by every kernel position: ``[N, *S, G, maps]`` with ``maps = prod(K) * M/G``.

    ``w`` is packed: ``[G, ceil(maps/width), C/G, width]``.
    """
    dtype, width = accumulator(str(x.dtype)), w.shape[-1]
    c = te.reduce_axis((0, w.shape[-2]), "c")

    def element(*index: Any) -> Any:
        *where, g, j = index
        channel = g * w.shape[-2] + c if groups > 1 else c
        return te.sum(widen(x(*where, channel), dtype) * widen(w(g, j // width, c, j % width), dtype), axis=c)

    rank = len(x.shape) - 1
    attributes = annotate(range(rank), [rank + 1], packed=True)
    return te.compute((*x.shape[:-1], groups, maps), element, "spread", attrs=attributes)


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
    whole: Sequence[bool],
    groups: int,
) -> Any:
    """Sum what ``spread`` made into the output of a transposed convolution, ``[N, *out, M]``.

    Output position ``o`` takes kernel position ``k`` of input ``i`` when ``o + before == i * stride + k * dilation``.
    Without dilation these are every ``stride``-th ``k`` from ``(o + before) % stride`` on. ``whole`` tells of each axis
    whether the output is exactly the input's size times the stride.
    """
    sizes = list(y.shape[1:-2])
    per_group = channels // groups
    steps = [s if d == 1 else 1 for s, d in zip(strides, dilations, strict=True)]
    ks = [te.reduce_axis((0, -(-k // step)), f"k{i}") for i, (k, step) in enumerate(zip(kernel, steps, strict=True))]

    # Every output has one term where windows neither overlap nor leave gaps nor are cut off.
    tiled = [k == s and b == 0 and same for k, s, b, same in zip(kernel, strides, before, whole, strict=True)]

    def one(n: Any, *index: Any) -> Any:
        *pixel, m = index
        flat: Any = tirx.IntImm("int64", 0)
        for o, s in zip(pixel, strides, strict=True):
            flat = flat * s + tirx.indexmod(o, s)
        where = [tirx.indexdiv(o, s) for o, s in zip(pixel, strides, strict=True)]
        if groups == 1:
            return y(n, *where, 0, flat * per_group + m)
        return y(n, *where, m // per_group, flat * per_group + m % per_group)

    def element(n: Any, *index: Any) -> Any:
        *pixel, m = index
        flat: Any = tirx.IntImm("int64", 0)
        checks, where = [], []
        for i, (o, j) in enumerate(zip(pixel, ks, strict=True)):
            k, s, d, step, b, size = kernel[i], strides[i], dilations[i], steps[i], before[i], sizes[i]
            at = o + b
            tap = tirx.indexmod(at, step) + j * step if step > 1 else j
            shifted = at - tap * d
            flat = flat * k + tap
            checks += [tap < k] if k % step else []
            checks += [shifted >= 0, tirx.indexdiv(shifted, s) < size]
            checks += [] if step == s else [tirx.indexmod(shifted, s) == 0]
            where.append(tirx.indexdiv(shifted, s))
        value = y(n, *where, m // per_group, flat * per_group + m % per_group)
        return te.sum(tirx.if_then_else(tirx.all(*checks), value, tirx.const(0, str(y.dtype))), axis=ks)

    total = te.compute((y.shape[0], *out, channels), one if all(tiled) else element, "gather")
    if bias is None:
        return total
    return te.compute(total.shape, lambda *i: total(*i) + widen(bias(i[-1]), str(y.dtype)), "bias")


def depthwise(
    x: Any, w: Any, *, strides: Sequence[int], dilations: Sequence[int], before: Sequence[Any], out: Sequence[Any]
) -> Any:
    """Convolve each channel of ``x [N, *S, C]``, padded with zeros, with its own ``M / C`` kernels ``w [*K, M]``."""
    dtype = accumulator(str(x.dtype))
    multiplier = int(w.shape[-1]) // int(x.shape[-1])

    def term(n: Any, where: Sequence[Any], ks: Sequence[Any], m: Any) -> Any:
        channel = m // multiplier if multiplier > 1 else m
        return widen(w(*ks, m), dtype) * widen(x(n, *where, channel), dtype)

    kernel, zero = list(w.shape[:-1]), tirx.const(0, dtype)
    return window(x, term, te.sum, zero, kernel, strides, dilations, before, [*out, w.shape[-1]], "depthwise")


def window(
    x: Any,
    term: Callable[[Any, Sequence[Any], Sequence[Any], Any], Any],
    reduce: Callable[..., Any],
    identity: Any,
    kernel: Sequence[Any],
    strides: Sequence[int],
    dilations: Sequence[int],
    before: Sequence[Any],
    out: Sequence[Any],
    name: str,
) -> Any:
    """Reduce ``term(n, position, window position, channel)`` over the windows of ``x [N, *S, C]``: ``[N, *out]``.

    ``out`` ends with the channels. Positions outside of the image count as ``identity``.
    """
    ks = [te.reduce_axis((0, k), f"k{i}") for i, k in enumerate(kernel)]
    sizes = list(x.shape[1:-1])
    reach = [
        (o - 1) * s + (k - 1) * d - b
        for o, s, k, d, b in zip(out[:-1], strides, kernel, dilations, before, strict=True)
    ]

    def element(n: Any, *index: Any) -> Any:
        where = [p * s + k * d - b for p, s, k, d, b in zip(index[:-1], strides, ks, dilations, before, strict=True)]
        inside: list[Any] = []
        for at, size, b, most in zip(where, sizes, before, reach, strict=True):
            inside += [at >= 0] if _may(b) else []
            inside += [] if _fits(most, size) else [at < size]
        value = term(n, where, ks, index[-1])
        return reduce(tirx.if_then_else(tirx.all(*inside), value, identity) if inside else value, axis=ks)

    attributes = {"optc.template": "window", "optc.strides": list(strides), "optc.dilations": list(dilations)}
    return te.compute((x.shape[0], *out), element, name, attrs=attributes)


def _fits(most: Any, size: Any) -> bool:
    """Tell whether position ``most`` is inside of ``size`` for sure."""
    number = int(size) if isinstance(size, tirx.IntImm) else size
    return isinstance(most, int) and isinstance(number, int) and most < number
