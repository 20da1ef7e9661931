"""Small questions that rules ask about a graph: who made this value, is it constant, is it used once."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir


def producer(value: oir.Value | None, *op_types: str) -> oir.Node | None:
    """Return the node that computes ``value`` if its operator (default domain) is one of ``op_types``."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.domain == "" and node.op_type in op_types else None


def constant(value: oir.Value | None) -> np.ndarray | None:
    """Return the array of an initializer, or None. A graph input with a default value is not constant."""
    if value is None or value.const_value is None or value.is_graph_input() or not value.is_initializer():
        return None
    return value.const_value.numpy()


def scalar(value: oir.Value | None) -> float | None:
    """Return the number held by a constant of one element, or None."""
    array = constant(value)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def is_scalar(value: oir.Value | None, expected: float, tolerance: float = 1e-6) -> bool:
    """Tell whether ``value`` is a one-element constant equal to ``expected`` (relative ``tolerance``)."""
    found = scalar(value)
    return found is not None and abs(found - expected) <= tolerance * max(1.0, abs(expected))


def used_once(value: oir.Value) -> bool:
    """Tell whether exactly one node input reads ``value`` and it is no graph output."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def commuted(node: oir.Node) -> tuple[tuple[oir.Value | None, oir.Value | None], ...]:
    """Return both orders of the inputs of a two-input commutative node."""
    a, b = node.inputs[0], node.inputs[1]
    return ((a, b), (b, a))


def rank(value: oir.Value | None) -> int | None:
    """Return the number of dimensions, or None where it is unknown."""
    return len(value.shape) if value is not None and value.shape is not None else None


def static_shape(value: oir.Value | None) -> tuple[int, ...] | None:
    """Return the shape if every dimension is a known integer, else None."""
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return tuple(int(d) for d in value.shape.numpy())


def same_shape(a: oir.Value | None, b: oir.Value | None) -> bool:
    """Tell whether two values surely have the same shape: equal sizes and equal names, none unknown."""
    if a is None or b is None or a.shape is None or b.shape is None:
        return False
    return len(a.shape) == len(b.shape) and all(map(same_dim, a.shape, b.shape))


def same_dim(a: int | oir.SymbolicDim, b: int | oir.SymbolicDim) -> bool:
    """Tell whether two dims are surely equal."""
    return a == b if isinstance(a, int) or isinstance(b, int) else a.value is not None and a.value == b.value


def integers(value: oir.Value | None) -> tuple[int, ...] | None:
    """Return the elements of a constant integer vector or scalar, or None."""
    array = constant(value)
    if array is None or array.ndim > 1 or array.dtype.kind not in "iu":
        return None
    return tuple(int(n) for n in array.reshape(-1))


def int_attribute(node: oir.Node, name: str, default: int) -> int:
    """Return an integer attribute, or the default that the operator has for it."""
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else default


def input_or_none(node: oir.Node, index: int) -> oir.Value | None:
    """Return an input, None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def is_float(value: oir.Value | None) -> bool:
    """Tell whether a value is a floating point tensor."""
    return value is not None and value.dtype is not None and value.dtype.is_floating_point()
