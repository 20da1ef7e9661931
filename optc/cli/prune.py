"""``optc prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from optc.cli.budget import budget_options, goal, write_plot
from optc.cli.common import Share, capture_arguments, capture_options, check_portable, json_option, print_json
from optc.errors import UsageError

IMPORTANCE = ["l1", "l2", "bn", "activation", "taylor"]


@click.command(name="prune")
@click.argument("model")
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="The ONNX file to write.")
@click.option("--structured", type=Share(), help="Remove this share of channels, neurons and heads.")
@click.option("--drop-layers", type=click.IntRange(1), help="Leave out so many residual branches that change least.")
@click.option("--low-rank", type=Share(), help="Split products in two, losing this share of the squared norm.")
@click.option("--magnitude", type=Share(), help="Zero this share of the weights.")
@click.option("--block", metavar="ROWSxCOLUMNS", help="With --magnitude: blocks of weights, like 4x8, go together.")
@click.option("--sparsity", metavar="N:M", help="Keep n of m neighbouring input channels, like 2:4.")
@click.option("--clip", type=float, help="Bound weights by this percentile of their magnitudes, like 99.9.")
@click.option("--cluster", type=click.IntRange(2), help="Let the weights of each tensor share so many values.")
@click.option("--scope", type=click.Choice(["layer", "global"]), default="layer", help="Rank per layer, or over all.")
@click.option("--importance", type=click.Choice(IMPORTANCE), default="l2", help="What makes a unit important.")
@click.option("--multiple", type=click.IntRange(1), default=8, help="Sizes that are left are multiples of this.")
@click.option("--layer", "layers", multiple=True, metavar="NAME=SHARE", help="Another share for a weight; repeatable.")
@click.option("--calibrate", metavar="DATA", help="Samples of the inputs: DIR, .npz, or package.module:function.")
@click.option("--samples", type=click.IntRange(1), default=128, help="How many samples to use at most.")
@click.option("--no-recover", is_flag=True, help="Do not fit what is left to the original's activations.")
@click.option("--no-verify", is_flag=True, help="Do not compare the result with the masked original.")
@budget_options
@capture_options
@json_option
def command(
    model: str,
    output: Path,
    structured: float | None,
    drop_layers: int | None,
    low_rank: float | None,
    magnitude: float | None,
    block: str | None,
    sparsity: str | None,
    clip: float | None,
    cluster: int | None,
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
    **given: Any,
) -> None:
    """Make MODEL smaller by what matters least, and write portable ONNX.

    --structured makes every tensor smaller and the model faster; --low-rank makes large products faster. Zeros, clipped
    and shared values make no kernel faster here: files compress better, and other tools may use them. Names in --layer
    may have wildcards. A structured result is run beside the original with zeros in place of what was removed, which
    has to give the same; the accuracy that pruning costs is another matter. With --calibrate, which needs no labels,
    layers are fitted to what the original computes; importance by activation or taylor needs it too. With a budget
    (--max-drop, --max-error), --structured is the share that goes at most, and a search finds what may go where.

    \b
    Examples:
      optc prune model.onnx --structured 50% -o small.onnx
      optc prune model.onnx --structured 50% --calibrate images/ -o small.onnx
      optc prune model.onnx --sparsity 2:4 -o sparse.onnx
      optc prune model.onnx --low-rank 2% --calibrate samples.npz -o small.onnx
      optc prune model.onnx --structured 30% --scope global --layer 'stem*=0' -o small.onnx
      optc prune model.onnx --structured 50% --calibrate x.npz --labels y.npy --max-drop 1% -o small.onnx
    """
    from rich.console import Console

    from optc.compression.prune import prune
    from optc.driver import Trace
    from optc.ir import serialize
    from optc.passes.prune.select import Structured

    check_portable(output, "prune")
    if structured is None and (layers or importance != "l2"):
        raise UsageError("--layer and --importance speak about --structured")
    wanted = goal(given)
    how = Structured(structured or 0.0, scope, importance, multiple, layers=dict(map(_layer, layers)))
    console = Console(stderr=True)
    with console.status("starting") as status:
        result = prune(
            model,
            structured=how if structured is not None else None,
            drop_layers=drop_layers,
            low_rank=low_rank,
            zeros=_zeros(magnitude, block, sparsity, scope),
            clip=clip,
            cluster=cluster,
            calibrate=calibrate,
            samples=samples,
            recover=not no_recover,
            verify=not no_verify,
            goal=wanted,
            evaluation=given["evaluation"],
            trace=Trace(progress=lambda stage: status.update(f"[bold]{stage}[/] {model}")),
            **capture_arguments(input_shapes, dims),
        )
    serialize.save(result.model, output)
    if given["plot"] is not None:
        write_plot(given["plot"], result.report["search"], "time, share of the whole model's")
    if as_json:
        print_json({"output": str(output), **result.report})
    else:
        _show(console, output, result.report)


def _zeros(share: float | None, block: str | None, sparsity: str | None, scope: str) -> Any:
    from optc.compression.prune import Zeros

    if share is not None and sparsity is not None:
        raise UsageError("--magnitude and --sparsity exclude each other")
    if sparsity is not None:
        return Zeros(of=_pair(sparsity, ":", "--sparsity 2:4"))
    if share is None:
        if block is not None:
            raise UsageError("--block speaks about --magnitude")
        return None
    return Zeros(share, block=_pair(block, "x", "--block 4x8") if block is not None else (1, 1), scope=scope)


def _pair(text: str, separator: str, example: str) -> tuple[int, int]:
    first, _, second = text.partition(separator)
    if not (first.isdigit() and second.isdigit()):
        raise UsageError(f"'{text}' is no pair of numbers; write {example}")
    return int(first), int(second)


def _layer(text: str) -> tuple[str, float]:
    name, _, share = text.rpartition("=")
    if not name:
        raise UsageError(f"--layer {text}: write NAME=SHARE", hint="--layer 'encoder.*=30%'")
    return name, Share().convert(share, None, None)


def _show(console: Any, output: Path, report: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from optc.cli.quantize import show_search

    if "search" in report:
        show_search(console, report["search"])
    table = Table(title=f"{output}")
    for header in ("what", "units", "tensors"):
        table.add_column(header, justify="left" if header == "what" else "right")
    for family in report.get("families", ()):
        units = f"{family['before']} -> {family['after']}"
        table.add_row(escape(family["name"]), units, str(len(family["weights"])))
    if table.rows:
        console.print(table)
    for name, change in report.get("dropped", {}).items():
        console.print(f"left out: the branch that {escape(name)} adds, a change of {change:.2%}", highlight=False)
    for layer in report.get("low_rank", ()):
        what = f"rank {layer['rank']}, error {layer['error']:.1%}" if layer["rank"] else "left alone: it would not pay"
        console.print(f"{escape(layer['name'])} [{layer['features']}, {layer['columns']}]: {what}", highlight=False)
    if "zeros" in report:
        tensors = report["zeros"]["tensors"]
        total = sum(t["size"] for t in tensors) or 1
        share = sum(t["zeros"] * t["size"] for t in tensors) / total
        console.print(f"zeros: {share:.1%} of {total:,} weights; {report['zeros']['note']}", highlight=False)
    for key in ("clipped", "clustered"):
        if key in report:
            console.print(f"{key}: {report[key]:,} weights changed")
    for kept in report.get("untouched", ()):
        why = kept["reasons"][0] if kept["reasons"] else "coupled with sizes that have to stay"
        console.print(f"left alone: {escape(kept['name'])} ({kept['size']}): {escape(why)}", highlight=False)
    for name in ("parameters", "flops"):
        before, after = report.get(name, (None, None))
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
