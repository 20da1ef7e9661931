"""Products of dequantized values become products of integers.

``(a - za) * sa`` times ``(b - zb) * sb``, summed over the depth, is an integer sum times ``sa * sb`` as long as the
scales do not vary along the depth. The sum is exact in int32; what is left of the rounding of the float32 form is
that of one multiplication.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from optc.passes.fuse.bias import attributes_of, copied
from optc.passes.integer.parameters import EIGHT_BITS, Quantized, dequantized, read
from optc.passes.match import constant, input_or_none, int_attribute, rank, static_shape, used_once
from optc.passes.rewrite import Miss, Ops, Outcome, Rewrite, RewritePass, rule

DEEPEST = 1 << 16
"""Products of 8-bit integers that surely fit int32 when added up, whatever their signs."""


def _operands(node: oir.Node) -> tuple[Quantized, Quantized] | Miss | None:
    """Return both factors, None if they are not both dequantized from 8 bits, or what speaks against it."""
    a, b = dequantized(node.inputs[0]), dequantized(node.inputs[1])
    if a is None or b is None or a.x.dtype not in EIGHT_BITS or b.x.dtype not in EIGHT_BITS:
        return None
    return Miss("the scale of the left factor varies") if not a.per_tensor else (a, b)


def _depth_fits(weights: Quantized, axes: slice) -> bool:
    shape = static_shape(weights.x)
    # An open depth is that of activations; no tensor of theirs is as deep as that.
    return shape is None or int(np.prod(shape[axes], dtype=np.int64)) <= DEEPEST // 2


@rule("matmul(dq(a), dq(b)) => dq(matmul_integer(a, b))", "MatMul")
def matmul(node: oir.Node, ops: Ops) -> Outcome:
    """The right factor may have a scale per column."""
    found = _operands(node)
    if found is None or isinstance(found, Miss):
        return found
    a, b = found
    columns, rows = rank(b.x), rank(a.x)
    if columns is None or rows is None:
        return Miss("the rank of a factor is unknown")
    if not b.per_tensor and (columns < 2 or b.axis != columns - 1):
        return Miss("the scale of the right factor varies along the depth or a batch")
    if not _depth_fits(b, slice(-2, -1) if columns > 1 else slice(None)):
        return Miss("the sum may not fit int32")
    total = ops("MatMulInteger", *_factors(ops, a, b, b.x), dtype=oir.DataType.INT32)
    return Rewrite([_scaled(ops, total, a.scale * b.scale, -1)])


@rule("gemm(dq(a), dq(b), c) => dq(matmul_integer(a, b) + c)", "Gemm")
def gemm(node: oir.Node, ops: Ops) -> Outcome:
    """A bias quantized with the product of both scales is added to the integers, any other one to the result."""
    found = _operands(node)
    if found is None or isinstance(found, Miss):
        return found
    a, b = found
    transposed = bool(int_attribute(node, "transB", 0))
    alpha, beta = (node.attributes.get_float(name, 1.0) for name in ("alpha", "beta"))
    if int_attribute(node, "transA", 0) or alpha != 1.0 or beta != 1.0:
        return Miss("alpha, beta or a transposed left factor")
    if not b.per_tensor and b.axis != (0 if transposed else 1):
        return Miss("the scale of the right factor varies along the depth")
    if not _depth_fits(b, slice(1, 2) if transposed else slice(0, 1)):
        return Miss("the sum may not fit int32")
    right, matrix = b.x, constant(b.x)
    if transposed:
        # A transposed copy of a constant replaces it.
        right = ops("Transpose", b.x, perm=(1, 0)) if matrix is None else ops.constant(matrix.T, "transposed")
    total = ops("MatMulInteger", *_factors(ops, a, b, right), dtype=oir.DataType.INT32)
    scale, c = a.scale * b.scale, input_or_none(node, 2)
    if c is None:
        return Rewrite([_scaled(ops, total, scale, -1)])
    bias = _integer_bias(c, scale)
    if bias is not None:
        return Rewrite([_scaled(ops, ops("Add", total, bias, dtype=oir.DataType.INT32), scale, -1)])
    return Rewrite([ops("Add", _scaled(ops, total, scale, -1), c)])


@rule("conv(dq(x), dq(w), c) => dq(conv_integer(x, w) + c)", "Conv")
def conv(node: oir.Node, ops: Ops) -> Outcome:
    """The weights may have a scale per output channel."""
    found = _operands(node)
    if found is None or isinstance(found, Miss):
        return found
    x, w = found
    known = rank(w.x)
    if known is None or (not w.per_tensor and w.axis != 0):
        return Miss("the scale of the weights varies along the depth")
    if not _depth_fits(w, slice(1, None)):
        return Miss("the sum may not fit int32")
    total = ops("ConvInteger", *_factors(ops, x, w, w.x), dtype=oir.DataType.INT32, **attributes_of(node))  # type: ignore[arg-type]
    scale, c = x.scale * w.scale, input_or_none(node, 2)
    if c is None:
        return Rewrite([_scaled(ops, total, scale, 1)])
    along = [1, -1, *[1] * (known - 2)]
    bias = _integer_bias(c, scale)
    array = constant(bias if bias is not None else c)
    if array is None:
        return Miss("the bias is not constant")
    addend = ops.constant(array.reshape(along), "bias")
    if bias is not None:
        return Rewrite([_scaled(ops, ops("Add", total, addend, dtype=oir.DataType.INT32), scale, 1)])
    return Rewrite([ops("Add", _scaled(ops, total, scale, 1), addend)])


def _factors(ops: Ops, a: Quantized, b: Quantized, right: oir.Value) -> list[oir.Value | None]:
    """Return the inputs of an integer product: ``a``, ``right`` quantized as ``b`` is, and the zero points."""
    inputs = [a.x, right, _zero(ops, a), _zero(ops, b)]
    while inputs[-1] is None:
        inputs.pop()
    return inputs


def _zero(ops: Ops, factor: Quantized) -> oir.Value | None:
    """Return the zero point: one number where all are the same, as they are for weights, and none for 0."""
    if not factor.zero.any():
        return None
    same = bool((factor.zero == factor.zero.flat[0]).all())
    return ops.constant(factor.zero.reshape(-1)[0] if same else factor.zero, "zero")


def _integer_bias(c: oir.Value, scale: np.ndarray) -> oir.Value | None:
    """Return the int32 values of a bias whose scale is that of the product and whose zero point is 0."""
    bias = dequantized(c)
    if bias is None or bias.x.dtype != oir.DataType.INT32 or bias.zero.any():
        return None
    sizes = static_shape(bias.x)
    if sizes is None or len(sizes) != 1 or not (bias.scale == scale).all():
        return None
    return bias.x


def _scaled(ops: Ops, total: oir.Value, scale: np.ndarray, axis: int) -> oir.Value:
    """Return ``total * scale``, the scale along ``axis``."""
    single = scale.ndim == 0 or scale.size == 1
    factor = ops.constant(scale.reshape(()) if single else scale, "scale")
    zero = ops.constant(np.zeros(factor.shape.numpy() if factor.shape is not None else (), np.int32), "zero")
    return ops("DequantizeLinear", total, factor, zero, axis=axis)


@rule("q(dq(integers, s), r, z) => q(dq(integers, s / r), 1, z)", "QuantizeLinear")
def requantize(node: oir.Node, ops: Ops) -> Outcome:
    """int32 sums are rescaled by one multiplication: round(float32(sum) * float32(s / r)) + z, to even, saturated."""
    output = read(node)
    value = node.inputs[0]
    if output is None or value is None or not output.per_tensor or node.outputs[0].dtype not in EIGHT_BITS:
        return None
    source = dequantized(value)
    if source is None or source.x.dtype != oir.DataType.INT32 or source.zero.any():
        return None
    if not used_once(value):
        return Miss("the sum is used elsewhere too")
    if output.scale == 1:
        return None
    factor = source.scale / output.scale
    if not np.isfinite(factor).all():
        return Miss("the ratio of the scales is not finite")
    scaled = _scaled(ops, source.x, factor, 1 if source.axis is None else source.axis)
    return Rewrite([copied(ops, node, scaled, ops.constant(np.ones((), np.float32), "one"), output.zero_value)])


def products_pass() -> RewritePass:
    """Return the pass that makes products of dequantized values products of integers."""
    return RewritePass("integer_products", [matmul, gemm, conv, requantize])
