"""How much single weights matter for what their layer computes on calibration data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as oir

from optc.compression.layers import Layer, find
from optc.compression.stages import bound, part
from optc.errors import UsageError

MOST_PLACES = 1024
"""Places (pixels, tokens) that are looked at in each sample."""
_RIDGE = 1e-2


def saliency(model: oir.Model, calls: Sequence[Mapping[str, np.ndarray]], criterion: str) -> dict[str, np.ndarray]:
    """Return what each weight is worth, by the name of its tensor; layers are those of ``layers.find``.

    ``activation``: the error of the layer's output without the weight, ``w^2 E[x^2]``. ``taylor``: the same in the
    second-order expansion in which the other weights make up for it, ``w^2 / inverse(E[x x'])_ii`` (B. Hassibi,
    D. Stork: Optimal Brain Surgeon, 1993).

    Raises UsageError for samples of different shapes, or a model without such layers.
    """
    concrete = bound(model, calls)
    layers = find(concrete)
    if not layers:
        raise UsageError("the model has no layers with constant weights: nothing can be learned from data")
    by_name = {layer.input: layer.node.inputs[0] for layer in layers}
    computed = [v for v in by_name.values() if v is not None and v.producer() is not None]
    run = part(concrete, list(concrete.graph.inputs), computed) if computed else None
    grams = [_Moments(layer, criterion == "taylor") for layer in layers]
    for number, call in enumerate(calls):
        values = {**call, **(run.run(call) if run is not None else {})}
        for gram in grams:
            gram.add(values[gram.layer.input], number)
    return {str(gram.layer.weight.name): gram.worth() for gram in grams}


class _Moments:
    """Second moments of the features of a layer: all of them, or the diagonal."""

    def __init__(self, layer: Layer, full: bool) -> None:
        self.layer = layer
        size = len(layer.matrix())
        self._sum = np.zeros((size, size) if full else size, np.float64)
        self._count = 0

    def add(self, x: np.ndarray, seed: int) -> None:
        """Take account of one input."""
        total = self.layer.places(x)
        places = np.random.default_rng(seed).permutation(total)[:MOST_PLACES]
        rows = self.layer.rows(x, places)
        self._sum += rows.T @ rows if self._sum.ndim == 2 else np.square(rows).sum(axis=0)
        self._count += len(rows)

    def worth(self) -> np.ndarray:
        """Return one number per weight, in the weights' own shape."""
        moments = self._sum / self._count
        if moments.ndim == 2:
            size = len(moments)
            strength = _RIDGE * max(float(np.trace(moments)) / size, 1e-12)
            moments = 1 / np.diag(np.linalg.inv(moments + strength * np.eye(size)))
        return self.layer.like_weight(np.square(self.layer.matrix()) * moments[:, None])
