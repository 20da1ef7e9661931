"""Sequences and optionals of known structure: lists of values while lowering, nothing at run time."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as oir
from tvm import relax

from optc.backends.lowering import index_math as im
from optc.backends.lowering.emit import as_index
from optc.backends.lowering.indexing import take_one
from optc.backends.lowering.known import Known
from optc.backends.lowering.loops import stack
from optc.backends.lowering.site import Site
from optc.backends.lowering.table import Table
from optc.backends.lowering.tensor import join, window

TABLE = Table()


def _elements(site: Site, index: int = 0) -> tuple[Known, ...]:
    known = site.lowerer.known(site.value(index)).sequence
    if known is None:
        site.unsupported("the elements of the sequence must be known while compiling")
    assert known is not None
    return known


def _position(site: Site, index: int, length: int, default: int) -> int:
    """Return input ``index`` as a position in a sequence; absent, it is ``default``."""
    if not site.has(index):
        return default
    value = site.constant(index)
    if value is None:
        site.unsupported("the position in a sequence must be known while compiling")
    assert value is not None
    position = int(value.reshape(-1)[0])
    if not -length <= position <= length:
        site.unsupported(f"position {position} is outside of a sequence of {length}")
    return position + length if position < 0 else position


@TABLE.lowers("SequenceEmpty")
def sequence_empty(site: Site) -> Any:
    """SequenceEmpty-11."""
    return Known(sequence=())


@TABLE.lowers("SequenceConstruct")
def sequence_construct(site: Site) -> Any:
    """SequenceConstruct-11."""
    return Known(sequence=tuple(site.lowerer.known(site.value(k)) for k in range(site.input_count)))


@TABLE.lowers("SequenceInsert")
def sequence_insert(site: Site) -> Any:
    """SequenceInsert-11: before the position, by default at the end."""
    elements = _elements(site)
    place = _position(site, 2, len(elements), len(elements))
    new = site.lowerer.known(site.value(1))
    return Known(sequence=(*elements[:place], new, *elements[place:]))


@TABLE.lowers("SequenceErase")
def sequence_erase(site: Site) -> Any:
    """SequenceErase-11: by default the last element."""
    elements = _elements(site)
    place = _position(site, 1, len(elements), len(elements) - 1)
    return Known(sequence=(*elements[:place], *elements[place + 1 :]))


@TABLE.lowers("SequenceAt")
def sequence_at(site: Site) -> Any:
    """SequenceAt-11."""
    elements = _elements(site)
    place = _position(site, 1, len(elements), 0)
    if place >= len(elements):
        site.unsupported(f"position {place} is outside of a sequence of {len(elements)}")
    return elements[place]


@TABLE.lowers("SequenceLength")
def sequence_length(site: Site) -> Any:
    """SequenceLength-11."""
    return Known(integers=np.array(len(_elements(site)), dtype=object))


@TABLE.lowers("ConcatFromSequence")
def concat_from_sequence(site: Site) -> Any:
    """ConcatFromSequence-11, with or without a new axis."""
    tensors = [_tensor(site, element) for element in _elements(site)]
    if not tensors:
        site.unsupported("an empty sequence cannot be joined")
    axis, rank = site.attr("axis"), tensors[0].ty.ndim
    if site.attr("new_axis", 0):
        return stack(site, tensors, im.axis_of(axis, rank + 1))
    return join(site, tensors, im.axis_of(axis, rank))


def _tensor(site: Site, element: Known) -> Any:
    if element.tensor is not None:
        return element.tensor
    if element.integers is None:
        site.unsupported("the sequence holds no tensors")
    return site.lowerer.materialize(element.integers, "int64")


@TABLE.lowers("SplitToSequence")
def split_to_sequence(site: Site) -> Any:
    """SplitToSequence-24 into a number of parts that is known while compiling."""
    shape = site.shape(0)
    axis = im.axis_of(site.attr("axis", 0), len(shape))
    size = shape[axis]
    if not site.has(1):
        if not isinstance(size, int):
            site.unsupported("the number of parts must be known while compiling")
        parts = [take_one(site, site.tensor(0), axis, as_index(k)) for k in range(size)]
        if site.attr("keepdims", 1):
            kept = [*shape[:axis], 1, *shape[axis + 1 :]]
            parts = [site.reshape(part, kept) for part in parts]
        return Known(sequence=tuple(map(Known, parts)))
    sizes = site.ints(1)
    if not site.shape(1):
        chunk = sizes[0]
        if not im.known(chunk, size):
            site.unsupported("the number of parts must be known while compiling")
        sizes = [min(chunk, size - start) for start in range(0, size, chunk)]
    results, offset = [], 0
    for part in site.settle(sizes):
        results.append(Known(window(site, axis, offset, part)))
        offset = offset + part
    return Known(sequence=tuple(results))


@TABLE.lowers("Optional")
def optional(site: Site) -> Any:
    """Optional-15: the value itself; empty is a sequence of nothing."""
    if not site.has(0):
        return Known(sequence=())
    return site.lowerer.known(site.value(0))


@TABLE.lowers("OptionalHasElement")
def optional_has_element(site: Site) -> Any:
    """OptionalHasElement-18."""
    present = np.array(_present(site))
    return Known(relax.const(present, "bool"), constant=present)


def _present(site: Site) -> bool:
    if not site.has(0):
        return False
    value = site.value(0)
    if isinstance(value.type, oir.OptionalType):
        return site.lowerer.known(value).sequence != ()
    return True


@TABLE.lowers("OptionalGetElement")
def optional_get_element(site: Site) -> Any:
    """OptionalGetElement-18."""
    if not _present(site):
        site.unsupported("the optional is empty")
    return site.lowerer.known(site.value(0))
