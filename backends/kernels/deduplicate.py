"""Merges kernels that differ in nothing but constants: these become parameters, and the code is generated once.

Layers of a quantized network have scales and zero points of their own, which are constants of their kernels. Merged,
a kernel takes those that differ as integers, floats by their bits:

    relu(x * 0.02), relu(x * 0.07)  =>  one kernel(x, p):  scale = reinterpret<float32>(int32(p)); relu(x * scale)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax, tirx

from optc.backends.kernels import loops

_MOST = 16
"""Parameters of a merged kernel at most."""
_INTEGERS = ("int8", "uint8", "int16", "uint16")
"""What indices and lanes are not."""
_FLOATS = {"float16": ("uint16", np.uint16), "float32": ("int32", np.int32), "float64": ("int64", np.int64)}
_ARITHMETIC = (tirx.Add, tirx.Sub, tirx.Mul, tirx.Max, tirx.Min)


def deduplicate(module: Any) -> Any:
    """Return a module of scheduled kernels with those merged that differ in constants alone."""
    functions = dict(module.functions.items())
    mains = [f for f in functions.values() if isinstance(f, relax.Function)]
    inputs = {
        call.args[0]: len(call.args[1].fields) for f in mains for call in loops.collect(f, relax.Call) if _runs(call)
    }
    merged: dict[Any, tuple[Any, list[int]]] = {}
    for group in _groups({v: functions[v] for v in sorted(inputs, key=lambda v: str(v.name_hint))}):
        columns = group.columns()
        if len(group.members) == 1 or len(columns) > _MOST:
            continue
        first = group.members[0][0]
        for i, (var, _) in enumerate(group.members):
            merged[var] = first, [column[i] for column in columns]
            if var is not first:
                del functions[var]
        functions[first] = _parametrized(functions[first], inputs[first], columns, group.positions())

    def call_merged(call: Any) -> Any:
        if not (_runs(call) and call.args[0] in merged):
            return call
        kernel, values = merged[call.args[0]]
        operands = relax.Tuple([*call.args[1].fields, *(tirx.IntImm("int64", v) for v in values)])
        return relax.Call(call.op, [kernel, operands, *call.args[2:]], call.attrs, call.ty_args, ret_ty=call.ty)

    for var, function in functions.items():
        if isinstance(function, relax.Function):
            functions[var] = tvm_ffi.structural_map(function, [(relax.Call, call_merged)])
    return tvm.IRModule(functions, attrs=module.attrs)


def _runs(call: Any) -> bool:
    return isinstance(call.op, tvm.ir.Op) and call.op.name == "relax.call_tir"


class _Group:
    """Kernels of equal ``skeleton``, which has 0 for every constant."""

    def __init__(self, skeleton: Any) -> None:
        self.skeleton = skeleton
        self.members: list[tuple[Any, list[int]]] = []

    def positions(self) -> list[tuple[int, ...]]:
        """Return for each constant its value in each kernel."""
        return list(zip(*(values for _, values in self.members), strict=True))

    def columns(self) -> list[tuple[int, ...]]:
        """Return the different ones that are not the same in all kernels."""
        return list(dict.fromkeys(column for column in self.positions() if len(set(column)) > 1))


def _groups(kernels: Mapping[Any, Any]) -> list[_Group]:
    groups: dict[int, list[_Group]] = {}
    for var, function in kernels.items():
        values: list[int] = []

        def blank(constant: Any, values: list[int] = values) -> Any:
            values.append(_bits(constant))
            return tirx.const(0, str(constant.ty.dtype))

        skeleton = _map(function, blank)
        known = groups.setdefault(tvm_ffi.structural_hash(skeleton), [])
        group = next((g for g in known if tvm_ffi.structural_equal(g.skeleton, skeleton)), None)
        if group is None:
            group = _Group(skeleton)
            known.append(group)
        group.members.append((var, values))
    return [group for some in groups.values() for group in some]


def _parametrized(
    function: Any, inputs: int, columns: Sequence[tuple[int, ...]], positions: Sequence[tuple[int, ...]]
) -> Any:
    """Return ``function`` with parameters for ``columns`` behind its inputs."""
    params = [tirx.Var(f"constant{i}", "int64") for i in range(len(columns))]
    known = dict(zip(columns, params, strict=True))
    order = iter(positions)

    def read(constant: Any) -> Any:
        param = known.get(next(order))
        return constant if param is None else _from_bits(param, str(constant.ty.dtype))

    result = _map(function, read)
    params = [*result.params[:inputs], *params, *result.params[inputs:]]
    return tirx.PrimFunc(params, result.body, result.ret_type, result.attrs)


def _map(function: Any, change: Callable[[Any], Any]) -> Any:
    """Return ``function`` with ``change`` done to each constant that is a value, in a fixed order."""

    def small(constant: Any) -> Any:
        return change(constant) if str(constant.ty.dtype) in _INTEGERS else constant

    def floating(constant: Any) -> Any:
        return change(constant) if str(constant.ty.dtype) in _FLOATS else constant

    def arithmetic(node: Any) -> Any:
        """Integers of 32 bits may be lanes too, but not where they are added or multiplied."""
        if str(node.ty.dtype) != "int32":
            return node
        a, b = (change(x) if isinstance(x, tirx.IntImm) else x for x in (node.a, node.b))
        return type(node)(a, b)

    callbacks = [(tirx.IntImm, small), (tirx.FloatImm, floating), (_ARITHMETIC, arithmetic)]
    return function.with_body(tvm_ffi.structural_map(function.body, callbacks))


def _bits(constant: Any) -> int:
    if isinstance(constant, tirx.IntImm):
        return int(constant.value)
    dtype = str(constant.ty.dtype)
    return int(np.array(constant.value, dtype).view(_FLOATS[dtype][1]))


def _from_bits(param: Any, dtype: str) -> Any:
    if dtype not in _FLOATS:
        return tirx.Cast(dtype, param)
    return tirx.reinterpret(dtype, tirx.Cast(_FLOATS[dtype][0], param))
