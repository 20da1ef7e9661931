"""GridSample, AffineGrid, DeformConv, RoiAlign and MaxRoiPool."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import te, tirx

from optc.backends.kernels import contraction, convolution, sampling, vector_math
from optc.backends.kernels.interpolation import real
from optc.backends.lowering.emit import as_index, shape_of
from optc.backends.lowering.imperative import loop, procedure, variable
from optc.backends.lowering.site import Site
from optc.backends.lowering.table import Table

TABLE = Table()


@TABLE.lowers("GridSample")
def grid_sample(site: Site) -> Any:
    """GridSample-22: nearest, linear or cubic reading at normalized coordinates, any number of spatial axes."""
    x, grid = site.tensor(0), site.tensor(1)
    shape, points, dtype = shape_of(x), shape_of(grid), str(x.ty.dtype)
    mode = {"bilinear": "linear", "bicubic": "cubic"}.get(str(site.attr("mode", "linear")), site.attr("mode", "linear"))
    padding, align = str(site.attr("padding_mode", "zeros")), bool(site.attr("align_corners", 0))
    sizes, out = shape[2:], [shape[0], shape[1], *points[1:-1]]
    rank = len(sizes)

    def coordinates(g: Any) -> Any:
        def element(*at: Any) -> Any:
            # Coordinates are stored last axis first.
            value = vector_math.convert(g(*at[:-1], (rank - 1) - at[-1]), "float32")
            result = place(value, 0)
            for i in range(1, rank):
                result = tirx.Select(at[-1] == i, place(value, i), result)
            return result

        return te.compute(points, element, "coordinates")

    def place(value: Any, axis: int) -> Any:
        length = as_index(sizes[axis]).astype("float32")
        if align:
            x = (value + real(1)) / real(2) * (length - real(1))
        else:
            x = ((value + real(1)) * length - real(1)) / real(2)
        if mode == "nearest":
            x = tirx.nearbyint(x)
        low, high = sampling.borders(sizes[axis], align)
        outside = tirx.any(x < low, x > high)
        if padding == "border":
            x = tirx.Select(outside, tirx.max(tirx.min(x, length - real(1)), real(0)), x)
        if padding == "reflection":
            x = sampling.reflect(x, low, high)
        # What lies far outside reads nothing; bounded, it converts to an integer.
        return tirx.max(tirx.min(x, length + real(4)), real(-5))

    where = site.emit(coordinates, grid, name="grid_coordinates", attributes={"op_pattern": 8})
    wide = contraction.accumulator(dtype) if "float" in dtype else dtype

    def sample(a: Any, c: Any) -> Any:
        if mode == "nearest":

            def nearest(n: Any, ch: Any, *at: Any) -> Any:
                taps = [(c(n, *at, i).astype("int64"), real(1)) for i in range(rank)]
                return sampling.gather(a, (n, ch), taps, sizes, padding, align, dtype)

            return te.compute(out, nearest, "grid_sample")
        ks = [te.reduce_axis((0, 2 if mode == "linear" else 4), f"k{i}") for i in range(rank)]

        def weighted(n: Any, ch: Any, *at: Any) -> Any:
            taps = [sampling.tap(c(n, *at, i), k, mode) for i, k in enumerate(ks)]
            return te.sum(sampling.gather(a, (n, ch), taps, sizes, padding, align, wide), axis=ks)

        return contraction.narrow(te.compute(out, weighted, "grid_sample"), dtype)

    return site.emit(sample, x, where, name="grid_sample")


@TABLE.lowers("AffineGrid")
def affine_grid(site: Site) -> Any:
    """AffineGrid-20: ``theta`` applied to the homogeneous coordinates of every output pixel."""
    theta, dtype = site.tensor(0), site.dtype(0)
    batch, _, *sizes = site.ints(1)
    rank, align = len(sizes), bool(site.attr("align_corners", 0))
    wide = contraction.accumulator(dtype)

    def place(position: Any, size: Any) -> Any:
        x, n = position.astype(wide), as_index(size).astype(wide)
        one, two = tirx.const(1, wide), tirx.const(2, wide)
        return x * two / (n - one) - one if align else (x * two + one) / n - one

    def compute(t: Any) -> Any:
        def element(n: Any, *at: Any) -> Any:
            row = at[-1]
            total = vector_math.convert(t(n, row, rank), wide)
            for i, size in enumerate(sizes):
                # Columns of theta belong to the axes last one first.
                total = total + vector_math.convert(t(n, row, rank - 1 - i), wide) * place(at[i], size)
            return vector_math.convert(total, dtype)

        return te.compute((batch, *sizes, rank), element, "affine_grid")

    return site.emit(compute, theta, name="affine_grid")


@TABLE.lowers("DeformConv")
def deform_conv(site: Site) -> Any:
    """DeformConv-22: read the image at shifted kernel positions (linear, zeros outside), then a convolution 1x1."""
    x, offset = site.tensor(0), site.tensor(2)
    shape, out, dtype = shape_of(x), site.shape(2)[2:], site.dtype(0)
    filters, rank = site.shape(1), len(shape) - 2
    kernel, groups, shifted = filters[2:], site.attr("group", 1), site.attr("offset_group", 1)
    if not all(isinstance(d, int) for d in (*filters, shape[1])):
        site.unsupported("channels and kernel must be known while compiling")
    strides, dilations = site.attr("strides") or [1] * rank, site.attr("dilations") or [1] * rank
    pads = (site.attr("pads") or [0] * 2 * rank)[:rank]
    count, wide = int(np.prod(kernel)), contraction.accumulator(dtype)
    extra = [site.tensor(4)] if site.has(4) else []

    def read(a: Any, f: Any, *mask: Any) -> Any:
        ks = [te.reduce_axis((0, 2), f"t{i}") for i in range(rank)]

        def element(n: Any, c: Any, q: Any, *at: Any) -> Any:
            group = c // (shape[1] // shifted)
            rest, steps = q, list[Any]()
            for extent in reversed(kernel):
                steps.insert(0, rest % extent)
                rest = rest // extent
            taps = []
            for i in range(rank):
                start = at[i] * strides[i] - pads[i] + steps[i] * dilations[i]
                shift = vector_math.convert(f(n, (group * count + q) * rank + i, *at), "float32")
                taps.append(sampling.tap(start.astype("float32") + shift, ks[i], "linear"))
            value = sampling.gather(a, (n, c), taps, shape[2:], "zeros", True, wide)
            for m in mask:
                value = value * vector_math.convert(m(n, group * count + q, *at), wide)
            return te.sum(value, axis=ks)

        return te.compute((shape[0], shape[1], count, *out), element, "deformed")

    image = site.emit(read, x, offset, *extra, name="deform_read")
    image = site.reshape(image, [shape[0], shape[1] * count, *out])
    depth = [filters[0], filters[1] * count]
    w = site.reshape(site.tensor(1), [*depth, *[1] * rank])
    bias = [site.tensor(3)] if site.has(3) else []
    per_group = filters[0] // groups

    def compute(a: Any, f: Any, *b: Any) -> Any:
        y = _pointwise(a, f, filters[0], groups, out)
        for term in b:
            y = convolution.add_bias(y, term, 2 if groups > 1 else 1, per_group)
        return contraction.narrow(y, dtype)

    y = site.emit(compute, image, w, *bias, name="deform_conv", attributes=contraction.FUSIBLE)
    return site.reshape(y, [shape[0], filters[0], *out])


def _pointwise(a: Any, f: Any, channels: int, groups: int, out: list[Any]) -> Any:
    """Convolve with a kernel of one position."""
    ones = [1] * len(out)
    return convolution.conv(a, f, channels=channels, groups=groups, strides=ones, dilations=ones, out=out, kernel=ones)


@TABLE.lowers("RoiAlign")
def roi_align(site: Site) -> Any:
    """RoiAlign-22: average or maximum of bilinear samples in each bin of each region."""
    x, rois, batches = site.tensor(0), site.tensor(1), site.tensor(2)
    shape, dtype = shape_of(x), site.dtype(0)
    height, width = site.attr("output_height", 1), site.attr("output_width", 1)
    ratio, scale = site.attr("sampling_ratio", 0), float(site.attr("spatial_scale", 1.0))
    half = str(site.attr("coordinate_transformation_mode", "half_pixel")) == "half_pixel"
    average = str(site.attr("mode", "avg")) == "avg"
    out = [site.shape(1)[0], shape[1], height, width]

    def body(ins: list[Any], outs: list[Any]) -> None:
        image, regions, owner = ins

        def edge(n: Any, i: int) -> Any:
            return vector_math.convert(regions[n, i], "float32") * real(scale) - real(0.5 if half else 0.0)

        with loop(out[0]) as (n,):
            bins, counts, starts = [], [], []
            for axis, extent in ((1, height), (0, width)):
                start, end = edge(n, axis), edge(n, axis + 2)
                length = end - start if half else tirx.max(end - start, real(1))
                size = variable("float32", length / real(extent))
                taps = tirx.ceil(length / real(extent)).astype("int64") if ratio <= 0 else as_index(ratio)
                bins.append(size)
                counts.append(variable("int64", taps))
                starts.append(variable("float32", start))
            with loop(out[1], height, width) as (c, ph, pw):
                total, seen = variable("float32", 0.0), variable("bool", False)
                with loop(counts[0][0], counts[1][0]) as at:
                    terms = _bilinear(
                        image,
                        shape,
                        owner[n].astype("int64"),
                        c,
                        [
                            starts[i][0]
                            + p.astype("float32") * bins[i][0]
                            + (t.astype("float32") + real(0.5)) * bins[i][0] / counts[i][0].astype("float32")
                            for i, (p, t) in enumerate(zip((ph, pw), at, strict=True))
                        ],
                    )
                    if average:
                        total[0] = total[0] + terms[0] + terms[1] + terms[2] + terms[3]
                    else:
                        best = tirx.max(tirx.max(terms[0], terms[1]), tirx.max(terms[2], terms[3]))
                        total[0] = tirx.Select(seen[0], tirx.max(total[0], best), best)
                        seen[0] = tirx.const(True, "bool")
                samples = tirx.max(counts[0][0] * counts[1][0], as_index(1)).astype("float32")
                outs[0][n, c, ph, pw] = vector_math.convert(total[0] / samples if average else total[0], dtype)

    return site.emit(
        lambda a, r, b: procedure([a, r, b], [(out, dtype)], lambda i, o: body(i, o), "roi_align"),
        x,
        rois,
        batches,
        name="roi_align",
    )


def _bilinear(image: Any, shape: list[Any], n: Any, c: Any, at: list[Any]) -> list[Any]:
    """Return the four weighted corners around a point; all zero beyond one pixel outside."""
    valid, low, high, weights = [], [], [], []
    for value, size in zip(at, shape[2:], strict=True):
        last = as_index(size) - 1
        valid += [value >= real(-1), value <= as_index(size).astype("float32")]
        value = tirx.max(value, real(0))
        first = tirx.min(value, last.astype("float32")).astype("int64")
        edge = first >= last
        fraction = tirx.Select(edge, real(0), value - first.astype("float32"))
        low.append(first)
        high.append(tirx.Select(edge, first, first + 1))
        weights.append((real(1) - fraction, fraction))
    terms = []
    for i, y in enumerate((low[0], high[0])):
        for j, x in enumerate((low[1], high[1])):
            pixel = vector_math.convert(image[n, c, y, x], "float32")
            terms.append(tirx.if_then_else(tirx.all(*valid), weights[0][i] * weights[1][j] * pixel, real(0)))
    return terms


@TABLE.lowers("MaxRoiPool")
def max_roi_pool(site: Site) -> Any:
    """MaxRoiPool-22: the maximum over each bin of each region ``[batch, x1, y1, x2, y2]``; empty bins give 0."""
    x, rois = site.tensor(0), site.tensor(1)
    shape, dtype = shape_of(x), site.dtype(0)
    height, width = site.attr("pooled_shape")
    scale = float(site.attr("spatial_scale", 1.0))
    out = [site.shape(1)[0], shape[1], height, width]

    def body(ins: list[Any], outs: list[Any]) -> None:
        image, regions = ins

        def edge(n: Any, i: int) -> Any:
            value = vector_math.convert(regions[n, i], "float32") * real(scale)
            return tirx.floor(value + real(0.5)).astype("int64")

        with loop(*out) as (n, c, ph, pw):
            limits = []
            for p, extent, axis in ((ph, height, 2), (pw, width, 1)):
                first, last = edge(n, axis), edge(n, axis + 2)
                size = tirx.max(last - first + 1, as_index(1)).astype("float32") / real(extent)
                stop = as_index(shape[4 - axis])
                low = tirx.floor(p.astype("float32") * size).astype("int64") + first
                high = tirx.ceil((p + 1).astype("float32") * size).astype("int64") + first
                limits.append([variable("int64", tirx.min(tirx.max(v, as_index(0)), stop)) for v in (low, high)])
            best, seen = variable(dtype, 0), variable("bool", False)
            extents = [tirx.max(high[0] - low[0], as_index(0)) for low, high in limits]
            with loop(*extents) as (y, z):
                batch = regions[n, 0].astype("int64")
                value = image[batch, c, limits[0][0][0] + y, limits[1][0][0] + z]
                best[0] = tirx.Select(seen[0], tirx.max(best[0], value), value)
                seen[0] = tirx.const(True, "bool")
            outs[0][n, c, ph, pw] = best[0]

    return site.emit(lambda a, r: procedure([a, r], [(out, dtype)], body, "max_roi_pool"), x, rois, name="max_roi_pool")
