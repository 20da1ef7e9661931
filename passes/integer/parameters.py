"""What QuantizeLinear and DequantizeLinear nodes say: scale, zero point, and along which axis they vary."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from optc.passes.match import constant, input_or_none, int_attribute, producer, rank

EIGHT_BITS = frozenset({oir.DataType.INT8, oir.DataType.UINT8})


@dataclass(frozen=True)
class Quantized:
    """``x`` stands for ``(x - zero) * scale``. ``axis`` is None for one scale; else scales and zeros lie along it."""

    x: oir.Value
    scale: np.ndarray
    zero: np.ndarray
    axis: int | None
    node: oir.Node

    @property
    def zero_value(self) -> oir.Value | None:
        """The zero point as it is in the graph, None where it is left out."""
        return input_or_none(self.node, 2)

    @property
    def per_tensor(self) -> bool:
        """Whether there is a single scale."""
        return self.axis is None

    def same_as(self, other: Quantized) -> bool:
        """Tell whether both use the same integers for the same numbers."""
        types = {_integer_type(self.node), _integer_type(other.node)}
        return (
            len(types) == 1
            and self.axis == other.axis
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero, other.zero)
        )


def _integer_type(node: oir.Node) -> oir.DataType | None:
    value = node.inputs[0] if node.op_type == "DequantizeLinear" else node.outputs[0]
    return value.dtype if value is not None else None


def dequantized(value: oir.Value | None) -> Quantized | None:
    """Return what a float32 ``value`` is made from by a DequantizeLinear with known parameters, or None."""
    node = producer(value, "DequantizeLinear")
    return None if node is None else read(node)


def read(node: oir.Node) -> Quantized | None:
    """Return the parameters of a QuantizeLinear or DequantizeLinear, None unless they are known, float32 and finite.

    Blocked quantization and types of other than 8 or 32 bits are None too. Scales are positive.
    """
    x, integers = node.inputs[0], _integer_type(node)
    scale, zero = constant(input_or_none(node, 1)), constant(input_or_none(node, 2))
    if x is None or scale is None or scale.dtype != np.float32 or int_attribute(node, "block_size", 0):
        return None
    if integers not in EIGHT_BITS and integers != oir.DataType.INT32:
        return None
    if zero is None:
        if input_or_none(node, 2) is not None:
            return None
        zero = np.zeros(scale.shape, integers.numpy())
    if not (np.isfinite(scale).all() and (scale > 0).all()) or zero.size != scale.size:
        return None
    floats = node.outputs[0] if node.op_type == "DequantizeLinear" else x
    if floats.dtype != oir.DataType.FLOAT:
        return None
    if scale.size == 1 and scale.ndim <= 1:
        return Quantized(x, scale.reshape(()), zero.reshape(()), None, node)
    known = rank(x)
    if scale.ndim != 1 or known is None:
        return None
    return Quantized(x, scale, zero, int_attribute(node, "axis", 1) % known, node)
