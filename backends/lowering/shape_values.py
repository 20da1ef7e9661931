"""Symbolic evaluation of shape arithmetic: NumPy on object arrays of ints, bools and TIR expressions.

``Shape -> Gather -> Mul -> Concat -> Reshape`` chains cost no kernel: their elements are expressions of the symbolic
dimensions. Sizes that exporters scale in floating point (``Cast -> Mul -> Floor -> Cast``) are kept as fractions while
that is exact. Every function returns None when it does not apply, and the node is lowered as an ordinary tensor op.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as oir
from tvm import tirx

from optc.backends.lowering import emit as emission

if TYPE_CHECKING:
    from optc.backends.lowering.lower import Lowerer

_INTEGER = {oir.DataType.INT64, oir.DataType.INT32}
_TRACKED = _INTEGER | {oir.DataType.BOOL, oir.DataType.FLOAT}
_LIMIT = 1024
_FACTOR = 2**8
"""Constants with numerator and denominator up to this keep products with sizes exact in float32."""
_EXACT = 2**24
"""Integers up to this are exact in float32."""


@dataclass(frozen=True)
class Ratio:
    """A floating-point value that is exactly ``numerator / denominator``, the denominator a power of two."""

    numerator: Any
    denominator: int

    @property
    def number(self) -> float | None:
        """The value, if it involves no symbol."""
        return self.numerator / self.denominator if isinstance(self.numerator, int) else None

    def expression(self, dtype: str) -> Any:
        """Return the value as an expression of a floating-point type."""
        top = emission.as_index(self.numerator).astype(dtype)
        return top if self.denominator == 1 else top / tirx.const(self.denominator, dtype)


def number(element: Any) -> int | float | None:
    """Return an element as a Python number, None if it involves a symbol."""
    return element.number if isinstance(element, Ratio) else element if isinstance(element, int) else None


Function = Callable[[oir.Node, list[np.ndarray], "Lowerer"], "np.ndarray | None"]


def evaluate(node: oir.Node, lowerer: Lowerer) -> np.ndarray | None:
    """Return the known elements of the only output of ``node``, or None."""
    if node.domain != "" or len(node.outputs) != 1 or node.outputs[0].dtype not in _TRACKED:
        return None
    if node.op_type in ("Shape", "Size"):
        return _shape(node, lowerer)
    function = _TABLE.get(node.op_type)
    if function is None:
        return None
    operands = []
    for value in node.inputs:
        if value is None:
            continue
        known = _known(value, lowerer)
        if known is None:
            return None
        operands.append(known)
    result = function(node, operands, lowerer)
    return result if result is None or result.size <= _LIMIT else None


def _known(value: oir.Value, lowerer: Lowerer) -> np.ndarray | None:
    if value in lowerer.integers:
        return lowerer.integers[value]
    if value.dtype not in _TRACKED or value in lowerer.tensors or value in lowerer.channels_last:
        return None
    array = lowerer.constant(value)
    if array is None or array.size > _LIMIT:
        return None
    elements = [_element(v) for v in array.reshape(-1).tolist()]
    if any(e is None for e in elements):
        return None
    return _filled(elements, array.shape)


def _element(value: Any) -> Any:
    """Return a constant as it is tracked; None for a float that products would not keep exact."""
    if not isinstance(value, float):
        return value
    if value != value or abs(value) == float("inf"):
        return None
    fraction = Fraction(value)
    if max(abs(fraction.numerator), fraction.denominator) > _FACTOR:
        return None
    return Ratio(fraction.numerator, fraction.denominator)


def _filled(elements: Any, shape: tuple[int, ...]) -> np.ndarray:
    result = np.empty(len(elements), dtype=object)
    for index, element in enumerate(elements):
        result[index] = element
    return result.reshape(shape)


def _attribute(node: oir.Node, name: str, default: Any) -> Any:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.value


def _shape(node: oir.Node, lowerer: Lowerer) -> np.ndarray | None:
    value = node.inputs[0]
    if value is None:
        return None
    dims = lowerer.shape(value)
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


def _elementwise(function: Callable[..., Any]) -> Function:
    """Apply ``function`` to broadcast elements; if it returns None for one, nothing is known."""

    def apply(node: oir.Node, operands: list[np.ndarray], lowerer: Lowerer) -> np.ndarray | None:
        arrays = np.broadcast_arrays(*operands)
        elements = []
        for values in zip(*(a.reshape(-1) for a in arrays), strict=True):
            element = function(*values)
            if element is None:
                return None
            elements.append(emission.plain(element))
        return _filled(elements, arrays[0].shape)

    return apply


def _arithmetic(function: Callable[[Any, Any], Any]) -> Function:
    """Apply an operation of integers to integers or to fractions of the same denominator."""

    def one(a: Any, b: Any) -> Any:
        if not isinstance(a, Ratio):
            return function(a, b)
        common = max(a.denominator, b.denominator)
        left = a.numerator * (common // a.denominator)
        right = b.numerator * (common // b.denominator)
        return Ratio(emission.plain(function(left, right)), common)

    return _elementwise(one)


def _multiply(a: Any, b: Any) -> Any:
    if not isinstance(a, Ratio):
        return a * b
    denominator = a.denominator * b.denominator
    numerator = emission.plain(a.numerator * b.numerator)
    if denominator > _FACTOR or (_plain(numerator) and abs(numerator) > _EXACT):
        return None
    return Ratio(numerator, denominator)


def _maximum(a: Any, b: Any) -> Any:
    return max(a, b) if _plain(a, b) else tirx.max(emission.as_index(a), emission.as_index(b))


def _minimum(a: Any, b: Any) -> Any:
    return min(a, b) if _plain(a, b) else tirx.min(emission.as_index(a), emission.as_index(b))


def _plain(*values: Any) -> bool:
    return all(isinstance(v, int) for v in values)


def _divide(a: Any, b: Any) -> Any:
    if isinstance(a, Ratio):
        if not isinstance(b.numerator, int) or b.numerator <= 0 or b.numerator & (b.numerator - 1):
            return None
        return _multiply(a, Ratio(b.denominator, b.numerator))
    # ONNX integer division truncates.
    if _plain(a, b):
        return None if b == 0 else int(Fraction(a, b))
    return tirx.truncdiv(emission.as_index(a), emission.as_index(b)) if _plain(b) and b > 0 else None


def _modulo(node: oir.Node, operands: list[np.ndarray], lowerer: Lowerer) -> np.ndarray | None:
    if _attribute(node, "fmod", 0) or not all(isinstance(v, int) and v > 0 for v in operands[1].flat):
        return None
    return _elementwise(
        lambda a, b: a % b if _plain(a, b) else tirx.floormod(emission.as_index(a), emission.as_index(b))
    )(node, operands, lowerer)


def _floor(a: Any) -> Any:
    return Ratio(_floor_div(a.numerator, a.denominator), 1)


def _ceil(a: Any) -> Any:
    return Ratio(_floor_div(a.numerator + (a.denominator - 1), a.denominator), 1)


def _floor_div(a: Any, b: int) -> Any:
    if b == 1:
        return a
    return a // b if _plain(a) else tirx.floordiv(a, emission.as_index(b))


def _compare(decide: Callable[[Any, Any], bool], holds: Callable[[Any, Any], Any]) -> Function:
    """Decide a comparison of integers where every legal size gives the same answer, else keep it as a condition."""

    def apply(node: oir.Node, operands: list[np.ndarray], lowerer: Lowerer) -> np.ndarray | None:
        def one(a: Any, b: Any) -> Any:
            if isinstance(a, Ratio):
                return None
            if _plain(a, b):
                return decide(a, b)
            condition = holds(emission.as_index(a), emission.as_index(b))
            if lowerer.analyzer.can_prove(condition):
                return True
            return False if lowerer.analyzer.can_prove(tirx.Not(condition)) else condition

        return _elementwise(one)(node, operands, lowerer)

    return apply


def _where(node: oir.Node, operands: list[np.ndarray], lowerer: Lowerer) -> np.ndarray | None:
    if not all(isinstance(v, bool) for v in operands[0].flat):
        return None
    return _elementwise(lambda c, a, b: a if c else b)(node, operands, lowerer)


def _logical(function: Callable[..., Any]) -> Function:
    def one(*values: Any) -> Any:
        return function(*values) if all(isinstance(v, bool) for v in values) else None

    return _elementwise(one)


def _absolute(node: oir.Node, operands: list[np.ndarray], lowerer: Lowerer) -> np.ndarray | None:
    def one(a: Any) -> Any:
        if isinstance(a, Ratio):
            return None
        return abs(a) if _plain(a) else a if lowerer.nonnegative(a) else None

    return _elementwise(one)(node, operands, lowerer)


def _negate(a: Any) -> Any:
    return Ratio(0 - a.numerator, a.denominator) if isinstance(a, Ratio) else 0 - a


def _range(node: oir.Node, operands: list[np.ndarray], lowerer: Lowerer) -> np.ndarray | None:
    start, limit, delta = (o.reshape(-1)[0] for o in operands)
    if not _plain(start, limit, delta) or delta == 0:
        return None
    return _filled(list(range(start, limit, delta))[: _LIMIT + 1], (-1,))


def _constant_of_shape(node: oir.Node, operands: list[np.ndarray], lowerer: Lowerer) -> np.ndarray | None:
    dims = list(operands[0].flat)
    if not _plain(*dims) or any(d < 0 for d in dims) or np.prod(dims, dtype=np.float64) > _LIMIT:
        return None
    attribute = node.attributes.get("value")
    if attribute is None:
        return None
    element = _element(attribute.as_tensor().numpy().reshape(-1)[0].item())
    return None if element is None else _filled([element] * int(np.prod(dims)), tuple(dims))


def _expand(node: oir.Node, operands: list[np.ndarray], lowerer: Lowerer) -> np.ndarray | None:
    data, dims = operands[0], list(operands[1].flat)
    if not _plain(*dims) or np.prod(dims, dtype=np.float64) * data.size > _LIMIT:
        return None
    return np.broadcast_to(data, np.broadcast_shapes(data.shape, tuple(dims)))


def _tile(node: oir.Node, operands: list[np.ndarray], lowerer: Lowerer) -> np.ndarray | None:
    data, repeats = operands[0], list(operands[1].flat)
    if not _plain(*repeats) or np.prod(repeats, dtype=np.float64) * data.size > _LIMIT:
        return None
    return np.tile(data, repeats)


def _gather(node: oir.Node, operands: list[np.ndarray], lowerer: Lowerer) -> np.ndarray | None:
    data, indices = operands
    if not all(isinstance(v, int) for v in indices.flat):
        return None
    axis = _attribute(node, "axis", 0)
    return _object(np.take(data, indices.astype(np.int64), axis=axis))


def _object(value: Any) -> np.ndarray:
    return value if isinstance(value, np.ndarray) else _array(value)


def _slice(node: oir.Node, operands: list[np.ndarray], lowerer: Lowerer) -> np.ndarray | None:
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


def _concat(node: oir.Node, operands: list[np.ndarray], lowerer: Lowerer) -> np.ndarray:
    return np.concatenate(operands, axis=_attribute(node, "axis", 0))


def _unsqueeze(node: oir.Node, operands: list[np.ndarray], lowerer: Lowerer) -> np.ndarray | None:
    data, axes = operands
    if not all(isinstance(v, int) for v in axes.flat):
        return None
    return np.expand_dims(data, tuple(int(a) for a in axes.flat))


def _squeeze(node: oir.Node, operands: list[np.ndarray], lowerer: Lowerer) -> np.ndarray | None:
    axes = tuple(operands[1].flat) if len(operands) > 1 else None
    return operands[0].squeeze(axes)


def _reshape(node: oir.Node, operands: list[np.ndarray], lowerer: Lowerer) -> np.ndarray | None:
    data, shape = operands
    if not all(isinstance(v, int) for v in shape.flat) or _attribute(node, "allowzero", 0):
        return None
    dims = [data.shape[i] if d == 0 else d for i, d in enumerate(shape.flat)]
    return data.reshape(dims)


def _is_condition(a: Any) -> bool:
    return not isinstance(a, int | Ratio) and str(a.ty.dtype) == "bool"


def _cast(node: oir.Node, operands: list[np.ndarray], lowerer: Lowerer) -> np.ndarray | None:
    kind = node.outputs[0].dtype

    def one(a: Any) -> Any:
        if _is_condition(a):
            return a if kind == oir.DataType.BOOL else None
        if isinstance(a, Ratio):
            if kind not in _INTEGER:
                return a if kind == oir.DataType.FLOAT else None
            # A cast truncates; that is rounding down for what is not negative.
            whole = _floor_div(a.numerator, a.denominator)
            if a.denominator == 1 or lowerer.nonnegative(a.numerator):
                return whole
            return int(Fraction(a.numerator, a.denominator)) if _plain(a.numerator) else None
        if kind == oir.DataType.FLOAT:
            return Ratio(int(a), 1) if _plain(a) else Ratio(a, 1)
        if kind == oir.DataType.BOOL:
            return bool(a) if _plain(a) else None
        return int(a) if _plain(a) else a

    return _elementwise(one)(node, operands, lowerer)


def _same(node: oir.Node, operands: list[np.ndarray], lowerer: Lowerer) -> np.ndarray:
    return operands[0]


def _reduce(combine: Callable[[Any, Any], Any], first: Any) -> Function:
    def apply(node: oir.Node, operands: list[np.ndarray], lowerer: Lowerer) -> np.ndarray | None:
        data = operands[0]
        axes = operands[1] if len(operands) > 1 else None
        if data.ndim != 1 or (axes is not None and list(axes.flat) not in ([0], [-1])):
            return None
        if any(isinstance(v, Ratio) for v in data) or (first is None and not data.size):
            return None
        total: Any = first
        for element in data:
            total = element if total is None else combine(total, element)
        return _filled([emission.plain(total)], (1,) if _attribute(node, "keepdims", 1) else ())

    return apply


def _pairwise(function: Callable[[Any, Any], Any]) -> Function:
    def apply(node: oir.Node, operands: list[np.ndarray], lowerer: Lowerer) -> np.ndarray | None:
        return _arithmetic(function)(node, operands, lowerer) if len(operands) == 2 else None

    return apply


_TABLE: dict[str, Function] = {
    "Add": _arithmetic(operator.add),
    "Sub": _arithmetic(operator.sub),
    "Mul": _elementwise(_multiply),
    "Div": _elementwise(_divide),
    "Mod": _modulo,
    "Max": _pairwise(_maximum),
    "Min": _pairwise(_minimum),
    "Neg": _elementwise(_negate),
    "Abs": _absolute,
    "Floor": _elementwise(_floor),
    "Ceil": _elementwise(_ceil),
    "Equal": _compare(operator.eq, tirx.EQ),
    "Less": _compare(operator.lt, lambda a, b: a < b),
    "LessOrEqual": _compare(operator.le, lambda a, b: a <= b),
    "Greater": _compare(operator.gt, lambda a, b: a > b),
    "GreaterOrEqual": _compare(operator.ge, lambda a, b: a >= b),
    "And": _logical(lambda a, b: a and b),
    "Or": _logical(lambda a, b: a or b),
    "Not": _logical(lambda a: not a),
    "Where": _where,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "Range": _range,
    "ConstantOfShape": _constant_of_shape,
    "Expand": _expand,
    "Tile": _tile,
    "Cast": _cast,
    "Identity": _same,
    "ReduceProd": _reduce(operator.mul, 1),
    "ReduceSum": _reduce(operator.add, 0),
    "ReduceMax": _reduce(_maximum, None),
    "ReduceMin": _reduce(_minimum, None),
}
