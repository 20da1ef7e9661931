"""The few calls of TVM's stable C ABI (tvm/ffi/c_api.h) that running a compiled model takes, through ctypes.

The Python package ``tvm_ffi`` is not imported: its import tries ``import torch`` first, which costs seconds
where PyTorch is installed. ctypes also releases the GIL during each call.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from functools import cache, partial
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Final

from optc.errors import MissingDependencyError, OptcError

NONE: Final = 0
INT: Final = 1
BOOL: Final = 2
DTYPE: Final = 5
DEVICE: Final = 6
RAW_STR: Final = 8
SMALL_STR: Final = 11
FIRST_OBJECT: Final = 64
STR: Final = 65
TENSOR: Final = 70
ARRAY: Final = 71

CPU: Final = 1
HEADER: Final = 24  # sizeof(TVMFFIObject); the content of an object follows it

_INSTALL = "install the runtime again: pip install 'apache-tvm==0.27.*'"


class DLTensor(ctypes.Structure):
    """DLPack's tensor without ownership."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class Tensor(ctypes.Structure):
    """TVM's object that holds a tensor: what every object has, then DLPack's fields."""

    _fields_ = (
        ("holders", ctypes.c_uint32),
        ("weak_holders", ctypes.c_uint32),
        ("type_index", ctypes.c_int32),
        ("padding", ctypes.c_uint32),
        ("deleter", ctypes.c_void_p),
        *DLTensor._fields_,
    )


class Value(ctypes.Structure):
    """TVMFFIAny: a type index and eight bytes, here read as an integer or a pointer."""

    _fields_ = (("type_index", ctypes.c_int32), ("small_size", ctypes.c_uint32), ("content", ctypes.c_int64))


class _Bytes(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t))

    def text(self) -> str:
        return ctypes.string_at(self.data, self.size).decode(errors="replace") if self.size else ""


class _Error(ctypes.Structure):
    _fields_ = (("kind", _Bytes), ("message", _Bytes))


class _Sequence(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_int64))


SAFE_CALL = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(Value), ctypes.c_int32, ctypes.POINTER(Value)
)


class TvmError(OptcError):
    """An error that TVM's runtime raised; ``kind`` is its class there."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class Ref:
    """A counted reference to an object of TVM's runtime."""

    __slots__ = ("_release", "address")

    def __init__(self, address: int) -> None:
        self._release = partial(library().TVMFFIObjectDecRef, address)
        self.address = address

    # What is called when a reference goes must not be Python code: Ctrl-C would be raised there and be lost, since
    # exceptions of finalizers are ignored. A property gives the interpreter a C function to call instead of a method.
    __del__ = property(attrgetter("_release"))

    @property
    def type_index(self) -> int:
        """The index of the object's type."""
        return ctypes.c_int32.from_address(self.address + 8).value

    @property
    def holders(self) -> int:
        """How many references to the object there are."""
        return ctypes.c_uint32.from_address(self.address).value

    def tensor(self) -> Tensor:
        """Return the tensor's fields, valid as long as the reference; raises OptcError for another object."""
        found = Tensor.from_address(self.address)
        if found.type_index != TENSOR:
            raise OptcError(f"expected a tensor from the compiled code, got object type {found.type_index}")
        return found

    def items(self) -> list[Ref]:
        """Return references to the items of an array of objects."""
        cell = _Sequence.from_address(self.address + HEADER)
        values = (Value * cell.size).from_address(cell.data) if cell.size else ()
        return [retain(value.content) for value in values]


def library_folder(package: str) -> Path:
    """Return the folder of a package's shared libraries without importing the package."""
    spec = find_spec(package)
    for place in (spec and spec.submodule_search_locations) or ():
        folder = Path(place) / "lib"
        if folder.is_dir():
            return folder
    raise MissingDependencyError(f"the shared libraries of {package} are not installed", hint=_INSTALL)


@cache
def library() -> ctypes.CDLL:
    """Load TVM's runtime libraries, once per process, and return the one with the C ABI."""
    if not sys.platform.startswith("linux"):
        raise OptcError(f"compiled models run on Linux only, not on {sys.platform}")
    # TVM would pin the calling thread and its own to fixed cores, the same ones in every process, and keep
    # its own busy for 0.2 s after each call.
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "20000")
    ours, tvm = library_folder("tvm_ffi"), library_folder("tvm")
    try:
        abi = ctypes.CDLL(str(ours / "libtvm_ffi.so"), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(tvm / "libtvm_runtime.so"), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(tvm / "libtvm_runtime_extra.so"))
    except OSError as error:
        raise MissingDependencyError(f"TVM's runtime does not load: {error}", hint=_INSTALL) from error
    pointer, out = ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
    abi.TVMFFIObjectDecRef.argtypes = [pointer]
    abi.TVMFFIObjectIncRef.argtypes = [pointer]
    abi.TVMFFIFunctionGetGlobal.argtypes = [ctypes.POINTER(_Bytes), out]
    abi.TVMFFIFunctionCall.argtypes = [pointer, ctypes.POINTER(Value), ctypes.c_int32, ctypes.POINTER(Value)]
    abi.TVMFFIFunctionCreate.argtypes = [pointer, SAFE_CALL, pointer, out]
    abi.TVMFFIErrorMoveFromRaised.argtypes = [out]
    abi.TVMFFIErrorMoveFromRaised.restype = None
    abi.TVMFFITensorCreateUnsafeView.argtypes = [pointer, ctypes.POINTER(DLTensor), out]
    abi.TVMFFITensorToDLPack.argtypes = [pointer, out]
    return abi


def check(status: int) -> None:
    """Raise what TVM's runtime raised in this thread if ``status`` is not zero."""
    if status == 0:
        return
    handle = ctypes.c_void_p()
    library().TVMFFIErrorMoveFromRaised(ctypes.byref(handle))
    if not handle.value:
        raise TvmError("InternalError", f"TVM's runtime failed with status {status}")
    error = Ref(handle.value)
    cell = _Error.from_address(error.address + HEADER)
    raise TvmError(cell.kind.text(), cell.message.text())


def retain(address: int) -> Ref:
    """Return a new reference to the object at ``address``."""
    library().TVMFFIObjectIncRef(address)
    return Ref(address)


def global_function(name: str) -> Ref:
    """Return a function registered under ``name``; raises OptcError if there is none."""
    text = name.encode()
    handle = ctypes.c_void_p()
    key = _Bytes(ctypes.cast(ctypes.c_char_p(text), ctypes.c_void_p), len(text))
    check(library().TVMFFIFunctionGetGlobal(ctypes.byref(key), ctypes.byref(handle)))
    if not handle.value:
        raise MissingDependencyError(f"TVM's runtime has no function {name!r}", hint=_INSTALL)
    return Ref(handle.value)


def pack(args: Sequence[Ref | Value | int | str | bool | None]) -> tuple[ctypes.Array[Value], list[bytes]]:
    """Return ``args`` as TVMFFIAny, and what must stay alive besides the references in ``args``."""
    values = (Value * len(args))()
    keep: list[bytes] = []
    for value, arg in zip(values, args, strict=True):
        if isinstance(arg, Ref):
            value.type_index, value.content = arg.type_index, arg.address
        elif isinstance(arg, Value):
            value.type_index, value.content = arg.type_index, arg.content
        elif isinstance(arg, bool):
            value.type_index, value.content = BOOL, int(arg)
        elif isinstance(arg, int):
            value.type_index, value.content = INT, arg
        elif isinstance(arg, str):
            keep.append(arg.encode())
            start = ctypes.cast(ctypes.c_char_p(keep[-1]), ctypes.c_void_p).value
            value.type_index, value.content = RAW_STR, start or 0
    return values, keep


class Call:
    """A function and where its arguments lie, to be called often: what can be prepared is."""

    def __init__(self, function: Ref, values: ctypes.Array[Value]) -> None:
        self._function = function
        self._result = Value()
        self._arguments = (function.address, values, len(values), ctypes.byref(self._result))
        self._call = library().TVMFFIFunctionCall

    def __call__(self) -> Ref | int | None:
        """Return the result: an object, an integer (or bool), or None."""
        result = self._result
        kind = self._run()
        if kind >= FIRST_OBJECT:
            return Ref(result.content)
        if kind in (INT, BOOL):
            return int(result.content)
        if kind == NONE:
            return None
        raise OptcError(f"TVM's runtime returned a value of type {kind}")

    def objects(self) -> list[Ref]:
        """Return the object that the function returns, or the items of an array of them."""
        kind = self._run()
        if kind < FIRST_OBJECT:
            raise OptcError(f"the compiled code returned a value of type {kind} instead of tensors")
        found = Ref(self._result.content)
        return found.items() if kind == ARRAY else [found]

    def _run(self) -> int:
        """Call and return the type of the result."""
        result = self._result
        result.type_index = NONE  # the callee owns what it finds there
        status = self._call(*self._arguments)
        if status:
            check(status)
        return int(result.type_index)


def call(function: Ref, *args: Ref | Value | int | str | bool | None) -> Ref | int | None:
    """Call ``function`` with ``args``."""
    values, keep = pack(args)
    result = Call(function, values)()
    del keep
    return result


def call_for_object(function: Ref, *args: Ref | Value | int | str | bool | None) -> Ref:
    """Call ``function``, which must return an object."""
    result = call(function, *args)
    if not isinstance(result, Ref):
        raise OptcError(f"TVM's runtime returned {result!r} instead of an object")
    return result


def module_function(module: Ref, name: str) -> Ref:
    """Return the function ``name`` of a module; raises OptcError if it has none."""
    found = call(_module_get_function(), module, name, True)
    if not isinstance(found, Ref):
        raise OptcError(f"the compiled code has no function {name!r}")
    return found


def empty(code: int, bits: int, shape: Sequence[int]) -> Ref:
    """Return a new uninitialised CPU tensor that owns its memory, 64-byte aligned."""
    dims = call_for_object(_make_shape(), *shape)
    dtype = Value(DTYPE, 0, code | bits << 8 | 1 << 16)  # DLDataType: code, bits, one lane
    return call_for_object(_allocate(), dims, dtype, Value(DEVICE, 0, CPU), None)


def view(address: int, code: int, bits: int, shape: Sequence[int]) -> Ref:
    """Return a tensor over memory it does not own, contiguous, at ``address``."""
    ndim = len(shape)
    dims = (ctypes.c_int64 * (2 * ndim))(*shape, *shape)
    stride = 1
    for axis in reversed(range(ndim)):
        dims[ndim + axis] = stride
        stride *= shape[axis]
    shape_pointer = ctypes.cast(dims, ctypes.POINTER(ctypes.c_int64))
    stride_pointer = ctypes.cast(ctypes.byref(dims, 8 * ndim), ctypes.POINTER(ctypes.c_int64))
    prototype = DLTensor(address, CPU, 0, ndim, code, bits, 1, shape_pointer, stride_pointer, 0)
    handle = ctypes.c_void_p()
    owner = _view_owner()
    check(library().TVMFFITensorCreateUnsafeView(owner.address, ctypes.byref(prototype), ctypes.byref(handle)))
    assert handle.value
    return Ref(handle.value)


@cache
def _module_get_function() -> Ref:
    return global_function("ffi.ModuleGetFunction")


@cache
def _make_shape() -> Ref:
    return global_function("ffi.Shape")


@cache
def _allocate() -> Ref:
    return global_function("runtime.TVMTensorAllocWithScope")


@cache
def _view_owner() -> Ref:
    """Views keep a reference to an owner; theirs is an empty tensor, as their memory outlives them anyway."""
    return empty(1, 8, (0,))
