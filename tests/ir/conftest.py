"""Shared by the tests of the IR: models from ONNX text, brought into canonical form."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as oir
import pytest

from optc.ir import dims, provenance, schemas, shapes
from optc.ir.text import from_text

HEADER = '<ir_version: 13, opset_import: ["" : 26]>\n'


def _canonical(text: str, *, infer: bool = True) -> oir.Model:
    model = from_text(text if text.lstrip().startswith("<") else HEADER + text)
    for index, node in enumerate(model.graph.all_nodes()):
        node.name = node.name or f"n{index}"
        provenance.stamp(node, node.name)
        schemas.state_defaults(node, model.opset_imports[node.domain])
    if infer:
        shapes.infer(model)
    return model


@pytest.fixture
def canonical() -> Callable[..., oir.Model]:
    """``canonical(text)``: the model of an ONNX text, nodes named n0, n1, ... and shapes inferred."""
    return _canonical


@pytest.fixture
def value() -> Callable[[oir.Model, str], oir.Value]:
    """``value(model, name)``: a value of the model or of a subgraph."""

    def find(model: oir.Model, name: str) -> oir.Value:
        return next(v for v in dims.all_values(model.graph) if v.name == name)

    return find


@pytest.fixture
def mlp() -> oir.Model:
    """A two-layer network on ``[batch, 4]``."""
    return _canonical(
        """
        mlp (float[batch,4] x) => (float[batch,2] y)
        <float[4,3] w1 = {1,2,3,4,5,6,7,8,9,10,11,12}, float[3] b1 = {1,2,3},
         float[3,2] w2 = {1,2,3,4,5,6}>
        {
            h = Gemm(x, w1, b1)
            r = Relu(h)
            y = MatMul(r, w2)
        }
        """
    )
