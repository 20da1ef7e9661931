"""Reductions over axes, positions of extremes, running sums and products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import te, tirx

from optc.backends.kernels import reduction
from optc.backends.kernels import vector_math as vm
from optc.backends.kernels.vector_math import convert
from optc.backends.lowering.emit import as_index
from optc.backends.lowering.imperative import Cells, loop, procedure, variable, when
from optc.backends.lowering.pointwise import compute_dtype
from optc.backends.lowering.site import Site
from optc.backends.lowering.table import Table

TABLE = Table()


def constant_axes(site: Site, rank: int) -> list[int] | None:
    """Return the sorted axes that input 1 names, every axis when it names none; None if only a run knows."""
    axes = site.constant(1)
    if site.has(1) and axes is None and site.shape(1) != [0]:
        return None
    named = [] if axes is None else [int(a) % max(rank, 1) for a in axes.reshape(-1)]
    return sorted(named) or list(range(rank))


def reduces_nothing(site: Site) -> bool:
    """Tell whether no axes are given and that means the identity (``noop_with_empty_axes``)."""
    axes = site.constant(1)
    empty = not site.has(1) or (axes is not None and axes.size == 0) or site.shape(1) == [0]
    return bool(site.attr("noop_with_empty_axes", 0)) and empty


def over_axes(shape: Sequence[Any], axes: Sequence[int]) -> tuple[list[Any], list[Any]]:
    """Split ``shape`` into the dimensions that stay and those that are reduced."""
    kept = [d for i, d in enumerate(shape) if i not in axes]
    return kept, [shape[i] for i in axes]


def merge_index(rank: int, axes: Sequence[int], outer: Sequence[Any], inner: Sequence[Any]) -> list[Any]:
    """Return the full index of outer (kept) and inner (reduced) positions."""
    outer_left, inner_left = iter(outer), iter(inner)
    return [next(inner_left) if i in axes else next(outer_left) for i in range(rank)]


class _Reduction:
    """How one operator reduces: the element it accumulates, the operation, and what becomes of the total."""

    def __init__(
        self,
        reducer: Callable[[str], reduction.Reducer],
        before: Callable[[Any], Any] = lambda x: x,
        after: Callable[[Any], Any] = lambda x: x,
        floating: bool = False,
    ) -> None:
        self.reducer = reducer
        self.before = before
        self.after = after
        self.floating = floating


_REDUCTIONS = {
    "ReduceSum": _Reduction(reduction.addition),
    "ReduceMean": _Reduction(reduction.addition),
    "ReduceProd": _Reduction(reduction.multiplication),
    "ReduceMax": _Reduction(reduction.maximum),
    "ReduceMin": _Reduction(reduction.minimum),
    "ReduceL1": _Reduction(reduction.addition, lambda x: tirx.abs(x) if _signed(x) else x),
    "ReduceL2": _Reduction(reduction.addition, lambda x: vm.bind(x, lambda x: x * x), tirx.sqrt, floating=True),
    "ReduceLogSum": _Reduction(reduction.addition, after=vm.log, floating=True),
    "ReduceSumSquare": _Reduction(reduction.addition, lambda x: vm.bind(x, lambda x: x * x)),
}


def _signed(x: Any) -> bool:
    return not vm.dtype_of(x).startswith("uint")


@TABLE.lowers(*_REDUCTIONS)
def reduce(site: Site) -> Any:
    """ReduceSum-13, ReduceMean/Prod/L1/L2/LogSum/SumSquare-18, ReduceMax/Min-20; no elements give the identity."""
    how = _REDUCTIONS[site.op]
    dtype = site.dtype(0)
    work = _accumulator(dtype, how.floating)
    count = _element_count(site) if site.op == "ReduceMean" else None

    def total(value: Any) -> Any:
        if count is not None:
            divisor = convert(count, work)
            return value / divisor if "float" in work else tirx.truncdiv(value, divisor)
        return how.after(value)

    if reduces_nothing(site):
        return _elements(site, lambda x: convert(how.after(how.before(convert(x, work))), dtype))

    def compute(read: reduction.Read, rows: list[Any], extents: list[Any], contiguous: bool) -> Any:
        def element(outer: Any, inner: Any) -> Any:
            return how.before(convert(read(outer, inner), work))

        sums = reduction.reduce(how.reducer(work), element, rows, extents, contiguous=contiguous)
        return te.compute(rows, lambda *i: convert(total(sums(*i)), dtype), site.op.lower())

    return _reduced(site, compute)


@TABLE.lowers("ReduceLogSumExp")
def log_sum_exp(site: Site) -> Any:
    """ReduceLogSumExp-18, shifted by the maximum so that nothing overflows; no elements give minus infinity."""
    dtype = site.dtype(0)
    work = _accumulator(dtype, floating=True)
    if reduces_nothing(site):
        return _elements(site, lambda x: x)

    def compute(read: reduction.Read, rows: list[Any], extents: list[Any], contiguous: bool) -> Any:
        def element(outer: Any, inner: Any) -> Any:
            return convert(read(outer, inner), work)

        top = reduction.reduce(reduction.maximum(work), element, rows, extents, contiguous=contiguous)
        infinity = reduction.limit(work, 1)
        zero = tirx.const(0, work)
        shift = te.compute(rows, lambda *i: tirx.Select(tirx.abs(top(*i)) == infinity, zero, top(*i)), "shift")

        def power(outer: Any, inner: Any) -> Any:
            return vm.exp(vm.bind(element(outer, inner), lambda x: x - shift(*outer)))

        total = reduction.reduce(reduction.addition(work), power, rows, extents, contiguous=contiguous)
        return te.compute(rows, lambda *i: convert(vm.log(total(*i)) + shift(*i), dtype), "reducelogsumexp")

    return _reduced(site, compute)


def _accumulator(dtype: str, floating: bool) -> str:
    if dtype == "bool":
        return "uint8"
    if floating and "float" not in dtype:
        return "float64"
    return compute_dtype(dtype)


def _element_count(site: Site) -> Any:
    shape = site.shape(0)
    axes = constant_axes(site, len(shape))
    count: Any = tirx.IntImm("int64", 1)
    for extent in _extents_at_run(site) if axes is None else [shape[a] for a in axes]:
        count = count * extent
    return count


def _named_at_run(site: Site) -> list[Any]:
    """Return for each axis whether the axes read at run time name it."""
    rank = site.rank(0)
    named: list[Any] = []
    for axis in range(rank):
        condition: Any = tirx.const(False, "bool")
        for value in site.ints(1):
            condition = tirx.Or(condition, tirx.Or(value == axis, value == axis - rank))
        named.append(condition)
    return named


def _extents_at_run(site: Site) -> list[Any]:
    shape = site.shape(0)
    return [
        tirx.Select(named, as_index(dim), as_index(1)) for named, dim in zip(_named_at_run(site), shape, strict=True)
    ]


def _elements(site: Site, function: Callable[[Any], Any]) -> Any:
    return site.emit(lambda x: te.compute(x.shape, lambda *i: function(x(*i)), site.op.lower()), site.tensor(0))


Compute = Callable[[reduction.Read, list[Any], list[Any], bool], Any]


def _reduced(site: Site, compute: Compute) -> Any:
    """Emit ``compute(read, rows, extents, contiguous)`` over the node's axes; gives the kept dimensions back."""
    shape = site.shape(0)
    rank = len(shape)
    axes = constant_axes(site, rank)
    if axes is None:
        return _reduced_at_run(site, compute)
    original = axes
    kept, extents = over_axes(shape, axes)
    tensor = site.tensor(0)
    if len(axes) > 1 and axes == list(range(rank - len(axes), rank)):
        # Trailing axes are one contiguous axis.
        extent: Any = 1
        for dim in extents:
            extent = extent * dim
        tensor, extents, axes, rank = site.reshape(tensor, [*kept, extent]), [extent], [len(kept)], len(kept) + 1

    def whole(x: Any) -> Any:
        def read(outer: Any, inner: Any) -> Any:
            return x(*merge_index(rank, axes, outer, inner))

        return compute(read, kept, extents, bool(axes) and axes[-1] == rank - 1)

    if not axes:
        result = site.emit(lambda x: compute(lambda o, _: x(), [], [1], False), tensor)
    else:
        result = site.emit(whole, tensor)
    if not site.attr("keepdims", 1):
        return result
    return site.reshape(result, [1 if i in original else d for i, d in enumerate(shape)])


def _reduced_at_run(site: Site, compute: Compute) -> Any:
    """Emit a reduction over axes that only a run knows: every axis is both, one of the two with extent 1."""
    shape = site.shape(0)
    named = _named_at_run(site)
    extents = _extents_at_run(site)
    rows = [tirx.Select(condition, as_index(1), as_index(dim)) for condition, dim in zip(named, shape, strict=True)]

    def whole(x: Any) -> Any:
        def read(outer: Any, inner: Any) -> Any:
            return x(*(tirx.Select(n, as_index(i), as_index(o)) for n, i, o in zip(named, inner, outer, strict=True)))

        return compute(read, rows, extents, False)

    result = site.emit(whole, site.tensor(0))
    if site.attr("keepdims", 1):
        return result
    return site.reshape(result, _squeezed(named, shape, len(shape) - len(site.ints(1))))


def _squeezed(named: Sequence[Any], shape: Sequence[Any], count: int) -> list[Any]:
    """Return the ``count`` dimensions that are not named, in order, as expressions."""
    zero = as_index(0)
    dims: list[Any] = [zero] * count
    position: Any = zero
    for condition, dim in zip(named, shape, strict=True):
        for j in range(count):
            here = tirx.And(tirx.Not(condition), position == j)
            dims[j] = dims[j] + tirx.Select(here, as_index(dim), zero)
        position = position + tirx.Select(condition, zero, as_index(1))
    return dims


@TABLE.lowers("ArgMax", "ArgMin")
def arg_extreme(site: Site) -> Any:
    """ArgMax-13, ArgMin-13; a NaN is the extreme, as NumPy has it."""
    shape = site.shape(0)
    axis = site.attr("axis", 0) % len(shape)
    dtype = site.dtype(0)
    work = "uint8" if dtype == "bool" else compute_dtype(dtype)
    rows = [d for i, d in enumerate(shape) if i != axis]

    def compute(x: Any) -> Any:
        return reduction.arg_reduce(
            lambda outer, inner: convert(x(*outer[:axis], inner[0], *outer[axis:]), work),
            rows,
            shape[axis],
            work,
            largest=site.op == "ArgMax",
            last=bool(site.attr("select_last_index", 0)),
            contiguous=axis == len(shape) - 1,
        )

    result = site.emit(compute, site.tensor(0))
    if not site.attr("keepdims", 1):
        return result
    return site.reshape(result, [1 if i == axis else d for i, d in enumerate(shape)])


@TABLE.lowers("CumSum", "CumProd")
def cumulate(site: Site) -> Any:
    """CumSum-14, CumProd-26; the axis may be known only at run time."""
    shape = site.shape(0)
    rank = len(shape)
    dtype = site.dtype(0)
    work = compute_dtype(dtype)
    (axis,) = site.ints(1)
    if isinstance(axis, int):
        axis %= rank
    start = 0 if site.op == "CumSum" else 1
    exclusive, reverse = bool(site.attr("exclusive", 0)), bool(site.attr("reverse", 0))

    def along(k: int, source: Cells, target: Cells) -> None:
        others = [d for i, d in enumerate(shape) if i != k]
        with loop(*others, 1) as outer:
            running = variable(work, tirx.const(start, work))
            with loop(shape[k]) as (step,):
                position = shape[k] - 1 - step if reverse else step
                index = (*outer[:k], position, *outer[k:-1])
                value = convert(source[index], work)
                if exclusive:
                    target[index] = convert(running[0], dtype)
                running[0] = running[0] + value if site.op == "CumSum" else running[0] * value
                if not exclusive:
                    target[index] = convert(running[0], dtype)

    def body(ins: list[Cells], outs: list[Cells]) -> None:
        for k in range(rank):
            if isinstance(axis, int):
                if axis == k:
                    along(k, ins[0], outs[0])
            else:
                with when(tirx.Or(axis == k, axis == k - rank)):
                    along(k, ins[0], outs[0])

    return site.emit(lambda x: procedure([x], [(shape, dtype)], body, site.op.lower()), site.tensor(0))
