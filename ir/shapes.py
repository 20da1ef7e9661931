"""Symbolic shape inference over the operator rules of onnx-shape-inference, with our own walk over the graph.

The rules of the library are used one node at a time. The walk is ours for three reasons:

* rules that guess are corrected (``optc.ir.shape_rules``): a shape must be right or unknown;
* types and shapes stored by an exporter are dropped first, so that stale sizes and names cannot leak;
* nothing but shapes and types is left behind on the values.

Shape objects may be shared between values: replace ``value.shape``, never edit it in place.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as oir
from onnx_shape_inference import (
    SYM_DATA_KEY,
    OpUsageError,
    ShapeInferenceContext,
    ShapeInferenceError,
    registry,
)

from optc.errors import InvalidModelError, OptcError
from optc.ir import provenance, schemas, shape_control, shape_rules
from optc.ir.dims import (
    Dim,
    all_values,
    bind,
    canonical,
    dim_names,
    from_expr,
    maximum,
    name_input_dims,
    names,
    subgraphs,
    to_expr,
    used_names,
)

__all__ = ["bind", "contents", "dim_names", "from_expr", "infer", "to_expr"]


def infer(model: oir.Model, *, keep_known: bool = False) -> None:
    """Infer the shape and type of every value, in place; functions must be inlined.

    Anonymous and illegal dimensions of inputs get names first. Sizes that depend on data get fresh names
    (``_d0``, ...). A value whose rank cannot be told keeps ``shape`` None. With ``keep_known`` the shapes that values
    already have are trusted and only refined; otherwise shapes of all values but inputs and initializers
    are inferred anew.

    Raises InvalidModelError naming the node whose operands do not fit together.
    """
    _Inference(model, keep_known).run()


def contents(model: oir.Model) -> dict[oir.Value, tuple[Dim, ...]]:
    """Return what is known about integer vectors and scalars that are computed from shapes.

    The result maps a node output of rank 0 or 1 to its elements, each an int or a symbolic dimension.
    The shapes that the model has are trusted, as by ``infer(keep_known=True)``.
    """
    inference = _Inference(model, keep_known=True)
    inference.run()
    return inference.context.contents()


class _Context(ShapeInferenceContext):  # type: ignore[misc]  # the library is not typed for mypy
    """The state of one inference. Dimensions are kept in the language of ``optc.ir.dims``."""

    def __init__(self, opset_imports: Mapping[str, int], policy: str) -> None:
        super().__init__(opset_imports, policy=policy)
        self.named_maxima: dict[frozenset[str], Dim] = {}

    def set_shape(self, value: oir.Value, shape: oir.Shape) -> bool:
        return bool(super().set_shape(value, oir.Shape(canonical(shape.dims))))

    def set_symbolic_value(self, value: oir.Value, data: list[Dim]) -> None:
        super().set_symbolic_value(value, canonical(data))

    def contents(self) -> dict[oir.Value, tuple[Dim, ...]]:
        """Return the elements of integer vectors. One that involves data is left out: it may be negative."""
        return {
            value: tuple(data)
            for value, data in self._symbolic_values.items()
            if not any(self.is_generated_symbol(name) for dim in data for name in names(str(dim)))
        }

    def larger(self, a: Dim, b: Dim) -> Dim:
        """Return the larger of two dimensions; the same name for the same two.

        Each Max around a Max takes sympy several times as long as the one before, and traced models nest them as
        deep as they have layers. So these get a name instead, and nothing is known of them.
        """
        if "Max(" not in f"{a}{b}":
            return maximum(a, b)
        key = frozenset((str(a), str(b)))
        if key not in self.named_maxima:
            self.named_maxima[key] = self.new_symbolic_dim()
        return self.named_maxima[key]

    def add_symbolic_equality(self, a: Dim | str, b: Dim | str) -> None:
        """Record nothing: this inference never renames dimensions."""


class _Inference:
    def __init__(self, model: oir.Model, keep_known: bool) -> None:
        registry.collect()
        self.graph = model.graph
        self.keep_known = keep_known
        self.context = _Context(model.opset_imports, policy="refine" if keep_known else "override")
        self.faults: list[OptcError] | None = None
        """Nodes of a branch whose operands do not fit together; None outside of branches, where that is an error."""

    def run(self) -> None:
        used = name_input_dims(self.graph)
        if self.keep_known:
            used |= used_names(all_values(self.graph))
        self.context.reserve_symbol_names(used)
        scratch: list[oir.Value] = []
        try:
            self.walk(self.graph, scratch)
        finally:
            for value in scratch:
                value.const_value = None
                value.metadata_props.pop(SYM_DATA_KEY, None)

    def walk(self, graph: oir.Graph, scratch: list[oir.Value]) -> None:
        for value in graph.initializers.values():
            if value.const_value is not None and value.shape != value.const_value.shape:
                value.shape = oir.Shape(value.const_value.shape.numpy())
        for node in graph:
            scratch.extend(v for v in node.outputs if v.const_value is None)
            if not self.keep_known:
                for value in node.outputs:
                    value.shape = None
            self.infer_node(node, scratch)

    def attempt(self, graph: oir.Graph, scratch: list[oir.Value]) -> OptcError | None:
        """Walk a graph that may never run; returns what is wrong with it. What follows a fault has no shape."""
        outer, self.faults = self.faults, []
        try:
            self.walk(graph, scratch)
            return self.faults[0] if self.faults else None
        finally:
            self.faults = outer

    def infer_node(self, node: oir.Node, scratch: list[oir.Value]) -> None:
        try:
            self.apply_rule(node, scratch)
        except OptcError as error:
            if self.faults is None:
                raise
            self.faults.append(error)
            for value in node.outputs:
                value.shape = None
            self.fill_types(node, self.context.get_opset_version(node.domain))

    def apply_rule(self, node: oir.Node, scratch: list[oir.Value]) -> None:
        context = self.context
        for value in node.inputs:
            if value is not None:
                context.name_anonymous_dims(value)
        try:
            version = context.get_opset_version(node.domain)
            control = shape_control.RULES.get(node.op_type) if node.domain == "" else None
            if control is not None and version >= shape_control.MIN_OPSET:
                control(context, node, lambda graph: self.attempt(graph, scratch))
                return
            for graph in subgraphs(node):
                self.walk(graph, scratch)
            rule = registry.get(node.domain, node.op_type, version)
            if rule is not None:
                before = [v.shape for v in node.outputs]
                rule(context, node)
                shape_rules.correct(context, node, before)
            self.fill_types(node, version)
        except OptcError:
            raise
        except Exception as error:  # the rules raise errors of every kind when a model is illegal
            cause = error.message if isinstance(error, OpUsageError | ShapeInferenceError) else repr(error)
            raise InvalidModelError(
                f"{provenance.describe(node)}: {cause}; its inputs are {_describe_inputs(node)}",
                hint="check the model with onnx.checker.check_model(path, full_check=True)",
            ) from error

    @staticmethod
    def fill_types(node: oir.Node, version: int) -> None:
        """Set the types that the schema alone decides: some rules set no type where they know no shape."""
        if all(value.type is not None for value in node.outputs):
            return
        schema = schemas.find(node.domain, node.op_type, version)
        for index, value in enumerate(node.outputs):
            if schema is not None and value.type is None:
                value.type = schemas.output_type(node, index, schema)


def _describe_inputs(node: oir.Node) -> str:
    return ", ".join(
        "(none)" if v is None else f"{v.name}: {v.dtype}{list(map(str, v.shape)) if v.shape is not None else ''}"
        for v in node.inputs
    )
