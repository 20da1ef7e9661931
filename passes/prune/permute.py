"""Channels in an order in which N of M neighbours hold more of the weights: what is computed stays the same.

Channels of a family change places in all tensors at once, which nothing notices as long as no operator sees
their order. J. Pool, C. Yu: Channel Permutations for N:M Sparsity, 2021; here pairs of groups swap single channels at
random.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from optc.passes.match import constant
from optc.passes.prune.analysis import Coupling, Family, analyse
from optc.passes.prune.layers import find
from optc.passes.prune.sparse import Saliency, channels_first, worth_of

ROUNDS = 200
MOST_COLUMNS = 512
"""Columns that the search looks at, drawn at random from larger matrices."""


def permute(model: oir.Model, n: int, m: int, *, saliency: Saliency | None = None) -> int:
    """Reorder channels in place so that ``n`` of ``m`` keep more; return how many families changed."""
    coupling = analyse(model)
    layers = {layer.weight: layer for layer in find(model)}
    changed = 0
    for family in coupling.families:
        places = _places(coupling, family)
        if places is None or len(family.units) % m:
            continue
        readers = [layers[v] for v, axis in places if v in layers and axis == layers[v].input_axis]
        if not readers:
            continue
        worth = np.concatenate([channels_first(layer, worth_of(layer, saliency)) for layer in readers], axis=1)
        order = search(worth, n, m)
        if (order == np.arange(len(order))).all():
            continue
        changed += 1
        for value, axis in places:
            array = constant(value)
            assert array is not None
            value.const_value = oir.tensor(np.ascontiguousarray(array.take(order, axis)), name=value.name)
    return changed


def _places(coupling: Coupling, family: Family) -> list[tuple[oir.Value, int]] | None:
    """Return the axes of weights that hold a family, None if anything holds it in part or in another order."""
    axes = coupling.axes
    units = set(family.units.tolist())
    first: np.ndarray | None = None
    found = []
    for value, table in axes.table.items():
        for axis, labels in enumerate(table):
            if labels is None or not labels.any():
                continue
            roots = axes.labels.roots(labels)
            if roots[0] not in units and not np.isin(roots, family.units).any():
                continue
            first = roots if first is None else first
            if len(roots) != len(units) or not np.array_equal(roots, first) or len(np.unique(roots)) != len(units):
                return None
            if value.is_initializer():
                found.append((value, axis))
    return found


def search(worth: np.ndarray, n: int, m: int) -> np.ndarray:
    """Return an order of the rows of ``worth`` [channels, columns]; groups of ``m`` keep ``n`` per column."""
    generator = np.random.default_rng(0)
    if worth.shape[1] > MOST_COLUMNS:
        worth = worth[:, generator.choice(worth.shape[1], MOST_COLUMNS, replace=False)]
    order = np.arange(len(worth))
    groups = len(worth) // m
    if groups < 2:
        return order
    kept = _kept(worth, n, m)
    for _ in range(ROUNDS):
        pairs = generator.permutation(groups)[: groups // 2 * 2].reshape(-1, 2)
        a, b = (
            pairs[:, 0] * m + generator.integers(m, size=len(pairs)),
            pairs[:, 1] * m + generator.integers(m, size=len(pairs)),
        )
        tried = order.copy()
        tried[a], tried[b] = order[b], order[a]
        after = _kept(worth[tried], n, m)
        better = after[pairs].sum(axis=1) > kept[pairs].sum(axis=1) * (1 + 1e-9)
        order[a[better]], order[b[better]] = tried[a[better]], tried[b[better]]
        kept[pairs[better]] = after[pairs[better]]
    return order


def _kept(worth: np.ndarray, n: int, m: int) -> np.ndarray:
    """Return what each group keeps."""
    best = np.partition(worth.reshape(-1, m, worth.shape[1]), m - n, axis=1)[:, m - n :]
    total: np.ndarray = best.sum(axis=(1, 2), dtype=np.float64)
    return total
