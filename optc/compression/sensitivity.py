"""``optc.sensitivity``: what quantizing each layer alone costs in accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optc import driver
from optc.compression import data
from optc.compression.budget import Goal
from optc.compression.observe import Progress
from optc.compression.options import Options
from optc.compression.quantize import Quantizer
from optc.compression.search import Layer, Search
from optc.passes.quantize.products import products


@dataclass(frozen=True)
class Row:
    """A layer, and the loss with it alone quantized, in the unit of the goal's metric."""

    name: str
    operator: str
    weights: int
    loss: float


def sensitivity(
    path_or_model: Any,
    goal: Goal,
    options: Options | None = None,
    *,
    calibrate: Any,
    evaluation: Any = None,
    example_inputs: Sequence[Any] | None = None,
    input_shapes: Mapping[str, Sequence[int | str]] | None = None,
    dims: Mapping[str, int] | None = None,
    limit: int = data.LIMIT,
    progress: Progress = lambda _: None,
) -> tuple[list[Row], float]:
    """Return a row for each layer, the most sensitive first, and the loss with all of them quantized.

    Arguments and errors are those of ``optc.quantize``; the limit of the goal's budget plays no part.
    """
    progress("optimizing the float32 model")
    model = driver.optimize(path_or_model, example_inputs, input_shapes=input_shapes, dims=dims)
    specs = driver.specs(model.graph.inputs)
    samples = data.load(calibrate, specs, limit=limit)
    judged = samples if evaluation is None else data.load(evaluation, specs, limit=limit)
    trial = Quantizer(model, samples, progress).trial(options or Options(), goal, judged)
    chosen = [p for p in products(model) if p.name in trial.mixture.names]
    search = Search([Layer(p.name, 1.0, 0.0) for p in chosen], trial.evaluate, trial.journal, progress)
    losses = search.sensitivity()
    rows = [Row(p.name, p.node.op_type, p.array().size, losses[p.name]) for p in chosen]
    return sorted(rows, key=lambda row: -row.loss), search.loss(frozenset(losses))
