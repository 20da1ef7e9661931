"""Shapes through If, Loop and Scan: what holds for every branch and for every iteration, and nothing more."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx_ir as oir
from onnx_shape_inference import ShapeInferenceContext

from optc.errors import OptcError
from optc.ir.dims import Dim

Walk = Callable[[oir.Graph], OptcError | None]
"""Infers the shapes of a subgraph; returns the error that makes it impossible to run, if there is one."""


def _if(context: ShapeInferenceContext, node: oir.Node, walk: Walk) -> None:
    """If-1: a dimension is known where both branches agree on it, a shape where they agree on the rank.

    A branch that cannot run at these sizes has no say.
    """
    branches = [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
    errors = [walk(branch) for branch in branches]
    if all(errors):
        raise next(error for error in errors if error is not None)
    possible = [branch for branch, error in zip(branches, errors, strict=True) if error is None]
    for output, first, second in zip(node.outputs, possible[0].outputs, possible[-1].outputs, strict=True):
        _set_type(output, first.type or second.type)
        shape = _merge(context, first.shape, second.shape)
        if shape is not None:
            context.set_shape(output, shape)


def _loop(context: ShapeInferenceContext, node: oir.Node, walk: Walk) -> None:
    """Loop-1: see ``_iterate``; scan outputs are as long as the trip count unless the body can stop the loop."""
    body = node.attributes["body"].as_graph()
    for formal, dtype in zip(body.inputs, (oir.DataType.INT64, oir.DataType.BOOL), strict=False):
        _set_type(formal, formal.type or oir.TensorType(dtype))
        formal.shape = oir.Shape([])
    carried = len(node.inputs) - 2
    _iterate(context, node.inputs[2:], body.inputs[2:], body.outputs[1 : 1 + carried], node.outputs, walk, body)
    trips = context.get_symbolic_value(node.inputs[0]) if node.inputs[0] is not None else None
    runs_to_end = _is_true(node.inputs[1]) and (body.outputs[0] is body.inputs[1] or _is_true(body.outputs[0]))
    for output, element in zip(node.outputs[carried:], body.outputs[1 + carried :], strict=True):
        _set_type(output, element.type)
        if element.shape is not None:
            length = trips[0] if trips and runs_to_end else context.new_symbolic_dim()
            context.set_shape(output, oir.Shape([length, *element.shape.dims]))


def _is_true(condition: oir.Value | None) -> bool:
    """Tell whether a loop condition is absent or a constant true; what follows a Cast or Identity counts too."""
    if condition is None:
        return True
    tensor = oir.convenience.get_const_tensor(condition)
    return tensor is not None and bool(tensor.numpy().reshape(()))


def _scan(context: ShapeInferenceContext, node: oir.Node, walk: Walk) -> None:
    """Scan-9: state as in ``_iterate``; slices lose the scanned axis, stacked outputs gain it."""
    body = node.attributes["body"].as_graph()
    scanned = node.attributes["num_scan_inputs"].as_int()
    state = len(node.inputs) - scanned
    axes_in = _ints(node, "scan_input_axes") or [0] * scanned
    length: Dim | None = None
    for actual, formal, axis in zip(node.inputs[state:], body.inputs[state:], axes_in, strict=True):
        assert actual is not None
        _set_type(formal, actual.type)
        formal.shape = None
        if actual.shape is not None:
            dims = list(actual.shape.dims)
            size = dims.pop(axis)
            length = size if length is None or isinstance(size, int) else length
            formal.shape = oir.Shape(dims)
    _iterate(context, node.inputs[:state], body.inputs[:state], body.outputs[:state], node.outputs, walk, body)
    stacked = list(zip(node.outputs[state:], body.outputs[state:], strict=True))
    axes_out = _ints(node, "scan_output_axes") or [0] * len(stacked)
    for (output, element), axis in zip(stacked, axes_out, strict=True):
        _set_type(output, element.type)
        if element.shape is not None:
            dims = list(element.shape.dims)
            position = axis if axis >= 0 else axis + len(dims) + 1
            dims.insert(position, length if length is not None else context.new_symbolic_dim())
            context.set_shape(output, oir.Shape(dims))


def _ints(node: oir.Node, name: str) -> list[int]:
    attribute = node.attributes.get(name)
    return list(attribute.as_ints()) if attribute is not None else []


def _iterate(
    context: ShapeInferenceContext,
    initial: Iterable[oir.Value | None],
    formals: Iterable[oir.Value],
    results: Iterable[oir.Value],
    outputs: Iterable[oir.Value],
    walk: Walk,
    body: oir.Graph,
) -> None:
    """Infer a loop body until the shapes of the values it carries hold for every iteration.

    A dimension that an iteration changes becomes a fresh name; a changed rank makes the shape unknown. Each round
    makes at least one dimension or shape less known, so this ends.
    """
    carried = list(zip(initial, formals, results, strict=True))
    for actual, formal, _ in carried:
        if actual is not None:
            _set_type(formal, actual.type)
            formal.shape = actual.shape
    varying: set[tuple[oir.Value, int]] = set()
    while True:
        for node in body.all_nodes():
            for value in node.outputs:
                value.shape = None  # what held for the first iteration must not be trusted for all
        error = walk(body)
        if error is not None:
            raise error
        stable = True
        for _, formal, result in carried:
            if formal.shape is None:
                continue
            if result.shape is None or len(result.shape) != len(formal.shape):
                formal.shape, stable = None, False
                continue
            dims = list(formal.shape.dims)
            for axis, (before, after) in enumerate(zip(formal.shape, result.shape, strict=True)):
                if before != after and (formal, axis) not in varying:
                    varying.add((formal, axis))
                    dims[axis], stable = context.new_symbolic_dim(), False
            formal.shape = oir.Shape(dims)
        if stable:
            break
    for (_, formal, _), output in zip(carried, outputs, strict=False):
        _set_type(output, formal.type)
        if formal.shape is not None:
            context.set_shape(
                output,
                oir.Shape(
                    context.new_symbolic_dim() if (formal, axis) in varying else dim
                    for axis, dim in enumerate(formal.shape)
                ),
            )


def _set_type(value: oir.Value, type_: oir.TypeProtocol | None) -> None:
    if type_ is not None:
        value.type = type_


def _merge(context: ShapeInferenceContext, a: oir.Shape | None, b: oir.Shape | None) -> oir.Shape | None:
    if a is None or b is None or len(a) != len(b):
        return None
    return oir.Shape(x if x == y else context.new_symbolic_dim() for x, y in zip(a, b, strict=True))


MIN_OPSET = 9
"""Scan-8 has another signature."""

RULES: dict[str, Callable[[ShapeInferenceContext, oir.Node, Walk], None]] = {
    "If": _if,
    "Loop": _loop,
    "Scan": _scan,
}
