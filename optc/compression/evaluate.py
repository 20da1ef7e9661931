"""What a compressed model loses, measured: by the user's own function, on labels, or against the float32 outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from optc.array_files import load_npz
from optc.compression.data import Samples
from optc.errors import AccuracyError, UsageError
from optc.frontend.factory import resolve

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]

METRICS = {
    "cosine": "1 less the mean cosine between outputs",
    "kl": "the mean Kullback-Leibler divergence of the softmax of outputs",
    "top1": "how often the largest element of a row of outputs is another one",
    "relative": "the largest difference over the largest magnitude of an output",
}


@dataclass(frozen=True)
class Budget:
    """How much may be lost, and of what: ``accuracy`` (points of a score, 0.005 is half a point) or one of METRICS."""

    metric: str
    limit: float

    def __str__(self) -> str:
        return f"{self.metric} <= {self.limit:g}"


def max_drop(text: str) -> Budget:
    """Return the budget of ``--max-drop``: ``0.5%`` are 0.005 of the score. Raises UsageError."""
    number, percent = text.removesuffix("%"), text.endswith("%")
    return Budget("accuracy", _positive(number, text, "--max-drop 0.5%") / (100 if percent else 1))


def max_error(text: str) -> Budget:
    """Return the budget of ``--max-error``, ``metric:limit``. Raises UsageError."""
    metric, separator, number = text.partition(":")
    if metric not in METRICS or not separator:
        raise UsageError(f"'{text}' is no bound of an error", hint=f"METRIC:LIMIT with {', '.join(METRICS)}")
    return Budget(metric, _positive(number, text, f"--max-error {metric}:0.01"))


def _positive(number: str, text: str, example: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UsageError(f"'{text}' is no bound", hint=f"for example {example}")
    return value


class Judge:
    """Says what a model loses against the float32 one, in the unit of its budget."""

    def __init__(self, score: Callable[[Run], float] | None, metric: str, samples: Samples | None, run: Run) -> None:
        """``score``: more is better; without it ``metric`` compares outputs on ``samples``. ``run``: float32."""
        self._score, self._metric, self._samples = score, metric, samples
        self.baseline: float | None = None
        self._expected: list[dict[str, np.ndarray]] = []
        if score is not None:
            self.baseline = score(run)
        else:
            assert samples is not None
            self._expected = [run(inputs) for inputs in samples]

    def loss(self, run: Run) -> float:
        """Return the loss of accuracy, or the error."""
        if self._score is not None:
            assert self.baseline is not None
            return self.baseline - self._score(run)
        assert self._samples is not None
        compare = _COMPARE[self._metric]
        errors: list[float] = []
        for inputs, expected in zip(self._samples, self._expected, strict=True):
            found = run(inputs)
            errors += [compare(found[name], want) for name, want in expected.items() if want.dtype.kind == "f"]
        worst = max(errors, default=0.0) if self._metric == "relative" else float(np.mean(errors))
        return worst if np.isfinite(worst) else float("inf")


def user_score(text: str) -> Callable[[Run], float]:
    """Return the function ``package.module:function``, which takes ``run`` (inputs to outputs) and returns a number.

    Raises UsageError if it is none; AccuracyError, from the function returned, if what it returns is no number.
    """
    function = resolve(text)
    if not callable(function):
        raise UsageError(f"{text} is a {type(function).__name__}, not a function of the model")

    def score(run: Run) -> float:
        value = function(run)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if not np.isfinite(number):
            raise AccuracyError(f"{text} returned {value!r}, not a number")
        return number

    return score


def labelled_score(
    source: Any, samples: Samples, outputs: Sequence[str], classes: int | None = None
) -> Callable[[Run], float]:
    """Return the share of rows of the first output whose largest element is where the label says.

    ``source`` is an array of integers, an .npy file, an .npz with one array, or ``package.module:function``. There is
    one label for each row of the samples. ``classes`` are the elements of a row, if they are known.

    Raises UsageError, before anything runs, if labels are no integers, none of the classes, or their number is not that
    of the samples.
    """
    labels = _labels(source)
    rows = [len(next(iter(call.values()))) if next(iter(call.values())).ndim else 1 for call in samples]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UsageError(f"labels are one integer for each sample, not {labels.dtype} of shape {list(labels.shape)}")
    if len(labels) != sum(rows):
        raise UsageError(f"there are {len(labels)} labels for {sum(rows)} samples of {samples.source}")
    if labels.size and labels.min() < 0:
        raise UsageError(f"label {labels.min()} is no class")
    if labels.size and classes is not None:
        _within(labels, classes, outputs[0])

    def score(run: Run) -> float:
        right, first = 0, 0
        for inputs, count in zip(samples, rows, strict=True):
            found = run(inputs)[outputs[0]]
            best = found.reshape(count, -1).argmax(-1) if found.size % count == 0 else None
            if best is None or found.shape[0] != count:
                raise UsageError(
                    f"'{outputs[0]}' has the shape {list(found.shape)}: not a row for each of {count} samples"
                )
            _within(labels, found[0].size, outputs[0])
            right += int((best == labels[first : first + count]).sum())
            first += count
        return right / len(labels)

    return score


def _within(labels: np.ndarray, classes: int, output: str) -> None:
    if labels.max() >= classes:
        raise UsageError(f"label {labels.max()} is no class: '{output}' has {classes}")


def _labels(source: Any) -> np.ndarray:
    if isinstance(source, str | Path):
        path = Path(source)
        if path.suffix == ".npz" and path.is_file():
            content = load_npz(path)
            if len(content) != 1:
                raise UsageError(f"{path} holds {len(content)} arrays, labels are one")
            return next(iter(content.values()))
        if path.is_file():
            try:
                return np.asarray(np.load(path, allow_pickle=False))
            except (OSError, ValueError, EOFError) as error:
                raise UsageError(f"cannot read the labels in {path}: {error}") from error
        if ":" not in str(source):
            raise UsageError(f"labels: no such file: {source}")
        found = resolve(str(source))
        source = found() if callable(found) else found
    return np.asarray(source)


def _cosine(found: np.ndarray, expected: np.ndarray) -> float:
    a, b = found.astype(np.float64).reshape(-1), expected.astype(np.float64).reshape(-1)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return 1 - float(a @ b) / norms if norms else float(np.abs(a - b).max(initial=0.0) > 0)


def _kl(found: np.ndarray, expected: np.ndarray) -> float:
    p, q = _log_softmax(expected), _log_softmax(found)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = np.atleast_1d(x).astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


def _top1(found: np.ndarray, expected: np.ndarray) -> float:
    found, expected = np.atleast_1d(found), np.atleast_1d(expected)
    return float((found.argmax(-1) != expected.argmax(-1)).mean())


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    scale = float(np.abs(expected).max(initial=0.0)) or 1.0
    return float(np.abs(found.astype(np.float64) - expected).max(initial=0.0)) / scale


_COMPARE = {"cosine": _cosine, "kl": _kl, "top1": _top1, "relative": _relative}
