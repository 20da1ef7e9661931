"""Calibration data: checked samples of a model's inputs, from files, a function or arrays.

    samples = load("images/", specs)
    for feeds in samples:          # {input name: array}
        model.run(feeds)

Everything is read and checked before it is used, because what uses it takes long.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from optc.array_files import load_array, load_npz
from optc.errors import InputError, UsageError
from optc.frontend.factory import resolve
from optc.runtime.format import WEIGHT_ALIGNMENT, TensorSpec
from optc.runtime.inputs import Inputs

Arrays = dict[str, np.ndarray]

LIMIT = 512
"""Samples that are taken where the caller does not say how many."""
SUFFIXES = (".npz", ".npy", ".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Samples:
    """Inputs of several calls of a model, in order. ``source`` says where they are from, for messages."""

    source: str
    calls: tuple[Arrays, ...]

    def __iter__(self) -> Iterator[Arrays]:
        return iter(self.calls)

    def __len__(self) -> int:
        return len(self.calls)


def load(source: Any, specs: Sequence[TensorSpec], *, limit: int = LIMIT) -> Samples:
    """Read the samples of ``source`` for a model with the inputs ``specs``.

    Args:
        source: one of

            * a folder, each of whose files is a call: ``.npz`` with an array by input name; ``.npy`` or an image for
              a model with one input. In the order of their names;
            * an ``.npz`` or ``.npy`` file of stacked samples (see ``split``);
            * ``package.module:function``, a function without arguments that returns what follows;
            * an array or a mapping of stacked samples by input name;
            * an iterable of calls, each of them a mapping by input name, a tuple in the order of the inputs, or an
              array for a model with one input.
        specs: the model's inputs.
        limit: how many calls to take at most.

    Raises:
        UsageError: no such file or function, or fewer than two different samples: ranges of values cannot be told
            from one.
        InputError: a wrong name, shape or dtype, or a value that is not a finite number. Names the sample.
    """
    if not specs:
        raise UsageError("the model has no inputs: there is nothing to calibrate with")
    if limit < 1:
        raise UsageError(f"{limit} calibration samples are none")
    name, found = _open(source, specs)
    inputs = Inputs(specs, WEIGHT_ALIGNMENT)
    calls: list[Arrays] = []
    for number, given in enumerate(found):
        if len(calls) == limit:
            break
        calls.append(_checked(given, specs, inputs, f"{name}, sample {number}"))
    _require_variety(calls, name)
    return Samples(name, tuple(calls))


def split(arrays: Mapping[str, np.ndarray], specs: Sequence[TensorSpec], source: str) -> list[Arrays]:
    """Take stacked samples apart: along an axis before those of the input, or along the input's own first axis.

    In the second case each call gets as many rows as the model's batch, one if that is open.

    Raises InputError if the inputs have different numbers of samples, or rows are left over.
    """
    known = {spec.name: spec for spec in specs}
    if unknown := sorted(set(arrays) - set(known)):
        raise InputError(f"{source}: the model has no input {unknown[0]!r}", hint=_takes(specs))
    parts: dict[str, list[np.ndarray]] = {}
    for name, array in arrays.items():
        shape = known[name].shape
        if array.ndim == len(shape) + 1:
            parts[name] = list(array)
        elif array.ndim == len(shape) and shape:
            rows = shape[0] if isinstance(shape[0], int) else 1
            if not rows or len(array) % rows:
                raise InputError(f"{source}: {len(array)} rows of {name!r} do not make batches of {rows}")
            parts[name] = [array[start : start + rows] for start in range(0, len(array), rows)]
        else:
            shape_text = f"{source}: {name!r} has shape {list(array.shape)}"
            raise InputError(shape_text, hint=f"{_takes(specs)}; samples are stacked along one axis more, or the first")
    counts = {name: len(part) for name, part in parts.items()}
    if len(set(counts.values())) > 1:
        raise InputError(f"{source}: the inputs have different numbers of samples: {counts}")
    return [dict(zip(parts, row, strict=True)) for row in zip(*parts.values(), strict=True)]


def _open(source: Any, specs: Sequence[TensorSpec]) -> tuple[str, Iterable[Any]]:
    if isinstance(source, str | Path):
        path = Path(source)
        if path.is_dir():
            return str(path), _folder(path, specs)
        if path.is_file():
            return str(path), split(_file(path, specs), specs, str(path))
        if ":" not in str(source):
            hint = "give a folder, an .npz file or package.module:function"
            raise UsageError(f"calibration data: no such file or folder: {source}", hint=hint)
        name, function = str(source), resolve(str(source))
        source = function() if callable(function) else function
    else:
        name = "calibration data"
    if isinstance(source, Samples):
        return source.source, source
    if isinstance(source, np.ndarray):
        _require_single(specs, name)
        source = {specs[0].name: source}
    if isinstance(source, Mapping):
        return name, split({k: np.asarray(v) for k, v in source.items()}, specs, name)
    if not isinstance(source, Iterable):
        raise UsageError(f"{name} is a {type(source).__name__}, not samples", hint="return a list of {input: array}")
    return name, source


def _folder(folder: Path, specs: Sequence[TensorSpec]) -> Iterator[Arrays]:
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise UsageError(f"{folder} holds no calibration data", hint=f"files of these kinds: {', '.join(SUFFIXES)}")
    return (_file(path, specs) for path in files)


def _file(path: Path, specs: Sequence[TensorSpec]) -> Arrays:
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path}: not calibration data", hint=f"files of these kinds: {', '.join(SUFFIXES)}")
    if path.suffix.lower() == ".npz":
        return load_npz(path)
    _require_single(specs, str(path))
    return {specs[0].name: load_array(path, specs[0])}


def _require_single(specs: Sequence[TensorSpec], source: str) -> None:
    if len(specs) != 1:
        raise UsageError(f"{source}: the model has {len(specs)} inputs, an array is one", hint=_takes(specs))


def _checked(given: Any, specs: Sequence[TensorSpec], inputs: Inputs, place: str) -> Arrays:
    if isinstance(given, np.ndarray):
        given = (given,)
    if isinstance(given, tuple | list):
        if len(given) != len(specs):
            raise InputError(f"{place} has {len(given)} arrays for {len(specs)} inputs", hint=_takes(specs))
        given = {spec.name: array for spec, array in zip(specs, given, strict=True)}
    if not isinstance(given, Mapping):
        raise InputError(f"{place} is a {type(given).__name__}", hint="give mappings of arrays by input name")
    try:
        arrays, _ = inputs.prepare(given)
    except InputError as error:
        raise InputError(f"{place}: {error.message}", hint=error.hint) from error
    for spec, array in zip(specs, arrays, strict=True):
        if not array.size:
            raise InputError(f"{place}: {spec.name!r} is empty")
        if array.dtype.kind not in "biu" and not np.isfinite(array.astype(np.float32)).all():
            raise InputError(f"{place}: {spec.name!r} holds values that are no finite numbers")
    return dict(zip((spec.name for spec in specs), arrays, strict=True))


def _require_variety(calls: Sequence[Arrays], name: str) -> None:
    if not calls:
        raise UsageError(f"{name} holds no samples")
    first = calls[0]
    if len(calls) > 1:
        varied = any(not np.array_equal(first[key], call[key]) for call in calls[1:] for key in first)
    else:
        varied = any(array.ndim and len(array) > 1 and (array != array[:1]).any() for array in first.values())
        varied = varied and all(array.ndim > 1 for array in first.values())
    if not varied:
        what = "one sample" if len(calls) == 1 else f"{len(calls)} samples that are all the same"
        raise UsageError(f"{name} holds {what}: ranges of values cannot be told from it", hint="give 100 or so")


def _takes(specs: Sequence[TensorSpec]) -> str:
    return f"the model takes {'; '.join(map(str, specs))}"
