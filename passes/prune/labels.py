"""Labels of slices: two slices with the same label can only be removed together.

A union-find structure over integers, in NumPy: sets of many labels are united at once. Label 0 is the set of all
slices that have to stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray


class UnionFind:
    """Disjoint sets of the integers below ``len``; the root of a set is its least element."""

    def __init__(self, size: int = 0) -> None:
        self._parent: Array = np.arange(size)

    def __len__(self) -> int:
        return len(self._parent)

    def extend(self, count: int) -> Array:
        """Return ``count`` new elements, each a set of its own."""
        new = np.arange(len(self), len(self) + count)
        self._parent = np.concatenate([self._parent, new])
        return new

    def roots(self, elements: Array) -> Array:
        """Return the root of each element; the shape is kept."""
        found: Array = self._parent[elements]
        while True:
            further: Array = self._parent[found]
            if np.array_equal(further, found):
                self._parent[elements] = found
                return found
            found = further

    def unite(self, a: Array, b: Array) -> None:
        """Make one set of each element of ``a`` and that of ``b`` beside it; the two broadcast."""
        a, b = (x.reshape(-1) for x in np.broadcast_arrays(a, b))
        while True:
            a, b = self.roots(a), self.roots(b)
            apart = a != b
            if not apart.any():
                return
            a, b = a[apart], b[apart]
            # Of several new parents of one root the last is taken; the others are united in the next round.
            self._parent[np.maximum(a, b)] = np.minimum(a, b)


@dataclass(frozen=True)
class Reason:
    """Why slices have to stay: the node that needs them, and what it does."""

    node: str
    text: str

    def __str__(self) -> str:
        return f"{self.node}: {self.text}" if self.node else self.text


class Labels:
    """The labels of a model's slices, where they were first seen, and why some have to stay."""

    def __init__(self) -> None:
        self._sets = UnionFind(1)
        self._origin: Array = np.zeros(1, np.int64)
        self.names = [""]
        """What each group of new labels was made for; the group of label 0 is the first."""
        self._reasons: list[tuple[Array, Reason]] = []
        self._wanted: list[Array] = []
        self._kin = UnionFind(1)

    def fresh(self, count: int, name: str) -> Array:
        """Return labels of ``count`` slices that nothing is known of yet."""
        self._origin = np.concatenate([self._origin, np.full(count, len(self.names))])
        self.names.append(name)
        self._kin.extend(1)
        return self._sets.extend(count)

    def roots(self, labels: Array) -> Array:
        """Return one representative of each label; 0 for what has to stay."""
        return self._sets.roots(labels)

    def unite(self, a: Array, b: Array, reason: Reason) -> None:
        """Slices of ``a`` and ``b`` depend on each other; ``reason`` is kept if that means that some have to stay."""
        staying_a, staying_b = self.stay(a), self.stay(b)
        loose = ~(staying_a | staying_b)
        kin_a, kin_b = (np.broadcast_to(self._origin[x], loose.shape)[loose] for x in (a, b))
        self._kin.unite(kin_a, kin_b)
        if staying_a.any() or staying_b.any():
            self._note(np.broadcast_to(a, np.broadcast_shapes(a.shape, b.shape)), staying_b, reason)
            self._note(np.broadcast_to(b, np.broadcast_shapes(a.shape, b.shape)), staying_a, reason)
        self._sets.unite(a, b)

    def pin(self, labels: Array, reason: Reason) -> None:
        """Declare that slices have to stay."""
        self._note(labels, np.ones(labels.shape, bool), reason)
        self._sets.unite(labels, np.zeros(1, np.int64))

    def _note(self, labels: Array, pinned: Array, reason: Reason) -> None:
        affected = labels[np.broadcast_to(pinned, labels.shape) & ~self.stay(labels)]
        if affected.size:
            self._reasons.append((affected, reason))

    def stay(self, labels: Array) -> Array:
        """Tell for each slice whether it has to stay."""
        staying: Array = self.roots(labels) == 0
        return staying

    def free(self, labels: Array) -> int:
        """Return how many different labels can be removed."""
        found = np.unique(self.roots(labels))
        return len(found) - int(bool(found.size) and found[0] == 0)

    def want(self, labels: Array) -> None:
        """Declare that slices are made by weights: removing them is worth the while."""
        self._wanted.append(labels)

    def families(self) -> Array:
        """Return the family of each label: labels that compete with each other, 0 for what has to stay.

        A family is known by the index in ``names`` of what was first seen of it.
        """
        families: Array = self._origin[self.roots(np.arange(len(self._sets)))]
        return families

    def wanted(self) -> Array:
        """Return the labels of slices that weights make."""
        return np.concatenate(self._wanted) if self._wanted else np.zeros(0, np.int64)

    def origins(self, labels: Array) -> Array:
        """Return the index in ``names`` of what labels were made for."""
        return np.take(self._origin, labels)

    def reasons(self) -> dict[int, list[Reason]]:
        """Return why slices have to stay, by the index in ``names`` of what they were made for.

        A reason holds for all that the slices were united with.
        """
        kin = self._kin.roots(np.arange(len(self.names)))
        found: dict[int, list[Reason]] = {}
        for labels, reason in self._reasons:
            for root in np.unique(kin[self._origin[labels]]):
                known = found.setdefault(int(root), [])
                if reason not in known:
                    known.append(reason)
        return {origin: found[int(root)] for origin, root in enumerate(kin) if int(root) in found}
