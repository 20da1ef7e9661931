"""Activation functions and the softmax family."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import te, tirx

from optc.backends.kernels import reduction
from optc.backends.kernels import vector_math as vm
from optc.backends.kernels.vector_math import bind, convert, dtype_of
from optc.backends.lowering.pointwise import compute_dtype, pointwise
from optc.backends.lowering.site import Site
from optc.backends.lowering.table import Table

TABLE = Table()


def _const(value: float, x: Any) -> Any:
    return tirx.const(value, dtype_of(x))


def _bound(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda x: bind(x, function)


@TABLE.lowers("Relu")
def relu(site: Site) -> Any:
    """Relu-14."""
    return pointwise(site, lambda x: tirx.max(_const(0, x), x))


@TABLE.lowers("LeakyRelu")
def leaky_relu(site: Site) -> Any:
    """LeakyRelu-16."""
    alpha = site.attr("alpha", 0.01)
    return pointwise(site, _bound(lambda x: tirx.Select(x < _const(0, x), x * _const(alpha, x), x)))


@TABLE.lowers("PRelu")
def prelu(site: Site) -> Any:
    """PRelu-16: the slope broadcasts to the input."""
    return pointwise(
        site,
        lambda x, slope: bind(x, lambda x: tirx.Select(x < _const(0, x), x * slope, x)),
        inline_zero=False,
    )


@TABLE.lowers("Elu")
def elu(site: Site) -> Any:
    """Elu-22."""
    alpha = site.attr("alpha", 1.0)
    return pointwise(site, _bound(lambda x: _exponential(x, alpha, 1.0, 1.0)))


@TABLE.lowers("Selu")
def selu(site: Site) -> Any:
    """Selu-22."""
    alpha = site.attr("alpha", 1.67326319217681884765625)
    gamma = site.attr("gamma", 1.05070102214813232421875)
    return pointwise(site, _bound(lambda x: _exponential(x, alpha * gamma, 1.0, gamma)))


@TABLE.lowers("Celu")
def celu(site: Site) -> Any:
    """Celu-12."""
    alpha = site.attr("alpha", 1.0)
    return pointwise(site, _bound(lambda x: _exponential(x, alpha, alpha, 1.0)))


def _exponential(x: Any, alpha: float, divisor: float, gamma: float) -> Any:
    """Return ``gamma * x`` for positive ``x``, else ``alpha * (e**(x / divisor) - 1)``."""
    scaled = x if divisor == 1.0 else x / _const(divisor, x)
    negative = _const(alpha, x) * vm.expm1_negative(scaled)
    return tirx.Select(x > _const(0, x), _const(gamma, x) * x, negative)


@TABLE.lowers("ThresholdedRelu")
def thresholded_relu(site: Site) -> Any:
    """ThresholdedRelu-22."""
    alpha = site.attr("alpha", 1.0)
    return pointwise(site, _bound(lambda x: tirx.Select(x > _const(alpha, x), x, _const(0, x))))


@TABLE.lowers("HardSigmoid")
def hard_sigmoid(site: Site) -> Any:
    """HardSigmoid-22."""
    alpha, beta = site.attr("alpha", 0.2), site.attr("beta", 0.5)
    return pointwise(site, lambda x: _unit(x * _const(alpha, x) + _const(beta, x)))


@TABLE.lowers("HardSwish")
def hard_swish(site: Site) -> Any:
    """HardSwish-22."""
    return pointwise(site, _bound(lambda x: x * _unit(x * _const(1.0 / 6.0, x) + _const(0.5, x))))


def _unit(x: Any) -> Any:
    return tirx.min(_const(1, x), tirx.max(_const(0, x), x))


@TABLE.lowers("Mish")
def mish(site: Site) -> Any:
    """Mish-22: ``x * tanh(log(1 + e**x))``, with ``tanh(log(1 + e)) = (e² + 2e) / (e² + 2e + 2)``."""

    def element(x: Any) -> Any:
        # Beyond 20 the quotient is 1.
        e = vm.exp(tirx.min(_const(20, x), x))
        return bind(e, lambda e: bind(e * (e + _const(2, x)), lambda n: x * (n / (n + _const(2, x)))))

    return pointwise(site, _bound(element))


@TABLE.lowers("Gelu")
def gelu(site: Site) -> Any:
    """Gelu-20, exact or by tanh."""
    if site.attr("approximate", "none") == "tanh":
        return pointwise(site, _bound(_gelu_tanh))
    return pointwise(site, _bound(_gelu_erf))


def _gelu_erf(x: Any) -> Any:
    return _const(0.5, x) * x * (_const(1, x) + vm.erf(x * _const(math.sqrt(0.5), x)))


def _gelu_tanh(x: Any) -> Any:
    # (1 + tanh(u)) / 2 is the sigmoid of 2 u.
    inner = x * (_const(1, x) + _const(0.044715, x) * x * x)
    return x * vm.sigmoid(_const(2.0 * math.sqrt(2.0 / math.pi), x) * inner)


@TABLE.lowers("Sigmoid")
def sigmoid(site: Site) -> Any:
    """Sigmoid-13."""
    return pointwise(site, vm.sigmoid)


@TABLE.lowers("Swish")
def swish(site: Site) -> Any:
    """Swish-24: ``x * sigmoid(alpha * x)``."""
    alpha = site.attr("alpha", 1.0)
    return pointwise(site, _bound(lambda x: x * vm.sigmoid(x if alpha == 1.0 else x * _const(alpha, x))))


@TABLE.lowers("Tanh")
def tanh(site: Site) -> Any:
    """Tanh-13."""
    return pointwise(site, vm.tanh)


@TABLE.lowers("Softplus")
def softplus(site: Site) -> Any:
    """Softplus-22."""
    return pointwise(site, vm.softplus)


@TABLE.lowers("Softsign")
def softsign(site: Site) -> Any:
    """Softsign-22."""
    return pointwise(site, _bound(lambda x: x / (_const(1, x) + tirx.abs(x))))


@TABLE.lowers("Shrink")
def shrink(site: Site) -> Any:
    """Shrink-9."""
    bias, lambd = site.attr("bias", 0.0), site.attr("lambd", 0.5)
    work = "float32" if site.dtype(0) in ("float16", "bfloat16") else site.dtype(0)
    work = work if "float" in work else "float64"

    def element(x: Any) -> Any:
        above = tirx.Select(x > _const(lambd, x), x - _const(bias, x), _const(0, x))
        return tirx.Select(x < _const(-lambd, x), x + _const(bias, x), above)

    return pointwise(site, lambda x: bind(convert(x, work), element))


@TABLE.lowers("Softmax", "LogSoftmax")
def softmax(site: Site) -> Any:
    """Softmax-13, LogSoftmax-13 over one axis."""
    axis = site.attr("axis", -1) % site.rank(0)
    dtype = site.dtype(0)
    work = compute_dtype(dtype)
    logarithm = site.op == "LogSoftmax"

    def compute(x: Any) -> Any:
        shape = list(x.shape)
        rows = [d for i, d in enumerate(shape) if i != axis]
        extents = [shape[axis]]
        last = axis == len(shape) - 1

        def at(index: Any) -> Any:
            return index[:axis] + index[axis + 1 :]

        def read(outer: Any, inner: Any) -> Any:
            return convert(x(*outer[:axis], inner[0], *outer[axis:]), work)

        # A NaN that the maximum loses still reaches the sum.
        largest = reduction.Reducer(lambda a, b: tirx.max(a, b), reduction.limit(work, -1), work)
        top = reduction.reduce(largest, read, rows, extents, contiguous=last)
        # Computed once here: the sum and the quotient both read it.
        shifted = te.compute(shape, lambda *i: bind(convert(x(*i), work), lambda v: v - top(*at(i))), "shifted")
        powers = te.compute(shape, lambda *i: vm.exp_nonpositive(shifted(*i)), "powers")
        total = reduction.reduce(
            reduction.addition(work),
            lambda outer, inner: powers(*outer[:axis], inner[0], *outer[axis:]),
            rows,
            extents,
            contiguous=last,
        )
        if logarithm:
            logs = te.compute(rows, lambda *i: vm.log(total(*i)), "logs")
            return te.compute(shape, lambda *i: convert(shifted(*i) - logs(*at(i)), dtype), "logsoftmax")
        inverse = te.compute(rows, lambda *i: tirx.const(1, work) / total(*i), "inverse")
        return te.compute(shape, lambda *i: convert(powers(*i) * inverse(*at(i)), dtype), "softmax")

    return site.emit(compute, site.tensor(0))


@TABLE.lowers("Hardmax")
def hardmax(site: Site) -> Any:
    """Hardmax-13: 1 at the first largest element of an axis, 0 elsewhere."""
    axis = site.attr("axis", -1) % site.rank(0)
    dtype = site.dtype(0)
    work = compute_dtype(dtype)

    def compute(x: Any) -> Any:
        shape = list(x.shape)
        rows = [d for i, d in enumerate(shape) if i != axis]

        def read(outer: Any, inner: Any) -> Any:
            return convert(x(*outer[:axis], inner[0], *outer[axis:]), work)

        best = reduction.arg_reduce(
            read, rows, shape[axis], work, largest=True, last=False, contiguous=axis == len(shape) - 1
        )

        def element(*index: Any) -> Any:
            position = best(*index[:axis], *index[axis + 1 :])
            chosen = position == index[axis].astype("int64")
            return convert(tirx.Select(chosen, tirx.const(1, work), tirx.const(0, work)), dtype)

        return te.compute(shape, element, "hardmax")

    return site.emit(compute, site.tensor(0))
