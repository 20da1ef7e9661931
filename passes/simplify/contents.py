"""What integer tensors hold: evaluation of shape arithmetic on integers and expressions of dims.

``Shape -> Cast -> Mul -> Floor -> Cast -> Concat`` chains are evaluated element by element: an element is an ``int``, a
``bool`` or a sympy expression. Floating point steps are followed only as long as they are exact for sizes below
2**14, or are rounded to an integer right after one division (correctly rounded quotients of integers below
2**24 have the floor and the ceiling of the true quotient).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
import onnx_ir as oir
import sympy

from optc.ir.dims import dim_names, to_expr
from optc.passes.match import constant
from optc.passes.rewrite import subgraphs
from optc.passes.simplify.evaluate import clamp_slice

Element = Any  # int, bool or sympy.Expr: mypy does not see into sympy
Array = np.ndarray

MAX_ELEMENTS = 64
_INTEGERS = (oir.DataType.INT64, oir.DataType.INT32)
_FLOATS = (oir.DataType.FLOAT, oir.DataType.DOUBLE)
_TYPES = (*_INTEGERS, *_FLOATS, oir.DataType.BOOL)
_FLOAT_GRID = 1 << 10  # floats are followed in units of 1/1024


class _UnknownError(Exception):
    """An element cannot be told."""


class Contents:
    """The contents of the small integer, boolean and (on the way) float tensors of a model, where known."""

    def __init__(self, model: oir.Model) -> None:
        self._known: dict[oir.Value, Array] = {}
        # Only the names of input dims stand for sizes of at least 1; a size found at run time may be 0.
        self._positive = frozenset(dim_names(model))
        self._visit(model.graph)

    def get(self, value: oir.Value | None) -> Array | None:
        """Return an object array of the elements of ``value`` in its shape, or None. Do not change it."""
        if value is None or value.dtype not in _TYPES:
            return None
        if value in self._known:
            return self._known[value]
        if not value.is_initializer() or value.const_value is None or value.const_value.size > MAX_ELEMENTS:
            return None
        array = constant(value)
        found = _objects(array) if array is not None else None
        if found is not None:
            self._known[value] = found
        return found

    def integers(self, value: oir.Value | None) -> list[int] | None:
        """Return the elements of ``value``, flattened, if all are integers."""
        array = self.get(value)
        if array is None or not all(isinstance(e, int) for e in array.reshape(-1)):
            return None
        return [int(e) for e in array.reshape(-1)]

    def _visit(self, graph: oir.Graph) -> None:
        for node in graph:
            for subgraph in subgraphs(node):
                self._visit(subgraph)
            if node.domain != "" or any(v.dtype not in _TYPES for v in node.outputs):
                continue
            try:
                results = self._node(node)
            except (_UnknownError, ValueError, IndexError, TypeError):
                continue  # ill-shaped operands: leave the node to whoever reports errors
            for value, result in zip(node.outputs, results, strict=True):
                if result.size <= MAX_ELEMENTS and value.shape is not None and result.ndim == len(value.shape):
                    self._known[value] = result

    def _node(self, node: oir.Node) -> list[Array]:
        if node.op_type in ("Shape", "Size"):
            return [self._shape(node)]
        function = _TABLE.get(node.op_type)
        if function is None:
            raise _UnknownError
        arrays = [self.get(value) for value in node.inputs]
        if any(a is None for a, v in zip(arrays, node.inputs, strict=True) if v is not None):
            raise _UnknownError
        return function(_Site(node, arrays, self._positive))

    def _shape(self, node: oir.Node) -> Array:
        value = node.inputs[0]
        if value is None or value.shape is None:
            raise _UnknownError
        dims = [dim_expr(d) for d in value.shape]
        if node.op_type == "Size":
            return _array(reduce(operator.mul, dims, 1), ())
        rank = len(dims)
        start, end = (
            node.attributes[k].as_int() if k in node.attributes else d for k, d in (("start", 0), ("end", rank))
        )
        chosen = dims[clamp_slice(rank, start, end, 1)]
        return _array(chosen, (len(chosen),))


def dim_expr(dim: int | oir.SymbolicDim) -> Element:
    """Return a dim as an int or a sympy expression; an anonymous dim is unknown and raises."""
    if isinstance(dim, int):
        return dim
    if dim.value is None:
        raise _UnknownError
    return _integer(to_expr(dim))


def same(a: Element, b: Element) -> bool:
    """Tell whether two elements are surely equal."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(a == b) or sympy.expand(a - b) == 0


def _integer(expr: Element) -> Element:
    return int(expr) if getattr(expr, "is_Integer", False) else expr


def _array(elements: Any, shape: tuple[int, ...]) -> Array:
    result = np.empty(shape, dtype=object)
    if shape:
        result[...] = np.array([*elements, None], dtype=object)[:-1].reshape(shape)
    else:
        result[()] = elements
    return result


def _objects(array: Array) -> Array | None:
    elements: list[Element] = []
    for item in array.reshape(-1).tolist():
        if isinstance(item, float):
            if not np.isfinite(item) or (item * _FLOAT_GRID) % 1:
                return None
            item = _integer(sympy.Rational(int(item * _FLOAT_GRID), _FLOAT_GRID))
        elements.append(item)
    return _array(elements if array.shape else elements[0], array.shape)


class _Site:
    """A node with the contents of its inputs."""

    def __init__(self, node: oir.Node, arrays: Sequence[Array | None], positive: frozenset[str]) -> None:
        self.node = node
        self.arrays = arrays
        self.positive = positive

    def __getitem__(self, index: int) -> Array:
        array = self.arrays[index]
        if array is None:
            raise _UnknownError
        return array

    def optional(self, index: int) -> Array | None:
        return self.arrays[index] if index < len(self.arrays) else None

    def ints(self, index: int) -> list[int]:
        """Return the integers of an input; raises when there are symbols among them."""
        elements = list(self[index].reshape(-1))
        if not all(isinstance(e, int) for e in elements):
            raise _UnknownError
        return elements

    def attribute(self, name: str, default: int) -> int:
        return self.node.attributes[name].as_int() if name in self.node.attributes else default

    @property
    def is_float(self) -> bool:
        return self.node.inputs[0] is not None and self.node.inputs[0].dtype in _FLOATS

    def sign(self, expr: Element) -> int:
        """Return -1, 0 or 1; raises where the sign is not certain."""
        if isinstance(expr, int) or expr.is_Number:
            return int(expr > 0) - int(expr < 0)
        if all(str(s) in self.positive for s in expr.free_symbols):
            expr = sympy.expand(expr)
            for sign, answer in ((0, expr.is_zero), (1, expr.is_positive), (-1, expr.is_negative)):
                if answer:
                    return sign
        raise _UnknownError

    def nonnegative(self, expr: Element) -> bool:
        """Tell whether an expression is surely not negative; sizes found at run time are not either."""
        if isinstance(expr, int) or expr.is_Number:
            return bool(expr >= 0)
        if all(str(s) in self.positive for s in expr.free_symbols):
            return bool(expr.is_nonnegative)
        return bool(all(f.is_Symbol or f.is_nonnegative for f in sympy.Mul.make_args(expr)))


_TABLE: dict[str, Callable[[_Site], list[Array]]] = {}


def _register(*op_types: str) -> Callable[[Callable[[_Site], Array]], Callable[[_Site], Array]]:
    def add(function: Callable[[_Site], Array]) -> Callable[[_Site], Array]:
        for op_type in op_types:
            _TABLE[op_type] = lambda site: [function(site)]
        return function

    return add


def _map(function: Callable[..., Element], *arrays: Array) -> Array:
    broadcast = np.broadcast_arrays(*arrays)
    elements = [function(*items) for items in zip(*(a.reshape(-1) for a in broadcast), strict=True)]
    shape = broadcast[0].shape
    return _array(elements if shape else elements[0], shape)


def _require_exact(*elements: Element) -> None:
    """Raise unless float arithmetic on the elements is exact: multiples of 1/1024."""
    for element in elements:
        if not isinstance(element, int) and not (element * _FLOAT_GRID).is_integer:
            raise _UnknownError


def _arithmetic(function: Callable[[Element, Element], Element]) -> Callable[[_Site], list[Array]]:
    def evaluate(site: _Site) -> list[Array]:
        def element(a: Element, b: Element) -> Element:
            if site.is_float:
                _require_exact(a, b)
            return _integer(function(a, b))

        return [reduce(lambda a, b: _map(element, a, b), [site[i] for i in range(len(site.arrays))])]

    return evaluate


def _extremum(pick_larger: bool) -> Callable[[_Site], list[Array]]:
    def evaluate(site: _Site) -> list[Array]:
        def element(a: Element, b: Element) -> Element:
            try:
                return a if (site.sign(a - b) >= 0) == pick_larger else b
            except _UnknownError:
                return (sympy.Max if pick_larger else sympy.Min)(a, b)

        return [reduce(lambda a, b: _map(element, a, b), [site[i] for i in range(len(site.arrays))])]

    return evaluate


def _comparison(test: Callable[[int], bool]) -> Callable[[_Site], list[Array]]:
    return lambda site: [_map(lambda a, b: test(site.sign(a - b)), site[0], site[1])]


def _reduction(function: Callable[[Element, Element], Element], empty: int) -> Callable[[_Site], list[Array]]:
    """Reductions of a whole vector, the only ones that shape arithmetic uses."""

    def evaluate(site: _Site) -> list[Array]:
        axes = site.optional(1)
        if site[0].ndim != 1 or site.is_float or (axes is None and site.attribute("noop_with_empty_axes", 0)):
            raise _UnknownError
        result = _integer(reduce(function, site[0], empty))
        return [_array([result], (1,)) if site.attribute("keepdims", 1) else _array(result, ())]

    return evaluate


_TABLE.update(
    {
        "Identity": lambda site: [site[0]],
        "Add": _arithmetic(operator.add),
        "Sub": _arithmetic(operator.sub),
        "Mul": _arithmetic(operator.mul),
        "Max": _extremum(True),
        "Min": _extremum(False),
        "Neg": lambda site: [_map(operator.neg, site[0])],
        "Equal": _comparison(lambda sign: sign == 0),
        "Less": _comparison(lambda sign: sign < 0),
        "LessOrEqual": _comparison(lambda sign: sign <= 0),
        "Greater": _comparison(lambda sign: sign > 0),
        "GreaterOrEqual": _comparison(lambda sign: sign >= 0),
        "Not": lambda site: [_map(lambda a: not a, site[0])],
        "And": lambda site: [_map(lambda a, b: a and b, site[0], site[1])],
        "Or": lambda site: [_map(lambda a, b: a or b, site[0], site[1])],
        "ReduceProd": _reduction(operator.mul, 1),
        "ReduceSum": _reduction(operator.add, 0),
    }
)


@_register("Div")
def _div(site: _Site) -> Array:
    def element(a: Element, b: Element) -> Element:
        if isinstance(b, int) and b == 0:
            raise _UnknownError
        if site.is_float:
            _require_exact(a, b)
            return _integer(sympy.sympify(a) / b)
        if isinstance(a, int) and isinstance(b, int):
            return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
        if not (site.nonnegative(a) and site.sign(b) > 0):
            raise _UnknownError  # ONNX rounds towards zero
        return _integer(sympy.floor(sympy.sympify(a) / b))

    return _map(element, site[0], site[1])


@_register("Mod")
def _mod(site: _Site) -> Array:
    def element(a: Element, b: Element) -> Element:
        if site.is_float or site.sign(b) <= 0 or (site.attribute("fmod", 0) and not site.nonnegative(a)):
            raise _UnknownError
        return _integer(sympy.Mod(a, b))

    return _map(element, site[0], site[1])


@_register("Floor")
def _floor(site: _Site) -> Array:
    return _map(lambda a: a if isinstance(a, int) else _integer(sympy.floor(a)), site[0])


@_register("Ceil")
def _ceil(site: _Site) -> Array:
    return _map(lambda a: a if isinstance(a, int) else _integer(sympy.ceiling(a)), site[0])


@_register("Cast")
def _cast(site: _Site) -> Array:
    target = site.node.outputs[0].dtype
    source = site.node.inputs[0].dtype if site.node.inputs[0] is not None else None

    def element(a: Element) -> Element:
        if target == oir.DataType.BOOL:
            return a if isinstance(a, bool) else site.sign(a) != 0
        if isinstance(a, bool):
            return int(a)
        if source in _FLOATS and target in _INTEGERS and not isinstance(a, int) and not a.is_integer:
            if not site.nonnegative(a):
                raise _UnknownError  # rounds towards zero
            return _integer(sympy.floor(a))
        return a

    return _map(element, site[0])


@_register("Where")
def _where(site: _Site) -> Array:
    return _map(lambda c, a, b: a if c else b, site[0], site[1], site[2])


@_register("Gather")
def _gather(site: _Site) -> Array:
    indices = np.array(site.ints(1), dtype=np.int64).reshape(site[1].shape)
    result = np.take(site[0], indices, axis=site.attribute("axis", 0))
    return result if isinstance(result, np.ndarray) else _array(result, ())


@_register("Slice")
def _slice(site: _Site) -> Array:
    data = site[0]
    steps = site.ints(4) if site.optional(4) is not None else [1]
    if data.ndim != 1 or len(site.ints(1)) != 1:
        raise _UnknownError
    return data[clamp_slice(len(data), site.ints(1)[0], site.ints(2)[0], steps[0])]


@_register("Concat")
def _concat(site: _Site) -> Array:
    arrays = [site[i] for i in range(len(site.arrays))]
    return np.concatenate(arrays, axis=site.attribute("axis", 0))


@_register("Unsqueeze")
def _unsqueeze(site: _Site) -> Array:
    return np.expand_dims(site[0], tuple(site.ints(1)))


@_register("Squeeze")
def _squeeze(site: _Site) -> Array:
    return np.squeeze(site[0], tuple(site.ints(1)) if site.optional(1) is not None else None)


@_register("Reshape")
def _reshape(site: _Site) -> Array:
    target = site.ints(1)
    if not site.attribute("allowzero", 0):
        target = [site[0].shape[i] if n == 0 else n for i, n in enumerate(target)]
    return site[0].reshape(target)


@_register("Expand")
def _expand(site: _Site) -> Array:
    shape = np.broadcast_shapes(site[0].shape, tuple(site.ints(1)))
    if np.prod(shape, dtype=np.int64) > MAX_ELEMENTS:
        raise _UnknownError
    return np.broadcast_to(site[0], shape)


@_register("ConstantOfShape")
def _constant_of_shape(site: _Site) -> Array:
    shape = tuple(site.ints(0))
    attribute = site.node.attributes.get("value")
    fill = attribute.as_tensor().numpy().reshape(-1)[0].item() if attribute is not None else 0.0
    if np.prod(shape, dtype=np.int64) > MAX_ELEMENTS or isinstance(fill, float):
        raise _UnknownError
    return _array([fill] * int(np.prod(shape, dtype=np.int64)), shape) if shape else _array(fill, ())


@_register("Range")
def _range(site: _Site) -> Array:
    elements = range(*(site.ints(i)[0] for i in range(3)))
    if site.is_float or len(elements) > MAX_ELEMENTS:
        raise _UnknownError
    return _array(elements, (len(elements),))


def _split(site: _Site) -> list[Array]:
    data, count = site[0], len(site.node.outputs)
    if data.ndim != 1:
        raise _UnknownError
    sizes = site.ints(1) if site.optional(1) is not None else None
    if sizes is None:
        chunk = -(-len(data) // count)
        sizes = [min(chunk, len(data) - i * chunk) for i in range(count)]
    return np.split(data, np.cumsum(sizes)[:-1])


_TABLE["Split"] = _split
