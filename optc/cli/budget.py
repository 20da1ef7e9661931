"""The options that say how much accuracy may be lost, and how that is measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from optc.errors import UsageError

Command = TypeVar("Command", bound=Callable[..., Any])


def measuring_options(command: Command) -> Command:
    """Add the options that say how accuracy is measured."""
    for option in reversed(
        (
            click.option(
                "--eval", "evaluate", metavar="MODULE:FUNCTION", help="Scores a function from inputs to outputs."
            ),
            click.option("--labels", metavar="FILE", help="The class of each sample: .npy, .npz or module:function."),
            click.option(
                "--data", "evaluation", metavar="DATA", help="Samples to evaluate with, if others than --calibrate."
            ),
            click.option(
                "--journal", type=click.Path(path_type=Path), help="Keep evaluations here; the same command resumes."
            ),
        )
    ):
        command = option(command)
    return command


def budget_options(command: Command) -> Command:
    """Add the options of a search within a budget."""
    for option in reversed(
        (
            click.option("--max-drop", metavar="POINTS", help="Loss of --eval or --labels allowed, 0.5% for example."),
            click.option("--max-error", metavar="METRIC:LIMIT", help="Error allowed: cosine, kl, top1 or relative."),
            click.option("--objective", default="time", help="time (default) or size."),
            click.option("--plot", type=click.Path(path_type=Path), help="Write the Pareto plot of a search, an .svg."),
        )
    ):
        command = option(command)
    return measuring_options(command)


paying_option = click.option(
    "--only-paying", is_flag=True, help="Without a budget: quantize the layers that are faster so."
)


def goal(given: dict[str, Any]) -> Any:
    """Return the Goal that the options above describe, None if they name no budget."""
    from optc.compression import evaluate
    from optc.compression.budget import Goal

    drop, error = given["max_drop"], given["max_error"]
    if drop is not None and error is not None:
        raise UsageError("--max-drop and --max-error are two budgets; give one")
    if drop is None and error is None:
        used = [f"--{name}" for name in ("labels", "journal", "plot") if given[name] is not None]
        used += ["--eval"] * (given["evaluate"] is not None) + ["--data"] * (given["evaluation"] is not None)
        if used:
            raise UsageError(f"{used[0]} belongs to a budget", hint="give --max-drop or --max-error")
        return None
    budget = evaluate.max_drop(drop) if drop is not None else evaluate.max_error(error)
    return Goal(budget, given["evaluate"], given["labels"], given["objective"], given["journal"])


def write_plot(path: Path, search: dict[str, Any], time: str = "seconds, sum of layers") -> None:
    """Write the Pareto plot of a search; ``time`` says what its times are."""
    from optc.cli.common import write_atomically
    from optc.compression.pareto import plot

    unit = time if search["objective"] == "time" else "bytes of weights"
    budget = search["budget"]
    text = plot(search["points"], search["front"], budget["limit"], (unit, f"loss: {budget['metric']}"))

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)
