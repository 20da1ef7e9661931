"""How much single weights matter for what their layer computes on calibration data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as oir

from optc.compression.stages import bound, part
from optc.errors import UsageError
from optc.passes.prune import branches
from optc.passes.prune.layers import Layer, find

MOST_PLACES = 1024
"""Places (pixels, tokens) that are looked at in each sample."""
_RIDGE = 1e-2


def saliency(model: oir.Model, calls: Sequence[Mapping[str, np.ndarray]], criterion: str) -> dict[str, np.ndarray]:
    """Return what each weight is worth, by the name of its tensor; layers are those of ``optc.passes.prune.layers``.

    ``activation``: the error of the layer's output without the weight, ``w^2 E[x^2]``. ``taylor``: the same in the
    second-order expansion in which the other weights make up for it, ``w^2 / inverse(E[x x'])_ii`` (B. Hassibi,
    D. Stork: Optimal Brain Surgeon, 1993).

    Raises UsageError for samples of different shapes, or a model without such layers.
    """
    worth = {}
    for layer, moments in _measure(model, calls, full=criterion == "taylor"):
        if moments.ndim == 2:
            size = len(moments)
            strength = _RIDGE * max(float(np.trace(moments)) / size, 1e-12)
            moments = 1 / np.diag(np.linalg.inv(moments + strength * np.eye(size)))
        worth[str(layer.weight.name)] = layer.like_weight(np.square(layer.matrix()) * moments[:, None])
    return worth


def second_moments(model: oir.Model, calls: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return E[x x'] of the features of each layer [features, features], by the name of its weights."""
    return {str(layer.weight.name): moments for layer, moments in _measure(model, calls, full=True)}


def drop_branches(model: oir.Model, calls: Sequence[Mapping[str, np.ndarray]], count: int) -> dict[str, float]:
    """Leave out the ``count`` residual branches that change their sum least, in place; return what each changed.

    The change is one minus the cosine between the sum and what is left of it, over all samples (X. Men et al.:
    ShortGPT, 2024).

    Raises UsageError for more branches than there are, and for samples of different shapes.
    """
    found = branches.find(model)
    if count > len(found):
        raise UsageError(f"the model has {len(found)} residual branches, {count} cannot be left out")
    concrete = bound(model, calls)
    twins = branches.find(concrete)
    values = {v.name: v for twin in twins for v in (twin.skip, twin.output) if v.producer() is not None}
    run = part(concrete, list(concrete.graph.inputs), list(values.values()))
    sums = np.zeros((len(twins), 3))
    for call in calls:
        made = {**call, **run.run(call)}
        for index, twin in enumerate(twins):
            a, b = (made[str(v.name)].reshape(-1).astype(np.float64) for v in (twin.skip, twin.output))
            sums[index] += a @ b, a @ a, b @ b
    changes = 1 - sums[:, 0] / np.sqrt(np.maximum(sums[:, 1] * sums[:, 2], 1e-300))
    chosen = np.argsort(changes, kind="stable")[:count]
    result = {str(found[index].add.name): float(changes[index]) for index in chosen}
    branches.drop(model, [found[index] for index in sorted(chosen)])
    return result


def _measure(
    model: oir.Model, calls: Sequence[Mapping[str, np.ndarray]], *, full: bool
) -> Iterator[tuple[Layer, np.ndarray]]:
    """Yield each layer with the second moments of its features: all of them, or the diagonal."""
    concrete = bound(model, calls)
    layers = find(concrete)
    if not layers:
        raise UsageError("the model has no layers with constant weights: nothing can be learned from data")
    by_name = {layer.input: layer.node.inputs[0] for layer in layers}
    computed = [v for v in by_name.values() if v is not None and v.producer() is not None]
    run = part(concrete, list(concrete.graph.inputs), computed) if computed else None
    sizes = [len(layer.matrix()) for layer in layers]
    sums = [np.zeros((size, size) if full else size, np.float64) for size in sizes]
    counts = [0] * len(layers)
    for number, call in enumerate(calls):
        values = {**call, **(run.run(call) if run is not None else {})}
        for index, layer in enumerate(layers):
            x = values[layer.input]
            places = np.random.default_rng(number).permutation(layer.places(x))[:MOST_PLACES]
            rows = layer.rows(x, places)
            sums[index] += rows.T @ rows if full else np.square(rows).sum(axis=0)
            counts[index] += len(rows)
    for layer, total, count in zip(layers, sums, counts, strict=True):
        yield layer, total / count
