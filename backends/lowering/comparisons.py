"""Comparisons and tests of floating-point values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import tirx

from optc.backends.kernels.vector_math import bind, convert, dtype_of
from optc.backends.lowering.pointwise import pointwise
from optc.backends.lowering.site import Site
from optc.backends.lowering.table import Table

TABLE = Table()

_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "Equal": tirx.EQ,
    "Greater": tirx.GT,
    "GreaterOrEqual": tirx.GE,
    "Less": tirx.LT,
    "LessOrEqual": tirx.LE,
}


@TABLE.lowers(*_COMPARE)
def compare(site: Site) -> Any:
    """Equal-19, Greater-13, GreaterOrEqual-16, Less-13, LessOrEqual-16; false where an operand is NaN."""
    function = _COMPARE[site.op]

    def element(a: Any, b: Any) -> Any:
        if dtype_of(a) == "bool":
            a, b = convert(a, "int8"), convert(b, "int8")
        if "float" not in dtype_of(a):
            return function(a, b)
        # Bound operands keep TVM from folding x == x, and "not a < b" to b <= a: false for NaN, both of them.
        return bind(a, lambda a: bind(b, lambda b: function(a, b)))

    return pointwise(site, element)


@TABLE.lowers("IsNaN")
def is_nan(site: Site) -> Any:
    """IsNaN-20."""
    return pointwise(site, tirx.isnan)


@TABLE.lowers("IsInf")
def is_inf(site: Site) -> Any:
    """IsInf-20."""
    signs = [
        value for name, value in (("detect_positive", math.inf), ("detect_negative", -math.inf)) if site.attr(name, 1)
    ]

    def element(x: Any) -> Any:
        result: Any = tirx.const(False, "bool")
        for value in signs:
            result = tirx.Or(result, x == tirx.const(value, dtype_of(x)))
        return result

    return pointwise(site, lambda x: bind(x, element))
