"""The random shapes are legal and always the same; the page computes its shares from the measured peak."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))
import kernels
import shapes

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def run(shape):
    session = onnxruntime.InferenceSession(shape.model().SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, shape.inputs())


@pytest.mark.parametrize("kind", shapes.COUNTS)
def test_random_shapes_are_legal_models_with_right_expectations(kind):
    drawn = shapes.SHAPES[kind]
    assert len({s.name for s in drawn}) == shapes.COUNTS[kind]
    for shape in sorted(drawn, key=lambda s: s.operations)[:12]:
        found, expected = run(shape), shape.expected(shape.inputs())
        if expected is not None:
            np.testing.assert_allclose(found[0], expected[0], rtol=1e-3, atol=1e-4)


def test_operations_count_multiply_adds_as_two():
    one = next(s for s in shapes.SHAPES["conv"] if "depthwise" not in s.name)
    weight, result = one.weight, run(one)[0]
    assert one.operations == 2 * result.size * weight[1] * weight[2] * weight[3]


def test_the_page_takes_shares_of_the_peak():
    rows = [
        {"schedule": "contraction", "extents": [[10, 20], [30]], "accumulates": "float32", "models": ["a", "b"]}
        | {"kernel": f"k{i}", "operations": 50_000_000, "ms": ms, "scaling": 1.5}
        for i, ms in enumerate((1.0, 0.5, 2.0))
    ]
    shape = {"name": "gemm 1x2x3", "operations": 30_000_000, "error": 1e-7, "ms": 1.0, "onnxruntime_ms": 1.5}
    page = kernels.page(100.0, {"models": rows, "gemm": [shape]}, "kernels-avx512")
    assert "[performance](performance-avx512.md)" in page
    assert "median 50.0 G/s, 50% of the peak, 3 kernels; two threads 1.50 times as fast" in page
    assert "| `k2` | contraction | 10·20 | 30 | 2.00 | 25.0 | 25% | 1.50 | a, b |" in page
    assert "| gemm 1x2x3 | 1.00 | 1.50 | 1.50 | 30.0 | 30% |" in page
