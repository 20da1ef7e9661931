"""``optc verify``."""

from __future__ import annotations

from pathlib import Path

import click

from optc.cli.common import capture_arguments, capture_options, json_option, print_json, read_inputs
from optc.errors import UsageError


@click.command(name="verify")
@click.argument("model")
@click.argument("artifact", type=click.Path(path_type=Path), required=False)
@click.option("--input", "-i", "inputs", multiple=True, metavar="NAME=FILE", help="As in `optc run`.")
@click.option("--seed", default=0, show_default=True, help="Seed of the random inputs.")
@capture_options
@click.option("--reference", type=click.Choice(["onnxruntime", "onnx"]), help="Default: the best one there is.")
@click.option("--tolerance", type=float, help="Allowed error relative to each output's largest magnitude.")
@click.option("--bisect", is_flag=True, help="Name the first graph pass that changes the results.")
@json_option
def command(
    model: str,
    artifact: Path | None,
    inputs: tuple[str, ...],
    seed: int,
    input_shapes: tuple[str, ...],
    dims: tuple[str, ...],
    reference: str | None,
    tolerance: float | None,
    bisect: bool,
    as_json: bool,
) -> None:
    """Compare ARTIFACT with a reference for MODEL, output by output; without ARTIFACT, compile MODEL first.

    \b
    Examples:
      optc verify model.onnx model.optc
      optc verify model.onnx model.optc --dim batch=3 --seed 7
      optc verify model.onnx --bisect
    """
    from optc import sample, verification
    from optc.driver import compile, specs, verify_artifact
    from optc.runtime import load
    from optc.source import capture

    arguments = capture_arguments(input_shapes, dims)
    if bisect:
        from optc.passes.bisection import bisect as find_pass

        captured = capture(model, **arguments)
        choices = verification.integer_choices(captured)
        described = specs(captured.graph.inputs)
        arrays = sample.random_inputs(described, seed=seed, integers=choices)
        culprit = find_pass(captured, {**arrays, **read_inputs(inputs, described)}, tolerance or 1e-4)
        if as_json:
            print_json({"pass": culprit})
        else:
            click.echo(f"first pass that changes the results: {culprit}" if culprit else "no pass changes the results")
        return
    if artifact is None:
        loaded = compile(model, verify=False, **arguments).model()
        original = capture(model, **arguments)
    else:
        loaded = load(artifact)
        if arguments["input_shapes"]:
            raise UsageError("--input-shape has no effect on an artifact that is already compiled")
        original = capture(model)
    given = read_inputs(inputs, loaded.inputs) if inputs else None
    sizes = arguments["dims"] if artifact is not None else {}
    result = verify_artifact(
        loaded, original, inputs=given, seed=seed, dims=sizes, prefer=reference, tolerance=tolerance
    )
    if as_json:
        print_json(result.describe())
    else:
        _show(result, tolerance)
    result.require(tolerance)


def _show(result: object, tolerance: float | None) -> None:
    from rich.console import Console
    from rich.table import Table

    from optc.verification import Verification

    assert isinstance(result, Verification)
    table = Table(title=f"against {result.reference}, inputs: {result.inputs} {result.dims or ''}")
    for header in ("output", "max error", "mean error", "relative", "cosine", "differing", ""):
        table.add_column(header, justify="left" if header == "output" else "right")
    for o in result.outputs:
        table.add_row(
            o.name,
            f"{o.max_absolute:.2e}",
            f"{o.mean_absolute:.2e}",
            f"{o.relative:.2e}",
            f"{o.cosine:.8f}",
            f"{o.mismatched:.1%}",
            "[green]ok[/]" if o.within(tolerance) else "[red]off[/]",
        )
    Console().print(table)
