"""The labels of every axis of every value, and what rules do with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as oir

from optc.passes.match import constant
from optc.passes.prune.labels import Labels, Reason

Axis = np.ndarray | None
"""One label per slice along an axis; None where the size is symbolic: nothing can be removed from such an axis."""


class NotUnderstoodError(Exception):
    """A rule cannot tell what removing slices would do at this node; all of them stay. The text says why."""


class Axes:
    """The labels of each axis, value by value, in the order of the graph."""

    def __init__(self, choices: dict[tuple[str, int], int]) -> None:
        self.labels = Labels()
        self.choices = choices
        """Which factor of a split axis carries its labels, by node name and axis, where it is not the first."""
        self.splits: dict[tuple[str, int], tuple[int, np.ndarray]] = {}
        """The splits met: how many factors there were, and the labels of the one that was chosen."""
        self.scales: list[oir.Value] = []
        """Scales of batch normalizations."""
        self.table: dict[oir.Value, list[Axis]] = {}
        self.node: oir.Node | None = None
        self._constant: set[oir.Node] = set()

    def of(self, value: oir.Value | None) -> list[Axis]:
        """Return the labels of a value's axes. Raises NotUnderstoodError where the rank is unknown."""
        if value is None:
            raise NotUnderstoodError("an input is missing")
        if value not in self.table:
            if value.shape is None:
                raise NotUnderstoodError(f"the rank of '{value.name}' is unknown")
            array = constant(value) is not None
            self.table[value] = [
                self.labels.fresh(d, value.name or "") if array and isinstance(d, int) and d > 1 else fixed(d)
                for d in value.shape
            ]
        return self.table[value]

    def enter(self, node: oir.Node) -> None:
        """Make ``node`` the current one; nodes come in order."""
        self.node = node
        if node.inputs and all(value is None or self.is_constant(value) for value in node.inputs):
            self._constant.add(node)

    def is_constant(self, value: oir.Value | None) -> bool:
        """Tell whether a value depends on weights alone."""
        maker = value.producer() if value is not None else None
        return maker in self._constant if maker is not None else constant(value) is not None

    def set(self, value: oir.Value, axes: Sequence[Axis]) -> None:
        """Give a node's output its labels; sizes that are known on one side only are fixed."""
        if value.shape is None:
            for axis in axes:
                self.pin(axis, f"the rank of '{value.name}' is unknown")
            return
        assert len(axes) == len(value.shape), f"{value.name}: {len(axes)} axes, shape {value.shape}"
        settled: list[Axis] = []
        for axis, dim in zip(axes, value.shape, strict=True):
            if axis is None or not isinstance(dim, int):
                self.pin(axis, "a size is symbolic")
                settled.append(fixed(dim))
            else:
                assert len(axis) == dim, f"{value.name}: {len(axis)} labels, shape {value.shape}"
                if dim == 1:
                    self.pin(axis, "it is the only slice of an axis")
                settled.append(axis)
        self.table[value] = settled

    def leave(self, value: oir.Value) -> None:
        """Give a node's output axes that have to stay as they are."""
        if value.shape is not None:
            self.table[value] = [fixed(d) for d in value.shape]

    def reason(self, text: str) -> Reason:
        """Return a reason at the current node."""
        return Reason(f"{self.node.op_type} '{self.node.name}'" if self.node is not None else "", text)

    def pin(self, axis: Axis, text: str) -> None:
        """Let all slices along an axis stay."""
        if axis is not None:
            self.labels.pin(axis, self.reason(text))

    def pin_value(self, value: oir.Value, text: str) -> None:
        """Let all slices of a value stay."""
        if value.shape is not None:
            for axis in self.of(value):
                self.pin(axis, text)

    def unite(self, a: Axis, b: Axis, text: str = "the other operand's slices have to stay") -> Axis:
        """Couple two axes of equal size, slice by slice; return what both are now."""
        if a is None or b is None:
            self.pin(a, "the other operand's size is symbolic")
            self.pin(b, "the other operand's size is symbolic")
            return None
        assert len(a) == len(b), f"{self.reason('')}{len(a)} slices against {len(b)}"
        self.labels.unite(a, b, self.reason(text))
        return a

    def unite_blocks(self, axis: Axis, blocks: int, text: str) -> np.ndarray:
        """Make each of ``blocks`` equal parts of an axis one slice; return the label of each block."""
        if axis is None or len(axis) % blocks:
            raise NotUnderstoodError(f"an axis cannot be split into {blocks} blocks")
        parts = axis.reshape(blocks, -1)
        self.labels.unite(parts[:, :1], parts, self.reason(text))
        return parts[:, 0]

    def broadcast(self, operands: Sequence[Sequence[Axis]]) -> list[Axis]:
        """Couple operands as NumPy broadcasts them; return the axes of the result."""
        rank = max(map(len, operands))
        result: list[Axis] = []
        for position in range(-rank, 0):
            axes = [operand[position] for operand in operands if len(operand) >= -position]
            wide = [axis for axis in axes if axis is not None and len(axis) != 1]
            symbolic = any(axis is None for axis in axes)
            if not wide:
                result.append(None if symbolic else axes[0])
                continue
            for axis in wide[1:]:
                self.unite(wide[0], axis)
            if symbolic:
                self.pin(wide[0], "the other operand's size is symbolic")
            result.append(wide[0])
        return result

    def couple_vector(self, value: oir.Value | None, axis: Axis) -> None:
        """Couple the only axis of an optional vector (a bias, say) with an axis."""
        if value is not None:
            (vector,) = self.of(value)
            self.unite(vector, axis)


def fixed(dim: int | oir.SymbolicDim) -> Axis:
    """Return an axis of which nothing can be removed."""
    return np.zeros(dim, np.int64) if isinstance(dim, int) else None


class Kept:
    """What is left of each value; edits what nodes say about sizes."""

    def __init__(self, axes: Axes, removed: np.ndarray, constant: Callable[[oir.Node, np.ndarray], oir.Value]) -> None:
        self._axes, self._removed, self._constant = axes, removed, constant

    def mask(self, value: oir.Value | None, axis: int) -> np.ndarray | None:
        """Tell for each slice along an axis whether it is kept; None where the size is symbolic."""
        labels = self._axes.of(value)[axis]
        return None if labels is None else ~np.isin(self._axes.labels.roots(labels), self._removed)

    def count(self, value: oir.Value | None, axis: int) -> int:
        """Return how many slices are kept along an axis of known size."""
        mask = self.mask(value, axis)
        assert mask is not None
        return int(mask.sum())

    def shrinks(self, value: oir.Value | None, axis: int) -> bool:
        """Tell whether slices along an axis are removed."""
        mask = self.mask(value, axis)
        return mask is not None and not mask.all()

    def replace(self, node: oir.Node, index: int, array: np.ndarray) -> None:
        """Give one input of a node new constant content; other readers of the old constant keep it."""
        node.replace_input_with(index, self._constant(node, array))


Rule = Callable[[oir.Node, Axes], None]
Update = Callable[[oir.Node, Kept], None]
RULES: dict[str, Rule] = {}
UPDATES: dict[str, Update] = {}


def couples(*op_types: str) -> Callable[[Rule], Rule]:
    """Register how operators couple the slices of their inputs and outputs."""

    def add(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(op_types, rule))
        return rule

    return add


def updates(*op_types: str) -> Callable[[Update], Update]:
    """Register what has to be said anew on a node when slices are removed."""

    def add(update: Update) -> Update:
        UPDATES.update(dict.fromkeys(op_types, update))
        return update

    return add
