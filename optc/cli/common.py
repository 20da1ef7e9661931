"""What several verbs share: model options, inputs from files, tables, JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import numpy as np

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

    Files: .npy, .npz, and .png/.jpg for image inputs (see ``read_image``). ``random`` fills every input that is
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
            arrays.update(_load_npz(Path(text)))
        elif not name and len(specs) == 1:
            arrays[names[0]] = _load(Path(value), specs[0])
        elif name not in names:
            what = f"unknown input '{name}'" if name else f"'{text}' does not say which input it is for"
            raise InputError(what, hint=f"inputs: {', '.join(map(str, specs))}; write NAME=FILE")
        elif value == "random" or value.startswith("random:"):
            arrays[name] = _random([s for s in specs if s.name == name], _seed(value))[name]
        else:
            arrays[name] = _load(Path(value), specs[names.index(name)])
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


def _load(path: Path, spec: TensorSpec) -> np.ndarray:
    if path.suffix.lower() in (".png", ".jpg", ".jpeg"):
        return read_image(path, spec)
    if path.suffix == ".npz":
        content = _load_npz(path)
        if spec.name in content:
            return content[spec.name]
        raise InputError(f"{path} holds no array '{spec.name}', but {', '.join(content)}")
    if path.suffix != ".npy":
        raise InputError(f"{path}: cannot read '{path.suffix}' files", hint="use .npy, .npz, .png or .jpg")
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    assert isinstance(array, np.ndarray)
    return array


def _load_npz(path: Path) -> Mapping[str, np.ndarray]:
    import zipfile

    try:
        with np.load(path, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def read_image(path: Path, spec: TensorSpec) -> np.ndarray:
    """Read an image as ``[1, C, H, W]`` or ``[1, H, W, C]``, as the input's shape says.

    C is 1 (gray) or 3 (RGB); the image is resized to fixed H and W; values are 0..255 for integer inputs and
    0..1 for float inputs. Models that want another normalization need an .npy file.
    """
    from PIL import Image, UnidentifiedImageError

    if len(spec.shape) != 4:
        raise InputError(f"input {spec} is not an image batch of rank 4; {path} cannot be used")
    channels_first = spec.shape[1] in (1, 3)
    if not channels_first and spec.shape[3] not in (1, 3):
        raise InputError(f"input {spec} has neither 1 nor 3 channels; {path} cannot be used")
    channels = spec.shape[1] if channels_first else spec.shape[3]
    height, width = spec.shape[2:] if channels_first else spec.shape[1:3]
    try:
        with Image.open(path) as opened:
            image = opened.convert("L" if channels == 1 else "RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"cannot read the image {path}: {error}") from error
    size = (
        width if isinstance(width, int) else image.width,
        height if isinstance(height, int) else image.height,
    )
    array = np.asarray(image.resize(size) if size != image.size else image)
    array = array.reshape(array.shape[0], array.shape[1], int(channels))
    if spec.dtype.startswith("float"):
        array = (array / 255.0).astype(spec.dtype)
    else:
        array = array.astype(spec.dtype)
    return np.ascontiguousarray(array.transpose(2, 0, 1) if channels_first else array)[None]


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
