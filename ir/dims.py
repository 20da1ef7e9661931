"""Dimensions: integers, names, and expressions over names, and how they turn into sympy expressions and back.

Every symbol stands for an integer of at least 1: a dimension of size 0 is legal ONNX but is not what a
symbolic dimension promises, and simplification (``Max(1, n) == n``) relies on it.

The text of a symbolic dimension is a name (``batch``), or an expression with ``+ - * / // % **`` and the functions
``floor``, ``Min``, ``Max``, ``Mod`` and ``sqrt``: the language that onnx-ir parses. It has no ``ceiling``: see
``normalize``.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import onnx_ir as oir

from optc.errors import InvalidModelError, IRError

if TYPE_CHECKING:
    import sympy

Dim = int | oir.SymbolicDim

_IDENTIFIER = re.compile(r"[^\W\d][\w.]*")
_NAME = re.compile(r"[^\W\d][\w.]*\Z")
_FUNCTIONS = frozenset({"floor", "ceiling", "Min", "min", "Max", "max", "Mod", "mod", "sqrt"})
_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def is_name(text: str) -> bool:
    """Tell whether ``text`` is one dimension name (letters, digits, ``_`` and ``.``, not starting with a digit)."""
    return _NAME.match(text) is not None


def names(text: str) -> set[str]:
    """Return the dimension names in the text of a dimension."""
    if is_name(text):
        return {text}
    return {m[0] for m in _IDENTIFIER.finditer(text) if not _is_call(text, m)}


def _is_call(text: str, match: re.Match[str]) -> bool:
    return match[0] in _FUNCTIONS and text[match.end() :].lstrip().startswith("(")


def to_expr(dim: Dim | str) -> sympy.Expr:
    """Return the sympy expression of a dimension; its symbols are positive integers.

    Raises IRError for an anonymous dimension or a text that is no expression.
    """
    import sympy

    if isinstance(dim, int):
        return sympy.Integer(dim)
    text = dim if isinstance(dim, str) else dim.value
    if text is None:
        raise IRError("an anonymous dimension has no expression")
    return _parse(text)


@lru_cache(maxsize=65536)
def _parse(text: str) -> sympy.Expr:
    """Parse through Python's own grammar; names are replaced first, since ``x.1_dim`` is none of Python's."""
    import sympy

    found: list[str] = []

    def placeholder(match: re.Match[str]) -> str:
        if _is_call(text, match):
            return match[0]
        found.append(match[0])
        return f"_{len(found) - 1}"

    try:
        tree = ast.parse(_IDENTIFIER.sub(placeholder, text).strip(), mode="eval").body
    except SyntaxError as error:
        raise IRError(f"dimension {text!r} is not an expression") from error

    def build(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int() as value):
                return sympy.Integer(value)
            case ast.Name(id=placeholder):
                return sympy.Symbol(found[int(placeholder[1:])], integer=True, positive=True)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -build(operand)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](build(left), build(right))
            case ast.Call(func=ast.Name(id=function), args=args, keywords=[]) if function in _FUNCTIONS:
                name = function if function in ("floor", "ceiling", "sqrt") else function.capitalize()
                return getattr(sympy, name)(*(build(a) for a in args))
        raise IRError(f"dimension {text!r} is not an expression")

    return build(tree)


def from_expr(expr: sympy.Expr | int) -> Dim:
    """Return the dimension for an integer-valued expression: an int when it is constant."""
    import sympy

    expr = normalize(sympy.sympify(expr))
    if expr.is_Integer:
        return int(expr)
    return oir.SymbolicDim(str(expr))


def normalize(expr: sympy.Expr) -> sympy.Expr:
    """Rewrite ceilings as floors and floors to one form, so that equal sizes get equal texts.

    For integer-valued n and x, and integer m > 0: ``ceiling(n/m)`` is ``floor((n + m - 1)/m)``, and
    ``floor((floor(x) + n)/m)`` is ``floor((x + n)/m)``: chains of strided layers nest one floor per layer otherwise.
    """
    import sympy

    if not expr.has(sympy.floor, sympy.ceiling):
        return expr
    arguments = [normalize(argument) for argument in expr.args]
    if isinstance(expr, sympy.floor):
        return _floor(arguments[0])
    if isinstance(expr, sympy.ceiling):
        return -_floor(-arguments[0])
    return expr.func(*arguments)


def _floor(argument: sympy.Expr) -> sympy.Expr:
    """Return ``floor(argument)``: leading term positive, constant part in [0, 1), inner floors merged."""
    import sympy

    terms = sympy.expand(argument).as_coefficients_dict()
    constant = terms.pop(sympy.S.One, sympy.S.Zero)
    fraction = constant - sympy.floor(constant)
    whole = sympy.Add(constant - fraction, *(c * t for t, c in terms.items() if (c * t).is_integer))
    terms = {t: c for t, c in terms.items() if not (c * t).is_integer}
    if not terms:
        return whole
    rest = sympy.Add(*(c * t for t, c in terms.items()))
    m = _denominator([fraction, *terms.values()])
    if rest.could_extract_minus_sign() and sympy.expand(m * rest).is_integer:
        return whole - _floor(sympy.Rational(m - 1, m) - rest - fraction)
    for term, factor in terms.items():
        others = sympy.expand((rest + fraction - factor * term) / factor)
        if isinstance(term, sympy.floor) and factor.is_positive and (1 / factor).is_integer and others.is_integer:
            return whole + _floor(rest + fraction + factor * (term.args[0] - term))
    return whole + sympy.floor(rest + fraction)


def _denominator(coefficients: Iterable[sympy.Expr]) -> int:
    """Return the least common multiple of the denominators."""
    import sympy

    return int(sympy.ilcm(1, *(c.q for c in coefficients if c.is_Rational)))


def maximum(a: Dim, b: Dim) -> Dim:
    """Return the larger of two dimensions: one of them where that is provable, else ``Max(a, b)``."""
    import sympy

    x, y = to_expr(a), to_expr(b)
    if _at_least(x, y):
        return a
    return b if _at_least(y, x) else from_expr(sympy.Max(x, y))


def _at_least(x: sympy.Expr, y: sympy.Expr) -> bool:
    """Tell whether x >= y is provable by bounding rounded quotients, as in 2*floor((n+3)/4) >= floor((n+1)/2)."""
    import sympy

    bound = difference = sympy.expand(x - y)
    for term, factor in difference.as_coefficients_dict().items():
        if isinstance(term, sympy.floor):
            argument = term.args[0]
            m = _denominator(argument.as_coefficients_dict().values())
            if not sympy.expand(m * argument).is_integer:
                return False
            # For an integer n, floor(n/m) lies between n/m - (m - 1)/m and n/m.
            slack = sympy.Rational(m - 1, m) if factor.is_positive else 0
            bound += factor * (argument - slack - term)
    # Both are integers: more than -1 is at least 0.
    return bool(sympy.expand(bound + 1).is_positive)


def evaluate(expr: sympy.Expr | int, dims: Mapping[str, int]) -> int:
    """Return the value of an expression for given dimensions.

    Raises IRError naming the dimensions that ``dims`` lacks.
    """
    if isinstance(expr, int):
        return expr
    missing = sorted(str(s) for s in expr.free_symbols if str(s) not in dims)
    if missing:
        raise IRError(f"no value for dimension {', '.join(missing)}", hint="give a size for each named dimension")
    result = expr.subs({s: dims[str(s)] for s in expr.free_symbols})
    if not result.is_number:
        raise IRError(f"{expr} has no value for {dict(dims)}")
    return int(result)


def substitute(dim: Dim, dims: Mapping[str, int]) -> Dim:
    """Replace the named dimensions inside ``dim`` by their sizes; others stay."""
    if isinstance(dim, int) or dim.value is None or not (names(dim.value) & dims.keys()):
        return dim
    if dim.value in dims:
        return dims[dim.value]
    expr = to_expr(dim)
    return from_expr(expr.subs({s: dims[str(s)] for s in expr.free_symbols if str(s) in dims}))


def all_values(graph: oir.Graph) -> Iterator[oir.Value]:
    """Yield every value of a graph and of its subgraphs once: inputs, initializers, node outputs."""
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
        for subgraph in subgraphs(node):
            yield from all_values(subgraph)


def subgraphs(node: oir.Node) -> list[oir.Graph]:
    """Return the graphs that are attributes of ``node``."""
    found: list[oir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == oir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == oir.AttributeType.GRAPHS:
            found.extend(attribute.as_graphs())
    return found


def used_names(values: Iterable[oir.Value]) -> set[str]:
    """Return the dimension names that occur in the shapes of ``values``."""
    texts = {d.value for v in values if v.shape is not None for d in v.shape if not isinstance(d, int)}
    found: set[str] = set()
    for text in texts:
        if text is not None:
            found |= names(text)
    return found


def dim_names(model: oir.Model) -> tuple[str, ...]:
    """Return the names of the dimensions of the model's inputs, in order of appearance.

    These are what a user can bind. Names that only occur on intermediate values are sizes known at run time.
    """
    found: dict[str, None] = {}
    for value in model.graph.inputs:
        for dim in value.shape or ():
            if not isinstance(dim, int) and dim.value is not None:
                found.update(dict.fromkeys(sorted(names(dim.value))))
    return tuple(found)


def bind(model: oir.Model, sizes: Mapping[str, int]) -> None:
    """Give named dimensions a size, in place, everywhere they occur: inputs, values, expressions, subgraphs.

    Raises InvalidModelError for an unknown name, a size below 1, or sizes that make a dimension impossible.
    """
    if not sizes:
        return
    known = dim_names(model)
    unknown = [name for name in sizes if name not in known]
    if unknown:
        raise InvalidModelError(
            f"the model has no dimension named {', '.join(map(repr, unknown))}",
            hint=f"its dimensions are: {', '.join(known) or '(none: all sizes are fixed)'}",
        )
    for name, size in sizes.items():
        if size < 1:
            raise InvalidModelError(f"dimension {name!r} cannot have size {size}", hint="sizes start at 1")
    cache: dict[str | None, Dim] = {}

    def convert(dim: Dim) -> Dim:
        if isinstance(dim, int):
            return dim
        if dim.value not in cache:
            cache[dim.value] = substitute(dim, sizes)
        return cache[dim.value]

    for value in _once(all_values(model.graph)):
        if value.shape is None or value.shape.is_static():
            continue
        dims = [convert(d) for d in value.shape]
        if any(isinstance(d, int) and d < 0 for d in dims):
            raise InvalidModelError(
                f"value {value.name!r} of shape {value.shape} has no legal size for {dict(sizes)}",
                hint="choose larger sizes",
            )
        value.shape = oir.Shape(dims)


def _once(values: Iterable[oir.Value]) -> Iterator[oir.Value]:
    seen: set[int] = set()
    for value in values:
        if id(value) not in seen:
            seen.add(id(value))
            yield value


def name_input_dims(graph: oir.Graph) -> set[str]:
    """Give the inputs of a graph legal dimension names, in place, and return all names then in use.

    An anonymous dimension, a negative number, or a text without any letter (Paddle writes ``?``) gets a fresh name
    of its own. An expression over names of other input dimensions stays. Any other text becomes a legal
    name, the same one wherever the text occurs, because ONNX takes equal texts for equal sizes.
    """
    plain = {
        d.value
        for value in graph.inputs
        for d in value.shape or ()
        if not isinstance(d, int) and d.value is not None and is_name(d.value)
    }
    used = set(plain)
    renamed: dict[str, str] = {}

    def fresh(stem: str) -> str:
        stem = re.sub(r"\W+", "_", stem).strip("_") or "dim"
        stem = stem if not stem[0].isdigit() else f"_{stem}"
        candidate, count = stem, 0
        while candidate in used:
            count += 1
            candidate = f"{stem}_{count}"
        used.add(candidate)
        return candidate

    def legal(value: oir.Value, axis: int, dim: Dim) -> Dim:
        if isinstance(dim, int) and dim >= 0:
            return dim
        text = "" if isinstance(dim, int) else dim.value or ""
        if text in plain:
            return dim
        if not any(c.isalpha() for c in text):
            return oir.SymbolicDim(fresh(f"{value.name}_dim{axis}"))
        if names(text) <= plain and is_expression(text):
            return from_expr(to_expr(text))
        if text not in renamed:
            renamed[text] = fresh(text)
        return oir.SymbolicDim(renamed[text])

    for value in graph.inputs:
        if value.shape is not None and any(not isinstance(d, int) or d < 0 for d in value.shape):
            value.shape = oir.Shape([legal(value, axis, dim) for axis, dim in enumerate(value.shape)])
    return used


def is_expression(text: str) -> bool:
    """Tell whether ``text`` can be read as an expression over dimension names."""
    try:
        to_expr(text)
    except IRError:
        return False
    return True


def canonical(dims: Iterable[Dim]) -> list[Dim]:
    """Bring expressions to one form: a constant is an int, roundings are normal (``normalize``)."""
    return [d if isinstance(d, int) or d.value is None else _canonical(d.value) for d in dims]


@lru_cache(maxsize=65536)
def _canonical(text: str) -> Dim:
    return oir.SymbolicDim(text) if is_name(text) else from_expr(_parse(text))
