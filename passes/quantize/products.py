"""The operators that are worth quantizing: products with constant weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from optc.passes.match import constant, input_or_none, int_attribute, rank


@dataclass(frozen=True)
class Product:
    """A Conv, MatMul or Gemm in float32 whose weights are constant.

    ``channels`` is the axis of the output channels in the weights, which may have a scale each.
    """

    node: oir.Node
    x: oir.Value
    weight: oir.Value
    bias: oir.Value | None
    channels: int

    @property
    def name(self) -> str:
        """The node's name, by which plans and reports speak of the product."""
        return str(self.node.name)

    def array(self) -> np.ndarray:
        """Return the weights."""
        array = constant(self.weight)
        assert array is not None
        return array

    def matrix(self) -> np.ndarray:
        """Return the weights as ``[output channels, depth]``."""
        return np.moveaxis(self.array(), self.channels, 0).reshape(self.array().shape[self.channels], -1)


def products(model: oir.Model) -> Iterator[Product]:
    """Yield the products of the outermost graph that can be quantized, in order."""
    for node in model.graph:
        found = product(node)
        if found is not None:
            yield found


def product(node: oir.Node) -> Product | None:
    """Return ``node`` as a product, None if it is none or its factors are of another kind."""
    if node.domain != "" or node.op_type not in ("Conv", "MatMul", "Gemm"):
        return None
    x, weight, bias = (input_or_none(node, i) for i in range(3))
    array = constant(weight)
    if x is None or weight is None or array is None or array.dtype != np.float32 or constant(x) is not None:
        return None
    if bias is not None and constant(bias) is None:
        return None
    if not np.isfinite(array).all() or not array.size or rank(x) is None:
        return None
    if node.op_type == "Conv":
        return Product(node, x, weight, bias, 0)
    if array.ndim != 2:
        return None
    if node.op_type == "MatMul":
        return Product(node, x, weight, None, 1)
    plain = node.attributes.get_float("alpha", 1.0) == 1.0 and node.attributes.get_float("beta", 1.0) == 1.0
    if int_attribute(node, "transA", 0) or not plain:
        return None
    return Product(node, x, weight, bias, 0 if int_attribute(node, "transB", 0) else 1)
