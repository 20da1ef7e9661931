"""One kernel compiled alone, into this process: what tuning measures."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray

from optc.backends.base import Target
from optc.backends.cpu.build import shared_library
from optc.backends.cpu.target import to_tvm
from optc.backends.cpu.tir_pipeline import NAME as TIR_PIPELINE

ALIGNMENT = 64


def compile_kernel(function: Any, target: Target) -> Any:
    """Return a PrimFunc, scheduled or not, as a function of TVM tensors: inputs, then outputs."""
    return _compile(function, target)["main"]


def compile_library(function: Any, target: Target) -> bytes:
    """Return the same as a shared library that exports ``main``."""
    return shared_library(_compile(function, target), target)


def _compile(function: Any, target: Target) -> Any:
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    return tvm.compile(module, target=to_tvm(target), tir_pipeline=TIR_PIPELINE)


def aligned(array: NDArray[Any]) -> Any:
    """Return a TVM tensor with a copy of ``array``, aligned as generated code assumes."""
    buffer = np.zeros(array.nbytes + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    view = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return tvm.runtime.tensor(view)
