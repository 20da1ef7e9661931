"""Elementary functions as TIR expressions that LLVM turns into vector code.

``tirx.exp``, ``tirx.erf`` and the like become one scalar call of the C library per element. The float32 functions
here are polynomials (fitted for this file, minimax in the relative error) on branch-free argument reductions, so a
loop over them vectorizes. NaN, infinities, overflow and denormal results come out as IEEE 754 and C say.

Every function takes an expression of float16, bfloat16, float32 or float64 and returns one of the same type. The
half types compute in float32; float64 calls the C library. Intermediate values are bound by ``Let``: a kernel
whose stages are inlined into each other must not grow exponentially.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from tvm import tirx

Expr = Any


def dtype_of(value: Expr) -> str:
    """Return the element type of an expression."""
    return str(value.ty.dtype)


_CARRIERS = {"int32": "float32", "uint32": "float32", "int64": "float64", "uint64": "float64"}
"""What integers are bound as: TVM's NarrowDataType fails where it finds two bounds for an integer that is bound in an
expression, one before and one after simplification. The bits stay as they are, in a vector register."""


def bind(value: Expr, body: Callable[[Expr], Expr]) -> Expr:
    """Return ``body(value)`` with ``value`` evaluated once."""
    if isinstance(value, tirx.IntImm | tirx.FloatImm | tirx.Var):
        return body(value)
    dtype = dtype_of(value)
    carrier = _CARRIERS.get(dtype, dtype)
    variable = tirx.Var("t", carrier)
    if carrier == dtype:
        return tirx.Let(variable, value, body(variable))
    return tirx.Let(variable, tirx.reinterpret(carrier, value), body(tirx.reinterpret(dtype, variable)))


def f32(value: float) -> Expr:
    """Return a float32 immediate."""
    return tirx.const(value, "float32")


_HALF = ("float16", "bfloat16")


def convert(x: Expr, dtype: str) -> Expr:
    """Return ``x`` as ``dtype``: round to nearest even, truncate towards zero, compare with 0 for bool.

    What does not fit an integer type is undefined in ONNX; 8 and 16 bits wrap around, as NumPy's do. bfloat16 is
    converted on its bits here, because TVM's own legalization neither looks into ``Let`` nor keeps a chain of
    casts linear in size. Kernels compute on bfloat16 only through this function.
    """
    source = dtype_of(x)
    if source == dtype:
        return x
    if source == "bfloat16":
        return convert(_from_bfloat16(x), dtype)
    if dtype == "bool":
        return _is_not_zero(x)
    if dtype in _HALF and source != "float32":
        return convert(x.astype("float32"), dtype)
    if dtype == "bfloat16":
        return _to_bfloat16(x)
    if source == "float16":
        return convert(x.astype("float32"), dtype)
    if source.startswith("float") and not dtype.startswith("float"):
        return _truncate(x, dtype)
    return x.astype(dtype)


def _is_not_zero(x: Expr) -> Expr:
    if not dtype_of(x).startswith("float"):
        return tirx.NE(x, tirx.const(0, dtype_of(x)))
    # The comparison that TVM makes of NE is false for NaN.
    x = convert(x, "float32") if dtype_of(x) == "float16" else x
    return bind(x, lambda x: tirx.Or(tirx.NE(x, tirx.const(0, dtype_of(x))), tirx.isnan(x)))


def _truncate(x: Expr, dtype: str) -> Expr:
    if dtype in ("int8", "uint8", "int16", "uint16"):
        return x.astype("int32").astype(dtype)
    if dtype == "uint32":
        return x.astype("int64").astype(dtype)
    return x.astype(dtype)


def _from_bfloat16(x: Expr) -> Expr:
    bits = tirx.reinterpret("uint16", x).astype("uint32") << tirx.const(16, "uint32")
    return tirx.reinterpret("float32", bits)


def _to_bfloat16(x: Expr) -> Expr:
    def rounded(x: Expr, bits: Expr) -> Expr:
        odd = (bits >> tirx.const(16, "uint32")) & tirx.const(1, "uint32")
        half_even = (bits + odd + tirx.const(0x7FFF, "uint32")) >> tirx.const(16, "uint32")
        return tirx.Select(is_ordered(x), half_even, tirx.const(0x7FC0, "uint32")).astype("uint16")

    bits = bind(x, lambda x: bind(tirx.reinterpret("uint32", x), lambda bits: rounded(x, bits)))
    return tirx.reinterpret("bfloat16", bits)


def wide(function: Callable[[Expr], Expr]) -> Callable[[Expr], Expr]:
    """Make a float32 or float64 function accept float16 and bfloat16, computing in float32."""

    @functools.wraps(function)
    def apply(x: Expr) -> Expr:
        dtype = dtype_of(x)
        if dtype in _HALF:
            return convert(bind(convert(x, "float32"), function), dtype)
        return bind(x, function)

    return apply


def is_ordered(x: Expr) -> Expr:
    """Tell whether a float32 or float64 is not NaN; vectorizes, unlike ``tirx.isnan``. Must not be negated:

    TVM takes ``not a <= b`` for ``b < a``.
    """
    return x <= tirx.const(math.inf, dtype_of(x))


def _horner(x: Expr, coefficients: tuple[float, ...]) -> Expr:
    """Evaluate ``c0 + c1 x + c2 x^2 + ...``."""
    result = f32(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        result = result * x + f32(coefficient)
    return result


def _power_of_two(n: Expr) -> Expr:
    """Return ``2**n`` for an int32 ``n`` in [-126, 127]."""
    return tirx.reinterpret("float32", (n + 127) << 23)


_EXP: tuple[float, ...] = (0.5, 0.1666666716337204, 0.04166625440120697, 0.008333262987434864, 0.0013947224942967296)
_EXP = (*_EXP, 0.00019919380429200828)
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4


def _exp_parts(x: Expr, result: Callable[[Expr, Expr], Expr]) -> Expr:
    """Reduce ``x = n ln 2 + r`` with ``|r| <= ln 2 / 2`` and return ``result(n, expm1(r))``."""

    def reduced(n: Expr) -> Expr:
        r = x - n * f32(_LN2_HIGH) - n * f32(_LN2_LOW)
        return bind(r, lambda r: result(n.astype("int32"), _horner(r, _EXP) * (r * r) + r))

    return bind(tirx.floor(x * f32(1.0 / math.log(2.0)) + f32(0.5)), reduced)


@wide
def exp(x: Expr) -> Expr:
    """Return ``e**x``; float32 error below 1.5 ulp, denormal results included."""
    if dtype_of(x) == "float64":
        return tirx.exp(x)

    def scaled(n: Expr, p: Expr) -> Expr:
        # 2**n alone may be outside float32 where the result is inside.
        return bind(n >> 1, lambda half: (p + f32(1.0)) * _power_of_two(half) * _power_of_two(n - half))

    # The constant comes first: min and max return their second operand when one is NaN.
    return bind(tirx.min(f32(89.0), tirx.max(f32(-104.0), x)), lambda x: _exp_parts(x, scaled))


_ROUND = 1.5 * 2**23 + 127
"""Added to a small float32, it rounds it to an integer, whose biased exponent is then in the lowest bits."""


@wide
def exp_nonpositive(x: Expr) -> Expr:
    """Return ``e**x`` for ``x <= 0``; float32 error below 1.5 ulp, results below 2**-126 are 0."""
    if dtype_of(x) == "float64":
        return tirx.exp(x)

    def scaled(x: Expr, shifted: Expr) -> Expr:
        power = tirx.reinterpret("float32", tirx.reinterpret("int32", shifted) << 23)

        def polynomial(r: Expr) -> Expr:
            return bind(power, lambda e: e * (_horner(r, _EXP) * (r * r) + r) + e)

        n = shifted - f32(_ROUND)
        return bind(n, lambda n: bind(x - n * f32(_LN2_HIGH) - n * f32(_LN2_LOW), polynomial))

    # Down to where the exponent's bits are 0, which makes the result 0.
    x = tirx.max(f32(-88.0), x)
    return bind(x, lambda x: bind(x * f32(1.0 / math.log(2.0)) + f32(_ROUND), lambda t: scaled(x, t)))


def _expm1_negative(x: Expr) -> Expr:
    """Return ``e**x - 1`` for a float32 ``x <= 0``."""

    def scaled(n: Expr, p: Expr) -> Expr:
        return bind(_power_of_two(n), lambda e: e * p + (e - f32(1.0)))

    return bind(tirx.max(f32(-87.0), x), lambda x: _exp_parts(x, scaled))


@wide
def expm1_negative(x: Expr) -> Expr:
    """Return ``e**min(x, 0) - 1`` without cancellation; float32 error below 2 ulp."""
    if dtype_of(x) == "float64":
        return libm("expm1", tirx.min(tirx.const(0.0, "float64"), x))
    return _expm1_negative(tirx.min(f32(0.0), x))


_LOG: tuple[float, ...] = (0.3333333134651184, -0.24999967217445374, 0.20000089704990387, -0.16669411957263947)
_LOG = (*_LOG, 0.1428513079881668, -0.12424284219741821, 0.11035890132188797, -0.1082007884979248)
_LOG = (*_LOG, 0.10634192824363708, -0.05978464335203171)


@wide
def log(x: Expr) -> Expr:
    """Return the natural logarithm; float32 error below 1.5 ulp, denormal arguments included."""
    if dtype_of(x) == "float64":
        return tirx.log(x)
    positive = tirx.Select(x == f32(math.inf), x, _log_of_positive(x))
    return tirx.Select(x > f32(0.0), positive, tirx.Select(x == f32(0.0), f32(-math.inf), f32(math.nan)))


def _log_of_positive(x: Expr) -> Expr:
    tiny = x < f32(2.0**-126)
    normal = tirx.Select(tiny, x * f32(2.0**24), x)

    def with_bits(bits: Expr) -> Expr:
        # The exponent that leaves a mantissa in [sqrt(1/2), sqrt(2)): 0x3f3504f3 is sqrt(1/2).
        exponent = (bits - 0x3F3504F3) >> 23
        return bind(exponent, lambda e: with_exponent(bits, e))

    def with_exponent(bits: Expr, e: Expr) -> Expr:
        f = tirx.reinterpret("float32", bits - (e << 23)) - f32(1.0)
        shift = tirx.Select(tiny, f32(-24.0), f32(0.0))
        return bind(e.astype("float32") + shift, lambda e: bind(f, lambda f: combine(e, f)))

    def combine(e: Expr, f: Expr) -> Expr:
        p = _horner(f, _LOG) * (f * f * f) + e * f32(_LN2_LOW) - f * f * f32(0.5)
        return p + f + e * f32(_LN2_HIGH)

    return bind(tirx.reinterpret("int32", normal), with_bits)


@wide
def softplus(x: Expr) -> Expr:
    """Return ``log(1 + e**x)`` for every size of ``x``; float32 error below 3 ulp."""
    one = tirx.const(1.0, dtype_of(x))
    zero = tirx.const(0.0, dtype_of(x))

    def log1p(u: Expr) -> Expr:
        # What rounding 1 + u lost, relative to 1 + u, is the first-order correction of the logarithm.
        return bind(u + one, lambda w: log(w) + (u - (w - one)) / w)

    return tirx.max(zero, x) + bind(exp(zero - tirx.abs(x)), log1p)


@wide
def sigmoid(x: Expr) -> Expr:
    """Return ``1 / (1 + e**-x)``; float32 error below 3 ulp, denormal results included."""
    one = tirx.const(1.0, dtype_of(x))
    zero = tirx.const(0.0, dtype_of(x))
    return bind(exp(zero - tirx.abs(x)), lambda e: tirx.Select(x < zero, e, one) / (e + one))


@wide
def tanh(x: Expr) -> Expr:
    """Return the hyperbolic tangent; float32 error below 3 ulp, relative also near zero."""
    if dtype_of(x) == "float64":
        return libm("tanh", x)  # tirx.tanh returns 0 for small arguments

    def from_expm1(e: Expr) -> Expr:
        magnitude = f32(0.0) - e / (e + f32(2.0))
        return copy_sign(magnitude, x)

    return bind(_expm1_negative(tirx.abs(x) * f32(-2.0)), from_expm1)


def copy_sign(magnitude: Expr, sign: Expr) -> Expr:
    """Return a non-negative float32 ``magnitude`` with the sign bit of ``sign``."""
    bits = tirx.reinterpret("int32", sign) & tirx.const(-(2**31), "int32")
    return tirx.reinterpret("float32", tirx.reinterpret("int32", magnitude) | bits)


# erf(x) = x P(x^2) / Q(x^2) up to where it rounds to 1.
_ERF_LIMIT = 3.92
_ERF_P: tuple[float, ...] = (1.1283791065216064, 0.1999213546514511, 0.05057290941476822, 0.003701484529301524)
_ERF_P = (*_ERF_P, 0.00014184815518092364, -1.957841732291854e-06, 1.992456510890861e-08)
_ERF_Q = (1.0, 0.510507345199585, 0.11499710381031036, 0.014352940022945404, 0.0009560111211612821)


@wide
def erf(x: Expr) -> Expr:
    """Return the error function; float32 error below 6 ulp (3.3e-7 absolute)."""
    if dtype_of(x) == "float64":
        return tirx.erf(x)
    clamped = tirx.min(f32(_ERF_LIMIT), tirx.max(f32(-_ERF_LIMIT), x))
    ratio = bind(clamped, lambda x: bind(x * x, lambda t: x * (_horner(t, _ERF_P) / _horner(t, _ERF_Q))))
    return tirx.min(f32(1.0), tirx.max(f32(-1.0), ratio))


@wide
def atanh(x: Expr) -> Expr:
    """Return the inverse hyperbolic tangent (``tirx.atanh`` returns 0 for small arguments)."""
    return libm("atanh", x)


@wide
def sinh(x: Expr) -> Expr:
    """Return the hyperbolic sine (LLVM does not find ``tirx.sinh`` where a loop is vectorized)."""
    return libm("sinh", x)


@wide
def cosh(x: Expr) -> Expr:
    """Return the hyperbolic cosine (LLVM does not find ``tirx.cosh`` where a loop is vectorized)."""
    return libm("cosh", x)


def libm(name: str, *arguments: Expr) -> Expr:
    """Call a function of the C library on float32 or float64: one call per element, not vectorized."""
    dtype = dtype_of(arguments[0])
    return tirx.call_pure_extern(dtype, name + ("f" if dtype == "float32" else ""), *arguments)


def maximum(a: Expr, b: Expr) -> Expr:
    """Return the larger operand, NaN if one is NaN (``tirx.max`` returns its second operand then)."""
    return _extreme(tirx.max, a, b)


def minimum(a: Expr, b: Expr) -> Expr:
    """Return the smaller operand, NaN if one is NaN."""
    return _extreme(tirx.min, a, b)


def _extreme(function: Callable[[Expr, Expr], Expr], a: Expr, b: Expr) -> Expr:
    if not dtype_of(a).startswith("float") or _is_number(a):
        return function(a, b)
    if _is_number(b):
        return function(b, a)
    return bind(a, lambda a: tirx.Select(is_ordered(a), function(a, b), a))


def _is_number(x: Expr) -> bool:
    return isinstance(x, tirx.FloatImm) and not math.isnan(x.value)
