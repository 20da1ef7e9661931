"""If, lazily: a condition that is known lowers one branch in place, any other becomes a branch at run time."""

from __future__ import annotations

from typing import Any

from tvm import relax

from optc.backends.lowering.emit import as_index, plain
from optc.backends.lowering.site import Site
from optc.backends.lowering.table import Table

TABLE = Table()


@TABLE.lowers("If")
def if_(site: Site) -> Any:
    """If-25."""
    then, otherwise = site.attr("then_branch"), site.attr("else_branch")
    lowerer = site.lowerer
    known = site.constant(0)
    if known is not None:
        branch = then if known.reshape(-1)[0] else otherwise
        lowerer.graph(branch)
        for value, source in zip(site.node.outputs, branch.outputs, strict=True):
            lowerer.alias(value, source)
        return [None] * site.output_count
    condition = site.reshape(site.tensor(0), [])
    known_symbols = set(lowerer.symbols)
    first, second = lowerer.branch(then), lowerer.branch(otherwise)
    types = [list(b.body.ty.fields) for b in (first, second)]
    expected = [_joined(site, a, b, known_symbols) for a, b in zip(*types, strict=True)]
    result = lowerer.builder.emit(relax.If(condition, first, second))
    return [
        lowerer.builder.match_cast(relax.TupleGetItem(result, i), type_) for i, type_ in enumerate(expected)
    ]


def _joined(site: Site, a: Any, b: Any, outside: set[Any]) -> Any:
    """Return the type of a result: dimensions that both branches share, fresh symbols for the others."""
    if a.ndim != b.ndim or a.dtype != b.dtype:
        site.unsupported("the branches give tensors of different rank or type")
    dims = []
    left, right = ([plain(d) for d in t.shape.values] for t in (a, b))
    for x, y in zip(left, right, strict=True):
        shared = site.prove_equal(x, y) and site.lowerer.free(x) <= outside
        dims.append(x if shared else site.symbol("n"))
    return relax.TensorType([as_index(d) for d in dims], a.dtype)
