"""Which units go: the least important of each family, or of the whole model."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from optc.errors import UsageError
from optc.passes.prune.analysis import Coupling, Family
from optc.passes.prune.importance import CRITERIA, DATA_CRITERIA, Scores

SCOPES = ("layer", "global")


@dataclass(frozen=True)
class Structured:
    """How much to prune, and how.

    Args:
        ratio: the share of units that go, from 0 to below 1.
        scope: ``layer``: the same share of each family; ``global``: the least important of all families.
        criterion: see ``Scores``.
        multiple: sizes that are left are multiples of this, as vectors and blocks of kernels like them. Families of
            less than twice as many slices are not rounded.
        least: the share of a family that ``global`` leaves in any case.
        layers: other ratios for families with a weight of that name, which may have wildcards; the first that fits.

    Raises UsageError for what is out of range.
    """

    ratio: float
    scope: str = "layer"
    criterion: str = "l2"
    multiple: int = 8
    least: float = 0.1
    layers: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for ratio in (self.ratio, *self.layers.values()):
            if not 0 <= ratio < 1:
                raise UsageError(f"a pruning ratio of {ratio} is not between 0 and 1", hint="0.5 (or 50%) removes half")
        known_criteria = (*CRITERIA, *DATA_CRITERIA)
        for name, value, known in (("scope", self.scope, SCOPES), ("importance", self.criterion, known_criteria)):
            if value not in known:
                raise UsageError(f"no pruning {name} is called '{value}'", hint=f"there are: {', '.join(known)}")
        if self.multiple < 1 or not 0 < self.least <= 1:
            raise UsageError("multiple must be at least 1, least between 0 and 1")


def choose(coupling: Coupling, scores: Scores, how: Structured) -> dict[int, np.ndarray]:
    """Return the labels that go, by the key of their family. At least one slice of each axis stays.

    Raises UsageError for a name in ``how.layers`` that no weight of a family has.
    """
    for pattern in how.layers:
        if not any(fnmatch.filter(family.weights, pattern) for family in coupling.families):
            names = ", ".join(family.name for family in coupling.families[:5])
            raise UsageError(f"nothing that can be pruned is called '{pattern}'", hint=f"the first are: {names}")
    found = {family.key: scores.of(family) for family in coupling.families}
    counts = _counts(coupling.families, found, how)
    removed: dict[int, np.ndarray] = {}
    for family in coupling.families:
        step = _step(coupling, family, how.multiple)
        keep = _rounded(len(family.units), counts[family.key], step)
        order = np.argsort(found[family.key], kind="stable")
        removed[family.key] = family.units[order[: len(family.units) - keep]]
    return _without_empty_axes(coupling, removed)


def own_ratio(family: Family, how: Structured) -> float | None:
    """Return the ratio that ``how.layers`` give a family, None if none of them fits."""
    return next((r for pattern, r in how.layers.items() if fnmatch.filter(family.weights, pattern)), None)


def _counts(families: tuple[Family, ...], scores: Mapping[int, np.ndarray], how: Structured) -> dict[int, float]:
    """Return how many units each family keeps, before rounding."""
    own = {family.key: own_ratio(family, how) for family in families}
    counts = {
        family.key: len(family.units) * (1 - (how.ratio if ratio is None else ratio))
        for family, ratio in zip(families, own.values(), strict=True)
    }
    ranked = [family for family in families if own[family.key] is None]
    if how.scope == "layer" or not ranked:
        return counts
    # The best of each family stay whatever the others are worth.
    open_scores = []
    for family in ranked:
        ordered = np.sort(scores[family.key])
        open_scores.append(ordered[: len(ordered) - math.ceil(how.least * len(ordered))])
    total = sum(len(family.units) for family in ranked)
    pooled = np.sort(np.concatenate(open_scores))
    going = min(round(total * how.ratio), len(pooled))
    threshold = pooled[going - 1] if going else -np.inf
    for family, ordered in zip(ranked, open_scores, strict=True):
        counts[family.key] = len(family.units) - int((ordered <= threshold).sum())
    return counts


def _step(coupling: Coupling, family: Family, multiple: int) -> int:
    """Return how many units make a multiple of slices: one where a unit is a head of 64 slices, say."""
    axes = coupling.axes
    width = 1
    for name, table in ((value.name, table) for value, table in axes.table.items() if value.is_initializer()):
        if name == family.name:
            for labels in table:
                if labels is not None:
                    mine = np.isin(axes.labels.roots(labels), family.units)
                    width = max(width, round(int(mine.sum()) / len(family.units)))
    return multiple // math.gcd(width, multiple)


def _rounded(size: int, keep: float, step: int) -> int:
    if size < 2 * step:
        return max(1, min(size, round(keep)))
    return min(size, max(step, round(keep / step) * step))


def _without_empty_axes(coupling: Coupling, removed: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Keep one unit of each axis that would have no slice left: half of a family may lie in a branch of its own."""
    going = np.concatenate([np.zeros(0, np.int64), *removed.values()])
    spared: set[int] = set()
    for table in coupling.axes.table.values():
        for labels in table:
            if labels is not None and labels.size and labels.any():
                roots = coupling.axes.labels.roots(labels)
                if np.isin(roots, going).all() and not spared.intersection(roots.tolist()):
                    spared.add(int(going[np.isin(going, roots)][-1]))
    return {key: labels[~np.isin(labels, list(spared))] for key, labels in removed.items()}
