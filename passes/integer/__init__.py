"""Quantized models: from QuantizeLinear and DequantizeLinear around float operators to operators on integers."""

from __future__ import annotations

from optc.passes.base import Pass
from optc.passes.integer.passage import passage_pass
from optc.passes.integer.products import products_pass
from optc.passes.integer.weights import weights_pass

__all__ = ["passes"]


def passes() -> list[Pass]:
    """Return the passes in order: bounds leave the way between a product and its rounding first, weights come near."""
    return [passage_pass(), weights_pass(), products_pass()]
