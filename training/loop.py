"""The loop of a run: resume, train, log, write checkpoints."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from optc.errors import TrainingError
from optc.training import checkpoint, distributed
from optc.training.metrics import Log, ProgressLine
from optc.training.planning import Plan
from optc.training.recipe import Recipe
from optc.training.trainer import Trainer

_PATIENCE = 2.0  # seconds after which a second Ctrl-C is meant as one


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

    When interrupted (SIGINT), all ranks finish the step and write a checkpoint; a second time, they end at once.

    Raises UsageError if the recipe lacks a loss or data, TrainingError if interrupted; see ``Trainer.step`` for what
    else.
    """
    loss_fn, data = recipe.trainable()
    trainer = Trainer(
        recipe.module,
        loss_fn,
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
        checkpoint.require_writable(settings.checkpoints, rank=trainer.world.rank)
        trainer.resume()
    share = plan.samples() * plan.microbatches
    start, size = trainer.world.dp_rank * share, plan.dp * share
    first = trainer.step_number
    with contextlib.ExitStack() as stack:
        stack.enter_context(_finishing_steps(trainer))
        log = line = None
        if trainer.world.rank == 0:
            line = stack.enter_context(ProgressLine(first, settings.steps))
            if settings.metrics is not None:
                log = Log(settings.metrics, first, tensorboard=settings.tensorboard)
                stack.callback(log.close)
        while trainer.step_number < settings.steps and not trainer.stopping:
            began = time.perf_counter()
            inputs, targets = data.batch(trainer.step_number, start, start + share, size)
            rate = trainer.learning_rate()
            loss = trainer.step(inputs, targets)
            step = trainer.step_number
            if log is not None:
                norm = trainer.norm if settings.clip is not None else None
                log.add(step, loss=loss, seconds=time.perf_counter() - began, lr=rate, gradient_norm=norm)
            if line is not None:
                line.show(step, loss)
            due = step % settings.every == 0 or step == settings.steps or trainer.stopping
            if settings.checkpoints is not None and due:
                trainer.save()
    if trainer.step_number < settings.steps:
        raise TrainingError(
            f"interrupted after step {trainer.step_number} of {settings.steps}",
            hint="the same command goes on from there" if settings.checkpoints else "with --checkpoints it could go on",
        )
    return trainer


@contextlib.contextmanager
def _finishing_steps(trainer: Trainer) -> Iterator[None]:
    """Take Ctrl-C for a wish to stop. It may arrive twice at once, from the terminal and from torchrun."""
    first = 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if first and time.monotonic() - first > _PATIENCE:
            signal.default_int_handler(number, frame)
        first = first or time.monotonic()
        trainer.ask_to_stop()

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears of signals
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
