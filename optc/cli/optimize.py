"""``optc optimize``."""

from __future__ import annotations

from pathlib import Path

import click

from optc.cli.common import capture_arguments, capture_options, check_portable, json_option, print_json


@click.command(name="optimize")
@click.argument("model")
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="The ONNX file to write.")
@capture_options
@click.option("--disable-pass", "disable", multiple=True, metavar="NAME", help="Leave out a pass; repeatable.")
@click.option("--print-ir-after", multiple=True, metavar="PASS|all", help="Print the graph after a pass.")
@click.option("--dump-ir", type=click.Path(path_type=Path), help="Write the graph after every pass to this folder.")
@click.option("--verify-ir", is_flag=True, help="Check the graph's canonical form after every pass.")
@json_option
def command(
    model: str,
    output: Path,
    input_shapes: tuple[str, ...],
    dims: tuple[str, ...],
    disable: tuple[str, ...],
    print_ir_after: tuple[str, ...],
    dump_ir: Path | None,
    verify_ir: bool,
    as_json: bool,
) -> None:
    """Run the graph passes on MODEL and write portable ONNX, which any ONNX runtime can run.

    \b
    Examples:
      optc optimize model.onnx -o optimized.onnx
      optc optimize model.onnx -o optimized.onnx --dump-ir passes/
    """
    from optc.driver import Trace, optimize
    from optc.ir import serialize
    from optc.passes.observer import observers

    check_portable(output, "optimize")
    trace = Trace()
    optimized = optimize(
        model,
        disable_passes=disable,
        observers=observers(print_ir_after=print_ir_after, dump_ir=dump_ir, verify_ir=verify_ir),
        trace=trace,
        **capture_arguments(input_shapes, dims),
    )
    serialize.save(optimized, output)
    if as_json:
        print_json({"output": str(output), "seconds": trace.seconds, "passes": [vars(r) for r in trace.passes]})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{model} -> {output}")
    for header in ("pass", "nodes", "seconds", "rewrites"):
        table.add_column(header, justify="right" if header in ("nodes", "seconds") else "left")
    for record in trace.passes:
        if record.modified:
            rewrites = ", ".join(f"{name} x{count}" for name, count in record.fired.items())
            nodes = f"{record.nodes_before} -> {record.nodes_after}"
            table.add_row(record.name, nodes, f"{record.seconds:.2f}", rewrites)
    Console().print(table)
