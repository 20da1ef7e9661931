"""Products, convolutions and activations of com.microsoft, and what its optimizer fuses into them."""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx_ir as oir

from optc.frontend.contrib_node import ContribEdit
from optc.frontend.upgrade import Refused

_CONV = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
_NAMES = {
    "Elu": ("alpha",), "HardSigmoid": ("alpha", "beta"), "HardSwish": (), "LeakyRelu": ("alpha",), "Relu": (),
    "Sigmoid": (), "Softplus": (), "Softsign": (), "Tanh": (), "ThresholdedRelu": ("alpha",),
}  # fmt: skip
"""Activations that are operators of ONNX, with their parameters in order."""


def _gelu(approximate: str) -> Callable[[ContribEdit], None]:
    def expand(edit: ContribEdit) -> None:
        """Gelu, BiasGelu, FastGelu => Gelu(x + bias)."""
        edit.replace(edit.op("Gelu", edit.plus(edit.input(0), edit.optional(1)), approximate=approximate))

    return expand


def quick_gelu(edit: ContribEdit) -> None:
    """QuickGelu => Swish."""
    edit.replace(edit.op("Swish", edit.input(0), alpha=edit.real("alpha", 1.702)))


def bias_split_gelu(edit: ContribEdit) -> None:
    """BiasSplitGelu => left * Gelu(right), the halves of X + bias."""
    whole = edit.plus(edit.input(0), edit.input(1))
    left, right = edit.insert("Split", [whole], 2, {"axis": -1, "num_outputs": 2})
    edit.replace(edit.op("Mul", left, edit.op("Gelu", right, approximate="none")))


def bias_add(edit: ContribEdit) -> None:
    """BiasAdd => X + bias + skip."""
    edit.replace(edit.plus(*(edit.input(index) for index in range(3))))


def matmul(edit: ContribEdit) -> None:
    """FusedMatMul, TransposeMatMul => alpha * MatMul(A^T, B^T); what moves the batch to the front is a Transpose."""
    operands = [_turned(edit, 0, "A"), _turned(edit, 1, "B")]
    product = edit.op("MatMul", *operands)
    alpha = edit.real("alpha", 1.0)
    edit.replace(product if alpha == 1.0 else edit.op("Mul", product, edit.scalar_like(alpha, product, "alpha")))


def _turned(edit: ContribEdit, index: int, side: str) -> oir.Value:
    x = edit.input(index)
    swap, batch = edit.integer(f"trans{side}", 0), edit.integer(f"transBatch{side}", 0)
    if not swap and not batch:
        return x
    rank = len(edit.dims(x))
    if rank == 1:
        return x
    axes = list(range(rank))
    if batch:
        axes = [*axes[1:-1], 0, axes[-1]]
    if swap:
        axes[-2:] = axes[:-3:-1]
    return edit.op("Transpose", x, perm=axes)


def gemm(edit: ContribEdit) -> None:
    """FusedGemm => activation(Gemm)."""
    name = edit.text("activation", "")
    parameters = {
        key: edit.real(f"activation_{key}", 0.0)
        for key in ("alpha", "beta", "gamma")
        if f"activation_{key}" in edit.node.attributes
    }
    x = edit.op("Gemm", *edit.node.inputs, **edit.kept("alpha", "beta", "transA", "transB"))
    edit.replace(_activated(edit, x, name, [parameters[key] for key in sorted(parameters)]))


def convolution(edit: ContribEdit) -> None:
    """FusedConv => activation(Conv + Z)."""
    x = edit.op("Conv", *edit.node.inputs[:3], **edit.kept(*_CONV))
    edit.replace(_after(edit, edit.plus(x, edit.optional(3))))


def convolution_channels_last(edit: ContribEdit) -> None:
    """NhwcConv, NhwcFusedConv => activation(Conv + Z) between transpositions."""
    last = len(edit.dims(edit.input(0))) - 1
    x = _channels_first(edit, edit.input(0), last)
    x = edit.op("Conv", x, *edit.node.inputs[1:3], **edit.kept(*_CONV))
    edit.replace(_after(edit, edit.plus(_channels_last(edit, x, last), edit.optional(3))))


def max_pool_channels_last(edit: ContribEdit) -> None:
    """NhwcMaxPool => MaxPool between transpositions."""
    last = len(edit.dims(edit.input(0))) - 1
    names = ("auto_pad", "ceil_mode", "dilations", "kernel_shape", "pads", "strides")
    x = edit.op("MaxPool", _channels_first(edit, edit.input(0), last), **edit.kept(*names))
    edit.replace(_channels_last(edit, x, last))


def _channels_first(edit: ContribEdit, x: oir.Value, last: int) -> oir.Value:
    return edit.op("Transpose", x, perm=[0, last, *range(1, last)])


def _channels_last(edit: ContribEdit, x: oir.Value, last: int) -> oir.Value:
    return edit.op("Transpose", x, perm=[0, *range(2, last + 1), 1])


def _after(edit: ContribEdit, x: oir.Value) -> oir.Value:
    name = edit.text("activation", "")
    given = edit.node.attributes.get("activation_params")
    return x if not name else _activated(edit, x, name, list(given.as_floats()) if given is not None else [])


def _activated(edit: ContribEdit, x: oir.Value, name: str, parameters: list[float]) -> oir.Value:
    """Return ``name(x)``; ``parameters`` in the order of ONNX's attributes, without defaults."""
    if name == "Clip" and len(parameters) == 2:
        return edit.op("Clip", x, *(edit.scalar_like(limit, x, "limit") for limit in parameters))
    if name not in _NAMES:
        raise Refused(f"the activation {name or '(none)'} is not supported")
    if len(parameters) != len(_NAMES[name]):
        raise Refused(f"{name} has {len(_NAMES[name])} parameters, {len(parameters)} are given")
    if not all(map(math.isfinite, parameters)):
        raise edit.invalid(f"the parameters of {name} are {parameters}")
    return edit.op(name, x, **dict(zip(_NAMES[name], parameters, strict=True)))


OPERATORS: dict[str, Callable[[ContribEdit], None]] = {
    "BiasAdd": bias_add,
    "BiasGelu": _gelu("none"),
    "BiasSplitGelu": bias_split_gelu,
    "FastGelu": _gelu("tanh"),
    "FusedConv": convolution,
    "FusedGemm": gemm,
    "FusedMatMul": matmul,
    "Gelu": _gelu("none"),
    "NhwcConv": convolution_channels_last,
    "NhwcFusedConv": convolution_channels_last,
    "NhwcMaxPool": max_pool_channels_last,
    "QuickGelu": quick_gelu,
    "TransposeMatMul": matmul,
}
"""How each operator is expanded, by its name."""
