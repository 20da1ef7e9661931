"""Where kernels keep their scratch buffers: registers, the stack, or TVM's pool of memory."""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.target import codegen

from optc.backends.kernels import loops
from optc.backends.kernels.fused import bits

_STACK_BYTES = 1024
"""TVM puts what is larger into its pool."""


def allocate_directly(function: Any) -> Any:
    """Say that a function without packed interface allocates on the CPU; TVM says so only for those that have one."""
    default = tvm.ir.StringImm("default")
    body = function.body
    for key, value in (("device_type", 1), ("device_id", 0)):
        body = tirx.AttrStmt(default, key, tirx.IntImm("int32", value), body)
    return function.with_body(body)


def keep_off_the_stack(function: Any) -> Any:
    """Move arrays of a function for x86-64 without AVX from the stack into the pool.

    There LLVM makes of a 32-bit value on the stack, if all lanes of a vector get it, a load of the 16 aligned bytes
    around it. It notes a wrong address for that load (the offset in the array counted twice), so that it may read
    before the value is written. Arrays of up to 16 bytes, and those that become registers because the index of each
    access is a constant, are safe.
    """
    target = (function.attrs or {}).get("target")
    if target is None or not str(target.attrs.get("mtriple", "")).startswith("x86_64"):
        return function
    if codegen.target_has_features("avx", target):
        return function
    loads = [(load.source, load.indices) for load in loops.collect(function.body, tvm.ir.TensorLoad)]
    stores = [(store.buffer, store.indices) for store in loops.collect(function.body, tirx.BufferStore)]
    moved = {buffer for buffer, indices in loads + stores if any(_start(i) is None for i in indices)}

    def move(block: Any) -> Any:
        statements = [part for s in block.seq for part in (_pooled(s) if _is_array(s, moved) else [s])]
        return tirx.SeqStmt(statements)

    return function.with_body(tvm_ffi.structural_map(function.body, [(tirx.SeqStmt, move)], order="post"))


def _start(position: Any) -> int | None:
    return loops.static(position.base if isinstance(position, tirx.Ramp) else position)


def _is_array(statement: Any, moved: set[Any]) -> bool:
    if not isinstance(statement, tirx.AllocBuffer) or statement.buffer not in moved:
        return False
    width = bits(str(statement.buffer.ty.dtype))
    size = loops.static(loops.product(statement.buffer.ty.shape)) or 0
    return 16 < size * width // 8 <= _STACK_BYTES and width <= 32


def _pooled(allocation: Any) -> list[Any]:
    """Return an allocation just large enough for the pool, and the view of its first elements."""
    buffer = allocation.buffer
    dtype = str(buffer.ty.dtype)
    memory = tirx.decl_buffer([_STACK_BYTES * 8 // bits(dtype) + 1], dtype, f"{buffer.name}_memory")
    return [tirx.AllocBuffer(memory, allocation.annotations), tirx.DeclBuffer(buffer, data=memory.data)]
