"""Weights in 8 or 4 bits under DequantizeLinear; what they are multiplied with stays in float32.

Matrices of MatMul and Gemm have a scale for each column, or for each block of the depth and column; tables that Gather
reads rows of have one for each row, or block of a row. Convolutions stay: no kernel reads their weights packed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as oir

from optc.passes.base import Pass, PassResult
from optc.passes.match import constant, int_attribute
from optc.passes.quantize import blocks
from optc.passes.quantize.edit import Edit
from optc.passes.quantize.products import Product, products
from optc.passes.quantize.static import dequantized
from optc.passes.quantize.weights import Integers

LEAST = 4096
"""Weights that a matrix has at least: fewer are not worth their scales."""


def matrices(model: oir.Model) -> list[Product]:
    """Return the products with matrices that can be packed."""
    return [p for p in products(model) if p.node.op_type != "Conv" and p.array().size >= LEAST]


def tables(model: oir.Model) -> list[oir.Node]:
    """Return the Gather nodes that read rows of a constant float32 table."""
    found = []
    for node in model.graph:
        if node.domain == "" and node.op_type == "Gather" and int_attribute(node, "axis", 0) == 0:
            array = constant(node.inputs[0])
            if array is not None and array.ndim == 2 and array.dtype == np.float32 and array.size >= LEAST:
                found.append(node)
    return found


def rounded(
    matrix: np.ndarray, dtype: str, block: int, algorithm: str = "nearest", gram: np.ndarray | None = None
) -> Integers:
    """Round a matrix ``[depth, columns]`` by one of ``ALGORITHMS``; those other than ``nearest`` need ``gram``."""
    if gram is None:
        return blocks.nearest(matrix, dtype, block)
    return _BY_GRAM[algorithm](matrix, dtype, gram, block)


_BY_GRAM: Mapping[str, Callable[[np.ndarray, str, np.ndarray, int], Integers]] = {
    "gptq": blocks.gptq,
    "adaround": blocks.adaround,
}
ALGORITHMS = ("nearest", *_BY_GRAM)


class WeightOnlyPass(Pass):
    """Packs the weights of ``chosen`` (integers ``[depth, columns]`` by product, ``[rows, width]`` by Gather)."""

    name = "weight-only-quantization"

    def __init__(self, chosen: Mapping[str, Integers]) -> None:
        self.chosen = chosen

    def call(self, model: oir.Model) -> PassResult:
        """Insert DequantizeLinear, in place."""
        edit, shared = Edit(model, self.name), dict[tuple[oir.Value, int], oir.Value]()
        work = [(p.node, 1, p.channels == 0) for p in products(model) if p.name in self.chosen]
        work += [(node, 0, False) for node in tables(model) if str(node.name) in self.chosen]
        order = {node: number for number, node in enumerate(model.graph)}
        # The first reader in the graph's order makes what the others read too.
        for node, index, transposed in sorted(work, key=lambda item: order[item[0]]):
            weight = node.inputs[index]
            assert weight is not None
            key = (weight, index)
            if key not in shared:
                array = self.chosen[str(node.name)]
                shared[key] = dequantized(edit, weight, turned(array) if transposed else array, node)
            node.replace_input_with(index, shared[key])
            edit.discard(weight)
        return PassResult(bool(work), {"packed": len(work)} if work else {})


def turned(array: Integers) -> Integers:
    """Return the transposed matrix."""

    def flip(a: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(a.T)

    zero = None if array.zero is None else flip(array.zero)
    return Integers(flip(array.values), flip(array.scale), zero, 1 - array.axis, array.block)
