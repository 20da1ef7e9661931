"""Runs a model part by part on samples, so that what one part computes can change the weights of the next."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as oir

from optc import driver
from optc.errors import UsageError
from optc.ir import dims
from optc.ir.graph import reads
from optc.runtime import Model

Arrays = dict[str, np.ndarray]


def bound(model: oir.Model, calls: Sequence[Mapping[str, np.ndarray]]) -> oir.Model:
    """Return a clone of ``model`` with the sizes of the samples.

    Raises UsageError if samples have different shapes: parts are compiled for one.
    """
    shapes = [{name: array.shape for name, array in call.items()} for call in calls]
    if any(other != shapes[0] for other in shapes):
        raise UsageError(
            "the calibration samples have different shapes",
            hint="activations are compared for samples of one shape; fix the sizes and give samples of that size",
        )
    sizes: dict[str, int] = {}
    for value in model.graph.inputs:
        for dim, size in zip(value.shape or (), shapes[0][value.name or ""], strict=True):
            if not isinstance(dim, int) and dim.value is not None:
                sizes[dim.value] = size
    clone = model.clone()
    if sizes:
        dims.bind(clone, sizes)
    return clone


def part(model: oir.Model, given: Sequence[oir.Value], made: Sequence[oir.Value]) -> Model:
    """Compile what computes the values ``made`` from the values ``given``."""
    graph = oir.convenience.extract(model.graph, given, made)
    graph.opset_imports.update(model.opset_imports)
    return driver.compile(oir.Model(graph, ir_version=model.ir_version), verify=False).model()


class Stages:
    """A model with known sizes, cut before some of its nodes.

    ``advance`` compiles and runs the next part on all samples, with the weights that it has by then.
    """

    def __init__(self, model: oir.Model, cuts: Sequence[str], calls: Sequence[Mapping[str, np.ndarray]]) -> None:
        self._model, self._cuts = model, frozenset(cuts)
        self._next = 0
        self.values: list[Arrays] = [dict(call) for call in calls]
        """What later parts read, and the inputs, by name, for each sample."""

    def advance(self, extra: Sequence[str] = ()) -> None:
        """Run the nodes up to the next cut; afterwards ``values`` holds what is still needed, and ``extra``."""
        nodes = list(self._model.graph)  # read anew: whoever changes weights may add nodes to parts to come
        starts = [index for index, node in enumerate(nodes) if node.name in self._cuts]
        begin, end = list(itertools.pairwise([0, *starts, len(nodes)]))[self._next]
        now, later = nodes[begin:end], nodes[end:]
        self._next += 1
        needed = {value for node in later for value in reads(node)}
        own = {value for node in now for value in node.outputs}
        given = {v for node in now for v in reads(node) if not v.is_initializer()} - own
        made = [v for node in now for v in node.outputs if v in needed or v.name in extra]
        if made:
            self._run(sorted(given, key=lambda v: str(v.name)), made)
        keep = {str(value.name) for value in needed} | set(extra)
        self.values = [{name: array for name, array in call.items() if name in keep} for call in self.values]

    def _run(self, given: Sequence[oir.Value], made: Sequence[oir.Value]) -> None:
        compiled = part(self._model, given, made)
        names = [str(value.name) for value in given]
        for call in self.values:
            call.update(compiled.run({name: call[name] for name in names}))
