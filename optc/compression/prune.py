"""Pruning of anything that is a model: capture, graph passes, removal, comparison with the masked original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx_ir as oir

from optc import verification
from optc.compression import data
from optc.compression.reconstruct import reconstruct
from optc.compression.saliency import saliency as measure
from optc.driver import Trace, specs, verify_artifact
from optc.errors import UsageError
from optc.passes import fuse, pipeline
from optc.passes.prune import structured as passes
from optc.passes.prune.importance import DATA_CRITERIA
from optc.passes.prune.select import Structured
from optc.source import capture

TOLERANCE = 1e-5
"""Largest difference from the masked original, relative to the output: both compute the same sums."""


@dataclass(frozen=True)
class Pruning:
    """A pruned model, and the report: what went, what stayed and why, and how the result was checked."""

    model: oir.Model
    report: dict[str, Any]


def prune(
    path_or_model: Any,
    example_inputs: Sequence[Any] | None = None,
    *,
    structured: float | Structured,
    calibrate: Any = None,
    samples: int = 128,
    recover: bool = True,
    saliency: Mapping[str, np.ndarray] | None = None,
    input_shapes: Mapping[str, Sequence[int | str]] | None = None,
    dims: Mapping[str, int] | None = None,
    dynamic_shapes: Any = None,
    verify: bool = True,
    trace: Trace | None = None,
) -> Pruning:
    """Remove channels, neurons, heads and groups from a model; the result is smaller, and portable ONNX.

    Args:
        path_or_model: see ``optc.capture``.
        example_inputs: the positional inputs that an ``nn.Module`` is captured with.
        structured: the share that goes, or how to choose what goes.
        calibrate: samples of the inputs; see ``optc.compression.data.load``. No labels are needed.
        samples: how many of them to use at most.
        recover: fit what is left to the original's activations on these samples.
        saliency: how much single weights matter, by the names that the optimized graph has for them.
        input_shapes: fixes whole inputs by name.
        dims: gives named dimensions a size.
        dynamic_shapes: torch.export's, for an ``nn.Module``.
        verify: before recovery, run the result on random inputs beside the original whose removed weights are zero,
            which computes the same; AccuracyError if it differs. It says nothing about the accuracy that pruning costs.
        trace: collects timings.

    Raises:
        UsageError, InputError, InvalidModelError, UnsupportedModelError, AccuracyError.
    """
    trace = trace or Trace()
    how = structured if isinstance(structured, Structured) else Structured(structured)
    if how.criterion in DATA_CRITERIA and calibrate is None and saliency is None:
        raise UsageError(f"importance by {how.criterion} needs calibration data", hint="give some with --calibrate")
    with trace.stage("capture"):
        model = capture(
            path_or_model,
            example_inputs=example_inputs,
            dynamic_shapes=dynamic_shapes,
            input_shapes=input_shapes,
            dims=dims,
        )
    calls = data.load(calibrate, specs(model.graph.inputs), limit=samples).calls if calibrate is not None else ()
    with trace.stage("optimize"):
        normalized(model)
    original, zero = model.clone(), model.clone() if verify else None
    if how.criterion in DATA_CRITERIA and saliency is None:
        with trace.stage("measure activations"):
            saliency = measure(model, calls, how.criterion)
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
    return Pruning(model, report)


def normalized(model: oir.Model) -> None:
    """Bring a canonical model into the form that is pruned: batch normalizations keep their scales."""
    pipeline.run(model, disable=("fold-batch-norm",))
    pipeline.run(model, passes=fuse.portable())


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
