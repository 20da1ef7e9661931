"""Low rank: a large product with constant weights becomes two small ones where that takes fewer operations.

With data, the singular values are those of the output: the error that counts is ``|x (W - UV)|``, not ``|W - UV|``
(X. Wang et al.: SVD-LLM, 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from optc.errors import UsageError
from optc.ir import provenance
from optc.passes.prune.layers import Layer, find, initializer
from optc.passes.rewrite import Namer

LEAST_GAIN = 0.8
"""Two products have to take at most this share of the operations of one."""
LEAST_SIZE = 64
"""Smaller products than this many features or columns are not worth a kernel more."""


@dataclass(frozen=True)
class Factored:
    """A product of [features, columns]: the rank that was kept (None: left alone) and the relative squared error."""

    name: str
    features: int
    columns: int
    rank: int | None
    error: float


def factor(model: oir.Model, error: float, *, moments: Mapping[str, np.ndarray] | None = None) -> list[Factored]:
    """Replace products by two, in place, with the smallest rank that keeps the relative squared error.

    Args:
        model: a canonical model.
        error: the share of the squared norm that may be lost, between 0 and 1.
        moments: second moments E[x x'] of the features, by the name of the weights; then the error is that of the
            output.

    Raises UsageError for an error that is not between 0 and 1.
    """
    if not 0 < error < 1:
        raise UsageError(f"an error of {error} is not between 0 and 1")
    found = []
    namer = Namer(model)
    for layer in find(model):
        features, columns = layer.matrix().shape
        if layer.node.op_type == "Conv" or min(features, columns) < LEAST_SIZE:
            continue
        left, right, lost = _decompose(layer.matrix(), error, (moments or {}).get(str(layer.weight.name)))
        rank = left.shape[1]
        pays = rank * (features + columns) <= LEAST_GAIN * features * columns
        if pays:
            _replace(model, layer, left, right, namer)
        found.append(Factored(str(layer.weight.name), features, columns, rank if pays else None, lost if pays else 0.0))
    return found


def _decompose(w: np.ndarray, error: float, moments: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, float]:
    """Return factors [features, rank] and [rank, columns], and what is lost."""
    matrix = w.astype(np.float64)
    if moments is not None:
        # |x M|^2 = |sqrt(D) Q' M|^2 where Q D Q' = E[x x']; a ridge keeps D invertible.
        values, basis = np.linalg.eigh(moments.astype(np.float64))
        ridge = 1e-6 * max(float(values.mean()), 1e-12)
        scales = np.sqrt(np.maximum(values, 0) + ridge)[:, None]
        matrix = scales * (basis.T @ matrix)
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    lost = 1 - np.cumsum(s**2) / max(float((s**2).sum()), 1e-300)
    rank = int(np.argmax(lost <= error)) + 1
    left = u[:, :rank] * np.sqrt(s[:rank])
    if moments is not None:
        left = basis @ (left / scales)
    right = np.sqrt(s[:rank])[:, None] * v[:rank]
    return left.astype(np.float32), right.astype(np.float32), max(0.0, float(lost[rank - 1]))


def _replace(model: oir.Model, layer: Layer, left: np.ndarray, right: np.ndarray, namer: Namer) -> None:
    node, old = layer.node, layer.weight
    x = node.inputs[0]
    assert x is not None
    inner = oir.node("MatMul", [x, initializer(model, namer.fresh(f"{old.name}.left"), left)])
    inner.name = namer.fresh(f"{node.name}.left")
    (middle,) = inner.outputs
    middle.name, middle.type = namer.fresh(f"{inner.name}.out"), x.type
    if x.shape is not None:
        middle.shape = oir.Shape([*x.shape.dims[:-1], left.shape[1]])
    provenance.inherit(inner, [node], made_by="low rank")
    model.graph.insert_before(node, [inner])
    node.replace_input_with(0, middle)
    stored = right.T if layer.input_axis == 1 else right
    node.replace_input_with(1, initializer(model, namer.fresh(f"{old.name}.right"), stored))
    model.graph.initializers.pop(str(old.name))
