"""Resize: one axis at a time, each a table of positions and weights and a gather along the axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from tvm import te, tirx

from optc.backends.kernels import interpolation
from optc.backends.kernels.contraction import accumulator
from optc.backends.kernels.interpolation import Mapping, real
from optc.backends.lowering.emit import as_index, shape_of
from optc.backends.lowering.known import Known
from optc.backends.lowering.layout import channels_last
from optc.backends.lowering.site import Site
from optc.backends.lowering.table import Table

TABLE = Table()
_OPAQUE = {"op_pattern": 8}
_INJECTIVE = {"op_pattern": 2}
"""A gather by a table: TVM cannot see that what follows it element by element can be computed with it."""


@dataclass(frozen=True)
class Axis:
    """One axis to resize. ``scale`` is a number, an expression, or None when it is element ``order`` of a tensor."""

    axis: int
    order: int
    size: Any
    out: Any
    scale: Any


@TABLE.lowers("Resize")
def resize(site: Site) -> Any:
    """Resize-19 with all modes; sizes and scales may be constants, symbolic, or known only at run time."""
    shape, mode = site.shape(0), _text(site, "mode", "nearest")
    listed = site.attr("axes")
    axes = [a % len(shape) for a in listed] if listed is not None else list(range(len(shape)))
    transform = _text(site, "coordinate_transformation_mode", "half_pixel")
    crop = transform == "tf_crop_and_resize"
    plan, scales = _plan(site, shape, axes)
    grows = all(isinstance(axis.scale, float) and axis.scale >= 1 for axis in plan)
    # What leaves the model leaves it channels-first: better turn the smaller tensor. TVM would fuse that with a gather.
    result = site.node.outputs[0]
    leaves = mode != "nearest" and result.is_graph_output() and not result.uses()
    last = site.is_last(0) and not (grows and leaves)
    x = site.last(0) if last else site.tensor(0)
    if grows and not last:
        # The innermost axis, along which vectors have to gather, while there are fewer elements.
        plan = plan[::-1]
    if last:
        order = channels_last(len(shape))
        plan = [replace(axis, axis=order.index(axis.axis)) for axis in plan]
    for axis in plan:
        if not crop and _same(site, axis):
            continue
        x = _resize_axis(site, x, axis, mode, transform, scales, len(axes))
    return Known(last=x) if last else x


def _text(site: Site, name: str, default: str) -> str:
    return str(site.attr(name, default))


def _same(site: Site, axis: Axis) -> bool:
    if axis.scale is None:
        return False
    kept = site.prove_equal(axis.size, axis.out)
    return kept and (not isinstance(axis.scale, float) or axis.scale == 1.0)


def _plan(site: Site, shape: Sequence[Any], axes: Sequence[int]) -> tuple[list[Axis], Any]:
    """Return the axes to resize, and the tensor of scales if only a run knows them."""
    sizes = [shape[a] for a in axes]
    if site.has(3):
        return _from_sizes(site, sizes, axes), None
    if not site.has(2):
        site.unsupported("neither scales nor sizes are given")
    constant = site.constant(2)
    if constant is not None:
        factors = [float(np.float32(v)) for v in constant.reshape(-1)]
        known = site.node.outputs[0].shape
        outs = []
        for axis, size, factor in zip(axes, sizes, factors, strict=True):
            dim = None if known is None else known[axis]
            outs.append(dim if isinstance(dim, int) else _scaled(site, size, factor))
        return [Axis(*item) for item in zip(axes, range(len(axes)), sizes, outs, factors, strict=True)], None
    scales = site.tensor(2)

    def extents(s: Any) -> Any:
        return _vector([tirx.floor(as_index(d).astype("float32") * s(i)).astype("int64") for i, d in enumerate(sizes)])

    outs = site.bind_shape(site.emit(extents, scales, name="resize_sizes", attributes=_OPAQUE), "resized")
    return [Axis(a, i, s, o, None) for i, (a, s, o) in enumerate(zip(axes, sizes, outs, strict=True))], scales


def _scaled(site: Site, size: Any, factor: float) -> Any:
    """Return ``floor(size * factor)``; a symbolic size needs a factor that is a plain fraction."""
    if isinstance(size, int):
        return int(np.floor(np.float32(size) * np.float32(factor)))
    fraction = Fraction(factor).limit_denominator(4096)
    if np.float32(float(fraction)) != np.float32(factor):
        site.unsupported(f"scale {factor} of a symbolic dimension is not a simple fraction")
    return size * fraction.numerator // fraction.denominator


def _from_sizes(site: Site, sizes: Sequence[Any], axes: Sequence[int]) -> list[Axis]:
    outs = site.ints(3)
    policy = _text(site, "keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        return [Axis(a, i, s, o, _ratio(o, s)) for i, (a, s, o) in enumerate(zip(axes, sizes, outs, strict=True))]
    if all(isinstance(v, int) for v in (*sizes, *outs)):
        factors = [o / s for o, s in zip(outs, sizes, strict=True)]
        scale: Any = min(factors) if policy == "not_larger" else max(factors)
        outs = [int(scale * s + 0.5) for s in sizes]
    else:
        scale = _ratio(outs[0], sizes[0])
        pick = tirx.min if policy == "not_larger" else tirx.max
        for o, s in zip(outs[1:], sizes[1:], strict=True):
            scale = pick(_real(scale), _real(_ratio(o, s)))
        rounded = [(_real(scale) * as_index(s).astype("float32") + real(0.5)).astype("int64") for s in sizes]
        found = site.emit(lambda: _vector(rounded), name="resize_sizes", attributes=_OPAQUE)
        outs = site.bind_shape(found, "resized")
    return [Axis(a, i, s, o, scale) for i, (a, s, o) in enumerate(zip(axes, sizes, outs, strict=True))]


def _ratio(out: Any, size: Any) -> Any:
    if isinstance(out, int) and isinstance(size, int):
        return float(np.float32(out) / np.float32(size)) if size else 1.0
    return as_index(out).astype("float32") / as_index(size).astype("float32")


def _real(value: Any) -> Any:
    return real(value) if isinstance(value, float) else value


def _vector(values: Sequence[Any]) -> Any:
    def element(i: Any) -> Any:
        result = values[-1]
        for k in range(len(values) - 2, -1, -1):
            result = tirx.Select(i == k, values[k], result)
        return result

    return te.compute((len(values),), element, "sizes")


def _resize_axis(site: Site, x: Any, axis: Axis, mode: str, transform: str, scales: Any, count: int) -> Any:
    shape = shape_of(x)
    out_shape = [*shape[: axis.axis], axis.out, *shape[axis.axis + 1 :]]
    crop = transform == "tf_crop_and_resize"
    exact = site.has(3) and _text(site, "keep_aspect_ratio_policy", "stretch") == "stretch"
    mapping = Mapping(transform, axis.size, axis.out, exact)
    extra = ([scales] if axis.scale is None else []) + ([site.tensor(1)] if crop else [])

    def coordinate(params: Sequence[Any], o: Any) -> Any:
        scale = params[0](axis.order) if axis.scale is None else _real(axis.scale)
        if not crop:
            return mapping.coordinate(o, scale)
        roi = params[-1]
        start, end = (roi(axis.order + k * count).astype("float32") for k in (0, 1))
        return mapping.coordinate(o, scale, start, end)

    if mode == "nearest":
        rounding = _text(site, "nearest_mode", "round_prefer_floor")

        def pick(*params: Any) -> Any:
            return te.compute(
                (axis.out,),
                lambda o: interpolation.clamp(interpolation.nearest(coordinate(params, o), rounding), axis.size),
                "indices",
            )

        index = site.emit(pick, *extra, name="resize_table", attributes=_OPAQUE)

        def gather(a: Any, i: Any) -> Any:
            return te.compute(
                out_shape, lambda *at: a(*at[: axis.axis], i(at[axis.axis]), *at[axis.axis + 1 :]), "resize"
            )

        x = site.emit(gather, x, index, name="resize", attributes=_INJECTIVE)
    else:
        x = _interpolate(site, x, axis, mode, coordinate, extra, out_shape)
    if not crop:
        return x
    fill = float(site.attr("extrapolation_value", 0.0))

    def outside(a: Any, *params: Any) -> Any:
        def element(*at: Any) -> Any:
            where = coordinate(params, at[axis.axis])
            far = tirx.any(where < real(0), where > (as_index(axis.size) - 1).astype("float32"))
            return tirx.if_then_else(far, tirx.const(fill, "float32").astype(str(a.dtype)), a(*at))

        return te.compute(out_shape, element, "extrapolate")

    return site.emit(outside, x, *extra, name="extrapolate")


def _interpolate(
    site: Site, x: Any, axis: Axis, mode: str, coordinate: Any, extra: Sequence[Any], out_shape: list[Any]
) -> Any:
    reach = 1 if mode == "linear" else 2
    antialias = bool(site.attr("antialias", 0))
    taps: Any = 2 * reach
    shrink: Any = None
    if antialias:
        taps, shrink = _antialias(site, axis, reach, extra)
    exclude = bool(site.attr("exclude_outside", 0))
    a = float(site.attr("cubic_coeff_a", -0.75))

    def table(*params: Any) -> Any:
        return list(
            interpolation.tables(
                lambda o: coordinate(params, o),
                axis.out,
                axis.size,
                taps,
                mode,
                a=a,
                shrink=None if shrink is None else shrink(params),
                exclude=exclude,
            )
        )

    index, weight = site.emit(table, *extra, name="resize_table", attributes=_OPAQUE)
    dtype = str(x.ty.dtype)
    wide = accumulator(dtype) if dtype.startswith(("float", "bfloat")) else "float32"

    def gather(v: Any, i: Any, w: Any) -> Any:
        def term(at: Sequence[Any], t: Any) -> Any:
            o = at[axis.axis]
            value = v(*at[: axis.axis], i(o, t), *at[axis.axis + 1 :])
            return value.astype(wide) * w(o, t).astype(wide)

        if isinstance(taps, int) and taps <= 4:
            total = te.compute(out_shape, lambda *at: sum((term(at, t) for t in range(1, taps)), term(at, 0)), "resize")
        else:
            t = te.reduce_axis((0, taps), "t")
            total = te.compute(out_shape, lambda *at: te.sum(term(at, t), axis=t), "resize")
        return te.compute(out_shape, lambda *at: _saturate(total(*at), dtype), "convert") if wide != dtype else total

    return site.emit(gather, x, index, weight, name="resize")


def _saturate(value: Any, dtype: str) -> Any:
    if dtype.startswith(("float", "bfloat")):
        return value.astype(dtype)
    low, high = tirx.min_value(dtype).astype("float32"), tirx.max_value(dtype).astype("float32")
    return tirx.max(tirx.min(tirx.nearbyint(value), high), low).astype(dtype)


def _antialias(site: Site, axis: Axis, reach: int, extra: Sequence[Any]) -> tuple[Any, Any]:
    """Return the number of taps, and what gives the factor that widens the filter when the axis shrinks."""
    if isinstance(axis.scale, float):
        scale = min(axis.scale, 1.0)
        return _taps(int(np.floor(-reach / scale))), lambda _: real(scale)

    def shrink(params: Sequence[Any]) -> Any:
        return tirx.min(params[0](axis.order) if axis.scale is None else axis.scale, real(1))

    def count(*params: Any) -> Any:
        return _vector([_taps(tirx.floor(real(-reach) / shrink(params)).astype("int64"))])

    found = site.emit(count, *extra, name="resize_taps", attributes=_OPAQUE)
    return site.bind_shape(found, "taps")[0], shrink


def _taps(start: Any) -> Any:
    """Return the even number of taps of a filter that begins ``start`` pixels from its centre."""
    return 2 - 2 * (start + 1)
