"""Amounts (elements, bytes, operations) that are integers, sympy expressions over dimensions, or None: unknown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeAlias

import onnx_ir as oir

from optc.ir import dims

if TYPE_CHECKING:
    import sympy

Amount: TypeAlias = "int | sympy.Expr | None"

_STRING_BYTES = 8  # a pointer: where the characters are depends on the runtime


def product(factors: Iterable[int | oir.SymbolicDim]) -> Amount:
    """Return the product of dimensions; None if one is anonymous."""
    result: int | sympy.Expr = 1
    for factor in factors:
        if isinstance(factor, int):
            result = result * factor
        elif factor.value is None:
            return None
        else:
            result = dims.to_expr(factor) * result
    return result


def total(amounts: Iterable[Amount]) -> Amount:
    """Return the sum; None if one amount is unknown."""
    constant = 0
    terms: list[sympy.Expr] = []
    for amount in amounts:
        if amount is None:
            return None
        if isinstance(amount, int):
            constant += amount
        else:
            terms.append(amount)
    if not terms:
        return constant
    import sympy

    return sympy.Add(*terms, constant)


def elements(value: oir.Value | None) -> Amount:
    """Return the number of elements of a tensor; None where its shape is unknown, 0 for a missing input."""
    if value is None:
        return 0
    return None if value.shape is None else product(value.shape)


def value_bytes(value: oir.Value | None) -> Amount:
    """Return the number of bytes of a tensor, packed if its elements are smaller than a byte."""
    if value is None:
        return 0
    if not isinstance(value.type, oir.TensorType):
        return None
    return to_bytes(elements(value), value.type.dtype)


def to_bytes(count: Amount, dtype: oir.DataType) -> Amount:
    """Return the bytes of ``count`` elements of a type."""
    if count is None or dtype == oir.DataType.UNDEFINED:
        return None
    bits = 8 * _STRING_BYTES if dtype == oir.DataType.STRING else dtype.bitwidth
    if bits % 8 == 0:
        return count * (bits // 8)
    if isinstance(count, int):
        return (count * bits + 7) // 8
    import sympy

    return sympy.ceiling(count * sympy.Rational(bits, 8))


def evaluate(amount: Amount, sizes: Mapping[str, int]) -> int | None:
    """Return the value of an amount for given dimensions. Raises IRError naming a dimension without size."""
    return None if amount is None else dims.evaluate(amount, sizes)
