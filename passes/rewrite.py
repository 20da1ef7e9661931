"""The rewrite engine: rules anchored at an operator, applied in one topological sweep until nothing fires.

A rule is a function ``(node, ops) -> Rewrite | Miss | None`` with a decorator that names its equation:

* ``Rewrite(values)``: the node's outputs are replaced by these values, which the rule built with ``ops``;
* ``Miss(reason)``: the node looks like the pattern, and this is why the rule must not fire;
* ``None``: the node is something else.

A rule never edits the graph itself: it only creates nodes through ``ops`` (inserted before the anchor when
the rule fires, dropped when it does not). Producers that become dead are removed by the engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from optc.ir import provenance
from optc.passes.base import Pass, PassResult, Skipped
from optc.passes.types import NodeTyper

ANY = "*"


@dataclass(frozen=True)
class Rewrite:
    """New values for all outputs of the anchor, in order."""

    values: Sequence[oir.Value]


@dataclass(frozen=True)
class Miss:
    """A near-miss: the pattern is there, a guard forbids the rewrite."""

    reason: str


Outcome = Rewrite | Miss | None
RuleFunction = Callable[[oir.Node, "Ops"], Outcome]


@dataclass(frozen=True)
class Rule:
    """A named equation, the operators of the default domain that it is anchored at, and its function."""

    name: str
    anchors: frozenset[str]
    function: RuleFunction


def rule(name: str, *anchors: str) -> Callable[[RuleFunction], Rule]:
    """Turn a function into the rule ``name``, tried at every node whose operator is one of ``anchors``.

    The anchor ``ANY`` stands for every operator of the default domain.
    """

    def wrap(function: RuleFunction) -> Rule:
        return Rule(name, frozenset(anchors), function)

    return wrap


class Ops:
    """Builds replacement nodes: ``ops("Mul", x, y)``. Constants become outermost initializers."""

    def __init__(self, graph: oir.Graph, anchor: oir.Node, opset: int) -> None:
        self.graph = graph
        self.anchor = anchor
        self.opset = opset
        self.nodes: list[oir.Node] = []
        self.constants: list[oir.Value] = []

    def __call__(
        self,
        op_type: str,
        *inputs: oir.Value | None,
        like: oir.Value | None = None,
        shape: oir.Shape | None = None,
        dtype: oir.DataType | None = None,
        domain: str = "",
        **attributes: int | float | str | Sequence[int] | Sequence[float],
    ) -> oir.Value:
        """Create a one-output node. The type comes from ``like``, or from ``shape`` and ``dtype``.

        Neither is needed: values that replace the anchor's outputs inherit their types, others are inferred.
        """
        (output,) = self.many(op_type, *inputs, outputs=1, domain=domain, **attributes)
        if like is not None:
            output.shape, output.type = like.shape, like.type
        if shape is not None:
            output.shape = shape
        if dtype is not None:
            output.type = oir.TensorType(dtype)
        return output

    def many(
        self,
        op_type: str,
        *inputs: oir.Value | None,
        outputs: int,
        domain: str = "",
        **attributes: int | float | str | Sequence[int] | Sequence[float],
    ) -> Sequence[oir.Value]:
        """Create a node with several outputs, typed by inference."""
        node = oir.node(op_type, list(inputs), dict(attributes), domain=domain, num_outputs=outputs)
        self.nodes.append(node)
        return node.outputs

    def abandon(self) -> None:
        """Take back the uses that the created nodes make of existing values."""
        for node in self.nodes:
            for index in range(len(node.inputs)):
                node.replace_input_with(index, None)

    def constant(self, array: np.ndarray, hint: str = "constant") -> oir.Value:
        """Return an initializer holding ``array`` (dtype kept)."""
        tensor = oir.tensor(np.ascontiguousarray(array).reshape(array.shape))
        value = oir.Value(
            name=f"{hint}.{self.anchor.name}.{len(self.constants)}",
            shape=oir.Shape(array.shape),
            type=oir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.constants.append(value)
        return value


class RewritePass(Pass):
    """A pass made of rules. One call sweeps until no rule fires any more (at most ``max_sweeps`` times)."""

    max_sweeps = 10

    def __init__(self, name: str, rules: Iterable[Rule]) -> None:
        self.name = name
        self.rules = tuple(rules)
        self._by_anchor: dict[str, list[Rule]] = {}
        for entry in self.rules:
            for anchor in entry.anchors:
                self._by_anchor.setdefault(anchor, []).append(entry)

    def rule_names(self) -> tuple[str, ...]:
        """Return the names of the rules."""
        return tuple(entry.name for entry in self.rules)

    def without(self, names: frozenset[str]) -> Pass:
        """Return this pass without the rules called ``names``."""
        if names.isdisjoint(self.rule_names()):
            return self
        return RewritePass(self.name, [entry for entry in self.rules if entry.name not in names])

    def call(self, model: oir.Model) -> PassResult:
        """Apply the rules everywhere, in subgraphs too."""
        sweep = _Sweep(model, self._by_anchor)
        for _ in range(self.max_sweeps):
            if not sweep.graph(model.graph):
                break
        return PassResult(bool(sweep.fired), dict(sweep.fired), list(sweep.skipped.values()))


class _Sweep:
    """The state of one call of a RewritePass."""

    def __init__(self, model: oir.Model, rules: Mapping[str, Sequence[Rule]]) -> None:
        self.root = model.graph
        self.rules = rules
        self.namer = Namer(model)
        self.typer = NodeTyper(model)
        self.fired: Counter[str] = Counter()
        self.skipped: dict[tuple[str, str], Skipped] = {}

    def graph(self, graph: oir.Graph) -> bool:
        """Try every rule at every node of ``graph`` and its subgraphs once; tell whether one fired."""
        changed = False
        for node in graph:
            for subgraph in subgraphs(node):
                changed |= self.graph(subgraph)
            if node.domain == "":
                changed |= self._node(graph, node)
        return changed

    def _node(self, graph: oir.Graph, node: oir.Node) -> bool:
        for entry in (*self.rules.get(node.op_type, ()), *self.rules.get(ANY, ())):
            ops = Ops(graph, node, self.root.opset_imports[""])
            outcome = entry.function(node, ops)
            key = (entry.name, node.name or "")
            if isinstance(outcome, Rewrite):
                self.skipped.pop(key, None)
                self._commit(graph, node, ops, outcome, entry.name)
                self.fired[entry.name] += 1
                return True
            ops.abandon()
            if isinstance(outcome, Miss):
                self.skipped[key] = Skipped(entry.name, node.name or "", outcome.reason)
        return False

    def _commit(self, graph: oir.Graph, anchor: oir.Node, ops: Ops, rewrite: Rewrite, rule_name: str) -> None:
        if len(rewrite.values) != len(anchor.outputs):
            raise AssertionError(f"{rule_name}: {len(rewrite.values)} values for {len(anchor.outputs)} outputs")
        for value in ops.constants:
            value.name = self.namer.fresh(value.name or "constant")
            self.root.initializers.add(value)
        for node in ops.nodes:
            # Nodes that a rule moved here, out of a branch, keep their names.
            node.name = node.name or self.namer.fresh(f"{anchor.name}/{node.op_type}")
            for output in node.outputs:
                output.name = output.name or self.namer.fresh(f"{node.name}.out")
        for old, new in zip(anchor.outputs, rewrite.values, strict=True):
            inherit_type(old, new)
        self.typer.infer(ops.nodes)
        graph.insert_before(anchor, ops.nodes)
        for old, new in zip(anchor.outputs, rewrite.values, strict=True):
            replace_value(graph, old, new, self.namer)
        replaced = remove_dead([anchor])[::-1]
        for node in ops.nodes:
            provenance.inherit(node, [node, *replaced], made_by=rule_name)


class Namer:
    """Gives names that the whole model does not use yet."""

    def __init__(self, model: oir.Model) -> None:
        self.used: set[str] = set()
        self.counters: Counter[str] = Counter()
        for graph in model.graphs():
            self.used.update(v.name for v in graph.inputs if v.name)
            self.used.update(graph.initializers)
            for node in graph:
                self.used.add(node.name or "")
                self.used.update(v.name for v in node.outputs if v.name)

    def fresh(self, stem: str) -> str:
        """Return ``stem``, with a number when it is taken, and remember it as used."""
        name = stem
        while name in self.used:
            self.counters[stem] += 1
            name = f"{stem}.{self.counters[stem]}"
        self.used.add(name)
        return name


def subgraphs(node: oir.Node) -> list[oir.Graph]:
    """Return the graphs in the attributes of ``node``: branches of If, bodies of Loop and Scan."""
    found: list[oir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == oir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == oir.AttributeType.GRAPHS:
            found.extend(attribute.as_graphs())
    return found


def inherit_type(old: oir.Value, new: oir.Value) -> None:
    """Give ``new``, which replaces ``old``, what is known of ``old`` and not of ``new``.

    A type that is missing, a shape that is missing, and integers for dims that are symbolic.
    """
    if new.type is None:
        new.type = old.type
    if new.shape is None:
        new.shape = old.shape
    elif (
        old.shape is not None
        and len(old.shape) == len(new.shape)
        and old.shape != new.shape
        and not new.is_graph_input()  # the interface stays as it is
        and not new.is_initializer()  # a constant has the shape that it has
    ):
        new.shape = oir.Shape([o if isinstance(o, int) else n for o, n in zip(old.shape, new.shape, strict=True)])


def replace_value(graph: oir.Graph, old: oir.Value, new: oir.Value, namer: Namer) -> None:
    """Make every use of ``old``, a node output of ``graph``, a use of ``new``; a graph output keeps its name.

    A graph output that would become a graph input, an initializer, a value of an enclosing graph or a second
    name of another output gets an Identity node, since ONNX names outputs by their value.
    """
    producer = old.producer()
    assert producer is not None
    if old.is_graph_output():
        maker = new.producer()
        if maker is None or maker.graph is not graph or new.is_graph_output():
            identity = oir.node("Identity", [new], name=namer.fresh(f"{producer.name}/Identity"))
            identity.outputs[0].shape, identity.outputs[0].type = old.shape, old.type
            provenance.inherit(identity, [producer], made_by="graph output")
            graph.insert_before(producer, [identity])
            new = identity.outputs[0]
        name, old.name = old.name, namer.fresh(f"{old.name}.replaced")
        new.name = name
    oir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def remove_dead(nodes: Iterable[oir.Node | None]) -> list[oir.Node]:
    """Remove those of ``nodes`` that nothing uses any more, and their producers in turn; return what was removed.

    A use inside a subgraph is a use. Initializers that lose their last use go too.
    """
    stack = [node for node in nodes if node is not None]
    removed: list[oir.Node] = []
    while stack:
        node = stack.pop()
        if node.graph is None or any(v.uses() or v.is_graph_output() for v in node.outputs):
            continue
        inputs = [v for inner in _with_nested(node) for v in inner.inputs if v is not None]
        for graph in subgraphs(node):
            _detach(graph)
        node.graph.remove(node, safe=True)
        removed.append(node)
        for value in inputs:
            maker = value.producer()
            if maker is not None:
                stack.append(maker)
            elif is_unused_initializer(value) and value.graph is not None:
                value.graph.initializers.pop(value.name or "")
    return removed


def is_unused_initializer(value: oir.Value) -> bool:
    """Tell whether ``value`` is an initializer, and neither a graph input nor output, that no node reads."""
    return value.is_initializer() and not value.is_graph_input() and not value.is_graph_output() and not value.uses()


def _with_nested(node: oir.Node) -> list[oir.Node]:
    return [node, *(inner for graph in subgraphs(node) for inner in graph.all_nodes())]


def _detach(graph: oir.Graph) -> None:
    """Drop the uses that the nodes of a removed subgraph make, of captured values above all."""
    for node in graph.all_nodes():
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)
