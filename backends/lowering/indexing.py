"""Operators that read at positions given by a tensor, or built from the position itself."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import te, tirx

from optc.backends.lowering import imperative
from optc.backends.lowering import index_math as im
from optc.backends.lowering.emit import as_index
from optc.backends.lowering.known import Dequantized
from optc.backends.lowering.site import Site, scalar
from optc.backends.lowering.table import Table

TABLE = Table()


@TABLE.lowers("Gather")
def gather(site: Site) -> Any:
    """Gather-13; negative indices count from the end."""
    data, indices = site.shape(0), site.shape(1)
    axis = im.axis_of(site.attr("axis", 0), len(data))
    fixed = site.constant(1)
    size = data[axis]
    if 0 in indices:
        return _nothing(site, [*data[:axis], *indices, *data[axis + 1 :]])
    constant = site.dequantized(0)
    if constant is not None:
        return _gather_dequantized(site, constant, axis, data, indices)
    if fixed is not None and fixed.size == 1:
        place = im.wrap_negative(int(fixed.reshape(-1)[0]), size)
        row = take_one(site, site.tensor(0), axis, as_index(place))
        return site.reshape(row, [*data[:axis], *indices, *data[axis + 1 :]])
    rank = len(indices)

    def compute(a: Any, at: Any) -> Any:
        def element(*i: Any) -> Any:
            place = im.wrap_negative(at(*i[axis : axis + rank]), size)
            return a(*i[:axis], as_index(place), *i[axis + rank :])

        return te.compute([*a.shape[:axis], *at.shape, *a.shape[axis + 1 :]], element, "gather")

    return site.emit(compute, site.tensor(0), site.tensor(1))


def _gather_dequantized(site: Site, constant: Dequantized, axis: int, data: list[Any], indices: list[Any]) -> Any:
    """Dequantize only what is gathered."""
    tensors, read = constant.parts()
    rank, size = len(indices), data[axis]

    def compute(at: Any, *given: Any) -> Any:
        def element(*i: Any) -> Any:
            place = as_index(im.wrap_negative(at(*i[axis : axis + rank]), size))
            return read([*i[:axis], place, *i[axis + rank :]], *given)

        return te.compute([*data[:axis], *at.shape, *data[axis + 1 :]], element, "gather")

    return site.emit(compute, site.tensor(1), *tensors)


def take_one(site: Site, tensor: Any, axis: int, place: Any) -> Any:
    """Return entry ``place`` of ``tensor`` along ``axis``, without that axis."""

    def compute(a: Any) -> Any:
        kept = [*a.shape[:axis], *a.shape[axis + 1 :]]
        return te.compute(kept, lambda *i: a(*i[:axis], place, *i[axis:]), "take")

    return site.emit(compute, tensor, name="take")


@TABLE.lowers("GatherElements")
def gather_elements(site: Site) -> Any:
    """GatherElements-13."""
    size = site.shape(0)
    axis = im.axis_of(site.attr("axis", 0), len(size))
    if 0 in site.shape(1):
        return _nothing(site, site.shape(1))

    def compute(a: Any, at: Any) -> Any:
        return te.compute(
            at.shape,
            lambda *i: a(*i[:axis], as_index(im.wrap_negative(at(*i), size[axis])), *i[axis + 1 :]),
        )

    return site.emit(compute, site.tensor(0), site.tensor(1))


@TABLE.lowers("GatherND")
def gather_nd(site: Site) -> Any:
    """GatherND-13 with ``batch_dims``; the last dimension of the indices must be a number."""
    data, indices, batch = site.shape(0), site.shape(1), site.attr("batch_dims", 0)
    depth = indices[-1]
    if not isinstance(depth, int):
        site.unsupported("the last dimension of the indices must be known while compiling")
    outer = indices[:-1]
    result = [*outer, *data[batch + depth :]]
    if 0 in result:
        return _nothing(site, result)

    def compute(a: Any, at: Any) -> Any:
        def element(*i: Any) -> Any:
            lead, rest = i[: len(outer)], i[len(outer) :]
            place = [as_index(im.wrap_negative(at(*lead, as_index(k)), data[batch + k])) for k in range(depth)]
            return a(*i[:batch], *place, *rest)

        return te.compute([as_index(d) for d in result], element)

    return site.emit(compute, site.tensor(0), site.tensor(1))


def _nothing(site: Site, shape: list[Any]) -> Any:
    """Return an empty tensor, however large the tensor read is."""
    return site.emit(lambda: te.compute([as_index(d) for d in shape], lambda *_: scalar(0, site.dtype(0)), "empty"))


@TABLE.lowers("OneHot")
def one_hot(site: Site) -> Any:
    """OneHot-11; indices outside of ``-depth .. depth-1`` give rows of the off value."""
    indices = site.shape(0)
    depth_tensor = site.constant(1)
    depth = int(depth_tensor.reshape(-1)[0]) if depth_tensor is not None else site.settle(site.ints(1))[0]
    axis = im.axis_of(site.attr("axis", -1), len(indices) + 1)
    shape = [as_index(d) for d in [*indices[:axis], depth, *indices[axis:]]]

    def compute(at: Any, values: Any) -> Any:
        def element(*i: Any) -> Any:
            index = at(*i[:axis], *i[axis + 1 :]).astype("int64")
            index = tirx.Select(index < 0, index + as_index(depth), index)
            return tirx.Select(index == i[axis], values[1], values[0])

        return te.compute(shape, element)

    return site.emit(compute, site.tensor(0), site.tensor(2))


@TABLE.lowers("Trilu")
def trilu(site: Site) -> Any:
    """Trilu-14: keep the upper or lower triangle, shifted by ``k``."""
    upper = site.attr("upper", 1)
    offset = site.ints(1)[0] if site.has(1) else 0

    def compute(a: Any) -> Any:
        def element(*i: Any) -> Any:
            keep = i[-1] - i[-2] >= offset if upper else i[-1] - i[-2] <= offset
            return tirx.if_then_else(keep, a(*i), scalar(0, str(a.dtype)))

        return te.compute(a.shape, element)

    return site.emit(compute, site.tensor(0))


@TABLE.lowers("EyeLike")
def eye_like(site: Site) -> Any:
    """EyeLike-22: ones on diagonal ``k``."""
    offset, dtype = site.attr("k", 0), site.output_dtype()
    shape = [as_index(d) for d in site.shape(0)]

    def compute() -> Any:
        return te.compute(shape, lambda i, j: tirx.Select(j - i == offset, scalar(1, dtype), scalar(0, dtype)), "eye")

    return site.emit(compute)


@TABLE.lowers("DepthToSpace")
def depth_to_space(site: Site) -> Any:
    """DepthToSpace-13, modes DCR and CRD."""
    n, c, h, w = site.shape(0)
    block, crd = site.attr("blocksize"), site.attr("mode", "DCR") == "CRD"
    depth = im.floor_div(c, block * block)

    def compute(a: Any) -> Any:
        def element(b: Any, k: Any, y: Any, x: Any) -> Any:
            dy, dx = tirx.floormod(y, block), tirx.floormod(x, block)
            inner = dy * block + dx
            channel = k * (block * block) + inner if crd else inner * depth + k
            return a[b, channel, tirx.floordiv(y, block), tirx.floordiv(x, block)]

        return te.compute([as_index(d) for d in (n, depth, h * block, w * block)], element)

    return site.emit(compute, site.tensor(0))


@TABLE.lowers("SpaceToDepth")
def space_to_depth(site: Site) -> Any:
    """SpaceToDepth-13, and the modes DCR and CRD of version 28."""
    n, c, h, w = site.shape(0)
    block, crd = site.attr("blocksize"), site.attr("mode", "DCR") == "CRD"

    def compute(a: Any) -> Any:
        def element(b: Any, k: Any, y: Any, x: Any) -> Any:
            if crd:
                inner, channel = im.floor_mod(k, block * block), im.floor_div(k, block * block)
            else:
                inner, channel = im.floor_div(k, c), im.floor_mod(k, c)
            return a[
                b,
                channel,
                y * block + tirx.floordiv(inner, block),
                x * block + tirx.floormod(inner, block),
            ]

        shape = (n, c * block * block, im.floor_div(h, block), im.floor_div(w, block))
        return te.compute([as_index(d) for d in shape], element)

    return site.emit(compute, site.tensor(0))


@TABLE.lowers("ReverseSequence")
def reverse_sequence(site: Site) -> Any:
    """ReverseSequence-10: reverse the first ``sequence_lens[b]`` steps of each batch entry."""
    batch, time = site.attr("batch_axis", 1), site.attr("time_axis", 0)

    def compute(a: Any, lengths: Any) -> Any:
        def element(*i: Any) -> Any:
            length, step = lengths[i[batch]].astype("int64"), i[time]
            place = tirx.Select(step < length, length - 1 - step, step)
            return a(*[place if axis == time else v for axis, v in enumerate(i)])

        return te.compute(a.shape, element)

    return site.emit(compute, site.tensor(0), site.tensor(1))


@TABLE.lowers("CenterCropPad")
def center_crop_pad(site: Site) -> Any:
    """CenterCropPad-18: crop or pad with zeros around the middle, to given sizes."""
    shape, sizes = site.shape(0), site.ints(1)
    axes = [im.axis_of(a, len(shape)) for a in site.attr("axes", list(range(len(shape))))]
    result, offset = list(shape), [0] * len(shape)
    for axis, size in zip(axes, site.settle(sizes), strict=True):
        result[axis] = size
        # Both cropping and padding leave the smaller half in front.
        surplus = shape[axis] - size
        offset[axis] = im.select(im.less(surplus, 0), 0 - im.floor_div(0 - surplus, 2), im.floor_div(surplus, 2))

    def compute(a: Any) -> Any:
        def element(*i: Any) -> Any:
            place = [v + o for v, o in zip(i, offset, strict=True)]
            inside = [c for axis in axes for c in (place[axis] >= 0, place[axis] < as_index(shape[axis]))]
            return tirx.if_then_else(tirx.all(*inside), a(*place), scalar(0, str(a.dtype)))

        return te.compute([as_index(d) for d in result], element)

    return site.emit(compute, site.tensor(0)) if axes else site.tensor(0)


@TABLE.lowers("Det")
def det(site: Site) -> Any:
    """Det-22 by Gaussian elimination with partial pivoting."""
    shape, dtype = site.shape(0), site.dtype(0)
    size, outer = shape[-1], shape[:-2]

    def body(ins: list[imperative.Cells], outs: list[imperative.Cells]) -> None:
        work = imperative.cells([size, size], dtype, scope="global")
        pivot = imperative.cells([1], "int64")
        with imperative.loop(*outer) as lead:
            with imperative.loop(size, size) as (i, j):
                work[i, j] = ins[0][(*lead, i, j)]
            outs[0][lead] = 1
            with imperative.loop(size) as (k,):
                pivot[0] = k
                with (
                    imperative.loop(size - k - 1) as (r,),
                    imperative.when(tirx.abs(work[k + 1 + r, k]) > tirx.abs(work[pivot[0], k])),
                ):
                    pivot[0] = k + 1 + r
                with imperative.when(pivot[0] != k):
                    with imperative.loop(size) as (j,):
                        held = imperative.variable(dtype, work[k, j])
                        work[k, j] = work[pivot[0], j]
                        work[pivot[0], j] = held[0]
                    outs[0][lead] = scalar(0, dtype) - outs[0][lead]
                outs[0][lead] = outs[0][lead] * work[k, k]
                with imperative.when(work[k, k] != 0), imperative.loop(size - k - 1) as (r,):
                    row = k + 1 + r
                    factor = imperative.variable(dtype, work[row, k] / work[k, k])
                    with imperative.loop(size) as (j,):
                        work[row, j] = work[row, j] - factor[0] * work[k, j]

    return site.emit(lambda a: imperative.procedure([a], [(outer, dtype)], body, "det"), site.tensor(0))


@TABLE.lowers("TensorScatter")
def tensor_scatter(site: Site) -> Any:
    """TensorScatter-24: write new steps into a cache along ``axis``, from each batch entry's position on."""
    cache, update = site.shape(0), site.shape(1)
    axis = im.axis_of(site.attr("axis", -2), len(cache))
    circular = site.attr("mode", "linear") == "circular"
    size, steps = cache[axis], update[axis]

    def compute(a: Any, new: Any, *start: Any) -> Any:
        def element(*i: Any) -> Any:
            first = start[0][i[0]].astype("int64") if start else as_index(0)
            step = i[axis] - first
            if circular:
                step = im.floor_mod(step, size)
            place = [step if k == axis else v for k, v in enumerate(i)]
            return tirx.if_then_else(tirx.all(step >= 0, step < as_index(steps)), new(*place), a(*i))

        return te.compute(a.shape, element)

    tensors = [site.tensor(k) for k in range(3) if site.has(k)]
    return site.emit(compute, *tensors)


@TABLE.lowers("BitCast")
def bit_cast(site: Site) -> Any:
    """BitCast-26 between types of the same width."""
    target = site.output_dtype()
    source = site.dtype(0)

    def element(value: Any) -> Any:
        # A bool is a byte that holds 0 or 1.
        if source == "bool":
            value = value.astype("uint8")
        if target == "bool":
            return tirx.reinterpret("uint8", value) != scalar(0, "uint8")
        return tirx.reinterpret(target, value)

    return site.emit(lambda a: te.compute(a.shape, lambda *i: element(a(*i))), site.tensor(0))


@TABLE.lowers("ConstantOfShape")
def constant_of_shape(site: Site) -> Any:
    """ConstantOfShape-25."""
    value = site.attr("value", np.zeros(1, "float32")).reshape(-1)[0].item()
    dtype = site.output_dtype()
    shape = [as_index(d) for d in site.settle(site.ints(0))]
    return site.emit(lambda: te.compute(shape, lambda *_: scalar(value, dtype), "fill"))


@TABLE.lowers("Shape", "Size")
def shape(site: Site) -> Any:
    """Shape-25 and Size-25 as a tensor; symbolic evaluation usually needs none."""
    dims = site.shape(0)
    if site.op == "Size":
        return site.lowerer.materialize(np.array(im.product(dims), dtype=object), "int64")
    chosen = dims[slice(site.attr("start", 0), site.attr("end", len(dims)))]
    return site.lowerer.materialize(np.array(chosen, dtype=object), "int64")


@TABLE.lowers("Range")
def range_(site: Site) -> Any:
    """Range-11; its length is a symbolic expression, or read from the operands at run time."""
    dtype = site.output_dtype()
    fixed = [site.constant(k) for k in range(3)]
    known: list[Any] = [None if f is None else f.reshape(-1)[0].item() for f in fixed]
    if all(k is not None for k in known):
        start, limit, delta = (k for k in known)
        length: Any = max(0, int(np.ceil((limit - start) / delta)))
    elif dtype.startswith("int"):
        start, limit, delta = (site.ints(k)[0] for k in range(3))
        up = im.less(0, delta)
        step = im.maximum(im.select(up, delta, 0 - delta), 1)
        distance = im.select(up, limit - start, start - limit)
        length = im.maximum(im.ceil_div(distance, step), 0)
        if site.nonnegative(distance):
            length = im.ceil_div(distance, step)
        (length,) = site.settle([site.simplify(length)])
    else:
        return _float_range(site, dtype)

    def compute() -> Any:
        first = scalar(start, dtype) if isinstance(start, int | float) else start.astype(dtype)
        step = scalar(delta, dtype) if isinstance(delta, int | float) else delta.astype(dtype)
        return te.compute([as_index(length)], lambda i: first + i.astype(dtype) * step, "range")

    return site.emit(compute)


def _float_range(site: Site, dtype: str) -> Any:
    operands = [site.reshape(site.tensor(k), [1]) for k in range(3)]

    def count(start: Any, limit: Any, delta: Any) -> Any:
        def element(_: Any) -> Any:
            steps = tirx.ceil((limit[0] - start[0]).astype("float64") / delta[0].astype("float64"))
            return tirx.max(steps, tirx.const(0.0, "float64")).astype("int64")

        return te.compute([as_index(1)], element, "count")

    (length,) = site.bind_shape(site.emit(count, *operands))
    return site.emit(
        lambda start, _, delta: te.compute([length], lambda i: start[0] + i.astype(dtype) * delta[0], "range"),
        *operands,
    )
