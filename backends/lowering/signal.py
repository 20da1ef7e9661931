"""DFT, STFT, MelWeightMatrix and Col2Im.

Transforms are sums over a table of roots of unity, O(n) a value: those of known length have become products before.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import te, tirx

from optc.backends.lowering import imperative
from optc.backends.lowering import index_math as im
from optc.backends.lowering.emit import as_index
from optc.backends.lowering.site import Site, scalar
from optc.backends.lowering.table import Table

TABLE = Table()


def _roots(site: Site, length: Any, sign: int, dtype: str) -> Any:
    """Return ``[length, 2]``: cosine and sine of ``sign * 2 pi k / length``, accurate to ``dtype``."""

    def element(k: Any, part: Any) -> Any:
        angle = k.astype("float64") * scalar(sign * 2 * math.pi, "float64") / as_index(length).astype("float64")
        return tirx.if_then_else(part == 0, tirx.cos(angle), tirx.sin(angle)).astype(dtype)

    return site.emit(lambda: te.compute([as_index(length), as_index(2)], element, "roots"), name="roots")


def _term(re: Any, imaginary: Any, roots: Any, power: Any, part: Any) -> Any:
    """Return the real (``part`` 0) or imaginary part of ``(re + i imaginary) * root ** power``."""
    c, s = roots[power, as_index(0)], roots[power, as_index(1)]
    if imaginary is None:
        return re * tirx.Select(part == 0, c, s)
    return re * tirx.Select(part == 0, c, s) + imaginary * tirx.Select(part == 0, -s, c)


@TABLE.lowers("DFT")
def dft(site: Site) -> Any:
    """DFT-20: real or complex, inverse, one-sided in both directions; the axis must be known."""
    shape, dtype = site.shape(0), site.dtype(0)
    if dtype not in ("float32", "float64"):
        site.unsupported(f"type {dtype} is not supported")
    chosen = site.constant(2) if site.has(2) else None
    if site.has(2) and chosen is None:
        site.unsupported("the axis must be known while compiling")
    axis = im.axis_of(-2 if chosen is None else int(chosen.reshape(-1)[0]), len(shape))
    inverse, onesided = bool(site.attr("inverse", 0)), bool(site.attr("onesided", 0))
    if not isinstance(shape[-1], int):
        site.unsupported("whether the input is complex must be known while compiling")
    back = inverse and onesided
    length = 2 * (shape[axis] - 1) if back else shape[axis]
    if site.has(1):
        (length,) = site.settle(site.ints(1))
    half = im.floor_div(length, 2) + 1
    used = im.minimum(shape[axis], half if back else length)
    result = [*shape[:-1], 1 if back else 2]
    result[axis] = half if onesided and not inverse else length

    def compute(x: Any, roots: Any) -> Any:
        k = te.reduce_axis((as_index(0), as_index(used)), "k")

        def read(index: Any, part: int) -> Any:
            return x(*index[:axis], k.var, *index[axis + 1 : -1], as_index(part))

        def element(*i: Any) -> Any:
            power = tirx.indexmod(i[axis] * k.var, as_index(length))
            imaginary = read(i, 1) if shape[-1] == 2 else None
            value = _term(read(i, 0), imaginary, roots, power, i[-1])
            if back:
                # The half that is not given mirrors this one; only the ends have no mirror image.
                alone = tirx.any(k.var == 0, k.var * 2 == as_index(length))
                value = value * tirx.Select(alone, scalar(1, dtype), scalar(2, dtype))
            return te.sum(value, axis=k)

        total = te.compute([as_index(d) for d in result], element, "dft")
        if not inverse:
            return total
        scale = as_index(length).astype(dtype)
        return te.compute(total.shape, lambda *i: total(*i) / scale, "scaled")

    return site.emit(compute, site.tensor(0), _roots(site, length, 1 if inverse else -1, dtype))


@TABLE.lowers("STFT")
def stft(site: Site) -> Any:
    """STFT-17: windowed frames, each transformed."""
    batch, size, parts = site.shape(0)
    dtype = site.dtype(0)
    if dtype not in ("float32", "float64"):
        site.unsupported(f"type {dtype} is not supported")
    (step,) = site.settle(site.ints(1))
    if site.has(3):
        (length,) = site.settle(site.ints(3))
    else:
        length = site.shape(2)[0] if site.has(2) else size
    bins = im.floor_div(length, 2) + 1 if site.attr("onesided", 1) else length
    frames = site.settle([im.floor_div(size - length, step) + 1])[0]
    tensors = [site.tensor(0), _roots(site, length, -1, dtype)]
    if site.has(2):
        tensors.append(site.tensor(2))

    def compute(x: Any, roots: Any, *window: Any) -> Any:
        k = te.reduce_axis((as_index(0), as_index(length)), "k")

        def element(b: Any, frame: Any, f: Any, part: Any) -> Any:
            position = frame * step + k.var
            imaginary = x[b, position, as_index(1)] if im.known(parts) and parts == 2 else None
            power = tirx.indexmod(f * k.var, as_index(length))
            value = _term(x[b, position, as_index(0)], imaginary, roots, power, part)
            return te.sum(value * window[0][k.var] if window else value, axis=k)

        return te.compute([as_index(d) for d in (batch, frames, bins, 2)], element, "stft")

    return site.emit(compute, *tensors)


@TABLE.lowers("MelWeightMatrix")
def mel_weight_matrix(site: Site) -> Any:
    """MelWeightMatrix-17: triangles, equally spaced on the mel scale."""
    dtype = site.output_dtype()
    bands, length = site.settle([*site.ints(0), *site.ints(1)])
    (rate,) = site.ints(2)
    edges = [site.reshape(site.tensor(k), [1]) for k in (3, 4)]
    double = "float64"

    def mel(hertz: Any) -> Any:
        return scalar(2595.0, double) * tirx.log10(scalar(1.0, double) + hertz / scalar(700.0, double))

    def compute(low: Any, high: Any) -> Any:
        first = mel(low[0].astype(double))
        spacing = (mel(high[0].astype(double)) - first) / (as_index(bands) + 2).astype(double)

        def bin_of(index: Any) -> Any:
            value = first + index.astype(double) * spacing
            exponent = value / scalar(2595.0, double) * scalar(math.log(10.0), double)
            hertz = scalar(700.0, double) * (tirx.exp(exponent) - scalar(1.0, double))
            return tirx.floor((as_index(length) + 1).astype(double) * hertz / as_index(rate).astype(double))

        bins = te.compute([as_index(bands) + 2], lambda k: bin_of(k).astype("int64"), "bins")

        def element(row: Any, band: Any) -> Any:
            lower, center, upper = bins[band], bins[band + 1], bins[band + 2]
            rise = (row - lower).astype(double) / tirx.max(center - lower, as_index(1)).astype(double)
            fall = (upper - row).astype(double) / tirx.max(upper - center, as_index(1)).astype(double)
            zero, one = scalar(0.0, double), scalar(1.0, double)
            value = tirx.Select(tirx.all(row >= lower, row <= center), rise, zero)
            value = tirx.Select(tirx.all(row == center, center == lower), one, value)
            return tirx.Select(tirx.all(row >= center, row < upper), fall, value).astype(dtype)

        return te.compute([im.floor_div(as_index(length), 2) + 1, as_index(bands)], element, "mel")

    return site.emit(compute, *edges)


@TABLE.lowers("Col2Im")
def col2im(site: Site) -> Any:
    """Col2Im-18: add the columns of sliding blocks back into an image, any number of axes."""
    image, block = site.settle(site.ints(1)), site.settle(site.ints(2))
    axes, dtype = len(image), site.dtype(0)
    batch, rows, _ = site.shape(0)
    dilations = site.attr("dilations", [1] * axes)
    strides = site.attr("strides", [1] * axes)
    pads = site.attr("pads", [0] * 2 * axes)
    channels = im.floor_div(rows, im.product(block))
    counts = [
        im.floor_div(image[a] + pads[a] + pads[a + axes] - dilations[a] * (block[a] - 1) - 1, strides[a]) + 1
        for a in range(axes)
    ]

    def body(ins: list[imperative.Cells], outs: list[imperative.Cells]) -> None:
        with imperative.loop(batch, channels, *image) as index:
            outs[0][index] = 0
        with (
            imperative.loop(batch, channels) as (n, c),
            imperative.loop(*block) as offset,
            imperative.loop(*counts) as place,
        ):
            target = [
                p * s - pad + o * d
                for p, s, pad, o, d in zip(place, strides, pads[:axes], offset, dilations, strict=True)
            ]
            inside = [test for t, size in zip(target, image, strict=True) for test in (t >= 0, t < size)]
            row = c * im.product(block) + im.flatten(offset, block)
            with imperative.when(tirx.all(*inside)):
                where = (n, c, *target)
                outs[0][where] = outs[0][where] + ins[0][n, row, im.flatten(place, counts)]

    return site.emit(
        lambda a: imperative.procedure([a], [([batch, channels, *image], dtype)], body, "col2im"),
        site.tensor(0),
    )
