"""``optc inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from optc.cli.common import capture_arguments, capture_options, json_option, print_json
from optc.cli.compile import describe_tuning


@click.command(name="inspect")
@click.argument("model")
@capture_options
@click.option("--text", is_flag=True, help="Print the whole graph in ONNX's text form (models only).")
@json_option
def command(model: str, input_shapes: tuple[str, ...], dims: tuple[str, ...], text: bool, as_json: bool) -> None:
    """Show what is inside MODEL: an artifact (.optc), or anything that `optc compile` takes.

    \b
    Examples:
      optc inspect model.optc
      optc inspect model.onnx --dim batch=8
      optc inspect model.optc --json | jq .report.kernels
    """
    if Path(model).suffix == ".optc":
        _artifact(Path(model), as_json)
        return
    from optc.ir import cost
    from optc.ir import text as ir_text
    from optc.source import capture

    captured = capture(model, **capture_arguments(input_shapes, dims))
    if as_json:
        print_json([vars(entry) for entry in cost.estimate(captured)])
    else:
        click.echo(ir_text.to_text(captured) if text else ir_text.summary(captured))


def _artifact(path: Path, as_json: bool) -> None:
    import json

    from optc.runtime import read_manifest

    manifest, text = read_manifest(path)
    report = json.loads(text)
    if as_json:
        print_json({"manifest": json.loads(manifest.to_json()), "report": report})
        return
    _show(path, manifest, report)


def _show(path: Path, manifest: Any, report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), title=str(path), title_justify="left")
    table.add_row("made by", ", ".join(f"{k} {v}" for k, v in sorted(manifest.producer.items())))
    table.add_row("target", f"{manifest.target.triple}, {manifest.target.cpu}")
    for what, tensors in (("input", manifest.inputs), ("output", manifest.outputs)):
        for tensor in tensors:
            table.add_row(what, escape(str(tensor)))
    weights = sum(w.nbytes for w in manifest.weights)
    table.add_row("weights", f"{len(manifest.weights)} tensors, {weights / 1e6:.2f} MB")
    planned = manifest.memory.get("activations")
    text = "depends on the sizes given" if planned is None else f"{planned / 1e6:.2f} MB planned"
    table.add_row("activations", text)
    for name, spec in sorted(manifest.files.items()):
        table.add_row("file", f"{name}  {spec.size} bytes  sha256 {spec.sha256[:16]}...")
    rules: dict[str, int] = {}
    for kernel in report.get("kernels", []):
        rules[kernel["schedule"]] = rules.get(kernel["schedule"], 0) + 1
    table.add_row("kernels", ", ".join(f"{count} {rule}" for rule, count in sorted(rules.items())))
    table.add_row("tuning", describe_tuning(report.get("tuning", "")))
    for key, value in sorted(manifest.metadata.items()):
        table.add_row("metadata", escape(f"{key}: {value if len(value) < 80 else value[:77] + '...'!r}"))
    verification = report.get("verification")
    if isinstance(verification, dict):
        for output in verification["outputs"]:
            note = f"{output['name']}: relative error {output['relative']:.1e} against {verification['reference']}"
            table.add_row("verified", note)
    else:
        table.add_row("verified", f"no: {verification}")
    Console().print(table)
