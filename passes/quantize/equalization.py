"""Cross-layer equalization (Nagel et al., 2019): both weights of a pair of convolutions use their range alike.

Exact: what one is divided by, the next is multiplied with.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from optc.passes.match import constant, producer, used_once
from optc.passes.quantize.edit import Edit
from optc.passes.quantize.products import Product, product, products
from optc.passes.quantize.smoothing import replace

_LARGEST = 1e4


def equalize(model: oir.Model, rounds: int = 20) -> int:
    """Equalize the ranges of weights over pairs of convolutions, in place, and return the number of pairs.

    Between the two there may be a Relu or LeakyRelu, and nothing else may read what is there.
    """
    pairs = _pairs(model)
    if not pairs:
        return 0
    edit = Edit(model, "equalization")
    for _ in range(rounds):
        largest = 1.0
        for one, two in pairs:
            first, second = product(one), product(two)
            assert first is not None and second is not None
            factor = _factor(first, second)
            largest = max(largest, float(factor.max()), float(1 / factor.min()))
            tail = (1,) * (first.array().ndim - 1)
            replace(edit, one, 1, first.array() / factor.reshape(-1, *tail))
            if first.bias is not None:
                bias = constant(first.bias)
                assert bias is not None
                replace(edit, one, 2, bias / factor)
            array, group = second.array(), two.attributes.get_int("group", 1)
            along = np.repeat(factor.reshape(group, -1), len(array) // group, 0)
            replace(edit, two, 1, array * along.reshape(*along.shape, *[1] * (array.ndim - 2)))
        if largest < 1.01:
            break
    return len(pairs)


def _pairs(model: oir.Model) -> list[tuple[oir.Node, oir.Node]]:
    found = []
    for two in products(model):
        value = two.x
        if two.node.op_type != "Conv" or not used_once(value):
            continue
        between = producer(value, "Relu", "LeakyRelu")
        if between is not None:
            assert between.inputs[0] is not None
            value = between.inputs[0]
        one = producer(value, "Conv")
        if one is not None and product(one) is not None and used_once(value):
            found.append((one, two.node))
    return found


def _factor(first: Product, second: Product) -> np.ndarray:
    """Return ``sqrt(range of a channel in the first / in the second)``; 1 where one of them is 0."""
    a = np.abs(first.matrix()).max(1)
    array = second.array()
    group = second.node.attributes.get_int("group", 1)
    # [group, maps of it, channels of it, ...] -> the largest of each channel.
    b = np.abs(array).reshape(group, len(array) // group, array.shape[1], -1).max((1, 3)).reshape(-1)
    usable = (a > 0) & (b > 0)
    factor = np.sqrt(np.where(usable, a, 1.0) / np.where(usable, b, 1.0))
    return np.asarray(np.where(usable, np.clip(factor, 1 / _LARGEST, _LARGEST), 1.0), np.float32)
