"""Gelu, exact and by tanh, in the spellings of PyTorch, TensorFlow and Paddle (Gelu-20, arXiv:1606.08415).

The whole expression is read as a polynomial in ``x`` and ``t = erf(...)`` or ``tanh(...)``: the order of
factors, Div against Mul, and ``pow(x, 3)`` against ``x * x * x`` do not matter.
"""

from __future__ import annotations

import math

import onnx_ir as oir

from optc.passes.fuse.pattern import Polynomial, below, is_float, is_polynomial, leak, polynomial, same_shape
from optc.passes.match import producer
from optc.passes.rewrite import Miss, Ops, Outcome, Rewrite, RewritePass, rule

_ARITHMETIC = ("Add", "Sub", "Mul", "Div")
_HALF_GATED: Polynomial = {(1, 0): 0.5, (1, 1): 0.5}
_ERF_ARGUMENT: Polynomial = {(1,): 1 / math.sqrt(2)}
_TANH_ARGUMENT: Polynomial = {(1,): math.sqrt(2 / math.pi), (3,): 0.044715 * math.sqrt(2 / math.pi)}


def _gelu(node: oir.Node, ops: Ops, squashing: str, approximate: str) -> Outcome:
    output = node.outputs[0]
    argument = _ERF_ARGUMENT if squashing == "Erf" else _TANH_ARGUMENT
    gate = next((v for v in below(output, *_ARITHMETIC, depth=4) if producer(v, squashing) is not None), None)
    if gate is None:
        return None
    inner = producer(gate, squashing)
    assert inner is not None and inner.inputs[0] is not None
    candidates = below(inner.inputs[0], *_ARITHMETIC, "Pow", depth=6)
    x = next((v for v in candidates if is_polynomial(polynomial(inner.inputs[0], [v]), argument)), None)
    if x is None or not is_float(x):
        return None
    whole = polynomial(output, [x, gate])
    if whole is None or not _mentions_product(whole):
        return None
    if not is_polynomial(whole, _HALF_GATED):
        return Miss(f"x * {squashing}(...) is combined as {whole}, not as 0.5 * x * (1 + {squashing}(...))")
    if not same_shape(output, x):
        return Miss(f"the result has shape {output.shape}, its argument {x.shape}")
    if (reason := leak(node, x)) is not None:
        return Miss(reason)
    return Rewrite([ops("Gelu", x, approximate=approximate)])


def _mentions_product(terms: dict[tuple[int, ...], float]) -> bool:
    """Tell whether a polynomial is a near-miss at least; the inner ``x * (1 + t)`` of a Gelu is none."""
    return terms.keys() >= {(1, 0), (1, 1)} and abs(terms[1, 1] - 1.0) > 1e-6


@rule("0.5*x*(1+erf(x/sqrt(2))) => Gelu(x)", "Mul", "Div", "Add")
def gelu_erf(node: oir.Node, ops: Ops) -> Outcome:
    """Fuse the exact Gelu."""
    return _gelu(node, ops, "Erf", "none")


@rule("0.5*x*(1+tanh(sqrt(2/pi)*(x+0.044715*x^3))) => Gelu(x, tanh)", "Mul", "Div", "Add")
def gelu_tanh(node: oir.Node, ops: Ops) -> Outcome:
    """Fuse the tanh approximation of Gelu."""
    return _gelu(node, ops, "Tanh", "tanh")


def gelu_pass() -> RewritePass:
    """Return the pass that recognises Gelu."""
    return RewritePass("fuse-gelu", [gelu_erf, gelu_tanh])
