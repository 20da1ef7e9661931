"""Operators of com.microsoft on quantized tensors: each is QuantizeLinear(operator(DequantizeLinear(...))).

These are what onnxruntime's quantizers write (``QuantFormat.QOperator``, ``quantize_dynamic``), by the definitions of
its schemas (``docs/ContribOperators.md`` there).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as oir

from optc.frontend.contrib_node import ContribEdit
from optc.frontend.upgrade import AttributeValue, Refused


def _trimmed(*values: oir.Value | None) -> list[oir.Value | None]:
    given = list(values)
    while given[-1] is None:
        given.pop()
    return given


def _real(edit: ContribEdit, first: int, **attributes: AttributeValue) -> oir.Value:
    """Return the numbers that inputs ``first``, its scale and its zero point (they follow it) stand for."""
    inputs = _trimmed(edit.input(first), edit.input(first + 1), edit.optional(first + 2))
    return edit.op("DequantizeLinear", *inputs, **attributes)


def _quantized(edit: ContribEdit, result: oir.Value, scale: int) -> None:
    """Put ``result``, quantized by the scale that is input ``scale`` and the zero point after it, in for the node."""
    edit.replace(edit.op("QuantizeLinear", *_trimmed(result, edit.input(scale), edit.optional(scale + 1))))


def _channels_first(edit: ContribEdit) -> None:
    if edit.node.attributes.get_int("channels_last", 0):
        raise Refused("channels_last is not supported")


def _binary(op_type: str) -> Callable[[ContribEdit], None]:
    def expand(edit: ContribEdit) -> None:
        """QLinear* => Q(op(DQ(A), DQ(B)))."""
        _quantized(edit, edit.op(op_type, _real(edit, 0), _real(edit, 3)), 6)

    return expand


def _unary(op_type: str, *names: str) -> Callable[[ContribEdit], None]:
    def expand(edit: ContribEdit) -> None:
        """QLinear* => Q(op(DQ(X)))."""
        _channels_first(edit)
        _quantized(edit, edit.op(op_type, _real(edit, 0), **edit.kept(*names)), 3)

    return expand


def softmax(edit: ContribEdit) -> None:
    """QLinearSoftmax => Q(Softmax(DQ(X))); before opset 13, all axes from ``axis`` on are one."""
    opset = edit.node.attributes.get_int("opset", 0)
    axis = edit.node.attributes.get_int("axis", -1)
    if opset < 13 and axis not in (-1, edit.rank(0) - 1):
        raise Refused(f"Softmax of opset {opset} over several axes is not supported")
    _quantized(edit, edit.op("Softmax", _real(edit, 0), axis=axis), 3)


def concat(edit: ContribEdit) -> None:
    """QLinearConcat => Q(Concat(DQ(input), ...)); scale and zero point of the result come first."""
    parts = [_real(edit, first) for first in range(2, len(edit.node.inputs), 3)]
    _quantized(edit, edit.op("Concat", *parts, **edit.kept("axis")), 0)


def where(edit: ContribEdit) -> None:
    """QLinearWhere => Q(Where(condition, DQ(X), DQ(Y)))."""
    _quantized(edit, edit.op("Where", edit.input(0), _real(edit, 1), _real(edit, 4)), 7)


def gemm(edit: ContribEdit) -> None:
    """QGemm => Gemm(DQ(A), DQ(B), DQ(C)), quantized where it has a scale; the scale of C is ``alpha a_scale b_scale``.

    B may be quantized by columns.
    """
    attributes = edit.kept("alpha", "transA", "transB")
    columns = 0 if edit.node.attributes.get_int("transB", 0) else 1
    factors = [_real(edit, 0), _real(edit, 3, axis=columns)]
    addend = edit.optional(6)
    if addend is not None:
        scale = edit.op("Mul", edit.input(1), edit.input(4))
        alpha = edit.node.attributes.get_float("alpha", 1.0)
        if alpha != 1.0:
            scale = edit.op("Mul", scale, edit.constant(np.array(alpha, np.float32), "alpha"))
        factors.append(edit.op("Mul", edit.op("Cast", addend, to=oir.DataType.FLOAT.value), scale))
    result = edit.op("Gemm", *factors, **attributes)
    if edit.optional(7) is None:
        edit.replace(result)
    else:
        _quantized(edit, result, 7)


def convolution(edit: ContribEdit) -> None:
    """QLinearConv of channels-first images => QLinearConv of ONNX."""
    _channels_first(edit)
    names = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
    edit.replace(edit.op("QLinearConv", *edit.node.inputs, **edit.kept(*names)))


def matmul_to_float(edit: ContribEdit) -> None:
    """MatMulIntegerToFloat => MatMulInteger(A, B) * (a_scale * b_scale) + bias."""
    factors = [edit.input(0), edit.input(1), edit.optional(4), edit.optional(5)]
    edit.replace(scaled_product(edit, factors, edit.op("Mul", edit.input(2), edit.input(3)), edit.optional(6)))


def dynamic_matmul(edit: ContribEdit) -> None:
    """DynamicQuantizeMatMul => MatMulInteger(DynamicQuantizeLinear(A), B) * (a_scale * b_scale) + bias."""
    a, scale, zero = edit.insert("DynamicQuantizeLinear", [edit.input(0)], 3, {})
    factors = [a, edit.input(1), zero, edit.optional(3)]
    edit.replace(scaled_product(edit, factors, edit.op("Mul", scale, edit.input(2)), edit.optional(4)))


def scaled_product(
    edit: ContribEdit, factors: list[oir.Value | None], scale: oir.Value, bias: oir.Value | None
) -> oir.Value:
    """Return ``MatMulInteger(factors) * scale + bias``; the factors are two matrices and their zero points."""
    total = edit.op("MatMulInteger", *_trimmed(*factors))
    return edit.plus(edit.op("Mul", edit.op("Cast", total, to=oir.DataType.FLOAT.value), scale), bias)


def _same(op_type: str) -> Callable[[ContribEdit], None]:
    def expand(edit: ContribEdit) -> None:
        """The operator of ONNX, for more types."""
        names = tuple(edit.node.attributes)
        edit.replace(edit.op(op_type, *edit.node.inputs, **edit.kept(*names)))

    return expand


_POOL = ("auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides")
OPERATORS: dict[str, Callable[[ContribEdit], None]] = {
    "DequantizeLinear": _same("DequantizeLinear"),
    "DynamicQuantizeMatMul": dynamic_matmul,
    "MatMulIntegerToFloat": matmul_to_float,
    "QGemm": gemm,
    "QLinearAdd": _binary("Add"),
    "QLinearAveragePool": _unary("AveragePool", *_POOL),
    "QLinearConcat": concat,
    "QLinearConv": convolution,
    "QLinearGlobalAveragePool": _unary("GlobalAveragePool"),
    "QLinearLeakyRelu": _unary("LeakyRelu", "alpha"),
    "QLinearMul": _binary("Mul"),
    "QLinearSigmoid": _unary("Sigmoid"),
    "QLinearSoftmax": softmax,
    "QLinearWhere": where,
    "QuantizeLinear": _same("QuantizeLinear"),
}
"""How each operator is expanded, by its name."""
