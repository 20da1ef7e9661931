"""Prunes small models and compares them with the masked original."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as oir
import pytest

from optc.ir import shapes
from optc.passes.prune.select import Structured
from optc.passes.prune.structured import Report, prune


@pytest.fixture
def filled(build, rng):
    """``filled(text)``: a model whose ``<float[2,3] w>`` in braces before the body become random initializers."""

    def make(text: str, **initializers: np.ndarray) -> oir.Model:
        found = re.search(r"<(.*?)>", text)
        declared = re.findall(r"float\[([\d,]*)\] (\w+)", found[1]) if found else []
        random = {
            name: (rng.standard_normal([int(n) for n in dims.split(",") if n]) * 0.5).astype(np.float32)
            for dims, name in declared
            if name not in initializers
        }
        return build(re.sub(r"<.*?>", "", text, count=1), **random, **initializers)

    return make


@pytest.fixture
def pruned(run, verify, rng):
    """``pruned(model, ratio)``: prune in place; legal, canonical, and equal to the masked original."""

    def check(model: oir.Model, how: Structured | float = 0.5, feeds=None, **options) -> Report:
        how = how if isinstance(how, Structured) else Structured(how, multiple=1)
        zero = model.clone()
        report = prune(model, how, zero=zero, **options)
        verify(model)
        inferred = model.clone()
        shapes.infer(inferred)
        for value in inferred.graph.outputs:
            assert value.shape is not None
        if feeds is None:
            feeds = {
                v.name: rng.standard_normal([int(d) for d in v.shape]).astype(np.float32) for v in model.graph.inputs
            }
        for found, expected in zip(run(model, feeds), run(zero, feeds), strict=True):
            assert found.shape == expected.shape
            assert np.abs(expected).max() > 1e-3
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
        return report

    return check


@pytest.fixture
def sizes():
    """``sizes(model, "w", "v")``: the shapes of initializers."""

    def shapes_of(model: oir.Model, *names: str) -> list[tuple[int, ...]]:
        return [tuple(model.graph.initializers[name].const_value.shape.numpy()) for name in names]

    return shapes_of
