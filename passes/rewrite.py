"""The rewrite engine: rules anchored at an operator, applied in one topological sweep until nothing fires.

A rule is a function ``(node, ops) -> Rewrite | Miss | None`` with a decorator that names its equation:

* ``Rewrite(values)``: the node's outputs are replaced by these values, which the rule built with ``ops``;
* ``Miss(reason)``: the node looks like the pattern, and this is why the rule must not fire;
* ``None``: the node is something else.

A rule never edits the graph itself: it only creates nodes through ``ops`` (inserted before the anchor when the
rule fires, dropped when it does not). Producers that become dead are removed by the engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from optc.ir import provenance
from optc.passes.base import Pass, PassResult, Skipped


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
    """Turn a function into the rule ``name``, tried at every node whose operator is one of ``anchors``."""

    def wrap(function: RuleFunction) -> Rule:
        return Rule(name, frozenset(anchors), function)

    return wrap


class Ops:
    """Builds replacement nodes: ``ops("Mul", x, y)``. Constants become initializers of the outermost graph."""

    def __init__(self, graph: oir.Graph, anchor: oir.Node) -> None:
        self.graph = graph
        self.anchor = anchor
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

        The values that replace the anchor's outputs need neither: they inherit the outputs' types.
        """
        node = oir.node(op_type, list(inputs), attributes=dict(attributes), domain=domain)
        self.nodes.append(node)
        output = node.outputs[0]
        if like is not None:
            output.shape, output.type = like.shape, like.type
        if shape is not None:
            output.shape = shape
        if dtype is not None:
            output.type = oir.TensorType(dtype)
        return output

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

    def call(self, model: oir.Model) -> PassResult:
        """Apply the rules everywhere, in subgraphs too."""
        fired: Counter[str] = Counter()
        skipped: dict[tuple[str, str], Skipped] = {}
        namer = _Namer(model)
        for _ in range(self.max_sweeps):
            if not self._sweep(model.graph, model.graph, namer, fired, skipped):
                break
        return PassResult(bool(fired), dict(fired), list(skipped.values()))

    def _sweep(
        self,
        root: oir.Graph,
        graph: oir.Graph,
        namer: _Namer,
        fired: Counter[str],
        skipped: dict[tuple[str, str], Skipped],
    ) -> bool:
        changed = False
        for node in graph:
            for attribute in node.attributes.values():
                for subgraph in _subgraphs(attribute):
                    changed |= self._sweep(root, subgraph, namer, fired, skipped)
            if node.domain != "":
                continue
            for entry in self._by_anchor.get(node.op_type, ()):
                ops = Ops(graph, node)
                outcome = entry.function(node, ops)
                key = (entry.name, node.name or "")
                if isinstance(outcome, Miss):
                    skipped[key] = Skipped(entry.name, node.name or "", outcome.reason)
                elif isinstance(outcome, Rewrite):
                    skipped.pop(key, None)
                    _commit(root, graph, node, ops, outcome, entry.name, namer)
                    fired[entry.name] += 1
                    changed = True
                    break
        return changed


class _Namer:
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
        name = stem
        while name in self.used:
            self.counters[stem] += 1
            name = f"{stem}.{self.counters[stem]}"
        self.used.add(name)
        return name


def _subgraphs(attribute: oir.Attr) -> list[oir.Graph]:
    if attribute.type == oir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    if attribute.type == oir.AttributeType.GRAPHS:
        return list(attribute.as_graphs())
    return []


def _commit(
    root: oir.Graph,
    graph: oir.Graph,
    anchor: oir.Node,
    ops: Ops,
    rewrite: Rewrite,
    rule_name: str,
    namer: _Namer,
) -> None:
    if len(rewrite.values) != len(anchor.outputs):
        raise AssertionError(f"{rule_name}: {len(rewrite.values)} values for {len(anchor.outputs)} outputs")
    for value in ops.constants:
        value.name = namer.fresh(value.name or "constant")
        root.initializers.add(value)
    for node in ops.nodes:
        node.name = namer.fresh(f"{anchor.name}/{node.op_type}")
        for output in node.outputs:
            output.name = namer.fresh(f"{node.name}.out")
        provenance.inherit(node, [anchor], made_by=rule_name)
    graph.insert_before(anchor, ops.nodes)
    for old, new in zip(anchor.outputs, rewrite.values, strict=True):
        if new.type is None:
            new.type = old.type
        if new.shape is None:
            new.shape = old.shape
        replace_value(graph, old, new)
    producers = [v.producer() for v in anchor.inputs if v is not None]
    graph.remove(anchor, safe=True)
    remove_dead(producers)


def replace_value(graph: oir.Graph, old: oir.Value, new: oir.Value) -> None:
    """Make every use of ``old`` a use of ``new``; a graph output keeps its public name.

    A graph output that would become a graph input, an initializer or a second name of another output gets an
    Identity node, since ONNX names outputs by their value.
    """
    if old.is_graph_output():
        producer = new.producer()
        if producer is None or producer.graph is not graph or new.is_graph_output():
            identity = oir.node("Identity", [new], name=f"{old.name}/Identity")
            identity.outputs[0].shape, identity.outputs[0].type = old.shape, old.type
            assert old.producer() is not None
            graph.insert_before(old.producer(), [identity])
            new = identity.outputs[0]
        name, old.name = old.name, f"{old.name}.replaced"
        new.name = name
    oir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def remove_dead(nodes: Iterable[oir.Node | None]) -> None:
    """Remove those of ``nodes`` that nothing uses any more, and their producers in turn."""
    stack = [node for node in nodes if node is not None]
    while stack:
        node = stack.pop()
        if node.graph is None or any(v.uses() or v.is_graph_output() for v in node.outputs):
            continue
        stack.extend(p for v in node.inputs if v is not None and (p := v.producer()) is not None)
        node.graph.remove(node, safe=True)
