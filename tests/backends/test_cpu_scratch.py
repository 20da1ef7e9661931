"""Which scratch buffers leave the stack, and which share memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import tirx

from optc.backends.cpu import tir_pipeline
from optc.backends.cpu.scratch import keep_off_the_stack
from optc.backends.cpu.single import aligned, compile_kernel
from optc.backends.cpu.target import resolve, to_tvm
from optc.backends.kernels import loops

ROWS = 9


def kernel(size: int, dtype: str, *, constant: bool = False) -> Any:
    """Return a function that copies ``(9,)`` values to scratch memory, then each to all of a row of ``(9, 4)``."""
    values, out = tirx.decl_buffer([ROWS], dtype, "values"), tirx.decl_buffer([ROWS * 4], dtype, "out")
    memory = tirx.decl_buffer([size], dtype, "memory")

    def row(i: Any) -> Any:
        value = tirx.Broadcast(loops.load(memory, 0 if constant else i), 4)
        return tirx.BufferStore(out, value, [tirx.Ramp(i * 4, loops.index(1), 4)])

    first = loops.loop("i", ROWS, lambda i: loops.store(memory, 0 if constant else i, loops.load(values, i)))
    body = loops.sequence(tirx.AllocBuffer(memory), first, loops.loop("i", ROWS, row))
    return tirx.PrimFunc([values, out], body)


def sizes(target: str, function: Any) -> list[int]:
    moved = keep_off_the_stack(function.with_attr("target", to_tvm(resolve(target))))
    return [int(a.buffer.ty.shape[0]) for a in loops.collect(moved.body, tirx.AllocBuffer)]


@pytest.mark.parametrize(("target", "moves"), [("nehalem", True), ("x86-64-v2", True), ("haswell", False)])
def test_arrays_move_where_there_is_no_avx(target, moves):
    assert sizes(target, kernel(24, "float32")) == [257 if moves else 24]


def test_other_machines_keep_them():
    assert sizes("aarch64", kernel(24, "float32")) == [24]


def test_what_is_safe_stays():
    assert sizes("nehalem", kernel(4, "int32")) == [4]
    assert sizes("nehalem", kernel(24, "int64")) == [24]
    assert sizes("nehalem", kernel(24, "int32", constant=True)) == [24]
    assert sizes("nehalem", kernel(300, "int32")) == [300]


@pytest.mark.parametrize("dtype", ["float32", "int32", "int64", "int8"])
@pytest.mark.parametrize("target", ["nehalem", "cpu"])
def test_results(target, dtype):
    values = np.arange(3, 3 + ROWS).astype(dtype)
    out = aligned(np.zeros(ROWS * 4, dtype))
    compile_kernel(kernel(24, dtype), resolve(target))(aligned(values), out)
    np.testing.assert_array_equal(out.numpy(), np.repeat(values, 4))


@pytest.mark.parametrize(("separate", "count"), [(False, 1), (True, 2)])
def test_buffers_that_are_not_alive_at_once_share_memory_unless_they_say(separate, count):
    values, out = tirx.decl_buffer([ROWS], "float32", "values"), tirx.decl_buffer([ROWS], "float32", "out")

    def through(name: str, size: int) -> list[Any]:
        memory, allocate = loops.scratch(name, size, "float32")
        there = loops.loop("i", ROWS, lambda i: loops.store(memory, i, loops.load(values, i)))
        return [allocate, there, loops.loop("i", ROWS, lambda i: loops.store(out, i, loops.load(memory, i)))]

    function = tirx.PrimFunc([values, out], loops.sequence(*through("one", 32), *through("two", 24)))
    target = to_tvm(resolve("cpu"))
    function = function.with_attrs({"global_symbol": "main", "target": tvm.target.Target(target, host=target)})
    function = function.with_attr(loops.SEPARATE, True) if separate else function
    lower, _, _ = tir_pipeline._pipeline()
    lowered = lower(tvm.IRModule({"main": function}))["main"]
    assert len(loops.collect(lowered.body, tirx.AllocBuffer)) == count
