"""How far apart two workloads are: whether decisions about one may hold for the other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from optc.backends.kernels.workload import Workload

_SIZES = {
    "conv": ("batch", "out", "filters"),
    "matmul": ("m", "k", "n"),
    "window": ("outputs",),
    "attention": ("outputs", "summed"),
    "integer_contraction": ("outputs", "summed"),
    "contraction": ("outputs", "summed"),
}
"""Sizes by operator; everything else of a core has to be equal."""
_IGNORED = {"tensors"}
"""What follows from the sizes."""
_EPILOGUE = 0.25
"""What each different stage of the epilogue counts."""


def distance(a: Workload, b: Workload) -> float:
    """Return the sum of the factors of two between sizes; infinite for what cannot be compared."""
    if a.operator != b.operator or a.operator not in _SIZES or a.core.keys() != b.core.keys():
        return math.inf
    sizes = _SIZES[a.operator]
    same = all(a.core[k] == b.core[k] for k in a.core if k not in sizes and k not in _IGNORED)
    if not same or a.core.get("filters", [])[2:] != b.core.get("filters", [])[2:]:
        return math.inf
    total = _EPILOGUE * len(set(a.epilogue) ^ set(b.epilogue))
    for key in sizes:
        total += _factors(a.core, b.core, key)
    return total


def _factors(a: Mapping[str, Any], b: Mapping[str, Any], key: str) -> float:
    left, right = (value if isinstance(value, list) else [value] for value in (a[key], b[key]))
    if len(left) != len(right):
        return math.inf
    return sum(_factor(x, y) for x, y in zip(left, right, strict=True))


def _factor(x: int, y: int) -> float:
    if x == y:
        return 0.0
    return abs(math.log2(x / y)) if x and y else math.inf
