"""Tensor expressions into Relax: one call, one PrimFunc.

``BlockBuilder.emit_te`` renames the symbolic dimensions of its arguments, so a compute that mentions a dimension
of another tensor (every Reshape, Slice or Resize does) refers to a variable that the kernel does not know. Here
the compute sees the caller's variables; those that no argument's shape defines become scalar arguments.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import tvm
from tvm import relax, s_tir, te, tirx

_OPAQUE = 8
"""The pattern of kernels that are not fused."""


def shape_of(tensor: Any) -> list[Any]:
    """Return the dimensions of a Relax expression, constants as Python ints."""
    return [plain(d) for d in tensor.ty.shape.values]


def plain(value: Any) -> Any:
    """Return a Python int for a constant integer expression, else the expression."""
    if isinstance(value, tirx.IntImm):
        return int(value)
    return value


def as_index(value: Any) -> Any:
    """Return ``value`` as an int64 expression."""
    if isinstance(value, int):
        return tirx.IntImm("int64", value)
    return value if value.ty.dtype == "int64" else value.astype("int64")


def emit(
    builder: relax.BlockBuilder,
    compute: Callable[..., Any],
    tensors: Sequence[Any],
    name: str,
    symbols: Collection[Any],
    attributes: dict[str, Any] | None = None,
) -> Any:
    """Emit ``compute(*te_tensors)`` as a kernel over ``tensors``; returns a Var, or a list of Vars for a list.

    ``symbols`` are the symbolic dimensions of the model: the only free variables a kernel may have.
    """
    holders = [
        te.placeholder([as_index(d) for d in shape_of(t)], str(t.ty.dtype), name=f"a{i}") for i, t in enumerate(tensors)
    ]
    result = compute(*holders)
    many = isinstance(result, list | tuple)
    outs = list(result) if many else [result]
    scalars = _free_symbols(te.create_prim_func([*holders, *outs], "int64"), symbols)
    # Scalars come last, as call_tir wants them, and FuseTIR keeps them there.
    function = te.create_prim_func([*holders, *scalars, *outs], "int64")
    function = _with_root(s_tir.renew_defs(function.without_attr("global_symbol")))
    for key, value in (attributes or {}).items():
        function = function.with_attr(key, value)
    if any(str(t.dtype) == "bfloat16" for t in [*holders, *outs]):
        # TVM's bfloat16 legalization loses track of intermediate bfloat16 buffers, which fusion creates.
        function = function.with_attr("op_pattern", _OPAQUE)
    types = [relax.TensorType([as_index(d) for d in out.shape], str(out.dtype)) for out in outs]
    call = relax.call_tir(
        builder.add_func(function, name), [*tensors, *scalars], types[0] if len(types) == 1 else types
    )
    var = builder.emit(call)
    if len(types) == 1:
        return [var] if many else var
    return [builder.emit(relax.TupleGetItem(var, i)) for i in range(len(types))]


def _with_root(function: Any) -> Any:
    """Give a function that is one opaque block the root block that schedules and fusion expect."""
    body = function.body
    if isinstance(body, s_tir.SBlockRealize) and body.block.name_hint != "root":
        return function.with_body(s_tir.SBlockRealize([], True, s_tir.SBlock([], [], [], "root", body)))
    return function


def _free_symbols(function: Any, symbols: Collection[Any]) -> list[Any]:
    """Return those of ``symbols`` that ``function`` uses and no buffer dimension defines, sorted by name."""
    dims = [d for parameter in function.params for d in parameter.ty.shape]
    defined = {d for d in dims if isinstance(d, tvm.ir.Var)}
    used = {v for d in dims for v in tirx.analysis.undefined_vars(d)}
    used.update(tirx.analysis.undefined_vars(function.body, list(function.params)))
    return sorted((v for v in symbols if v in used and v not in defined), key=lambda v: str(v.name))


def identifier(name: str | None) -> str:
    """Return ``name`` as one that Relax takes."""
    text = re.sub(r"\W", "_", name or "v")
    return text if re.match(r"[A-Za-z_]", text) else f"v{text}"
