"""Quantization within an accuracy budget: the fastest or smallest mixture of layers, proved on the compiled result."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as oir

from optc import driver
from optc.compression import data
from optc.compression.evaluate import Budget, Judge, Run, labelled_score, user_score
from optc.compression.journal import Journal
from optc.compression.observe import Progress
from optc.compression.options import Options
from optc.compression.search import Layer, Outcome, Point, Search
from optc.compression.speed import layer_times
from optc.compression.switchboard import Mixture, Switchboard
from optc.errors import AccuracyError, UsageError
from optc.ir import serialize
from optc.passes.quantize.products import products

OBJECTIVES = ("time", "size")
_RETRIES = 3


@dataclass(frozen=True)
class Goal:
    """What is wanted, and how accuracy is measured.

    Attributes:
        budget: what may be lost.
        evaluate: a function of ``run`` (a function from inputs to outputs) that returns a score, more is better, or
            ``package.module:function``.
        labels: see ``labelled_score``; instead of ``evaluate``.
        objective: ``time`` on the target, or ``size`` of the weights.
        journal: a file that keeps evaluations, so that a search can be resumed.
    """

    budget: Budget
    evaluate: Callable[[Run], float] | str | None = None
    labels: Any = None
    objective: str = "time"
    journal: Path | None = None

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise UsageError(f"the objective is {' or '.join(OBJECTIVES)}, not {self.objective!r}")
        if self.evaluate is not None and self.labels is not None:
            raise UsageError("a function evaluates the model, or labels do, not both")
        scored = self.evaluate is not None or self.labels is not None
        if scored != (self.budget.metric == "accuracy"):
            need = "--max-drop needs --eval or --labels" if not scored else "--eval and --labels go with --max-drop"
            raise UsageError(need, hint="without labels, bound the error of outputs: --max-error cosine:0.01")

    def score(self, samples: data.Samples, outputs: Sequence[oir.Value]) -> Callable[[Run], float] | None:
        """Return the function that scores a model, None where outputs are compared. Raises UsageError early."""
        if self.labels is not None:
            row = outputs[0].shape[1:] if outputs[0].shape else ()
            sizes = [size for size in row if isinstance(size, int)]
            classes = prod(sizes) if row and len(sizes) == len(row) else None
            return labelled_score(self.labels, samples, [str(value.name) for value in outputs], classes)
        return user_score(self.evaluate) if isinstance(self.evaluate, str) else self.evaluate


class Trial:
    """One mixture of quantized layers that can be evaluated: compiled once, with a judge."""

    def __init__(
        self, mixture: Mixture, samples: data.Samples, goal: Goal, options: Options, progress: Progress
    ) -> None:
        score = goal.score(samples, mixture.model.graph.outputs)
        progress("compiling the model with both forms of its layers")
        self.mixture, self._board = mixture, Switchboard(mixture)
        progress("evaluating the float32 model")
        self.judge = Judge(score, goal.budget.metric, samples, self._board.run(frozenset()))
        self.journal = Journal(goal.journal, subject(mixture.model, [samples], goal, vars(options)))

    def evaluate(self, layers: frozenset[str]) -> float:
        """Return the loss with ``layers`` quantized."""
        return self.judge.loss(self._board.run(layers))


def search(
    trial: Trial, goal: Goal, shapes: dict[str, tuple[int, ...]], target: str, progress: Progress
) -> tuple[oir.Model, dict[str, Any]]:
    """Return the best model within the budget and the report.

    Raises AccuracyError, with the Pareto front, if no layer can be quantized within the budget.
    """
    mixture = trial.mixture
    layers = costs(mixture, goal, shapes, target, progress)
    found = Search(layers, trial.evaluate, trial.journal, progress)
    outcome = found.run(goal.budget.limit)
    if outcome.best is None:
        raise unreachable(outcome, goal, "quantized")
    best, model, loss = _proved(trial, outcome, found, goal, progress)
    # The result may be none of the points if the compiled model lost more than the switched one.
    proved = Outcome(best, outcome.points, outcome.sensitivity)
    whole = found.cost(frozenset())
    return model, described(proved, goal, trial.judge, trial.journal, layers, (whole, loss), "quantized")


def unreachable(outcome: Outcome, goal: Goal, what: str) -> AccuracyError:
    """Return the error for a budget in which nothing fits, with the Pareto front."""
    return AccuracyError(
        f"no layer can be {what} within {goal.budget}; what was tried, the cheapest first "
        f"({goal.objective}, loss, layers):\n{front_text(outcome)}",
        hint="allow more, give other calibration data, or try another kind",
    )


def described(
    outcome: Outcome,
    goal: Goal,
    judge: Judge,
    journal: Journal,
    layers: list[Layer],
    whole_and_loss: tuple[float, float],
    what: str,
) -> dict[str, Any]:
    """Return the report of a search: ``whole_and_loss`` are the cost of the float32 model and the loss of the best."""
    assert outcome.best is not None
    whole, loss = whole_and_loss
    return {
        "budget": asdict(goal.budget),
        "baseline": judge.baseline,
        "loss": loss,
        "objective": goal.objective,
        "cost": {"float32": whole, what: outcome.best.cost},
        "evaluations": len(outcome.points),
        "resumed": journal.resumed,
        "layers": _choices(layers, outcome.best, outcome, what),
        "front": [{"cost": p.cost, "loss": p.loss, "layers": len(p.layers)} for p in outcome.front()],
        "points": [{"cost": p.cost, "loss": p.loss} for p in outcome.points],
    }


def costs(
    mixture: Mixture, goal: Goal, shapes: dict[str, tuple[int, ...]], target: str, progress: Progress
) -> list[Layer]:
    """Return the cost of each layer in float32 and quantized: seconds, or bytes of weights."""
    if goal.objective == "time":
        return [Layer(name, *times) for name, times in layer_times(mixture, shapes, target, progress).items()]
    chosen = [p for p in products(mixture.model) if p.name in mixture.names]
    full = serialize.weight_bytes(mixture.model)
    saved = {p.name: full - serialize.weight_bytes(mixture.with_layers(frozenset({p.name}))) for p in chosen}
    return [Layer(p.name, p.array().nbytes, p.array().nbytes - saved[p.name]) for p in chosen]


def front_text(outcome: Outcome) -> str:
    """Return the Pareto front as lines."""
    return "\n".join(f"  {p.cost:.4g}  {p.loss:.4g}  {len(p.layers)}" for p in outcome.front())


def _proved(
    trial: Trial, outcome: Outcome, found: Search, goal: Goal, progress: Progress
) -> tuple[Point, oir.Model, float]:
    """Evaluate the result as it is compiled; sums in another order may move it over the budget by a little."""
    best = outcome.best
    for _ in range(_RETRIES):
        if best is None:
            break
        model = trial.mixture.with_layers(best.layers)
        progress("compiling the result")
        compiled = driver.compile(model, verify=False).model()
        loss = trial.judge.loss(compiled.run)
        if loss <= goal.budget.limit:
            return best, model, loss
        worst = max(best.layers, key=lambda name: outcome.sensitivity.get(name, 0.0))
        fewer = best.layers - {worst}
        best = Point(fewer, found.loss(fewer), found.cost(fewer)) if fewer else None
    raise AccuracyError(f"the compiled models lose more than {goal.budget}:\n{front_text(outcome)}")


def _choices(layers: list[Layer], best: Point, outcome: Outcome, what: str) -> dict[str, dict[str, Any]]:
    rows = {}
    for layer in layers:
        form = layer.form(best.layers)
        if form is not None:
            why = what if form is layer else f"{what}, as {form.name}"
        else:
            why = "does not pay" if layer.saved <= 0 else "over the budget"
        alone = outcome.sensitivity.get(layer.name)
        rows[layer.name] = {"before": layer.before, "after": layer.after, "loss alone": alone, "why": why}
    return rows


def subject(model: oir.Model, samples: Sequence[data.Samples | None], goal: Goal, options: Mapping[str, Any]) -> str:
    """Return a text that is the same for the same model, data, labels and options, for the journal."""
    digest = hashlib.sha256(serialize.to_proto(model).SerializeToString(deterministic=True))
    arrays = [item for found in samples if found is not None for call in found for item in call.items()]
    if isinstance(goal.labels, str | Path) and Path(goal.labels).is_file():
        digest.update(Path(goal.labels).read_bytes())
    elif goal.labels is not None and not isinstance(goal.labels, str):
        arrays.append(("labels", np.asarray(goal.labels)))
    for name, array in arrays:
        digest.update(repr((name, array.shape, array.dtype)).encode())
        digest.update(array.tobytes())
    how = goal.evaluate if isinstance(goal.evaluate, str) else getattr(goal.evaluate, "__qualname__", "")
    labels = str(goal.labels) if isinstance(goal.labels, str | Path) else ""
    plain = {name: sorted(value) if isinstance(value, frozenset) else value for name, value in options.items()}
    digest.update(repr((sorted(plain.items()), goal.budget.metric, how, labels)).encode())
    return digest.hexdigest()
