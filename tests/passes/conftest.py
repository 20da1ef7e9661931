"""Fixtures for pass tests: build a canonical model from text, run it, and check one pass on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx.checker
import onnx.parser
import onnx_ir as oir
import pytest

from optc.ir import provenance, schemas, shapes
from optc.ir.verifier import violations
from optc.passes.base import Pass, PassResult

onnxruntime = pytest.importorskip("onnxruntime")

Feeds = Mapping[str, np.ndarray]
ModelBuilder = Callable[..., oir.Model]
Runner = Callable[[oir.Model, Feeds], list[np.ndarray]]
Checker = Callable[..., PassResult]

_HEADER = '<ir_version: 10, opset_import: ["" : 26]>\nagraph '


def _build(text: str, *, opset: int = 26, **initializers: np.ndarray) -> oir.Model:
    proto = onnx.parser.parse_model(_HEADER.replace("26", str(opset)) + text)
    for name, array in initializers.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    model = oir.from_proto(proto)
    for index, node in enumerate(model.graph.all_nodes()):
        node.name = node.name or f"n{index}"
        provenance.stamp(node, node.name)
        schemas.state_defaults(node, opset)
    shapes.infer(model)
    return model


def _run(model: oir.Model, feeds: Feeds) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    data = oir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


def _verify(model: oir.Model) -> None:
    """Check that the model is legal ONNX and in canonical form."""
    onnx.checker.check_model(oir.to_proto(model), full_check=True)
    assert violations(model) == []


def _op_types(model: oir.Model) -> list[str]:
    return [node.op_type for node in model.graph.all_nodes()]


def _check(
    model: oir.Model,
    passes: Pass | list[Pass],
    feeds: Feeds,
    *,
    fired: Mapping[str, int] | None = None,
    ops: list[str] | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    more_feeds: tuple[Feeds, ...] = (),
) -> PassResult:
    """Run the pass (or passes in turn) in place; outputs, interface and legality must survive.

    ``fired`` is compared exactly with the sum of the passes' counts, ``ops`` with the sorted operators that
    remain; ``more_feeds`` are further inputs for the numeric comparison, other sizes of symbolic dims say.
    """
    runs = (feeds, *more_feeds)
    before = [_run(model, each) for each in runs]
    interface = [(v.name, v.dtype) for v in (*model.graph.inputs, *model.graph.outputs)]
    total = PassResult(False)
    for one in passes if isinstance(passes, list) else [passes]:
        result = one.call(model)
        assert result.modified == bool(result.fired)
        total.modified |= result.modified
        total.fired = dict(Counter(total.fired) + Counter(result.fired))
        total.skipped += result.skipped
        _verify(model)
    assert [(v.name, v.dtype) for v in (*model.graph.inputs, *model.graph.outputs)] == interface
    for each, expected in zip(runs, before, strict=True):
        for want, got in zip(expected, _run(model, each), strict=True):
            assert want.dtype == got.dtype
            np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)
            assert want.shape == got.shape
    if fired is not None:
        assert total.fired == dict(fired)
    if ops is not None:
        assert sorted(_op_types(model)) == sorted(ops)
    return total


@pytest.fixture
def build() -> ModelBuilder:
    """``build("(float[b,3] x) => (float[b,3] y) { y = Add(x, w) }", w=array)``: a model at opset 26.

    Keyword arguments are initializers. Nodes are named n0, n1, … in order; all shapes but those of inputs
    are inferred, whatever the text says of outputs.
    """
    return _build


@pytest.fixture
def run() -> Runner:
    """``run(model, feeds)``: outputs computed by onnxruntime without its optimizations."""
    return _run


@pytest.fixture
def check() -> Checker:
    """``check(model, pass_, feeds, fired={rule: count}, ops=[...])``: see ``_check``."""
    return _check


@pytest.fixture
def op_types() -> Callable[[oir.Model], list[str]]:
    """``op_types(model)``: the operators of all nodes in order, subgraphs included."""
    return _op_types


@pytest.fixture
def verify() -> Callable[[oir.Model], None]:
    """``verify(model)``: assert that the model is legal and in canonical form."""
    return _verify


@pytest.fixture
def rng() -> np.random.Generator:
    """A seeded generator."""
    return np.random.default_rng(0)
