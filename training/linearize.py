"""A program as a chain of units: the order of its nodes, where it may be cut, what crosses each cut.

Nodes that depend on no input (positions, causal masks, transposed weights) are no units: every stage that needs one
computes it for itself, which is cheaper than sending it along.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from torch import fx

from optc.errors import UnsupportedModelError
from optc.passes.partition.chain import Chain
from optc.passes.partition.weights import Floats, Weight
from optc.training.analysis import Facts, is_random, written
from optc.training.capture import Program, source_line
from optc.training.costs import Costs, NodeCost

_CALLS = ("call_function", "call_module", "call_method")


@dataclass(frozen=True)
class Layout:
    """The units of a program in order, the nodes that stages compute for themselves, where it may be cut.

    ``last_use`` is the position of the last unit that reads a value (N for the program's outputs, -1 for none).
    """

    program: Program
    facts: dict[fx.Node, Facts]
    units: tuple[fx.Node, ...]
    derived: frozenset[fx.Node]
    last_use: dict[fx.Node, int]
    legal: tuple[bool, ...]

    @cached_property
    def position(self) -> dict[fx.Node, int]:
        """Number of each unit; inputs come before the first, at -1."""
        inputs = {node: -1 for node in self.program.graph.nodes if node.op == "placeholder"}
        return inputs | {node: index for index, node in enumerate(self.units)}

    def crossing(self, cut: int) -> list[fx.Node]:
        """The values that a stage after ``cut`` or a later one still needs, in a fixed order."""
        return [node for node, at in self.position.items() if at < cut <= self.last_use[node]]

    def chain(self, costs: Costs) -> Chain:
        """The chain for the splitter."""
        count = len(self.units)
        sent, returned, messages = (np.zeros(count + 1) for _ in range(3))
        for node, at in self.position.items():
            value = self.facts[node].value
            low, high = at + 1, min(self.last_use[node], count - 1)
            if value is None or high < low:
                continue
            sent[low : high + 1] += value.bytes
            returned[low : high + 1] += value.bytes if value.requires_grad else 0
            messages[low : high + 1] += 2 if value.requires_grad else 1
        totals = self._with_derived(costs)
        return Chain(
            names=tuple(node.name for node in self.units),
            forward=_column(totals, "forward"),
            backward_input=_column(totals, "backward_input"),
            backward_weight=_column(totals, "backward_weight"),
            saved=_column(totals, "saved"),
            sent=sent,
            returned=returned,
            messages=messages,
            legal=np.array(self.legal),
            weights=self.weights(),
        )

    def _with_derived(self, costs: Costs) -> list[NodeCost]:
        """Costs of the units; a derived node counts where it is first needed."""
        totals = {node: costs.of(node) for node in self.units}
        charged: set[fx.Node] = set()
        for unit in self.units:
            pending = list(unit.all_input_nodes)
            while pending:
                node = pending.pop()
                if node in self.derived and node not in charged:
                    charged.add(node)
                    totals[unit] += costs.of(node)
                    pending += node.all_input_nodes
        return list(totals.values())

    def weights(self) -> tuple[Weight, ...]:
        """Parameters and buffers by their first names, with the units that read them."""
        readers: dict[str, set[int]] = {}
        owners: dict[str, fx.Node] = {}
        for node in self.program.graph.nodes:
            if node.op == "get_attr" and self.facts[node].value is not None:
                name = self.program.canonical.get(node.target, node.target)
                owners[name] = node
                readers.setdefault(name, set()).update(self._users(node))
        return tuple(
            Weight(
                name,
                self.facts[owners[name]].leaves[0].bytes,
                self.facts[owners[name]].leaves[0].requires_grad,
                tuple(sorted(users)),
            )
            for name, users in readers.items()
            if users
        )

    def _users(self, node: fx.Node) -> set[int]:
        """Positions of the units that read ``node``, also through derived nodes."""
        found: set[int] = set()
        for user in node.users:
            if user in self.derived:
                found |= self._users(user)
            elif user.op == "output":
                found.add(len(self.units) - 1)  # the last stage returns it
            elif user in self.position:
                found.add(self.position[user])
        return found

    def layer_starts(self) -> list[int]:
        """First unit of each repeated block (``layers.0``, ``layers.1``, …); empty if the module repeats nothing."""
        firsts: dict[str, dict[str, int]] = {}
        for index, node in enumerate(self.units):
            for path in (str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()):
                family, _, number = path.rpartition(".")
                if number.isdigit():
                    firsts.setdefault(family, {}).setdefault(path, index)
        longest: dict[str, int] = max(firsts.values(), key=len, default={})
        return sorted(longest.values()) if len(longest) > 1 else []


def linearize(program: Program, facts: dict[fx.Node, Facts]) -> Layout:
    """Order ``program`` into units and find out where it may be cut."""
    _refuse_hidden_randomness(program)
    derived = _derived(program, facts)
    nodes = list(program.graph.nodes)
    units = [node for node in nodes if node.op in _CALLS and node not in derived]
    position = {node: index for index, node in enumerate(units)}
    last_use = {}
    for node in nodes:
        if node.op == "placeholder" or node in position:
            uses = [len(units) if user.op == "output" else position.get(user, -1) for user in node.users]
            last_use[node] = max(uses, default=-1)
    layout = Layout(program, facts, tuple(units), derived, last_use, ())
    return Layout(program, facts, tuple(units), derived, last_use, _legal(layout))


def _refuse_hidden_randomness(program: Program) -> None:
    """Random operators inside of torch.cond and the like would draw other numbers on every split."""
    for node in program.graph.nodes:
        inner = getattr(program.root, node.target, None) if node.op == "get_attr" else None
        if isinstance(inner, fx.GraphModule) and any(is_random(nested) for nested in inner.graph.nodes):
            users = ", ".join(source_line(user) for user in node.users)
            raise UnsupportedModelError(
                f"random operators inside of control flow are not supported: {users}",
                hint="move dropout out of the branches",
            )


def _derived(program: Program, facts: dict[fx.Node, Facts]) -> frozenset[fx.Node]:
    changed = {
        leaf.storage for node in program.graph.nodes for target in written(node) for leaf in facts[target].leaves
    }
    constant: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op not in ("get_attr", *_CALLS) or any(user.op == "output" for user in node.users):
            continue
        stable = not any(leaf.storage in changed for leaf in facts[node].leaves)
        inputs = all(argument in constant for argument in node.all_input_nodes)
        if stable and inputs and not written(node) and not is_random(node):
            constant.add(node)
    return frozenset(node for node in constant if node.op != "get_attr")


def _legal(layout: Layout) -> tuple[bool, ...]:
    count = len(layout.units)
    # A cut that no gradient crosses leaves nothing for the stages before it to learn from.
    legal = gradients_crossing(layout) > 0
    for node, at in layout.position.items():
        if layout.facts[node].value is None:
            # Tuples are taken apart in the stage that makes them.
            legal[at + 1 : min(layout.last_use[node], count) + 1] = False
    for low, high in writing_spans(layout):
        legal[low : high + 1] = False
    legal[0] = legal[-1] = True
    return tuple(bool(value) for value in legal)


def gradients_crossing(layout: Layout) -> npt.NDArray[np.int64]:
    """How many tensors with a gradient cross each cut; [N + 1]."""
    count = len(layout.units)
    gradients = np.zeros(count + 1, np.int64)
    for node, at in layout.position.items():
        value = layout.facts[node].value
        if value is not None and value.requires_grad:
            gradients[at + 1 : min(layout.last_use[node], count) + 1] += 1
    return gradients


def writing_spans(layout: Layout) -> list[tuple[int, int]]:
    """Positions that must not be cut because memory written on one side is read or written on the other."""
    first: dict[int, int] = {}
    last_write: dict[int, int] = {}
    last_use: dict[int, int] = {}
    weights: set[int] = set()
    for node, facts in layout.facts.items():
        storages = {leaf.storage for leaf in facts.leaves}
        if node.op == "get_attr":
            weights |= storages
        at = layout.position.get(node, -1)
        for storage in storages:
            if node.op != "get_attr":
                first.setdefault(storage, at)
            for user in node.users:
                if user in layout.position:
                    use = layout.position[user]
                    first[storage] = min(first.get(storage, use), use)
                    last_use[storage] = max(last_use.get(storage, -1), use)
    for node in layout.units:
        for target in written(node):
            for leaf in layout.facts[target].leaves:
                last_write[leaf.storage] = layout.position[node]
    spans = []
    for storage, write in last_write.items():
        # After its last write an activation can be copied to the next stage; a buffer has only one home.
        stop = max(write, last_use[storage]) if storage in weights else write
        spans.append((first[storage] + 1, stop))
    return spans


def _column(costs: list[NodeCost], name: str) -> Floats:
    return np.array([getattr(cost, name) for cost in costs], np.float64)
