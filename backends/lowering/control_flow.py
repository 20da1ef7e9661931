"""If, lazily: a condition that is known lowers one branch in place, any other becomes a branch at run time."""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import relax

from optc.backends.lowering.emit import as_index, plain
from optc.backends.lowering.lower import Poisoned
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
        return [lowerer.known(value) for value in branch.outputs]
    condition = site.reshape(site.tensor(0), [])
    calls, types, refused = [], [], []
    for name, graph in (("then_branch", then), ("else_branch", otherwise)):
        try:
            call, results = lowerer.outline(name, partial(lowerer.subgraph, graph))
            calls.append(call([]))
            types.append(results)
        except Poisoned as poisoned:
            # Go on, to name what the other branch has.
            refused.append(poisoned)
    if refused:
        raise refused[0]
    expected = [_joined(site, a, b) for a, b in zip(*types, strict=True)]
    result = lowerer.builder.emit(relax.If(condition, *calls))
    return [lowerer.builder.match_cast(relax.TupleGetItem(result, i), type_) for i, type_ in enumerate(expected)]


def _joined(site: Site, a: Any, b: Any) -> Any:
    """Return the type of a result: dimensions that both branches share, fresh symbols for the others."""
    if a.ndim != b.ndim or a.dtype != b.dtype:
        site.unsupported(
            "the branches give tensors of different rank or type "
            "(fixing the sizes that decide, with --input-shape or --dim, leaves one branch)"
        )
    if a.shape is None or b.shape is None:
        dims = [site.symbol("n") for _ in range(a.ndim)]
    else:
        left, right = ([plain(d) for d in t.shape.values] for t in (a, b))
        dims = [x if site.prove_equal(x, y) else site.symbol("n") for x, y in zip(left, right, strict=True)]
    return relax.TensorType([as_index(d) for d in dims], a.dtype)
