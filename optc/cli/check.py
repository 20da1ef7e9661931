"""``optc check``."""

from __future__ import annotations

import click

from optc.cli.common import capture_arguments, capture_options, json_option, print_json
from optc.errors import ModelError


@click.command(name="check")
@click.argument("model")
@click.option("--target", "-t", default="cpu", show_default=True, help="What it would be compiled for.")
@capture_options
@json_option
def command(model: str, target: str, input_shapes: tuple[str, ...], dims: tuple[str, ...], as_json: bool) -> None:
    """List everything in MODEL that is not supported, at once and without compiling.

    \b
    Examples:
      optc check model.onnx
      optc check model.onnx --target aarch64 --json
    """
    from optc.driver import check

    try:
        optimized = check(model, target=target, **capture_arguments(input_shapes, dims))
    except ModelError as error:
        if as_json:
            print_json({"supported": False, "kind": type(error).__name__, "message": error.message})
            raise SystemExit(error.exit_code) from error
        raise
    count = sum(1 for _ in optimized.graph.all_nodes())
    if as_json:
        print_json({"supported": True, "nodes": count})
    else:
        click.echo(f"{model}: supported for {target} ({count} nodes after the graph passes)")
