"""``optc prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from optc.cli.common import Share, capture_arguments, capture_options, json_option, print_json
from optc.errors import UsageError

IMPORTANCE = ["l1", "l2", "bn", "activation", "taylor"]


@click.command(name="prune")
@click.argument("model")
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="The ONNX file to write.")
@click.option("--structured", type=Share(), required=True, help="Remove this share of channels, neurons and heads.")
@click.option("--scope", type=click.Choice(["layer", "global"]), default="layer", help="Rank per layer, or over all.")
@click.option("--importance", type=click.Choice(IMPORTANCE), default="l2", help="What makes a unit important.")
@click.option("--multiple", type=click.IntRange(1), default=8, help="Sizes that are left are multiples of this.")
@click.option("--layer", "layers", multiple=True, metavar="NAME=SHARE", help="Another share for a weight; repeatable.")
@click.option("--calibrate", metavar="DATA", help="Samples of the inputs: DIR, .npz, or package.module:function.")
@click.option("--samples", type=click.IntRange(1), default=128, help="How many samples to use at most.")
@click.option("--no-recover", is_flag=True, help="Do not fit what is left to the original's activations.")
@click.option("--no-verify", is_flag=True, help="Do not compare the result with the masked original.")
@capture_options
@json_option
def command(
    model: str,
    output: Path,
    structured: float,
    scope: str,
    importance: str,
    multiple: int,
    layers: tuple[str, ...],
    calibrate: str | None,
    samples: int,
    no_recover: bool,
    no_verify: bool,
    input_shapes: tuple[str, ...],
    dims: tuple[str, ...],
    as_json: bool,
) -> None:
    """Remove what matters least from MODEL and write portable ONNX, with every tensor smaller.

    Names in --layer may have wildcards. The result is run beside the original with zeros in place of what was
    removed, which has to give the same; the accuracy that pruning costs is another matter. With --calibrate, which
    needs no labels, layers are fitted to what the original computes; importance by activation or taylor needs it too.

    \b
    Examples:
      optc prune model.onnx --structured 50% -o small.onnx
      optc prune model.onnx --structured 50% --calibrate images/ -o small.onnx
      optc prune model.onnx --structured 30% --scope global --layer 'stem*=0' -o small.onnx
    """
    from rich.console import Console

    from optc.compression.prune import prune
    from optc.driver import Trace
    from optc.ir import serialize
    from optc.passes.prune.select import Structured

    if output.suffix != ".onnx":
        raise UsageError(f"{output}: the output of `optc prune` is an .onnx file")
    how = Structured(structured, scope, importance, multiple, layers=dict(map(_layer, layers)))
    console = Console(stderr=True)
    with console.status("starting") as status:
        result = prune(
            model,
            structured=how,
            calibrate=calibrate,
            samples=samples,
            recover=not no_recover,
            verify=not no_verify,
            trace=Trace(progress=lambda stage: status.update(f"[bold]{stage}[/] {model}")),
            **capture_arguments(input_shapes, dims),
        )
    serialize.save(result.model, output)
    if as_json:
        print_json({"output": str(output), **result.report})
    else:
        _show(console, output, result.report)


def _layer(text: str) -> tuple[str, float]:
    name, _, share = text.rpartition("=")
    if not name:
        raise UsageError(f"--layer {text}: write NAME=SHARE", hint="--layer 'encoder.*=30%'")
    return name, Share().convert(share, None, None)


def _show(console: Any, output: Path, report: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{output}")
    for header in ("what", "units", "tensors"):
        table.add_column(header, justify="left" if header == "what" else "right")
    for family in report["families"]:
        units = f"{family['before']} -> {family['after']}"
        table.add_row(escape(family["name"]), units, str(len(family["weights"])))
    console.print(table)
    for kept in report["untouched"]:
        why = kept["reasons"][0] if kept["reasons"] else "coupled with sizes that have to stay"
        console.print(f"left alone: {escape(kept['name'])} ({kept['size']}): {escape(why)}", highlight=False)
    for name in ("parameters", "flops"):
        before, after = report[name]
        if before:
            console.print(f"{name}: {before:,} -> {after:,} ({after / before:.0%})")
    for fit in report.get("recovery", ()):
        console.print(
            f"fitted: {escape(fit['name'])}: error {fit['before']:.1%} -> {fit['after']:.1%}", highlight=False
        )
    checked = report.get("verification")
    if checked is not None:
        worst = max((o["relative"] for o in checked["outputs"]), default=0.0)
        console.print(f"[green]checked[/]: relative error {worst:.1e} against the masked original")
