"""Zeros in weights: single ones, N of M, and blocks. Sizes stay, and so does the time that dense kernels take.

Zeros make a file compress better, and N:M is what some GPUs multiply faster; our CPU kernels are dense.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from optc.errors import UsageError
from optc.passes.match import constant
from optc.passes.prune.layers import Layer, find
from optc.passes.prune.select import SCOPES


@dataclass(frozen=True)
class Sparsity:
    """What became of a tensor: the share of zeros, and the share of its importance that is left."""

    name: str
    size: int
    zeros: float
    left: float


Saliency = Mapping[str, np.ndarray]


def magnitude(
    model: oir.Model,
    ratio: float,
    *,
    scope: str = "layer",
    block: tuple[int, int] = (1, 1),
    saliency: Saliency | None = None,
) -> list[Sparsity]:
    """Zero the share ``ratio`` of the weights of each layer, or of all layers together, in place.

    ``block`` is (features, columns): what goes together, worth the sum of its weights; parts of blocks at the border
    count as blocks. Weights are worth their square, or what ``saliency`` says by name.

    Raises UsageError for a ratio or a scope that there is not.
    """
    if not 0 <= ratio < 1:
        raise UsageError(f"a share of {ratio} zeros is not between 0 and 1")
    if scope not in SCOPES or min(block) < 1:
        raise UsageError(f"no scope is called '{scope}', or a block {block} is empty")
    layers = find(model)
    scores = [_blocks(worth_of(layer, saliency), block) for layer in layers]
    if scope == "global" and layers:
        # Single weights of a small layer are worth more: each tensor is measured by its mean.
        pooled = np.concatenate([(s / (s.mean() or 1.0)).reshape(-1) for s in scores])
        bound = np.partition(pooled, going - 1)[going - 1] if (going := int(ratio * pooled.size)) else -1.0
        masks = [s / (s.mean() or 1.0) > bound for s in scores]
    else:
        masks = [_largest(s.reshape(-1), ratio).reshape(s.shape) for s in scores]
    return [
        _apply(layer, np.repeat(np.repeat(mask, block[0], 0), block[1], 1), saliency)
        for layer, mask in zip(layers, masks, strict=True)
    ]


def n_of_m(model: oir.Model, n: int, m: int, *, saliency: Saliency | None = None) -> list[Sparsity]:
    """Keep the ``n`` most important of every ``m`` neighbouring input channels, in place.

    For each output and each place of a kernel on its own. Layers whose channels do not divide by ``m`` stay dense.

    Raises UsageError unless 0 < n < m.
    """
    if not 0 < n < m:
        raise UsageError(f"{n}:{m} is no sparsity", hint="2:4 keeps 2 of 4")
    found = []
    for layer in find(model):
        worth = channels_first(layer, worth_of(layer, saliency))
        if len(worth) % m == 0:
            mask = best_of_groups(worth, n, m)
            found.append(_apply(layer, mask.reshape(layer.matrix().shape), saliency))
    return found


def best_of_groups(worth: np.ndarray, n: int, m: int) -> np.ndarray:
    """Return a mask of the ``n`` largest of each ``m`` along the first axis of ``worth`` [channels, ...]."""
    groups = worth.reshape(-1, m, *worth.shape[1:])
    ranks = np.argsort(np.argsort(-groups, axis=1, kind="stable"), axis=1, kind="stable")
    mask: np.ndarray = (ranks < n).reshape(worth.shape)
    return mask


def channels_first(layer: Layer, matrix: np.ndarray) -> np.ndarray:
    """Return [features, columns] as [channels, places of the kernel * columns]."""
    assert layer.weight.shape is not None
    return matrix.reshape(int(layer.weight.shape.numpy()[layer.input_axis]), -1)


def worth_of(layer: Layer, saliency: Saliency | None) -> np.ndarray:
    """Return what each weight is worth, as [features, columns]: its square, or what ``saliency`` says."""
    given = saliency.get(str(layer.weight.name)) if saliency is not None else None
    return np.square(layer.matrix()) if given is None else layer.as_matrix(given)


def _blocks(worth: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Return the sum over each block."""
    rows, columns = (np.arange(0, size, step) for size, step in zip(worth.shape, block, strict=True))
    summed: np.ndarray = np.add.reduceat(np.add.reduceat(worth, rows, axis=0), columns, axis=1)
    return summed


def _largest(worth: np.ndarray, ratio: float) -> np.ndarray:
    mask = np.ones(len(worth), bool)
    mask[np.argsort(worth, kind="stable")[: int(ratio * len(worth))]] = False
    return mask


def _apply(layer: Layer, mask: np.ndarray, saliency: Saliency | None) -> Sparsity:
    matrix = layer.matrix()
    mask = mask[: matrix.shape[0], : matrix.shape[1]]
    worth = worth_of(layer, saliency)
    left = float(worth[mask].sum() / (worth.sum() or 1.0))
    left_over = np.where(mask, matrix, 0)
    layer.set(left_over)
    return Sparsity(str(layer.weight.name), matrix.size, float((left_over == 0).mean()), left)


def clip(model: oir.Model, percentile: float) -> int:
    """Bound the weights of each layer by this percentile of their magnitudes, in place; return how many were bounded.

    Few weights far from the others take most of the range of a quantizer. Raises UsageError for what is no percentile.
    """
    if not 0 < percentile <= 100:
        raise UsageError(f"{percentile} is no percentile")

    def bounded(array: np.ndarray) -> np.ndarray:
        limit = np.percentile(np.abs(array), percentile)
        found: np.ndarray = np.clip(array, -limit, limit)
        return found

    return _each(model, bounded)


def cluster(model: oir.Model, count: int, *, rounds: int = 30) -> int:
    """Let the weights of each layer share ``count`` values, in place; return how many weights changed.

    One-dimensional k-means (Lloyd's algorithm, from quantiles); zeros stay zeros. S. Han et al.: Deep Compression,
    2016. Raises UsageError for fewer than two values.
    """
    if count < 2:
        raise UsageError(f"{count} values are no codebook")

    def shared(array: np.ndarray) -> np.ndarray:
        values = array[array != 0]
        if len(np.unique(values)) <= count:
            return array
        ordered = np.sort(values.astype(np.float64))
        sums = np.concatenate([[0.0], np.cumsum(ordered)])
        centers = np.unique(np.quantile(ordered, (np.arange(count) + 0.5) / count))
        for _ in range(rounds):
            edges = np.searchsorted(ordered, (centers[1:] + centers[:-1]) / 2)
            edges = np.unique(np.concatenate([[0], edges, [len(ordered)]]))
            moved = (sums[edges[1:]] - sums[edges[:-1]]) / np.diff(edges)
            if np.array_equal(moved, centers):
                break
            centers = moved
        nearest = np.searchsorted((centers[1:] + centers[:-1]) / 2, array)
        found: np.ndarray = np.where(array == 0, 0, centers[nearest])
        return found

    return _each(model, shared)


def _each(model: oir.Model, change: Callable[[np.ndarray], np.ndarray]) -> int:
    changed = 0
    for layer in find(model):
        array = constant(layer.weight)
        assert array is not None
        new = change(array).astype(array.dtype)
        changed += int((new != array).sum())
        layer.weight.const_value = oir.tensor(new, name=layer.weight.name)
    return changed
