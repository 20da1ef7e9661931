"""Einsum."""

from __future__ import annotations

from typing import Any

from tvm import te

from optc.backends.kernels.contraction import FUSIBLE, accumulator, annotate, narrow, widen
from optc.backends.lowering.emit import shape_of
from optc.backends.lowering.site import Site
from optc.backends.lowering.table import Table

TABLE = Table()
_ELLIPSIS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@TABLE.lowers("Einsum")
def einsum(site: Site) -> Any:
    """Einsum-12: ellipses, repeated and summed-out indices, implicit output.

    Operands are joined from the left, two at a time; an index is summed as soon as nothing later needs it.
    """
    tensors = site.tensors()
    shapes = [shape_of(t) for t in tensors]
    terms, output, extents = parse(site, str(site.attr("equation")), shapes)
    tensors = [_checked(site, t, shape, term, extents) for t, shape, term in zip(tensors, shapes, terms, strict=True)]
    dtype = str(tensors[0].ty.dtype)
    if len(tensors) == 1:
        return _reduce(site, tensors[0], terms[0], output, extents, dtype)
    left, labels = tensors[0], terms[0]
    for position in range(1, len(tensors)):
        last = position == len(tensors) - 1
        later = "".join([output, *terms[position + 1 :]])
        left, labels = _join(site, left, labels, tensors[position], terms[position], later, extents, dtype)
        if last:
            return left if labels == output else _reduce(site, left, labels, output, extents, dtype)
    return left


def parse(site: Site, equation: str, shapes: list[list[Any]]) -> tuple[list[str], str, dict[str, Any]]:
    """Return the labels of each operand, of the output, and the extent of each label; ellipses get capital labels."""
    text = equation.replace(" ", "")
    left, arrow, right = text.partition("->")
    operands = left.split(",")
    if len(operands) != len(shapes):
        site.unsupported(f"equation '{equation}' has {len(operands)} operands, the node {len(shapes)}")
    # Letters of either case are legal labels: ellipsis axes take those that the equation does not use.
    spare = [c for c in _ELLIPSIS + _ELLIPSIS.lower() if c not in text]
    widest = max(len(s) - len(t.replace("...", "")) if "..." in t else 0 for t, s in zip(operands, shapes, strict=True))
    dots = "".join(spare[:widest])
    extents: dict[str, Any] = {}
    terms = []
    for term, shape in zip(operands, shapes, strict=True):
        count = len(shape) - len(term.replace("...", ""))
        labels = term.replace("...", dots[widest - count :] if count else "")
        if len(labels) != len(shape):
            site.unsupported(f"equation '{equation}' does not fit operand shape {shape}")
        for label, extent in zip(labels, shape, strict=True):
            known = extents.get(label, 1)
            extents[label] = extent if isinstance(known, int) and known == 1 else known
        terms.append(labels)
    if arrow:
        return terms, right.replace("...", dots), extents
    joined = "".join(terms)
    return terms, dots + "".join(sorted(c for c in set(joined) if joined.count(c) == 1 and c not in dots)), extents


def _checked(site: Site, tensor: Any, shape: list[Any], labels: str, extents: dict[str, Any]) -> Any:
    """Return ``tensor`` with a check at run time that equal labels have equal extents, where that is open."""
    one = [isinstance(d, int) and d == 1 for d in shape]
    return site.check_equal(tensor, [1 if single else extents[c] for single, c in zip(one, labels, strict=True)])


def _index(tensor: Any, labels: str, at: dict[str, Any]) -> Any:
    """Read ``tensor`` at the value of each label; axes of extent 1 are broadcast."""
    index = [0 if _one(d) else at[c] for d, c in zip(tensor.shape, labels, strict=True)]
    return tensor(*index)


def _one(extent: Any) -> bool:
    return hasattr(extent, "value") and int(extent.value) == 1


def _axes(labels: str, extents: dict[str, Any]) -> dict[str, Any]:
    return {c: te.reduce_axis((0, extents[c]), f"k_{c}") for c in labels}


def _reduce(site: Site, x: Any, labels: str, output: str, extents: dict[str, Any], dtype: str) -> Any:
    """Emit diagonal, sum and transposition of one operand."""
    summed = "".join(dict.fromkeys(c for c in labels if c not in output))
    wide = accumulator(dtype)

    def compute(a: Any) -> Any:
        axes = _axes(summed, extents)

        def element(*index: Any) -> Any:
            at = {**dict(zip(output, index, strict=True)), **axes}
            value = _index(a, labels, at)
            return te.sum(widen(value, wide), axis=list(axes.values())) if summed else value

        total = te.compute([extents[c] for c in output], element, "einsum")
        return narrow(total, dtype)

    return site.emit(compute, x, name="einsum")


def _join(
    site: Site, x: Any, left: str, y: Any, right: str, later: str, extents: dict[str, Any], dtype: str
) -> tuple[Any, str]:
    """Emit the contraction of two operands; returns it with its labels (batch, rows, columns)."""
    unique = list(dict.fromkeys(left + right))
    kept = [c for c in unique if c in later]
    batch = [c for c in kept if c in left and c in right]
    rows = [c for c in kept if c in left and c not in right]
    columns = [c for c in kept if c in right and c not in left]
    labels = "".join([*batch, *rows, *columns])
    summed = "".join(c for c in unique if c not in later)
    wide = accumulator(dtype)
    first, second = len(batch), len(batch) + len(rows)
    template = rows and columns and summed
    attributes = annotate(range(first, second), range(second, len(labels))) if template else None

    def compute(a: Any, b: Any) -> Any:
        axes = _axes(summed, extents)

        def element(*index: Any) -> Any:
            at = {**dict(zip(labels, index, strict=True)), **axes}
            value = widen(_index(a, left, at), wide) * widen(_index(b, right, at), wide)
            return te.sum(value, axis=list(axes.values())) if summed else value

        return narrow(te.compute([extents[c] for c in labels], element, "einsum", attrs=attributes), dtype)

    return site.emit(compute, x, y, name="einsum", attributes=FUSIBLE if template else None), labels
