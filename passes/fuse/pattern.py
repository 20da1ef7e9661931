"""What fusion rules read graphs with: polynomials of scalars, leaks out of a matched region, equal shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as oir

from optc.passes.match import constant, producer, scalar, used_once

Polynomial = dict[tuple[int, ...], float]
"""Coefficients by the exponents of the variables: ``{(1, 0): 0.5}`` is ``0.5 * x``."""

_MAX_DEPTH = 12


def leak(anchor: oir.Node, *leaves: oir.Value | None) -> str | None:
    """Say which value between ``leaves`` and ``anchor`` is needed elsewhere, or return None.

    The region is all that ``anchor`` depends on, up to ``leaves``, initializers and graph inputs. A rule that
    replaces ``anchor`` saves nothing where a part of its pattern has to be computed anyway.
    """
    stop = {value for value in leaves if value is not None}
    region = {anchor}
    stack = [anchor]
    while stack:
        for value in stack.pop().inputs:
            node = value.producer() if value is not None else None
            if node is not None and value not in stop and node not in region:
                region.add(node)
                stack.append(node)
    for node in region - {anchor}:
        for value in node.outputs:
            if value.is_graph_output():
                return f"'{value.name}' is a graph output"
            for user in value.consumers():
                if user not in region:
                    return f"'{value.name}' is also used by {user.op_type} '{user.name}'"
    return None


def polynomial(value: oir.Value | None, variables: Sequence[oir.Value]) -> Polynomial | None:
    """Return ``value`` as a polynomial in ``variables`` with scalar coefficients, or None if it is none.

    Reads through Add, Sub, Mul, Neg, Identity, division by and power to scalar constants, in any spelling.
    """
    return _polynomial(value, tuple(variables), _MAX_DEPTH)


def _polynomial(value: oir.Value | None, variables: tuple[oir.Value, ...], depth: int) -> Polynomial | None:
    if value is None or depth == 0:
        return None
    if value in variables:
        return {tuple(int(value is variable) for variable in variables): 1.0}
    number = scalar(value)
    if number is not None:
        return {(0,) * len(variables): number}
    node = producer(value, "Add", "Sub", "Mul", "Div", "Pow", "Neg", "Identity")
    if node is None:
        return None
    if node.op_type in ("Div", "Pow"):
        by = scalar(node.inputs[1])
        base = _polynomial(node.inputs[0], variables, depth - 1) if by is not None else None
        if by is None or base is None:
            return None
        if node.op_type == "Div":
            return {powers: c / by for powers, c in base.items()} if by != 0 else None
        if by not in (2.0, 3.0):
            return None
        squared = _times(base, base)
        return squared if by == 2.0 else _times(squared, base)
    parts = [_polynomial(operand, variables, depth - 1) for operand in node.inputs]
    found = [part for part in parts if part is not None]
    if len(found) != len(parts):
        return None
    if node.op_type == "Identity":
        return found[0]
    if node.op_type == "Neg":
        return {powers: -c for powers, c in found[0].items()}
    if node.op_type == "Mul":
        return _times(found[0], found[1])
    sign = -1.0 if node.op_type == "Sub" else 1.0
    result = dict(found[0])
    for powers, c in found[1].items():
        result[powers] = result.get(powers, 0.0) + sign * c
    return result


def _times(a: Polynomial, b: Polynomial) -> Polynomial:
    result: Polynomial = {}
    for powers, c in a.items():
        for others, d in b.items():
            key = tuple(p + q for p, q in zip(powers, others, strict=True))
            result[key] = result.get(key, 0.0) + c * d
    return result


def is_polynomial(found: Polynomial | None, expected: Polynomial, tolerance: float = 1e-3) -> bool:
    """Tell whether ``found`` has the terms of ``expected`` and no others.

    The default relative ``tolerance`` of a coefficient suits float16 constants and truncated decimals.
    """
    if found is None:
        return False
    terms = {powers: c for powers, c in found.items() if c != 0.0}
    return terms.keys() == expected.keys() and all(
        abs(terms[powers] - c) <= tolerance * abs(c) for powers, c in expected.items()
    )


def below(value: oir.Value, *through: str, depth: int = 5) -> Iterator[oir.Value]:
    """Yield ``value`` and what it is computed from, through ``depth`` levels of the operators ``through``."""
    level, seen = [value], {value}
    for _ in range(depth + 1):
        following: list[oir.Value] = []
        for item in level:
            yield item
            node = producer(item, *through)
            for operand in node.inputs if node is not None else ():
                if operand is not None and operand not in seen and not operand.is_initializer():
                    seen.add(operand)
                    following.append(operand)
        level = following


def affine(value: oir.Value | None) -> tuple[oir.Value, float, float] | None:
    """Return ``(x, a, b)`` with ``value = a * x + b``: peels scalar arithmetic whose result is used once."""
    if value is None:
        return None
    a, b = 1.0, 0.0
    while used_once(value) and (node := producer(value, "Add", "Sub", "Mul", "Div", "Neg")) is not None:
        base = next((v for v in node.inputs if v is not None and scalar(v) is None), None)
        if base is None:
            break
        step = polynomial(value, [base])
        if step is None or any(powers not in ((0,), (1,)) for powers in step):
            break
        slope, shift = step.get((1,), 0.0), step.get((0,), 0.0)
        a, b, value = a * slope, b + a * shift, base
    return value, a, b


def scalings(value: oir.Value) -> Iterator[tuple[oir.Value, float]]:
    """Yield ``(base, factor)`` with ``value = factor * base``, from ``(value, 1)`` down Mul and Div."""
    factor = 1.0
    while True:
        yield value, factor
        node = producer(value, "Mul", "Div")
        if node is None:
            return
        first, second = scalar(node.inputs[0]), scalar(node.inputs[1])
        if second is not None and node.inputs[0] is not None:
            value, factor = node.inputs[0], factor * second if node.op_type == "Mul" else factor / second
        elif first is not None and node.op_type == "Mul" and node.inputs[1] is not None:
            value, factor = node.inputs[1], factor * first
        else:
            return


def same_dim(a: object, b: object) -> bool:
    """Tell whether two dimensions are known to be equal: the same integer or the same symbolic expression."""
    if isinstance(a, oir.SymbolicDim) and isinstance(b, oir.SymbolicDim):
        return a.value is not None and a.value == b.value
    return isinstance(a, int) and isinstance(b, int) and a == b


def same_shape(a: oir.Value | None, b: oir.Value | None) -> bool:
    """Tell whether two values are known to have the same shape."""
    if a is None or b is None or a.shape is None or b.shape is None:
        return False
    return len(a.shape) == len(b.shape) and all(map(same_dim, a.shape, b.shape))


def is_float(value: oir.Value | None) -> bool:
    """Tell whether ``value`` is known to hold floating-point numbers."""
    return value is not None and value.dtype is not None and value.dtype.is_floating_point()


def reduced_axes(node: oir.Node) -> tuple[int, ...] | None:
    """Return the axes of a Reduce node (opset 18 or newer) as non-negative numbers, None where unknown."""
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is None:
        return None
    given = node.inputs[1] if len(node.inputs) > 1 else None
    axes = constant(given)
    if given is None or (axes is not None and axes.size == 0):
        return None if integer(node, "noop_with_empty_axes", 0) else tuple(range(len(shape)))
    if axes is None:
        return None
    return tuple(sorted(int(axis) % len(shape) for axis in axes.reshape(-1)))


def integer(node: oir.Node, name: str, default: int) -> int:
    """Return an integer attribute or its default."""
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else default


def number(node: oir.Node, name: str, default: float) -> float:
    """Return a float attribute or its default."""
    attribute = node.attributes.get(name)
    return attribute.as_float() if attribute is not None else default


def integers(node: oir.Node, name: str) -> tuple[int, ...]:
    """Return an attribute that is a list of integers, empty where it is absent."""
    attribute = node.attributes.get(name)
    return tuple(attribute.as_ints()) if attribute is not None else ()


def text(node: oir.Node, name: str, default: str) -> str:
    """Return a string attribute or its default."""
    attribute = node.attributes.get(name)
    return attribute.as_string() if attribute is not None else default


def along(array: np.ndarray, rank: int, axis: int, size: int) -> np.ndarray | None:
    """Return ``array`` as a float64 vector over ``axis`` of a tensor of ``rank``, or None.

    The array has to be a scalar, or of ``size`` along ``axis`` and 1 elsewhere, and must not add dimensions.
    """
    if array.ndim > rank:
        return None
    shape = (1,) * (rank - array.ndim) + array.shape
    if any(n != 1 for i, n in enumerate(shape) if i != axis) or shape[axis] not in (1, size):
        return None
    return np.broadcast_to(array.astype(np.float64).reshape(-1), (size,)).copy()
