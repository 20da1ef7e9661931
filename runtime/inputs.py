"""Checks what a caller passes against the model's inputs, and brings it into the form that kernels take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from ctypes import addressof, c_char
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optc.errors import InputError
from optc.runtime.dlpack import from_dlpack
from optc.runtime.dtypes import numpy_dtype
from optc.runtime.format import WEIGHT_ALIGNMENT, TensorSpec

Array = NDArray[Any]

_byte: Callable[[Any], c_char] = c_char.from_buffer

_KINDS = "biuf"  # what Python numbers may become: bool, int, uint, float; later kinds hold earlier ones


class Inputs:
    """The inputs of a model."""

    def __init__(self, specs: Sequence[TensorSpec], alignment: int) -> None:
        self._specs = tuple(specs)
        self._names = {spec.name for spec in specs}
        self._expected = []
        for spec in specs:
            dtype = numpy_dtype(spec.dtype)
            fixed = None if any(isinstance(dim, str) for dim in spec.shape) else spec.shape
            self._expected.append((spec, dtype, fixed, max(alignment, dtype.itemsize)))

    def prepare(self, given: Mapping[str, object]) -> tuple[list[Array], list[int]]:
        """Return the inputs in their order (right dtype and shape, C order, aligned) and where their data starts.

        Arrays and DLPack tensors of the right dtype are used in place if they are aligned and contiguous, else
        copied. Python numbers and (nested) lists of them are converted where the dtype can hold them.
        Raises InputError for a missing or unknown name, a wrong dtype, rank or dim, or dims that contradict.
        """
        if given.keys() != self._names:
            self._explain_names(given)
        arrays, starts, bound = [], [], dict[str, tuple[int, int, str]]()
        for spec, dtype, fixed, alignment in self._expected:
            value = given[spec.name]
            array = value if type(value) is np.ndarray and value.dtype is dtype else _to_array(value, spec, dtype)
            if array.shape != fixed:
                _check_shape(array.shape, spec, bound)
            start = address(array)
            if start % alignment or not array.flags.c_contiguous:
                array = _copy(array)
                start = address(array)
            arrays.append(array)
            starts.append(start)
        return arrays, starts

    def _explain_names(self, given: Mapping[str, object]) -> None:
        problem = [f"missing input {name!r}" for name in self._names - given.keys()]
        problem += [f"unknown input {name!r}" for name in given if name not in self._names]
        wanted = "; ".join(map(str, self._specs)) or "no inputs"
        raise InputError("; ".join(problem), hint=f"the model takes {wanted}")


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return an uninitialised C-order array whose data starts at a multiple of 64 bytes."""
    nbytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    buffer = np.empty(nbytes + WEIGHT_ALIGNMENT, np.uint8)
    start = -address(buffer) % WEIGHT_ALIGNMENT
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


def address(array: Array) -> int:
    """Return where the data of ``array`` starts."""
    try:
        return addressof(_byte(array))  # a quarter of the time, for arrays that may be written
    except (TypeError, ValueError):
        return int(array.__array_interface__["data"][0])


def _copy(array: Array) -> Array:
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def _to_array(value: object, spec: TensorSpec, wanted: np.dtype[Any]) -> Array:
    if isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
    elif hasattr(value, "__dlpack__"):
        array = from_dlpack(value, spec.name)
    else:
        return _from_python(value, spec, wanted)
    if array.dtype != wanted:
        given = array.dtype.name
        if not array.dtype.isnative:
            given, cast = f"big-endian {given}", f".astype(numpy.{spec.dtype})"
        else:
            cast = "" if array.dtype.kind in "OUSV" else f".astype({wanted.name!r})"
        raise InputError(
            f"input {spec.name!r} has dtype {given}; the model takes {spec.dtype}",
            hint=f"convert it: array{cast}" if cast else "pass an array of numbers",
        )
    return array


def _from_python(value: object, spec: TensorSpec, wanted: np.dtype[Any]) -> Array:
    """Convert Python numbers as NumPy 2 treats them: their kind must fit, and integers their exact value."""
    message = f"input {spec.name!r} cannot become {spec.dtype} without loss"
    hint = f"pass a NumPy array of dtype {spec.dtype}"
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError, TypeError) as error:
        raise InputError(f"input {spec.name!r} is not an array of numbers: {error}", hint=hint) from error
    kind = "f" if wanted.kind not in _KINDS else wanted.kind  # ml_dtypes' floats have kind V
    if array.dtype.kind not in _KINDS:
        raise InputError(
            f"input {spec.name!r} is a {type(value).__name__}, not an array of numbers",
            hint=hint,
        )
    if array.size and (_KINDS.index(array.dtype.kind) > _KINDS.index(kind.replace("i", "u"))):
        raise InputError(f"{message}: it holds {array.dtype.name} values", hint=hint)
    with np.errstate(over="ignore", invalid="ignore"):
        converted = array.astype(wanted)
        if array.dtype.kind == "f":
            lossless = np.array_equal(np.isfinite(array), np.isfinite(converted.astype(np.float64)))
        else:
            lossless = np.array_equal(array, converted.astype(array.dtype)) and (
                wanted.kind != "u" or not np.any(array < 0)
            )
    if not lossless:
        raise InputError(f"{message}: a value is out of range", hint=hint)
    return converted


def _check_shape(shape: tuple[int, ...], spec: TensorSpec, bound: dict[str, tuple[int, int, str]]) -> None:
    """Check ``shape``; named dims are collected in ``bound`` with the axis and the input that set them."""
    if len(shape) != len(spec.shape):
        hint = f"it needs {len(spec.shape)} dims, not {len(shape)}"
        if len(spec.shape) == len(shape) + 1:
            hint += "; a batch of one is array[None]"
        raise InputError(_mismatch(shape, spec), hint=hint)
    for axis, (size, dim) in enumerate(zip(shape, spec.shape, strict=True)):
        if isinstance(dim, int):
            if size != dim:
                hint = f"pass {_dims(spec)}"
                raise InputError(f"{_mismatch(shape, spec)}: dim {axis} is {size} instead of {dim}", hint=hint)
        elif dim.isidentifier():  # expressions of several dims are checked by the compiled code
            known = bound.setdefault(dim, (size, axis, spec.name))
            if known[0] != size:
                place = f"dim {known[1]} of input {known[2]!r}"
                raise InputError(
                    f"{_mismatch(shape, spec)}: {dim!r} is {size} at dim {axis}, but {known[0]} at {place}",
                    hint=f"every {dim!r} must have the same size in one call",
                )


def _dims(spec: TensorSpec) -> str:
    return f"({', '.join(map(str, spec.shape))})"


def _mismatch(shape: tuple[int, ...], spec: TensorSpec) -> str:
    return f"input {spec.name!r} has shape {shape}; the model takes {_dims(spec)}"
