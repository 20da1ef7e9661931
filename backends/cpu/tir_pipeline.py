"""TVM's pipeline from TIR to LLVM for kernels, and a short one for the functions that call them."""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.s_tir.pipeline import default_s_tir_pipeline
from tvm.tirx.compilation_pipeline import register_tir_pipeline
from tvm.tirx.stmt import Return

from optc.backends.cpu import scratch, tasks
from optc.backends.kernels import loops

DIRECT = "calling_conv"
"""Attribute of kernels that are called directly: TVM gives no packed interface to functions that have one.

They are visible outside, although nobody calls them there, because LLVM takes long over the function it gets when it
inlines all kernels into their only caller, and because a profiler shows their names.
"""
SEGMENT = "optc.segment"
"""Attribute of the functions that call kernels directly. They are straight code: most passes have no work there, but
take seconds to find that out."""
NAME = "optc"


def _pipeline() -> tuple[Any, Any, Any]:
    lower, finish_host, finish_device = default_s_tir_pipeline()
    transform = tirx.transform
    straight = tvm.transform.Sequential(
        [
            transform.FlattenBuffer(),
            transform.StmtSimplify(),
            transform.MakePackedAPI(),
            transform.FP8StorageLegalize(),
            transform.BF16StorageLegalize(),
        ]
    )

    @tvm.transform.module_pass(opt_level=0, name="LowerKernelsAndSegments")  # type: ignore[untyped-decorator]
    def both(module: Any, _context: Any) -> Any:
        kernels = tasks.split(_hoist_bindings(transform.Filter(lambda f: not _has(f, SEGMENT))(module)))
        separate = transform.Filter(lambda f: _has(f, loops.SEPARATE))(kernels)
        kernels = lower(transform.Filter(lambda f: not _has(f, loops.SEPARATE))(kernels))
        with _without_sharing():
            kernels.update(lower(separate))
        kernels.update(straight(transform.Filter(lambda f: _has(f, SEGMENT))(module)))
        return kernels

    return both, lambda: tvm.transform.Sequential([_place_scratch, finish_host(), _return_status]), finish_device


def _without_sharing() -> Any:
    """Return the pass context in force, but for the pass that has scratch buffers share memory."""
    now = tvm.transform.PassContext.current()
    config = {**now.config, "tirx.disable_storage_rewrite": True}
    return tvm.transform.PassContext(now.opt_level, now.required_pass, now.disabled_pass, now.instruments, config)


def _has(function: Any, attribute: str) -> bool:
    return bool((function.attrs or {}).get(attribute))


@tvm.transform.module_pass(opt_level=0, name="HoistBindings")  # type: ignore[untyped-decorator]
def _hoist_bindings(module: Any, _context: Any) -> Any:
    """Bind what a stored value binds around all of it (``loops.hoisted`` says why)."""

    def store(old: Any) -> Any:
        value = loops.hoisted(old.value)
        return old if value.same_as(old.value) else tirx.BufferStore(old.buffer, value, old.indices)

    for var, function in module.functions.items():
        if isinstance(function, tirx.PrimFunc) and loops.collect(function.body, tirx.Let):
            body = tvm_ffi.structural_map(function.body, [(tirx.BufferStore, store)], order="post")
            module.update_func(var, function.with_body(body))
    return module


@tvm.transform.module_pass(opt_level=0, name="PlaceScratch")  # type: ignore[untyped-decorator]
def _place_scratch(module: Any, _context: Any) -> Any:
    for var, function in module.functions.items():
        if isinstance(function, tirx.PrimFunc):
            placed = scratch.keep_off_the_stack(function)
            module.update_func(var, scratch.allocate_directly(placed) if _has(function, DIRECT) else placed)
    return module


@tvm.transform.module_pass(opt_level=0, name="ReturnStatus")  # type: ignore[untyped-decorator]
def _return_status(module: Any, _context: Any) -> Any:
    """Have direct functions return 0; only here, because what releases their scratch buffers comes last before."""
    done = Return(tirx.IntImm("int32", 0))
    for var, function in module.functions.items():
        if isinstance(function, tirx.PrimFunc) and _has(function, DIRECT):
            module.update_func(var, function.with_body(tirx.SeqStmt([function.body, done])))
    return module


register_tir_pipeline(NAME, _pipeline)
