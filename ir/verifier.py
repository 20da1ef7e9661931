"""The verifier: what canonical form is, as checks. It names every violation at once, by node and value."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as oir

from optc.errors import IRError
from optc.ir import CANONICAL_OPSET, dims, provenance, schemas

_SHOWN = 40


def verify(model: oir.Model) -> None:
    """Check that ``model`` is in canonical form. Raises IRError with all violations, one a line."""
    found = violations(model)
    if found:
        lines = [f"  {line}" for line in found[:_SHOWN]]
        if len(found) > _SHOWN:
            lines.append(f"  ... and {len(found) - _SHOWN} more")
        raise IRError(
            f"the model is not in canonical form, {len(found)} violations:\n" + "\n".join(lines),
            hint="a pass or the frontend broke it: --print-ir-after shows the graph after each pass",
        )


def violations(model: oir.Model) -> list[str]:
    """Return every violation of canonical form, in graph order; an empty list for a canonical model."""
    return list(_Verifier(model).run())


class _Verifier:
    def __init__(self, model: oir.Model) -> None:
        self.model = model
        self.imports = model.opset_imports
        self.node_names: set[str] = set()
        self.value_names: set[str] = set()
        self.dims_seen: dict[str, bool] = {}
        self.types: dict[int, tuple[oir.TypeProtocol, str]] = {}

    def run(self) -> Iterator[str]:
        version = self.imports.get("")
        if version is None or version < CANONICAL_OPSET:
            yield f"the model imports opset {version} of the default domain instead of {CANONICAL_OPSET}"
            return
        if self.model.functions:
            yield f"functions are not inlined: {', '.join(sorted(name for _, name, _ in self.model.functions))}"
        yield from self.graph(self.model.graph, set(), outermost=True)

    def graph(self, graph: oir.Graph, outer: set[oir.Value], *, outermost: bool) -> Iterator[str]:
        known = set(outer)
        for value in graph.inputs:
            yield from self.value(value, "graph input")
            if value.is_initializer():
                yield f"value {value.name!r} is a graph input and an initializer"
            known.add(value)
        for name, value in graph.initializers.items():
            yield from self.initializer(name, value, outermost)
            known.add(value)
        for node in graph:
            yield from self.node(node, known)
            known.update(node.outputs)
        yield from self.outputs(graph)

    def outputs(self, graph: oir.Graph) -> Iterator[str]:
        seen: set[oir.Value] = set()
        for value in graph.outputs:
            producer = value.producer()
            if producer is not None:
                own = producer.graph is graph
            else:
                own = value.graph is graph and (value.is_graph_input() or value.is_initializer())
            if not own:
                yield f"graph output {value.name!r} is not a value of its graph"
            if value in seen:
                yield f"value {value.name!r} is a graph output twice"
            seen.add(value)

    def initializer(self, name: str, value: oir.Value, outermost: bool) -> Iterator[str]:
        if not outermost:
            yield f"initializer {name!r} is not in the outermost graph"
        if name != value.name:
            yield f"initializer {value.name!r} is registered as {name!r}"
        if not value.is_graph_input():
            yield from self.value(value, "initializer")
        tensor = value.const_value
        if tensor is None:
            yield f"initializer {name!r} has no data"
        elif value.shape != tensor.shape or value.dtype != tensor.dtype:
            yield (
                f"initializer {name!r} is declared {value.dtype}{value.shape} and holds {tensor.dtype}{tensor.shape}"
            )

    def value(self, value: oir.Value, what: str) -> Iterator[str]:
        if not value.name:
            yield f"{what} without a name"
        elif value.name in self.value_names:
            yield f"value name {value.name!r} is used twice"
        else:
            self.value_names.add(value.name)
        if value.type is None or value.dtype == oir.DataType.UNDEFINED:
            yield f"{what} {value.name!r} has no type"
        for dim in value.shape or ():
            if isinstance(dim, int):
                if dim < 0:
                    yield f"{what} {value.name!r} has the size {dim}"
            elif dim.value is None:
                yield f"{what} {value.name!r} has an anonymous dimension: {value.shape}"
            elif not self.legal_dim(dim.value):
                yield f"{what} {value.name!r} has the dimension {dim.value!r}, neither name nor expression"
        for user, _ in value.uses():
            if user.graph is None:
                yield f"{what} {value.name!r} is still used by the removed node {provenance.describe(user)}"

    def legal_dim(self, text: str) -> bool:
        if text not in self.dims_seen:
            self.dims_seen[text] = dims.is_name(text) or (dims.is_expression(text) and bool(dims.names(text)))
        return self.dims_seen[text]

    def node(self, node: oir.Node, known: set[oir.Value]) -> Iterator[str]:
        where = provenance.describe(node)
        if not node.name:
            yield f"{where} has no name"
        elif node.name in self.node_names:
            yield f"node name {node.name!r} is used twice"
        self.node_names.add(node.name or "")
        if not provenance.is_stamped(node):
            yield f"{where} does not say where it comes from"
        if node.domain == "" and node.op_type == "Constant":
            yield f"{where} should be an initializer"
        for index, value in enumerate(node.inputs):
            if value is not None and value not in known:
                yield f"{where}: input {index}, {value.name!r}, is not defined before it in its graph or an outer one"
        if node.inputs and node.inputs[-1] is None:
            yield f"{where}: a missing optional input at the end of its inputs"
        for index, value in enumerate(node.outputs):
            if value.producer() is not node:
                yield f"{where}: output {index}, {value.name!r}, names another node as its producer"
            if value.name or value.uses() or value.is_graph_output():
                yield from self.value(value, f"output {index} of {where},")
        yield from self.against_schema(node, where)
        for subgraph in dims.subgraphs(node):
            yield from self.graph(subgraph, known, outermost=False)

    def against_schema(self, node: oir.Node, where: str) -> Iterator[str]:
        version = self.imports.get(node.domain)
        if version is None:
            yield f"{where}: the model does not import domain {node.domain!r}"
            return
        if node.domain == schemas.OWN_DOMAIN:
            return
        schema = schemas.find(node.domain, node.op_type, version)
        if schema is None or schema.deprecated:
            yield f"{where}: opset {version} has no such operator"
            return
        for what, count, (least, most) in (
            ("inputs", len(node.inputs), schema.input_count),
            ("outputs", len(node.outputs), schema.output_count),
        ):
            if not least <= count <= most:
                allowed = str(least) if least == most else f"{least} to {most}"
                yield f"{where}: {count} {what}, its schema wants {allowed}"
                return
        yield from self.attributes(node, schema, where)
        yield from self.operand_types(node, schema, where)

    def attributes(self, node: oir.Node, schema: schemas.Schema, where: str) -> Iterator[str]:
        for name, attribute in node.attributes.items():
            expected = schema.attributes.get(name)
            if attribute.is_ref():
                yield f"{where}: attribute {name!r} refers to an attribute of a function"
            elif expected is None:
                yield f"{where}: its schema has no attribute {name!r}"
            elif attribute.type != expected:
                yield f"{where}: attribute {name!r} is of type {attribute.type} instead of {expected}"
        for name in sorted(schema.required - node.attributes.keys()):
            yield f"{where}: attribute {name!r} is required"
        for name in schema.defaults:
            if name not in node.attributes:
                yield f"{where}: the default of attribute {name!r} is not explicit"

    def operand_types(self, node: oir.Node, schema: schemas.Schema, where: str) -> Iterator[str]:
        bound: dict[str, str] = {}
        for what, formals, values in (
            ("input", schema.inputs, node.inputs),
            ("output", schema.outputs, node.outputs),
        ):
            for index, value in enumerate(values):
                formal = schemas.parameter(formals, index)
                if formal is None:
                    continue
                if value is None or (what == "output" and not value.name):
                    if not formal.optional:
                        yield f"{where}: {what} {index} ({formal.name}) is missing"
                    continue
                if value.type is None:
                    continue
                type_ = self.type_text(value.type)
                allowed = schema.types.get(formal.type)
                if type_ != formal.type if allowed is None else type_ not in allowed:
                    yield f"{where}: {what} {index}, {value.name!r}, cannot be {type_}"
                elif allowed is not None and (formal.homogeneous or not formal.variadic):
                    first = bound.setdefault(formal.type, type_)
                    if first != type_:
                        yield f"{where}: {what} {index}, {value.name!r}, is {type_} where {first} is expected"

    def type_text(self, type_: oir.TypeProtocol) -> str:
        # Types are shared between values and short-lived objects do not occur here: the cache keeps them alive.
        cached = self.types.get(id(type_))
        if cached is None:
            cached = self.types[id(type_)] = (type_, schemas.type_text(type_))
        return cached[1]
