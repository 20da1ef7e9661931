from __future__ import annotations

from collections.abc import Callable

import networkx
import onnx_ir as oir

from optc.ir.graph import statistics, to_networkx

Canonical = Callable[..., oir.Model]


def test_nodes_and_edges_with_bytes(canonical: Canonical) -> None:
    model = canonical(
        """
        g (float[n,4] x) => (float[] y)
        { a, b = Split<axis=1, num_outputs=2>(x)
          c = Relu(a)
          d = Add(a, b)
          y = Mul(c, d) }
        """
    )
    graph = to_networkx(model)
    assert list(graph) == ["n0", "n1", "n2", "n3"]
    assert networkx.is_directed_acyclic_graph(graph)
    assert graph.nodes["n0"]["op"] == "Split"
    assert graph.nodes["n0"]["node"] is model.graph[0]
    both = graph.edges["n0", "n2"]
    assert both["values"] == ["a", "b"]
    assert str(both["bytes"]) == "16*n"
    assert set(graph.edges) == {("n0", "n1"), ("n0", "n2"), ("n1", "n3"), ("n2", "n3")}


def test_a_value_read_twice_flows_once(canonical: Canonical) -> None:
    graph = to_networkx(canonical("g (float[4] x) => (float[] y) { a = Relu(x)\n y = Add(a, a) }"))
    assert graph.edges["n0", "n1"]["bytes"] == 16


def test_unknown_sizes_are_none(canonical: Canonical) -> None:
    model = canonical("g (float[6] x, int64[k] s) => (float[] y) { r = Reshape(x, s)\n y = Relu(r) }")
    assert to_networkx(model).edges["n0", "n1"]["bytes"] is None


def test_subgraphs_read_through_their_node(canonical: Canonical) -> None:
    model = canonical(
        """
        g (bool c, float[4] x) => (float[] y)
        {
            h = Relu(x)
            y = If(c) <then_branch = t () => (float[] a) { a = Neg(h) },
                       else_branch = e () => (float[] b) { b = Neg(x) }>
        }
        """
    )
    graph = to_networkx(model)
    (edge,) = graph.edges
    assert graph.edges[edge]["values"] == ["h"]
    assert statistics(model).operators == {"Neg": 2, "If": 1, "Relu": 1}


def test_statistics(mlp: oir.Model) -> None:
    found = statistics(mlp)
    assert (found.nodes, found.edges, found.depth, found.width, found.components) == (3, 2, 3, 1, 1)
