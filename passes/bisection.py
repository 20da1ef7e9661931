"""Numeric bisection: which pass changes the results of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as oir

from optc.passes import fuse, pipeline
from optc.passes.base import Pass
from optc.passes.observer import PassRecord

Results = Sequence[np.ndarray]
Runner = Callable[[oir.Model, Mapping[str, np.ndarray]], Results]


def bisect(
    model: oir.Model,
    inputs: Mapping[str, np.ndarray],
    tolerance: float,
    *,
    passes: Sequence[Pass] | None = None,
    run: Runner | None = None,
) -> str | None:
    """Return the name of the first pass after which an output is off, or None if none is.

    An output is off if its largest error exceeds ``tolerance`` times the largest magnitude of the original output, or
    if its shape or type differs, or it is NaN elsewhere. Every prefix of the pipeline is executed, by ``run`` or else
    by onnxruntime without its own optimizations where it is installed, by onnx's reference evaluator otherwise.
    The model is not changed.
    """
    execute = run or default_runner()
    model = model.clone()
    watcher = _Watcher(execute, inputs, tolerance)
    pipeline.run(model, passes=passes, observers=[watcher])
    return watcher.culprit


class _Watcher:
    """An observer that executes the model after every pass until the outputs are off."""

    def __init__(self, run: Runner, inputs: Mapping[str, np.ndarray], tolerance: float) -> None:
        self.run = run
        self.inputs = inputs
        self.tolerance = tolerance
        self.expected: Results = ()
        self.culprit: str | None = None

    def start(self, model: oir.Model) -> None:
        self.expected = self.run(model, self.inputs)

    def after(self, record: PassRecord, model: oir.Model) -> None:
        if self.culprit is None and record.modified:
            found = self.run(model, self.inputs)
            if not all(is_close(a, b, self.tolerance) for a, b in zip(self.expected, found, strict=True)):
                self.culprit = record.name


def is_close(expected: np.ndarray, found: np.ndarray, tolerance: float) -> bool:
    """Tell whether ``found`` is within ``tolerance`` of ``expected``, relative to its largest finite magnitude."""
    expected, found = np.asarray(expected), np.asarray(found)
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    if expected.dtype.kind in "OSUb":
        return bool(np.array_equal(expected, found))
    a, b = expected.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.all(np.isfinite(b[finite])):
        return False
    scale = np.abs(a[finite]).max(initial=0.0)
    return bool(np.abs(a[finite] - b[finite]).max(initial=0.0) <= tolerance * scale)


def default_runner() -> Runner:
    """Return an executor: onnxruntime where it is installed, else onnx's reference evaluator."""
    try:
        import onnxruntime
    except ImportError:
        return _run_reference

    def run(model: oir.Model, inputs: Mapping[str, np.ndarray]) -> Results:
        from optc.ir.serialize import to_proto

        model = model.clone()
        for one in fuse.portable():
            one.call(model)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(
            to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return [np.asarray(output) for output in session.run(None, dict(inputs))]

    return run


def _run_reference(model: oir.Model, inputs: Mapping[str, np.ndarray]) -> Results:
    from optc.ir.reference import evaluate

    return list(evaluate(model, inputs).values())
