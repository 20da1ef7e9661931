"""Which parameter of a PyTorch module a weight of the captured graph is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from optc.passes.match import constant
from optc.passes.prune.analysis import Coupling


class Owners:
    """The parameters of a module: the compiler transposes some, which changes their names."""

    def __init__(self, module: Any) -> None:
        self._arrays = {name: p.detach().cpu().numpy() for name, p in module.named_parameters()}

    def find(self, name: str, array: np.ndarray) -> tuple[str, bool] | None:
        """Return the parameter that a tensor is, and whether it is transposed."""
        if name in self._arrays and self._arrays[name].shape == array.shape:
            return name, False
        for owner, own in self._arrays.items():
            if own.ndim == array.ndim == 2 and own.T.shape == array.shape and np.array_equal(own.T, array):
                return owner, True
        return None

    def renamed(self, coupling: Coupling, saliency: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return saliency by the names of the graph's tensors."""
        found = {}
        for value in coupling.axes.table:
            array = constant(value)
            owner = self.find(str(value.name), array) if array is not None else None
            if owner is not None and owner[0] in saliency:
                found[str(value.name)] = saliency[owner[0]].T if owner[1] else saliency[owner[0]]
        return found
