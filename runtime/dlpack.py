"""Tensors in and out without copies: DLPack producers become NumPy views, outputs become DLPack producers.

NumPy's own ``from_dlpack`` knows no bfloat16, hence this reading of the capsule (DLPack 0.8 layout, which
every version since still serves to consumers that ask for none).
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optc.errors import InputError
from optc.runtime import ffi
from optc.runtime.dtypes import name_of, numpy_dtype

_NAME = b"dltensor"
_CPU_ACCESSIBLE = (1, 3, 11, 13)  # kDLCPU, kDLCUDAHost, kDLROCMHost, kDLCUDAManaged

_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_DESTRUCTOR = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, _DESTRUCTOR)(
    ("PyCapsule_New", ctypes.pythonapi)
)
# The destructor gets a capsule that is being freed: it must be handled by address, never as an object.
_raw_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_raw_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class _ManagedTensor(ctypes.Structure):
    _fields_ = (
        ("tensor", ffi.DLTensor),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
    )


def _free(capsule: int) -> None:
    """Free the tensor of a capsule that no consumer took (a consumer renames the capsule)."""
    if _raw_is_valid(capsule, _NAME):
        address = _raw_get_pointer(capsule, _NAME)
        _ManagedTensor.from_address(address).deleter(address)


_free_unused = _DESTRUCTOR(_free)


class _Memory:
    """Lends memory to NumPy and keeps its owner alive as long as the array."""

    __slots__ = ("__array_interface__", "owner")

    def __init__(
        self,
        owner: object,
        address: int,
        itemsize: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None,
    ) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "version": 3,
            "shape": shape,
            "typestr": f"|V{itemsize}",
            "data": (address, False),
            "strides": strides,
        }


def _array(owner: object, tensor: ffi.DLTensor | ffi.Tensor, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the memory of ``tensor`` as an array that keeps ``owner`` alive."""
    shape = tuple(tensor.shape[: tensor.ndim])
    if 0 in shape:
        return np.empty(shape, dtype)
    strides = tuple(s * dtype.itemsize for s in tensor.strides[: tensor.ndim]) if tensor.strides else None
    memory = _Memory(owner, tensor.data + tensor.byte_offset, dtype.itemsize, shape, strides)
    return np.asarray(memory).view(dtype)


def contiguous(owner: object, start: int, shape: tuple[int, ...], dtype: np.dtype[Any], size: int) -> NDArray[Any]:
    """Return ``size`` bytes of memory at ``start`` as an array that keeps ``owner`` alive."""
    if not size:
        return np.empty(shape, dtype)
    memory = _bytes(size).from_address(start)
    memory.owner = owner
    return np.ndarray(shape, dtype, memory)


@lru_cache(maxsize=1024)
def _bytes(size: int) -> Any:
    return ctypes.c_char * size


def _dtype_of(tensor: ffi.DLTensor | ffi.Tensor) -> np.dtype[Any] | None:
    name = name_of(tensor.code, tensor.bits) if tensor.lanes == 1 else None
    return numpy_dtype(name) if name else None


def from_dlpack(source: Any, name: str) -> NDArray[Any]:
    """Return a view of a DLPack tensor in CPU memory; raises InputError about input ``name``."""
    device, _ = source.__dlpack_device__()
    if device not in _CPU_ACCESSIBLE:
        raise InputError(
            f"input {name!r} is in the memory of a device (DLPack device type {int(device)})",
            hint="copy it to the CPU first: tensor.cpu()",
        )
    try:
        capsule = source.__dlpack__()
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"input {name!r} cannot be read through DLPack: {error}",
            hint="pass a NumPy array, or tensor.detach().resolve_conj().resolve_neg()",
        ) from error
    managed = _ManagedTensor.from_address(_get_pointer(capsule, _NAME))
    dtype = _dtype_of(managed.tensor)
    if dtype is None:
        raise InputError(f"input {name!r} has a dtype that no model uses")
    return _array(capsule, managed.tensor, dtype)


class DLPackTensor:
    """An output in the runtime's memory; neither ``torch.from_dlpack`` nor ``.numpy()`` copies it."""

    __slots__ = ("_ref",)

    def __init__(self, ref: ffi.Ref) -> None:
        self._ref = ref

    def numpy(self) -> NDArray[Any]:
        """Return the tensor as an array that shares and keeps its memory."""
        tensor = self._ref.tensor()
        dtype = _dtype_of(tensor)
        assert dtype is not None  # compiled code has only the dtypes of the format
        return _array(self._ref, tensor, dtype)

    def __dlpack__(
        self,
        *,
        stream: object = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        if copy or (dl_device is not None and dl_device[0] != ffi.CPU):
            raise BufferError("this tensor is shared, not copied, and stays on the CPU")
        address = ctypes.c_void_p()
        ffi.check(ffi.library().TVMFFITensorToDLPack(self._ref.address, ctypes.byref(address)))
        return _new_capsule(address, _NAME, _free_unused)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (ffi.CPU, 0)
