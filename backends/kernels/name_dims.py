"""Gives the symbolic sizes of a kernel's tensors names of their own.

A layer deep in a network has sizes like ``(((h - 1) // 2 + 1) - 1) // 2 + 1``. Inside of a kernel only the size counts,
not its history: written as one variable, which the shape of an argument defines, it keeps the index arithmetic
short, for the passes that simplify it and for the machine code. Kernels that differ in nothing else become equal, and
are kept once.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

_COMPOUND = (tirx.Add, tirx.Sub, tirx.Mul, tirx.FloorDiv, tirx.FloorMod, tirx.Max, tirx.Min, tirx.Select)


def name_dims(module: Any) -> Any:
    """Return ``module`` with the compound sizes of every kernel named, and equal kernels merged."""
    functions: dict[Any, Any] = {}
    kept: dict[int, list[Any]] = {}
    renamed: dict[Any, Any] = {}
    for var, function in sorted(module.functions.items(), key=lambda item: str(item[0].name_hint)):
        if not isinstance(function, tirx.PrimFunc):
            functions[var] = function
            continue
        named = _named(function)
        equal = kept.setdefault(tvm_ffi.structural_hash(named), [])
        twin = next((v for v in equal if tvm_ffi.structural_equal(functions[v], named)), None)
        if twin is None:
            functions[var] = named
            equal.append(var)
        else:
            renamed[var] = twin
    if renamed:
        callback = [(tvm.ir.GlobalVar, lambda v: renamed.get(v, v))]
        for var, function in functions.items():
            if not isinstance(function, tirx.PrimFunc):
                functions[var] = tvm_ffi.structural_map(function, callback)
    return tvm.IRModule(functions, attrs=module.attrs)


def _named(function: Any) -> Any:
    dims = _compound_dims(function)
    if not dims:
        return function
    symbols = {v for dim, _ in dims for v in tirx.analysis.undefined_vars(dim)}
    analyzer = tvm.sym.Analyzer()

    def shorten(expression: Any) -> Any:
        """Replace a size, or a size plus a number; what contains loop variables is looked at part by part."""
        used = tirx.analysis.undefined_vars(expression)
        if not used or any(v not in symbols for v in used):
            return expression
        if str(expression.ty.dtype) != "int64":
            return expression
        near = expression
        for dim, name in dims:
            difference = analyzer.simplify(expression - dim)
            if isinstance(difference, tirx.IntImm):
                if int(difference) == 0:
                    return name
                near = name + difference
        return near

    return tvm_ffi.structural_map(function, [(kind, shorten) for kind in _COMPOUND], order="pre")


def _compound_dims(function: Any) -> list[tuple[Any, Any]]:
    """Return the distinct sizes of the arguments that are expressions, each with a new variable."""
    dims: list[tuple[Any, Any]] = []
    analyzer = tvm.sym.Analyzer()
    for parameter in function.params:
        for dim in getattr(parameter.ty, "shape", ()):
            named = isinstance(dim, _COMPOUND)
            if named and not any(analyzer.can_prove_equal(dim, other) for other, _ in dims):
                dims.append((dim, tirx.Var(f"size_{len(dims)}", "int64")))
    return dims
