"""Which slices of which tensors can only be removed together, read off the graph.

The analysis gives each slice along each axis of each value a label and walks the graph once: a node passes the labels
of its inputs on, joins labels (the two sides of a residual sum), or lets slices stay (the sizes of inputs and
outputs, an axis that is normalized over, an operator without a rule). What is left are families: labels that compete
with each other, such as the channels of one stage of a residual network.

G. Fang et al.: DepGraph: Towards Any Structural Pruning, 2023, finds such groups on the graph of layers. Here they are
found slice by slice, so concatenations, splits and blocks of channels need no special care.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from optc.ir.graph import reads
from optc.passes.prune import layout, pointwise, products
from optc.passes.prune.axes import RULES, Axes, NotUnderstoodError
from optc.passes.prune.labels import Reason
from optc.passes.rewrite import subgraphs

# Where the rules are.
MODULES = (layout, pointwise, products)

# A split axis has at most so many factors that could carry its labels.
_MOST_ATTEMPTS = 4


@dataclass(frozen=True)
class Family:
    """Units that compete with each other. A unit is a set of slices that can only go together.

    ``units`` are their labels; ``name`` is the first weight that makes them.
    """

    name: str
    weights: tuple[str, ...]
    units: np.ndarray

    @property
    def key(self) -> int:
        """What tells the family from others."""
        return int(self.units[0])


@dataclass(frozen=True)
class Untouched:
    """Slices that weights make and that have to stay."""

    name: str
    size: int
    reasons: tuple[Reason, ...]


@dataclass(frozen=True)
class Coupling:
    """What the analysis found: the labels of all axes, families in the order of the graph, and what stays."""

    axes: Axes
    families: tuple[Family, ...]
    untouched: tuple[Untouched, ...]


def analyse(model: oir.Model) -> Coupling:
    """Return the coupled slices of a canonical model, which is not changed."""
    choices: dict[tuple[str, int], int] = {}
    for _ in range(_MOST_ATTEMPTS):
        axes = _walk(model, choices)
        # Where a factor turned out to be stuck, another one may carry the labels: heads in [3, heads, width].
        stuck = {
            key: count
            for key, (count, labels) in axes.splits.items()
            if axes.labels.free(labels) < 2 and choices.get(key, 0) + 1 < count
        }
        if not stuck:
            break
        choices.update({key: choices.get(key, 0) + 1 for key in stuck})
    return _families(axes)


def _walk(model: oir.Model, choices: dict[tuple[str, int], int]) -> Axes:
    axes = Axes(choices)
    for value in model.graph.inputs:
        axes.leave(value)
    for node in model.graph:
        axes.enter(node)
        rule = RULES.get(node.op_type) if node.domain == "" else None
        try:
            if rule is None or subgraphs(node):
                raise NotUnderstoodError("what it does with slices is not known")
            rule(node, axes)
        except NotUnderstoodError as reason:
            for value in reads(node):
                axes.pin_value(value, str(reason))
            for value in node.outputs:
                axes.leave(value)
    axes.node = None
    for value in model.graph.outputs:
        axes.pin_value(value, f"it is a size of the output '{value.name}'")
    return axes


def _families(axes: Axes) -> Coupling:
    labels = axes.labels
    families = labels.families()
    wanted = labels.wanted()
    origins = labels.origins(wanted)
    found: list[Family] = []
    for family in dict.fromkeys(int(f) for f in families[wanted] if f):
        members = np.flatnonzero(families == family)
        names = dict.fromkeys(labels.names[o] for o in np.unique(labels.origins(members)))
        made = dict.fromkeys(labels.names[o] for o in origins[families[wanted] == family])
        found.append(Family(next(iter(made)), tuple(names), np.unique(labels.roots(members))))
    reasons = labels.reasons()
    staying = labels.stay(wanted)
    untouched = []
    for origin in dict.fromkeys(int(o) for o in origins[staying] if o):
        count = len(np.unique(wanted[staying & (origins == origin)]))
        untouched.append(Untouched(labels.names[origin], count, tuple(reasons.get(origin, ()))))
    return Coupling(axes, tuple(found), tuple(untouched))
