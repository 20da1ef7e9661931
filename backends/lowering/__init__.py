"""Lowering: ONNX operators to Relax, one file per family, joined here in one table."""

from __future__ import annotations

from optc.backends.lowering import (
    activations,
    attention,
    comparisons,
    control_flow,
    convolution,
    data_dependent,
    einsum,
    elementwise,
    indexing,
    integer_convolution,
    integer_matmul,
    loops,
    matmul,
    normalization,
    pooling,
    quantization,
    recurrent,
    reductions,
    resize,
    scatter,
    sequences,
    signal,
    sorting,
    tensor,
    vision,
)
from optc.backends.lowering.table import merge

TABLE = merge(
    [
        activations.TABLE,
        attention.TABLE,
        comparisons.TABLE,
        control_flow.TABLE,
        convolution.TABLE,
        data_dependent.TABLE,
        einsum.TABLE,
        elementwise.TABLE,
        indexing.TABLE,
        integer_convolution.TABLE,
        integer_matmul.TABLE,
        loops.TABLE,
        matmul.TABLE,
        normalization.TABLE,
        pooling.TABLE,
        quantization.TABLE,
        recurrent.TABLE,
        reductions.TABLE,
        resize.TABLE,
        scatter.TABLE,
        sequences.TABLE,
        signal.TABLE,
        sorting.TABLE,
        tensor.TABLE,
        vision.TABLE,
    ]
)
"""The lowering of every supported operator, by (domain, operator)."""
