"""Channels-last values: which operators keep them, and how.

Convolution computes on ``[N, *S, C]``: a pixel's channels are the row of a matrix product, and vectors run over
channels whatever the image's size. A value is therefore known as ``[N, C, *S]``, as ``[N, *S, C]``, or as both; the
other form is made where somebody asks for it, once. Operators that treat all axes alike, or name the axes they
work on, run on the channels-last form when one of their operands has only that: lowering functions see permuted
shapes and axes through ``LastSite``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as oir

from optc.backends.lowering import emit as emission
from optc.backends.lowering.site import Site

if TYPE_CHECKING:
    from optc.backends.lowering.lower import Lowerer

# fmt: off
_POINTWISE = frozenset([
    "Abs", "Add", "And", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Cast", "CastLike",
    "Ceil", "Celu", "Clip", "Cos", "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater",
    "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu", "Less", "LessOrEqual",
    "Log", "Max", "Mean", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or", "PRelu", "Pow", "Reciprocal", "Relu",
    "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tan", "Tanh",
    "ThresholdedRelu", "Where", "Xor",
])
# fmt: on
_AXIS = frozenset(["Concat", "LogSoftmax", "Softmax", "Split"])
"""Operators with an attribute ``axis`` that treat the other axes alike."""
_PARAMETERS = frozenset(["DequantizeLinear", "QuantizeLinear"])
"""Operators on one tensor, with parameters that are numbers or vectors along the attribute ``axis``."""
_AXES = frozenset(["ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"])
"""Operators that keep the rank and whose constant second input names axes."""


def channels_last(rank: int) -> list[int]:
    """Return the permutation from ``[N, C, *S]`` to ``[N, *S, C]``."""
    return [0, *range(2, rank), 1]


def channels_first(rank: int) -> list[int]:
    """Return the inverse of ``channels_last``."""
    return [0, rank - 1, *range(1, rank - 1)]


def permuted(values: Sequence[Any], order: Sequence[int]) -> list[Any]:
    """Return ``values`` in the given order."""
    return [values[i] for i in order]


def moves_nothing(shape: Sequence[Any], order: Sequence[int]) -> bool:
    """Tell whether transposing a tensor of ``shape`` leaves its elements where they are in memory."""
    moved = [axis for axis in order if not (isinstance(shape[axis], int) and shape[axis] == 1)]
    return moved == sorted(moved)


def site_for(lowerer: Lowerer, node: oir.Node) -> Site:
    """Return what the lowering function of ``node`` sees: permuted if an operand is known channels-last only."""
    ranks = {lowerer.rank(v) for v in node.inputs if v is not None and lowerer.is_last(v)}
    if len(ranks) == 1 and not node.domain:
        (rank,) = ranks
        if rank is not None and _keeps_layout(lowerer, node, rank):
            return LastSite(lowerer, node, rank)
    return Site(lowerer, node)


def _keeps_layout(lowerer: Lowerer, node: oir.Node, rank: int) -> bool:
    first = node.inputs[0]
    if node.op_type in _POINTWISE:
        ranks = [lowerer.rank(v) for v in node.inputs if v is not None]
        return all(r is not None and r <= rank for r in ranks)
    if node.op_type in _AXIS:
        return all(
            v is not None and lowerer.rank(v) == rank for v in node.inputs[: 1 if node.op_type == "Split" else None]
        )
    if node.op_type in _PARAMETERS:
        parameters = [v for v in node.inputs[1:] if v is not None]
        return lowerer.rank(first) == rank and all((lowerer.rank(v) or 0) <= 1 for v in parameters)  # type: ignore[arg-type]
    if node.op_type in _AXES:
        keeps = "keepdims" not in node.attributes or node.attributes["keepdims"].as_int() == 1
        axes = node.inputs[1] if len(node.inputs) > 1 else None
        return keeps and first is not None and (axes is None or lowerer.constant(axes) is not None)
    return False


class LastSite(Site):
    """A node of rank ``rank`` with its shapes and axes permuted to channels-last; lower ranks broadcast."""

    def __init__(self, lowerer: Lowerer, node: oir.Node, rank: int) -> None:
        super().__init__(lowerer, node)
        self.order = channels_last(rank)

    def attr(self, name: str, default: Any = None) -> Any:
        """Return an attribute; ``axis`` counts permuted axes."""
        value = super().attr(name, default)
        if name == "axis" and value is not None:
            return self._axis(value)
        return value

    def _axis(self, axis: int) -> int:
        return self.order.index(axis % len(self.order))

    def shape(self, index: int) -> list[Any]:
        """Return the permuted dimensions of an input; those of lower rank are aligned to the right first."""
        shape = super().shape(index)
        return shape if self._is_parameter(index) or not shape else permuted(self._aligned(shape), self.order)

    def tensor(self, index: int) -> Any:
        """Return an input channels-last."""
        value = self.value(index)
        if self._is_parameter(index):
            return super().tensor(index)
        if self.lowerer.rank(value) == len(self.order):
            return self.lowerer.last(value)
        tensor = super().tensor(index)
        shape = emission.shape_of(tensor)
        return self.lowerer.transpose(self.reshape(tensor, self._aligned(shape)), self.order) if shape else tensor

    def constant(self, index: int) -> Any:
        """Return a constant input, permuted as ``tensor`` is; axes that it names are permuted ones."""
        array = super().constant(index)
        if array is None or not array.ndim:
            return array
        if self._is_parameter(index):
            if self.op not in _AXES:
                return array
            return np.array([self._axis(int(a)) for a in array.reshape(-1)], array.dtype)
        return np.transpose(array.reshape(self._aligned(list(array.shape))), self.order)

    def _is_parameter(self, index: int) -> bool:
        return index > 0 and self.op in (_AXES | _PARAMETERS | {"Split"})

    def _aligned(self, shape: list[Any]) -> list[Any]:
        return [1] * (len(self.order) - len(shape)) + shape
