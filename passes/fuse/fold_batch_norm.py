"""Batch normalization and constant scales around Conv, ConvTranspose, Gemm and MatMul fold into the weights.

New weights are computed in float64 and rounded once. Weights that another node reads too are copied only
where that pays: where the copy is not larger than the activation whose extra pass it saves.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from optc.passes.fuse.bias import bias_of, copied, output_channels, widened
from optc.passes.fuse.pattern import along, integer, integers, is_float, leak, number, text
from optc.passes.match import commuted, constant, producer, rank, static_shape
from optc.passes.rewrite import Miss, Ops, Outcome, Rewrite, RewritePass, rule


def _inference_affine(node: oir.Node) -> tuple[np.ndarray, np.ndarray] | Miss:
    """Return ``(scale, shift)`` of an inference BatchNormalization in float64."""
    if integer(node, "training_mode", 0) or len(node.outputs) != 1:
        return Miss("batch normalization in training mode")
    parts = [constant(v) for v in node.inputs[1:5]]
    arrays = [part.astype(np.float64) for part in parts if part is not None]
    if len(arrays) != 4:
        return Miss("scale, bias, mean or variance is not constant")
    gamma, beta, mean, variance = arrays
    scale = gamma / np.sqrt(variance + number(node, "epsilon", 1e-5))
    return scale, beta - mean * scale


def copy_pays(weight: oir.Value, output: oir.Value) -> Miss | None:
    """Return a Miss if ``weight`` is shared and a copy is larger than ``output``, or that size is unknown."""
    if len(weight.uses()) == 1:
        return None
    shape, tensor = static_shape(output), weight.const_value
    if shape is None or tensor is None or tensor.size > int(np.prod(shape)):
        return Miss(f"the weight '{weight.name}' is shared and its copy would outweigh the saved work")
    return None


def _scaled_channels(conv: oir.Node, weight: np.ndarray, scale: np.ndarray, *, of_output: bool) -> np.ndarray:
    """Scale channels of a Conv weight [O, I/g, ...] or a ConvTranspose weight [I, O/g, ...]."""
    spatial = [1] * (weight.ndim - 2)
    if of_output == (conv.op_type == "Conv"):
        scaled: np.ndarray = weight * scale.reshape(-1, 1, *spatial)
        return scaled
    group = integer(conv, "group", 1)
    grouped = weight.reshape(group, -1, *weight.shape[1:])
    scaled = grouped * scale.reshape(group, 1, -1, *spatial)
    return scaled.reshape(weight.shape)


def _after_conv(node: oir.Node, conv: oir.Node, ops: Ops, scale: np.ndarray, shift: np.ndarray | None) -> Outcome:
    """Build ``conv`` with ``scale`` and ``shift`` of its output channels folded in, in place of ``node``."""
    value, weight = conv.inputs[1], constant(conv.inputs[1])
    bias = bias_of(conv, len(scale))
    if value is None or weight is None or bias is None:
        return Miss("the weight or the bias is not constant")
    if (reason := leak(node, conv.inputs[0])) is not None:
        return Miss(reason)
    if (miss := copy_pays(value, node.outputs[0])) is not None:
        return miss
    folded = _scaled_channels(conv, weight.astype(np.float64), scale, of_output=True).astype(weight.dtype)
    inputs = [conv.inputs[0], ops.constant(folded, "weight")]
    total = bias * scale + (shift if shift is not None else 0.0)
    if shift is not None or len(conv.inputs) > 2:
        inputs.append(ops.constant(total.astype(weight.dtype), "bias"))
    return Rewrite([copied(ops, conv, *inputs)])


@rule("BatchNormalization(Conv(x,w,b)) => Conv(x,w',b')", "BatchNormalization")
def batch_norm_after_conv(node: oir.Node, ops: Ops) -> Outcome:
    """Fold an inference batch normalization into the Conv or ConvTranspose before it."""
    conv = producer(node.inputs[0], "Conv", "ConvTranspose")
    if conv is None:
        return None
    found = _inference_affine(node)
    return found if isinstance(found, Miss) else _after_conv(node, conv, ops, *found)


@rule("BatchNormalization(Gemm(x,w,c)) => Gemm(x,w',c')", "BatchNormalization")
def batch_norm_after_gemm(node: oir.Node, ops: Ops) -> Outcome:
    """Fold an inference batch normalization into the Gemm before it."""
    gemm = producer(node.inputs[0], "Gemm")
    if gemm is None:
        return None
    found = _inference_affine(node)
    return found if isinstance(found, Miss) else _after_gemm(node, gemm, ops, *found)


@rule("BatchNormalization(x) => x*s+t", "BatchNormalization")
def batch_norm_alone(node: oir.Node, ops: Ops) -> Outcome:
    """Turn a batch normalization that found no host into one multiplication and one addition."""
    found = _inference_affine(node)
    if isinstance(found, Miss):
        return found
    x, dims = node.inputs[0], rank(node.inputs[0])
    if x is None or dims is None or dims < 2 or x.dtype is None:
        return Miss("the rank of the input is not known")
    scale, shift = (a.astype(x.dtype.numpy()).reshape(-1, *[1] * (dims - 2)) for a in found)
    product = ops("Mul", x, ops.constant(scale, "scale"), like=node.outputs[0])
    return Rewrite([ops("Add", product, ops.constant(shift, "shift"))])


@rule("Conv(x,w,b), a pixel of a channel each => x*w+b", "Conv")
def conv_of_single_values(node: oir.Node, ops: Ops) -> Outcome:
    """A convolution that sums nothing, as reparametrized branches leave it, is a scale and a shift of its channels."""
    x, weight = node.inputs[0], constant(node.inputs[1])
    if x is None or weight is None or len(weight) != weight.size or integer(node, "group", 1) != len(weight):
        return None
    if any(integers(node, "pads")) or set(integers(node, "strides") or (1,)) != {1}:
        return Miss("it pads, or leaves pixels out")
    bias = bias_of(node, len(weight))
    if bias is None:
        return Miss("the bias is not constant")
    spatial = [1] * (weight.ndim - 2)
    product = ops("Mul", x, ops.constant(weight.reshape(-1, *spatial), "scale"), like=node.outputs[0])
    if not bias.any():
        return Rewrite([product])
    return Rewrite([ops("Add", product, ops.constant(bias.astype(weight.dtype).reshape(-1, *spatial), "shift"))])


def _factor(node: oir.Node) -> tuple[oir.Value, np.ndarray] | None:
    """Return ``(value, factor)`` of a multiplication by, or division by, a constant."""
    if node.op_type == "Div":
        divisor = constant(node.inputs[1])
        if node.inputs[0] is None or divisor is None or not is_float(node.inputs[0]) or (divisor == 0).any():
            return None
        return node.inputs[0], 1.0 / divisor.astype(np.float64)
    for value, other in commuted(node):
        factor = constant(other)
        if value is not None and factor is not None and is_float(value) and constant(value) is None:
            return value, factor.astype(np.float64)
    return None


@rule("Conv(x,w,b)*s => Conv(x,w*s,b*s)", "Mul", "Div")
def scale_after_conv(node: oir.Node, ops: Ops) -> Outcome:
    """Fold a multiplication (or division) by a constant per channel into the convolution before it."""
    found = _factor(node)
    conv = producer(found[0], "Conv", "ConvTranspose") if found is not None else None
    if found is None or conv is None:
        return None
    value, factor = found
    channels, dims = output_channels(conv), rank(value)
    scale = along(factor, dims, 1, channels) if channels is not None and dims is not None else None
    if scale is None:
        return Miss(f"a factor of shape {factor.shape} is not one per output channel")
    return _after_conv(node, conv, ops, scale, None)


def _after_gemm(node: oir.Node, gemm: oir.Node, ops: Ops, scale: np.ndarray, shift: np.ndarray | None) -> Outcome:
    """Build ``gemm`` with ``scale`` and ``shift`` of its output columns folded in, in place of ``node``."""
    value, weight = gemm.inputs[1], constant(gemm.inputs[1])
    bias_value = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    bias = constant(bias_value)
    if value is None or weight is None or (bias_value is not None and bias is None):
        return Miss("the weight or the bias is not constant")
    if (reason := leak(node, gemm.inputs[0])) is not None:
        return Miss(reason)
    if (miss := copy_pays(value, node.outputs[0])) is not None:
        return miss
    columns = scale.reshape(-1, 1) if integer(gemm, "transB", 0) else scale
    inputs = [
        gemm.inputs[0],
        ops.constant((weight.astype(np.float64) * columns).astype(weight.dtype), "weight"),
    ]
    if bias is not None or shift is not None:
        base = np.zeros(1) if bias is None else bias.astype(np.float64) * number(gemm, "beta", 1.0)
        total = base * scale + (shift if shift is not None else 0.0)
        inputs.append(ops.constant(total.astype(weight.dtype), "bias"))
    return Rewrite([copied(ops, gemm, *inputs, beta=1.0)])


@rule("Gemm(x,w,c)*s => Gemm(x,w*s,c*s)", "Mul", "Div")
def scale_after_gemm(node: oir.Node, ops: Ops) -> Outcome:
    """Fold a multiplication by a constant per column into the Gemm before it."""
    found = _factor(node)
    gemm = producer(found[0], "Gemm") if found is not None else None
    weight = constant(gemm.inputs[1]) if gemm is not None else None
    if found is None or gemm is None:
        return None
    if weight is None:
        return Miss("the weight is not constant")
    scale = along(found[1], 2, 1, weight.shape[0 if integer(gemm, "transB", 0) else 1])
    if scale is None:
        return Miss(f"a factor of shape {found[1].shape} is not one per column")
    return _after_gemm(node, gemm, ops, scale, None)


@rule("(MatMul(x,w)+c)*s => MatMul(x,w*s)+c*s", "Mul", "Div")
def scale_after_matmul(node: oir.Node, ops: Ops) -> Outcome:
    """Fold a multiplication by a constant per column into the MatMul before it, through a constant bias."""
    found = _factor(node)
    if found is None:
        return None
    value, factor = found
    bias: np.ndarray | None = None
    addition = producer(value, "Add")
    if addition is not None:
        product_value, bias_value = next(
            ((v, c) for v, c in commuted(addition) if producer(v, "MatMul") is not None), (None, None)
        )
        bias = constant(bias_value)
        if product_value is None or bias is None:
            return None
        value = product_value
    matmul = producer(value, "MatMul")
    weight = constant(matmul.inputs[1]) if matmul is not None else None
    if matmul is None or weight is None or matmul.inputs[1] is None or weight.ndim != 2:
        return None
    dims, columns = rank(node.outputs[0]), weight.shape[1]
    scale = along(factor, dims, dims - 1, columns) if dims is not None else None
    if scale is None:
        return Miss(f"a factor of shape {factor.shape} is not one per column")
    if bias is not None and (bias.size not in (1, columns) or bias.shape[-1:] not in ((1,), (columns,), ())):
        return Miss(f"a bias of shape {bias.shape} is not one per column")
    if (miss := widened(node, value)) is not None:
        return miss
    if (reason := leak(node, matmul.inputs[0])) is not None:
        return Miss(reason)
    if (miss := copy_pays(matmul.inputs[1], node.outputs[0])) is not None:
        return miss
    folded = ops.constant((weight.astype(np.float64) * scale).astype(weight.dtype), "weight")
    product = ops("MatMul", matmul.inputs[0], folded, like=node.outputs[0])
    if bias is None:
        return Rewrite([product])
    shifted = ops.constant((bias.astype(np.float64).reshape(-1) * scale).astype(weight.dtype), "bias")
    return Rewrite([ops("Add", product, shifted)])


@rule("Conv(x*s,w,b) => Conv(x,w*s,b)", "Conv", "ConvTranspose")
def scale_before_conv(node: oir.Node, ops: Ops) -> Outcome:
    """Fold a multiplication of the input channels; padding does not mind, since ``0 * s = 0``."""
    before = producer(node.inputs[0], "Mul", "Div")
    found = _factor(before) if before is not None else None
    value, weight = node.inputs[1], constant(node.inputs[1])
    if found is None or before is None:
        return None
    if value is None or weight is None:
        return Miss("the weight is not constant")
    x, factor = found
    if (miss := widened(before, x)) is not None:
        return miss
    channels = weight.shape[0] if node.op_type == "ConvTranspose" else weight.shape[1] * integer(node, "group", 1)
    scale = along(factor, weight.ndim, 1, channels)
    if scale is None:
        return Miss(f"a factor of shape {factor.shape} is not one per input channel")
    if (reason := leak(node, x)) is not None:
        return Miss(reason)
    if (miss := copy_pays(value, before.outputs[0])) is not None:
        return miss
    folded = _scaled_channels(node, weight.astype(np.float64), scale, of_output=False).astype(weight.dtype)
    return Rewrite([copied(ops, node, x, ops.constant(folded, "weight"), *node.inputs[2:])])


@rule("Conv(x+t,w,b) => Conv(x,w,b+w*t), no padding", "Conv")
def shift_before_conv(node: oir.Node, ops: Ops) -> Outcome:
    """Fold an addition to the input channels into the bias; padding would have to be shifted too."""
    before = producer(node.inputs[0], "Add", "Sub")
    pairs = () if before is None else commuted(before) if before.op_type == "Add" else (tuple(before.inputs),)
    found = next(((v, c) for v, other in pairs if v is not None and (c := constant(other)) is not None), None)
    if found is None or before is None or not is_float(found[0]):
        return None
    x, shift = found
    weight, group = constant(node.inputs[1]), integer(node, "group", 1)
    bias = bias_of(node, len(weight)) if weight is not None else None
    if weight is None or bias is None:
        return Miss("the weight or the bias is not constant")
    if any(integers(node, "pads")) or text(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return Miss("the convolution pads with zeros, which the addition does not reach")
    if (miss := widened(before, x)) is not None:
        return miss
    vector = along(shift, weight.ndim, 1, weight.shape[1] * group)
    if vector is None:
        return Miss(f"a constant of shape {shift.shape} is not one per input channel")
    if (reason := leak(node, x)) is not None:
        return Miss(reason)
    kernels = weight.astype(np.float64).reshape(group, len(weight) // group, weight.shape[1], -1)
    extra = np.einsum("goik,gi->go", kernels, vector.reshape(group, -1)).reshape(-1)
    total = bias + (extra if before.op_type == "Add" else -extra)
    return Rewrite([copied(ops, node, x, node.inputs[1], ops.constant(total.astype(weight.dtype), "bias"))])


@rule("Conv(x*s+t,w,b) => Conv(x+t/s,w*s,b)", "Conv", "ConvTranspose")
def affine_before_conv(node: oir.Node, ops: Ops) -> Outcome:
    """Fold the scale where padding keeps the shift out of the bias: one operation on the activation less."""
    addition = producer(node.inputs[0], "Add")
    for value, other in commuted(addition) if addition is not None else ():
        before, shift = producer(value, "Mul"), constant(other)
        found = _factor(before) if before is not None else None
        weight = constant(node.inputs[1])
        if found is None or shift is None or before is None or addition is None:
            continue
        if weight is None or node.inputs[1] is None:
            return Miss("the weight is not constant")
        x, factor = found
        if (miss := widened(addition, x)) is not None:
            return miss
        per_group = node.op_type == "Conv"
        channels = weight.shape[1] * integer(node, "group", 1) if per_group else weight.shape[0]
        scale = along(factor, weight.ndim, 1, channels)
        vector = along(shift, weight.ndim, 1, channels)
        if scale is None or vector is None or (scale == 0.0).any():
            return Miss(f"{factor.shape} and {shift.shape} are not one per input channel, or a factor is zero")
        if (reason := leak(node, x)) is not None:
            return Miss(reason)
        if (miss := copy_pays(node.inputs[1], before.outputs[0])) is not None:
            return miss
        folded = _scaled_channels(node, weight.astype(np.float64), scale, of_output=False)
        moved = (vector / scale).astype(shift.dtype).reshape(-1, *[1] * (weight.ndim - 2))
        shifted = ops("Add", x, ops.constant(moved, "shift"), like=x)
        weights = ops.constant(folded.astype(weight.dtype), "weight")
        return Rewrite([copied(ops, node, shifted, weights, *node.inputs[2:])])
    return None


@rule("MatMul(x*s,w) => MatMul(x,s*w)", "MatMul", "Gemm")
def scale_before_matmul(node: oir.Node, ops: Ops) -> Outcome:
    """Fold a multiplication of the inner dimension into the rows of a constant matrix."""
    before = producer(node.inputs[0], "Mul", "Div")
    found = _factor(before) if before is not None else None
    value, weight = node.inputs[1], constant(node.inputs[1])
    if found is None or before is None or integer(node, "transA", 0):
        return None
    if value is None or weight is None or weight.ndim != 2:
        return None
    x, factor = found
    dims, transposed = rank(x), integer(node, "transB", 0)
    if dims is None or (miss := widened(before, x)) is not None:
        return Miss(f"the constant widens shape {x.shape}")
    scale = along(factor, dims, dims - 1, weight.shape[1 if transposed else 0])
    if scale is None:
        return Miss(f"a factor of shape {factor.shape} is not one per inner index")
    if (reason := leak(node, x, *node.inputs[2:])) is not None:
        return Miss(reason)
    if (miss := copy_pays(value, before.outputs[0])) is not None:
        return miss
    rows = scale if transposed else scale.reshape(-1, 1)
    folded = ops.constant((weight.astype(np.float64) * rows).astype(weight.dtype), "weight")
    return Rewrite([copied(ops, node, x, folded, *node.inputs[2:])])


def fold_batch_norm_pass() -> RewritePass:
    """Return the pass that folds batch normalization and scales into weights."""
    rules = [
        conv_of_single_values,
        batch_norm_after_conv,
        batch_norm_after_gemm,
        batch_norm_alone,
        scale_after_conv,
        scale_after_gemm,
        scale_after_matmul,
        scale_before_conv,
        shift_before_conv,
        affine_before_conv,
        scale_before_matmul,
    ]
    return RewritePass("fold-batch-norm", rules)
