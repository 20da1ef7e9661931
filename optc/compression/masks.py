"""Masks for fine-tuning a PyTorch module with the zeros that structured pruning will remove."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from optc.compression.owners import Owners
from optc.compression.prune import normalized
from optc.errors import UnsupportedModelError, UsageError
from optc.passes.match import constant
from optc.passes.prune.analysis import analyse
from optc.passes.prune.importance import CRITERIA, Scores
from optc.passes.prune.select import Structured, choose
from optc.source import capture


def structured_masks(
    module: Any,
    example_inputs: Sequence[Any],
    how: Structured,
    *,
    dynamic_shapes: Any = None,
    saliency: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Return which weights stay, by the names of the module's parameters; parameters that keep all are left out.

    Train with them (``trainer.set_masks``), then prune the trained module with the same ratio: what is zero goes first.
    ``saliency`` is by the same names: ``|w * gradient|``, summed over batches, is the first-order Taylor expansion of
    the loss (P. Molchanov et al., 2019).

    Raises UsageError for a criterion that needs data without ``saliency``, UnsupportedModelError for weights
    that the compiler combined with others, and what ``optc.capture`` raises.
    """
    if how.criterion not in CRITERIA and saliency is None:
        raise UsageError(f"importance by {how.criterion} comes as saliency", hint=f"without it: {', '.join(CRITERIA)}")
    model = capture(module, example_inputs=example_inputs, dynamic_shapes=dynamic_shapes)
    normalized(model)
    coupling = analyse(model)
    criterion = how.criterion if how.criterion in CRITERIA else "l2"
    owners = Owners(module)
    if saliency is not None:
        saliency = owners.renamed(coupling, saliency)
    chosen = choose(coupling, Scores(coupling, criterion, saliency), how)
    removed = np.concatenate([np.zeros(0, np.int64), *chosen.values()])
    masks: dict[str, np.ndarray] = {}
    lost = []
    for value, table in coupling.axes.table.items():
        array = constant(value)
        if array is None:
            continue
        mask = np.ones(array.shape, bool)
        for axis, labels in enumerate(table):
            if labels is not None:
                np.moveaxis(mask, axis, 0)[np.isin(coupling.axes.labels.roots(labels), removed)] = False
        if not mask.all():
            owner = owners.find(str(value.name), array)
            if owner is not None:
                masks[owner[0]] = mask.T if owner[1] else mask
            elif array.ndim > 1:
                lost.append(str(value.name))
    if lost:
        raise UnsupportedModelError(f"weights that are no parameters of the module any more: {', '.join(lost[:5])}")
    return masks
