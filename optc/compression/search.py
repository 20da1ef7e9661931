"""Which layers to compress: the cheapest mixture whose loss is within a budget.

Each layer is tried alone first (its sensitivity). Then layers are taken in the order of loss for what they save, as
many as the budget allows, found by bisection; then each one left over is tried once more, those that save most first:
losses of layers do not add up exactly. Last, the best mixtures are evaluated that there would be if losses added up, or
their squares, as those of noise do: the order above leaves room that other layers may fill better.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from optc.compression.journal import Journal

Progress = Callable[[str], None]


_PACKED = 4
"""Mixtures that are tried for each idea of how losses add up."""
_PARTS = 10_000
"""Parts of the room in a knapsack; sizes are rounded up to them."""


@dataclass(frozen=True)
class Layer:
    """A layer that can be compressed, and its cost (seconds or bytes) before and after.

    ``weaker`` are forms that save less, each with a name of its own, to be tried where the layer does not fit.
    """

    name: str
    before: float
    after: float
    weaker: tuple[Layer, ...] = ()

    @property
    def saved(self) -> float:
        """What compressing it saves."""
        return self.before - self.after

    def form(self, chosen: Collection[str]) -> Layer | None:
        """Return the form of the layer that is among ``chosen``, None if it is not compressed."""
        return next((form for form in (self, *self.weaker) if form.name in chosen), None)


@dataclass(frozen=True)
class Point:
    """A mixture that was evaluated: the loss, and the cost of all layers."""

    layers: frozenset[str]
    loss: float
    cost: float


@dataclass(frozen=True)
class Outcome:
    """The best mixture within the budget; None if nothing can be compressed within it."""

    best: Point | None
    points: tuple[Point, ...]
    sensitivity: dict[str, float]

    def front(self) -> list[Point]:
        """Return the points that no other one beats in both loss and cost, by increasing cost."""
        found: list[Point] = []
        for point in sorted(self.points, key=lambda p: (p.cost, p.loss)):
            if not found or point.loss < found[-1].loss:
                found.append(point)
        return found


class Search:
    """Evaluates mixtures of ``layers`` with ``evaluate``, which returns the loss with a set of them compressed.

    The cost of a mixture is the sum over its layers, unless ``measured`` returns that of a mixture that was evaluated.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        evaluate: Callable[[frozenset[str]], float],
        journal: Journal | None = None,
        progress: Progress = lambda _: None,
        measured: Callable[[frozenset[str]], float] | None = None,
    ) -> None:
        self.layers, self._evaluate, self._measured = tuple(layers), evaluate, measured
        self._journal = journal or Journal(None, "")
        self._progress = progress
        self._points: dict[frozenset[str], Point] = {}

    def loss(self, layers: frozenset[str]) -> float:
        """Return the loss with ``layers`` compressed, evaluated if it is not known yet."""
        if layers not in self._points:
            known = self._journal.losses.get(layers)
            if known is None:
                self._progress(f"evaluation {len(self._points) + 1}: {len(layers)} of {len(self.layers)} layers")
                known = self._evaluate(layers)
                self._journal.add(layers, known, None if self._measured is None else self._measured(layers))
            self._points[layers] = Point(layers, known, self.cost(layers))
        return self._points[layers].loss

    def cost(self, layers: frozenset[str]) -> float:
        """Return the cost of all layers with some of them compressed; what is measured is known once evaluated."""
        if self._measured is not None:
            return self._journal.costs[layers]
        forms = ((layer, layer.form(layers)) for layer in self.layers)
        return sum(layer.before if form is None else form.after for layer, form in forms)

    def sensitivity(self) -> dict[str, float]:
        """Return the loss of compressing each layer alone."""
        return {layer.name: self.loss(frozenset({layer.name})) for layer in self.layers}

    def run(self, limit: float) -> Outcome:
        """Search for the cheapest mixture with a loss of at most ``limit``."""
        paying = [layer for layer in self.layers if layer.saved > 0]
        alone = {layer.name: self.loss(frozenset({layer.name})) for layer in paying}
        order = sorted(paying, key=lambda layer: max(alone[layer.name], 0.0) / layer.saved)
        chosen = self._prefix([layer.name for layer in order], limit)
        for layer in sorted(order, key=lambda layer: -layer.saved):
            forms = (layer, *layer.weaker) if layer.name not in chosen else ()
            fitting = (chosen | {form.name} for form in forms if self.loss(chosen | {form.name}) <= limit)
            chosen = next(fitting, chosen)
        for power in (1, 2):
            self._pack(paying, alone, limit, power)
        return Outcome(self._best(limit), tuple(self._points.values()), alone)

    def _best(self, limit: float) -> Point | None:
        inside = [p for p in self._points.values() if p.layers and p.loss <= limit]
        return min(inside, key=lambda p: (p.cost, p.loss), default=None)

    def _pack(self, paying: Sequence[Layer], alone: Mapping[str, float], limit: float, power: int) -> None:
        """Evaluate the best mixture if losses to the ``power`` add up; with less room while it does not fit."""
        room = limit
        for _ in range(_PACKED):
            layers = knapsack(paying, {name: max(loss, 0.0) ** power for name, loss in alone.items()}, room**power)
            best = self._best(limit)
            saved = sum(layer.saved for layer in paying if layer.name in layers)
            if not layers or (best is not None and saved <= self._saved(best.layers)):
                return
            loss = self.loss(layers)
            if loss <= limit:
                return
            room *= limit / loss

    def _saved(self, layers: frozenset[str]) -> float:
        forms = (layer.form(layers) for layer in self.layers)
        return sum(form.saved for form in forms if form is not None)

    def _prefix(self, order: Sequence[str], limit: float) -> frozenset[str]:
        """Return as many of the first layers as fit, by bisection, the whole first."""
        if order and self.loss(frozenset(order)) <= limit:
            return frozenset(order)
        fits, over = 0, len(order)
        while over - fits > 1:
            middle = (fits + over) // 2
            if self.loss(frozenset(order[:middle])) <= limit:
                fits = middle
            else:
                over = middle
        return frozenset(order[:fits])


def knapsack(layers: Sequence[Layer], sizes: Mapping[str, float], room: float) -> frozenset[str]:
    """Return the layers that save most of all sets whose ``sizes`` add up to at most ``room``."""
    if room <= 0.0:
        return frozenset(layer.name for layer in layers if sizes[layer.name] <= 0.0)
    saved, taken = np.zeros(_PARTS + 1), np.zeros((len(layers), _PARTS + 1), bool)
    # What has no size, like the loss of outputs that are no numbers, does not fit: so the order of min's arguments.
    parts = [ceil(min(_PARTS + 1.0, sizes[layer.name] / room * _PARTS)) for layer in layers]
    for i, (layer, size) in enumerate(zip(layers, parts, strict=True)):
        without = saved.copy()
        saved[size:] = np.maximum(without[size:], without[: _PARTS + 1 - size] + layer.saved)
        taken[i] = saved > without
    chosen, left = set(), _PARTS
    for i in reversed(range(len(layers))):
        if taken[i, left]:
            chosen.add(layers[i].name)
            left -= parts[i]
    return frozenset(chosen)
