"""Canonical form: what every pass and every backend may rely on, established in place.

One opset for the whole model, functions inlined, constants as initializers of the outermost graph, unique
names, explicit default attributes, named dimensions, inferred shapes, and the source of each node in its
metadata.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import onnx_ir as oir
from onnx_ir.passes.common import ShapeInferencePass

# The imports register the adapters.
from optc.errors import InvalidModelError, UnsupportedModelError
from optc.frontend import (
    check,
    contrib,
    loop_sequences,
    structure,
    upgrade_rules_inputs,  # noqa: F401
    upgrade_rules_opset6,
    upgrade_rules_resize,  # noqa: F401
    upgrade_rules_semantics,  # noqa: F401
)
from optc.frontend.bind import name_input_dims
from optc.frontend.names import make_unique
from optc.frontend.upgrade import adapters, upgrade
from optc.ir import CANONICAL_OPSET, IR_VERSION, dims, provenance, schemas, shapes

Declared = dict[oir.Value, tuple[oir.Shape | None, oir.TypeProtocol | None]]


def canonicalize(model: oir.Model) -> None:
    """Bring ``model`` (opset 6 or newer) into canonical form, in place.

    Raises:
        InvalidModelError: the model breaks the ONNX specification.
        UnsupportedModelError: an opset outside of what is supported, or operators of an old opset that have
            no equivalent in the canonical one; names every such node.
    """
    _settle_imports(model)
    _stamp(model)
    for function in model.functions.values():
        _state_versions(function.graph, function.opset_imports)
    _state_versions(model.graph, model.graph.opset_imports)
    structure.drop_default_inputs(model)
    structure.sort(model)
    structure.inline_functions(model)
    check.check_nodes(model.graph.all_nodes())
    _drop_missing(model)
    structure.own_outputs(model)
    structure.lift_constants(model)
    values, nodes = make_unique(model)
    contrib.expand(model, values, nodes)
    loop_sequences.stack(model, values, nodes)
    name_input_dims(model)
    declared = _forget_shapes(model)
    target = max(CANONICAL_OPSET, model.opset_imports.get("", 0))
    if _needs_types(model, target):
        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
    upgrade(model, target, values, nodes)
    contrib.settle(model, values, nodes)
    _drop_unused_outputs(model, target)
    for node in model.graph.all_nodes():
        if node.domain in model.opset_imports:
            schemas.state_defaults(node, model.opset_imports[node.domain])
    _forget_shapes(model)
    shapes.infer(model)
    if _recall(model, declared):
        _name_dims(model)
        shapes.infer(model, keep_known=True)
    model.ir_version = IR_VERSION


def _settle_imports(model: oir.Model) -> None:
    """Give each domain one opset version, for the model and for each function."""
    owners = [
        ("the model", model.graph),
        *((f"function {f.name}", f.graph) for f in model.functions.values()),
    ]
    functions = {domain for domain, _, _ in model.functions}
    for owner, graph in owners:
        imports = graph.opset_imports
        alias = imports.pop("ai.onnx", None)
        if alias is not None and imports.setdefault("", alias) != alias:
            raise InvalidModelError(f"{owner} imports opset {alias} and opset {imports['']} of the ONNX domain")
        used = {node.domain for node in graph.all_nodes()}
        for domain in sorted(used - set(imports)):
            if domain not in functions:
                raise InvalidModelError(
                    f"{owner} uses operators of domain '{domain or 'ai.onnx'}' and imports no opset of it",
                    hint="the list of opset imports is incomplete or the file is cut off: export it again",
                )
        version = imports.get("", check.OLDEST_OPSET)
        if not check.OLDEST_OPSET <= version <= check.NEWEST_OPSET:
            raise UnsupportedModelError(
                f"{owner} imports opset {version}; supported are {check.OLDEST_OPSET} to {check.NEWEST_OPSET}",
                hint="export the model again with another opset",
            )


def _stamp(model: oir.Model) -> None:
    """Record the origin of each node that has none; nodes of functions get that of the call when inlined."""
    for index, node in enumerate(model.graph.all_nodes()):
        if not provenance.sources(node):
            provenance.stamp(node, node.name or f"{node.op_type}#{index}")


def _state_versions(graph: oir.Graph, imports: dict[str, int]) -> None:
    for node in graph.all_nodes():
        node.version = imports.get(node.domain)


def _drop_missing(model: oir.Model) -> None:
    """Cut missing optional inputs and outputs off the end of the lists."""
    for node in model.graph.all_nodes():
        given = len(node.inputs)
        while given and node.inputs[given - 1] is None:
            given -= 1
        if given < len(node.inputs):
            node.resize_inputs(given)
        while _last_is_optional(node, node.version) and not node.outputs[-1].name:
            node.resize_outputs(len(node.outputs) - 1)


def _drop_unused_outputs(model: oir.Model, target: int) -> None:
    """Cut optional outputs that nothing reads off the end of the list."""
    for node in model.graph.all_nodes():
        while _last_is_optional(node, target) and not _is_read(node.outputs[-1]):
            node.resize_outputs(len(node.outputs) - 1)


def _last_is_optional(node: oir.Node, version: int | None) -> bool:
    """Tell whether the last output of a standard operator may be left out."""
    schema = schemas.find("", node.op_type, version) if node.domain == "" and version is not None else None
    if schema is None or not node.outputs:
        return False
    formal = schemas.parameter(schema.outputs, len(node.outputs) - 1)
    return formal is not None and formal.optional


def _is_read(value: oir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _forget_shapes(model: oir.Model) -> Declared:
    """Drop shapes and types of node outputs, which may be stale, and return what they were.

    Outputs of custom operators keep theirs: nothing can infer them.
    """
    declared: Declared = {}
    for node in model.graph.all_nodes():
        for value in node.outputs:
            declared[value] = (value.shape, value.type)
            if node.domain == "":
                value.shape = value.type = None
    return declared


def _recall(model: oir.Model, declared: Declared) -> bool:
    """Give values for which inference found nothing the declared shape and type; tell whether there were any.

    Of the declared names those stay that are dimensions of inputs.
    """
    recalled = False
    known = dims.used_names(model.graph.inputs)
    for value, (shape, kind) in declared.items():
        if value.type is None and kind is not None:
            value.type, recalled = kind, True
        if value.shape is None and shape is not None:
            value.shape = oir.Shape([dim if _is_known(dim, known) else None for dim in shape])
            recalled = True
    return recalled


def _is_known(dim: dims.Dim, known: set[str]) -> bool:
    if isinstance(dim, int):
        return dim >= 0
    return dim.value is not None and dims.names(dim.value) <= known


def _name_dims(model: oir.Model) -> None:
    """Give every dimension that is still anonymous a name of its own."""
    values = list(dims.all_values(model.graph))
    used = dims.used_names(values)
    numbers = (f"_anonymous{count}" for count in itertools.count())
    for value in values:
        if value.shape is not None and value.shape.has_unknown_dim():
            value.shape = oir.Shape(
                [next(n for n in numbers if n not in used) if _anonymous(d) else d for d in value.shape]
            )


def _anonymous(dim: dims.Dim) -> bool:
    return not isinstance(dim, int) and dim.value is None


def _needs_types(model: oir.Model, target: int) -> bool:
    """Tell whether an adapter would have to work without knowing the type or the rank of its input."""
    return any(
        node.version is not None
        and node.version < target
        and node.op_type in _TYPED
        and adapters(node.op_type, node.version)
        and any(value is not None and (value.shape is None or value.dtype is None) for value in node.inputs)
        for node in _standard(model)
    )


_TYPED = frozenset({"Clip", "Pad", "Softmax", "LogSoftmax", "Hardmax", "BatchNormalization", "PRelu"}).union(
    upgrade_rules_opset6.BROADCASTING
)


def _standard(model: oir.Model) -> Iterable[oir.Node]:
    return (node for node in model.graph.all_nodes() if node.domain == "")
