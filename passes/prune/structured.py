"""Structured pruning of a model: analysis, choice, removal, and the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from optc.ir import cost
from optc.passes.match import constant
from optc.passes.prune.analysis import Untouched, analyse
from optc.passes.prune.importance import Scores
from optc.passes.prune.remove import mask, remove
from optc.passes.prune.select import Structured, choose
from optc.passes.rewrite import Namer


@dataclass(frozen=True)
class Pruned:
    """What became of a family: its first weight, all its weights, and its units before and after."""

    name: str
    weights: tuple[str, ...]
    before: int
    after: int


@dataclass(frozen=True)
class Report:
    """What structured pruning did, and what it left alone, with reasons.

    ``parameters`` and ``flops`` are (before, after); flops are None where sizes are symbolic. ``kept`` tells what was
    kept of each tensor that lost slices; see ``remove``.
    """

    families: tuple[Pruned, ...]
    untouched: tuple[Untouched, ...]
    parameters: tuple[int, int]
    flops: tuple[int | None, int | None]
    kept: Mapping[str, list[np.ndarray | None]]


def prune(
    model: oir.Model,
    how: Structured,
    *,
    saliency: Mapping[str, np.ndarray] | None = None,
    zero: oir.Model | None = None,
) -> Report:
    """Remove units from a canonical model, in place.

    Args:
        model: a canonical model.
        how: how much, and by which criterion.
        saliency: how much weights matter, by name; see ``Scores``.
        zero: a clone of ``model``, whose removed weights are set to zero: it computes what the pruned model computes.

    Raises UsageError for a name of a layer that is not there.
    """
    _unshare(model)
    coupling = analyse(model)
    chosen = choose(coupling, Scores(coupling, how.criterion, saliency), how)
    removed = np.concatenate([np.zeros(0, np.int64), *chosen.values()])
    before = _amounts(model)
    if zero is not None:
        _unshare(zero)
        twin = analyse(zero)
        mask(zero, twin, removed)
    kept = remove(model, coupling, removed)
    after = _amounts(model)
    families = tuple(
        Pruned(f.name, f.weights, len(f.units), len(f.units) - len(chosen[f.key])) for f in coupling.families
    )
    return Report(families, coupling.untouched, (before[0], after[0]), (before[1], after[1]), kept)


def _unshare(model: oir.Model) -> None:
    """Give each reader a vector of its own: equal ones (biases of 0, say) would couple layers for no reason."""
    namer = Namer(model)
    for value in list(model.graph.initializers.values()):
        array = constant(value)
        if array is None or array.size <= 1 or array.size != max(array.shape) or array.dtype.kind in "iub":
            continue
        for use in list(value.uses())[1:]:
            twin = oir.Value(name=namer.fresh(f"{value.name}.copy"), shape=value.shape, type=value.type)
            twin.const_value = value.const_value
            model.graph.initializers.add(twin)
            use.node.replace_input_with(use.idx, twin)


def _amounts(model: oir.Model) -> tuple[int, int | None]:
    weights = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    flops = cost.totals(cost.estimate(model)).flops
    return sum(w.size for w in weights), flops if isinstance(flops, int) else None
