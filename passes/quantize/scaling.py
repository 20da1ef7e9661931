"""Exact rescaling that makes a model easier to quantize: what one operator is divided by, the next is multiplied with.

SmoothQuant (Xiao et al., 2022)      channels of activations that are large lend their range to the weights
AWQ (Lin et al., 2023)               weights that meet large activations get finer steps
cross-layer equalization (Nagel et al., 2019)   both weights of a pair of convolutions use their range alike
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as oir

from optc.passes.match import constant, producer, used_once
from optc.passes.quantize.edit import Edit
from optc.passes.quantize.products import Product, product, products

_LARGEST = 1e4
_WORTH = 0.9
"""What smoothing makes of the expected error, at most: it may cost a multiplication of activations."""


def smooth_factors(reach: np.ndarray, weights: list[np.ndarray], alpha: float) -> np.ndarray:
    """Return what to divide each channel by: ``reach^alpha / weight^(1 - alpha)``, SmoothQuant's equation 4.

    ``reach`` are the largest magnitudes of the channels, ``weights`` matrices ``[depth, columns]`` that read them.
    Channels that are always 0 stay.
    """
    strength = np.max([np.abs(w).max(1) for w in weights], axis=0)
    usable = (reach > 0) & (strength > 0)
    raw = np.where(usable, reach, 1.0) ** alpha / np.where(usable, strength, 1.0) ** (1 - alpha)
    raw = np.where(usable, raw, 1.0)
    middle = np.exp(np.log(raw[usable]).mean()) if usable.any() else 1.0
    return np.where(usable, np.clip(raw / middle, 1 / _LARGEST, _LARGEST), 1.0).astype(np.float32)


EXPONENTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def best_factors(low: np.ndarray, high: np.ndarray, power: np.ndarray, weights: list[np.ndarray]) -> np.ndarray | None:
    """Return the factors of the exponent with the least expected error; None if it is least without any.

    ``low``, ``high`` and ``power`` are the extremes and the mean square of each channel. Rounding of 8 bits is taken
    for noise of a twelfth of the squared step, of activations with one step for all, of weights with one a column.
    """
    reach = np.maximum(np.abs(low), np.abs(high))

    def error(factor: np.ndarray) -> float:
        step = (max(float((high / factor).max()), 0.0) - min(float((low / factor).min()), 0.0)) / 255
        total = 0.0
        for weight in weights:
            scaled = weight * factor[:, None]
            steps = np.abs(scaled).max(0) / 127
            total += float(step**2 * (scaled**2).sum() + (steps**2).sum() * (power / factor**2).sum())
        return total

    tried = [smooth_factors(reach, weights, exponent) for exponent in EXPONENTS]
    errors = [error(factor) for factor in tried]
    best = int(np.argmin(errors))
    return tried[best] if errors[best] < _WORTH * error(np.ones_like(reach)) else None


def groups(model: oir.Model) -> dict[oir.Value, list[Product]]:
    """Return the products with matrices by the value that they read."""
    found: dict[oir.Value, list[Product]] = {}
    for one in products(model):
        if one.node.op_type != "Conv":
            found.setdefault(one.x, []).append(one)
    return found


def scale_inputs(model: oir.Model, factors: Mapping[str, np.ndarray]) -> int:
    """Divide values (by name) by factors for their last axis, and multiply the weights that read them; count values.

    A LayerNormalization whose result nobody else reads takes the division into its own scale and bias; elsewhere it is
    a multiplication, which fuses with the rounding behind it.
    """
    edit, count = Edit(model, "smoothing"), 0
    for value, members in groups(model).items():
        factor = factors.get(str(value.name))
        if factor is None:
            continue
        count += 1
        for one in members:
            along = factor[:, None] if one.channels == 1 else factor[None, :]
            _replace(edit, one.node, 1, one.array() * along)
        normalized = producer(value, "LayerNormalization")
        readers = {one.node for one in members}
        own = all(node in readers and index == 0 for node, index in value.uses()) and not value.is_graph_output()
        if normalized is not None and own and _scaled(edit, normalized, factor):
            continue
        inverse = edit.constant((1 / factor).astype(np.float32), f"{value.name}.smoothing")
        smooth = edit.node("Mul", [value, inverse], value)
        for one in members:
            one.node.replace_input_with(0, smooth)
    return count


def _scaled(edit: Edit, node: oir.Node, factor: np.ndarray) -> bool:
    """Divide the scale and bias of a normalization; False if they are not constants for the last axis."""
    arrays = [(i, constant(node.inputs[i])) for i in range(1, len(node.inputs)) if node.inputs[i] is not None]
    if not arrays or any(array is None or array.shape != factor.shape for _, array in arrays):
        return False
    for index, array in arrays:
        assert array is not None
        _replace(edit, node, index, array / factor)
    return True


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
            _replace(edit, one, 1, first.array() / factor.reshape(-1, *tail))
            if first.bias is not None:
                bias = constant(first.bias)
                assert bias is not None
                _replace(edit, one, 2, bias / factor)
            array, group = second.array(), two.attributes.get_int("group", 1)
            along = np.repeat(factor.reshape(group, -1), len(array) // group, 0)
            _replace(edit, two, 1, array * along.reshape(*along.shape, *[1] * (array.ndim - 2)))
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


def _replace(edit: Edit, node: oir.Node, index: int, array: np.ndarray) -> None:
    old = node.inputs[index]
    assert old is not None
    node.replace_input_with(index, edit.constant(np.asarray(array, np.float32), f"{old.name}.scaled"))
    edit.discard(old)
