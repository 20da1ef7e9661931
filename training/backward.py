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

# A node of a walk and the number of one of its outputs.
_Place = tuple[int, int]


@dataclass(frozen=True)
class _Shape:
    """A stage's autograd graph by numbers, in the order of the walk. Its paths depend on nothing else.

    ``edges`` are each node's, ``roots`` where the outputs come from, ``inputs`` and ``weights`` the nodes at which
    gradients are wanted, -1 if no output leads there.
    """

    edges: tuple[tuple[_Place, ...], ...]
    roots: tuple[_Place, ...]
    inputs: tuple[int, ...]
    weights: tuple[int, ...]


@dataclass
class _Group:
    """Weights whose gradients one call computes, because they flow from the same nodes or from independent ones.

    ``clamped`` are those among ``starts`` that others of the same weights lead to.
    """

    weights: list[int]
    starts: set[int]
    clamped: set[int] = field(default_factory=set)


@dataclass
class Paths:
    """What a stage's last microbatch was found to need, used again for the next one if its graph is the same."""

    shape: _Shape | None = None
    groups: list[_Group] = field(default_factory=list)
    kept: list[_Place] = field(default_factory=list)


@dataclass
class _Call:
    weights: list[torch.nn.Parameter]
    edges: list[GradientEdge]
    gradients: list[torch.Tensor]
    clamped: list[tuple[Node, dict[int, torch.Tensor | None]]]


@dataclass
class Deferred:
    """What the second part has to do."""

    calls: list[_Call] = field(default_factory=list)


def input_gradients(
    outputs: Sequence[torch.Tensor],
    output_gradients: Sequence[torch.Tensor | None],
    inputs: Sequence[torch.Tensor],
    weights: Iterable[torch.nn.Parameter],
    paths: Paths | None = None,
) -> tuple[tuple[torch.Tensor | None, ...], Deferred]:
    """Gradients of ``inputs``, None for those that want none, and what ``weight_gradients`` needs.

    ``paths``, one for all microbatches of a stage, is filled; it spares looking for them where the graph is the same.
    """
    flowing = [(o, g) for o, g in zip(outputs, output_gradients, strict=True) if o.requires_grad and g is not None]
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    trained = [weight for weight in weights if weight.requires_grad]
    nodes, shape = _walk([output for output, _ in flowing], wanted, trained)
    paths = Paths() if paths is None else paths
    if paths.shape != shape:
        paths.shape, paths.groups, paths.kept = shape, *_Graph(shape).paths()
    given = [gradient for _, gradient in flowing]
    found: Sequence[torch.Tensor | None] = []
    if wanted and flowing:
        found = torch.autograd.grad(
            [output for output, _ in flowing],
            [*wanted, *(GradientEdge(nodes[node], output) for node, output in paths.kept)],
            given,
            retain_graph=True,
            allow_unused=True,
        )
    met = dict(zip(paths.kept, found[len(wanted) :], strict=bool(found)))
    calls = [_call(group, nodes, shape, trained, met, given) for group in paths.groups]
    answers = iter(found[: len(wanted)] or [None] * len(wanted))
    return tuple(next(answers) if tensor.requires_grad else None for tensor in inputs), Deferred(calls)


def weight_gradients(later: Deferred) -> None:
    """Add the gradients of the weights to their ``grad``."""
    for call in later.calls:
        if not call.edges:
            continue
        with contextlib.ExitStack() as hooks:
            for node, known in call.clamped:
                # What flows here from another start is part of what was met here already.
                hook = node.register_prehook(lambda met, known=known: tuple(map(known.get, range(len(met)))))
                hooks.callback(hook.remove)
            # Calls may share what lies on the way to the inputs.
            torch.autograd.backward(call.edges, call.gradients, retain_graph=True, inputs=call.weights)


def _call(
    group: _Group,
    nodes: Sequence[Node],
    shape: _Shape,
    weights: Sequence[torch.nn.Parameter],
    met: dict[_Place, torch.Tensor | None],
    given: Sequence[torch.Tensor],
) -> _Call:
    flowing = [(place, gradient) for place, gradient in met.items() if place[0] in group.starts]
    known = {node for node, _ in met}
    direct = [(root, g) for root, g in zip(shape.roots, given, strict=True) if root[0] in group.starts - known]
    pairs = [(place, gradient) for place, gradient in (*flowing, *direct) if gradient is not None]
    clamped = [(nodes[n], {output: g for (node, output), g in flowing if node == n}) for n in group.clamped]
    return _Call(
        [weights[number] for number in group.weights],
        [GradientEdge(nodes[node], output) for (node, output), _ in pairs],
        [gradient for _, gradient in pairs],
        clamped,
    )


def _walk(
    outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
) -> tuple[list[Node], _Shape]:
    """The autograd graph below ``outputs``: its nodes, each after one that leads to it, and their numbers."""
    roots = [get_gradient_edge(output) for output in outputs]
    nodes = list(dict.fromkeys(root.node for root in roots))
    numbers = {node: number for number, node in enumerate(nodes)}
    leaves: dict[int, int] = {}
    edges = []
    for node in nodes:  # grows
        below = []
        for following, output in node.next_functions:
            if following is None:
                continue
            number = numbers.get(following)
            if number is None:
                number = numbers[following] = len(nodes)
                nodes.append(following)
            below.append((number, output))
        if not below and hasattr(node, "variable"):
            leaves[id(node.variable)] = numbers[node]
        edges.append(tuple(below))

    def find(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
        return tuple(leaves.get(id(t), -1) if t.grad_fn is None else numbers.get(t.grad_fn, -1) for t in tensors)

    tops = tuple((numbers[root.node], root.output_nr) for root in roots)
    return nodes, _Shape(tuple(edges), tops, find(inputs), find(weights))


class _Graph:
    """Which paths lead where in a graph; ``towards_inputs`` are the nodes that inputs get gradients through."""

    def __init__(self, shape: _Shape) -> None:
        self._shape = shape
        self._users: list[list[int]] = [[] for _ in shape.edges]
        for node, below in enumerate(shape.edges):
            for following, _ in below:
                self._users[following].append(node)
        self.towards_inputs = self._above(set(shape.inputs) - {-1}, frozenset())[0]

    def paths(self) -> tuple[list[_Group], list[_Place]]:
        """The groups to compute one after another, and where the first part has to keep gradients for them."""
        groups = self._independent(self._groups())
        starts = {node for group in groups for node in group.starts} & self.towards_inputs
        places = {place for below in self._shape.edges for place in below} | set(self._shape.roots)
        return groups, sorted(place for place in places if place[0] in starts)

    def _above(self, nodes: Iterable[int], border: set[int] | frozenset[int]) -> tuple[set[int], set[int]]:
        """``nodes`` and all that lead to them, but for those of ``border``; and the ones of it that were met."""
        found, met = set(nodes), set()
        pending = list(found)
        while pending:
            for user in self._users[pending.pop()]:
                if user in border:
                    met.add(user)
                elif user not in found:
                    found.add(user)
                    pending.append(user)
        return found, met

    def _groups(self) -> list[_Group]:
        """The weights that get gradients, with the nodes on the way to inputs, and the roots, that these flow from."""
        home: dict[int, _Group] = {}
        roots = {node for node, _ in self._shape.roots}
        for weight, end in enumerate(self._shape.weights):
            if end < 0:
                continue
            above, starts = self._above([end], self.towards_inputs)
            group = _Group([weight], starts | above & roots)
            for other in {id(home[node]): home[node] for node in group.starts if node in home}.values():
                group.weights += other.weights
                group.starts |= other.starts
            home |= dict.fromkeys(group.starts, group)
        return list({id(group): group for group in home.values()}.values())

    def _independent(self, groups: list[_Group]) -> list[_Group]:
        """Groups that do not lead to each other put together: one call for both computes nothing more than two do."""
        below = self._starts_below({node for group in groups for node in group.starts})
        result: list[tuple[_Group, set[int]]] = []
        for group in groups:
            reached = set().union(*(below[node] for node in group.starts))
            group.clamped = reached & group.starts & self.towards_inputs
            for other, others in result:
                if not (others & group.starts or reached & other.starts):
                    other.weights += group.weights
                    other.starts |= group.starts
                    other.clamped |= group.clamped
                    others |= reached
                    break
            else:
                result.append((group, reached))
        return [group for group, _ in result]

    def _starts_below(self, starts: set[int]) -> dict[int, set[int]]:
        """For each of ``starts`` the others that it leads to."""
        waiting = [len(users) for users in self._users]
        order = [node for node, users in enumerate(waiting) if not users]
        for node in order:  # grows
            for following, _ in self._shape.edges[node]:
                waiting[following] -= 1
                if not waiting[following]:
                    order.append(following)
        masks = [0] * len(order)
        for node in reversed(order):
            for following, _ in self._shape.edges[node]:
                masks[node] |= masks[following] | (1 << following if following in starts else 0)
        return {node: {other for other in starts if masks[node] >> other & 1} for node in starts}
