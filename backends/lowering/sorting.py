"""TopK and Unique: a heap of what is largest, or a stable merge sort, along an axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import te, tirx

from optc.backends.kernels.vector_math import convert
from optc.backends.lowering import imperative
from optc.backends.lowering import index_math as im
from optc.backends.lowering.emit import as_index, shape_of
from optc.backends.lowering.pointwise import compute_dtype
from optc.backends.lowering.site import Site
from optc.backends.lowering.table import Table

TABLE = Table()


def merge_sort(
    order: imperative.Cells,
    scratch: imperative.Cells,
    count: Any,
    before: Callable[[Any, Any], Any],
) -> None:
    """Sort the first ``count`` positions in ``order`` so that ``before(a, b)`` holds for neighbours; stable.

    ``order`` has to hold 0 .. count-1; bottom-up, O(n log n), with ``scratch`` of the same size.
    """
    width = imperative.variable("int64", 1)
    with imperative.repeat_while(width[0] < as_index(count)):
        start = imperative.variable("int64", 0)
        with imperative.repeat_while(start[0] < as_index(count)):
            middle = imperative.variable("int64", tirx.min(start[0] + width[0], as_index(count)))
            end = imperative.variable("int64", tirx.min(start[0] + width[0] * 2, as_index(count)))
            left = imperative.variable("int64", start[0])
            right = imperative.variable("int64", middle[0])
            with imperative.loop(end[0] - start[0]) as (k,):
                # The right run goes first only if strictly before: equal elements keep their order.
                take_right = tirx.if_then_else(
                    left[0] >= middle[0],
                    True,
                    tirx.if_then_else(
                        right[0] >= end[0],
                        False,
                        before(
                            order[tirx.min(right[0], as_index(count) - 1)],
                            order[tirx.min(left[0], as_index(count) - 1)],
                        ),
                    ),
                )
                chosen = imperative.variable("bool", take_right)
                scratch[start[0] + k] = tirx.if_then_else(chosen[0], order[right[0]], order[left[0]])
                right[0] = right[0] + chosen[0].astype("int64")
                left[0] = left[0] + 1 - chosen[0].astype("int64")
            start[0] = end[0]
        with imperative.loop(count) as (k,):
            order[k] = scratch[k]
        width[0] = width[0] * 2


@TABLE.lowers("TopK")
def top_k(site: Site) -> Any:
    """TopK-24: ties go to the lower index, NaN counts as the largest; always sorted."""
    shape, dtype = site.shape(0), site.dtype(0)
    axis = im.axis_of(site.attr("axis", -1), len(shape))
    largest = bool(site.attr("largest", 1))
    (count,) = site.settle(site.ints(1))
    size = shape[axis]
    result = [*shape[:axis], count, *shape[axis + 1 :]]
    packed = dtype not in _WIDE
    few = packed and not site.prove_equal(count, size) and not (im.known(count, size) and 4 * count >= size)

    def body(ins: list[imperative.Cells], outs: list[imperative.Cells]) -> None:
        order = imperative.cells([count if few else size], "int64", scope="global")
        scratch = order if few else imperative.cells([size], "int64", scope="global")
        with imperative.loop(*shape[:axis]) as outer, imperative.loop(*shape[axis + 1 :]) as inner:

            def at(position: Any) -> Any:
                return ins[0][(*outer, position, *inner)]

            if few:
                _keep_largest(order, count, size, lambda k: _key(at(k), largest))
            else:
                with imperative.loop(size) as (k,):
                    order[k] = _packed(_key(at(k), largest), k) if packed else k
                before = (lambda a, b: a > b) if packed else lambda a, b: _before(at(a), at(b), largest, dtype)
                merge_sort(order, scratch, size, before)
            with imperative.loop(count) as (k,):
                position = imperative.variable("int64", _position(order[k]) if packed else order[k])
                outs[0][(*outer, k, *inner)] = at(position[0])
                outs[1][(*outer, k, *inner)] = position[0]

    return site.emit(
        lambda a: list(imperative.procedure([a], [(result, dtype), (result, "int64")], body, "topk")),
        site.tensor(0),
    )


_WIDE = ("float64", "int64", "uint64")
_LOW = 2**32 - 1
_BLOCK = 64


def _key(value: Any, largest: bool) -> Any:
    """Return ``value``, of at most 32 bits, as an int32: the larger, the further ahead.

    Bits of floats are in order but for the sign; zeros are equal, and NaN is the largest.
    """
    value = _comparable(value)
    kind = str(value.ty.dtype)
    if kind == "float32":
        number = tirx.Select(value == tirx.const(0, kind), tirx.const(0, kind), value)
        bits = tirx.Select(tirx.isnan(value), tirx.const(0x7FC00000, "int32"), tirx.reinterpret("int32", number))
        key = tirx.Select(bits < 0, bits ^ tirx.const(0x7FFFFFFF, "int32"), bits)
    elif kind == "uint32":
        # Not a subtraction in 64 bits: TVM's simplifier does it in 32.
        key = tirx.reinterpret("int32", value) ^ tirx.const(-(2**31), "int32")
    else:
        key = value.astype("int32")
    return key if largest else key ^ tirx.const(-1, "int32")


def _packed(key: Any, position: Any) -> Any:
    """Return ``key`` and its position in one integer; of equal keys the first is the largest."""
    return key.astype("int64") * as_index(_LOW + 1) + (as_index(_LOW) - position)


def _position(packed: Any) -> Any:
    return as_index(_LOW) - (packed & as_index(_LOW))


def _keep_largest(heap: imperative.Cells, count: Any, size: Any, key_at: Callable[[Any], Any]) -> None:
    """Fill ``heap`` with the ``count`` largest of ``size`` keys, packed, descending: O(size log count) at worst.

    The root of the heap is the smallest that is kept. Most keys are below it, so they are looked at by blocks.
    """
    count, size = as_index(count), as_index(size)
    with imperative.loop(tirx.min(count, size)) as (k,):
        item, place = imperative.variable("int64", _packed(key_at(k), k)), imperative.variable("int64", k)
        rising = imperative.variable("bool", k > 0)
        with imperative.repeat_while(rising[0]):
            parent = imperative.variable("int64", tirx.shift_right(place[0] - 1, as_index(1)))
            rising[0] = heap[parent[0]] > item[0]
            with imperative.when(rising[0]):
                heap[place[0]] = heap[parent[0]]
                place[0] = parent[0]
                rising[0] = parent[0] > 0
        heap[place[0]] = item[0]
    with imperative.when(tirx.all(count > 0, count < size)):
        least = imperative.variable("int32", 0)

        def learn() -> None:
            least[0] = tirx.shift_right(heap[0], as_index(32)).astype("int32")

        def offer(key: Any, position: Any) -> None:
            # An equal one that comes later is behind.
            with imperative.when(key > least[0]):
                _sink(heap, count, _packed(key, position))
                learn()

        learn()
        blocks = tirx.floordiv(size - count, as_index(_BLOCK))
        keys, most = imperative.cells([_BLOCK], "int32"), imperative.cells([_BLOCK], "int32")
        with imperative.loop(blocks) as (b,):
            start = count + b * _BLOCK
            with imperative.loop(_BLOCK, kind="vectorized") as (i,):
                keys[i] = key_at(start + i)
            width, source = _BLOCK // 2, keys
            while width:
                with imperative.loop(width, kind="vectorized") as (i,):
                    most[i] = tirx.max(source[i], source[i + width])
                width, source = width // 2, most
            with imperative.when(most[0] > least[0]), imperative.loop(_BLOCK) as (i,):
                offer(keys[i], start + i)
        with imperative.loop(size - count - blocks * _BLOCK) as (k,):
            key, position = imperative.variable("int32", 0), count + blocks * _BLOCK + k
            key[0] = key_at(position)
            offer(key[0], position)
    with imperative.loop(tirx.max(count - 1, as_index(0))) as (k,):
        last, smallest = (imperative.variable("int64", heap[j]) for j in (count - 1 - k, 0))
        _sink(heap, count - 1 - k, last[0])
        heap[count - 1 - k] = smallest[0]


def _sink(heap: imperative.Cells, count: Any, item: Any) -> None:
    """Put ``item`` in place of the root of a heap of ``count``."""
    place = imperative.variable("int64", 0)
    child = imperative.variable("int64", 1)
    with imperative.repeat_while(child[0] < count):
        second = tirx.min(child[0] + 1, count - 1)
        child[0] = tirx.if_then_else(heap[second] < heap[child[0]], second, child[0])
        below = imperative.variable("bool", heap[child[0]] < item)
        with imperative.when(below[0]):
            heap[place[0]] = heap[child[0]]
            place[0] = child[0]
        child[0] = tirx.if_then_else(below[0], place[0] * 2 + 1, count)
    heap[place[0]] = item


def _before(a: Any, b: Any, largest: bool, dtype: str) -> Any:
    a, b = _comparable(a), _comparable(b)
    if not dtype.startswith(("float", "bfloat")):
        return a > b if largest else a < b
    ahead = a > b if largest else a < b
    a_nan, b_nan = tirx.isnan(a), tirx.isnan(b)
    if largest:
        return tirx.all(tirx.Not(b_nan), tirx.any(a_nan, ahead))
    return tirx.all(tirx.Not(a_nan), tirx.any(b_nan, ahead))


@TABLE.lowers("Unique")
def unique(site: Site) -> Any:
    """Unique-11: of elements, or of slices along ``axis``; sorted, or in order of first appearance."""
    tensor, axis = site.tensor(0), site.attr("axis")
    shape = shape_of(tensor)
    if axis is None:
        shape, axis = [im.product(shape)], 0
        tensor = site.reshape(tensor, shape)
    axis = im.axis_of(axis, len(shape))
    # Slices side by side: [outer, entries, inner].
    outer, entries, inner = im.product(shape[:axis]), shape[axis], im.product(shape[axis + 1 :])
    flat = site.reshape(tensor, [outer, entries, inner])
    keep_sorted = bool(site.attr("sorted", 1))

    def group(ins: list[imperative.Cells], outs: list[imperative.Cells]) -> None:
        """Fill the count, and by number: the first entry, how often it occurs; by entry: its number."""
        source = ins[0]
        total, first, counts, inverse = outs
        order = imperative.cells([entries], "int64", scope="global")
        scratch = imperative.cells([entries], "int64", scope="global")

        def order_of(a: Any, b: Any) -> imperative.Cells:
            """Return -1, 0 or 1 in a cell: how entry ``a`` compares to entry ``b``."""
            sign = imperative.variable("int64", 0)
            with imperative.loop(outer, inner) as (o, i), imperative.when(sign[0] == 0):
                x, y = (_comparable(source[o, at, i]) for at in (a, b))
                sign[0] = (x > y).astype("int64") - (x < y).astype("int64")
            return sign

        with imperative.loop(entries) as (k,):
            order[k] = k
            counts[k] = 0
            first[k] = 0
        _sort_entries(order, scratch, entries, order_of)
        total[0] = 0
        with imperative.loop(entries) as (k,):
            fresh = imperative.variable("bool", True)
            with imperative.when(k > 0):
                fresh[0] = order_of(order[k], order[tirx.max(k - 1, 0)])[0] != 0
            with imperative.when(fresh[0]):
                first[total[0]] = order[k]
                total[0] = total[0] + 1
            inverse[order[k]] = total[0] - 1
            counts[total[0] - 1] = counts[total[0] - 1] + 1
        if not keep_sorted:
            _by_appearance(first, counts, inverse, total, scratch, order)

    def compute(a: Any) -> Any:
        outputs = [([1], "int64"), ([entries], "int64"), ([entries], "int64"), ([entries], "int64")]
        return list(imperative.procedure([a], outputs, group, "unique"))

    total, first, counts, inverse = site.emit(compute, flat)
    (found,) = site.bind_shape(total)

    def take(a: Any, at: Any) -> Any:
        return te.compute([as_index(d) for d in (outer, found, inner)], lambda o, k, i: a[o, at[k], i], "take")

    def head(a: Any) -> Any:
        return te.compute([found], lambda k: a[k], "head")

    values = site.reshape(site.emit(take, flat, first), [*shape[:axis], found, *shape[axis + 1 :]])
    return [values, site.emit(head, first), inverse, site.emit(head, counts)][: site.output_count]


def _comparable(value: Any) -> Any:
    """Return a value of the same order that TIR can compare."""
    dtype = str(value.ty.dtype)
    return convert(value, "int8" if dtype == "bool" else compute_dtype(dtype))


def _sort_entries(
    order: imperative.Cells, scratch: imperative.Cells, entries: Any, compare: Callable[[Any, Any], Any]
) -> None:
    """Insertion by halving: stable, and each comparison may take a loop of its own."""
    with imperative.loop(entries) as (k,):
        low = imperative.variable("int64", 0)
        high = imperative.variable("int64", k)
        with imperative.repeat_while(low[0] < high[0]):
            middle = imperative.variable("int64", tirx.floordiv(low[0] + high[0], 2))
            sign = compare(order[middle[0]], k)
            above = imperative.variable("bool", sign[0] > 0)
            high[0] = tirx.if_then_else(above[0], middle[0], high[0])
            low[0] = tirx.if_then_else(above[0], low[0], middle[0] + 1)
        with imperative.loop(k - low[0]) as (shift,):
            order[k - shift] = order[k - shift - 1]
        order[low[0]] = k


def _by_appearance(
    first: imperative.Cells,
    counts: imperative.Cells,
    inverse: imperative.Cells,
    total: imperative.Cells,
    number: imperative.Cells,
    scratch: imperative.Cells,
) -> None:
    """Renumber the groups in the order in which the input shows them."""
    entries = first.shape[0]
    seen = imperative.variable("int64", 0)
    with imperative.loop(entries) as (k,), imperative.when(first[inverse[k]] == k):
        number[inverse[k]] = seen[0]
        seen[0] = seen[0] + 1
    for cells in (first, counts):
        with imperative.loop(total[0]) as (g,):
            scratch[number[g]] = cells[g]
        with imperative.loop(total[0]) as (g,):
            cells[g] = scratch[g]
    with imperative.loop(entries) as (k,):
        inverse[k] = number[inverse[k]]
