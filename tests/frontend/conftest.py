from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as oir
import onnxruntime
import pytest

from optc.frontend.onnx import load

Shape = Sequence[int | str | None]


@pytest.fixture
def build() -> Callable[..., onnx.ModelProto]:
    """Build a model of float inputs ``{name: shape}`` and outputs of unknown shape."""

    def make(
        nodes: Sequence[onnx.NodeProto],
        inputs: Mapping[str, Shape],
        outputs: Sequence[str],
        opset: int = 17,
        weights: Mapping[str, np.ndarray] | None = None,
        types: Mapping[str, int] | None = None,
        **options: object,
    ) -> onnx.ModelProto:
        kinds = types or {}

        def info(name: str, shape: Shape | None) -> onnx.ValueInfoProto:
            return onnx.helper.make_tensor_value_info(name, kinds.get(name, onnx.TensorProto.FLOAT), shape)

        graph = onnx.helper.make_graph(
            list(nodes),
            "g",
            [info(name, shape) for name, shape in inputs.items()],
            [info(name, None) for name in outputs],
            [onnx.numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
        )
        imports = options.pop("imports", None) or [onnx.helper.make_opsetid("", opset)]
        return onnx.helper.make_model(graph, opset_imports=imports, ir_version=8, **options)

    return make


@pytest.fixture
def evaluate() -> Callable[..., list[np.ndarray]]:
    """Run a model by onnxruntime without graph optimizations."""

    def run(model: onnx.ModelProto | oir.Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        proto = oir.to_proto(model) if isinstance(model, oir.Model) else model
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return session.run(None, dict(feeds))

    return run


@pytest.fixture
def same_results(evaluate) -> Callable[..., oir.Model]:
    """Check that the canonical model is legal and computes what the original computes; return it."""

    def check(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray], **options: object) -> oir.Model:
        expected = evaluate(model, feeds)
        canonical = load(model, **options)
        onnx.checker.check_model(oir.to_proto(canonical), full_check=True)
        for a, b in zip(evaluate(canonical, feeds), expected, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
        return canonical

    return check
