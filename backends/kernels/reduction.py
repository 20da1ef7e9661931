"""Reductions as tensor expressions that vectorize without a schedule's help.

A reduction along the contiguous axis is a chain of dependent scalar operations. Here it is split in the compute
itself: ``LANES`` partial results over interleaved elements, ``FOLDED`` in short rows (an ordinary spatial axis, which
any schedule vectorizes), then the rest of the row, then the few partial results. The order of operations, and so the
result to the last bit, does not depend on the schedule; rounding errors grow that many times more slowly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import te, tirx

from optc.backends.kernels import vector_math

LANES = 32
"""Partial results per row: four 8-lane registers, enough to hide the latency of an addition."""
FOLDED = 8
"""Partial results that are added one after the other in the end; those before are added as vectors."""

Read = Callable[[tuple[Any, ...], tuple[Any, ...]], Any]
"""``read(outer index, reduced index)`` returns the element to reduce."""


@dataclass(frozen=True)
class Reducer:
    """An associative operation on elements of ``dtype`` and its identity, the result for no elements."""

    combine: Callable[[Any, Any], Any]
    identity: Any
    dtype: str

    def over(self, value: Any, axes: Sequence[Any]) -> Any:
        """Return the te reduction of ``value``."""
        name = "reduce"
        reducer = te.comm_reducer(self.combine, lambda _: self.identity, name=name)
        return reducer(value, axis=list(axes))


def addition(dtype: str) -> Reducer:
    """Return the sum."""
    return Reducer(lambda a, b: a + b, tirx.const(0, dtype), dtype)


def multiplication(dtype: str) -> Reducer:
    """Return the product."""
    return Reducer(lambda a, b: a * b, tirx.const(1, dtype), dtype)


def maximum(dtype: str) -> Reducer:
    """Return the maximum; NaN if an element is NaN, minus infinity (the smallest integer) for no elements."""
    return Reducer(vector_math.maximum, limit(dtype, -1), dtype)


def minimum(dtype: str) -> Reducer:
    """Return the minimum; NaN if an element is NaN, infinity (the largest integer) for no elements."""
    return Reducer(vector_math.minimum, limit(dtype, 1), dtype)


def limit(dtype: str, sign: int) -> Any:
    """Return the largest (``sign`` 1) or smallest (-1) value of ``dtype``."""
    if "float" in dtype:
        return tirx.const(sign * np.inf, dtype)
    if dtype == "bool":
        return tirx.const(sign > 0, "bool")
    info = np.iinfo(dtype)
    if dtype == "uint64" and sign > 0:
        return tirx.max_value("uint64")
    return tirx.const(int(info.max if sign > 0 else info.min), dtype)


def reduce(
    reducer: Reducer,
    read: Read,
    rows: Sequence[Any],
    extents: Sequence[Any],
    *,
    contiguous: bool,
    name: str = "reduced",
) -> Any:
    """Return the te tensor of shape ``rows`` of reductions over ``extents``.

    ``contiguous`` tells that the last extent runs along memory. Extents of 0 give the identity.
    """
    if any(_constant(e) == 0 for e in extents):
        return te.compute(rows, lambda *_: reducer.identity, name)
    last = _constant(extents[-1])
    if not contiguous or (last is not None and last < 2 * FOLDED):
        result = _plain(reducer, read, rows, extents, name)
    else:
        result = _split(reducer, read, rows, extents, last, name)
    empty = [e for e in extents if _constant(e) is None]
    if not empty:
        return result

    def guarded(*index: Any) -> Any:
        # What a reduction over nothing leaves in memory depends on its schedule.
        value = result(*index)
        for extent in empty:
            value = tirx.Select(extent == 0, reducer.identity, value)
        return value

    return te.compute(rows, guarded, name + "_or_identity")


def _plain(reducer: Reducer, read: Read, rows: Sequence[Any], extents: Sequence[Any], name: str) -> Any:
    axes = [te.reduce_axis((0, e), f"k{i}") for i, e in enumerate(extents)]
    return te.compute(rows, lambda *i: reducer.over(read(i, tuple(a.var for a in axes)), axes), name)


def _split(
    reducer: Reducer, read: Read, rows: Sequence[Any], extents: Sequence[Any], last: int | None, name: str
) -> Any:
    extent = extents[-1]
    width = LANES if last is None or last >= 2 * LANES else FOLDED
    whole = tirx.floordiv(extent, width) if last is None else last // width
    rest = extent - whole * width if last is None else last % width
    outer = [te.reduce_axis((0, e), f"k{i}") for i, e in enumerate(extents[:-1])]
    chunk = te.reduce_axis((0, whole), "chunk")

    def partial(*index: Any) -> Any:
        lane = index[-1]
        inner = (*(a.var for a in outer), chunk.var * width + lane)
        return reducer.over(read(index[:-1], inner), [*outer, chunk])

    lanes = folded = te.compute([*rows, width], partial, name + "_lanes")
    if width > FOLDED:
        group = te.reduce_axis((0, width // FOLDED), "group")
        folded = te.compute(
            [*rows, FOLDED],
            lambda *i: reducer.over(lanes(*i[:-1], group.var * FOLDED + i[-1]), [group]),
            name + "_folded",
        )
    lane = te.reduce_axis((0, FOLDED), "lane")
    total = te.compute(rows, lambda *i: reducer.over(folded(*i, lane.var), [lane]), name)
    if last is not None and last % width == 0:
        return total
    others = [te.reduce_axis((0, e), f"r{i}") for i, e in enumerate(extents[:-1])]
    position = te.reduce_axis((0, rest), "rest")

    def remainder(*index: Any) -> Any:
        inner = (*(a.var for a in others), position.var + whole * width)
        return reducer.over(read(index, inner), [*others, position])

    tail = te.compute(rows, remainder, name + "_rest")

    def joined(*index: Any) -> Any:
        if last is not None:
            return reducer.combine(total(*index), tail(*index))
        # Either part of a row of unknown length may be empty.
        first = tirx.Select(whole == 0, reducer.identity, total(*index))
        return reducer.combine(first, tirx.Select(rest == 0, reducer.identity, tail(*index)))

    return te.compute(rows, joined, name + "_total")


def arg_reduce(
    read: Read, rows: Sequence[Any], extent: Any, dtype: str, *, largest: bool, last: bool, contiguous: bool
) -> Any:
    """Return the int64 positions of the largest or smallest elements: the first or last one; NaN beats all.

    Two passes, the extreme and then its position: TVM vectorizes reductions of pairs wrongly.
    """
    extreme = (maximum if largest else minimum)(dtype)
    best = reduce(extreme, read, rows, [extent], contiguous=contiguous, name="best")
    absent = -1 if last else 2**62
    choose = tirx.max if last else tirx.min
    position = Reducer(lambda a, b: choose(a, b), tirx.const(absent, "int64"), "int64")

    def found(outer: Any, inner: Any) -> Any:
        value = read(outer, inner)
        here, nowhere = inner[0].astype("int64"), tirx.const(absent, "int64")
        result = tirx.Select(tirx.EQ(value, best(*outer)), here, nowhere)
        return tirx.Select(vector_math.is_ordered(value), result, here) if "float" in dtype else result

    return reduce(position, found, rows, [extent], contiguous=contiguous, name="position")


def _constant(extent: Any) -> int | None:
    if isinstance(extent, tirx.IntImm):
        return int(extent)
    return extent if isinstance(extent, int) else None
