"""Recovery without labels: each layer that lost inputs is fitted to what the original layer computes.

Layer by layer, in the order of the graph, a layer's weights become those that come nearest to the original's output on
calibration data, given what the pruned model feeds it by then: errors of earlier layers are made up for as well. Least
squares in closed form, with a ridge towards the weights that are there.

Y. He et al.: Channel Pruning for Accelerating Very Deep Neural Networks, 2017.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from optc.compression.stages import Stages, bound
from optc.passes.prune.layers import Layer, find, shift

ROWS_PER_FEATURE = 8
LEAST_ROWS = 4096
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidates, relative to the mean variance of the features."""
_HELD_OUT = 5  # every fifth row decides between the candidates

Kept = Mapping[str, list[np.ndarray | None]]


@dataclass(frozen=True)
class Fit:
    """How a layer fared: squared error over the variance of the original's output, on rows it was not fitted to."""

    name: str
    before: float
    after: float
    ridge: float | None
    """None where no fit was better than the weights that were there."""


def reconstruct(
    original: oir.Model,
    pruned: oir.Model,
    kept: Kept,
    calls: Sequence[Mapping[str, np.ndarray]],
    *,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Fit]:
    """Fit the layers of ``pruned`` that lost inputs, in place.

    Args:
        original: the model before anything was removed; not changed.
        pruned: the same nodes with smaller weights.
        kept: what was kept of each tensor; see ``optc.passes.prune.remove``.
        calls: inputs by name, for each sample; all of one shape.
        progress: is told of each layer.

    Raises UsageError for samples of different shapes.
    """
    layers = {str(layer.node.name): layer for layer in find(pruned) if _lost_inputs(layer, kept)}
    whole, small = bound(original, calls), bound(pruned, calls)
    known = {str(layer.node.name): layer for layer in find(whole)}
    names = [name for name in layers if name in known]
    references, runs = Stages(whole, names, calls), Stages(small, names, calls)
    references.advance()
    fits: list[Fit] = []
    current = {str(layer.node.name): layer for layer in find(small)}
    for number, name in enumerate(names):
        progress(f"fit {number + 1} of {len(names)}: {name}")
        output = known[name].output
        references.advance([output])
        runs.advance()
        masks = kept.get(output)
        columns = None if masks is None else masks[1 if known[name].node.op_type == "Conv" else -1]
        x, y = _rows(current[name], runs.values, known[name], references.values, columns)
        fit, matrix, amount = _fit(name, x, y, current[name])
        if fit.ridge is not None:
            for model, layer in ((small, current[name]), (pruned, layers[name])):
                layer.set(matrix)
                shift(model, layer.node, amount)
        fits.append(fit)
    return fits


def _lost_inputs(layer: Layer, kept: Kept) -> bool:
    masks = kept.get(str(layer.weight.name))
    mask = masks[layer.input_axis] if masks is not None else None
    return mask is not None and not mask.all()


def _rows(
    layer: Layer,
    inputs: Sequence[Mapping[str, np.ndarray]],
    reference: Layer,
    outputs: Sequence[Mapping[str, np.ndarray]],
    columns: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return what goes in [rows, features] and what should come out [rows, columns] at the same random places."""
    generator = np.random.default_rng(0)
    wanted = max(LEAST_ROWS, ROWS_PER_FEATURE * len(layer.matrix()))
    per_call = -(-wanted // len(inputs))
    x, y = [], []
    for given, made in zip(inputs, outputs, strict=True):
        places = generator.permutation(layer.places(given[layer.input]))[:per_call]
        x.append(layer.rows(given[layer.input], places))
        y.append(reference.outputs(made[reference.output], places))
    target = np.concatenate(y)
    return np.concatenate(x), target if columns is None else target[:, columns]


def _fit(name: str, x: np.ndarray, y: np.ndarray, layer: Layer) -> tuple[Fit, np.ndarray, np.ndarray]:
    """Return the outcome, new weights [features, columns] and what to add to the columns."""
    old = layer.matrix()
    residual = y - x @ old - layer.bias()
    held = np.arange(len(x)) % _HELD_OUT == 0
    variance = float(np.var(y[held], axis=0).sum()) or 1.0
    train = _Problem(x[~held], residual[~held])

    def error(delta: np.ndarray, offset: np.ndarray) -> float:
        return float(np.square(residual[held] - x[held] @ delta - offset).mean(axis=0).sum()) / variance

    before = error(np.zeros_like(old), np.zeros(old.shape[1], np.float32))
    tried = [(error(*train.solve(ridge)), ridge) for ridge in RIDGES]
    best, ridge = min(tried)
    if not best < before:
        return Fit(name, before, before, None), old, np.zeros(old.shape[1], np.float32)
    delta, offset = _Problem(x, residual).solve(ridge)
    return Fit(name, before, best, ridge), old + delta, offset


class _Problem:
    """Least squares with an offset: ``residual`` by ``x @ delta + offset``."""

    def __init__(self, x: np.ndarray, residual: np.ndarray) -> None:
        self._x_mean, self._r_mean = x.mean(axis=0), residual.mean(axis=0)
        centered = x - self._x_mean
        self._gram = centered.T @ centered
        self._cross = centered.T @ (residual - self._r_mean)

    def solve(self, ridge: float) -> tuple[np.ndarray, np.ndarray]:
        """Return delta [features, columns] and offset [columns]."""
        size = len(self._gram)
        strength = ridge * max(float(np.trace(self._gram)) / size, 1e-12)
        delta = np.linalg.solve(self._gram + strength * np.eye(size, dtype=self._gram.dtype), self._cross)
        return delta, self._r_mean - self._x_mean @ delta
