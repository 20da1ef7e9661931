"""Exact rescaling of what products read: channels of a large range lend it to the weights.

SmoothQuant (Xiao et al., 2022) for matrices; for convolutions the same, and for depthwise ones it costs nothing: their
weights have a scale for each channel anyway, so each channel of what they read uses the whole range of the integers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from optc.passes.match import commuted, constant, used_once
from optc.passes.quantize.edit import Edit
from optc.passes.quantize.products import Product, product, products

_LARGEST = 1e4
_WORTH, _WORTH_MULTIPLYING = 0.9, 0.5
"""What smoothing makes of the expected error, at most: where it is free, and where it may cost a multiplication."""
EXPONENTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Readers:
    """Products of one kind that read ``value``, whose channels lie along ``axis``."""

    value: oir.Value
    axis: int
    members: tuple[Product, ...]

    def alone(self) -> bool:
        """Tell whether nobody else reads the value."""
        nodes = {one.node for one in self.members}
        return all(node in nodes and index == 0 for node, index in self.value.uses()) and not (
            self.value.is_graph_output()
        )

    def weights(self) -> list[np.ndarray]:
        """Return the weights as ``[groups, channels of a group, output channels of a group, taps]``."""
        return [_by_channel(one) for one in self.members]


def readers(model: oir.Model, names: Collection[str] | None = None, *, convolutions: bool = True) -> dict[str, Readers]:
    """Return the products (all, or those called ``names``) by the name of the value that they read.

    Where a convolution and a matrix read the same value, those of the first kind are taken.
    """
    found: dict[oir.Value, list[Product]] = {}
    for one in products(model):
        is_conv = one.node.op_type == "Conv"
        if (names is None or one.name in names) and (convolutions or not is_conv):
            members = found.setdefault(one.x, [])
            if not members or (members[0].node.op_type == "Conv") == is_conv:
                members.append(one)
    return {
        str(value.name): Readers(value, 1 if members[0].node.op_type == "Conv" else -1, tuple(members))
        for value, members in found.items()
    }


def smooth_factors(reach: np.ndarray, weights: Sequence[np.ndarray], alpha: float) -> np.ndarray:
    """Return what to divide each channel by: ``reach^alpha / weight^(1 - alpha)``, SmoothQuant's equation 4.

    ``reach`` are the largest magnitudes of the channels, ``weights`` those of ``Readers.weights``. Channels that are
    always 0 stay.
    """
    strength = np.max([np.abs(w).max((2, 3)).reshape(-1) for w in weights], axis=0)
    usable = (reach > 0) & (strength > 0)
    raw = np.where(usable, reach, 1.0) ** alpha / np.where(usable, strength, 1.0) ** (1 - alpha)
    raw = np.where(usable, raw, 1.0)
    middle = np.exp(np.log(raw[usable]).mean()) if usable.any() else 1.0
    return np.where(usable, np.clip(raw / middle, 1 / _LARGEST, _LARGEST), 1.0).astype(np.float32)


def best_factors(
    low: np.ndarray,
    high: np.ndarray,
    power: np.ndarray,
    weights: Sequence[np.ndarray],
    *,
    worth: float = _WORTH,
    bits: int = 8,
) -> np.ndarray | None:
    """Return the factors of the exponent with the least expected error; None if it is not ``worth`` it.

    ``low``, ``high`` and ``power`` are the extremes and the mean square of each channel. Rounding is taken for noise of
    a twelfth of the squared step, of activations in 8 bits with one step for all, of weights in ``bits`` with one for
    each output channel. The error has to be less than ``worth`` times that without factors.
    """
    reach = np.maximum(np.abs(low), np.abs(high))

    def error(factor: np.ndarray) -> float:
        step = (max(float((high / factor).max()), 0.0) - min(float((low / factor).min()), 0.0)) / 255
        total = 0.0
        for weight in weights:
            scaled = weight * factor.reshape(*weight.shape[:2], 1, 1)
            steps = np.abs(scaled).max((1, 3)) / ((1 << (bits - 1)) - 1)
            heard = (power / factor**2).reshape(weight.shape[:2]).sum(1)
            total += float(step**2 * (scaled**2).sum() + weight.shape[3] * ((steps**2).sum(1) * heard).sum())
        return total

    tried = [smooth_factors(reach, weights, exponent) for exponent in EXPONENTS]
    errors = [error(factor) for factor in tried]
    best = int(np.argmin(errors))
    return tried[best] if errors[best] < worth * error(np.ones_like(reach)) else None


def worth(group: Readers) -> float:
    """Return what factors have to make of the expected error: less where dividing by them takes an operator."""
    free = group.alone() and _absorbs(group.value, group.axis)
    return _WORTH if free else _WORTH_MULTIPLYING


def scale_inputs(
    model: oir.Model, factors: Mapping[str, np.ndarray], names: Collection[str] | None = None
) -> dict[str, tuple[str, np.ndarray]]:
    """Divide values (by name) by factors for their channels, and multiply the weights that read them.

    What makes the value divides it where that is free: weights and biases of a product or a normalization, through
    activations that only stretch. Elsewhere it is a multiplication, which fuses with the rounding behind it.

    Returns, by the name of what the products read by now, what they read before, and the divisor in its shape.
    """
    edit, changed = Edit(model, "smoothing"), dict[str, tuple[str, np.ndarray]]()
    for name, group in readers(model, names).items():
        factor = factors.get(name)
        if factor is None:
            continue
        divisor = _spread(factor, group.value, group.axis)
        for one in group.members:
            replace(edit, one.node, 1, _multiplied(one.node, factor))
        if group.alone() and _absorbs(group.value, group.axis):
            _divide(edit, group.value, group.axis, factor)
            changed[name] = name, divisor
            continue
        inverse = edit.constant((1 / divisor).astype(np.float32), f"{name}.smoothing")
        smooth = edit.node("Mul", [group.value, inverse], group.value)
        for one in group.members:
            one.node.replace_input_with(0, smooth)
        changed[str(smooth.name)] = name, divisor
    return changed


def replace(edit: Edit, node: oir.Node, index: int, array: np.ndarray) -> None:
    """Give a node another constant."""
    old = node.inputs[index]
    assert old is not None
    node.replace_input_with(index, edit.constant(np.asarray(array, np.float32), f"{old.name}.scaled"))
    edit.discard(old)


def _by_channel(one: Product) -> np.ndarray:
    if one.node.op_type != "Conv":
        return one.matrix().T[None, :, :, None]
    array, group = one.array(), one.node.attributes.get_int("group", 1)
    return array.reshape(group, len(array) // group, array.shape[1], -1).transpose(0, 2, 1, 3)


def _multiplied(node: oir.Node, factor: np.ndarray) -> np.ndarray:
    one = product(node)  # anew: the weights may have been divided since
    assert one is not None
    array = one.array()
    if one.node.op_type != "Conv":
        return np.asarray(array * (factor[:, None] if one.channels == 1 else factor[None, :]))
    group = one.node.attributes.get_int("group", 1)
    along = np.repeat(factor.reshape(group, -1), len(array) // group, 0)
    return np.asarray(array * along.reshape(*along.shape, *[1] * (array.ndim - 2)))


def _absorbs(value: oir.Value, axis: int) -> bool:
    """Tell whether what makes ``value`` can divide it; nobody else may read what lies between."""
    node = value.producer()
    if node is None or node.domain != "" or len(node.outputs) != 1:
        return False
    if node.op_type in ("Relu", "LeakyRelu"):
        return _own(node.inputs[0]) and _absorbs(_first(node), axis)
    if node.op_type in ("Add", "Mul"):
        other, array = _with_constant(node)
        if other is None or array is None or not _same_channels(other, value, axis):
            return False
        return node.op_type == "Mul" or (_own(other) and _absorbs(other, axis))
    if node.op_type == "LayerNormalization":
        arrays = [constant(v) for v in node.inputs[1:] if v is not None]
        return axis == -1 and bool(arrays) and all(a is not None and a.ndim == 1 for a in arrays)
    one = product(node)
    return one is not None and (axis == 1) == (node.op_type == "Conv")


def _divide(edit: Edit, value: oir.Value, axis: int, factor: np.ndarray) -> None:
    """Let what makes ``value`` divide it, where ``_absorbs`` says that it can."""
    node = value.producer()
    assert node is not None
    if node.op_type in ("Relu", "LeakyRelu"):
        _divide(edit, _first(node), axis, factor)
    elif node.op_type in ("Add", "Mul"):
        other, array = _with_constant(node)
        assert other is not None and array is not None
        replace(edit, node, 1 - list(node.inputs).index(other), array / _spread(factor, value, axis))
        if node.op_type == "Add":
            _divide(edit, other, axis, factor)
    elif node.op_type == "LayerNormalization":
        for index, given in enumerate(node.inputs):
            array = constant(given)
            if index and array is not None:
                replace(edit, node, index, array / factor)
    else:
        one = product(node)
        assert one is not None
        tail = [-1 if a == one.channels else 1 for a in range(one.array().ndim)]
        replace(edit, node, 1, one.array() / factor.reshape(tail))
        bias = constant(one.bias)
        if bias is not None:
            replace(edit, node, 2, bias / factor)


def _with_constant(node: oir.Node) -> tuple[oir.Value | None, np.ndarray | None]:
    for other, fixed in commuted(node):
        array = constant(fixed)
        if array is not None:
            return other, array
    return None, None


def _same_channels(one: oir.Value, other: oir.Value, axis: int) -> bool:
    a, b = one.shape, other.shape
    return a is not None and b is not None and len(a) == len(b) and isinstance(a[axis], int) and a[axis] == b[axis]


def _own(value: oir.Value | None) -> bool:
    return value is not None and used_once(value)


def _first(node: oir.Node) -> oir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _spread(factor: np.ndarray, value: oir.Value, axis: int) -> np.ndarray:
    """Return the factors in a shape that stands for the channels of ``value``."""
    if axis == -1:
        return factor
    assert value.shape is not None
    return factor.reshape(-1, *[1] * (len(value.shape) - 2))
