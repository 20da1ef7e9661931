"""Structured pruning of a normalized model: importance, removal, comparison with the masked original, recovery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import onnx_ir as oir

from optc import verification
from optc.compression.reconstruct import reconstruct
from optc.compression.saliency import saliency as measure
from optc.driver import Trace, specs, verify_artifact
from optc.passes.prune import structured as passes
from optc.passes.prune.importance import DATA_CRITERIA
from optc.passes.prune.select import Structured

TOLERANCE = 1e-5
"""Largest difference from the masked original, relative to the output: both compute the same sums."""


def importance(
    model: oir.Model,
    how: Structured,
    calls: Sequence[Mapping[str, np.ndarray]],
    saliency: Mapping[str, np.ndarray] | None,
    trace: Trace,
) -> Mapping[str, np.ndarray] | None:
    """Return how much weights matter by name: what was given, or measured where the criterion asks for data."""
    if how.criterion not in DATA_CRITERIA or saliency is not None:
        return saliency
    with trace.stage("measure activations"):
        return measure(model, calls, how.criterion)


def remove(
    model: oir.Model,
    how: Structured,
    calls: Sequence[Mapping[str, np.ndarray]],
    saliency: Mapping[str, np.ndarray] | None,
    *,
    verify: bool,
    recover: bool,
    trace: Trace,
) -> dict[str, Any]:
    """Remove units of a model in place, check the result, fit it to ``calls`` if there are any; return the report.

    Raises UsageError for names that are not there or samples of different shapes, AccuracyError if the result is not
    what the masked original computes.
    """
    original, zero = model.clone(), model.clone() if verify else None
    with trace.stage("prune"):
        outcome = passes.prune(model, how, saliency=saliency, zero=zero)
    report = _describe(how, outcome)
    if zero is not None:
        with trace.stage("verify"):
            report["verification"] = _compare(model, zero).describe()
    if calls and recover:
        with trace.stage("recover"):
            fits = reconstruct(original, model, outcome.kept, calls, progress=trace.progress)
        report["recovery"] = [asdict(fit) for fit in fits]
    return report


def _describe(how: Structured, outcome: passes.Report) -> dict[str, Any]:
    return {
        "structured": asdict(how),
        "parameters": outcome.parameters,
        "flops": outcome.flops,
        "families": [asdict(family) for family in outcome.families],
        "untouched": [
            {"name": u.name, "size": u.size, "reasons": list(map(str, u.reasons))} for u in outcome.untouched
        ],
    }


class _Runner:
    """A model as ``verify_artifact`` wants it."""

    def __init__(self, model: oir.Model, prefer: str | None) -> None:
        self.inputs = specs(model.graph.inputs)
        self.name, self.run = verification.reference(model, prefer)


def _compare(model: oir.Model, zero: oir.Model) -> verification.Verification:
    """Compare with the masked original, both in the same program.

    onnxruntime's approximations differ from call to call where an output is tiny (Sigmoid far below zero); onnx's
    reference evaluator decides then.
    """
    runner = _Runner(model, None)
    result = verify_artifact(runner, zero, prefer="onnxruntime" if runner.name.startswith("onnxruntime") else "onnx")
    if not all(output.within(TOLERANCE) for output in result.outputs):
        result = verify_artifact(_Runner(model, "onnx"), zero, prefer="onnx")
    result.require(TOLERANCE)
    return result
