"""Kernels whose sizes decide whether threads pay: the body of each parallel loop becomes a function of its own.

    if cycles of these sizes >= what threads cost:   for task, in parallel:  body(task, ...)
    else:                                            for task:               body(task, ...)

So the body is compiled once.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import PointerType, PrimType

from optc.backends.kernels import loops
from optc.backends.kernels.threads import CYCLES, LEAST_CYCLES, is_parallel

_LOWER = tvm.transform.Sequential(
    [
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.CompactBufferAllocation(),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.LowerOpaqueBlock(),
    ]
)


def split(module: Any) -> Any:
    """Return a module of kernels (with ``CYCLES`` where sizes decide) with the bodies of their tasks as functions."""
    functions = dict(module.functions.items())
    for var, function in module.functions.items():
        needed = (function.attrs or {}).get(CYCLES)
        if needed is None:
            continue
        kernel = function.without_attr(CYCLES)
        if loops.collect(kernel.body, s_tir.SBlock):
            kernel = _LOWER(tvm.IRModule({var: kernel}, attrs=module.attrs))[var]
        functions |= _Splitter(kernel, str(var.name_hint), needed >= loops.index(LEAST_CYCLES)).split(var)
    return tvm.IRModule(functions, attrs=module.attrs)


class _Splitter:
    def __init__(self, function: Any, name: str, worth: Any) -> None:
        self.function, self.name, self.worth = function, name, worth
        inside = {v for loop in loops.collect(function.body, tirx.For) if is_parallel(loop) for v in _defined(loop)}
        outside = {v: value for v, value in _defined(function.body).items() if v not in inside}
        self.tensors = [v for v in outside if isinstance(v.ty, tirx.buffer.BufferType)]
        scalars = [p for p in function.params if not isinstance(p.ty, PointerType)]
        # TVM may give other numbers fewer bits than a function's parameter has.
        self.numbers = scalars + [v for v, value in outside.items() if isinstance(value, tvm.ir.TensorLoad)]
        self.mixed = _touched_outside(function.body)
        self.others = (set(outside) | set(function.params)) - set(self.numbers) - set(self.tensors)
        self.tasks: dict[Any, Any] = {}

    def split(self, var: Any) -> dict[Any, Any]:
        """Return the function and those of its tasks by name."""
        body = tvm_ffi.structural_map(self.function.body, [(tirx.For, self._loop)], order="post")
        return {var: self.function.with_body(body), **self.tasks}

    def _loop(self, loop: Any) -> Any:
        if not is_parallel(loop):
            return loop
        used = set(loops.collect(loop.body, tvm.ir.Var))
        tensors = [v for v in self.tensors if v in used]
        shapes = {v for t in tensors for d in t.ty.shape for v in loops.collect(d, tvm.ir.Var)}
        scalars = [v for v in self.numbers if v in used | shapes]
        # TVM tells LLVM that what a function allocates is apart from what another is given: LLVM would lose data that
        # a task shares with the statements around its loop.
        if any(t in self.mixed for t in tensors):
            return loop
        # What checks say would be lost.
        if loops.collect(loop.body, tirx.AssertStmt) or used & self.others or loops.static(loop.min) != 0:
            return loop
        pointers = [tirx.Var(f"{t.name}_data", PointerType(PrimType(str(t.ty.dtype)))) for t in tensors]
        views = [tirx.DeclBuffer(t, data=pointer) for t, pointer in zip(tensors, pointers, strict=True)]
        wide = str(loop.loop_var.ty)
        params = [loop.loop_var, *pointers, *scalars]
        task = tirx.PrimFunc(params, loops.sequence(*views, loop.body), PrimType("int32"), self.function.attrs)
        name = tvm.ir.GlobalVar(f"{self.name}_task{len(self.tasks)}")
        self.tasks[name] = task.with_attr("global_symbol", name.name_hint).without_attr("tirx.noalias")

        def over(kind: Any) -> Any:
            i = tirx.Var("task", "int32")
            arguments = [tirx.Cast(wide, i), *(t.data for t in tensors), *scalars]
            call = tvm.ir.Call(name, arguments, ret_ty=PrimType("int32"))
            status = tirx.Var("status", "int32")
            # Scratch memory is all that a task can fail to get.
            whole = loops.check(tirx.EQ(status, 0), "RuntimeError", "out of memory")
            return tirx.For(i, 0, loop.extent.astype("int32"), kind, loops.sequence(tirx.Bind(status, call), whole))

        return tirx.IfThenElse(self.worth, over(tirx.ForKind.PARALLEL), over(tirx.ForKind.SERIAL))


def _touched_outside(body: Any) -> set[Any]:
    """Return the allocated buffers that are read or written outside of parallel loops."""
    skip = [(tirx.For, lambda loop: tirx.Evaluate(0) if is_parallel(loop) else loop)]
    outside = tvm_ffi.structural_map(body, skip, order="post")
    touched = {x.source for x in loops.collect(outside, tvm.ir.TensorLoad)}
    touched |= {statement.buffer for statement in loops.collect(outside, tirx.BufferStore)}
    return touched & {statement.buffer for statement in loops.collect(body, tirx.AllocBuffer)}


def _defined(body: Any) -> dict[Any, Any]:
    """Return the variables that statements define with their values, None for buffers."""
    views = [*loops.collect(body, tirx.DeclBuffer), *loops.collect(body, tirx.AllocBuffer)]
    numbers = {statement.var: statement.value for statement in loops.collect(body, tirx.Bind)}
    return dict.fromkeys((statement.buffer for statement in views), None) | numbers
