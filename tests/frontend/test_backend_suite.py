"""Every model of onnx's backend test suite loads, or is refused for its opset."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx.backend.test.loader import load_model_tests

from optc.errors import UnsupportedModelError
from optc.frontend.onnx import load
from optc.ir import CANONICAL_OPSET

LIGHT = "onnx/backend/test/data/light/"


def sources(kind: str):
    for case in load_model_tests(kind=kind):
        if case.model is not None:
            yield case.name, case.model
        elif case.url and case.url.startswith(LIGHT):
            yield case.name, Path(onnx.__file__).parent.parent / case.url
        elif case.model_dir:
            yield case.name, Path(case.model_dir) / "model.onnx"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["node", "simple", "pytorch-converted", "pytorch-operator", "real"])
def test_models_load(kind):
    refused = []
    count = 0
    for name, source in sources(kind):
        count += 1
        try:
            model = load(source)
        except UnsupportedModelError:
            refused.append(name)
            continue
        assert model.opset_imports[""] >= CANONICAL_OPSET, name
        assert not model.functions, name
    assert count > 5
    # These three are of opset 1.
    assert refused == (["test_not_2d", "test_not_3d", "test_not_4d"] if kind == "node" else [])
