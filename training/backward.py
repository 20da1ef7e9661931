"""The backward pass of a stage in two parts: gradients of its inputs now, those of its weights later.

Zero-bubble schedules fill their waits with the second part (P. Qi et al.: Zero Bubble Pipeline Parallelism, 2023). It
starts from gradients that the first part met on its way, so that nothing between outputs and inputs is computed twice
unless two uses of one weight lie behind each other.

torch.distributed.pipelining does this as well, but as of 2.13 gives no gradient to weights that meet no input inside
of the stage (the embedding of a decoder whose encoder comes from the stage before), and frees what it still needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

# Gradients of what a node yields, one for each of its outputs.
_Gradients = tuple[torch.Tensor | None, ...]


@dataclass
class _Group:
    """Weights whose gradients are computed together, because they flow from the same nodes."""

    weights: list[torch.nn.Parameter]
    starts: set[Node]


@dataclass
class Deferred:
    """What the second part needs: ``met`` are gradients at nodes on the way to inputs, ``given`` at other outputs."""

    groups: list[_Group] = field(default_factory=list)
    met: dict[Node, _Gradients] = field(default_factory=dict)
    given: dict[Node, list[tuple[GradientEdge, torch.Tensor]]] = field(default_factory=dict)


def input_gradients(
    outputs: Sequence[torch.Tensor],
    output_gradients: Sequence[torch.Tensor | None],
    inputs: Sequence[torch.Tensor],
    weights: Iterable[torch.nn.Parameter],
) -> tuple[tuple[torch.Tensor | None, ...], Deferred]:
    """Gradients of ``inputs``, None for those that want none, and what ``weight_gradients`` needs."""
    flowing = [(o, g) for o, g in zip(outputs, output_gradients, strict=True) if o.requires_grad and g is not None]
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    graph = _Graph([get_gradient_edge(output).node for output, _ in flowing], wanted)
    later = Deferred(graph.groups([weight for weight in weights if weight.requires_grad]))
    for output, gradient in flowing:
        edge = get_gradient_edge(output)
        if edge.node not in graph.towards_inputs:
            later.given.setdefault(edge.node, []).append((edge, gradient))
    found: Sequence[torch.Tensor | None] = []
    if wanted and flowing:
        with contextlib.ExitStack() as hooks:
            for node in {node for group in later.groups for node in group.starts} & graph.towards_inputs:

                def meet(gradients: _Gradients, node: Node = node) -> None:
                    later.met[node] = gradients

                hooks.callback(node.register_prehook(meet).remove)
            found = torch.autograd.grad(
                [output for output, _ in flowing],
                wanted,
                [gradient for _, gradient in flowing],
                retain_graph=True,
                allow_unused=True,
            )
    answers = iter(found or [None] * len(wanted))
    return tuple(next(answers) if tensor.requires_grad else None for tensor in inputs), later


def weight_gradients(later: Deferred) -> None:
    """Add the gradients of the weights to their ``grad``."""
    for group in later.groups:
        met = {node: later.met[node] for node in group.starts if node in later.met}
        flowing = [
            (GradientEdge(node, index), gradient)
            for node, gradients in met.items()
            for index, gradient in enumerate(gradients)
            if gradient is not None
        ]
        flowing += [pair for node in group.starts for pair in later.given.get(node, [])]
        if not flowing:
            continue
        with contextlib.ExitStack() as hooks:
            if len(met) > 1:
                # What flows from one of them to another is part of what the other has met.
                for node, gradients in met.items():
                    hooks.callback(node.register_prehook(lambda _, known=gradients: known).remove)
            found = torch.autograd.grad(
                [edge for edge, _ in flowing],
                group.weights,
                [gradient for _, gradient in flowing],
                retain_graph=True,  # groups may share what lies on the way to the inputs
                allow_unused=True,
            )
        for weight, gradient in zip(group.weights, found, strict=True):
            if gradient is not None:
                weight.grad = gradient if weight.grad is None else weight.grad + gradient


class _Graph:
    """The autograd graph below ``roots``; ``towards_inputs`` are its nodes that ``inputs`` get gradients through."""

    def __init__(self, roots: Sequence[Node], inputs: Sequence[torch.Tensor]) -> None:
        self._roots = set(roots)
        self._users: dict[Node, list[Node]] = {}
        pending, seen = list(self._roots), set(self._roots)
        while pending:
            node = pending.pop()
            for following, _ in node.next_functions:
                if following is not None:
                    self._users.setdefault(following, []).append(node)
                    if following not in seen:
                        seen.add(following)
                        pending.append(following)
        ends = {get_gradient_edge(tensor).node for tensor in inputs}
        self.towards_inputs = self._above(ends & seen, frozenset())[0]

    def _above(self, nodes: Iterable[Node], border: set[Node] | frozenset[Node]) -> tuple[set[Node], set[Node]]:
        """``nodes`` and all that lead to them, but for those of ``border``; and the ones of it that were met."""
        found, met = set(nodes), set()
        pending = list(found)
        while pending:
            for user in self._users.get(pending.pop(), []):
                if user in border:
                    met.add(user)
                elif user not in found:
                    found.add(user)
                    pending.append(user)
        return found, met

    def groups(self, weights: Sequence[torch.nn.Parameter]) -> list[_Group]:
        """The weights that get gradients, with the nodes on the way to inputs, and the roots, that these flow from."""
        home: dict[Node, _Group] = {}
        for weight in weights:
            above, starts = self._above([get_gradient_edge(weight).node], self.towards_inputs)
            group = _Group([weight], starts | above & self._roots)
            for other in {id(home[node]): home[node] for node in group.starts if node in home}.values():
                group.weights += other.weights
                group.starts |= other.starts
            home |= dict.fromkeys(group.starts, group)
        return list({id(group): group for group in home.values()}.values())
