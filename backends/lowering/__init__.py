"""Lowering: ONNX operators to Relax, one file per family, joined here in one table."""

from __future__ import annotations

from optc.backends.lowering import (
    comparisons,
    convolution,
    einsum,
    elementwise,
    integer_matmul,
    matmul,
    pooling,
    tensor,
)
from optc.backends.lowering.table import merge

TABLE = merge(
    [
        comparisons.TABLE,
        convolution.TABLE,
        einsum.TABLE,
        elementwise.TABLE,
        integer_matmul.TABLE,
        matmul.TABLE,
        pooling.TABLE,
        tensor.TABLE,
    ]
)
"""The lowering of every supported operator, by (domain, operator)."""
