"""Structural normalization: functions inlined, constants lifted, outputs computed by nodes of their graph."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as oir
from onnx_ir.passes.common import InlinePass

from optc.errors import InvalidModelError, UnsupportedModelError
from optc.ir import provenance
from optc.ir.dims import subgraphs


def graphs(model: oir.Model) -> list[oir.Graph]:
    """Return the graph of ``model`` and all subgraphs of its nodes, outermost first."""
    return [model.graph, *model.graph.subgraphs()]


def inline_functions(model: oir.Model) -> None:
    """Replace calls of model-local functions, nested ones included, by the function bodies.

    Nodes keep the opset version that they state, so bodies of different opsets may meet in one graph.

    Raises:
        InvalidModelError: recursive functions.
        UnsupportedModelError: a function with a graph as attribute.
    """
    if not model.functions:
        return
    for function in model.functions.values():
        # The versions are on the nodes; the pass would refuse imports that differ.
        for domain, version in function.opset_imports.items():
            model.opset_imports.setdefault(domain, version)
        function.opset_imports.clear()
        _name_outputs(function)
    try:
        InlinePass()(model)
    except oir.passes.PreconditionError as error:
        raise InvalidModelError(f"the functions of the model call each other in a circle: {error}") from error
    except ValueError as error:
        raise UnsupportedModelError(f"a model-local function cannot be inlined: {error}") from error
    model.functions.clear()
    used = {node.domain for node in model.graph.all_nodes()} | {""}
    for domain in set(model.opset_imports) - used:
        del model.opset_imports[domain]


def _name_outputs(function: oir.Function) -> None:
    """Let distinct nodes compute the outputs of ``function``: no parameter, no value twice."""
    seen: set[oir.Value] = set(function.inputs)
    for index, output in enumerate(function.outputs):
        if output in seen:
            function.outputs[index] = _identity(function.graph, output)
        seen.add(output)


def _identity(graph: oir.Graph, value: oir.Value) -> oir.Value:
    node = oir.node("Identity", [value])
    node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
    graph.append(node)
    return node.outputs[0]


def drop_default_inputs(model: oir.Model) -> None:
    """Turn inputs with a default value (before ONNX IR version 4, every weight) into plain initializers."""
    for graph in graphs(model):
        weights = set(graph.initializers.values())
        kept = [value for value in graph.inputs if value not in weights]
        if len(kept) != len(graph.inputs):
            graph.inputs.clear()
            graph.inputs.extend(kept)


def own_outputs(model: oir.Model) -> None:
    """Let distinct nodes of a graph compute its outputs, Identity nodes where there are none."""
    for graph in graphs(model):
        seen: set[oir.Value] = set()
        for index, output in enumerate(graph.outputs):
            producer = output.producer()
            if output in seen or producer is None or producer.graph is not graph or _is_constant(producer):
                copy = graph.outputs[index] = _identity(graph, output)
                provenance.stamp(graph[-1], output.name or "")
                if output in seen or output.is_graph_input():
                    copy.name = f"{output.name}_output"
                else:
                    copy.name, output.name = output.name, f"{output.name}_source"
            seen.add(output)


def _is_constant(node: oir.Node) -> bool:
    return node.domain == "" and node.op_type == "Constant"


def lift_constants(model: oir.Model) -> None:
    """Turn Constant nodes into initializers and move all initializers to the outermost graph."""
    root = model.graph
    moved: list[oir.Value] = []
    for graph in graphs(model):
        if graph is not root:
            moved += graph.initializers.values()
            graph.initializers.clear()
        for node in list(graph):
            if _is_constant(node):
                old = node.outputs[0]
                tensor = _constant_tensor(node)
                new = oir.Value(
                    name=old.name,
                    shape=oir.Shape(tensor.shape.numpy()),
                    type=oir.TensorType(tensor.dtype),
                    const_value=tensor,
                )
                old.replace_all_uses_with(new)
                graph.remove(node, safe=True)
                moved.append(new)
    taken = {value.name for value in _named_values(model)}
    for index, value in enumerate(moved):
        name = value.name or "constant"
        value.name = name if name not in taken else f"{name}_lifted_{index}"
        taken.add(value.name)
        root.initializers.add(value)


def _named_values(model: oir.Model) -> Iterator[oir.Value]:
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph.all_nodes():
        yield from node.outputs


def _constant_tensor(node: oir.Node) -> oir.TensorProtocol:
    if len(node.attributes) != 1:
        raise InvalidModelError(f"{provenance.describe(node)} has {len(node.attributes)} values, expected one")
    name, attribute = next(iter(node.attributes.items()))
    match name:
        case "value":
            return attribute.as_tensor()
        case "value_int":
            return oir.tensor(np.asarray(attribute.as_int(), np.int64))
        case "value_ints":
            return oir.tensor(np.asarray(attribute.as_ints(), np.int64))
        case "value_float":
            return oir.tensor(np.asarray(attribute.as_float(), np.float32))
        case "value_floats":
            return oir.tensor(np.asarray(attribute.as_floats(), np.float32))
        case "value_string":
            return oir.StringTensor([attribute.as_string().encode()], shape=oir.Shape([]))
        case "value_strings":
            texts = [text.encode() for text in attribute.as_strings()]
            return oir.StringTensor(texts, shape=oir.Shape([len(texts)]))
    raise InvalidModelError(f"{provenance.describe(node)}: unknown attribute '{name}'")


def sort(model: oir.Model) -> None:
    """Sort the nodes of all graphs topologically.

    Raises:
        InvalidModelError: a cycle, or an input that nothing defines before.
    """
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        try:
            graph.sort()
        except ValueError as error:
            raise InvalidModelError("the graph has a cycle: its nodes have no order of execution") from error
        undefined: list[str] = []
        _find_undefined(graph, set(), undefined)
        if undefined:
            raise InvalidModelError("values that nothing computes:\n  " + "\n  ".join(undefined))


def _find_undefined(graph: oir.Graph, outer: set[oir.Value], found: list[str]) -> None:
    visible = outer | set(graph.inputs) | set(graph.initializers.values())
    for node in graph:
        for value in node.inputs:
            if value is not None and value not in visible:
                found.append(f"'{value.name}', an input of {provenance.describe(node)}")
        for subgraph in subgraphs(node):
            _find_undefined(subgraph, visible, found)
        visible.update(node.outputs)
    for value in graph.outputs:
        if value not in visible:
            found.append(f"'{value.name}', an output of the graph '{graph.name or ''}'")
