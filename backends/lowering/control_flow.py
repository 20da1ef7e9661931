"""If, lazily: a condition that is known leaves one branch, any other becomes a branch at run time."""

from __future__ import annotations

from functools import partial
from typing import Any

from optc.backends.lowering.branches import Fork, Inline, Mismatch, choose
from optc.backends.lowering.site import Site
from optc.backends.lowering.table import Table

TABLE = Table()


@TABLE.lowers("If")
def if_(site: Site) -> Any:
    """If-25."""
    graphs = [site.attr("then_branch"), site.attr("else_branch")]
    lowerer = site.lowerer
    constant = site.constant(0)
    if constant is not None:
        raise Inline(site.node, graphs[0] if constant.reshape(-1)[0] else graphs[1])
    condition = site.reshape(site.tensor(0), [])
    symbolic = lowerer.integers.get(site.value(0))
    known = None if symbolic is None else symbolic.reshape(-1)[0]
    try:
        return choose(lowerer, condition, known, [partial(lowerer.subgraph, graph) for graph in graphs])
    except Mismatch:
        raise Fork(site.node, condition, known, graphs) from None
