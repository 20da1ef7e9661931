"""Operators whose result is as large as the data says: one kernel counts, the next one writes."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from optc.backends.lowering import imperative
from optc.backends.lowering import index_math as im
from optc.backends.lowering.site import Site, scalar
from optc.backends.lowering.table import Table

TABLE = Table()


@TABLE.lowers("NonZero")
def non_zero(site: Site) -> Any:
    """NonZero-13: the indices of the elements that are not zero, in row-major order."""
    shape, dtype = site.shape(0), site.dtype(0)

    def found(cells: imperative.Cells, index: Any) -> Any:
        value = cells[index]
        return value if dtype == "bool" else value != scalar(0, dtype)

    def count(ins: list[imperative.Cells], outs: list[imperative.Cells]) -> None:
        outs[0][0] = 0
        with imperative.loop(*shape) as index, imperative.when(found(ins[0], index)):
            outs[0][0] = outs[0][0] + 1

    tensor = site.tensor(0)
    counted = site.emit(lambda a: imperative.procedure([a], [([1], "int64")], count, "count"), tensor)
    (total,) = site.bind_shape(counted)

    def write(ins: list[imperative.Cells], outs: list[imperative.Cells]) -> None:
        position = imperative.variable("int64", 0)
        with imperative.loop(*shape) as index, imperative.when(found(ins[0], index)):
            for axis, i in enumerate(index):
                outs[0][axis, position[0]] = i
            position[0] = position[0] + 1

    return site.emit(lambda a: imperative.procedure([a], [([len(shape), total], "int64")], write, "nonzero"), tensor)


@TABLE.lowers("Compress")
def compress(site: Site) -> Any:
    """Compress-11: the slices along ``axis`` (the elements without it) for which the condition holds."""
    tensor, axis = site.tensor(0), site.attr("axis")
    shape = site.shape(0)
    if axis is None:
        shape, axis = [im.product(shape)], 0
        tensor = site.reshape(tensor, shape)
    axis = im.axis_of(axis, len(shape))
    length = im.minimum(site.shape(1)[0], shape[axis])

    def count(ins: list[imperative.Cells], outs: list[imperative.Cells]) -> None:
        outs[0][0] = 0
        with imperative.loop(length) as (k,), imperative.when(ins[0][k]):
            outs[0][0] = outs[0][0] + 1

    condition = site.tensor(1)
    counted = site.emit(lambda c: imperative.procedure([c], [([1], "int64")], count, "count"), condition)
    (total,) = site.bind_shape(counted)
    result = [*shape[:axis], total, *shape[axis + 1 :]]

    def write(ins: list[imperative.Cells], outs: list[imperative.Cells]) -> None:
        position = imperative.variable("int64", 0)
        with imperative.loop(length) as (k,), imperative.when(ins[1][k]):
            with imperative.loop(*shape[:axis]) as lead, imperative.loop(*shape[axis + 1 :]) as rest:
                outs[0][(*lead, position[0], *rest)] = ins[0][(*lead, k, *rest)]
            position[0] = position[0] + 1

    return site.emit(
        lambda a, c: imperative.procedure([a, c], [(result, str(a.dtype))], write, "compress"),
        tensor,
        condition,
    )


@TABLE.lowers("NonMaxSuppression")
def non_max_suppression(site: Site) -> Any:
    """NonMaxSuppression-11: greedy, per batch entry and class, best scores first, ties by lower index."""
    batches, boxes, _ = site.shape(0)
    classes = site.shape(1)[1]
    limit = im.minimum(im.maximum(site.ints(2)[0], 0), boxes) if site.has(2) else 0
    tensors = [site.tensor(0), site.tensor(1)]
    overlap_at = _threshold(site, 3, tensors)
    score_at = _threshold(site, 4, tensors)
    corners = site.attr("center_point_box", 0) == 0
    (capacity,) = site.settle([im.product([batches, classes, limit])])

    def select(ins: list[imperative.Cells], outs: list[imperative.Cells]) -> None:
        box, score = ins[0], ins[1]
        total, chosen = outs
        total[0] = 0
        state = imperative.cells([boxes], "int8", scope="global")
        with imperative.loop(batches, classes) as (b, c):
            with imperative.loop(boxes) as (k,):
                state[k] = 0
                if score_at is not None:
                    state[k] = (score[b, c, k] <= score_at(ins)).astype("int8")
            going = imperative.variable("bool", True)
            with imperative.loop(limit), imperative.when(going[0]):
                best = imperative.variable("int64", -1)
                with imperative.loop(boxes) as (k,), imperative.when(state[k] == 0):
                    better = tirx.if_then_else(best[0] < 0, True, score[b, c, k] > score[b, c, tirx.max(best[0], 0)])
                    best[0] = tirx.if_then_else(better, k, best[0])
                going[0] = best[0] >= 0
                with imperative.when(going[0]):
                    chosen[total[0], 0] = b
                    chosen[total[0], 1] = c
                    chosen[total[0], 2] = best[0]
                    total[0] = total[0] + 1
                    state[best[0]] = 1
                    with imperative.loop(boxes) as (k,), imperative.when(state[k] == 0):
                        overlap = _overlap(box, b, best[0], k, corners)
                        state[k] = (overlap > overlap_at(ins)).astype("int8") if overlap_at else 0 * state[k]

    def compute(*a: Any) -> Any:
        outputs = [([1], "int64"), ([capacity, 3], "int64")]
        return list(imperative.procedure(a, outputs, select, "nms"))

    total, chosen = site.emit(compute, *tensors)
    (found,) = site.bind_shape(total)

    def head(ins: list[imperative.Cells], outs: list[imperative.Cells]) -> None:
        with imperative.loop(found, 3) as index:
            outs[0][index] = ins[0][index]

    return site.emit(lambda a: imperative.procedure([a], [([found, 3], "int64")], head, "head"), chosen)


def _threshold(site: Site, index: int, tensors: list[Any]) -> Any:
    """Return a function from the kernel's inputs to the threshold, or None if there is none."""
    if not site.has(index):
        return None
    tensors.append(site.reshape(site.tensor(index), [1]))
    position = len(tensors) - 1
    return lambda ins: ins[position][0]


def _overlap(box: imperative.Cells, batch: Any, a: Any, b: Any, corners: bool) -> Any:
    """Return intersection over union of two boxes; 0 if the union is empty."""

    def sides(k: Any) -> tuple[Any, Any, Any, Any]:
        v = [box[batch, k, i] for i in range(4)]
        if corners:
            y, x = (tirx.min(v[0], v[2]), tirx.max(v[0], v[2])), (tirx.min(v[1], v[3]), tirx.max(v[1], v[3]))
            return *y, *x
        half_w, half_h = v[2] / 2, v[3] / 2
        return v[1] - half_h, v[1] + half_h, v[0] - half_w, v[0] + half_w

    first, second = sides(a), sides(b)
    zero = tirx.const(0.0, box.dtype)
    height = tirx.max(tirx.min(first[1], second[1]) - tirx.max(first[0], second[0]), zero)
    width = tirx.max(tirx.min(first[3], second[3]) - tirx.max(first[2], second[2]), zero)
    areas = [(s[1] - s[0]) * (s[3] - s[2]) for s in (first, second)]
    shared = height * width
    union = areas[0] + areas[1] - shared
    return tirx.if_then_else(union > zero, shared / tirx.max(union, tirx.const(1e-30, box.dtype)), zero)
