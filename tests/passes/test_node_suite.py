"""Constant folding against the expected outputs of onnx's node tests: three models of every operator."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests

from optc.errors import OptcError
from optc.frontend.onnx import load
from optc.passes.simplify.fold_constants import PASS

PER_OPERATOR = 3


def to_array(tensor) -> np.ndarray:
    return numpy_helper.to_array(tensor) if isinstance(tensor, onnx.TensorProto) else np.asarray(tensor)


def with_constant_inputs(case) -> onnx.ModelProto | None:
    """Return the model with its inputs turned into initializers; None where one is no tensor of numbers."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    values = [*model.graph.input, *model.graph.output]
    if any(
        not v.type.HasField("tensor_type") or v.type.tensor_type.elem_type == onnx.TensorProto.STRING for v in values
    ):
        return None
    for value, tensor in zip(list(model.graph.input), case.data_sets[0][0], strict=True):
        model.graph.initializer.append(numpy_helper.from_array(to_array(tensor), value.name))
        model.graph.input.remove(value)
    return model


def is_close(found: np.ndarray, expected: np.ndarray) -> bool:
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    # Some expected outputs are written with four decimals.
    tolerance = 2e-2 if expected.dtype.itemsize <= 2 else 1e-4
    a, b = found.astype(np.float64), expected.astype(np.float64)
    return np.allclose(a, b, rtol=tolerance, atol=1e-4, equal_nan=True)


def test_folded_values_are_the_expected_outputs():
    seen: Counter[str] = Counter()
    folded, wrong = 0, []
    for case in load_model_tests(kind="node"):
        if case.model is None or len(case.model.graph.node) != 1:
            continue
        operator = case.model.graph.node[0].op_type
        seen[operator] += 1
        proto = with_constant_inputs(case) if seen[operator] <= PER_OPERATOR else None
        if proto is None:
            continue
        try:
            model = load(proto)
        except OptcError:
            continue  # what the frontend refuses
        PASS.call(model)
        for output, expected in zip(model.graph.outputs, case.data_sets[0][1], strict=True):
            source = output.producer().inputs[0] if output.producer().op_type == "Identity" else None
            if source is None or source.const_value is None:
                continue
            folded += 1
            if not is_close(source.const_value.numpy(), to_array(expected)):
                wrong.append(f"{case.name}: {output.name}")
    assert wrong == []
    assert folded > 300
