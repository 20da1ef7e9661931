"""References to objects of TVM's runtime."""

from __future__ import annotations

from optc.runtime import ffi


def test_a_reference_gives_up_its_count_without_python_code():
    tensor = ffi.empty(2, 32, (3,))
    count = tensor.counter()
    second = ffi.retain(tensor.address)
    assert count.value == 2
    del second
    assert count.value == 1
    # Ctrl-C would be raised in a finalizer of Python code, and be lost there.
    assert not hasattr(vars(ffi.Ref)["__del__"], "__code__")


def test_a_call_is_made_again_and_again():
    values, _ = ffi.pack([1, 2, 3])
    make = ffi.Call(ffi.global_function("ffi.Shape"), values)
    first, second = make(), make()
    assert isinstance(first, ffi.Ref) and isinstance(second, ffi.Ref)
    assert first.address != second.address
    assert first.counter().value == second.counter().value == 1
