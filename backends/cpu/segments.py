"""Straight runs of kernels become one function that calls them directly.

Relax's virtual machine spends about a microsecond on each kernel: it computes shapes, allocates a tensor, packs
arguments, and the kernel checks them. Here every run of kernels between two decisions of the machine (a branch, a
check, a value read as a size) becomes one function: it computes the sizes, takes one block of memory for all tensors
that nobody else sees, and calls the kernels as plain functions of pointers and sizes.

Every Relax function gets one more parameter, ``clock``: an int64 tensor with two elements for each call of a kernel,
its nanoseconds and how often it ran, which the calls add to. Without elements nothing is measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm import relax

from optc.backends.cpu.segment_code import Kernels, Step, segment_function

_CLOCK = relax.TensorType(ndim=1, dtype="int64")


@dataclass
class _Segment:
    """Bindings of one run in the making."""

    bindings: list[Any] = field(default_factory=list)
    members: set[Any] = field(default_factory=set)

    def add(self, binding: Any) -> None:
        self.bindings.append(binding)
        self.members.add(binding.var)


@dataclass(frozen=True)
class Outlined:
    """A module whose kernels are called from segments.

    ``calls`` are the kernels of all calls in the order of the clock. ``blocks`` are the bytes that each segment takes
    for tensors, ``least`` the bytes that it would take at least; None where sizes are symbolic.
    """

    module: Any
    calls: list[str]
    blocks: list[int | None]
    least: list[int | None]


def outline(module: Any) -> Outlined:
    """Return a scheduled Relax module without dataflow blocks with its kernels called from one function per run."""
    outliner = _Outliner(module)
    functions: dict[Any, Any] = {}
    for var, function in module.functions.items():
        if isinstance(function, relax.Function):
            functions[outliner.renamed[var]] = outliner.function(function, str(var.name_hint))
    functions |= outliner.segments | outliner.kernels.direct
    outlined = tvm.IRModule(functions, attrs=module.attrs)
    return Outlined(relax.transform.Normalize()(outlined), outliner.calls, outliner.blocks, outliner.least)


class _Outliner:
    def __init__(self, module: Any) -> None:
        self.kernels = Kernels(module)
        self.segments: dict[Any, Any] = {}
        self.blocks: list[int | None] = []
        self.least: list[int | None] = []
        self.calls: list[str] = []
        self.name = ""
        self.clock: Any = None
        self.renamed: dict[Any, Any] = {}
        for var, function in module.functions.items():
            if isinstance(function, relax.Function):
                params = [p.ty for p in function.params] + [_CLOCK]
                self.renamed[var] = tvm.ir.GlobalVar(str(var.name_hint))
                kind = relax.FuncType(params, function.ret_ty, function.is_pure)
                relax.expr._update_type(self.renamed[var], kind)

    def function(self, function: Any, name: str) -> Any:
        """Return a Relax function with its runs of kernels replaced."""
        self.name = name
        self.clock = relax.Var("clock", _CLOCK)
        body = self._sequence(function.body)
        params = [*function.params, self.clock]
        return relax.Function(params, body, function.ret_ty, function.is_pure, function.attrs)

    def _sequence(self, sequence: Any) -> Any:
        bindings = [binding for block in sequence.blocks for binding in block.bindings]
        last_use: dict[Any, int] = {}
        for i, binding in enumerate(bindings):
            for var in _used(binding):
                last_use[var] = i
        for var in relax.analysis.free_vars(sequence.body):
            last_use[var] = len(bindings)
        result: list[Any] = []
        segment = _Segment()
        for i, binding in enumerate(bindings):
            if _belongs(binding, segment):
                segment.add(binding)
                continue
            result += self._close(segment, last_use, i)
            segment = _Segment()
            result.append(self._other(binding))
        result += self._close(segment, last_use, len(bindings))
        return relax.SeqExpr([relax.BindingBlock(result)], sequence.body)

    def _other(self, binding: Any) -> Any:
        """Return a binding that is no kernel; runs inside of a branch are replaced, functions get the clock."""
        if not isinstance(binding, relax.VarBinding):
            return binding
        value = binding.value
        if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar):
            arguments = [*value.args, self.clock]
            return relax.VarBinding(binding.var, relax.Call(self.renamed[value.op], arguments, value.attrs))
        if not isinstance(value, relax.If):
            return binding
        branch = binding.value
        branches = (self._sequence(branch.true_branch), self._sequence(branch.false_branch))
        return relax.VarBinding(binding.var, relax.If(branch.cond, *branches))

    def _close(self, segment: _Segment, last_use: dict[Any, int], end: int) -> list[Any]:
        """Return the bindings that replace a run; ``end`` is the number of the first binding behind it."""
        steps, roots = _steps(segment.bindings)
        wanted = {b.var for b in segment.bindings if last_use.get(b.var, -1) >= end}
        views: list[Any] = []
        for binding in reversed(segment.bindings):
            if binding.var not in wanted or _is_tensor_of_kernel(binding):
                continue
            # A view that is seen outside stays there, and what it shows is seen outside too.
            view = _view(binding, roots)
            views.insert(0, view)
            wanted |= {var for var in _used(view) if var in roots}
        outputs = [tensor for step in steps for tensor in step.outputs if tensor in wanted]
        if not steps:
            return views
        code = segment_function(steps, outputs, self.kernels, len(self.calls))
        self.calls += [str(step.kernel.name_hint) for step in steps]
        variable = tvm.ir.GlobalVar(f"{self.name}_segment{len(self.segments)}")
        relax.expr._update_type(variable, code.function.ty)
        self.segments[variable] = code.function
        self.blocks.append(code.block_bytes)
        self.least.append(code.least_bytes)
        types = [var.ty for var in outputs]
        arguments = [*code.inputs, self.clock, *code.scalars]
        call = relax.call_tir(variable, arguments, types if len(types) > 1 else types[0])
        if len(outputs) == 1:
            return [relax.VarBinding(outputs[0], call), *views]
        every = relax.Var("results", relax.TupleType(types))
        items = [relax.VarBinding(var, relax.TupleGetItem(every, i)) for i, var in enumerate(outputs)]
        return [relax.VarBinding(every, call), *items, *views]


def _used(binding: Any) -> list[Any]:
    return list(relax.analysis.free_vars(binding.value))


def _calls(binding: Any, name: str) -> bool:
    value = getattr(binding, "value", None)
    return isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op) and value.op.name == name


def _belongs(binding: Any, segment: _Segment) -> bool:
    """Tell whether a binding can be part of a run: a kernel, or another view of a tensor."""
    if not isinstance(binding, relax.VarBinding):
        return False
    if _calls(binding, "relax.call_tir"):
        return True
    if _calls(binding, "relax.reshape"):
        return isinstance(binding.value.args[1], relax.ShapeExpr)
    value = binding.value
    return isinstance(value, relax.TupleGetItem) and value.tuple_value in segment.members


def _is_tensor_of_kernel(binding: Any) -> bool:
    return _calls(binding, "relax.call_tir") and isinstance(binding.var.ty, relax.TensorType)


def _steps(bindings: list[Any]) -> tuple[list[Step], dict[Any, Any]]:
    """Return the kernel calls of a run, and what each of its variables shows: a tensor, or a list of tensors."""
    steps: list[Step] = []
    roots: dict[Any, Any] = {}

    def root(expression: Any) -> Any:
        return roots.get(expression, expression)

    for binding in bindings:
        var, value = binding.var, binding.value
        if _calls(binding, "relax.reshape"):
            roots[var] = root(value.args[0])
        elif isinstance(value, relax.TupleGetItem):
            roots[var] = roots[value.tuple_value][value.index]
        else:
            single = isinstance(var.ty, relax.TensorType)
            outputs = [var] if single else [relax.Var(f"{var.name}_{i}", t) for i, t in enumerate(var.ty.fields)]
            roots[var] = var if single else outputs
            for output in outputs:
                roots[output] = output
            arguments = [*value.args[1].fields, *outputs]
            steps.append(Step(value.args[0], arguments, [root(a) for a in arguments], outputs))
    return steps, roots


def _view(binding: Any, roots: dict[Any, Any]) -> Any:
    """Return the binding that makes a view outside of the run."""
    if _calls(binding, "relax.reshape"):
        return binding
    shown = roots[binding.var]
    return relax.VarBinding(binding.var, relax.Tuple(shown) if isinstance(shown, list) else shown)
