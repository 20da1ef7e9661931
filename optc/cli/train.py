"""``optc train``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from optc.errors import UsageError


@click.command(name="train", context_settings={"ignore_unknown_options": True})
@click.argument("model")
@click.option("--plan", "plan_path", type=click.Path(path_type=Path), help="A plan made before; else one is made.")
@click.option("--cluster", "-c", type=click.Path(path_type=Path), help="TOML file with the devices, to plan for.")
@click.option("--restarts", default=3, show_default=True, type=click.IntRange(min=0), help="After a rank has failed.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def command(model: str, plan_path: Path | None, cluster: Path | None, restarts: int, options: tuple[str, ...]) -> None:
    """Train MODEL (package.module:factory of a Recipe) on this machine: plan, then torchrun with a rank per device.

    OPTIONS go to `python -m optc.training`: --steps, --checkpoints, --every, --metrics, --precision, --clip, …

    \b
    Examples:
      optc train mypackage.train:recipe --plan plan.json --steps 1000 --checkpoints run
      optc train mypackage.train:recipe --cluster cluster.toml --steps 1000
    """
    from optc import training
    from optc.training import __main__ as rank
    from optc.training.recipe import load

    if (plan_path is None) == (cluster is None):
        raise UsageError("give either --plan or --cluster")
    # What every rank would refuse is refused before any is started, and not started again.
    rank.main.make_context("optc train", [model, "--plan", str(plan_path or cluster), *options])
    recipe = load(model)
    recipe.trainable()
    if plan_path is not None:
        plan = training.Plan.load(plan_path)
        plan.bind(recipe.module)
    else:
        assert cluster is not None
        plan = training.plan(recipe.module, recipe.example_inputs, cluster, model=model)
        click.echo(plan.explain(), err=True)
        plan_path = Path("plan.json")
        plan.save(plan_path)
    command_line = [
        *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={plan.devices}"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--max-restarts={restarts}"),
        *("-m", "optc.training", model, "--plan", str(plan_path), *options),
    ]
    # torchrun takes this process's place, and with it its signals.
    os.execv(sys.executable, command_line)
