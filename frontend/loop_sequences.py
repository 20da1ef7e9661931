"""Sequences that a Loop only appends to become scan outputs: tensors, which joins and look-ups read instead."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as oir

from optc.frontend.names import Names
from optc.frontend.upgrade import Edit

_CARRIED = 2
"""Inputs of a Loop and of its body before the carried values; the body's outputs have one less."""


def stack(model: oir.Model, values: Names, nodes: Names) -> None:
    """Let each Loop give what it appends to an empty sequence as a scan output, in place.

    s = Loop(SequenceEmpty(); body: s' = SequenceInsert(s, x)); ConcatFromSequence(s), SequenceAt(s, k), ...
    => t = Loop(body: scan x); Reshape(Transpose(t)), Gather(t, k), ... The elements must be of one shape then, which
    is checked at run time; other sequences stay. Nodes state their opsets, names are unique; new nodes are canonical.
    """
    for node in list(model.graph.all_nodes()):
        if node.domain == "" and node.op_type == "Loop":
            for index in range(len(node.inputs) - 1, _CARRIED - 1, -1):
                if (element := _appended(node, index)) is not None:
                    node = _rebuild(node, index, element, lambda n: Edit(model, n, values, nodes))


def _appended(loop: oir.Node, index: int) -> oir.Value | None:
    """Return what each iteration appends to carried value ``index``, if it does nothing else with it."""
    body = loop.attributes["body"].as_graph()
    start, inside, outside = loop.inputs[index], body.inputs[index], loop.outputs[index - _CARRIED]
    origin = None if start is None else start.producer()
    insert = body.outputs[index - 1].producer()
    if origin is None or insert is None or origin.op_type != "SequenceEmpty" or insert.op_type != "SequenceInsert":
        return None
    if insert.graph is not body or insert.inputs[0] is not inside or len(insert.inputs) > 2:
        return None
    if len(inside.uses()) > 1 or insert.outputs[0].uses() or outside.is_graph_output():
        return None
    if not all(user.op_type in _READERS and place == 0 and _is_readable(user) for user, place in outside.uses()):
        return None
    return insert.inputs[1]


def _is_readable(reader: oir.Node) -> bool:
    """Tell whether the place of a new tensor needs no rank, which is unknown here."""
    return reader.op_type != "ConcatFromSequence" or reader.attributes["axis"].as_int() >= 0


def _rebuild(loop: oir.Node, index: int, element: oir.Value, editing: Callable[[oir.Node], Edit]) -> oir.Node:
    """Return ``loop`` with ``element`` scanned instead of carried as value ``index``."""
    edit = editing(loop)
    body = loop.attributes["body"].as_graph()
    insert = body.outputs[index - 1].producer()
    assert insert is not None
    del body.outputs[index - 1]
    body.remove(insert, safe=True)
    del body.inputs[index]
    scanned = oir.node("Identity", [element])
    scanned.name, scanned.outputs[0].name = edit.node_name("Identity"), edit.value_name("appended")
    body.append(scanned)
    body.outputs.append(scanned.outputs[0])
    inputs = [value for k, value in enumerate(loop.inputs) if k != index]
    others = [value for k, value in enumerate(loop.outputs) if k != index - _CARRIED]
    attribute = loop.attributes.pop("body")
    *kept, stacked = edit.insert("Loop", inputs, len(loop.outputs), {})
    new = stacked.producer()
    assert new is not None
    new.attributes["body"], new.version = attribute, loop.version
    for reader, _ in loop.outputs[index - _CARRIED].uses():
        reading = editing(reader)
        reading.replace(_READERS[reader.op_type](reading, stacked))
    for old, value in zip(others, kept, strict=True):
        value.shape, value.type = old.shape, old.type
        value.name, old.name = old.name, value.name
        oir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    assert loop.graph is not None
    loop.graph.remove(loop, safe=True)
    return new


def _concat(edit: Edit, stacked: oir.Value) -> oir.Value:
    """Join the tensors of ``stacked``, which lie along its first axis, along another one, new or not."""
    axis = edit.node.attributes["axis"].as_int()
    new_axis = edit.node.attributes.get("new_axis")
    if new_axis is not None and new_axis.as_int():
        return _moved(edit, stacked, axis)
    # The axis that the tensors had takes their number in.
    moved = _moved(edit, stacked, axis)
    before, after = edit.op("Shape", moved, end=axis), edit.op("Shape", moved, start=axis + 2)
    size = _product(edit, edit.op("Shape", moved, start=axis, end=axis + 2))
    return edit.op("Reshape", moved, edit.op("Concat", before, size, after, axis=0), allowzero=1)


def _moved(edit: Edit, stacked: oir.Value, axis: int) -> oir.Value:
    """Return ``stacked``, whose rank is unknown, with its first axis at place ``axis``."""
    if axis == 0:
        return edit.op("Identity", stacked)
    count = edit.op("Shape", stacked, end=1)
    before, rest = edit.op("Shape", stacked, start=1, end=axis + 1), edit.op("Shape", stacked, start=axis + 1)
    matrix = edit.op("Concat", count, _product(edit, before), _product(edit, rest), axis=0)
    turned = edit.op("Transpose", edit.op("Reshape", stacked, matrix, allowzero=1), perm=[1, 0, 2])
    return edit.op("Reshape", turned, edit.op("Concat", before, count, rest, axis=0), allowzero=1)


def _product(edit: Edit, sizes: oir.Value) -> oir.Value:
    return edit.op("ReduceProd", sizes, keepdims=1)


def _at(edit: Edit, stacked: oir.Value) -> oir.Value:
    return edit.op("Gather", stacked, edit.input(1), axis=0)


def _length(edit: Edit, stacked: oir.Value) -> oir.Value:
    return edit.op("Squeeze", edit.op("Shape", stacked, end=1), edit.ints([0], "axes"))


_READERS = {"ConcatFromSequence": _concat, "SequenceAt": _at, "SequenceLength": _length}
