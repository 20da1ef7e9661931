"""1x1 convolutions move before what enlarges images, and into products before them.

A 1x1 convolution mixes channels at each pixel, a Resize mixes pixels in each channel: both are linear, so their order
is free, and the small image has fewer pixels to convolve. A convolution of joined channels is the sum of those of its
parts, so parts that were enlarged get their own. What then follows a product with constant weights (a MatMul of
flattened pixels, or another 1x1 convolution) is one product. Heads that join several scales gain most of their time
(Xie et al., "SegFormer", 2021, section 3.2, has such a head).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as oir

from optc.passes.fuse.bias import bias_of, copied
from optc.passes.fuse.fold_batch_norm import copy_pays
from optc.passes.fuse.pattern import along, integer, integers, leak, text
from optc.passes.match import commuted, constant, input_or_none, producer, rank, same_dim, static_shape
from optc.passes.rewrite import Miss, Ops, Outcome, Rewrite, RewritePass, rule

_ELEMENT = 32
"""Multiply-adds that take as long as reading and writing an element of an image."""
_FIXED = "tf_crop_and_resize"
"""The one way to resize that is not linear: it may fill in a constant."""


@dataclass(frozen=True)
class _Part:
    """A part of the joined channels: ``source`` is the small image if ``resize`` enlarges it by ``ratio`` pixels."""

    value: oir.Value
    channels: int
    resize: oir.Node | None = None
    source: oir.Value | None = None
    ratio: float = 1.0


def _is_pointwise(node: oir.Node) -> bool:
    """Tell whether a Conv mixes the channels of each pixel and does nothing else."""
    weight = constant(node.inputs[1])
    if weight is None or prod(weight.shape[2:]) != 1 or integer(node, "group", 1) != 1:
        return False
    plain = text(node, "auto_pad", "NOTSET") in ("NOTSET", "VALID") and not any(integers(node, "pads"))
    return plain and set(integers(node, "strides") or (1,)) == {1}


def _part(value: oir.Value) -> _Part | None:
    """Return what is known of a part; None if its number of channels is not."""
    dims = value.shape
    if dims is None or not isinstance(dims[1], int):
        return None
    whole, resize = _Part(value, dims[1]), producer(value, "Resize")
    source = resize.inputs[0] if resize is not None else None
    if resize is None or source is None or source.shape is None:
        return whole
    ratio = _ratio(resize, source)
    same = all(same_dim(source.shape[axis], dims[axis]) for axis in (0, 1))
    if ratio is None or ratio <= 1.0 or not same or text(resize, "coordinate_transformation_mode", "") == _FIXED:
        return whole
    return _Part(value, dims[1], resize, source, ratio)


def _ratio(resize: oir.Node, source: oir.Value) -> float | None:
    """Return how many times as many pixels a Resize makes, None where only a run knows."""
    before, after = static_shape(source), static_shape(resize.outputs[0])
    if before is not None and after is not None:
        return prod(after[2:]) / prod(before[2:]) if prod(before[2:]) else None
    scales = constant(input_or_none(resize, 2))
    return float(np.prod(scales.astype(np.float64))) if scales is not None and scales.size else None


def _pays(parts: Sequence[_Part], maps: int, joined: bool) -> bool:
    """Tell whether convolving before resizing takes less: counted for a pixel of the large image."""
    saved = sum(maps * p.channels * (1 - 1 / p.ratio) for p in parts)
    enlarged = [p for p in parts if p.resize is not None]
    moved = sum(maps - p.channels for p in enlarged) + maps * (len(enlarged) - (len(enlarged) == len(parts)))
    return saved > _ELEMENT * (moved - (sum(p.channels for p in parts) if joined else 0))


@rule("Conv1x1(Concat(Resize(x),y)) => Resize(Conv1x1(x))+Conv1x1(y)", "Conv")
def pointwise_before_resize(node: oir.Node, ops: Ops) -> Outcome:
    """Convolve small images before they are enlarged, each part of the joined channels for itself."""
    weight = constant(node.inputs[1])
    if weight is None or node.inputs[0] is None or not _is_pointwise(node):
        return None
    concat = producer(node.inputs[0], "Concat")
    if concat is not None and integer(concat, "axis", 0) % weight.ndim != 1:
        return None
    found = [_part(v) if v is not None else None for v in (concat.inputs if concat is not None else node.inputs[:1])]
    parts = [part for part in found if part is not None]
    if len(parts) < len(found) or not any(part.resize for part in parts):
        return None
    bias = bias_of(node, len(weight))
    if bias is None:
        return Miss("the bias is not constant")
    if not _pays(parts, len(weight), concat is not None):
        return Miss("the large image has too few channels for what resizing more of them takes")
    if node.inputs[1] is not None and (miss := copy_pays(node.inputs[1], node.outputs[0])) is not None:
        return miss
    if (reason := leak(node, *(part.source or part.value for part in parts))) is not None:
        return Miss(reason)
    if any(part.resize is not None and _resized(part.resize, None, len(weight)) is None for part in parts):
        return Miss("the sizes of a Resize are not constant")
    starts = np.cumsum([0, *(part.channels for part in parts)])
    columns = [weight[:, start : start + part.channels] for start, part in zip(starts[:-1], parts, strict=True)]
    terms: list[oir.Value] = []
    whole = [i for i, part in enumerate(parts) if part.resize is None]
    if whole:
        x = parts[whole[0]].value
        if len(whole) > 1:
            x = ops("Concat", *(parts[i].value for i in whole), axis=1)
        inputs = [x, ops.constant(np.concatenate([columns[i] for i in whole], axis=1), "weight")]
        terms.append(copied(ops, node, *inputs, *node.inputs[2:]))
    for part, slab in zip(parts, columns, strict=True):
        if part.resize is not None:
            small = copied(ops, node, part.source, ops.constant(slab, "weight"))
            sizes = _resized(part.resize, ops, len(weight))
            assert sizes is not None
            terms.append(copied(ops, part.resize, small, *sizes))
    total = terms[0]
    for term in terms[1:]:
        total = ops("Add", total, term)
    if not whole and bias.any():
        shift = bias.astype(weight.dtype).reshape(-1, *[1] * (weight.ndim - 2))
        total = ops("Add", total, ops.constant(shift, "bias"))
    return Rewrite([total])


def _resized(resize: oir.Node, ops: Ops | None, maps: int) -> list[oir.Value | None] | None:
    """Return the inputs of a Resize behind the image, for one of ``maps`` channels; None if they cannot be told."""
    rest: list[oir.Value | None] = list(resize.inputs[1:])
    if len(rest) < 3 or rest[2] is None or "axes" in resize.attributes:
        axes = integers(resize, "axes")
        dims = rank(resize.inputs[0]) or 0
        return rest if not axes or 1 not in [a % dims for a in axes] else None
    sizes = constant(rest[2])
    if sizes is None:
        return None
    if ops is not None:
        changed = sizes.copy()
        changed[1] = maps
        rest[2] = ops.constant(changed, "sizes")
    return rest


@rule("Conv1x1(MatMul(x,w)+b) => MatMul(x,w*v)+b*v", "Conv")
def pointwise_after_product(node: oir.Node, ops: Ops) -> Outcome:
    """Multiply the weights of a 1x1 convolution with those of the product of flattened pixels before it."""
    weight = constant(node.inputs[1])
    reshape = producer(node.inputs[0], "Reshape")
    turn = producer(reshape.inputs[0], "Transpose") if reshape is not None else None
    if weight is None or reshape is None or turn is None or not _is_pointwise(node):
        return None
    flat, image = reshape.inputs[0], reshape.outputs[0]
    if flat is None or flat.shape is None or image.shape is None or len(flat.shape) != 3:
        return None
    kept = same_dim(flat.shape[0], image.shape[0]) and same_dim(flat.shape[1], image.shape[1])
    if not kept or tuple(integers(turn, "perm")) != (0, 2, 1):
        return None
    value, shift = turn.inputs[0], None
    addition = producer(value, "Add")
    for product_value, other in commuted(addition) if addition is not None else ():
        if producer(product_value, "MatMul") is not None and (array := constant(other)) is not None:
            value, shift = product_value, array
    matmul = producer(value, "MatMul")
    matrix = constant(matmul.inputs[1]) if matmul is not None else None
    bias = bias_of(node, len(weight))
    if matmul is None or matrix is None or matrix.ndim != 2 or value is None or flat.shape[1] != matrix.shape[1]:
        return None
    vector = None if shift is None else along(shift, 3, 2, matrix.shape[1])
    if shift is not None and vector is None:
        return Miss(f"a bias of shape {shift.shape} is not one per channel")
    if bias is None:
        return Miss("the bias is not constant")
    sizes = constant(reshape.inputs[1])
    if sizes is None:
        return Miss("the sizes of the image are not constant")
    depth, channels, maps = *matrix.shape, len(weight)
    if depth * maps > depth * channels + channels * maps:
        return Miss(f"one product of {depth} by {maps} takes more than two over {channels} channels")
    if node.inputs[1] is not None and (miss := copy_pays(node.inputs[1], node.outputs[0])) is not None:
        return miss
    if (reason := leak(node, matmul.inputs[0])) is not None:
        return Miss(reason)
    mixed = weight.reshape(maps, channels).T.astype(np.float64)
    folded = ops.constant((matrix.astype(np.float64) @ mixed).astype(matrix.dtype), "weight")
    result = ops("MatMul", matmul.inputs[0], folded)
    total = bias if vector is None else bias + vector @ mixed
    if vector is not None or bias.any():
        result = ops("Add", result, ops.constant(total.astype(matrix.dtype), "bias"))
    changed = sizes.copy()
    changed[1] = maps
    turned = ops("Transpose", result, perm=[0, 2, 1])
    return Rewrite([copied(ops, reshape, turned, ops.constant(changed, "sizes"))])


@rule("Conv1x1(Conv1x1(x,w,b),v,c) => Conv1x1(x,v*w,v*b+c)", "Conv")
def pointwise_after_pointwise(node: oir.Node, ops: Ops) -> Outcome:
    """Multiply the weights of two 1x1 convolutions."""
    weight, first = constant(node.inputs[1]), producer(node.inputs[0], "Conv")
    matrix = constant(first.inputs[1]) if first is not None else None
    if weight is None or first is None or matrix is None or not _is_pointwise(node) or not _is_pointwise(first):
        return None
    shift, bias = bias_of(first, len(matrix)), bias_of(node, len(weight))
    if shift is None or bias is None:
        return Miss("a bias is not constant")
    channels, depth, maps = len(matrix), matrix.shape[1], len(weight)
    if depth * maps > depth * channels + channels * maps:
        return Miss(f"one product of {depth} by {maps} takes more than two over {channels} channels")
    if node.inputs[1] is not None and (miss := copy_pays(node.inputs[1], node.outputs[0])) is not None:
        return miss
    if (reason := leak(node, first.inputs[0])) is not None:
        return Miss(reason)
    mixed = weight.reshape(maps, channels).astype(np.float64)
    folded = (mixed @ matrix.reshape(channels, depth).astype(np.float64)).reshape(maps, depth, *weight.shape[2:])
    inputs = [first.inputs[0], ops.constant(folded.astype(weight.dtype), "weight")]
    if len(first.inputs) > 2 or len(node.inputs) > 2:
        inputs.append(ops.constant((mixed @ shift + bias).astype(weight.dtype), "bias"))
    return Rewrite([copied(ops, node, *inputs)])


def pointwise_pass() -> RewritePass:
    """Return the pass that convolves single pixels where there are fewer of them."""
    return RewritePass("pointwise", [pointwise_before_resize, pointwise_after_product, pointwise_after_pointwise])
