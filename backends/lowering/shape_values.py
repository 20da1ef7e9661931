"""Symbolic evaluation of integer shape arithmetic: NumPy on object arrays of ints and TIR expressions.

``Shape -> Gather -> Mul -> Concat -> Reshape`` chains cost no kernel: their elements are expressions of the symbolic
dimensions. Every function returns None when it does not apply, and the node is lowered as an ordinary tensor op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as oir
from tvm import tirx

from optc.backends.lowering import emit as emission

if TYPE_CHECKING:
    from optc.backends.lowering.lower import Lowerer

_INTEGER = {oir.DataType.INT64, oir.DataType.INT32}
_LIMIT = 1024


def evaluate(node: oir.Node, lowerer: Lowerer) -> np.ndarray | None:
    """Return the known elements of the only output of ``node``, or None."""
    if node.domain != "" or len(node.outputs) != 1 or node.outputs[0].dtype not in _INTEGER:
        return None
    if node.op_type in ("Shape", "Size"):
        return _shape(node, lowerer)
    function = _TABLE.get(node.op_type)
    if function is None:
        return None
    operands = [_known(value, lowerer) if value is not None else None for value in node.inputs]
    if any(o is None for o, v in zip(operands, node.inputs, strict=True) if v is not None):
        return None
    result = function(node, [o for o in operands if o is not None])
    return result if result is None or result.size <= _LIMIT else None


def _known(value: oir.Value, lowerer: Lowerer) -> np.ndarray | None:
    if value in lowerer.integers:
        return lowerer.integers[value]
    if value.dtype not in _INTEGER or value in lowerer.tensors:
        return None
    array = lowerer.constant(value)
    if array is None or array.size > _LIMIT:
        return None
    return np.array([int(v) for v in array.reshape(-1)], dtype=object).reshape(array.shape)


def _attribute(node: oir.Node, name: str, default: Any) -> Any:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.value


def _shape(node: oir.Node, lowerer: Lowerer) -> np.ndarray | None:
    value = node.inputs[0]
    if value is None:
        return None
    known = lowerer.integers.get(value)
    dims = list(known.shape) if known is not None else emission.shape_of(lowerer.tensor(value))
    if node.op_type == "Size":
        total: Any = 1
        for dim in dims:
            total = total * dim
        return _array(total)
    start = _attribute(node, "start", 0)
    end = _attribute(node, "end", len(dims))
    return np.array([*dims[slice(start, end)]], dtype=object)


def _array(value: Any) -> np.ndarray:
    result = np.empty((), dtype=object)
    result[()] = value
    return result


def _elementwise(function: Callable[[Any, Any], Any]) -> Callable[[oir.Node, list[np.ndarray]], np.ndarray]:
    def apply(node: oir.Node, operands: list[np.ndarray]) -> np.ndarray:
        left, right = np.broadcast_arrays(*operands)
        result = np.empty(left.shape, dtype=object)
        for index in np.ndindex(*left.shape):
            result[index] = emission.plain(function(left[index], right[index]))
        return result

    return apply


def _maximum(a: Any, b: Any) -> Any:
    return max(a, b) if _plain(a, b) else tirx.max(emission.as_index(a), emission.as_index(b))


def _minimum(a: Any, b: Any) -> Any:
    return min(a, b) if _plain(a, b) else tirx.min(emission.as_index(a), emission.as_index(b))


def _plain(*values: Any) -> bool:
    return all(isinstance(v, int) for v in values)


def _divide(node: oir.Node, operands: list[np.ndarray]) -> np.ndarray | None:
    # ONNX integer division truncates; dims and positive constants make it a floor division.
    divisor = operands[1]
    if not all(isinstance(v, int) and v > 0 for v in divisor.flat):
        return None
    if any(isinstance(v, int) and v < 0 for v in operands[0].flat):
        return None

    def one(a: Any, b: Any) -> Any:
        return a // b if _plain(a, b) else tirx.truncdiv(emission.as_index(a), emission.as_index(b))

    return _elementwise(one)(node, operands)


def _gather(node: oir.Node, operands: list[np.ndarray]) -> np.ndarray | None:
    data, indices = operands
    if not all(isinstance(v, int) for v in indices.flat):
        return None
    axis = _attribute(node, "axis", 0)
    return _object(np.take(data, indices.astype(np.int64), axis=axis))


def _object(value: Any) -> np.ndarray:
    return value if isinstance(value, np.ndarray) else _array(value)


def _slice(node: oir.Node, operands: list[np.ndarray]) -> np.ndarray | None:
    data, *limits = operands
    if len(limits) < 2 or not all(isinstance(v, int) for o in limits for v in o.flat):
        return None
    starts, ends = (list(o.reshape(-1)) for o in limits[:2])
    axes = list(limits[2].reshape(-1)) if len(limits) > 2 else list(range(len(starts)))
    steps = list(limits[3].reshape(-1)) if len(limits) > 3 else [1] * len(starts)
    index = [slice(None)] * data.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        # A negative end beyond the front means "through element 0" when stepping back.
        stop = None if step < 0 and end < -data.shape[axis] else end
        index[axis] = slice(start, stop, step)
    return data[tuple(index)]


def _concat(node: oir.Node, operands: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(operands, axis=_attribute(node, "axis", 0))


def _unsqueeze(node: oir.Node, operands: list[np.ndarray]) -> np.ndarray | None:
    data, axes = operands
    if not all(isinstance(v, int) for v in axes.flat):
        return None
    return np.expand_dims(data, tuple(int(a) for a in axes.flat))


def _squeeze(node: oir.Node, operands: list[np.ndarray]) -> np.ndarray | None:
    axes = tuple(operands[1].flat) if len(operands) > 1 else None
    return operands[0].squeeze(axes)


def _reshape(node: oir.Node, operands: list[np.ndarray]) -> np.ndarray | None:
    data, shape = operands
    if not all(isinstance(v, int) for v in shape.flat) or _attribute(node, "allowzero", 0):
        return None
    dims = [data.shape[i] if d == 0 else d for i, d in enumerate(shape.flat)]
    return data.reshape(dims)


def _cast(node: oir.Node, operands: list[np.ndarray]) -> np.ndarray:
    return operands[0]


def _product(node: oir.Node, operands: list[np.ndarray]) -> np.ndarray | None:
    data = operands[0]
    axes = operands[1] if len(operands) > 1 else None
    keep = _attribute(node, "keepdims", 1)
    if data.ndim != 1 or (axes is not None and list(axes.flat) not in ([0], [-1])):
        return None
    total: Any = 1
    for element in data:
        total = total * element
    return np.array([total], dtype=object) if keep else _array(total)


_TABLE: dict[str, Callable[[oir.Node, list[np.ndarray]], np.ndarray | None]] = {
    "Add": _elementwise(lambda a, b: a + b),
    "Sub": _elementwise(lambda a, b: a - b),
    "Mul": _elementwise(lambda a, b: a * b),
    "Div": _divide,
    "Max": lambda node, o: _elementwise(_maximum)(node, o) if len(o) == 2 else None,
    "Min": lambda node, o: _elementwise(_minimum)(node, o) if len(o) == 2 else None,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "Cast": _cast,
    "Identity": _cast,
    "ReduceProd": _product,
}
