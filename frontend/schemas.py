"""The operator schemas of ``onnx.defs``, cached, and the check of nodes against them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx
import onnx_ir as oir
from optc.ir import provenance

from optc.errors import InvalidModelError

OLDEST_OPSET = 6
NEWEST_OPSET: int = onnx.defs.onnx_opset_version()


@dataclass(frozen=True)
class Signature:
    """What is needed of a schema: arities, attributes and their defaults, optional outputs."""

    since: int
    deprecated: bool
    inputs: tuple[int, int]
    outputs: tuple[int, int]
    optional_outputs: frozenset[int]
    required: frozenset[str]
    attributes: Mapping[str, int]
    defaults: Mapping[str, oir.Attr]


@functools.cache
def signature(domain: str, op_type: str, version: int) -> Signature | None:
    """Return the signature of an operator as of opset ``version`` of its domain, or None if there is none."""
    try:
        schema = onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    undefined = onnx.AttributeProto.UNDEFINED
    return Signature(
        since=schema.since_version,
        deprecated=schema.deprecated,
        inputs=(schema.min_input, schema.max_input),
        outputs=(schema.min_output, schema.max_output),
        optional_outputs=frozenset(i for i, o in enumerate(schema.outputs) if o.option == optional),
        required=frozenset(name for name, a in schema.attributes.items() if a.required),
        attributes={name: int(a.type.value) for name, a in schema.attributes.items()},
        defaults={
            name: oir.serde.deserialize_attribute(a.default_value)
            for name, a in schema.attributes.items()
            if not a.required and a.default_value.type != undefined
        },
    )


@functools.cache
def first_version(op_type: str) -> int | None:
    """Return the first opset of the default domain that has ``op_type``, or None."""
    versions = [
        s.since_version for s in onnx.defs.get_all_schemas_with_history() if s.name == op_type and s.domain == ""
    ]
    return min(versions, default=None)


def check_nodes(nodes: Iterable[oir.Node]) -> None:
    """Check nodes of the domains that onnx knows against the schema of their ``version``.

    Raises:
        InvalidModelError: for unknown operators, wrong numbers of inputs or outputs, and unknown, missing or
            wrongly typed attributes, all at once.
    """
    complaints = []
    for node in nodes:
        if node.version is None:
            continue
        found = signature(node.domain, node.op_type, node.version)
        if found is None:
            if node.domain == "":
                complaints.append(f"{provenance.describe(node)}: {_unknown(node)}")
        else:
            complaints += [f"{provenance.describe(node)}: {text}" for text in _mismatches(node, found)]
    if complaints:
        raise InvalidModelError(
            "the model breaks the operator specifications:\n  " + "\n  ".join(complaints),
            hint="export the model again, or fix these nodes",
        )


def _unknown(node: oir.Node) -> str:
    first = first_version(node.op_type)
    if first is None:
        return "ONNX has no such operator"
    return f"the operator came with opset {first}, the model imports opset {node.version}"


def _mismatches(node: oir.Node, schema: Signature) -> Iterable[str]:
    given = len(node.inputs)
    while given and node.inputs[given - 1] is None:
        given -= 1
    low, high = schema.inputs
    if not low <= given <= high:
        expected = str(low) if low == high else f"at least {low}" if given < low else f"at most {high}"
        yield f"{given} inputs, expected {expected}"
    low, high = schema.outputs
    if not low <= len(node.outputs) <= high:
        yield f"{len(node.outputs)} outputs, expected {low} to {high}"
    for name, attribute in node.attributes.items():
        if name not in schema.attributes:
            yield f"unknown attribute '{name}'"
        elif attribute.type.value != schema.attributes[name]:
            yield f"attribute '{name}' has type {attribute.type.name}"
    for name in sorted(schema.required - set(node.attributes)):
        yield f"attribute '{name}' is missing"
