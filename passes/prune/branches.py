"""Whole layers: residual branches that can be left out, since ``x + f(x)`` without ``f`` is ``x``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as oir

from optc.ir.graph import reads
from optc.passes.match import constant, same_shape
from optc.passes.rewrite import Namer, remove_dead, replace_value


@dataclass(frozen=True)
class Branch:
    """An addition of ``skip``, its input number ``index``, and of what ``nodes`` compute from it."""

    add: oir.Node
    index: int
    nodes: tuple[oir.Node, ...]

    @property
    def skip(self) -> oir.Value:
        """What is left of the addition without the branch."""
        value = self.add.inputs[self.index]
        assert value is not None
        return value

    @property
    def output(self) -> oir.Value:
        """The sum."""
        return self.add.outputs[0]


def find(model: oir.Model) -> list[Branch]:
    """Return the residual branches that hold weights, in order; a branch may hold others."""
    order = {node: index for index, node in enumerate(model.graph)}
    found = []
    for node in model.graph:
        if node.domain == "" and node.op_type == "Add" and same_shape(node.inputs[0], node.inputs[1]):
            for index in (0, 1):
                inside = _between(node, index, order)
                if inside is not None:
                    found.append(Branch(node, index, inside))
    return found


def _between(add: oir.Node, index: int, order: dict[oir.Node, int]) -> tuple[oir.Node, ...] | None:
    """Return the nodes that compute the other input from the skip, None if these are no branch."""
    skip, branch = add.inputs[index], add.inputs[1 - index]
    assert skip is not None and branch is not None
    begin = order[maker] if (maker := skip.producer()) is not None else -1
    inside: set[oir.Node] = set()
    stack = [branch.producer()]
    while stack:
        node = stack.pop()
        if node is not None and node not in inside and order[node] > begin:
            inside.add(node)
            stack.extend(value.producer() for value in reads(node))
    if not any(value is skip for node in inside for value in reads(node)):
        return None
    nodes = tuple(sorted(inside, key=order.__getitem__))
    weighty: set[oir.Node] = set()
    for node in nodes:
        if _has_weights(node) or any(value.producer() in weighty for value in reads(node)):
            weighty.add(node)
    # What others read may depend on no weights of the branch: a mask may, say.
    shared = any(
        value.is_graph_output() or any(use.node not in inside and use.node is not add for use in value.uses())
        for node in weighty
        for value in node.outputs
    )
    return nodes if weighty and not shared else None


def _has_weights(node: oir.Node) -> bool:
    return node.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm") and any(
        (array := constant(value)) is not None and array.ndim > 1 for value in node.inputs
    )


def drop(model: oir.Model, branches: Iterable[Branch]) -> None:
    """Leave branches out, in place; those inside of others are gone with them."""
    namer = Namer(model)
    for branch in branches:
        if branch.add.graph is not None:
            replace_value(model.graph, branch.output, branch.skip, namer)
            remove_dead([branch.add])
