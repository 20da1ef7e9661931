"""Arrays for a model's inputs, from files: .npy, .npz and images."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from optc.errors import InputError

if TYPE_CHECKING:
    from optc.runtime.format import TensorSpec


def load_array(path: Path, spec: TensorSpec) -> np.ndarray:
    """Return the array for input ``spec`` in an .npy file, in an .npz by its name, or in an image.

    Raises InputError naming the file.
    """
    if path.suffix.lower() in (".png", ".jpg", ".jpeg"):
        return read_image(path, spec)
    if path.suffix == ".npz":
        content = load_npz(path)
        if spec.name in content:
            return content[spec.name]
        raise InputError(f"{path} holds no array '{spec.name}', but {', '.join(content)}")
    if path.suffix != ".npy":
        raise InputError(f"{path}: cannot read '{path.suffix}' files", hint="use .npy, .npz, .png or .jpg")
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(path, error) from error
    assert isinstance(array, np.ndarray)
    return array


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file by name. Raises InputError naming the file."""
    try:
        with np.load(path, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    # NumPy takes what it does not know for a pickle, and advises to load that.
    why = "no NumPy file of plain numbers" if "allow_pickle" in str(error) else str(error)
    return InputError(f"cannot read {path}: {why}")


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
