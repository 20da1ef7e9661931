"""Pruning of anything that is a model: capture, graph passes, removal, comparison with the masked original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx_ir as oir

from optc.compression import data
from optc.compression import structured as removal
from optc.compression.budget import Goal
from optc.compression.prune_search import prune_within
from optc.compression.saliency import drop_branches, second_moments
from optc.driver import Trace, specs
from optc.errors import UsageError
from optc.passes import fuse, pipeline
from optc.passes.prune import sparse
from optc.passes.prune.importance import DATA_CRITERIA
from optc.passes.prune.low_rank import factor
from optc.passes.prune.permute import permute
from optc.passes.prune.select import Structured
from optc.source import capture


@dataclass(frozen=True)
class Zeros:
    """Which weights are zero: a ``share`` of them, in blocks of (features, columns), or all but n ``of`` m."""

    share: float = 0.0
    of: tuple[int, int] | None = None
    block: tuple[int, int] = (1, 1)
    scope: str = "layer"


@dataclass(frozen=True)
class Pruning:
    """A pruned model, and the report: what went, what stayed and why, and how the result was checked."""

    model: oir.Model
    report: dict[str, Any]


def prune(
    path_or_model: Any,
    example_inputs: Sequence[Any] | None = None,
    *,
    drop_layers: int | None = None,
    structured: float | Structured | None = None,
    low_rank: float | None = None,
    zeros: Zeros | None = None,
    clip: float | None = None,
    cluster: int | None = None,
    calibrate: Any = None,
    samples: int = 128,
    recover: bool = True,
    saliency: Mapping[str, np.ndarray] | None = None,
    goal: Goal | None = None,
    evaluation: Any = None,
    input_shapes: Mapping[str, Sequence[int | str]] | None = None,
    dims: Mapping[str, int] | None = None,
    dynamic_shapes: Any = None,
    verify: bool = True,
    trace: Trace | None = None,
) -> Pruning:
    """Make a model smaller: the result is portable ONNX. What is asked for is done in the order of the arguments.

    Args:
        path_or_model: see ``optc.capture``.
        example_inputs: the positional inputs that an ``nn.Module`` is captured with.
        drop_layers: how many residual branches are left out: those that change least on the calibration data.
        structured: the share of channels, neurons, heads and groups that is removed, or how to choose them.
        low_rank: products with constant weights become two where that pays, losing this share of the squared norm.
        zeros: single weights, N of M, or blocks are zero.
        clip: bound weights by this percentile of the magnitudes of their tensor.
        cluster: the weights of a tensor share so many values.
        calibrate: samples of the inputs; see ``optc.compression.data.load``. No labels are needed.
        samples: how many of them to use at most.
        recover: fit what is left to the original's activations on these samples.
        saliency: how much single weights matter, by the names that the optimized graph has for them.
        goal: an accuracy budget: ``structured`` is then the share of a family that goes at most, and a search decides
            which families lose as much; see ``optc.compression.prune_search``.
        evaluation: data to evaluate with, like ``calibrate``, which is taken where this is left out.
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
    how = structured if isinstance(structured, Structured) else Structured(structured or 0.0)
    if all(option is None for option in (drop_layers, structured, low_rank, zeros, clip, cluster)):
        raise UsageError("nothing to do", hint="--structured 50%, --low-rank 5%, --magnitude 80%, --sparsity 2:4, …")
    if drop_layers is not None and calibrate is None:
        raise UsageError("which layers change little is told by calibration data", hint="give some with --calibrate")
    if goal is not None:
        _require_searchable(structured, goal, calibrate, evaluation, (drop_layers, low_rank, zeros, clip, cluster))
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
    inputs = specs(model.graph.inputs)
    found = data.load(calibrate, inputs, limit=samples) if calibrate is not None else None
    judged = data.load(evaluation, inputs, limit=samples) if evaluation is not None else found
    calls = found.calls if found is not None else ()
    with trace.stage("optimize"):
        normalized(model)
    report: dict[str, Any] = {}
    if drop_layers is not None:
        with trace.stage("drop layers"):
            report["dropped"] = drop_branches(model, calls, drop_layers)
    if structured is not None and goal is not None:
        assert judged is not None
        with trace.stage("search"):
            model, searched = prune_within(
                model, how, goal, found, judged, saliency, verify=verify, recover=recover, trace=trace
            )
        report |= searched
    elif structured is not None:
        worth = removal.importance(model, how, calls, saliency, trace)
        report |= removal.remove(model, how, calls, worth, verify=verify, recover=recover, trace=trace)
    with trace.stage("weights"):
        moments = second_moments(model, calls) if calls and low_rank is not None else None
        if low_rank is not None:
            report["low_rank"] = [asdict(layer) for layer in factor(model, low_rank, moments=moments)]
        if zeros is not None:
            report["zeros"] = _zeros(model, zeros, saliency)
        if clip is not None:
            report["clipped"] = sparse.clip(model, clip)
        if cluster is not None:
            report["clustered"] = sparse.cluster(model, cluster)
    return Pruning(model, report)


def _require_searchable(structured: Any, goal: Goal, calibrate: Any, evaluation: Any, others: tuple[Any, ...]) -> None:
    if structured is None or any(option is not None for option in others):
        raise UsageError("a budget is for structured pruning, alone", hint="--structured 50% --max-drop 0.5%")
    if calibrate is None and evaluation is None:
        raise UsageError("a budget needs samples to evaluate and time the model with", hint="--calibrate or --data")


def _zeros(model: oir.Model, how: Zeros, saliency: Mapping[str, np.ndarray] | None) -> dict[str, Any]:
    permuted = 0
    if how.of is not None:
        permuted = permute(model, *how.of, saliency=saliency)
        found = sparse.n_of_m(model, *how.of, saliency=saliency)
    else:
        found = sparse.magnitude(model, how.share, scope=how.scope, block=how.block, saliency=saliency)
    note = "zeros make no kernel faster here: kernels are dense; they make the file compress better"
    return {"tensors": [asdict(tensor) for tensor in found], "permuted_families": permuted, "note": note}


def normalized(model: oir.Model) -> None:
    """Bring a canonical model into the form that is pruned: batch normalizations keep their scales."""
    pipeline.run(model, disable=("fold-batch-norm",))
    pipeline.run(model, passes=fuse.portable())
