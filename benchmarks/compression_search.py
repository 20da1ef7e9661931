"""The search within an accuracy budget beside random mixtures of layers, judged by the same evaluations and costs.

    python benchmarks/compression_search.py

The digits models of examples/quantize_digits.py with weights of 3 bits, few enough that not every layer fits. Accuracy
is measured on training images that calibration does not see. A random mixture takes each layer with a probability that
is itself drawn, so that small and large ones occur. Writes its table into docs/compression.md.
"""

from __future__ import annotations

from typing import Any

import compression_data as texts
import numpy as np
from compression import FOLDER, PAGE, TASKS, digits_module

import optc
from optc.compression import data
from optc.compression.budget import Goal, costs
from optc.compression.evaluate import Budget
from optc.compression.options import Options
from optc.compression.quantize import Quantizer
from optc.compression.search import Search
from optc.driver import specs

RANDOM = 30
CASES = [
    (name, objective, budget)
    for name in ("digits CNN", "digits ViT")
    for objective, budget in (
        ("size", Budget("accuracy", 0.005)),
        ("size", Budget("kl", 0.01)),
        ("time", Budget("kl", 0.01)),
    )
]


def compare(name: str, objective: str, budget: Budget) -> str:
    """Return the row of one model."""
    task = TASKS[name]
    model = optc.optimize(task.file())
    entries = specs(model.graph.inputs)
    quantizer = Quantizer(model, data.load(task.calibration("x"), entries))
    images, labels = digits_module().digits()[0]
    judged: Any = data.load([{"x": images[512:].numpy()}], entries)
    goal = Goal(budget, labels=labels[512:].numpy() if budget.metric == "accuracy" else None, objective=objective)
    trial = quantizer.trial(Options("int8", bits=3), goal, judged)
    layers = costs(trial.mixture, goal, quantizer.shapes(), "cpu", lambda _: None)
    search = Search(layers, trial.evaluate)
    outcome = search.run(budget.limit)
    evaluations = len(outcome.points)
    random = np.random.default_rng(0)
    inside = []
    for _ in range(RANDOM):
        share = random.random()
        drawn = frozenset(layer.name for layer in layers if random.random() < share)
        if search.loss(drawn) <= budget.limit:
            inside.append(search.cost(drawn))
    whole, unit, scale = search.cost(frozenset()), *(("KB", 1e3) if objective == "size" else ("us", 1e-6))
    ours = "none" if outcome.best is None else f"{outcome.best.cost / scale:.1f}"
    theirs = f"{min(inside) / scale:.1f}" if inside else "none"
    return (
        f"| {name} | {budget} | {objective} | {len(layers)} | {whole / scale:.1f} {unit} | {ours} | {theirs} | "
        f"{len(inside)} | {evaluations} |"
    )


def main() -> None:
    """Compare, and write the table."""
    lines = [
        "| model | budget | objective | layers | float32 | search | best of 30 random | of them inside | evaluations |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    FOLDER.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        lines.append(compare(*case))
        print(lines[-1], flush=True)
    texts.write_between(PAGE, "search", "\n".join(lines))


if __name__ == "__main__":
    main()
