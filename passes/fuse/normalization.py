"""Layer, RMS, instance and group normalization spelled in elementary operators.

The rules compose: the core (``d / sqrt(var + eps)``) becomes a normalization with scale 1; a product and a
sum that follow become its scale and bias; casts around it become its ``stash_type``.
LayerNormalization-17 (arXiv:1607.06450), RMSNormalization-23 (arXiv:1910.07467), InstanceNormalization-22
(arXiv:1607.08022), GroupNormalization-21 (arXiv:1803.08494).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from optc.passes.fuse.pattern import (
    integer,
    is_float,
    leak,
    number,
    reduced_axes,
    same_shape,
)
from optc.passes.match import commuted, constant, is_scalar, producer, scalar, static_shape, used_once
from optc.passes.rewrite import Miss, Ops, Outcome, Rewrite, RewritePass, rule


@dataclass(frozen=True)
class _Core:
    """``x`` (minus its mean where ``centered``) over its root mean square over ``axes``."""

    x: oir.Value
    axes: tuple[int, ...]
    epsilon: float
    centered: bool


def _mean(value: oir.Value | None) -> tuple[oir.Value, tuple[int, ...]] | None:
    """Return ``(x, axes)`` if ``value`` is ReduceMean(x) with kept dimensions."""
    node = producer(value, "ReduceMean")
    axes = reduced_axes(node) if node is not None and integer(node, "keepdims", 1) else None
    return (node.inputs[0], axes) if node is not None and axes and node.inputs[0] is not None else None


def _centered(value: oir.Value | None) -> tuple[oir.Value, tuple[int, ...]] | None:
    """Return ``(x, axes)`` if ``value`` is ``x - ReduceMean(x)``."""
    node = producer(value, "Sub")
    mean = _mean(node.inputs[1]) if node is not None else None
    return mean if node is not None and mean is not None and mean[0] is node.inputs[0] else None


def _square(value: oir.Value) -> oir.Value | None:
    """Return ``d`` if ``value`` is ``d * d`` or ``d ** 2``; ``(x-m)*(x-m)`` may be computed twice."""
    node = producer(value, "Mul", "Pow")
    if node is None or node.inputs[0] is None:
        return None
    d, other = node.inputs[0], node.inputs[1]
    if node.op_type == "Pow":
        return d if is_scalar(other, 2.0) else None
    twice = d is other or (_centered(d) is not None and _centered(d) == _centered(other))
    return d if twice else None


def _root(value: oir.Value | None, *, inverse: bool) -> oir.Value | None:
    """Return ``v`` if ``value`` is ``sqrt(v)``, or ``1 / sqrt(v)`` with ``inverse``, in any spelling."""
    node = producer(value, "Sqrt", "Pow", "Reciprocal", "Div")
    if node is None:
        return None
    if node.op_type == "Pow":
        return node.inputs[0] if is_scalar(node.inputs[1], -0.5 if inverse else 0.5) else None
    if node.op_type == "Sqrt":
        if not inverse:
            return node.inputs[0]
        flipped = producer(node.inputs[0], "Reciprocal")
        return flipped.inputs[0] if flipped is not None else None
    if inverse and (node.op_type == "Reciprocal" or is_scalar(node.inputs[0], 1.0)):
        return _root(node.inputs[-1], inverse=False)
    return None


def _second_moment(value: oir.Value | None) -> tuple[oir.Value, tuple[int, ...], float] | None:
    """Return ``(d, axes, epsilon)`` if ``value`` is ``ReduceMean(d ** 2) + epsilon``."""
    node = producer(value, "Add")
    for mean, epsilon in commuted(node) if node is not None else ((value, None),):
        found, eps = _mean(mean), scalar(epsilon) if epsilon is not None else 0.0
        d = _square(found[0]) if found is not None else None
        if found is not None and d is not None and eps is not None:
            return d, found[1], eps
    return None


def _core(node: oir.Node) -> _Core | None:
    """Read ``d / sqrt(mean(d ** 2) + eps)`` or the product with the inverse root."""
    pairs = commuted(node) if node.op_type == "Mul" else ((node.inputs[0], node.inputs[1]),)
    for d, root in pairs:
        moment = _second_moment(_root(root, inverse=node.op_type == "Mul"))
        if moment is None or d is None:
            continue
        spread, axes, epsilon = moment
        center = _centered(spread)
        if center is not None and center[1] == axes and _centered(d) == center:
            return _Core(center[0], axes, epsilon, True)
        if spread is d:
            return _Core(d, axes, epsilon, False)
    return None


def _normalized(ops: Ops, core: _Core, scale: oir.Value | None = None, bias: oir.Value | None = None) -> Outcome:
    """Build the operator for ``core``; constants of one and zero stand for a missing scale and bias."""
    x, axes = core.x, core.axes
    assert x.shape is not None and x.dtype is not None
    rank, dtype = len(x.shape), x.dtype.numpy()
    trailing = axes == tuple(range(rank - len(axes), rank))
    sizes = [d for d in x.shape[axes[0] :] if isinstance(d, int)]
    if trailing and len(sizes) == len(axes):
        inputs = [x, scale or ops.constant(np.ones(sizes, dtype), "scale"), *([bias] if bias else [])]
        op_type = "LayerNormalization" if core.centered else "RMSNormalization"
        stash = oir.DataType.DOUBLE if x.dtype == oir.DataType.DOUBLE else oir.DataType.FLOAT
        return Rewrite([ops(op_type, *inputs, axis=axes[0], epsilon=core.epsilon, stash_type=int(stash))])
    channels = x.shape[1] if rank > 2 else None
    if core.centered and axes == tuple(range(2, rank)) and isinstance(channels, int) and scale is None:
        ones, zeros = np.ones(channels, dtype), np.zeros(channels, dtype)
        parts = ops.constant(ones, "scale"), ops.constant(zeros, "bias")
        return Rewrite([ops("InstanceNormalization", x, *parts, epsilon=core.epsilon)])
    if not trailing:
        return Miss(f"axes {list(axes)} are not the last ones of rank {rank}")
    return Miss(f"the size of the normalized dimensions is not known: {x.shape}")


@rule("d/sqrt(mean(d^2)+eps) => LayerNormalization|RMSNormalization", "Div", "Mul")
def normalization(node: oir.Node, ops: Ops) -> Outcome:
    """Fuse the core: layer (or instance) normalization where ``d = x - mean(x)``, else RMS normalization."""
    core = _core(node)
    if core is None or not is_float(core.x) or core.x.shape is None:
        return None
    if (reason := leak(node, core.x)) is not None:
        return Miss(reason)
    return _normalized(ops, core)


@rule("x*r+(beta-mean(x)*r), r=gamma/sqrt(var+eps) => LayerNormalization(x,gamma,beta)", "Add")
def layer_norm_tensorflow(node: oir.Node, ops: Ops) -> Outcome:
    """Fuse the spelling of TensorFlow's ``batch_normalization`` helper, which Keras' layer uses."""
    for scaled, shifted in commuted(node):
        product, rest = producer(scaled, "Mul"), producer(shifted, "Sub")
        if product is None or rest is None:
            continue
        for x, factor in commuted(product):
            core = _tensorflow_core(x, factor, rest)
            if core is None or x is None or x.shape is None or not is_float(x):
                continue
            found, gamma = core
            beta = _parameter(ops, found, rest.inputs[0])
            scale = _parameter(ops, found, gamma) if gamma is not None else None
            if beta is None or (gamma is not None and scale is None):
                return Miss("gamma or beta does not have the shape of the normalized dimensions")
            if (reason := leak(node, found.x, gamma, rest.inputs[0])) is not None:
                return Miss(reason)
            return _normalized(ops, found, scale, beta)
    return None


def _tensorflow_core(
    x: oir.Value | None, factor: oir.Value | None, rest: oir.Node
) -> tuple[_Core, oir.Value | None] | None:
    """Match ``factor = rsqrt(var(x) + eps) [* gamma]`` and ``rest = beta - mean(x) * factor``."""
    minus = producer(rest.inputs[1], "Mul")
    mean = next((_mean(m) for m, f in commuted(minus) if f is factor and _mean(m)), None) if minus else None
    if mean is None or x is None or mean[0] is not x:
        return None
    split = producer(factor, "Mul")
    for root, gamma in ((factor, None), *(commuted(split) if split is not None else ())):
        moment = _second_moment(_root(root, inverse=True))
        if moment is not None and _centered(moment[0]) == mean and moment[1] == mean[1]:
            return _Core(x, mean[1], moment[2], True), gamma
    return None


def _parameter(ops: Ops, core: _Core, value: oir.Value | None) -> oir.Value | None:
    """Return ``value`` in exactly the shape of the normalized dimensions, or None where it has another."""
    assert core.x.shape is not None
    sizes = [d for d in core.x.shape[core.axes[0] :] if isinstance(d, int)]
    array = _shaped(value, sizes, core.x.dtype)
    if array is not None:
        return ops.constant(array, "parameter")
    return value if _is_exact(value, sizes, core.x.dtype) else None


def _is_exact(value: oir.Value | None, sizes: list[int], dtype: oir.DataType | None) -> bool:
    return value is not None and value.dtype == dtype and static_shape(value) == tuple(sizes)


def _shaped(value: oir.Value | None, sizes: list[int], dtype: oir.DataType | None) -> np.ndarray | None:
    """Return the constant ``value`` broadcast to ``sizes``, or None where it is not constant or does not fit."""
    array = constant(value)
    if array is None or value is None or value.dtype != dtype:
        return None
    while array.ndim > len(sizes) and array.shape[0] == 1:
        array = array[0]
    pairs = zip(array.shape[::-1], sizes[::-1], strict=False)
    if array.ndim > len(sizes) or any(n not in (1, size) for n, size in pairs):
        return None
    return np.broadcast_to(array, sizes).copy()


def _norm_operand(node: oir.Node, op_types: tuple[str, ...]) -> tuple[oir.Node, oir.Value | None] | None:
    for value, other in commuted(node):
        norm = producer(value, *op_types)
        if norm is not None and value is not None:
            return norm, other
    return None


def _is_filled(value: oir.Value | None, number: float) -> bool:
    array = constant(value)
    return array is not None and bool((array == number).all())


def _parameter_sizes(norm: oir.Node) -> tuple[list[int], oir.Value] | None:
    """Return the shape that scale and bias of ``norm`` must have to broadcast with ``x``, and x itself."""
    x = norm.inputs[0]
    if x is None or x.shape is None:
        return None
    if norm.op_type in ("LayerNormalization", "RMSNormalization"):
        sizes = list(x.shape[integer(norm, "axis", -1) :])
    else:
        sizes = [x.shape[1], *[1] * (len(x.shape) - 2)]
    return ([d for d in sizes if isinstance(d, int)], x) if all(isinstance(d, int) for d in sizes) else None


def _absorb(node: oir.Node, ops: Ops, slot: int, neutral: float) -> Outcome:
    """Put the other operand of ``node`` into input ``slot`` of the normalization that feeds it."""
    kinds = ("LayerNormalization", "InstanceNormalization", "GroupNormalization")
    found = _norm_operand(node, (*kinds, "RMSNormalization") if slot == 1 else kinds)
    if found is None:
        return None
    norm, other = found
    taken = norm.inputs[slot] if len(norm.inputs) > slot else None
    has_bias = len(norm.inputs) > 2 and not _is_filled(norm.inputs[2], 0.0)
    if (taken is not None and not _is_filled(taken, neutral)) or (slot == 1 and has_bias):
        return None
    known = _parameter_sizes(norm)
    if known is None:
        return Miss("the shape of the normalized dimensions is not known")
    sizes, x = known
    by_channel = norm.op_type in ("InstanceNormalization", "GroupNormalization")
    array = _shaped(other, sizes, x.dtype)
    if array is None and (by_channel or not _is_exact(other, sizes, x.dtype)):
        shape = other.shape if other is not None else None
        return Miss(f"{shape} does not broadcast to {sizes}") if constant(other) is not None else None
    if not same_shape(node.outputs[0], x):
        return Miss(f"the result has shape {node.outputs[0].shape}, the normalization {x.shape}")
    if not used_once(norm.outputs[0]):
        return Miss(f"'{norm.outputs[0].name}' is used elsewhere too")
    if array is not None:
        parameter = ops.constant(array.reshape(-1) if by_channel else array, "parameter")
    else:
        assert other is not None
        parameter = other
    inputs = list(norm.inputs) + [None] * (slot + 1 - len(norm.inputs))
    inputs[slot] = parameter
    attributes = {name: attribute.value for name, attribute in norm.attributes.items()}
    return Rewrite([ops(norm.op_type, *inputs, **attributes)])


@rule("Norm(x,1)*gamma => Norm(x,gamma)", "Mul")
def norm_scale(node: oir.Node, ops: Ops) -> Outcome:
    """Absorb a multiplication that follows a normalization with scale 1 and no bias."""
    return _absorb(node, ops, 1, 1.0)


@rule("Norm(x,gamma)+beta => Norm(x,gamma,beta)", "Add")
def norm_bias(node: oir.Node, ops: Ops) -> Outcome:
    """Absorb an addition that follows a normalization without bias."""
    return _absorb(node, ops, 2, 0.0)


@rule("Cast(Norm(Cast(x,float32)),float16) => Norm(x)", "Cast")
def norm_cast_island(node: oir.Node, ops: Ops) -> Outcome:
    """Drop the casts around a normalization: ``stash_type`` computes in float32 anyway."""
    norm = producer(node.inputs[0], "LayerNormalization", "RMSNormalization")
    widen = producer(norm.inputs[0], "Cast") if norm is not None else None
    x = widen.inputs[0] if widen is not None else None
    if norm is None or x is None or x.dtype not in (oir.DataType.FLOAT16, oir.DataType.BFLOAT16):
        return None
    if node.outputs[0].dtype != x.dtype or norm.inputs[0] is None or norm.inputs[0].dtype != oir.DataType.FLOAT:
        return Miss(f"the result is {node.outputs[0].dtype}, the input {x.dtype}")
    arrays = [constant(v) for v in norm.inputs[1:]]
    if any(array is None for array in arrays):
        return Miss("scale or bias is not constant")
    if (reason := leak(node, x)) is not None:
        return Miss(reason)
    parts = [ops.constant(a.astype(x.dtype.numpy()), "parameter") for a in arrays if a is not None]
    attributes = {name: attribute.value for name, attribute in norm.attributes.items()}
    return Rewrite([ops(norm.op_type, x, *parts, **attributes)])


@rule("Reshape(InstanceNormalization(Reshape(x,[N,G,-1]))) => GroupNormalization(x)", "Reshape")
def group_norm(node: oir.Node, ops: Ops) -> Outcome:
    """Fuse the spelling of PyTorch's exporter; scale and bias are absorbed by the rules above."""
    norm = producer(node.inputs[0], "InstanceNormalization")
    split = producer(norm.inputs[0], "Reshape") if norm is not None else None
    x = split.inputs[0] if split is not None else None
    if norm is None or split is None or x is None or x.shape is None or x.dtype is None:
        return None
    grouped, channels = split.outputs[0].shape, x.shape[1] if len(x.shape) > 2 else None
    if grouped is None or len(grouped) != 3 or not isinstance(grouped[1], int) or not isinstance(channels, int):
        return Miss(f"{x.shape} as {grouped} shows no groups of channels")
    if not same_shape(node.outputs[0], x) or grouped[0] != x.shape[0] or channels % grouped[1]:
        return Miss(f"{x.shape} -> {grouped} -> {node.outputs[0].shape} does not split channels only")
    if not _is_filled(norm.inputs[1], 1.0) or not _is_filled(norm.inputs[2], 0.0):
        return Miss("scale and bias by group are none by channel")
    if (reason := leak(node, x, node.inputs[1], split.inputs[1])) is not None:
        return Miss(reason)
    dtype = x.dtype.numpy()
    scale, bias = (
        ops.constant(np.ones(channels, dtype), "scale"),
        ops.constant(np.zeros(channels, dtype), "bias"),
    )
    epsilon = number(norm, "epsilon", 1e-5)
    return Rewrite([ops("GroupNormalization", x, scale, bias, num_groups=grouped[1], epsilon=epsilon)])


def normalization_pass() -> RewritePass:
    """Return the pass that recognises normalizations."""
    rules = [normalization, layer_norm_tensorflow, group_norm, norm_scale, norm_bias, norm_cast_island]
    return RewritePass("fuse-normalization", rules)
