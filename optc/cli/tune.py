"""``optc tune``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from optc.cli.common import Duration, capture_arguments, capture_options, json_option, print_json
from optc.errors import UsageError

if TYPE_CHECKING:
    from optc.autotune.tuner import Status
    from optc.tuner import Outcome


@click.command(name="tune")
@click.argument("model")
@click.option("--log", "-l", required=True, type=click.Path(path_type=Path), help="The tuning log to add to.")
@click.option(
    "--target", "-t", default="cpu", help="What to compile for; this machine, or the servers, must be able to run it."
)
@click.option("--time", "seconds", type=Duration(), help="Time for everything, like 90s or 10m (default: 10m).")
@click.option("--trials", type=click.IntRange(1), help="Candidates to measure, instead of a time.")
@click.option("--threads", type=click.IntRange(1), help="Threads to measure with (default: one per core).")
@click.option("--warm", is_flag=True, help="Leave weights in the cache; by default they come from memory.")
@click.option("--rpc-tracker", "tracker", metavar="HOST:PORT", help="Run kernels on the servers of a TVM RPC tracker.")
@click.option("--rpc-key", "key", help="Which servers of the tracker.")
@click.option("--disable-pass", "disable", multiple=True, metavar="NAME", help="Leave out a pass; repeatable.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write best time versus trials to this SVG file.")
@capture_options
@json_option
def command(
    model: str,
    log: Path,
    target: str,
    seconds: float | None,
    trials: int | None,
    threads: int | None,
    warm: bool,
    tracker: str | None,
    key: str | None,
    disable: tuple[str, ...],
    plot: Path | None,
    input_shapes: tuple[str, ...],
    dims: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure the kernels of MODEL on this machine and write what was found into a log for `optc compile --log`.

    \b
    Examples:
      optc tune model.onnx --log tuning.jsonl --time 10m
      optc tune model.onnx --log tuning.jsonl --trials 200 --dim batch=1
      optc tune model.onnx --log tuning.jsonl --target cortex-a72 --threads 4 --rpc-tracker 10.0.0.2:9190 --rpc-key pi

    Ctrl-C keeps everything measured so far; the next run continues. Several runs may write to one log.
    """
    from optc.autotune.place import Tracker
    from optc.tuner import Plan

    if not log.parent.is_dir():
        raise UsageError(f"the folder of {log} does not exist")
    if seconds is None and trials is None:
        seconds = 600.0
    if (tracker is None) != (key is None):
        raise UsageError("--rpc-tracker and --rpc-key belong together")
    plan = Plan(
        log, seconds, trials, threads, cold=not warm, tracker=Tracker.parse(tracker, key) if tracker and key else None
    )
    outcome = run(model, plan, disable, capture_arguments(input_shapes, dims), target)
    if plot is not None:
        from optc.plot import curve

        plot.write_text(curve(outcome.curve), encoding="utf-8")
    if as_json:
        print_json(asdict(outcome) | {"speedup": outcome.speedup})
    else:
        show(outcome)
    if outcome.interrupted:
        raise SystemExit(130)


def run(
    model: str, plan: Any, disable: tuple[str, ...] | list[str], captured: dict[str, Any], target: str = "cpu"
) -> Outcome:
    """Tune with a progress display."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from optc.tuner import tune

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        total = plan.trials if plan.seconds is None else plan.seconds
        shown = bar.add_task("starting", total=total, state="")

        def progress(stage: str, status: Status | None) -> None:
            elapsed = bar.tasks[shown].elapsed or 0.0
            if status is None:
                bar.update(shown, description=stage, completed=elapsed if plan.seconds is not None else 0)
                return
            done = elapsed if plan.seconds is not None else status.trials
            gain = f"{1 / status.predicted:.3f} x predicted, {status.trials} trials, {status.failures} failed"
            bar.update(shown, description=f"{stage} {status.task}", completed=done, state=gain)

        return tune(model, plan, target=target, disable_passes=disable, progress=progress, **captured)


def show(outcome: Outcome) -> None:
    """Print the report."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from optc.plot import spark

    console = Console(stderr=True)
    console.print(
        f"{outcome.tasks} tasks for {outcome.machine}, {outcome.skipped} of them too small to matter; "
        f"{outcome.trials} trials, {outcome.failures} failed; ended because {outcome.stopped}"
    )
    if outcome.curve:
        console.print(
            f"predicted time over trials  {spark([p for *_, p in outcome.curve])}  {outcome.curve[-1][2]:.3f}"
        )
    if outcome.kernels:
        table = Table(title="kernels in the model, milliseconds")
        for header in ("kernel", "untuned", "tuned", "ratio", "decisions"):
            table.add_column(header, justify="left" if header in ("kernel", "decisions") else "right")
        for k in outcome.kernels:
            text = ", ".join(f"{name}={value}" for name, value in k.decisions.items())
            table.add_row(k.name, f"{k.untuned:.3f}", f"{k.tuned:.3f}", f"{k.untuned / k.tuned:.2f}", escape(text))
        console.print(table)
    if outcome.servers:
        console.print(f"kernels were timed alone, on {outcome.servers} server{'s' if outcome.servers > 1 else ''}")
    if outcome.speedup is not None:
        console.print(
            f"model: {outcome.untuned:.3f} ms untuned, {outcome.tuned:.3f} ms tuned: [bold]{outcome.speedup:.3f} x[/]"
        )
