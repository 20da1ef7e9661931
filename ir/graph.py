"""The dataflow of a model as a networkx graph, for algorithms that are not about operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as oir

from optc.ir import dims
from optc.ir.sizes import total, value_bytes

if TYPE_CHECKING:
    import networkx


@dataclass(frozen=True)
class Statistics:
    """The shape of a dataflow graph. ``depth`` counts the nodes on the longest path, ``width`` those on one level."""

    nodes: int
    edges: int
    depth: int
    width: int
    components: int
    operators: dict[str, int]


def reads(node: oir.Node) -> Iterator[oir.Value]:
    """Yield the values that ``node`` reads: its inputs, and what its subgraphs take from outside of them."""
    for value in node.inputs:
        if value is not None:
            yield value
    for subgraph in dims.subgraphs(node):
        yield from _captured(subgraph)


def _captured(graph: oir.Graph) -> Iterator[oir.Value]:
    own = set(dims.all_values(graph))
    for node in graph:
        for value in reads(node):
            if value not in own:
                yield value
    for value in graph.outputs:
        if value not in own:
            yield value


def to_networkx(model: oir.Model) -> networkx.DiGraph:
    """Return the nodes of the outermost graph as a ``DiGraph``.

    Nodes are keyed by name, in topological order, with ``op`` and ``node`` (the ``onnx_ir.Node``). An edge
    carries ``values`` (names) and ``bytes``: an int, a sympy expression, or None where a shape is unknown.
    """
    import networkx

    graph = networkx.DiGraph()
    for node in model.graph:
        graph.add_node(node.name, op=node.op_type, node=node)
    for node in model.graph:
        for value in dict.fromkeys(reads(node)):
            producer = value.producer()
            if producer is None:
                continue
            size = value_bytes(value)
            if graph.has_edge(producer.name, node.name):
                edge = graph.edges[producer.name, node.name]
                edge["values"].append(value.name)
                edge["bytes"] = total([edge["bytes"], size])
            else:
                graph.add_edge(producer.name, node.name, values=[value.name], bytes=size)
    return graph


def statistics(model: oir.Model) -> Statistics:
    """Return counts over the outermost graph; ``operators`` counts subgraphs too, most frequent first."""
    import networkx

    graph = to_networkx(model)
    levels = [len(level) for level in networkx.topological_generations(graph)]
    operators = Counter(node.op_type for node in model.graph.all_nodes())
    return Statistics(
        nodes=graph.number_of_nodes(),
        edges=graph.number_of_edges(),
        depth=len(levels),
        width=max(levels, default=0),
        components=networkx.number_weakly_connected_components(graph),
        operators=dict(sorted(operators.items(), key=lambda item: (-item[1], item[0]))),
    )
