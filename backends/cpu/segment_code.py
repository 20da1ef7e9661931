"""The function that runs a straight run of kernels: sizes, one block of memory, direct calls.

    for each size that is an expression:   sizes[i] = expression
    for each tensor between the kernels:   places[i] = where it starts in the block
    for each kernel:                       kernel(pointers, sizes)
                                           clock[...] += what it took, if there is a clock

A kernel becomes a plain function of pointers to its tensors, its scalars, and the sizes in its tensors' shapes, and
returns a status as C functions do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.ir import PointerType, PrimType

from optc.backends.cpu import arena
from optc.backends.cpu.clock import Clock
from optc.backends.cpu.tir_pipeline import DIRECT, SEGMENT
from optc.backends.kernels import loops
from optc.backends.kernels.fused import bits
from optc.backends.lowering.emit import shape_of

ALIGNMENT = 64
"""Bytes; a cache line, and a register of AVX-512."""
_TYPICAL = 256
"""What a symbolic size is taken for where tensors are compared."""


@dataclass(frozen=True)
class Step:
    """One call of a kernel. ``roots`` are the tensors whose memory the ``arguments`` (outputs last) lie in."""

    kernel: Any
    arguments: list[Any]
    roots: list[Any]
    outputs: list[Any]


@dataclass(frozen=True)
class Code:
    """A segment's function of ``inputs``, ``scalars`` and outputs.

    The bytes of its block of memory, and the least that any block can have, are None if sizes are symbolic.
    """

    function: Any
    inputs: list[Any]
    scalars: list[Any]
    block_bytes: int | None
    least_bytes: int | None


class Kernels:
    """The kernels of a module as plain functions."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.direct: dict[Any, Any] = {}
        self._known: dict[Any, tuple[Any, list[Any], list[Any]]] = {}

    def get(self, variable: Any) -> tuple[Any, list[Any], list[Any]]:
        """Return a kernel's direct name, its parameters, and the sizes that it takes after them."""
        if variable not in self._known:
            function = self.module[variable]
            tensors = [p for p in function.params if _is_tensor(p)]
            given = [p for p in function.params if not _is_tensor(p)]
            sizes = list(dict.fromkeys(d for t in tensors for d in t.ty.shape if isinstance(d, tvm.ir.Var)))
            sizes = [size for size in sizes if size not in given]
            pointers = {t: tirx.Var(f"{t.name}_data", PointerType(PrimType(str(t.ty.dtype)))) for t in tensors}
            views = [tirx.DeclBuffer(tensor, data=pointer) for tensor, pointer in pointers.items()]
            body = loops.sequence(*views, function.body)
            params = [*(pointers.get(p, p) for p in function.params), *sizes]
            direct = tirx.PrimFunc(params, body, PrimType("int32"), function.attrs)
            # A suffix, because a kernel called "exp" must not stand in for the C library's.
            name = tvm.ir.GlobalVar(f"{variable.name_hint}_kernel")
            self.direct[name] = direct.with_attr({"global_symbol": name.name_hint, DIRECT: 1})
            self._known[variable] = (name, list(function.params), sizes)
        return self._known[variable]


def _is_tensor(parameter: Any) -> bool:
    return isinstance(parameter.ty, tirx.buffer.BufferType)


def segment_function(steps: Sequence[Step], outputs: Sequence[Any], kernels: Kernels, first: int) -> Code:
    """Write the function that makes ``steps``, whose calls are number ``first`` and on of the model.

    ``outputs`` are the tensors that are seen outside. Its parameters: inputs, clock, scalars, outputs.
    """
    return _Writer(steps, outputs, kernels).code(first)


class _Writer:
    def __init__(self, steps: Sequence[Step], outputs: Sequence[Any], kernels: Kernels) -> None:
        self.steps, self.outputs, self.kernels = steps, outputs, kernels
        self.analyzer = tvm.sym.Analyzer()
        self.symbols: dict[Any, Any] = {}
        self.sizes: list[tuple[Any, Any]] = []
        self.statements: list[Any] = []
        made = {tensor for step in steps for tensor in step.outputs}
        found = [a for step in steps for a in step.roots if not tvm.ir.is_prim_expr(a) and a not in made]
        self.inputs = list(dict.fromkeys(found))
        self.inner = [t for step in steps for t in step.outputs if t not in set(outputs)]

    def code(self, first: int) -> Code:
        """Return the function."""
        buffers = {t: self._parameter(t, f"input{i}") for i, t in enumerate(self.inputs)}
        bound = {d for b in buffers.values() for d in b.ty.shape if isinstance(d, tvm.ir.Var)}
        buffers |= {t: self._parameter(t, f"output{i}") for i, t in enumerate(self.outputs)}
        pointers: dict[Any, Any] = {t: b.data for t, b in buffers.items()}
        calls = self._calls()
        places, total, least = self._places()
        block = tirx.Var("block", PointerType(PrimType("uint8")))
        for tensor, place in places.items():
            pointers[tensor] = tirx.handle_add_byte_offset(block, loops.index(place))
        take, release = _block(block, total) if places else ([], None)
        clock = Clock()
        body = clock.start()
        for n, (name, arguments, message) in enumerate(calls):
            status = tirx.Var(f"status{n}", "int32")
            values = [pointers.get(a, a) for a in arguments]
            call = tvm.ir.Call(name, values, ret_ty=PrimType("int32"))
            body += [tirx.Bind(status, call), _leave_if(status, release, message), clock.add(first + n)]
        if places:
            body = [*take, *body, release]
        scalars = [outer for outer, own in self.symbols.items() if own not in bound]
        params = [*(buffers[t] for t in self.inputs), clock.times] + [self.symbols[s] for s in scalars]
        params += [buffers[t] for t in self.outputs]
        function = tirx.PrimFunc(params, loops.sequence(*self._bindings(), *self.statements, *body))
        planned = (total, least) if isinstance(total, int) else (None, None)
        return Code(function.with_attr(SEGMENT, True), self.inputs, scalars, *planned)

    def _own(self, expression: Any) -> Any:
        """Return a size in the variables of the segment's function."""
        if isinstance(expression, int):
            return expression
        for symbol in tirx.analysis.undefined_vars(expression):
            self.symbols.setdefault(symbol, tirx.Var(str(symbol.name), "int64"))
        return loops.plain(loops.replace(expression, self.symbols))

    def _size(self, expression: Any) -> Any:
        """Return a number or a variable for a size."""
        value = self._own(expression)
        if isinstance(value, int | tvm.ir.Var):
            return value
        for variable, known in self.sizes:
            if tvm_ffi.structural_equal(known, value):
                return variable
        self.sizes.append((tirx.Var(f"size{len(self.sizes)}", "int64"), value))
        return self.sizes[-1][0]

    def _bindings(self) -> list[Any]:
        """Bind the sizes to what is read from memory, where TVM's simplifier does not see the expressions."""
        if not self.sizes:
            return []
        memory, allocate = loops.scratch("sizes", len(self.sizes), "int64")
        result = [allocate]
        for i, (variable, value) in enumerate(self.sizes):
            result += [loops.store(memory, i, value), tirx.Bind(variable, loops.load(memory, i))]
        return result

    def _parameter(self, tensor: Any, name: str) -> Any:
        """Return the buffer of a tensor from outside, which may lie at any multiple of its elements' size."""
        dims = [d if isinstance(d, int) else self._own(d) for d in shape_of(tensor)]
        # A size that is an expression is not checked again.
        shape = [
            loops.index(d) if isinstance(d, int | tvm.ir.Var) else tirx.Var(f"{name}_{i}", "int64")
            for i, d in enumerate(dims)
        ]
        dtype = str(tensor.ty.dtype)
        return tirx.decl_buffer(shape, dtype, name, data_alignment=max(1, bits(dtype) // 8))

    def _calls(self) -> list[tuple[Any, list[Any], str]]:
        """Return each step's direct function, arguments (tensors, expressions of sizes) and message of failure."""
        result = []
        for step in self.steps:
            name, parameters, sizes = self.kernels.get(step.kernel)
            known: dict[Any, Any] = {}
            arguments = []
            for parameter, argument, root in zip(parameters, step.arguments, step.roots, strict=True):
                if not _is_tensor(parameter):
                    arguments.append(loops.index(self._size(argument)))
                    continue
                arguments.append(root)
                for own, given in zip(parameter.ty.shape, shape_of(argument), strict=True):
                    if isinstance(own, tvm.ir.Var) and own not in known:
                        known[own] = self._size(given)
            message = _failure(self.kernels.module[step.kernel], str(step.kernel.name_hint))
            result.append((name, arguments + [loops.index(known[size]) for size in sizes], message))
        return result

    def _places(self) -> tuple[dict[Any, Any], Any, int]:
        """Return where each inner tensor starts in the block of memory, the size of the block in bytes, and the least
        that a block can have for typical sizes.
        """
        spans: dict[Any, tuple[int, int]] = {}
        for n, step in enumerate(self.steps):
            for tensor in step.roots:
                if not tvm.ir.is_prim_expr(tensor):
                    spans[tensor] = (spans.get(tensor, (n, n))[0], n)
        bytes_of = [self._bytes(t) for t in self.inner]
        lives = [arena.Life(*spans[t], self._typical(size)) for t, size in zip(self.inner, bytes_of, strict=True)]
        ends: dict[int, Any] = {}
        places: dict[Any, Any] = {}
        memory, allocate = loops.scratch("places", len(lives) + 1, "int64")
        symbolic = False

        def kept(value: Any, position: int) -> Any:
            """Keep a long expression in memory."""
            nonlocal symbolic
            if isinstance(value, int):
                return value
            symbolic = True
            self.statements.append(loops.store(memory, position, value))
            return loops.load(memory, position)

        order = arena.stack(lives)
        for position, (i, below) in enumerate(order):
            start = _highest([ends[j] for j in below])
            ends[i] = kept(start + bytes_of[i], position)
            places[self.inner[i]] = ends[i] - bytes_of[i]
        total, least = _highest([ends[i] for i in arena.top(order)]), arena.bound(lives)
        if not symbolic:
            return places, total, least
        end = tirx.Var("block_bytes", "int64")
        self.statements = [allocate, *self.statements, loops.store(memory, len(lives), total)]
        self.statements.append(tirx.Bind(end, loops.load(memory, len(lives))))
        return places, end, least

    def _bytes(self, tensor: Any) -> Any:
        """Return the size of a tensor in bytes, rounded up to the alignment."""
        width = -(-bits(str(tensor.ty.dtype)) // 8)
        total = loops.product([self._size(d) for d in shape_of(tensor)]) * width
        return loops.ceildiv(total, ALIGNMENT) * ALIGNMENT

    def _typical(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        values = {variable: loops.index(_TYPICAL) for variable in self.symbols.values()}
        expression = size
        for variable, value in reversed(self.sizes):
            expression = loops.replace(expression, {variable: value})
        number = loops.static(self.analyzer.simplify(loops.replace(expression, values)))
        return ALIGNMENT if number is None else max(ALIGNMENT, number)


def _highest(ends: Sequence[Any]) -> Any:
    """Return the maximum of byte positions, 0 for none."""
    highest: Any = max([end for end in ends if isinstance(end, int)], default=0)
    for end in ends:
        if not isinstance(end, int):
            highest = end if isinstance(highest, int) and highest == 0 else tirx.max(loops.index(highest), end)
    return highest


def _block(block: Any, size: Any) -> tuple[list[Any], Any]:
    """Return the statements that allocate the block, and the one that releases it.

    TVM's workspace belongs to the thread and keeps its memory from run to run. Called by name, because TVM would move
    an AllocBuffer to the start of the function, where the size is not known yet.
    """
    cpu, device = tirx.IntImm("int32", 1), tirx.IntImm("int32", 0)
    code, width = tirx.IntImm("int32", 1), tirx.IntImm("int32", 8)
    bytes_ = loops.index(size).astype("uint64")
    take = tirx.call_extern(block.ty, "TVMBackendAllocWorkspace", cpu, device, bytes_, code, width)
    release = tirx.call_extern("int32", "TVMBackendFreeWorkspace", cpu, device, block)
    taken = loops.check(tirx.Not(tirx.isnullptr(block)), "RuntimeError", "out of memory")
    return [tirx.Bind(block, take), taken], tirx.Evaluate(release)


def _leave_if(status: Any, release: Any, message: str) -> Any:
    """Leave the function if a kernel failed."""
    # TVM puts this error in the place of the kernel's own.
    leave = loops.check(tirx.EQ(status, 0), "RuntimeError", message)
    return tirx.IfThenElse(tirx.NE(status, 0), loops.sequence(release, leave), None)


def _failure(function: Any, name: str) -> str:
    """Return what to say when a kernel fails: what its own checks say."""
    parts: list[str] = []

    def add(check: Any) -> None:
        parts.append("".join(str(part.value) for part in check.message_parts))

    tvm_ffi.structural_walk(function.body, (tirx.AssertStmt, add))
    return " or ".join(dict.fromkeys(parts)) or f"kernel {name} failed"
