"""Looks at the values inside of a model while it runs on samples: a compiled graph whose outputs they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import onnx_ir as oir

from optc.compression.data import Samples
from optc.compression.statistics import Extremes
from optc.errors import AccuracyError
from optc.passes.quantize.ranges import Histogram

Progress = Callable[[str], None]
Look = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
"""Returns the values inside of a model, and its outputs, by name."""


class Observer(Protocol):
    """Is told of the values of a tensor, call by call."""

    def add(self, values: np.ndarray) -> None:
        """Take note of ``values``."""
        ...


class Inside:
    """A model compiled so that every run also gives the float32 values called ``names``."""

    def __init__(self, model: oir.Model, names: Iterable[str]) -> None:
        from optc import driver
        from optc.ir import dims

        opened = model.clone()
        wanted = list(dict.fromkeys(names))
        by_name = {str(value.name): value for value in dims.all_values(opened.graph)}
        outputs = {str(value.name) for value in opened.graph.outputs}
        inputs = {str(value.name) for value in opened.graph.inputs}
        for name in wanted:
            if name not in outputs and name not in inputs:
                opened.graph.outputs.append(by_name[name])
        self._model = driver.compile(opened, verify=False).model()
        self._wanted = wanted

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the values, and the model's outputs, by name."""
        return {**inputs, **self._model.run(inputs)}


class Divided:
    """The values of a model in which some are divided, from a look into the model before.

    ``changed``: by the name that a value has now, the name that it had, and what it is divided by.
    """

    def __init__(self, inside: Look, changed: Mapping[str, tuple[str, np.ndarray]]) -> None:
        self._inside, self._changed = inside, changed

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the values by name."""
        values = self._inside(inputs)
        return {**values, **{new: values[old] / divisor for new, (old, divisor) in self._changed.items()}}


def observe(inside: Look, observers: Mapping[str, Sequence[Observer]], samples: Samples, progress: Progress) -> None:
    """Run all samples and tell the observers of the values by name.

    Raises AccuracyError if a value is no finite number: the model breaks down in float32 already.
    """
    for number, inputs in enumerate(samples):
        progress(f"calibrating: sample {number + 1} of {len(samples)}")
        values = inside(inputs)
        for name, watching in observers.items():
            if not np.isfinite(values[name]).all():
                raise AccuracyError(
                    f"{samples.source}, sample {number}: the float32 model computes values that are no finite "
                    f"numbers at '{name}'"
                )
            for observer in watching:
                observer.add(values[name])


def histograms(inside: Look, names: Sequence[str], samples: Samples, progress: Progress) -> dict[str, Histogram]:
    """Count the values called ``names`` over all samples: one round for the extremes, one for the bins."""
    extremes = {name: Extremes() for name in names}
    observe(inside, {name: [e] for name, e in extremes.items()}, samples, progress)
    counts = {name: Histogram.empty(e.low, e.high) for name, e in extremes.items()}
    observe(inside, {name: [h] for name, h in counts.items()}, samples, progress)
    return counts
