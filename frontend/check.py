"""The check of nodes against the operator schemas of their own opset, before anything is upgraded."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import onnx
import onnx_ir as oir

from optc.errors import InvalidModelError
from optc.ir import provenance, schemas

OLDEST_OPSET = 6
NEWEST_OPSET: int = onnx.defs.onnx_opset_version()
UNDECLARED = frozenset({"SimplifiedLayerNormalization"})
"""Operators that onnxruntime has added to the domain of ONNX; they are not checked."""


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
        schema = schemas.find(node.domain, node.op_type, node.version)
        if schema is not None:
            complaints += [f"{provenance.describe(node)}: {text}" for text in _mismatches(node, schema)]
        elif node.domain == "" and node.op_type not in UNDECLARED:
            complaints.append(f"{provenance.describe(node)}: {_unknown(node)}")
    if complaints:
        raise InvalidModelError(
            "the model breaks the operator specifications:\n  " + "\n  ".join(complaints),
            hint="export the model again, or fix these nodes",
        )


def _unknown(node: oir.Node) -> str:
    first = _first_version(node.op_type)
    if first is None:
        return "ONNX has no such operator"
    return f"the operator came with opset {first}, the model imports opset {node.version}"


@functools.cache
def _first_version(op_type: str) -> int | None:
    """Return the first opset of the default domain that has ``op_type``, or None."""
    history = onnx.defs.get_all_schemas_with_history()
    return min((s.since_version for s in history if s.name == op_type and s.domain == ""), default=None)


def _mismatches(node: oir.Node, schema: schemas.Schema) -> Iterable[str]:
    given = len(node.inputs)
    while given and node.inputs[given - 1] is None:
        given -= 1
    low, high = schema.input_count
    if not low <= given <= high:
        expected = str(low) if low == high else f"at least {low}" if given < low else f"at most {high}"
        yield f"{given} inputs, expected {expected}"
    low, high = schema.output_count
    if not low <= len(node.outputs) <= high:
        yield f"{len(node.outputs)} outputs, expected {low} to {high}"
    for name, attribute in node.attributes.items():
        if name not in schema.attributes:
            yield f"unknown attribute '{name}'"
        elif attribute.type != schema.attributes[name]:
            yield f"attribute '{name}' has type {attribute.type.name}, not {schema.attributes[name].name}"
    for name in sorted(schema.required - set(node.attributes)):
        yield f"attribute '{name}' is missing"
