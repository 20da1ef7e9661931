"""One rank of a run: ``torchrun … -m optc.training --plan plan.json --steps 1000``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from optc.errors import OptcError, UsageError


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipe", required=False)
@click.option("--plan", "plan_path", required=True, type=click.Path(path_type=Path), help="Written by `optc plan`.")
@click.option("--steps", required=True, type=click.IntRange(min=1), help="Steps to train in all, restarts included.")
@click.option("--checkpoints", type=click.Path(path_type=Path), help="Folder for checkpoints; the run resumes from it.")
@click.option("--every", default=100, show_default=True, type=click.IntRange(min=1), help="Steps between checkpoints.")
@click.option("--keep", default=3, show_default=True, type=click.IntRange(min=1), help="Checkpoints to keep.")
# Not --log: torchrun takes it for an abbreviation of its own --log-dir.
@click.option("--metrics", type=click.Path(path_type=Path), help="Folder for metrics.jsonl.")
@click.option("--tensorboard", is_flag=True, help="Write event files for TensorBoard there, too.")
@click.option("--precision", default="fp32", show_default=True, type=click.Choice(["fp32", "bf16", "fp16"]))
@click.option("--clip", type=float, help="Largest norm of all gradients together.")
@click.option("--seed", default=0, show_default=True, help="Of dropout and other random operators.")
@click.option("--timeout", default=600.0, show_default=True, help="Seconds to wait for another rank.")
def main(
    recipe: str | None,
    plan_path: Path,
    steps: int,
    checkpoints: Path | None,
    every: int,
    keep: int,
    metrics: Path | None,
    tensorboard: bool,
    precision: str,
    clip: float | None,
    seed: int,
    timeout: float,
) -> None:
    """Train RECIPE (package.module:factory; by default the one that was planned) as one rank of torchrun."""
    import torch

    from optc.training.loop import Settings, fit
    from optc.training.planning import Plan
    from optc.training.recipe import load

    if "OMP_NUM_THREADS" not in os.environ and plan_path.exists():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    plan = Plan.load(plan_path)
    source = recipe or plan.model
    if source is None:
        raise UsageError(f"{plan_path} does not say what it plans", hint="name the recipe: package.module:factory")
    settings = Settings(
        steps,
        checkpoints,
        every,
        keep,
        metrics,
        tensorboard,
        precision=precision,
        clip=clip,
        seed=seed,
        timeout=timeout,
    )
    fit(load(source), plan, settings).close()


if __name__ == "__main__":
    try:
        main(standalone_mode=False)
    except OptcError as error:
        click.echo(f"rank {os.environ.get('RANK', '0')}: error: {error}", err=True)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
