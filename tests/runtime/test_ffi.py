"""References to objects of TVM's runtime."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from optc.errors import OptcError
from optc.runtime import ffi
from optc.runtime.inputs import address


def test_a_reference_gives_up_its_count_without_python_code():
    tensor = ffi.empty(2, 32, (3,))
    second = ffi.retain(tensor.address)
    assert tensor.holders == tensor.tensor().holders == 2
    del second
    assert tensor.holders == tensor.tensor().holders == 1
    # Ctrl-C would be raised in a finalizer of Python code, and be lost there.
    assert not hasattr(vars(ffi.Ref)["__del__"], "__code__")


def test_a_call_is_made_again_and_again():
    values, _ = ffi.pack([1, 2, 3])
    make = ffi.Call(ffi.global_function("ffi.Shape"), values)
    first, second = make(), make()
    assert isinstance(first, ffi.Ref) and isinstance(second, ffi.Ref)
    assert first.address != second.address
    assert first.holders == second.holders == 1
    assert [ref.address for ref in make.objects()] != [first.address]


def test_a_function_that_returns_no_object_returns_no_tensors():
    count = ffi.Call(ffi.global_function("runtime.NumThreads"), ffi.pack([])[0])
    with pytest.raises(OptcError, match="instead of tensors"):
        count.objects()


def test_where_an_array_starts():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    start = array.__array_interface__["data"][0]
    frozen = array.view()
    frozen.flags.writeable = False
    for view, offset in ((array, 0), (frozen, 0), (array[1:], 12), (array[:, 1:], 4), (array.T, 0)):
        assert address(view) == start + offset
    assert address(np.empty((0, 3), np.float32)) != 0
    assert address(array.astype(ml_dtypes.bfloat16)) % 2 == 0
    del frozen, view
    array.resize((3, 2))  # which NumPy refuses if anything still holds the memory
