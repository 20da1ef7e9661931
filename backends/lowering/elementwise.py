"""Arithmetic, logic, bits, casts and elementary functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import te, tirx

from optc.backends.kernels import vector_math as vm
from optc.backends.kernels.vector_math import bind, convert, dtype_of, libm
from optc.backends.lowering.pointwise import pointwise
from optc.backends.lowering.site import Site
from optc.backends.lowering.table import Table

TABLE = Table()


def zero(x: Any) -> Any:
    """Return 0 of the type of ``x``."""
    return tirx.const(0, dtype_of(x))


def one(x: Any) -> Any:
    """Return 1 of the type of ``x``."""
    return tirx.const(1, dtype_of(x))


def is_float(x: Any) -> bool:
    """Tell whether an expression is of a floating-point type."""
    return "float" in dtype_of(x)


def _unsigned(x: Any) -> bool:
    return dtype_of(x).startswith("uint")


@TABLE.lowers("Add")
def add(site: Site) -> Any:
    """Add-14."""
    return pointwise(site, lambda a, b: a + b)


@TABLE.lowers("Sub")
def sub(site: Site) -> Any:
    """Sub-14."""
    return pointwise(site, subtract)


def subtract(a: Any, b: Any) -> Any:
    """Return ``a - b``; bound operands keep TVM from folding ``x - x`` and ``(x + y) - x`` of floats."""
    if not is_float(a):
        return a - b
    return bind(a, lambda a: bind(b, lambda b: a - b))


@TABLE.lowers("Mul")
def mul(site: Site) -> Any:
    """Mul-14."""
    return pointwise(site, lambda a, b: a * b, inline_zero=False)


@TABLE.lowers("Div")
def div(site: Site) -> Any:
    """Div-14: integers truncate; dividing an integer by zero gives 0."""
    return pointwise(site, divide, inline_zero=False)


def divide(a: Any, b: Any) -> Any:
    """Return the quotient of two elements without a trap of the processor."""
    if is_float(a):
        return a / b
    quotient = tirx.truncdiv(a, _safe_divisor(b))
    if isinstance(b, tirx.IntImm) and int(b) > 0:
        return quotient
    # Not a Select around the quotient: TVM would simplify the divisor under its condition.
    sign = tirx.Select(tirx.EQ(b, zero(b)), zero(b), one(b))
    if not _unsigned(b):
        sign = tirx.Select(tirx.EQ(b, tirx.const(-1, dtype_of(b))), zero(b) - one(b), sign)
    return quotient * sign


def _safe_divisor(b: Any) -> Any:
    """Return 1 for the integers that processors trap on: 0, and -1 (the smallest number by -1 overflows)."""
    traps = tirx.EQ(b, zero(b))
    if not _unsigned(b):
        traps = tirx.Or(traps, tirx.EQ(b, tirx.const(-1, dtype_of(b))))
    return tirx.Select(traps, one(b), b)


@TABLE.lowers("Mod")
def mod(site: Site) -> Any:
    """Mod-13: the sign of the divisor (``fmod=0``) or of the dividend (``fmod=1``)."""
    like_c = bool(site.attr("fmod", 0))

    def remainder(a: Any, b: Any) -> Any:
        if is_float(a):
            rest = libm("fmod", a, b)
        else:
            rest = tirx.truncmod(a, _safe_divisor(b))
        if like_c or _unsigned(a):
            return rest
        return bind(rest, lambda r: tirx.Select(_opposite(r, b), r + b, r))

    return pointwise(site, lambda a, b: bind(a, lambda a: bind(b, lambda b: remainder(a, b))), inline_zero=False)


def _opposite(a: Any, b: Any) -> Any:
    """Tell whether two elements have different signs, neither being 0."""
    return tirx.Or((a < zero(a)) & (b > zero(b)), (a > zero(a)) & (b < zero(b)))


@TABLE.lowers("Pow")
def power(site: Site) -> Any:
    """Pow-15: the result has the type of the base; the exponent may have any other."""
    return pointwise(site, lambda a, b: bind(a, lambda a: _power(a, b)))


def _power(base: Any, exponent: Any) -> Any:
    if not is_float(base) and not is_float(exponent):
        return _integer_power(base, exponent)
    if is_float(base) and isinstance(exponent, tirx.FloatImm | tirx.IntImm):
        simple = _SIMPLE_POWERS.get(float(exponent.value))
        if simple is not None:
            return simple(base)
    double = not is_float(base) or dtype_of(exponent) == "float64"
    dtype = "float64" if double else dtype_of(base)
    return convert(tirx.pow(convert(base, dtype), convert(exponent, dtype)), dtype_of(base))


_SIMPLE_POWERS: dict[float, Callable[[Any], Any]] = {
    1.0: lambda x: x,
    2.0: lambda x: x * x,
    3.0: lambda x: x * x * x,
    -1.0: lambda x: one(x) / x,
    # The power of minus infinity is plus infinity, its root is not a number.
    0.5: lambda x: tirx.Select(x == tirx.const(-np.inf, dtype_of(x)), zero(x) - x, tirx.sqrt(x)),
}


def _integer_power(base: Any, exponent: Any) -> Any:
    """Square and multiply; beyond 63 only powers of 0, 1 and -1 fit, which depend on parity alone."""
    # Written without Let: TVM's bound analysis fails on bound integers that simplify to better bounds.
    b, e = convert(base, "int64"), convert(exponent, "int64")
    unit = tirx.const(1, "int64")
    parity = e & unit
    limited = tirx.Select(e > tirx.const(63, "int64"), parity + tirx.const(62, "int64"), e)
    result, square = unit, b
    for bit in range(6):
        chosen = ((limited >> tirx.const(bit, "int64")) & unit) == unit
        result = result * tirx.Select(chosen, square, unit)
        square = square * square
    reciprocal = tirx.Select(
        tirx.Or(b == unit, b == tirx.const(-1, "int64")),
        tirx.Select(parity == unit, b, unit),
        tirx.const(0, "int64"),
    )
    return convert(tirx.Select(e < zero(e), reciprocal, result), dtype_of(base))


@TABLE.lowers("Neg")
def neg(site: Site) -> Any:
    """Neg-13."""
    return pointwise(site, lambda x: x * tirx.const(-1, dtype_of(x)))


@TABLE.lowers("Abs")
def absolute(site: Site) -> Any:
    """Abs-13."""
    return pointwise(site, lambda x: x if _unsigned(x) else tirx.abs(x))


@TABLE.lowers("Sign")
def sign(site: Site) -> Any:
    """Sign-13."""

    def element(x: Any) -> Any:
        positive = tirx.Select(x > zero(x), one(x), x)
        return positive if _unsigned(x) else tirx.Select(x < zero(x), zero(x) - one(x), positive)

    return pointwise(site, lambda x: bind(x, element))


@TABLE.lowers("Reciprocal")
def reciprocal(site: Site) -> Any:
    """Reciprocal-13."""
    return pointwise(site, lambda x: one(x) / x)


_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "Ceil": tirx.ceil,
    "Floor": tirx.floor,
    "Round": tirx.nearbyint,  # half to even
    "Sqrt": tirx.sqrt,
    "Exp": vm.exp,
    "Log": vm.log,
    "Erf": vm.erf,
    "Sin": tirx.sin,
    "Cos": tirx.cos,
    "Tan": tirx.tan,
    "Asin": tirx.asin,
    "Acos": tirx.acos,
    "Atan": tirx.atan,
    "Sinh": vm.sinh,
    "Cosh": vm.cosh,
    "Asinh": tirx.asinh,
    "Acosh": tirx.acosh,
    "Atanh": vm.atanh,
}


@TABLE.lowers(*_FUNCTIONS)
def function(site: Site) -> Any:
    """Elementary functions of one argument."""
    if "float" not in site.dtype(0):
        site.unsupported(f"{site.op} of {site.dtype(0)} is not supported")
    return pointwise(site, _FUNCTIONS[site.op])


@TABLE.lowers("Max", "Min", "Sum")
def fold(site: Site) -> Any:
    """Max-13, Min-13 (NaN if an element is NaN) and Sum-13 of one or more inputs."""
    combine = {"Max": vm.maximum, "Min": vm.minimum, "Sum": lambda a, b: a + b}[site.op]
    return pointwise(site, lambda *values: functools.reduce(combine, values))


@TABLE.lowers("Mean")
def mean(site: Site) -> Any:
    """Mean-13."""

    def average(*values: Any) -> Any:
        return functools.reduce(lambda a, b: a + b, values) / tirx.const(len(values), dtype_of(values[0]))

    return pointwise(site, average)


@TABLE.lowers("Clip")
def clip(site: Site) -> Any:
    """Clip-13; where the lower bound exceeds the upper, the upper wins."""
    given = [i for i in (1, 2) if site.has(i)]

    def limit(x: Any, *bounds: Any) -> Any:
        for i, bound in zip(given, bounds, strict=True):
            x = vm.maximum(x, bound) if i == 1 else vm.minimum(x, bound)
        return x

    return pointwise(site, limit, inputs=[0, *given])


@TABLE.lowers("And", "Or", "Xor")
def logical(site: Site) -> Any:
    """And-7, Or-7, Xor-7."""
    combine: dict[str, Callable[[Any, Any], Any]] = {
        "And": tirx.And,
        "Or": tirx.Or,
        "Xor": lambda a, b: tirx.Select(a, tirx.Not(b), b),
    }
    return pointwise(site, combine[site.op])


@TABLE.lowers("Not")
def negation(site: Site) -> Any:
    """Not-1."""
    return pointwise(site, tirx.Not)


@TABLE.lowers("BitwiseAnd", "BitwiseOr", "BitwiseXor")
def bitwise(site: Site) -> Any:
    """BitwiseAnd-18, BitwiseOr-18, BitwiseXor-18."""
    combine: dict[str, Callable[[Any, Any], Any]] = {
        "BitwiseAnd": lambda a, b: a & b,
        "BitwiseOr": lambda a, b: a | b,
        "BitwiseXor": lambda a, b: a ^ b,
    }
    return pointwise(site, combine[site.op])


@TABLE.lowers("BitwiseNot")
def bitwise_not(site: Site) -> Any:
    """BitwiseNot-18."""
    return pointwise(site, lambda x: ~x)


@TABLE.lowers("BitShift")
def bit_shift(site: Site) -> Any:
    """BitShift-11, and signed as in BitShift-28: shifting by the width or more, or by less than 0, leaves signs."""
    left = site.attr("direction") == "LEFT"

    def shift(x: Any, amount: Any) -> Any:
        dtype = dtype_of(x)
        limit = tirx.const(int("".join(c for c in dtype if c.isdigit())) - 1, dtype)
        inside = amount <= limit if _unsigned(x) else tirx.And(amount >= zero(x), amount <= limit)
        bounded = tirx.Select(inside, amount, limit)
        if left:
            return tirx.Select(inside, x << bounded, zero(x))
        return tirx.Select(inside, x >> bounded, zero(x) if _unsigned(x) else x >> limit)

    return pointwise(site, shift)


@TABLE.lowers("Where")
def where(site: Site) -> Any:
    """Where-16."""
    return pointwise(site, tirx.Select)


@TABLE.lowers("Cast", "CastLike")
def cast(site: Site) -> Any:
    """Cast-25, CastLike-25."""
    if site.dtype(0) == site.output_dtype():
        return site.tensor(0)
    return pointwise(site, lambda x: x, inputs=[0])


@TABLE.lowers("Identity")
def identity(site: Site) -> Any:
    """Identity-25."""
    return site.tensor(0)


@TABLE.lowers("Dropout")
def dropout(site: Site) -> Any:
    """Dropout-22 for inference: the identity, and a mask of ones."""
    training = site.constant(2)
    ratio = site.constant(1)
    keeps_all = site.has(1) and ratio is not None and float(ratio.reshape(-1)[0]) == 0.0
    if site.has(2) and not keeps_all and (training is None or bool(training.reshape(-1)[0])):
        site.unsupported("Dropout is random while training")
    if not site.wants(1):
        return site.tensor(0)
    shape = site.shape(0)
    return [site.tensor(0), site.emit(lambda: te.compute(shape, lambda *_: tirx.const(True, "bool"), "mask"))]
