"""The loop of a run: resume, train, log, write checkpoints."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from optc.errors import UsageError
from optc.training import distributed
from optc.training.metrics import Log, ProgressLine
from optc.training.planning import Plan
from optc.training.recipe import Recipe
from optc.training.trainer import Trainer


@dataclass(frozen=True)
class Settings:
    """How long to train and what to write. ``every`` is in steps; the last step always gets a checkpoint."""

    steps: int
    checkpoints: Path | None = None
    every: int = 100
    keep: int = 3
    metrics: Path | None = None
    tensorboard: bool = False
    precision: str = "fp32"
    clip: float | None = None
    seed: int = 0
    timeout: float = distributed.DEFAULT_TIMEOUT


def fit(recipe: Recipe, plan: Plan, settings: Settings) -> Trainer:
    """Train to the last step, from the latest checkpoint if there is one; the same call on every rank.

    Raises UsageError if the recipe lacks a loss or data; see ``Trainer.step`` for what else.
    """
    if recipe.loss_fn is None or recipe.data is None:
        raise UsageError("the recipe has no loss_fn or no data", hint="Recipe(module, example_inputs, loss_fn, data)")
    trainer = Trainer(
        recipe.module,
        recipe.loss_fn,
        plan,
        recipe.optimizer,
        lr_schedule=recipe.lr_schedule,
        precision=settings.precision,
        clip=settings.clip,
        seed=settings.seed,
        timeout=settings.timeout,
        checkpoints=settings.checkpoints,
        keep=settings.keep,
    )
    if settings.checkpoints is not None:
        trainer.resume()
    share = plan.samples() * plan.microbatches
    start, size = trainer.world.dp_rank * share, plan.dp * share
    first = trainer.step_number
    with contextlib.ExitStack() as stack:
        log = line = None
        if trainer.world.rank == 0:
            line = stack.enter_context(ProgressLine(first, settings.steps))
            if settings.metrics is not None:
                log = Log(settings.metrics, first, tensorboard=settings.tensorboard)
                stack.callback(log.close)
        while trainer.step_number < settings.steps:
            began = time.perf_counter()
            inputs, targets = recipe.data.batch(trainer.step_number, start, start + share, size)
            rate = trainer.learning_rate()
            loss = trainer.step(inputs, targets)
            step = trainer.step_number
            if log is not None:
                norm = trainer.norm if settings.clip is not None else None
                log.add(step, loss=loss, seconds=time.perf_counter() - began, lr=rate, gradient_norm=norm)
            if line is not None:
                line.show(step, loss)
            due = step % settings.every == 0 or step == settings.steps
            if settings.checkpoints is not None and due:
                trainer.save()
    return trainer
