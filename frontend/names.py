"""Unique names for every value and node of a model."""

from __future__ import annotations

from collections import Counter

import onnx_ir as oir


class Names:
    """The names in use; hands out new ones."""

    def __init__(self) -> None:
        self._used: set[str] = set()
        self._next: Counter[str] = Counter()

    def claim(self, name: str) -> bool:
        """Take ``name``; return False if somebody has it already."""
        if name in self._used:
            return False
        self._used.add(name)
        return True

    def fresh(self, stem: str) -> str:
        """Take ``stem`` if it is free, else ``stem_1``, ``stem_2`` and so on."""
        name = stem
        while not self.claim(name):
            self._next[stem] += 1
            name = f"{stem}_{self._next[stem]}"
        return name


def make_unique(model: oir.Model) -> tuple[Names, Names]:
    """Give every value and every node of ``model``, subgraphs included, a unique non-empty name.

    Inputs and outputs of the model keep their names; of the others, the first to use a name keeps it.
    Returns the names of values and of nodes, for more to come.
    """
    values, nodes = Names(), Names()
    done: set[oir.Value] = set()

    def settle(value: oir.Value, stem: str) -> None:
        if value in done:
            return
        done.add(value)
        if not value.name or not values.claim(value.name):
            value.name = values.fresh(value.name or stem)

    for index, value in enumerate(model.graph.inputs):
        settle(value, f"input_{index}")
    for index, value in enumerate(model.graph.outputs):
        settle(value, f"output_{index}")
    graphs = [model.graph, *model.graph.subgraphs()]
    for graph in graphs:
        for value in graph.initializers.values():
            settle(value, "constant")
    for graph in graphs:
        for value in graph.inputs:
            settle(value, "argument")
        for node in graph:
            if not node.name or not nodes.claim(node.name):
                node.name = nodes.fresh(node.name or node.op_type)
            for index, value in enumerate(node.outputs):
                settle(value, f"{node.name}_output_{index}")
    return values, nodes
