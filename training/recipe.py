"""What is trained, in one object that a command can name: ``package.module:factory`` returns a Recipe."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from optc.errors import UsageError


class Data(Protocol):
    """Batches by number, so that a resumed run and another number of replicas see the same samples."""

    def batch(self, step: int, start: int, stop: int, size: int) -> tuple[Any, Any]:
        """Inputs and targets of samples ``start`` to ``stop`` of the batch of step ``step``, which has ``size``."""
        ...


@dataclass
class Recipe:
    """A module and how to train it.

    ``example_inputs`` are one microbatch. ``lr_schedule`` makes a scheduler of an optimizer. ``data`` may be left out
    where nothing is trained (``optc split``, ``optc plan``).
    """

    module: torch.nn.Module
    example_inputs: Any
    loss_fn: Callable[..., torch.Tensor] | None = None
    data: Data | None = None
    optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer] = torch.optim.AdamW
    lr_schedule: Callable[[torch.optim.Optimizer], Any] | None = None

    def trainable(self) -> tuple[Callable[..., torch.Tensor], Data]:
        """The loss and the data; UsageError if one of them is missing."""
        if self.loss_fn is None or self.data is None:
            raise UsageError(
                "the recipe has no loss_fn or no data", hint="Recipe(module, example_inputs, loss_fn, data)"
            )
        return self.loss_fn, self.data


class Batches:
    """Shuffled batches of a map-style dataset of ``(inputs, target)``; every epoch in another order.

    The order depends on ``seed`` and the epoch alone. A rest smaller than a batch is left out of its epoch.
    """

    def __init__(self, dataset: Any, seed: int = 0, shuffle: bool = True) -> None:
        self._dataset, self._seed, self._shuffle = dataset, seed, shuffle

    def batch(self, step: int, start: int, stop: int, size: int) -> tuple[Any, Any]:
        """See ``Data``. UsageError if the dataset is smaller than a batch."""
        per_epoch = len(self._dataset) // size
        if per_epoch == 0:
            raise UsageError(f"a batch has {size} samples, the dataset {len(self._dataset)}")
        epoch, number = divmod(step, per_epoch)
        order = self._order(epoch)[number * size : (number + 1) * size]
        inputs, targets = torch.utils.data.default_collate([self._dataset[int(index)] for index in order[start:stop]])
        return (tuple(inputs) if isinstance(inputs, list) else inputs), targets

    def _order(self, epoch: int) -> torch.Tensor:
        if not self._shuffle:
            return torch.arange(len(self._dataset))
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        return torch.randperm(len(self._dataset), generator=generator)


def load(text: str) -> Recipe:
    """The recipe that ``package.module:factory`` returns; a tuple ``(module, example_inputs)`` will do.

    Modules are also looked for in the current folder. UsageError if there is no such function or it returns something
    else.
    """
    module_name, separator, attribute = text.partition(":")
    if not separator or not attribute:
        raise UsageError(f"'{text}' is not package.module:factory")
    with _current_folder():
        try:
            found: Any = importlib.import_module(module_name)
        except ImportError as error:
            raise UsageError(f"{text}: cannot import {module_name}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{text}: {module_name} has no '{attribute}'")
        found = getattr(found, part)
    result = found() if callable(found) else found
    if isinstance(result, tuple) and len(result) >= 2 and isinstance(result[0], torch.nn.Module):
        return Recipe(result[0], result[1])
    if not isinstance(result, Recipe):
        raise UsageError(
            f"{text} returned a {type(result).__name__}",
            hint="return optc.training.Recipe(module, example_inputs, loss_fn, data)",
        )
    return result


@contextlib.contextmanager
def _current_folder() -> Iterator[None]:
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
