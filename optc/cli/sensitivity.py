"""``optc sensitivity``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from optc.cli.budget import measuring_options
from optc.cli.common import capture_arguments, capture_options, json_option, print_json
from optc.cli.quantize import KIND_HELP, quantization_arguments, quantization_options


@click.command(name="sensitivity")
@click.argument("model")
@click.option("--to", "kind", default="int8", help=KIND_HELP)
@click.option("--metric", default="cosine", help="Error of outputs: cosine (default), kl, top1 or relative.")
@measuring_options
@quantization_options
@capture_options
@json_option
def command(
    model: str,
    kind: str,
    metric: str,
    input_shapes: tuple[str, ...],
    dims: tuple[str, ...],
    as_json: bool,
    **given: Any,
) -> None:
    """Show what quantizing each layer of MODEL alone costs in accuracy, the most sensitive layer first.

    \b
    Examples:
      optc sensitivity model.onnx --calibrate samples/
      optc sensitivity model.onnx --calibrate samples.npz --labels labels.npy
      optc sensitivity model.onnx --calibrate samples.npz --eval mypackage.score:accuracy --journal run.jsonl
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from optc.compression.budget import Goal
    from optc.compression.evaluate import Budget, max_error
    from optc.compression.sensitivity import sensitivity

    scored = given["evaluate"] is not None or given["labels"] is not None
    budget = Budget("accuracy", 0.0) if scored else max_error(f"{metric}:0")
    goal = Goal(budget, given["evaluate"], given["labels"], journal=given["journal"])
    console = Console(stderr=True)
    with console.status("starting") as status:
        rows, whole = sensitivity(
            model,
            goal,
            evaluation=given["evaluation"],
            progress=lambda text: status.update(f"[bold]{text}[/]"),
            **quantization_arguments(kind, given),
            **capture_arguments(input_shapes, dims),
        )
    if as_json:
        print_json({"metric": budget.metric, "all": whole, "layers": [asdict(row) for row in rows]})
        return
    table = Table(title=f"{model}: {budget.metric} with one layer in {kind}; with all of them {whole:.4g}")
    for header in ("layer", "operator", "weights", "loss"):
        table.add_column(header, justify="left" if header in ("layer", "operator") else "right")
    for row in rows:
        table.add_row(escape(row.name), row.operator, f"{row.weights:,}", f"{row.loss:.3g}")
    Console().print(table)
