"""``optc quantize``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from optc.cli.budget import budget_options, goal, paying_option, write_plot
from optc.cli.common import capture_arguments, capture_options, check_portable, json_option, print_json

KIND_HELP = "int8 (default), int8-dynamic, int8-weights, int4-weights, float16 or bfloat16."
Command = TypeVar("Command", bound=Callable[..., Any])


def quantization_options(command: Command) -> Command:
    """Add the options of quantization, which ``optc compile`` has too."""
    for option in reversed(
        (
            click.option(
                "--calibrate", metavar="DATA", help="Samples: a folder, an .npz file or package.module:function."
            ),
            click.option("--samples", type=click.IntRange(1), default=512, help="Take this many samples at most."),
            click.option("--method", default="min-max", help="Ranges: min-max (default), percentile, entropy or mse."),
            click.option("--activations", default="uint8", help="uint8 (default), int8, int16 or uint16."),
            click.option("--symmetric", is_flag=True, help="Zero points in the middle of the type."),
            click.option("--per-tensor", is_flag=True, help="One scale for all weights of a layer."),
            click.option("--bits", type=int, default=8, help="Bits of int8 weights: 7 are safe for old CPUs' sums."),
            click.option(
                "--rounding",
                default="auto",
                help="Of matrices: nearest, gptq, adaround or auto (default: gptq for int4 with --calibrate).",
            ),
            click.option("--block", type=int, help="Rows that share a scale: 32 for 4 bits, 0 (whole columns) for 8."),
            click.option("--zero-points", is_flag=True, help="Zero points for weights that are only stored."),
            click.option("--smooth", default="auto", help="SmoothQuant's exponent for int8: 0.5 say, auto or none."),
            click.option("--scale-weights", is_flag=True, help="AWQ's scaling for weights that are only stored."),
            click.option("--equalize", is_flag=True, help="Equalize the weights of pairs of convolutions."),
            click.option("--no-correct-bias", is_flag=True, help="Leave biases as they are, whatever rounding shifts."),
            click.option("--exclude", multiple=True, metavar="LAYER", help="Leave a layer in float32; repeatable."),
        )
    ):
        command = option(command)
    return command


def quantization_arguments(kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of ``optc.quantize`` for the options above."""
    from optc.compression.options import Options

    options = Options(
        kind=kind,
        method=given["method"],
        activations=given["activations"],
        symmetric=given["symmetric"],
        per_channel=not given["per_tensor"],
        bits=given["bits"],
        rounding=given["rounding"],
        block=given["block"],
        zero_points=given["zero_points"],
        smooth=_exponent(given["smooth"]),
        scale_weights=given["scale_weights"],
        equalize=given["equalize"],
        correct_bias=not given["no_correct_bias"],
        exclude=frozenset(given["exclude"]),
    )
    return {
        "options": options,
        "calibrate": given["calibrate"],
        "limit": given["samples"],
    }


def _exponent(text: str) -> float | str | None:
    try:
        return None if text == "none" else float(text)
    except ValueError:
        return text


@click.command(name="quantize")
@click.argument("model")
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="The ONNX file to write.")
@click.option("--to", "kind", default="int8", help=KIND_HELP)
@click.option("--target", "-t", default="cpu", help="What layers have to be fast on; see `optc targets`.")
@budget_options
@paying_option
@quantization_options
@capture_options
@json_option
def command(
    model: str,
    output: Path,
    kind: str,
    target: str,
    input_shapes: tuple[str, ...],
    dims: tuple[str, ...],
    as_json: bool,
    **given: Any,
) -> None:
    """Quantize MODEL and write portable ONNX, with QuantizeLinear and DequantizeLinear.

    \b
    Examples:
      optc quantize model.onnx --calibrate samples/ -o int8.onnx
      optc quantize model.onnx --calibrate mypackage.data:read --smooth 0.5 -o int8.onnx
      optc quantize model.onnx --to int4-weights --rounding gptq --calibrate samples.npz -o int4.onnx
      optc quantize model.onnx --to float16 -o half.onnx
      optc quantize model.onnx --calibrate x.npz --labels y.npy --max-drop 0.5% --journal run.jsonl -o int8.onnx
    """
    from rich.console import Console

    from optc.compression.quantize import quantize
    from optc.ir import serialize

    check_portable(output, "quantize")
    wanted = goal(given)
    console = Console(stderr=True)
    with console.status("starting") as status:
        result = quantize(
            model,
            goal=wanted,
            only_paying=given["only_paying"],
            target=target,
            evaluation=given["evaluation"],
            progress=lambda text: status.update(f"[bold]{text}[/]"),
            **quantization_arguments(kind, given),
            **capture_arguments(input_shapes, dims),
        )
        serialize.save(result.model, output)
        if given["plot"] is not None:
            write_plot(given["plot"], result.report["search"])
    if as_json:
        print_json({"output": str(output), **result.report})
        return
    show(console, str(output), result.report)


def show(console: Any, output: str, report: dict[str, Any]) -> None:
    """Print what was done to each layer."""
    from rich.markup import escape
    from rich.table import Table

    sizes = report["weight_bytes"]
    table = Table(title=f"{output}: weights {sizes['before'] / 1e6:.1f} -> {sizes['after'] / 1e6:.1f} MB")
    for header in ("layer", "operator", "weights", "to"):
        table.add_column(header, justify="right" if header == "weights" else "left")
    for layer in report["layers"]:
        table.add_row(escape(layer["name"]), layer["operator"], f"{layer['weights']:,}", layer["to"])
    console.print(table)
    if "search" in report:
        show_search(console, report["search"])


def show_search(console: Any, found: dict[str, Any]) -> None:
    """Print what a search found."""
    budget = found["budget"]
    console.print(
        f"{budget['metric']}: loses {found['loss']:.4g} of {budget['limit']:g} allowed; "
        f"{found['evaluations']} mixtures tried, {found['resumed']} of them known before"
    )
