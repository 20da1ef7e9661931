"""Operator schemas of ``onnx.defs``, read once per operator and version into plain Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import onnx
import onnx_ir as oir

OWN_DOMAIN = "optc"
"""The domain of operators that ONNX has no name for; they have no ONNX schema."""

# onnxruntime accepts models of opset 26 but not these attributes of opset 25; absent means the same.
_STAY_IMPLICIT = frozenset({("Attention", "left_window_size"), ("Attention", "right_window_size")})


@dataclass(frozen=True)
class Parameter:
    """A formal input or output: how often it may occur and its type: a type variable or a type."""

    name: str
    type: str
    optional: bool
    variadic: bool
    homogeneous: bool


@dataclass(frozen=True)
class Schema:
    """An operator schema. ``types`` maps each type variable to the types it may stand for."""

    deprecated: bool
    inputs: tuple[Parameter, ...]
    outputs: tuple[Parameter, ...]
    input_count: tuple[int, int]
    output_count: tuple[int, int]
    attributes: Mapping[str, oir.AttributeType]
    required: frozenset[str]
    defaults: Mapping[str, oir.Attr]
    types: Mapping[str, frozenset[str]]


@cache
def find(domain: str, op_type: str, version: int) -> Schema | None:
    """Return the schema of an operator as of ``version`` of its domain, or None if onnx knows none."""
    try:
        schema = onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None
    return Schema(
        deprecated=schema.deprecated,
        inputs=tuple(map(_parameter, schema.inputs)),
        outputs=tuple(map(_parameter, schema.outputs)),
        input_count=(schema.min_input, schema.max_input),
        output_count=(schema.min_output, schema.max_output),
        attributes={name: oir.AttributeType(int(a.type.value)) for name, a in schema.attributes.items()},
        required=frozenset(name for name, a in schema.attributes.items() if a.required),
        defaults={
            name: oir.serde.deserialize_attribute(a.default_value)
            for name, a in schema.attributes.items()
            if not a.required
            and a.default_value.type != onnx.AttributeProto.UNDEFINED
            and (op_type, name) not in _STAY_IMPLICIT
        },
        types={c.type_param_str: frozenset(c.allowed_type_strs) for c in schema.type_constraints},
    )


def _parameter(formal: onnx.defs.OpSchema.FormalParameter) -> Parameter:
    options = onnx.defs.OpSchema.FormalParameterOption
    return Parameter(
        name=formal.name,
        type=formal.type_str,
        optional=formal.option == options.Optional,
        variadic=formal.option == options.Variadic,
        homogeneous=formal.is_homogeneous,
    )


def parameter(formals: tuple[Parameter, ...], index: int) -> Parameter | None:
    """Return the formal parameter at a position; the last one repeats if it is variadic."""
    if index < len(formals):
        return formals[index]
    return formals[-1] if formals and formals[-1].variadic else None


def state_defaults(node: oir.Node, version: int) -> None:
    """Write the default values of absent attributes on the node, as canonical form wants them."""
    schema = find(node.domain, node.op_type, version)
    if schema is not None:
        for name, attribute in schema.defaults.items():
            node.attributes.setdefault(name, attribute)


@cache
def _tensor_type(dtype: oir.DataType) -> str:
    return f"tensor({dtype.name.lower()})"


def type_text(type_: oir.TypeProtocol) -> str:
    """Return a type as schemas write it: ``tensor(float)``, ``seq(tensor(int64))``, ``optional(...)``."""
    if isinstance(type_, oir.TensorType):
        return _tensor_type(type_.dtype)
    if isinstance(type_, oir.SparseTensorType):
        return f"sparse_{_tensor_type(type_.dtype)}"
    kind = "seq" if isinstance(type_, oir.SequenceType) else "optional"
    assert isinstance(type_.elem_type, oir.TypeProtocol)
    return f"{kind}({type_text(type_.elem_type)})"


def output_type(node: oir.Node, index: int, schema: Schema) -> oir.TypeProtocol | None:
    """Return the type of an output that the schema alone decides: a fixed tensor type, or that of an input."""
    formal = parameter(schema.outputs, index)
    if formal is None or (formal.variadic and not formal.homogeneous):
        return None
    if formal.type not in schema.types:
        dtype = oir.DataType.__members__.get(formal.type.removeprefix("tensor(").removesuffix(")").upper())
        return oir.TensorType(dtype) if dtype is not None and formal.type.startswith("tensor(") else None
    for position, value in enumerate(node.inputs):
        given = parameter(schema.inputs, position)
        if given is not None and given.type == formal.type and value is not None and value.type is not None:
            return value.type
    return None
