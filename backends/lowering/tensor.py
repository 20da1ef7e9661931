"""Operators that move elements without looking at them: shapes, transposition, joining, splitting, padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as oir
import tvm_ffi
from tvm import te, tirx

from optc.backends.kernels.loops import product, unravel
from optc.backends.lowering import imperative
from optc.backends.lowering import index_math as im
from optc.backends.lowering.broadcasting import broadcast_shapes, checked, read_index
from optc.backends.lowering.emit import as_index, plain, shape_of
from optc.backends.lowering.known import Known
from optc.backends.lowering.layout import channels_last, permuted
from optc.backends.lowering.site import Site, scalar
from optc.backends.lowering.table import Table

TABLE = Table()


@TABLE.lowers("Reshape")
def reshape(site: Site) -> Any:
    """Reshape-25: 0 copies a dimension unless ``allowzero``, -1 stands for what is left."""
    data, wanted = site.shape(0), site.ints(1)
    if not site.attr("allowzero", 0):
        wanted = [data[i] if im.known(d) and d == 0 and i < len(data) else d for i, d in enumerate(wanted)]
        if any(map(site.is_read, wanted)):
            wanted = [
                im.select(d == 0, data[i], d) if site.is_read(d) and i < len(data) else d for i, d in enumerate(wanted)
            ]
    open_axes = [i for i, d in enumerate(wanted) if im.known(d) and d == -1]
    if open_axes:
        rest = [d for i, d in enumerate(wanted) if i not in open_axes]
        wanted[open_axes[0]] = im.quotient(data, rest)
    elif any(map(site.is_read, wanted)):
        wanted = _with_open_axis(data, wanted)
    if im.known(*data, *wanted) and im.product(data) != im.product(wanted):
        site.impossible(f"shape {data} cannot become {wanted}")
    return reshaped(site, site.settle(wanted))


def reshaped(site: Site, shape: Sequence[Any]) -> Any:
    """Return input 0 with another shape; channels stay last where batch and channels stay as they are."""
    found = site.shape(0)
    if (
        site.is_last(0)
        and len(shape) > 2
        and all(site.prove_equal(a, b) for a, b in zip(found[:2], shape, strict=False))
    ):
        return Known(last=site.reshape(site.last(0), permuted(list(shape), channels_last(len(shape)))))
    return site.reshape(site.tensor(0), shape)


def _with_open_axis(data: Sequence[Any], wanted: Sequence[Any]) -> list[Any]:
    """Replace a -1 that only the run can see."""
    rest = im.product([im.select(im.less(d, 0), 1, d) for d in wanted])
    left = im.floor_div(im.product(data), im.maximum(rest, 1))
    return [im.select(im.less(d, 0), left, d) for d in wanted]


@TABLE.lowers("Flatten")
def flatten(site: Site) -> Any:
    """Flatten-25."""
    shape = site.shape(0)
    axis = im.axis_of(site.attr("axis", 1), len(shape))
    return reshaped(site, [im.product(shape[:axis]), im.product(shape[axis:])])


def _is_axis(which: Any, axis: int, rank: int) -> Any:
    """Tell whether ``which``, maybe negative, maybe read at run time, means ``axis``."""
    if im.known(which):
        return im.axis_of(which, rank) == axis
    return tirx.any(which == axis, which == axis - rank)


@TABLE.lowers("Squeeze")
def squeeze(site: Site) -> Any:
    """Squeeze-25; without axes every dimension that is the number 1 goes, and none may be symbolic."""
    shape = site.shape(0)
    if site.has(1):
        axes = site.ints(1)
    elif all(im.known(d) for d in shape):
        axes = [i for i, d in enumerate(shape) if d == 1]
    else:
        site.unsupported("without axes, the rank of the result depends on symbolic dimensions")
    return reshaped(site, site.settle(_without(site, shape, axes)))


def _without(site: Site, shape: Sequence[Any], axes: Sequence[Any]) -> list[Any]:
    """Return the dimensions of ``shape`` that ``axes`` do not name, in order."""
    rank = len(shape)
    if im.known(*axes):
        gone = {im.axis_of(a, rank) for a in axes}
        if any(im.known(shape[a]) and shape[a] != 1 for a in gone):
            site.impossible(f"shape {list(shape)} cannot lose axes {sorted(gone)}")
        return [d for i, d in enumerate(shape) if i not in gone]
    result: list[Any] = [1] * (rank - len(axes))
    place: Any = 0
    for axis, size in enumerate(shape):
        kept = im.select(tirx.any(*[_is_axis(a, axis, rank) for a in axes]), 0, 1)
        result = [im.select(tirx.all(kept == 1, as_index(place) == k), size, d) for k, d in enumerate(result)]
        place = place + kept
    return result


@TABLE.lowers("Unsqueeze")
def unsqueeze(site: Site) -> Any:
    """Unsqueeze-25."""
    shape, axes = site.shape(0), site.ints(1)
    rank = len(shape) + len(axes)
    if im.known(*axes):
        for axis in sorted(im.axis_of(a, rank) for a in axes):
            shape.insert(axis, 1)
        return reshaped(site, shape)
    result: list[Any] = []
    place: Any = 0
    for axis in range(rank):
        new = tirx.any(*[_is_axis(a, axis, rank) for a in axes])
        size: Any = 1
        for k, d in enumerate(shape):
            size = im.select(as_index(place) == k, d, size)
        result.append(im.select(new, 1, size))
        place = place + im.select(new, 0, 1)
    return site.reshape(site.tensor(0), site.settle(result))


@TABLE.lowers("Transpose")
def transpose(site: Site) -> Any:
    """Transpose-25."""
    shape = site.shape(0)
    order = site.attr("perm") or list(range(len(shape)))[::-1]
    if site.is_last(0):
        axes = channels_last(len(shape))
        return site.lowerer.transpose(site.last(0), [axes.index(axis) for axis in order])
    moved = [axis for axis in order if not (im.known(shape[axis]) and shape[axis] == 1)]
    if moved == sorted(moved):
        return site.reshape(site.tensor(0), [shape[axis] for axis in order])
    inverse = [order.index(axis) for axis in range(len(order))]
    return site.emit(
        lambda a: te.compute([a.shape[p] for p in order], lambda *i: a(*[i[p] for p in inverse])),
        site.tensor(0),
    )


@TABLE.lowers("Concat")
def concat(site: Site) -> Any:
    """Concat-13."""
    return join(site, site.tensors(), im.axis_of(site.attr("axis"), site.rank(0)))


def join(site: Site, tensors: Sequence[Any], axis: int) -> Any:
    """Concatenate: contiguous copies. Many rows are written one by one, each from all inputs."""
    # Empty parts add nothing, and shape arithmetic leaves many.
    tensors = [t for t in tensors if not _is_zero(shape_of(t)[axis])] or [tensors[0]]
    if len(tensors) == 1:
        return tensors[0]
    shapes = [shape_of(t) for t in tensors]
    total: Any = 0
    offsets = []
    for shape in shapes:
        offsets.append(total)
        total = total + shape[axis]
    whole = [*shapes[0][:axis], total, *shapes[0][axis + 1 :]]
    tensors = [
        site.check_equal(t, [*whole[:axis], s[axis], *whole[axis + 1 :]])
        if not all(site.prove_equal(a, b) for i, (a, b) in enumerate(zip(s, whole, strict=True)) if i != axis)
        else t
        for t, s in zip(tensors, shapes, strict=True)
    ]

    def body(ins: list[imperative.Cells], outs: list[imperative.Cells]) -> None:
        leading = [plain(d) for d in whole[:axis]]
        if math.prod(d if isinstance(d, int) else _MANY for d in leading) >= _MANY:
            with imperative.loop(product(leading), kind="parallel") as (row,):
                for source, offset in zip(ins, offsets, strict=True):
                    _copy_run(source, outs[0], axis, offset, unravel(row, leading))
            return
        for source, offset in zip(ins, offsets, strict=True):
            rows = [plain(d) for d in source.shape[: axis + 1]]
            with imperative.loop(product(rows), kind="parallel") as (row,):
                _copy_run(source, outs[0], axis, offset, unravel(row, rows))

    return site.emit(
        lambda *a: imperative.procedure(a, [(whole, str(a[0].dtype))], body, "concat"), *tensors, name="concat"
    )


def _copy_run(source: imperative.Cells, target: imperative.Cells, axis: int, offset: Any, row: Sequence[Any]) -> None:
    """Copy what ``source`` has at the leading indices ``row``, to ``target`` from ``offset`` on along ``axis``."""
    run = [plain(d) for d in source.shape[len(row) :]]

    def element(index: Sequence[Any]) -> None:
        place = [*row, *index]
        place[axis] = place[axis] + offset
        target[place] = source[[*row, *index]]

    known = all(isinstance(d, int) for d in run)
    bits = tvm_ffi.dtype(target.dtype).bits
    lanes = math.gcd(run[-1], _VECTOR_BITS // bits) if run and known and bits >= 8 and target.dtype != "bool" else 1
    # Vectors by name: of nested loops of a known length, LLVM takes the outer one for vectors, with gathers.
    if lanes > 1:
        with (
            imperative.loop(*run[:-1], run[-1] // lanes) as (*middle, last),
            imperative.loop(lanes, kind="vectorized") as (lane,),
        ):
            element([*middle, last * lanes + lane])
    elif run and known:
        with imperative.loop(product(run)) as (flat,):
            element(unravel(flat, run))
    else:
        with imperative.loop(*run) as inner:
            element(inner)


_MANY = 8
"""Rows that are enough to share them out."""
_VECTOR_BITS = 512
"""Of the vectors that are copied; where a target has narrower ones, LLVM divides them."""


@TABLE.lowers("Split")
def split(site: Site) -> Any:
    """Split-18: given sizes, or ``num_outputs`` parts of which the last may be smaller."""
    shape = site.shape(0)
    axis = im.axis_of(site.attr("axis", 0), len(shape))
    if site.has(1):
        sizes = site.settle(site.ints(1))
    else:
        count = site.attr("num_outputs", site.output_count)
        part = im.ceil_div(shape[axis], count)
        sizes = [im.maximum(im.minimum(part, shape[axis] - part * k), 0) for k in range(count)]
    results, offset = [], 0
    for number, size in enumerate(sizes):
        results.append(window(site, axis, offset, size) if site.wants(number) else None)
        offset = offset + size
    return results


def window(site: Site, axis: int, offset: Any, size: Any) -> Any:
    """Return ``size`` entries of input 0 from ``offset`` on along ``axis``."""

    def compute(a: Any) -> Any:
        shape = [*a.shape]
        shape[axis] = as_index(size)
        return te.compute(shape, lambda *i: a(*[v + offset if k == axis else v for k, v in enumerate(i)]), "window")

    return site.emit(compute, site.tensor(0))


@TABLE.lowers("Slice")
def slice_(site: Site) -> Any:
    """Slice-13: clamped starts and ends, negative steps, sizes known now or at run time."""
    shape = site.shape(0)
    starts = site.ints(1)
    extent = _extent(site)
    ends = site.ints(2) if extent is None else [start + extent for start in starts]
    axes = site.ints(3) if site.has(3) else list(range(len(starts)))
    steps = site.ints(4) if site.has(4) else [1] * len(starts)
    first: list[Any] = [0] * len(shape)
    stride: list[Any] = [1] * len(shape)
    result = list(shape)
    for start, end, which, step in zip(starts, ends, axes, steps, strict=True):
        for axis, size in enumerate(shape):
            chosen = _is_axis(which, axis, len(shape))
            if chosen is False:
                continue
            position, count = slice_range(site, start, end, step, size)
            if extent is not None:
                # Both ends are clamped alike, and either counts from the end if it is negative.
                count = im.minimum(count, max(extent, 0))
            first[axis] = im.select(chosen, position, first[axis])
            result[axis] = im.select(chosen, count, result[axis])
            stride[axis] = im.select(chosen, step, stride[axis])
    result = site.settle(result)
    if all(site.prove_equal(a, b) for a, b in zip(result, shape, strict=True)) and all(
        im.known(s) and s == 1 for s in stride
    ):
        return site.tensor(0)

    def compute(a: Any) -> Any:
        return te.compute(
            [as_index(d) for d in result],
            lambda *i: a(*[v * s + f for v, s, f in zip(i, stride, first, strict=True)]),
            "slice",
        )

    return site.emit(compute, site.tensor(0))


def _extent(site: Site) -> int | None:
    """Return by how much the ends of a Slice forwards exceed its starts, where the graph adds them to one value."""
    if site.has(4) and not all(im.known(step) and step == 1 for step in site.ints(4)):
        return None
    (first, start), (last, end) = _base_and_offset(site, site.value(1)), _base_and_offset(site, site.value(2))
    return end - start if first is last else None


def _base_and_offset(site: Site, value: oir.Value) -> tuple[oir.Value, int]:
    """Return what ``value`` is a sum of: another value and an integer."""
    offset = 0
    while (node := value.producer()) is not None and node.domain == "" and node.op_type == "Add":
        a, b = node.inputs
        assert a is not None
        assert b is not None
        known, rest = (
            (site.lowerer.constant(a), b) if site.lowerer.constant(a) is not None else (site.lowerer.constant(b), a)
        )
        if known is None or known.size != 1 or rest.shape is None or len(rest.shape) < known.ndim:
            break
        value, offset = rest, offset + int(known.reshape(-1)[0])
    return value, offset


def slice_range(site: Site, start: Any, end: Any, step: Any, size: Any) -> tuple[Any, Any]:
    """Return the first position and the number of elements of ``start:end:step`` on an axis of ``size``."""
    up = im.less(0, step)
    high = im.select(up, size, size - 1)
    first = _limit(site, start, size, 0, high)
    last = _limit(site, end, size, im.select(up, 0, -1), high)
    distance = site.simplify(im.select(up, last - first, first - last))
    stride = step if im.known(step) and step > 0 else im.maximum(im.select(up, step, 0 - step), 1)
    count = im.ceil_div(distance, stride)
    if not site.nonnegative(distance):
        count = im.maximum(count, 0)
    # Backwards over an empty axis the clamped start, 0, is not an element.
    return first, count if up is True else im.minimum(count, size)


def _limit(site: Site, position: Any, size: Any, low: Any, high: Any) -> Any:
    if im.known(position):
        # What exporters write for "to the end" is a number that no axis reaches.
        if abs(position) >= 2**31 - 1:
            return high if position > 0 else low
        shifted = position + size if position < 0 else position
    elif site.nonnegative(position):
        shifted = position
    else:
        shifted = im.select(im.less(position, 0), position + size, position)
    if not site.nonnegative(high - shifted):
        shifted = im.minimum(shifted, high)
    return shifted if site.nonnegative(shifted - low) else im.maximum(shifted, low)


@TABLE.lowers("Expand")
def expand(site: Site) -> Any:
    """Expand-13: two-sided broadcasting with a shape."""
    data, wanted = site.shape(0), site.ints(1)
    result = site.settle(broadcast_shapes(site, data, wanted))
    tensor = checked(site, site.tensor(0), data, result)
    if len(result) == len(data) and all(site.prove_equal(a, b) for a, b in zip(result, data, strict=True)):
        return tensor

    def compute(a: Any) -> Any:
        return te.compute([as_index(d) for d in result], lambda *i: a(*read_index(site, data, result, i)))

    return site.emit(compute, tensor)


@TABLE.lowers("Tile")
def tile(site: Site) -> Any:
    """Tile-13."""
    shape, repeats = site.shape(0), site.ints(1)
    result = site.settle([im.product([d, r]) for d, r in zip(shape, repeats, strict=True)])

    def position(i: Any, size: Any, repeat: Any) -> Any:
        return i if (im.known(repeat) and repeat == 1) or (im.known(size) and size == 0) else im.floor_mod(i, size)

    def compute(a: Any) -> Any:
        return te.compute(
            [as_index(d) for d in result],
            lambda *i: a(*[as_index(position(*v)) for v in zip(i, shape, repeats, strict=True)]),
        )

    return site.emit(compute, site.tensor(0))


@TABLE.lowers("Pad")
def pad(site: Site) -> Any:
    """Pad-25: constant, reflect, edge, wrap. Negative amounts cut off first, the rest pads what remains."""
    shape = site.shape(0)
    amounts = site.ints(1)
    axes = site.ints(3) if site.has(3) else list(range(len(shape)))
    before: list[Any] = [0] * len(shape)
    after: list[Any] = [0] * len(shape)
    for position, which in enumerate(axes):
        for axis in range(len(shape)):
            chosen = _is_axis(which, axis, len(shape))
            before[axis] = im.select(chosen, amounts[position], before[axis])
            after[axis] = im.select(chosen, amounts[position + len(axes)], after[axis])
    result = site.settle([d + b + e for d, b, e in zip(shape, before, after, strict=True)])
    mode = site.attr("mode", "constant")
    if mode == "constant":
        return _pad_constant(site, before, after, result)
    source: Callable[[Any, Any], Any] = {"reflect": _reflect, "edge": _edge, "wrap": im.floor_mod}[mode]

    def read(axis: int, i: Any) -> Any:
        if _is_zero(before[axis]) and _is_zero(after[axis]):
            return i
        cut, fill = im.maximum(0 - before[axis], 0), im.maximum(before[axis], 0)
        kept = shape[axis] - cut + im.minimum(after[axis], 0)
        return as_index(cut + source(i - fill, kept))

    if any(im.known(d) and d == 0 for d in shape) and 0 not in result:
        site.unsupported(f"mode '{mode}' cannot pad an empty axis")
    return site.emit(
        lambda a: te.compute([as_index(d) for d in result], lambda *i: a(*[read(k, v) for k, v in enumerate(i)])),
        site.tensor(0),
    )


def _pad_constant(site: Site, before: list[Any], after: list[Any], result: list[Any]) -> Any:
    shape = site.shape(0)
    tensors = [site.tensor(0)]
    value = site.constant(2) if site.has(2) else np.zeros(1, "int64")
    if value is None:
        tensors.append(site.reshape(site.tensor(2), [1]))

    def compute(a: Any, *fill: Any) -> Any:
        outside = fill[0][0] if fill else scalar(value.reshape(-1)[0].item(), str(a.dtype))

        def element(*i: Any) -> Any:
            inside: list[Any] = []
            place = []
            for v, size, b, e in zip(i, shape, before, after, strict=True):
                if not _is_zero(b):
                    inside.append(v >= b)
                if not _is_zero(e):
                    inside.append(v - b < size)
                place.append(v - b)
            if not inside:
                return a(*place)
            return tirx.if_then_else(tirx.all(*inside), a(*place), outside)

        return te.compute([as_index(d) for d in result], element)

    return site.emit(compute, *tensors)


def _reflect(i: Any, size: Any) -> Any:
    period = im.maximum(2 * (size - 1), 1)
    folded = im.floor_mod(i, period)
    return im.minimum(folded, 2 * (size - 1) - folded)


def _edge(i: Any, size: Any) -> Any:
    return im.clamp(i, 0, size - 1)


def _is_zero(value: Any) -> bool:
    return isinstance(value, int) and value == 0
