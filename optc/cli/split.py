"""``optc split``."""

from __future__ import annotations

from typing import Any

import click

from optc.cli.plan import make, planning_options


@click.command(name="split")
@click.argument("model")
@click.option("--stages", required=True, type=click.IntRange(min=1), help="Number of stages, one per rank.")
@click.option("--memory", help='Memory of each device, such as "16 GiB".')
@click.option("--microbatches", type=click.IntRange(min=1), help="Default: four per stage.")
@planning_options
def command(model: str, stages: int, memory: str | None, microbatches: int | None, **options: Any) -> None:
    """Split MODEL (package.module:factory) into balanced stages, without choosing anything else.

    \b
    Example:
      optc split mypackage.train:recipe --stages 4 -o plan.json
    """
    cluster: dict[str, Any] = {"pp": stages, "dp": 1, "schedule": "1F1B", "microbatches": microbatches or 4 * stages}
    make(model, cluster | ({"memory": memory} if memory else {}) | {"recompute": False}, **options)
