"""Evaluation of one node on arrays: NumPy for common operators, onnx's reference for the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as oir
from onnx.reference import ReferenceEvaluator
from onnx.reference.ops import load_op

Array = np.ndarray
Evaluator = Callable[[oir.Node, Sequence[Array | None]], Array]


class EvaluationError(Exception):
    """The node has no value for these arrays, or none that can be computed here; the text says why."""


_TABLE: dict[str, Evaluator] = {}
_FLOATS = tuple(np.dtype(t) for t in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16))


def evaluate(node: oir.Node, arrays: Sequence[Array | None], *, limit: int, opset: int) -> list[Array]:
    """Return the outputs of ``node``, in the dtypes and shapes that ONNX prescribes for ``opset``.

    ``limit`` bounds the bytes of an output whose size is the content of an input. Raises EvaluationError.
    """
    _check_size(node, arrays, limit)
    evaluator = _TABLE.get(node.op_type)
    if node.op_type == "Cast" and arrays[0] is not None and node.outputs[0].dtype is not None:
        evaluator = _cast if _has_cheap_cast(arrays[0].dtype, node.outputs[0].dtype.numpy()) else None
    try:
        with np.errstate(all="ignore"):
            if evaluator is not None and len(node.outputs) == 1:
                results = [evaluator(node, arrays)]
            else:
                results = _reference(node, arrays, opset)
    except (ValueError, TypeError, IndexError, ArithmeticError, NotImplementedError, RuntimeError) as error:
        raise EvaluationError(f"cannot be evaluated: {error}") from error
    if len(results) < len(node.outputs):
        raise EvaluationError(f"evaluated to {len(results)} outputs instead of {len(node.outputs)}")
    converted = []
    # The reference computes optional outputs at the end also where the node leaves them out.
    for value, result in zip(node.outputs, results, strict=False):
        if not isinstance(result, (np.ndarray, np.generic)) or value.dtype is None:
            raise EvaluationError(f"{value.name} is no tensor")
        array = np.asarray(result)
        if array.dtype != value.dtype.numpy():
            raise EvaluationError(f"evaluated as {array.dtype} instead of {value.dtype}")
        converted.append(array)
    return converted


def _check_size(node: oir.Node, arrays: Sequence[Array | None], limit: int) -> None:
    """Refuse what would be too large before it is computed."""
    size = 0
    if node.op_type == "ConstantOfShape" and arrays[0] is not None:
        size = math.prod(int(n) for n in arrays[0]) * 8
    elif node.op_type == "Expand" and arrays[0] is not None and arrays[1] is not None:
        size = math.prod(max(int(n), 1) for n in arrays[1]) * arrays[0].itemsize
    elif node.op_type == "Tile" and arrays[0] is not None and arrays[1] is not None:
        size = math.prod(int(n) for n in arrays[1]) * arrays[0].nbytes
    if size > limit:
        raise EvaluationError(f"the result would be larger than {limit} bytes")


def _reference(node: oir.Node, arrays: Sequence[Array | None], opset: int) -> list[Any]:
    context = {"log": lambda *_: None, "opsets": {"": opset}, "verbose": 0, "new_ops": None}
    implementation = load_op("", node.op_type, opset, evaluator_cls=ReferenceEvaluator)(oir.to_proto(node), context)
    return list(implementation.run(*arrays))


def _register(*op_types: str) -> Callable[[Evaluator], Evaluator]:
    def add(evaluator: Evaluator) -> Evaluator:
        for op_type in op_types:
            _TABLE[op_type] = evaluator
        return evaluator

    return add


def _int(node: oir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else default


def _given(arrays: Sequence[Array | None], index: int) -> Array:
    array = arrays[index] if index < len(arrays) else None
    if array is None:
        raise ValueError(f"input {index} is missing")
    return array


def _unary(function: Callable[[Array], Array]) -> Evaluator:
    def evaluator(_: oir.Node, arrays: Sequence[Array | None]) -> Array:
        x = _given(arrays, 0)
        return np.asarray(function(x)).astype(x.dtype, copy=False)

    return evaluator


def _binary(function: Callable[[Array, Array], Array], *, logical: bool = False) -> Evaluator:
    def evaluator(_: oir.Node, arrays: Sequence[Array | None]) -> Array:
        a, b = _given(arrays, 0), _given(arrays, 1)
        result = np.asarray(function(a, b))
        return result if logical else result.astype(a.dtype, copy=False)

    return evaluator


def _divide(a: Array, b: Array) -> Array:
    if a.dtype.kind not in "iu":
        return np.asarray(a / b)
    if not np.all(b):
        raise ZeroDivisionError("integer division by zero")
    # ONNX divides integers towards zero.
    quotient = np.abs(a) // np.abs(b)
    return np.asarray(np.where((a < 0) != (b < 0), -quotient, quotient) if a.dtype.kind == "i" else quotient)


_TABLE.update(
    {
        "Identity": _unary(lambda x: x),
        "Abs": _unary(np.abs),
        "Neg": _unary(np.negative),
        "Sqrt": _unary(np.sqrt),
        "Exp": _unary(np.exp),
        "Log": _unary(np.log),
        "Floor": _unary(np.floor),
        "Ceil": _unary(np.ceil),
        "Reciprocal": _unary(np.reciprocal),
        "Sin": _unary(np.sin),
        "Cos": _unary(np.cos),
        "Relu": _unary(lambda x: np.maximum(x, x.dtype.type(0))),
        "Not": _unary(np.logical_not),
        "Add": _binary(np.add),
        "Sub": _binary(np.subtract),
        "Mul": _binary(np.multiply),
        "Div": _binary(_divide),
        "Equal": _binary(np.equal, logical=True),
        "Greater": _binary(np.greater, logical=True),
        "GreaterOrEqual": _binary(np.greater_equal, logical=True),
        "Less": _binary(np.less, logical=True),
        "LessOrEqual": _binary(np.less_equal, logical=True),
        "And": _binary(np.logical_and, logical=True),
        "Or": _binary(np.logical_or, logical=True),
        "MatMul": _binary(np.matmul),
    }
)


def _has_cheap_cast(source: np.dtype[Any], target: np.dtype[Any]) -> bool:
    """Tell whether NumPy's cast is ONNX's: not so from float to integer, and for saturating float8 types."""
    return (target in _FLOATS and (source in _FLOATS or source.kind in "iub")) or (
        source.kind in "iub" and target.kind in "iub"
    )


def _cast(node: oir.Node, arrays: Sequence[Array | None]) -> Array:
    return _given(arrays, 0).astype(oir.DataType(node.attributes["to"].as_int()).numpy())


@_register("Transpose")
def _transpose(node: oir.Node, arrays: Sequence[Array | None]) -> Array:
    attribute = node.attributes.get("perm")
    return _given(arrays, 0).transpose(attribute.as_ints() if attribute is not None else None)


@_register("Reshape")
def _reshape(node: oir.Node, arrays: Sequence[Array | None]) -> Array:
    x, target = _given(arrays, 0), [int(n) for n in _given(arrays, 1)]
    if not _int(node, "allowzero", 0):
        target = [x.shape[i] if n == 0 else n for i, n in enumerate(target)]
    return x.reshape(target)


@_register("Unsqueeze")
def _unsqueeze(_: oir.Node, arrays: Sequence[Array | None]) -> Array:
    return np.expand_dims(_given(arrays, 0), tuple(int(a) for a in _given(arrays, 1)))


@_register("Squeeze")
def _squeeze(_: oir.Node, arrays: Sequence[Array | None]) -> Array:
    x = _given(arrays, 0)
    if len(arrays) < 2 or arrays[1] is None:
        return x.squeeze()
    return x.squeeze(tuple(int(a) for a in arrays[1]))


@_register("Concat")
def _concat(node: oir.Node, arrays: Sequence[Array | None]) -> Array:
    return np.concatenate([_given(arrays, i) for i in range(len(arrays))], axis=_int(node, "axis", 0))


@_register("Gather")
def _gather(node: oir.Node, arrays: Sequence[Array | None]) -> Array:
    return np.asarray(np.take(_given(arrays, 0), _given(arrays, 1), axis=_int(node, "axis", 0)))


@_register("Slice")
def _slice(_: oir.Node, arrays: Sequence[Array | None]) -> Array:
    x = _given(arrays, 0)
    starts, ends = ([int(n) for n in _given(arrays, i)] for i in (1, 2))
    axes = [int(n) for n in _optional(arrays, 3, range(len(starts)))]
    steps = [int(n) for n in _optional(arrays, 4, [1] * len(starts))]
    index = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index[axis] = clamp_slice(x.shape[axis], start, end, step)
    return x[tuple(index)]


def clamp_slice(size: int, start: int, end: int, step: int) -> slice:
    """Return the Python slice for ONNX's Slice along an axis of ``size`` (negative ends, clamping)."""
    start, end = (n + size if n < 0 else n for n in (start, end))
    if step > 0:
        return slice(min(max(start, 0), size), min(max(end, 0), size), step)
    first, last = min(max(start, 0), size - 1), min(max(end, -1), size - 1)
    return slice(first, None if last < 0 else last, step)


def _optional(arrays: Sequence[Array | None], index: int, default: Sequence[int]) -> Sequence[int]:
    array = arrays[index] if index < len(arrays) else None
    return default if array is None else [int(n) for n in array]


@_register("Expand")
def _expand(_: oir.Node, arrays: Sequence[Array | None]) -> Array:
    x, target = _given(arrays, 0), tuple(int(n) for n in _given(arrays, 1))
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, target)).copy()


@_register("Where")
def _where(_: oir.Node, arrays: Sequence[Array | None]) -> Array:
    return np.where(_given(arrays, 0), _given(arrays, 1), _given(arrays, 2))
