"""Shape vectors for Reshape: how to write a symbolic shape as integers."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from optc.passes.match import same_dim


def shape_vector(source: oir.Shape | None, target: oir.Shape | None) -> np.ndarray | None:
    """Return the constant second input of ``Reshape`` from ``source`` to ``target``, for ``allowzero=0``.

    A symbolic dim that stays in its place is written 0, and one other -1. None where that does not suffice, where
    a shape is unknown, or where an axis has size 0.
    """
    if source is None or target is None:
        return None
    vector: list[int] = []
    for axis, dim in enumerate(target):
        if isinstance(dim, int):
            vector.append(dim)
        elif axis < len(source) and same_dim(dim, source[axis]):
            vector.append(0)
        else:
            vector.append(-1)
    if vector.count(-1) > 1 or any(d == 0 for d in (*source, *target)):
        return None
    return np.array(vector, np.int64)
