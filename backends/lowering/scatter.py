"""Operators that write at positions given by a tensor: copy the data, then the updates in order.

Updates of one element are applied one after another, in the order of the indices, so duplicates give the same
result on every run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from optc.backends.lowering import imperative
from optc.backends.lowering import index_math as im
from optc.backends.lowering.emit import as_index
from optc.backends.lowering.site import Site
from optc.backends.lowering.table import Table

TABLE = Table()

_REDUCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "none": lambda old, new: new,
    "add": lambda old, new: old + new,
    "mul": lambda old, new: old * new,
    "max": lambda old, new: tirx.max(old, new),
    "min": lambda old, new: tirx.min(old, new),
}


def _reduction(site: Site) -> Callable[[Any, Any], Any]:
    name = site.attr("reduction", "none")
    if site.dtype(0) == "bool":
        # Of booleans the sum is "or", the product "and".
        name = {"add": "max", "mul": "min"}.get(name, name)
        return {
            **_REDUCTIONS,
            "max": lambda old, new: tirx.any(old, new),
            "min": lambda old, new: tirx.all(old, new),
        }[name]
    return _REDUCTIONS[name]


@TABLE.lowers("ScatterElements")
def scatter_elements(site: Site) -> Any:
    """ScatterElements-18."""
    data = site.shape(0)
    axis, reduce = im.axis_of(site.attr("axis", 0), len(data)), _reduction(site)

    def body(ins: list[imperative.Cells], outs: list[imperative.Cells]) -> None:
        source, indices, updates = ins
        _copy(source, outs[0])
        with imperative.loop(*indices.shape) as index:
            place = list(index)
            place[axis] = as_index(im.wrap_negative(indices[index], data[axis]))
            outs[0][place] = reduce(outs[0][place], updates[index])

    return _emit(site, body)


@TABLE.lowers("ScatterND")
def scatter_nd(site: Site) -> Any:
    """ScatterND-18; the last dimension of the indices must be a number."""
    data, indices_shape, reduce = site.shape(0), site.shape(1), _reduction(site)
    depth = indices_shape[-1]
    if not isinstance(depth, int):
        site.unsupported("the last dimension of the indices must be known while compiling")

    def body(ins: list[imperative.Cells], outs: list[imperative.Cells]) -> None:
        source, indices, updates = ins
        _copy(source, outs[0])
        with imperative.loop(*indices_shape[:-1]) as lead:
            place = [as_index(im.wrap_negative(indices[(*lead, k)], data[k])) for k in range(depth)]
            with imperative.loop(*data[depth:]) as rest:
                target = (*place, *rest)
                outs[0][target] = reduce(outs[0][target], updates[(*lead, *rest)])

    return _emit(site, body)


def _copy(source: imperative.Cells, target: imperative.Cells) -> None:
    with imperative.loop(*source.shape) as index:
        target[index] = source[index]


def _emit(site: Site, body: Callable[[list[imperative.Cells], list[imperative.Cells]], None]) -> Any:
    return site.emit(
        lambda *a: imperative.procedure(a, [(a[0].shape, str(a[0].dtype))], body, "scatter"),
        *(site.tensor(k) for k in range(3)),
    )
