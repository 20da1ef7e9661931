"""MaxPool, AveragePool, LpPool, their global forms, and MaxUnpool."""

from __future__ import annotations

from typing import Any

from tvm import te, tirx

from optc.backends.kernels.contraction import FUSIBLE, accumulator, narrow, widen
from optc.backends.kernels.convolution import window
from optc.backends.lowering.emit import as_index, shape_of
from optc.backends.lowering.imperative import loop, procedure
from optc.backends.lowering.known import Known
from optc.backends.lowering.site import Site, scalar
from optc.backends.lowering.table import Table
from optc.backends.lowering.windows import Windows, windows

TABLE = Table()


@TABLE.lowers("MaxPool")
def max_pool(site: Site) -> Any:
    """MaxPool-22: maximum over windows, padding never wins; optional flat indices of the first maximum."""
    shape, dtype = site.shape(0), site.dtype(0)
    w = _windows(site, shape)
    if not site.wants(1):
        return [Known(last=_max_last(site, w)), None]
    x = site.tensor(0)

    def largest(a: Any) -> Any:
        ks = _axes(w)
        return te.compute(
            (*shape[:2], *w.out),
            lambda n, c, *p: te.max(_read(a, w, n, c, p, ks, tirx.min_value(dtype)), axis=ks),
            "max_pool",
        )

    y = site.emit(largest, x, name="max_pool")
    sizes = shape[2:]
    column_major = bool(site.attr("storage_order", 0))
    big = tirx.max_value("int64")

    def first(a: Any, m: Any) -> Any:
        ks = _axes(w)

        def flat(n: Any, c: Any, *p: Any) -> Any:
            where = _where(w, p, ks)
            position = _flat(where, sizes)
            hit = tirx.all(*_inside(w, where, sizes), a(n, c, *_clamped(where, sizes)) == m(n, c, *p))
            return te.min(tirx.Select(hit, position, big), axis=ks)

        found = te.compute((*shape[:2], *w.out), flat, "first_maximum")

        def position(n: Any, c: Any, *p: Any) -> Any:
            at = found(n, c, *p)
            plane = (n * shape[1] + c) * _count(sizes)
            if not column_major:
                return plane + at
            coordinates: list[Any] = []
            for size in reversed(sizes):
                coordinates.insert(0, tirx.indexmod(at, as_index(size)))
                at = tirx.indexdiv(at, as_index(size))
            return plane + _flat(coordinates[::-1], sizes[::-1])

        return te.compute(found.shape, position, "index")

    return [y, site.emit(first, x, y, name="max_pool_indices")]


def _max_last(site: Site, w: Windows) -> Any:
    dtype = site.dtype(0)

    def largest(a: Any) -> Any:
        def term(n: Any, where: Any, _: Any, c: Any) -> Any:
            return a(n, *where, c)

        shape = [*w.out, a.shape[-1]]
        low = tirx.min_value(dtype)
        return window(a, term, te.max, low, w.kernel, w.strides, w.dilations, w.before, shape, "max_pool")

    return site.emit(largest, site.last(0), name="max_pool", attributes=FUSIBLE)


@TABLE.lowers("AveragePool")
def average_pool(site: Site) -> Any:
    """AveragePool-22: sum over windows divided by the elements counted, padding included or not."""
    shape, dtype = site.shape(0), site.dtype(0)
    sizes, w = shape[2:], _windows(site, shape)
    wide = accumulator(dtype)
    include = bool(site.attr("count_include_pad", 0))

    def average(a: Any) -> Any:
        def term(n: Any, where: Any, _: Any, c: Any) -> Any:
            return widen(a(n, *where, c), wide)

        zero, out = scalar(0, wide), [*w.out, a.shape[-1]]
        total = window(a, term, te.sum, zero, w.kernel, w.strides, w.dilations, w.before, out, "sum_pool")

        def divide(n: Any, *index: Any) -> Any:
            count: Any = tirx.IntImm("int64", 1)
            for i, o in enumerate(index[:-1]):
                count = count * _counted(w, i, o, sizes[i], include)
            return total(n, *index) / count.astype(wide)

        return narrow(te.compute(total.shape, divide, "average"), dtype)

    return Known(last=site.emit(average, site.last(0), name="average_pool", attributes=FUSIBLE))


def _counted(w: Windows, i: int, o: Any, size: Any, include: bool) -> Any:
    """Return how many positions of the window at output ``o`` count on axis ``i``."""
    k, s, d, b, a = w.kernel[i], w.strides[i], w.dilations[i], w.before[i], w.after[i]
    start = o * s - as_index(b)
    end = as_index(size) + (as_index(a) if include else 0)
    stop = tirx.min(as_index(k), tirx.indexdiv(tirx.max(end - start + (d - 1), as_index(0)), d))
    if include:
        return stop
    first = tirx.indexdiv(tirx.max(-start, as_index(0)) + (d - 1), d)
    return tirx.max(stop - first, as_index(1))


@TABLE.lowers("LpPool")
def lp_pool(site: Site) -> Any:
    """LpPool-22: the p-norm over windows."""
    x = site.tensor(0)
    shape, dtype = shape_of(x), str(x.ty.dtype)
    w, p, wide = _windows(site, shape), site.attr("p", 2), accumulator(str(x.ty.dtype))

    def norm(a: Any) -> Any:
        ks = _axes(w)

        def element(n: Any, c: Any, *at: Any) -> Any:
            return te.sum(_power(_read(a, w, n, c, at, ks, scalar(0, wide)), p), axis=ks)

        return narrow(_root(te.compute((*shape[:2], *w.out), element, "lp_pool"), p), dtype)

    return site.emit(norm, x, name="lp_pool")


@TABLE.lowers("GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool")
def global_pool(site: Site) -> Any:
    """Pool each channel to one value."""
    last = site.is_last(0)
    x = site.last(0) if last else site.tensor(0)
    shape, dtype = shape_of(x), str(x.ty.dtype)
    sizes = shape[1:-1] if last else shape[2:]
    wide = accumulator(dtype)
    out = [shape[0], *[1] * len(sizes), shape[-1]] if last else [*shape[:2], *[1] * len(sizes)]
    p = site.attr("p", 2)

    def pool(a: Any) -> Any:
        ks = [te.reduce_axis((0, as_index(d)), f"k{i}") for i, d in enumerate(sizes)]

        def read(*i: Any) -> Any:
            return a(i[0], *ks, i[-1]) if last else a(i[0], i[1], *ks)

        if site.op == "GlobalMaxPool":
            return te.compute(out, lambda *i: te.max(read(*i), axis=ks), "global_max")
        if site.op == "GlobalLpPool":
            total = te.compute(out, lambda *i: te.sum(_power(widen(read(*i), wide), p), axis=ks), "powers")
            return narrow(_root(total, p), dtype)
        total = te.compute(out, lambda *i: te.sum(widen(read(*i), wide), axis=ks), "global_sum")
        count = as_index(_count(sizes)).astype(wide)
        return narrow(te.compute(out, lambda *i: total(*i) / count, "average"), dtype)

    y = site.emit(pool, x, name=site.op)
    return Known(last=y) if last else y


@TABLE.lowers("MaxUnpool")
def max_unpool(site: Site) -> Any:
    """MaxUnpool-22: put each value where its index says, zeros elsewhere; ``output_shape`` reinterprets positions."""
    x, indices = site.tensor(0), site.tensor(1)
    shape, dtype = shape_of(x), str(x.ty.dtype)
    kernel = site.attr("kernel_shape")
    rank = len(kernel)
    strides, pads = site.attr("strides") or [1] * rank, site.attr("pads") or [0] * (2 * rank)
    natural = [
        (d - 1) * s + k - pads[i] - pads[rank + i]
        for i, (d, s, k) in enumerate(zip(shape[2:], strides, kernel, strict=True))
    ]
    out = site.ints(2) if site.has(2) else [*shape[:2], *natural]
    # Indices count positions of the tensor that was pooled, whose planes have the natural size.
    plane = _count(natural)

    def scatter(a: Any, at: Any) -> Any:
        def body(ins: list[Any], outs: list[Any]) -> None:
            values, positions, result = ins[0], ins[1], outs[0]
            with loop(*out) as where:
                result[where] = 0
            with loop(*shape) as where:
                position = positions[where]
                inside = tirx.indexmod(position, as_index(plane))
                coordinates: list[Any] = []
                for size in reversed(natural):
                    coordinates.insert(0, tirx.indexmod(inside, as_index(size)))
                    inside = tirx.indexdiv(inside, as_index(size))
                result[(where[0], where[1], *coordinates)] = values[where]

        return procedure([a, at], [(out, dtype)], body, "max_unpool")

    return site.emit(scatter, x, indices, name="max_unpool")


def _windows(site: Site, shape: list[Any]) -> Windows:
    return windows(site, shape[2:], site.attr("kernel_shape"), ceil=bool(site.attr("ceil_mode", 0)))


def _axes(w: Windows) -> list[Any]:
    return [te.reduce_axis((0, k), f"k{i}") for i, k in enumerate(w.kernel)]


def _where(w: Windows, outer: Any, ks: Any) -> list[Any]:
    return [
        o * s + k * d - as_index(b) for o, s, k, d, b in zip(outer, w.strides, ks, w.dilations, w.before, strict=True)
    ]


def _inside(w: Windows, where: list[Any], sizes: list[Any]) -> list[Any]:
    """Return the checks that a window position is in the tensor, for the axes where it might not be."""
    checks = []
    for i, (at, size) in enumerate(zip(where, sizes, strict=True)):
        if not (isinstance(w.before[i], int) and w.before[i] == 0):
            checks.append(at >= 0)
        reach = (w.out[i] - 1) * w.strides[i] + (w.kernel[i] - 1) * w.dilations[i] + 1
        within = isinstance(reach, int) and isinstance(size, int) and reach - _number(w.before[i]) <= size
        if not within:
            checks.append(at < as_index(size))
    return checks or [tirx.const(True, "bool")]


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _clamped(where: list[Any], sizes: list[Any]) -> list[Any]:
    return [tirx.max(tirx.min(at, as_index(s) - 1), as_index(0)) for at, s in zip(where, sizes, strict=True)]


def _read(a: Any, w: Windows, n: Any, c: Any, outer: Any, ks: Any, outside: Any) -> Any:
    """Return the element in the type of ``outside``, which stands for what is in the padding."""
    where, sizes = _where(w, outer, ks), [*a.shape[2:]]
    checks = _inside(w, where, [int(s) if isinstance(s, tirx.IntImm) else s for s in sizes])
    return tirx.if_then_else(tirx.all(*checks), widen(a(n, c, *where), str(outside.ty.dtype)), outside)


def _flat(where: list[Any], sizes: list[Any]) -> Any:
    total: Any = tirx.IntImm("int64", 0)
    for at, size in zip(where, sizes, strict=True):
        total = total * as_index(size) + at
    return total


def _count(sizes: list[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


def _power(value: Any, p: int) -> Any:
    value = tirx.abs(value)
    if p == 1:
        return value
    return value * value if p == 2 else tirx.pow(value, scalar(p, str(value.ty.dtype)))


def _root(total: Any, p: int) -> Any:
    dtype = str(total.dtype)
    if p == 1:
        return total
    if p == 2:
        return te.compute(total.shape, lambda *i: tirx.sqrt(total(*i)), "norm")
    return te.compute(total.shape, lambda *i: tirx.pow(total(*i), scalar(1.0 / p, dtype)), "norm")
