"""Control flow of Relax: functions for what runs conditionally, the joining of branches, and forks.

A fork is what becomes of an ``If`` whose branches give tensors of different rank, such as a ``Squeeze`` that only
happens if the size is 1: the rest of the graph is lowered twice, once behind each branch, where ranks are known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import onnx_ir as oir
import tvm
from tvm import relax, tirx

from optc.backends.lowering import emit as emission
from optc.backends.lowering import imperative
from optc.backends.lowering.site import Poisoned, Unsupported

if TYPE_CHECKING:
    from optc.backends.lowering.lower import Lowerer

FORK_LIMIT = 6
"""Forks inside of forks: the code doubles with each."""

Items = Iterable["oir.Node | Callable[[], None]"]


class Mismatch(Exception):  # noqa: N818 - an answer, not an error
    """The branches of an If give tensors of different rank or type."""


@dataclass
class Inline(Exception):  # noqa: N818 - an instruction, not an error
    """Raised by the lowering of an If whose condition is known: go on with the nodes of ``branch``."""

    node: oir.Node
    branch: oir.Graph

    def items(self, lowerer: Lowerer) -> list[Any]:
        """Return the work that takes the place of the node."""
        return [*self.branch, partial(bind, lowerer, self.node, self.branch)]


@dataclass
class Fork(Exception):  # noqa: N818 - an instruction, not an error
    """Raised by the lowering of an If whose branches do not fit together: fork what follows it."""

    node: oir.Node
    condition: Any
    known: Any
    branches: Sequence[oir.Graph]

    def lower(self, lowerer: Lowerer, rest: Items, results: Sequence[oir.Value]) -> None:
        """Lower each branch with ``rest`` behind it, and define ``results``, which the rest computes."""
        following = list(rest)

        def behind(branch: oir.Graph) -> list[Any]:
            lowerer.work([*branch, partial(bind, lowerer, self.node, branch), *following], results)
            return [lowerer.tensor(value) for value in results]

        lowerer.fork_depth += 1
        try:
            if lowerer.fork_depth > FORK_LIMIT:
                raise Unsupported("too many branches of different rank inside of each other")
            tensors = choose(lowerer, self.condition, self.known, [partial(behind, b) for b in self.branches])
            for value, tensor in zip(results, tensors, strict=True):
                lowerer.bind_tensor(value, tensor)
        except Poisoned:
            lowerer.poisoned.update(results)
        except Mismatch:
            lowerer.refuse(self.node, Unsupported("the branches lead to results of different rank or type"))
            lowerer.poisoned.update(results)
        except Unsupported as refusal:
            lowerer.refuse(self.node, refusal)
            lowerer.poisoned.update(results)
        finally:
            lowerer.fork_depth -= 1


def bind(lowerer: Lowerer, node: oir.Node, branch: oir.Graph) -> None:
    """Let the outputs of ``node`` be what ``branch`` gives."""
    for value, source in zip(node.outputs, branch.outputs, strict=True):
        try:
            lowerer.define(value, lowerer.known(source))
        except Poisoned:
            lowerer.poisoned.add(value)
        except Unsupported as refusal:
            lowerer.refuse(node, refusal)


def choose(lowerer: Lowerer, condition: Any, known: Any, cases: Sequence[Callable[[], Sequence[Any]]]) -> list[Any]:
    """Emit an If of two cases, each a function; returns the results.

    ``known`` is the condition as an expression of sizes, or None: inside of each case it is a fact. A case that no
    run can take, because its shapes contradict each other, becomes an error at run time.

    Raises:
        Poisoned: a case holds nodes that cannot be lowered; they have been noted.
        Mismatch: the cases give tensors of different rank or type.
    """
    made: list[tuple[Any, list[Any]] | None] = []
    reasons: dict[str, bool] = {}
    failed = False
    for name, fact, case in zip(
        ("then", "else"), (known, None if known is None else tirx.Not(known)), cases, strict=True
    ):
        refused, poisoned = dict(lowerer.refused), set(lowerer.poisoned)
        try:
            with nullcontext() if fact is None else lowerer.analyzer.constraint_scope(fact):
                call, types = outline(lowerer, name, case)
            made.append((call([]), types))
        except Poisoned:
            new = {line: flag for line, flag in lowerer.refused.items() if line not in refused}
            if new and all(new.values()):
                lowerer.refused, lowerer.poisoned = refused, poisoned
                reasons.update(new)
                made.append(None)
            else:
                failed = True
    possible = [entry for entry in made if entry is not None]
    if failed or not possible:
        lowerer.refused.update(reasons)
        raise Poisoned
    message = "this input takes a branch that cannot run: " + "; ".join(reasons)
    calls = [e[0] if e is not None else _failure(lowerer, possible[0][1], message) for e in made]
    expected = [_joined(lowerer, a, b) for a, b in zip(possible[0][1], possible[-1][1], strict=True)]
    result = lowerer.builder.emit(relax.If(condition, *calls))
    return [lowerer.builder.match_cast(relax.TupleGetItem(result, i), type_) for i, type_ in enumerate(expected)]


def _failure(lowerer: Lowerer, types: Sequence[Any], message: str) -> Any:
    """Return a call that ends the run with ``message``, and would give tensors of ``types`` (but for the sizes)."""

    def body(_: list[imperative.Cells], outs: list[imperative.Cells]) -> None:
        imperative.fail(message)

    def tensors() -> list[Any]:
        shapes = [([0] * type_.ndim, str(type_.dtype)) for type_ in types]

        def compute() -> Any:
            made = imperative.procedure([], shapes, body, "impossible")
            return list(made) if len(shapes) > 1 else [made]

        return list(emission.emit(lowerer.builder, compute, [], "impossible", lowerer.symbols))

    open_types = [relax.TensorType(None, type_.dtype, ndim=type_.ndim) for type_ in types]
    call, _ = outline(lowerer, "impossible", tensors, types=open_types)
    return call([])


def _joined(lowerer: Lowerer, a: Any, b: Any) -> Any:
    """Return the type of a result: dimensions that both branches share, fresh symbols for the others."""
    if a.ndim != b.ndim or a.dtype != b.dtype:
        raise Mismatch
    if a.shape is None or b.shape is None:
        dims = [lowerer.symbol("n") for _ in range(a.ndim)]
    else:
        left, right = ([emission.plain(d) for d in t.shape.values] for t in (a, b))
        dims = [x if lowerer.prove_equal(x, y) else lowerer.symbol("n") for x, y in zip(left, right, strict=True)]
    return relax.TensorType([emission.as_index(d) for d in dims], a.dtype)


def outline(
    lowerer: Lowerer,
    name: str,
    lower: Callable[[], Sequence[Any]],
    parameters: Sequence[Any] = (),
    types: Sequence[Any] | None = None,
) -> tuple[Callable[[Sequence[Any]], Any], list[Any]]:
    """Lower into a function of its own; returns what makes a call of it, and the types of its results.

    ``lower`` emits the body and returns its results. The ``parameters`` come first; every other value and symbol
    from outside that the body uses becomes a parameter too. Dimensions that only the body knows are left out of
    the types. Branches are functions because fusion and memory planning work function by function: inside of one,
    they take an If for straight-line code.
    """
    outside = set(lowerer.symbols)
    with lowerer.scope():
        made, results = block(lowerer, lower)
    body = relax.SeqExpr([made], results)
    own = set().union(*(lowerer.free(d) for p in parameters for d in emission.shape_of(p)))
    if types is None:
        types = [_visible(lowerer, field, outside - own) for field in results.ty.fields]
    captured = [v for v in relax.analysis.free_vars(body) if v not in {*parameters, *lowerer.symbols}]
    inner, casts = _open_parameters(lowerer, captured)
    if casts:
        body = relax.SeqExpr([relax.BindingBlock(casts), *body.blocks], body.body)
    result = relax.TupleType(types)
    function = relax.Function([*parameters, *inner], body, result, is_pure=False)
    symbols = list(relax.analysis.free_symbolic_vars(function))
    sizes = relax.Var("sizes", relax.ShapeType(symbols))
    function = relax.Function([sizes, *parameters, *inner], body, result, is_pure=False)
    target = lowerer.builder.add_func(relax.utils.copy_with_new_vars(function), name)

    def call(arguments: Sequence[Any]) -> Any:
        return relax.Call(target, [relax.ShapeExpr(symbols), *arguments, *captured])

    return call, list(types)


def _open_parameters(lowerer: Lowerer, captured: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return parameters for captured variables, and bindings of the variables to them where they differ.

    A parameter has plain dimensions: one like ``n // 2`` does not bind ``n``, and dead code elimination drops the
    parameter that does, unless the body uses ``n``.
    """
    parameters, casts = [], []
    for var in captured:
        dims = emission.shape_of(var)
        if all(isinstance(d, int | tvm.ir.Var) for d in dims):
            parameters.append(var)
            continue
        plain = [d if isinstance(d, int | tvm.ir.Var) else lowerer.symbol("n") for d in dims]
        type_ = relax.TensorType([emission.as_index(d) for d in plain], var.ty.dtype)
        parameters.append(relax.Var("captured", type_))
        casts.append(relax.MatchCast(var, parameters[-1], var.ty))
    return parameters, casts


def block(lowerer: Lowerer, lower: Callable[[], Sequence[Any]]) -> tuple[Any, Any]:
    """Emit into a new binding block; returns it and the variable of the tuple of what ``lower`` returns."""
    builder = lowerer.builder
    builder._begin_binding_block()
    try:
        results = builder.emit(relax.Tuple(list(lower())))
    finally:
        made = builder._end_block()
    return made, results


def _visible(lowerer: Lowerer, type_: Any, outside: set[Any]) -> Any:
    dims = [emission.plain(d) for d in type_.shape.values]
    if all(lowerer.free(d) <= outside for d in dims):
        return type_
    return relax.TensorType(None, type_.dtype, ndim=len(dims))
