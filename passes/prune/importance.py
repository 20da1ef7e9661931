"""How much units matter: from the size of weights, of batch normalization's scales, or from what data says.

Each tensor gives each unit a number, relative to the mean over its family, so that layers can be compared; a unit's
score is the mean over the tensors that have slices of it (G. Fang et al.: DepGraph, 2023).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as oir

from optc.passes.match import constant
from optc.passes.prune.analysis import Coupling, Family

CRITERIA = ("l1", "l2", "bn")
"""Criteria that need nothing but the model."""
DATA_CRITERIA = ("activation", "taylor")
"""Criteria that come as saliencies, from calibration data."""

# Integers are quantized weights; smaller ones than this decide nothing.
_LEAST_RANK = 2


class Scores:
    """Scores of all units of a model.

    Args:
        coupling: of the model.
        criterion: ``l1`` and ``l2``: norms of the slices; ``bn``: the scales of batch normalizations, and ``l2``
            where a family has none. ``DATA_CRITERIA`` come with ``saliency``.
        saliency: how much single weights matter, each at least 0, by the name of the tensor; a unit is worth the sum
            over its slices. Takes the place of the criterion; tensors that are not in it say nothing.
    """

    def __init__(
        self, coupling: Coupling, criterion: str = "l2", saliency: Mapping[str, np.ndarray] | None = None
    ) -> None:
        self._coupling, self._criterion = coupling, criterion
        axes = coupling.axes
        families = axes.labels.families()
        self._tensors: dict[int, list[tuple[oir.Value, int, np.ndarray]]] = {}
        weights = [v for v in axes.table if v.name and constant(v) is not None]
        self._worth = {v: worth for v in weights if (worth := self._worth_of(v, saliency)) is not None}
        for value in self._worth:
            for axis, labels in enumerate(axes.table[value]):
                if labels is not None:
                    for family in np.unique(families[labels]):
                        if family:
                            mine = np.where(families[labels] == family, axes.labels.roots(labels), -1)
                            self._tensors.setdefault(int(family), []).append((value, axis, mine))
        self._families = families

    def _worth_of(self, value: oir.Value, saliency: Mapping[str, np.ndarray] | None) -> np.ndarray | None:
        array = constant(value)
        assert array is not None
        if saliency is not None:
            given = saliency.get(value.name or "")
            return given if given is not None and given.shape == array.shape else None
        is_scale = self._criterion == "bn" and value in self._coupling.axes.scales
        if array.ndim < _LEAST_RANK and not is_scale:
            return None
        magnitude = np.abs(array.astype(np.float32))
        return magnitude**2 if self._criterion in ("l2", "bn") and not is_scale else magnitude

    def of(self, family: Family) -> np.ndarray:
        """Return one number per unit of a family; its mean is 1 unless nothing is known or all are 0."""
        tensors = self._tensors.get(int(self._families[family.units[0]]), [])
        scales = [entry for entry in tensors if self._criterion == "bn" and entry[0] in self._coupling.axes.scales]
        total = np.zeros(len(family.units))
        for value, axis, roots in scales or tensors:
            worth = self._worth[value]
            slices = worth.sum(axis=tuple(a for a in range(worth.ndim) if a != axis), dtype=np.float64)
            units = np.zeros(len(family.units))
            mine = roots >= 0
            np.add.at(units, np.searchsorted(family.units, roots[mine]), slices[mine])
            if self._criterion == "l2":
                units = np.sqrt(units)
            mean = units.mean()
            total += units / mean if mean > 0 else 0.0
        return total / max(1, len(scales or tensors))
