"""Structured pruning within an accuracy budget: which families lose units, for the fastest or the smallest model.

Each family is pruned alone first, by the share that is asked for. Then as many as fit are pruned together, in the order
of loss for what they save; those that do not fit are tried with half of the share (see ``search``). What is evaluated
and timed is the pruned model as it would be used: fitted to the calibration data, and compiled.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as oir

from optc import driver
from optc.compression import data, structured
from optc.compression.budget import Goal, described, subject, unreachable
from optc.compression.evaluate import Judge
from optc.compression.journal import Journal
from optc.compression.search import Layer, Search
from optc.errors import UnsupportedModelError, UsageError
from optc.ir import serialize
from optc.passes.prune.analysis import analyse
from optc.passes.prune.select import Structured, own_ratio
from optc.timing import alternate

_SECONDS = 0.6
"""How long a model is timed, in turns with the whole one."""


class Candidates:
    """Models with some of their families pruned: made, fitted, compiled, evaluated and timed one by one.

    Times are shares of the time of the whole model, one thread, in turns with it: machines get faster and slower.
    """

    def __init__(
        self,
        model: oir.Model,
        how: Structured,
        goal: Goal,
        calls: data.Samples | None,
        judged: data.Samples,
        saliency: Mapping[str, np.ndarray] | None,
        recover: bool,
        trace: driver.Trace,
    ) -> None:
        self.model, self.how, self._goal, self._trace = model, how, goal, trace
        self._fitted = calls.calls if calls is not None and recover else ()
        self._input = judged.calls[0]
        self.costs: dict[frozenset[str], float] = {}
        score = goal.score(judged, model.graph.outputs)
        trace.progress("compiling the whole model")
        self._whole = driver.compile(model, verify=False).model()
        self._whole.threads = 1
        trace.progress("evaluating the whole model")
        self.judge = Judge(score, goal.budget.metric, judged, self._whole.run)
        known = calls.calls if calls is not None else ()
        self.saliency = structured.importance(model, how, known, saliency, trace)

    def made(self, forms: Mapping[str, float], *, verify: bool = False) -> tuple[oir.Model, dict[str, Any]]:
        """Return the model with these shares of families removed, by the name of a weight, and the report."""
        layers = {glob.escape(name): share for name, share in forms.items()}
        how = replace(self.how, ratio=0.0, layers={**self.how.layers, **layers})
        result, quiet = self.model.clone(), driver.Trace()
        report = structured.remove(
            result, how, self._fitted, self.saliency, verify=verify, recover=bool(self._fitted), trace=quiet
        )
        return result, report

    def evaluate(self, key: frozenset[str], forms: Mapping[str, float]) -> float:
        """Return the loss of a candidate, and keep its cost as that of ``key``."""
        model, _ = self.made(forms)
        compiled = driver.compile(model, verify=False).model()
        loss = self.judge.loss(compiled.run)
        self.costs[key] = self.share(compiled) if self._goal.objective == "time" else serialize.weight_bytes(model)
        return loss

    def whole_cost(self) -> float:
        """Return the cost of the whole model."""
        return 1.0 if self._goal.objective == "time" else serialize.weight_bytes(self.model)

    def share(self, compiled: Any) -> float:
        """Return how long the compiled model takes beside the whole one."""
        compiled.threads = 1
        runs = {"whole": lambda: self._whole.run(self._input), "pruned": lambda: compiled.run(self._input)}
        whole, pruned = alternate(runs, seconds=_SECONDS)
        return pruned.median / whole.median


def prune_within(
    model: oir.Model,
    how: Structured,
    goal: Goal,
    calls: data.Samples | None,
    judged: data.Samples,
    saliency: Mapping[str, np.ndarray] | None = None,
    *,
    verify: bool = True,
    recover: bool = True,
    trace: driver.Trace | None = None,
) -> tuple[oir.Model, dict[str, Any]]:
    """Return a normalized model with as much removed as fits, and the report.

    Args:
        model: see ``optc.compression.prune.normalized``; it is not changed.
        how: ``ratio`` is the share of a family that goes at most; ``layers`` are taken as they are.
        goal: the budget, and what is to become small.
        calls: calibration data.
        judged: data to evaluate with.
        saliency: how much weights matter, by name.
        verify: compare the result with the masked original.
        recover: fit what is left to the calibration data.
        trace: is told of progress.

    Raises UsageError for what cannot be searched or evaluated, UnsupportedModelError if the model has nothing to
    prune, AccuracyError, with the Pareto front, if nothing can be pruned within the budget.
    """
    trace = trace or driver.Trace()
    if how.scope != "layer":
        raise UsageError("a search within a budget decides for each family: there is nothing to rank over all of them")
    if not how.ratio:
        raise UsageError("a search needs the share to prune at most", hint="--structured 50%")
    families = [family for family in analyse(model).families if own_ratio(family, how) is None]
    names = list(dict.fromkeys(family.name for family in families))
    if not names:
        raise UnsupportedModelError("the model has no channels, neurons or heads that can be removed")
    candidates = Candidates(model, how, goal, calls, judged, saliency, recover, trace)
    shares = {name: (name, how.ratio) for name in names}
    weaker = {name: f"{name} by {how.ratio / 2:.3g}" for name in names}
    shares |= {weaker[name]: (name, how.ratio / 2) for name in names}

    def evaluate(layers: frozenset[str]) -> float:
        return candidates.evaluate(layers, dict(shares[form] for form in layers))

    known = saliency is None or sorted((name, array.tobytes()) for name, array in saliency.items())
    options = {**vars(how), "recover": recover, "objective": goal.objective, "saliency": known}
    text = subject(model, [judged, calls], goal, options)
    journal, whole = Journal(goal.journal, text), candidates.whole_cost()
    alone = Search(
        [Layer(name, 1.0, 0.0) for name in names], evaluate, journal, trace.progress, candidates.costs.__getitem__
    )
    alone.sensitivity()
    layers = []
    for name in names:
        after = alone.cost(frozenset({name}))
        half = Layer(weaker[name], whole, (whole + after) / 2)
        layers.append(Layer(name, whole, after, (half,)))
    outcome = Search(layers, evaluate, journal, trace.progress, candidates.costs.__getitem__).run(goal.budget.limit)
    if outcome.best is None:
        raise unreachable(outcome, goal, "pruned")
    trace.progress("making the result")
    result, report = candidates.made(dict(shares[form] for form in outcome.best.layers), verify=verify)
    loss = candidates.judge.loss(driver.compile(result, verify=False).model().run)
    report["search"] = described(outcome, goal, candidates.judge, journal, layers, (whole, loss), "pruned")
    return result, report
