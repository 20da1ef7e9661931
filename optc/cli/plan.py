"""``optc plan``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from optc.cli.common import json_option, print_json
from optc.errors import UsageError


def planning_options(function: Any) -> Any:
    """Options of all verbs that plan."""
    for option in (
        click.option("--costs", default="measured", show_default=True, help="measured, roofline, or a file of costs."),
        click.option("--save-costs", type=click.Path(path_type=Path), help="Write the costs to this file."),
        click.option("--optimizer-state", default=2.0, show_default=True, help="Bytes of state per byte of weight."),
        click.option("--output", "-o", default="plan.json", show_default=True, type=click.Path(path_type=Path)),
        click.option("--timeline", type=click.Path(path_type=Path), help="Draw a step: .svg or .html."),
        json_option,
    ):
        function = option(function)
    return function


@click.command(name="plan")
@click.argument("model")
@click.option("--cluster", "-c", required=True, type=click.Path(path_type=Path), help="TOML file with the devices.")
@planning_options
def command(model: str, cluster: Path, **options: Any) -> None:
    """Plan how to train MODEL (package.module:factory) on the devices of a cluster.

    Chooses data x pipeline parallelism, schedule, microbatches and recomputation; what the file fixes is kept.

    \b
    Examples:
      optc plan mypackage.train:recipe --cluster cluster.toml -o plan.json
      optc plan mypackage.train:recipe -c cluster.toml --timeline step.html
    """
    make(model, cluster, **options)


def make(
    model: str,
    cluster: Any,
    *,
    costs: str,
    save_costs: Path | None,
    optimizer_state: float,
    output: Path,
    timeline: Path | None,
    as_json: bool,
) -> None:
    """Plan, write what was asked for, and show the report."""
    from optc import training
    from optc.training.recipe import load
    from optc.training.timeline import page, svg

    if timeline is not None and timeline.suffix not in (".svg", ".html"):
        raise UsageError(f"{timeline}: a timeline is drawn as .svg or .html")
    for path in (output, timeline, save_costs):
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"the folder of {path} does not exist")
    recipe = load(model)
    known = training.costs_of(recipe.module, recipe.example_inputs, costs)
    plan = training.plan(
        recipe.module, recipe.example_inputs, cluster, costs=known, optimizer_state=optimizer_state, model=model
    )
    plan.save(output)
    if save_costs is not None:
        known.save(save_costs)
    if timeline is not None:
        assert plan.best is not None
        drawn = plan.best.timeline
        text = svg(drawn) if timeline.suffix == ".svg" else page(drawn, plan.report[0], plan.explain())
        timeline.write_text(text, encoding="utf-8")
    if as_json:
        print_json(json.loads(plan.to_json()))
    else:
        click.echo(plan.explain())
        click.echo(f"written to {output}")
