"""NumPy broadcasting of tensors whose dimensions may be symbolic.

A dimension that is 1 or equal to the result's for every legal size costs nothing. Otherwise the kernel selects
index 0 where the size turns out to be 1, and the size is checked when the model runs: it must be 1 or the
result's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import tirx

from optc.backends.lowering.emit import as_index, plain
from optc.backends.lowering.site import Site


def broadcast_shapes(site: Site, *shapes: Sequence[Any]) -> list[Any]:
    """Return the shape that ``shapes`` broadcast to; refuses constant dimensions that cannot agree."""
    rank = max((len(shape) for shape in shapes), default=0)
    result: list[Any] = []
    for axis in range(-rank, 0):
        dims = [shape[axis] for shape in shapes if len(shape) >= -axis]
        numbers = {d for d in dims if isinstance(d, int) and d != 1}
        if len(numbers) > 1:
            site.unsupported(f"shapes {', '.join(str(list(s)) for s in shapes)} do not broadcast")
        result.append(numbers.pop() if numbers else _joined(site, dims))
    return result


def _joined(site: Site, dims: Sequence[Any]) -> Any:
    out: Any = 1
    for dim in dims:
        if _is_one(out):
            out = dim
        elif _is_one(dim) or site.prove_equal(dim, out):
            continue
        elif _stays(site, dim, out) and not (isinstance(out, tvm.ir.Var) and _stays(site, out, dim)):
            out = dim
        elif not _stays(site, out, dim):
            out = plain(tirx.Select(as_index(out) == 1, as_index(dim), as_index(out)))
    return out


def _stays(site: Site, dim: Any, out: Any) -> bool:
    """Tell whether ``dim`` is never stretched to ``out``: it is 1 only when ``out`` is."""
    return site.implies(_is_one_condition(site, dim), as_index(out) == 1)


def _is_one_condition(site: Site, dim: Any) -> Any:
    """Return when ``dim`` is 1; a minimum with 2 or more, as slices give, is 1 only when its other side is."""
    while isinstance(dim, tirx.Min):
        a, b = dim.a, dim.b
        if site.always(b >= 2):
            dim = a
        elif site.always(a >= 2):
            dim = b
        else:
            break
    return as_index(dim) == 1


def checked(site: Site, tensor: Any, shape: Sequence[Any], result: Sequence[Any]) -> Any:
    """Return ``tensor`` of ``shape``, with a check at run time that it broadcasts to ``result`` if that is open."""
    expected, kept = list(shape), list(shape)
    for axis in range(-len(shape), 0):
        dim, out = shape[axis], result[axis]
        if _is_one(dim) or site.prove_equal(dim, out):
            continue
        if _stays(site, dim, out):
            expected[axis] = kept[axis] = out
        else:
            expected[axis] = tirx.Select(as_index(dim) == 1, as_index(1), as_index(out))
    return site.check(tensor, expected, kept)


def read_index(site: Site, shape: Sequence[Any], result: Sequence[Any], index: Sequence[Any]) -> list[Any]:
    """Return the position in a tensor of ``shape`` that element ``index`` of the result reads."""
    position: list[Any] = []
    for axis in range(-len(shape), 0):
        dim, out = shape[axis], result[axis]
        if site.prove_equal(dim, out):
            position.append(index[axis])
        elif _is_one(dim):
            position.append(as_index(0))
        elif _stays(site, dim, out):
            position.append(index[axis])
        else:
            position.append(tirx.Select(as_index(dim) == 1, as_index(0), as_index(index[axis])))
    return position


def _is_one(dim: Any) -> bool:
    return isinstance(dim, int) and dim == 1
