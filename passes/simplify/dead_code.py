"""Dead code: nodes whose outputs nothing uses, outputs that nothing reads, and initializers without use."""

from __future__ import annotations

from collections import Counter

import onnx_ir as oir

from optc.passes.base import Pass, PassResult
from optc.passes.rewrite import is_unused_initializer, remove_dead, subgraphs

# Operators that mark an unused trailing output by leaving it out; for others every output is always there.
_OPTIONAL_OUTPUTS = frozenset({"BatchNormalization", "Dropout", "GRU", "LSTM", "LayerNormalization", "MaxPool", "RNN"})


class DeadCode(Pass):
    """Removes what does not contribute to an output; a use inside a subgraph counts."""

    name = "dead-code"

    def call(self, model: oir.Model) -> PassResult:
        """Run on a canonical model."""
        fired: Counter[str] = Counter()
        self._graph(model.graph, fired)
        for value in list(model.graph.initializers.values()):
            if is_unused_initializer(value):
                model.graph.initializers.pop(value.name or "")
                fired["unused initializer"] += 1
        return PassResult(bool(fired), dict(fired))

    def _graph(self, graph: oir.Graph, fired: Counter[str]) -> None:
        for node in reversed(graph):
            if removed := remove_dead([node]):
                fired["unused node"] += len(removed)
                continue
            fired["unused output"] += _drop_outputs(node)
            for subgraph in subgraphs(node):
                self._graph(subgraph, fired)
        if not fired["unused output"]:
            del fired["unused output"]


def _drop_outputs(node: oir.Node) -> int:
    """Drop unused optional outputs at the end."""
    if node.domain != "" or node.op_type not in _OPTIONAL_OUTPUTS:
        return 0
    keep = len(node.outputs)
    while keep > 1 and not node.outputs[keep - 1].uses() and not node.outputs[keep - 1].is_graph_output():
        keep -= 1
    dropped = len(node.outputs) - keep
    if dropped:
        node.resize_outputs(keep)
    return dropped


PASS = DeadCode()
