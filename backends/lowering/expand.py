"""Replaces nodes whose operator has no lowering by the function body that the ONNX standard gives for them."""

from __future__ import annotations

from collections.abc import Collection

import onnx
import onnx_ir as oir
from onnx_ir.passes.common import InlinePass

from optc.ir import provenance, shapes

_DOMAIN = "optc.expansion"


def expand_functions(model: oir.Model, supported: Collection[tuple[str, str]]) -> None:
    """Expand, in place, every node whose ``(domain, operator)`` is not ``supported`` and that has a function body.

    Bodies are expanded in turn. The new nodes inherit the provenance of the node they replace, their values
    get types and shapes, their constants become initializers. A node without a usable body stays: an operator
    without function, or a function of an older opset whose operators have changed their signature since.
    """
    hopeless: set[oir.Node] = set()
    while True:
        functions: list[oir.Function] = []
        names = {str(v.name) for node in model.graph.all_nodes() for v in node.outputs}
        for node in list(model.graph.all_nodes()):
            if (node.domain, node.op_type) in supported or node in hopeless:
                continue
            function = _function(model, node, len(functions), names)
            if function is None:
                hopeless.add(node)
            else:
                functions.append(function)
        if not functions:
            return
        for function in functions:
            model.functions[function.identifier()] = function
        InlinePass()(model)
        model.functions.clear()
        model.opset_imports.pop(_DOMAIN, None)
        _lift_constants(model)
        shapes.infer(model, keep_known=True)


def _function(model: oir.Model, node: oir.Node, number: int, names: set[str]) -> oir.Function | None:
    """Return the body of ``node`` as a function of its own, and turn the node into a call of it."""
    version = model.opset_imports.get(node.domain, 0)
    if not onnx.defs.has(node.op_type, version, node.domain):
        return None
    schema = onnx.defs.get_schema(node.op_type, version, node.domain)
    proto = _body(schema, node, version)
    if proto is None or not _compatible(proto, model):
        return None
    proto.domain, proto.name = _DOMAIN, f"{node.op_type}_{number}"
    # Bodies made for this node leave out what computes outputs that it does not have.
    del proto.output[len(node.outputs) :]
    function = oir.serde.deserialize_function(proto)
    function.opset_imports.clear()
    for inner in function.all_nodes():
        provenance.inherit(inner, [node], made_by="expand_functions")
        inner.name = f"{node.name}.{inner.name or inner.op_type}"
        inner.version = None
        for value in inner.outputs:
            value.name = _unique(f"{node.name}.{value.name}", names)
    _absorb_subgraphs(node, function)
    node.domain, node.op_type, node.version = _DOMAIN, proto.name, None
    return function


def _absorb_subgraphs(node: oir.Node, function: oir.Function) -> None:
    """Drop the subgraphs of ``node``, which a body made for it contains; what they captured becomes inputs."""
    graphs = [a for a in node.attributes.values() if a.type == oir.AttributeType.GRAPH]
    outer = {
        str(value.name): value
        for attribute in graphs
        for inner in attribute.as_graph().all_nodes()
        for value in inner.inputs
        if value is not None and value.graph is not attribute.as_graph()
    }
    for attribute in graphs:
        del node.attributes[attribute.name]
    parameters: dict[str, oir.Value] = {}
    first = len(function.inputs)
    for inner in function.all_nodes():
        for index, value in enumerate(inner.inputs):
            unbound = value is not None and value.producer() is None and not value.is_graph_input()
            if value is None or not unbound or value.name not in outer:
                continue
            if value.name not in parameters:
                parameters[str(value.name)] = oir.Value(name=value.name)
                function.inputs.append(parameters[str(value.name)])
            inner.replace_input_with(index, parameters[str(value.name)])
    if parameters:
        node.resize_inputs(first + len(parameters))
        for index, name in enumerate(parameters):
            node.replace_input_with(first + index, outer[name])


def _unique(stem: str, names: set[str]) -> str:
    name, count = stem, 0
    while name in names:
        count += 1
        name = f"{stem}_{count}"
    names.add(name)
    return name


def _body(schema: onnx.defs.OpSchema, node: oir.Node, version: int) -> onnx.FunctionProto | None:
    """Return the newest function body that is not newer than ``version``, else the oldest one."""
    proto = onnx.FunctionProto()
    if schema.has_function:
        chosen = _choose(schema.function_opset_versions, version)
        proto.ParseFromString(schema.get_function_with_opset_version(chosen))
        return proto
    if not schema.has_context_dependent_function or any(
        value is not None and value.type is None for value in node.inputs
    ):
        return None
    chosen = _choose(schema.context_dependent_function_opset_versions, version)
    types = [_type(value) for value in node.inputs]
    body = schema.get_context_dependent_function_with_opset_version(
        chosen, oir.serde.serialize_node(node).SerializeToString(), types
    )
    if not body:
        return None
    proto.ParseFromString(body)
    return proto


def _choose(versions: Collection[int], version: int) -> int:
    older = [v for v in versions if v <= version]
    return max(older) if older else min(versions)


def _type(value: oir.Value | None) -> bytes:
    if value is None:
        return b""
    return bytes(oir.serde.serialize_value(value).type.SerializeToString())


def _compatible(proto: onnx.FunctionProto, model: oir.Model) -> bool:
    """Tell whether the operators of ``proto`` have the same signature in the opset of the model."""
    versions = {imported.domain: imported.version for imported in proto.opset_import}
    pending = list(proto.node)
    while pending:
        node = pending.pop()
        pending += [inner for a in node.attribute for g in (a.g, *a.graphs) for inner in g.node]
        if node.domain not in model.opset_imports:
            return False
        ours = onnx.defs.get_schema(node.op_type, model.opset_imports[node.domain], node.domain)
        version = versions.get(node.domain, model.opset_imports[node.domain])
        theirs = onnx.defs.get_schema(node.op_type, version, node.domain)
        attributes = {a.name for a in node.attribute}
        if not attributes <= set(ours.attributes) or len(ours.inputs) < len(theirs.inputs):
            return False
    return True


def _lift_constants(model: oir.Model) -> None:
    for node in list(model.graph.all_nodes()):
        if (node.domain, node.op_type) != ("", "Constant") or node.graph is None:
            continue
        (output,) = node.outputs
        tensor = oir.convenience.get_const_tensor(output)
        if tensor is None or output.is_graph_output():
            continue
        graph = node.graph
        constant = oir.Value(
            name=output.name,
            type=oir.TensorType(tensor.dtype),
            shape=oir.Shape(tensor.numpy().shape),
            const_value=tensor,
        )
        output.name = None
        output.replace_all_uses_with(constant)
        assert isinstance(graph, oir.Graph)
        graph.remove(node, safe=True)
        model.graph.register_initializer(constant)
