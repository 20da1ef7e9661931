"""Operators that map elements to one element: broadcasting, inlined constants and half-precision in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import te

from optc.backends.kernels.vector_math import convert
from optc.backends.lowering import broadcasting
from optc.backends.lowering.site import Site, scalar

_HALF = ("float16", "bfloat16")


def compute_dtype(dtype: str) -> str:
    """Return the type in which elements of ``dtype`` are computed: float32 for the half types."""
    return "float32" if dtype in _HALF else dtype


def pointwise(
    site: Site,
    function: Callable[..., Any],
    *,
    inputs: Sequence[int] | None = None,
    dtype: str | None = None,
    inline_zero: bool = True,
) -> Any:
    """Emit ``function(element, ...)`` over the broadcast inputs (default: all).

    Elements of the half types arrive as float32 and the result is rounded to ``dtype`` (default: the output's).
    A constant of one element arrives as an immediate. TVM folds ``x * 0`` to 0, which is wrong for NaN and
    infinity, and refuses to divide by an immediate 0; with ``inline_zero=False`` zeros stay in memory.
    """
    numbers = list(range(site.input_count)) if inputs is None else list(inputs)
    shapes = [site.shape(i) for i in numbers]
    result = broadcasting.broadcast_shapes(site, *shapes)
    immediates = {i: immediate(site, i, inline_zero) for i in numbers}
    places: dict[Any, int] = {}
    tensors: list[Any] = []
    for i, shape in zip(numbers, shapes, strict=True):
        if immediates[i] is None and site.value(i) not in places:
            places[site.value(i)] = len(tensors)
            tensors.append(broadcasting.checked(site, site.tensor(i), shape, result))
    output = dtype or site.output_dtype()

    def compute(*elements: Any) -> Any:
        def element(*index: Any) -> Any:
            values = []
            for i, shape in zip(numbers, shapes, strict=True):
                if immediates[i] is not None:
                    values.append(immediates[i])
                    continue
                position = broadcasting.read_index(site, shape, result, index)
                value = elements[places[site.value(i)]](*position)
                values.append(convert(value, compute_dtype(site.dtype(i))))
            return convert(function(*values), output)

        return te.compute(result, element, site.op.lower())

    return site.emit(compute, *tensors)


def immediate(site: Site, index: int, inline_zero: bool = True) -> Any:
    """Return the immediate of an input that is a constant of one element, else None."""
    array = site.constant(index)
    if array is None or array.size != 1:
        return None
    value: Any = np.asarray(array).reshape(-1)[0].item()
    if (value == 0 and not inline_zero) or (isinstance(value, int) and value >= 2**63):
        return None
    return scalar(value, compute_dtype(site.dtype(index)))
