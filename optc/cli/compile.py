"""``optc compile``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from optc.cli.budget import budget_options, paying_option
from optc.cli.common import Duration, Share, capture_arguments, capture_options, json_option, print_json
from optc.cli.prune import IMPORTANCE
from optc.cli.quantize import quantization_options
from optc.config import DEFAULT_NAME, CompileConfig, read, write
from optc.errors import UsageError


@click.command(name="compile")
@click.argument("model", required=False)
@click.option("--output", "-o", type=click.Path(), help="The artifact to write (default: MODEL's name with .optc).")
@click.option("--target", "-t", help="What to compile for (default: cpu, this machine); see `optc targets`.")
@capture_options
@click.option("--no-verify", is_flag=True, help="Do not compare the result with a reference.")
@click.option("--tolerance", type=float, help="Allowed error relative to each output's largest magnitude.")
@click.option("--disable-pass", "disable", multiple=True, metavar="NAME", help="Leave out a pass; repeatable.")
@click.option("--print-ir-after", multiple=True, metavar="PASS|all", help="Print the graph after a pass.")
@click.option("--dump-ir", type=click.Path(path_type=Path), help="Write the graph after every pass to this folder.")
@click.option("--verify-ir", is_flag=True, help="Check the graph's canonical form after every pass.")
@click.option("--log", type=click.Path(path_type=Path), help="Take decisions about kernels from this tuning log.")
@click.option("--tune", type=Duration(), help="Tune first, for a time like 5m, into the log if one is given.")
@click.option("--threads", type=click.IntRange(1), help="Threads of the log's records (default: this machine's).")
@click.option("--offline", is_flag=True, help="Never measure anything; the build depends on its files alone.")
@click.option("--require-tuned", is_flag=True, help="Fail (exit code 5) if a kernel has no record of its own.")
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="Weights of a training run, for package.module:factory."
)
@click.option("--prune", type=Share(), help="First remove this share of channels, neurons and heads; see `optc prune`.")
@click.option("--importance", type=click.Choice(IMPORTANCE), help="With --prune: what makes a unit important.")
@click.option("--quantize", "kind", metavar="KIND", help="Quantize first, to int8 say; see `optc quantize`.")
@budget_options
@paying_option
@quantization_options
@click.option("--config", type=click.Path(path_type=Path), help=f"Read options from a file like {DEFAULT_NAME}.")
@click.option("--save-config", type=click.Path(path_type=Path), help="Write these options to a new file.")
@json_option
def command(
    model: str | None,
    output: str | None,
    target: str | None,
    input_shapes: tuple[str, ...],
    dims: tuple[str, ...],
    no_verify: bool,
    tolerance: float | None,
    disable: tuple[str, ...],
    print_ir_after: tuple[str, ...],
    dump_ir: Path | None,
    verify_ir: bool,
    log: Path | None,
    tune: float | None,
    threads: int | None,
    offline: bool,
    require_tuned: bool,
    checkpoint: Path | None,
    prune: float | None,
    importance: str | None,
    kind: str | None,
    config: Path | None,
    save_config: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Compile MODEL (an ONNX file, a .pt2 file or package.module:factory) into one verified artifact.

    \b
    Examples:
      optc compile model.onnx -o model.optc
      optc compile model.onnx --dim batch=8 --target x86-64-v3
      optc compile mypackage.models:build -o model.optc
      optc compile model.onnx --log tuning.jsonl --offline --require-tuned
      optc compile model.onnx --tune 5m
      optc compile mypackage.train:recipe --checkpoint run -o model.optc
      optc compile model.onnx --prune 50%
      optc compile model.onnx --prune 50% --calibrate samples/ --max-error cosine:0.01
      optc compile model.onnx --quantize int8 --calibrate samples/ --max-error cosine:0.01
      optc compile --config optc.toml

    Without MODEL and --config, ./optc.toml is read if it exists.
    """
    settings = _settings(config, model)
    _override(settings, model, output, target, no_verify, tolerance, disable)
    settings.log = str(log) if log is not None else settings.log
    settings.threads = threads or settings.threads
    settings.offline = settings.offline or offline
    settings.require_tuned = settings.require_tuned or require_tuned
    captured = capture_arguments(input_shapes, dims)
    settings.input_shapes.update({k: list(v) for k, v in captured["input_shapes"].items()})
    settings.dims.update(captured["dims"])
    if settings.model is None:
        raise UsageError("no model given", hint=f"optc compile MODEL, or a {DEFAULT_NAME} with compile.model")
    destination = Path(settings.output or _default_output(settings.model))
    if not destination.parent.is_dir():
        raise UsageError(f"the folder of {destination} does not exist")
    if tune is not None and settings.offline:
        raise UsageError("--tune measures, --offline never does")
    if tune is not None and prune is not None:
        raise UsageError("--tune cannot tune for --prune", hint="write the pruned model with `optc prune` first")
    if tune is not None and checkpoint is not None:
        raise UsageError("--tune cannot tune for a --checkpoint", hint="tune the model first, then give the --log")
    if tune is None and settings.log is None and (settings.require_tuned or settings.threads):
        raise UsageError("--require-tuned and --threads speak about a tuning log", hint="give one with --log")
    smaller = _smaller_options(prune, importance, kind, given, tune is not None or checkpoint is not None)
    if save_config is not None:
        write(save_config, settings)
    with tempfile.TemporaryDirectory(prefix="optc-") as folder:
        if tune is not None:
            settings.log = settings.log or str(Path(folder) / "tuning.jsonl")
            _tune(settings, tune)
        _compile(settings, checkpoint, *smaller, destination, print_ir_after, dump_ir, verify_ir, as_json)


def _settings(config: Path | None, model: str | None) -> CompileConfig:
    if config is not None:
        return read(config)
    default = Path(DEFAULT_NAME)
    return read(default) if model is None and default.exists() else CompileConfig()


def _override(
    settings: CompileConfig,
    model: str | None,
    output: str | None,
    target: str | None,
    no_verify: bool,
    tolerance: float | None,
    disable: tuple[str, ...],
) -> None:
    settings.model = model or settings.model
    settings.output = output or settings.output
    settings.target = target or settings.target
    settings.verify = settings.verify and not no_verify
    settings.tolerance = tolerance if tolerance is not None else settings.tolerance
    settings.disable_passes = [*settings.disable_passes, *disable]


def _default_output(model: str) -> str:
    stem = model.rsplit(":", 1)[-1] if ":" in model and not Path(model).exists() else Path(model).stem
    return f"{stem}.optc"


def _compile(
    settings: CompileConfig,
    checkpoint: Path | None,
    pruning: dict[str, Any] | None,
    quantization: dict[str, Any] | None,
    destination: Path,
    print_ir_after: tuple[str, ...],
    dump_ir: Path | None,
    verify_ir: bool,
    as_json: bool,
) -> None:
    from rich.console import Console

    from optc.driver import Trace, compile
    from optc.passes.observer import observers

    console = Console(stderr=True)
    with console.status("starting") as status:
        trace = Trace(progress=lambda stage: status.update(f"[bold]{stage}[/] {settings.model}"))
        model, inputs = (settings.model, None) if checkpoint is None else _trained(settings, checkpoint)
        model, inputs, compressed = _smaller(settings, model, inputs, pruning, quantization, trace)
        artifact = compile(
            model,
            inputs,
            target=settings.target,
            input_shapes={} if compressed else settings.input_shapes,
            dims={} if compressed else settings.dims,
            verify=settings.verify,
            tolerance=settings.tolerance,
            disable_passes=settings.disable_passes,
            observers=observers(print_ir_after=print_ir_after, dump_ir=dump_ir, verify_ir=verify_ir),
            tuning=_tuning(settings),
            trace=trace,
        )
        artifact = artifact.with_report(artifact.report | compressed)
        status.update("writing")
        artifact.save(destination)
    summary = {
        "artifact": str(destination),
        "bytes": destination.stat().st_size,
        "seconds": {name: round(seconds, 3) for name, seconds in trace.seconds.items()},
        "report": artifact.report,
    }
    if as_json:
        print_json(summary)
    else:
        _show(console, summary, artifact)


def _smaller_options(
    prune: float | None, importance: str | None, kind: str | None, given: dict[str, Any], busy: bool
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The arguments of ``optc.prune`` and of ``optc.quantize``; None for what is not asked for."""
    from optc.cli.budget import goal
    from optc.cli.quantize import quantization_arguments
    from optc.passes.prune.select import Structured

    wanted = goal(given)
    if given["plot"] is not None:
        raise UsageError("--plot is for `optc quantize` and `optc prune`")
    if prune is None and kind is None and (given["calibrate"] is not None or wanted is not None):
        raise UsageError(
            "calibration data and budgets are for --quantize and --prune", hint="give --quantize int8, or --prune 50%"
        )
    if prune is not None and kind is not None and wanted is not None:
        raise UsageError("one budget cannot be for --prune and --quantize", hint="optc prune, then --quantize")
    if importance is not None and prune is None:
        raise UsageError("--importance speaks about --prune")
    if kind is not None and busy:
        raise UsageError("--quantize does not go with --tune or --checkpoint", hint="optc quantize, then compile")
    common = {"goal": wanted, "evaluation": given["evaluation"]}
    pruning, quantization = None, None
    if prune is not None:
        how = Structured(prune, criterion=importance or "l2")
        pruning = {"structured": how, "calibrate": given["calibrate"], "samples": given["samples"], **common}
    if kind is not None:
        quantization = {**quantization_arguments(kind, given), "only_paying": given["only_paying"], **common}
    return pruning, quantization


def _smaller(
    settings: CompileConfig,
    model: Any,
    inputs: Any,
    pruning: dict[str, Any] | None,
    quantization: dict[str, Any] | None,
    trace: Any,
) -> tuple[Any, Any, dict[str, Any]]:
    """Prune and quantize as asked; return the model, its example inputs, and what to add to the report."""
    fixed: dict[str, Any] = {"input_shapes": settings.input_shapes, "dims": settings.dims}
    report: dict[str, Any] = {}
    if pruning is not None:
        from optc.compression.prune import prune

        pruned = prune(model, inputs, verify=settings.verify, trace=trace, **pruning, **fixed)
        model, inputs, fixed, report["pruning"] = pruned.model, None, {}, pruned.report
    if quantization is not None:
        from optc.compression.quantize import quantize

        found = quantize(
            model, example_inputs=inputs, target=settings.target, progress=trace.progress, **quantization, **fixed
        )
        model, inputs, report["quantization"] = found.model, None, found.report
    return model, inputs, report


def _tune(settings: CompileConfig, seconds: float) -> None:
    from optc.cli.tune import run, show
    from optc.tuner import Plan

    assert settings.model is not None and settings.log is not None
    captured = {"input_shapes": settings.input_shapes, "dims": settings.dims}
    plan = Plan(Path(settings.log), seconds, threads=settings.threads)
    outcome = run(settings.model, plan, settings.disable_passes, captured, settings.target)
    show(outcome)
    if outcome.interrupted:
        raise KeyboardInterrupt


def _tuning(settings: CompileConfig) -> Any:
    if settings.log is None:
        return None
    from optc.tuning import Tuning

    return Tuning(Path(settings.log), settings.threads, settings.require_tuned)


def describe_tuning(tuning: Any) -> str:
    """Return the report's coverage in words."""
    if isinstance(tuning, str):
        return tuning
    text = (
        f"{tuning['exact']} of {tuning['kernels']} kernels from their own records, {tuning['nearest']} from the "
        f"nearest shape, {tuning['analytic']} analytic; for {tuning['machine']}; no measurements"
    )
    bad = tuning["log"]["bad_lines"]
    return f"{text}; [yellow]{len(bad)} bad lines: {', '.join(map(str, bad[:20]))}[/]" if bad else text


def _trained(settings: CompileConfig, checkpoint: Path) -> tuple[Any, Any]:
    """The module that the model's factory makes, with the weights of a checkpoint of any number of stages."""
    from optc.training import load_weights
    from optc.training.recipe import load

    recipe = load(str(settings.model))
    load_weights(checkpoint, recipe.module)
    inputs = recipe.example_inputs
    return recipe.module, inputs if isinstance(inputs, list | tuple) else (inputs,)


def _show(console: Any, summary: dict[str, Any], artifact: Any) -> None:
    from rich.markup import escape
    from rich.table import Table

    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in summary["seconds"].items())
    report = artifact.report
    kernels = report["kernels"]
    rules: dict[str, int] = {}
    for kernel in kernels:
        rules[kernel["schedule"]] = rules.get(kernel["schedule"], 0) + 1
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("artifact", f"{summary['artifact']} ({summary['bytes'] / 1e6:.1f} MB)")
    table.add_row("inputs", escape(", ".join(map(str, artifact.manifest.inputs))))
    table.add_row("outputs", escape(", ".join(map(str, artifact.manifest.outputs))))
    table.add_row("kernels", f"{len(kernels)} (" + ", ".join(f"{n} {rule}" for rule, n in sorted(rules.items())) + ")")
    table.add_row("tuning", describe_tuning(report["tuning"]))
    table.add_row("time", seconds)
    verification = report["verification"]
    if isinstance(verification, str):
        table.add_row("verified", f"[yellow]no[/]: {verification}")
    else:
        worst = max((o["relative"] for o in verification["outputs"]), default=0.0)
        table.add_row("verified", f"[green]yes[/]: relative error {worst:.1e} against {verification['reference']}")
    console.print(table)
