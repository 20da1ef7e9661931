"""What several verbs share: model options, inputs from files, tables, JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import numpy as np

from optc.array_files import load_array, load_npz
from optc.errors import InputError, UsageError

if TYPE_CHECKING:
    from optc.runtime.format import TensorSpec

Command = TypeVar("Command", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")


_UNITS = {"s": 1, "m": 60, "h": 3600}


class Duration(click.ParamType[float]):
    """Seconds, written like ``90s``, ``10m`` or ``1h``."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the seconds."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", str(value))
        if found is None or not float(found[1]):
            self.fail(f"'{value}' is no duration; write 90s, 10m or 1h", param, ctx)
        return float(found[1]) * _UNITS[found[2] or "s"]


class Share(click.ParamType[float]):
    """A share of a whole, written like ``50%`` or ``0.5``; the range is its user's business."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the share as a number."""
        text = str(value)
        try:
            return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            self.fail(f"'{value}' is no share; write 50% or 0.5", param, ctx)


def check_portable(output: Path, verb: str) -> None:
    """Raise UsageError, before the work, if ``output`` cannot become the ONNX file that ``optc verb`` writes."""
    if output.suffix != ".onnx":
        raise UsageError(f"{output}: the output of `optc {verb}` is an .onnx file")
    if not output.parent.is_dir():
        raise UsageError(f"the folder of {output} does not exist")


def capture_options(command: Command) -> Command:
    """Add the options that fix a model's inputs."""
    for option in (
        click.option(
            "--dim",
            "dims",
            multiple=True,
            metavar="NAME=SIZE",
            help="Give a named dimension a size; repeatable.",
        ),
        click.option(
            "--input-shape",
            "input_shapes",
            multiple=True,
            metavar="NAME:D0,D1,...",
            help="Fix an input's shape with sizes or dimension names; repeatable.",
        ),
    ):
        command = option(command)
    return command


def capture_arguments(input_shapes: Sequence[str], dims: Sequence[str]) -> dict[str, Any]:
    """Return the keyword arguments of ``optc.capture`` for the options above."""
    from optc.frontend.bind import parse_dim, parse_input_shape

    return {
        "input_shapes": dict(parse_input_shape(text) for text in input_shapes),
        "dims": dict(parse_dim(text) for text in dims),
    }


def print_json(data: Any) -> None:
    """Print ``data`` as one JSON object."""
    click.echo(json.dumps(data, indent=2, default=str))


def read_inputs(texts: Sequence[str], specs: Sequence[TensorSpec]) -> dict[str, np.ndarray]:
    """Turn ``name=FILE``, ``FILE`` (one input, or an .npz by names) and ``random[:seed]`` into arrays.

    Files: .npy, .npz, and .png/.jpg for image inputs (see ``optc.array_files``). ``random`` fills every input that is
    not given. Raises InputError naming the file or the input.
    """
    names = [spec.name for spec in specs]
    arrays: dict[str, np.ndarray] = {}
    seed: int | None = None
    for text in texts:
        name, _, value = text.rpartition("=")
        if not name and (text == "random" or text.startswith("random:")):
            seed = _seed(text)
        elif not name and text.endswith(".npz"):
            arrays.update(load_npz(Path(text)))
        elif not name and len(specs) == 1:
            arrays[names[0]] = load_array(Path(value), specs[0])
        elif name not in names:
            what = f"unknown input '{name}'" if name else f"'{text}' does not say which input it is for"
            raise InputError(what, hint=f"inputs: {', '.join(map(str, specs))}; write NAME=FILE")
        elif value == "random" or value.startswith("random:"):
            arrays[name] = _random([s for s in specs if s.name == name], _seed(value))[name]
        else:
            arrays[name] = load_array(Path(value), specs[names.index(name)])
    if seed is not None:
        arrays = {**_random(specs, seed), **arrays}
    return arrays


def _seed(text: str) -> int:
    _, _, seed = text.partition(":")
    try:
        return int(seed or 0)
    except ValueError as error:
        raise UsageError(f"'{text}': the seed after 'random:' must be an integer") from error


def _random(specs: Sequence[TensorSpec], seed: int) -> dict[str, np.ndarray]:
    from optc.sample import random_inputs

    return random_inputs(specs, seed=seed)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it; a failure leaves nothing behind."""
    import os

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
