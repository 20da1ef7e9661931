"""Lowering: ONNX operators to Relax, one file per family, joined here in one table."""

from __future__ import annotations

from optc.backends.lowering import matmul, tensor
from optc.backends.lowering.table import merge

TABLE = merge([matmul.TABLE, tensor.TABLE])
"""The lowering of every supported operator, by (domain, operator)."""
