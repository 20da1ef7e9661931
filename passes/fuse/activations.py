"""Activations written in elementary operators become one: Swish, hard variants, Softplus, Mish, clips."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx_ir as oir

from optc.passes.fuse.pattern import (
    affine,
    below,
    is_float,
    is_polynomial,
    leak,
    number,
    polynomial,
    same_shape,
)
from optc.passes.match import commuted, constant, is_scalar, producer, scalar
from optc.passes.rewrite import Miss, Ops, Outcome, Rewrite, RewritePass, rule


def _checked(node: oir.Node, x: oir.Value, build: oir.Value) -> Outcome:
    """Guard every unary fusion: floating point, same shape, nothing of the pattern needed elsewhere."""
    if not is_float(x):
        return None
    if not same_shape(node.outputs[0], x):
        return Miss(f"the result has shape {node.outputs[0].shape}, its argument {x.shape}")
    if (reason := leak(node, x)) is not None:
        return Miss(reason)
    return Rewrite([build])


@rule("1/(1+exp(-x)) => Sigmoid(x)", "Div", "Reciprocal")
def sigmoid(node: oir.Node, ops: Ops) -> Outcome:
    """Fuse a sigmoid written with Exp; ``c / (1 + exp(-x))`` keeps the numerator as a factor."""
    denominator = node.inputs[-1]
    power = next((v for v in below(denominator, "Add", depth=1) if producer(v, "Exp")), None) if denominator else None
    if power is None or not is_polynomial(polynomial(denominator, [power]), {(0,): 1.0, (1,): 1.0}, 1e-6):
        return None
    exponent = power.producer().inputs[0]  # type: ignore[union-attr]
    candidates = below(exponent, "Neg", "Mul", "Div", "Sub", depth=1) if exponent is not None else iter(())
    x = next((v for v in candidates if is_polynomial(polynomial(exponent, [v]), {(1,): -1.0}, 1e-6)), None)
    if x is None or not is_float(x):
        return None
    if (reason := leak(node, x, node.inputs[0] if node.op_type == "Div" else None)) is not None:
        return Miss(reason)
    gate = ops("Sigmoid", x, like=x)
    if node.op_type == "Reciprocal" or is_scalar(node.inputs[0], 1.0):
        return Rewrite([gate]) if same_shape(node.outputs[0], x) else Miss("the constant widens the shape")
    return Rewrite([ops("Mul", node.inputs[0], gate)])


def _exponent_of_one_plus_exp(value: oir.Value | None) -> oir.Value | None:
    """Return ``e`` if ``value`` is ``1 + Exp(e)``."""
    node = producer(value, "Add")
    for power, one in commuted(node) if node is not None else ():
        inner = producer(power, "Exp")
        if inner is not None and is_scalar(one, 1.0):
            return inner.inputs[0]
    return None


@rule("x*Sigmoid(alpha*x) => Swish(x, alpha)", "Mul")
def swish(node: oir.Node, ops: Ops) -> Outcome:
    """Fuse SiLU / Swish (Swish-24, arXiv:1710.05941); a gate on another value is no Swish."""
    for x, gate in commuted(node):
        inner = producer(gate, "Sigmoid")
        slopes = polynomial(inner.inputs[0], [x]) if inner is not None and x is not None else None
        if x is None or slopes is None:
            continue
        if any(c != 0.0 for powers, c in slopes.items() if powers != (1,)) or (1,) not in slopes:
            return Miss("the argument of the sigmoid is not a multiple of x")
        return _checked(node, x, ops("Swish", x, alpha=slopes[1,]))
    return None


@rule("x*Tanh(Softplus(x)) => Mish(x)", "Mul")
def mish(node: oir.Node, ops: Ops) -> Outcome:
    """Fuse Mish (Mish-18, arXiv:1908.08681)."""
    for x, gate in commuted(node):
        inner = producer(gate, "Tanh")
        softplus_node = producer(inner.inputs[0], "Softplus") if inner is not None else None
        if x is not None and softplus_node is not None and softplus_node.inputs[0] is x:
            return _checked(node, x, ops("Mish", x))
    return None


@rule("Log(1+Exp(x)) => Softplus(x)", "Log")
def softplus(node: oir.Node, ops: Ops) -> Outcome:
    """Fuse Softplus, which does not overflow where Exp would."""
    x = _exponent_of_one_plus_exp(node.inputs[0])
    return _checked(node, x, ops("Softplus", x)) if x is not None else None


@rule("Where(x>t, x, Softplus(x)) => Softplus(x)", "Where")
def softplus_threshold(node: oir.Node, ops: Ops) -> Outcome:
    """Drop the overflow guard of PyTorch's exporter: beyond 20 both branches round to the same float32."""
    condition, inner = producer(node.inputs[0], "Greater"), producer(node.inputs[2], "Softplus")
    x = node.inputs[1]
    if condition is None or inner is None or x is None:
        return None
    if inner.inputs[0] is not x or condition.inputs[0] is not x:
        return None
    threshold = scalar(condition.inputs[1])
    if threshold is None or threshold < 20.0 or x.dtype == oir.DataType.DOUBLE:
        return Miss(f"the threshold {threshold} is too low for the branches to agree in {x.dtype}")
    return _checked(node, x, ops("Softplus", x))


def bounds(value: oir.Value | None) -> tuple[oir.Value, float, float] | None:
    """Return ``(x, low, high)`` if ``value`` is Clip(x) or Relu(x) with constant bounds."""
    node = producer(value, "Clip", "Relu")
    if node is None or node.inputs[0] is None:
        return None
    if node.op_type == "Relu":
        return node.inputs[0], 0.0, math.inf
    limits = [-math.inf, math.inf]
    for i, bound in enumerate(node.inputs[1:3]):
        if bound is not None:
            found = scalar(bound)
            if found is None:
                return None
            limits[i] = found
    return node.inputs[0], limits[0], limits[1]


@rule("Max(x,0) => Relu(x)", "Max")
def relu_from_max(node: oir.Node, ops: Ops) -> Outcome:
    """Fuse a two-input maximum with zero."""
    if len(node.inputs) != 2:
        return None
    for x, zero in commuted(node):
        if x is not None and is_scalar(zero, 0.0, 0.0) and scalar(x) is None:
            return _checked(node, x, ops("Relu", x))
    return None


@rule("Clip(x,0,inf) => Relu(x)", "Clip")
def relu_from_clip(node: oir.Node, ops: Ops) -> Outcome:
    """Replace a clip that has no effective upper bound."""
    found = bounds(node.outputs[0])
    if found is None or found[1] != 0.0 or not is_float(found[0]):
        return None
    if found[2] < _largest(found[0]):
        return None
    return _checked(node, found[0], ops("Relu", found[0]))


def _largest(x: oir.Value) -> float:
    if x.dtype in (oir.DataType.FLOAT, oir.DataType.DOUBLE, oir.DataType.FLOAT16):
        return float(np.finfo(x.dtype.numpy()).max)
    return math.inf


def _clip(ops: Ops, x: oir.Value, low: float, high: float) -> oir.Value:
    assert x.dtype is not None
    limits = [ops.constant(np.array(v, x.dtype.numpy()), "bound") if math.isfinite(v) else None for v in (low, high)]
    return ops("Clip", x, *(limits if limits[1] is not None else limits[:1]))


@rule("Min(Max(x,a),b) => Clip(x,a,b)", "Min", "Max")
def clip_from_min_max(node: oir.Node, ops: Ops) -> Outcome:
    """Fuse a minimum over a maximum (or over Relu), and the other way round, with scalar constants."""
    if len(node.inputs) != 2:
        return None
    for inner, outer_bound in commuted(node):
        second = scalar(outer_bound)
        if second is None or inner is None or scalar(inner) is not None:
            continue
        one_sided = _one_sided(inner, "Max" if node.op_type == "Min" else "Min")
        if one_sided is None or not is_float(one_sided[0]):
            return None
        x, first = one_sided
        low, high = (first, second) if node.op_type == "Min" else (second, first)
        if low > high:
            return Miss(f"the lower bound {low} exceeds the upper bound {high}")
        return _checked(node, x, _clip(ops, x, low, high))
    return None


def _one_sided(value: oir.Value, op_type: str) -> tuple[oir.Value, float] | None:
    node = producer(value, op_type, "Relu")
    if node is None or node.inputs[0] is None:
        return None
    if node.op_type == "Relu":
        return (node.inputs[0], 0.0) if op_type == "Max" else None
    if len(node.inputs) != 2:
        return None
    for x, bound in commuted(node):
        limit = scalar(bound)
        if limit is not None and x is not None:
            return x, limit
    return None


@rule("Clip(Relu(x),a,b) => Clip(x,max(a,0),b)", "Clip")
def clip_of_relu(node: oir.Node, ops: Ops) -> Outcome:
    """Merge Relu into the clip that follows it."""
    outer = bounds(node.outputs[0])
    inner = producer(outer[0], "Relu") if outer is not None else None
    if outer is None or inner is None or inner.inputs[0] is None or outer[2] < 0.0:
        return None
    if not is_float(inner.inputs[0]):
        return None
    return _checked(node, inner.inputs[0], _clip(ops, inner.inputs[0], max(outer[1], 0.0), outer[2]))


@rule("Clip(a*x+b,0,1) => HardSigmoid(x,a,b)", "Clip")
def hard_sigmoid_from_clip(node: oir.Node, ops: Ops) -> Outcome:
    """Fuse a clip of a scalar line, where the line is really there."""
    found = bounds(node.outputs[0])
    line = affine(found[0]) if found is not None and found[1:] == (0.0, 1.0) else None
    if line is None or line[1:] == (1.0, 0.0) or line[1] == 0.0:
        return None
    return _checked(node, line[0], ops("HardSigmoid", line[0], alpha=line[1], beta=line[2]))


@rule("k*Clip(a*x+b,0,1/k) => HardSigmoid(x,a*k,b*k)", "Div", "Mul")
def hard_sigmoid(node: oir.Node, ops: Ops) -> Outcome:
    """Fuse ``relu6(x + 3) / 6`` and its relatives."""
    for gate, high in _gates(node):
        terms = polynomial(node.outputs[0], [gate])
        line = affine(_argument(gate))
        if terms is None or terms.keys() != {(1,)} or line is None or line[1] == 0.0:
            continue
        k, (x, a, b) = terms[1,], line
        if abs(k * high - 1.0) > 1e-3:
            return Miss(f"{k:g} * clip(..., 0, {high:g}) does not end at 1")
        return _checked(node, x, ops("HardSigmoid", x, alpha=a * k, beta=b * k))
    return None


@rule("x*k*Clip(x+3,0,6) => HardSwish(x)", "Div", "Mul")
def hard_swish(node: oir.Node, ops: Ops) -> Outcome:
    """Fuse ``x * relu6(x + 3) / 6`` with the division anywhere (HardSwish-14, arXiv:1905.02244)."""
    for gate, high in _gates(node):
        argument = _argument(gate)
        for x in below(argument, "Add", "Sub", "Mul", "Div", depth=3):
            line, terms = polynomial(argument, [x]), polynomial(node.outputs[0], [x, gate])
            if line is None or terms is None or terms.keys() != {(1, 1)} or not line.keys() <= {(0,), (1,)}:
                continue
            k = terms[1, 1]
            a, b = k * line.get((1,), 0.0), k * line.get((0,), 0.0)
            if abs(k * high - 1.0) > 1e-3:
                return None if k == 1.0 else Miss(f"{k:g} * clip(..., 0, {high:g}) does not end at 1")
            if not _is_hard_swish_gate(a, b):
                return Miss(f"the gate is clip({a:g} * x + {b:g}, 0, 1), not clip(x / 6 + 0.5, 0, 1)")
            return _checked(node, x, ops("HardSwish", x))
    return None


def _is_hard_swish_gate(a: float, b: float) -> bool:
    return abs(a - 1 / 6) < 1e-4 and abs(b - 0.5) < 1e-4


def _gates(node: oir.Node) -> Iterator[tuple[oir.Value, float]]:
    """Yield the values ``Clip(..., 0, high)`` in a product, with ``high``."""
    for gate in below(node.outputs[0], "Mul", "Div", depth=3):
        found = bounds(gate)
        if found is not None and found[1] == 0.0 and 0.0 < found[2] < math.inf:
            yield gate, found[2]


def _argument(gate: oir.Value) -> oir.Value:
    found = bounds(gate)
    assert found is not None
    return found[0]


@rule("x*HardSigmoid(x,1/6,1/2) => HardSwish(x)", "Mul")
def hard_swish_from_sigmoid(node: oir.Node, ops: Ops) -> Outcome:
    """Fuse the product with the gate that was fused before."""
    for x, gate in commuted(node):
        inner = producer(gate, "HardSigmoid")
        if x is None or inner is None or inner.inputs[0] is not x:
            continue
        alpha, beta = number(inner, "alpha", 0.2), number(inner, "beta", 0.5)
        if not _is_hard_swish_gate(alpha, beta):
            return Miss(f"the gate is HardSigmoid(alpha={alpha:g}, beta={beta:g})")
        return _checked(node, x, ops("HardSwish", x))
    return None


@rule("Max(x,a*x) => LeakyRelu(x,a)", "Max")
def leaky_relu_from_max(node: oir.Node, ops: Ops) -> Outcome:
    """Fuse a maximum of x and a multiple of it."""
    if len(node.inputs) != 2:
        return None
    for x, other in commuted(node):
        slopes = polynomial(other, [x]) if x is not None and scalar(x) is None else None
        if x is None or slopes is None or slopes.keys() != {(1,)}:
            continue
        if not 0.0 <= slopes[1,] <= 1.0:
            return Miss(f"max(x, {slopes[1,]:g} * x) is no leaky Relu")
        return _checked(node, x, ops("LeakyRelu", x, alpha=slopes[1,]))
    return None


@rule("Where(x>0, x, a*x) => LeakyRelu(x,a)", "Where")
def leaky_relu_from_where(node: oir.Node, ops: Ops) -> Outcome:
    """Fuse a selection by sign."""
    condition = producer(node.inputs[0], "Greater", "GreaterOrEqual")
    x = node.inputs[1]
    if condition is None or x is None or condition.inputs[0] is not x or not is_scalar(condition.inputs[1], 0.0, 0.0):
        return None
    slopes = polynomial(node.inputs[2], [x])
    if slopes is None or slopes.keys() != {(1,)}:
        return None
    return _checked(node, x, ops("LeakyRelu", x, alpha=slopes[1,]))


@rule("Relu(x)-a*Relu(-x) => PRelu(x,a)", "Add", "Sub")
def prelu(node: oir.Node, ops: Ops) -> Outcome:
    """Fuse the spelling of Keras; ``a`` may be a constant tensor that broadcasts to x (PRelu-16)."""
    for positive, other in commuted(node) if node.op_type == "Add" else (tuple(node.inputs),):
        relu = producer(positive, "Relu")
        x = relu.inputs[0] if relu is not None else None
        product = producer(other, "Mul")
        if x is None or other is None or product is None:
            continue
        for factor, mirrored in commuted(product):
            slope, inner = constant(factor), producer(mirrored, "Relu")
            if slope is None or inner is None or not is_polynomial(polynomial(inner.inputs[0], [x]), {(1,): -1.0}):
                continue
            slope = slope if node.op_type == "Sub" else -slope
            if slope.size == 1:
                return _checked(node, x, ops("LeakyRelu", x, alpha=float(slope.reshape(()))))
            if x.shape is None or slope.ndim > len(x.shape):
                return Miss(f"the slope has shape {slope.shape}, x has {x.shape}")
            return _checked(node, x, ops("PRelu", x, ops.constant(slope, "slope")))
    return None


def activations_pass() -> RewritePass:
    """Return the pass that recognises activations."""
    rules = [
        sigmoid,
        softplus,
        softplus_threshold,
        relu_from_max,
        relu_from_clip,
        clip_from_min_max,
        clip_of_relu,
        hard_sigmoid_from_clip,
        hard_sigmoid,
        hard_swish,
        hard_swish_from_sigmoid,
        leaky_relu_from_max,
        leaky_relu_from_where,
        prelu,
        swish,
        mish,
    ]
    return RewritePass("fuse-activations", rules)
