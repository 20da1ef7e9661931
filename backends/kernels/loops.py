"""Small constructors for loop nests in TIR, and substitution in expressions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

_KINDS = {"serial": 0, "parallel": 1, "vectorized": 2, "unrolled": 3}


def index(value: Any) -> Any:
    """Return ``value`` as an int64 expression."""
    return tirx.IntImm("int64", value) if isinstance(value, int) else value


def static(value: Any) -> int | None:
    """Return the number that ``value`` is, None for a symbolic expression."""
    if isinstance(value, tirx.IntImm):
        return int(value)
    return value if isinstance(value, int) else None


def plain(value: Any) -> Any:
    """Return a Python int for a constant, else the expression."""
    number = static(value)
    return value if number is None else number


def ceildiv(a: Any, b: int) -> Any:
    """Return ``a / b`` rounded up, for a >= 0 and a positive constant b."""
    return (a + (b - 1)) // b


def smaller(a: Any, b: Any) -> Any:
    """Return the minimum of two index values."""
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    return tirx.min(index(a), index(b))


def product(values: Sequence[Any]) -> Any:
    """Return the product of index values, 1 for none."""
    total: Any = 1
    for value in values:
        total = total * plain(value)
    return total


def loop(name: str, extent: Any, body: Callable[[Any], Any], kind: str = "serial") -> Any:
    """Return ``for name in range(extent): body(name)``; a loop of one turn is just its body."""
    if static(extent) == 1 and kind != "parallel":
        return body(tirx.IntImm("int64", 0))
    variable = tirx.Var(name, "int64")
    return tirx.For(variable, index(0), index(extent), tirx.ForKind(_KINDS[kind]), body(variable))


def sequence(*statements: Any) -> Any:
    """Return the statements one after the other; None is left out."""
    kept = [s for s in statements if s is not None]
    return kept[0] if len(kept) == 1 else tirx.SeqStmt(kept)


def check(condition: Any, kind: str, message: str) -> Any:
    """Return the statement that leaves the function with an error of ``kind`` unless ``condition`` holds."""
    # The constructor of Python names its first two parameters the wrong way round.
    return tirx.AssertStmt(condition, tvm.ir.StringImm(kind), [tvm.ir.StringImm(message)])


def collect(node: Any, kind: Any) -> list[Any]:
    """Return all nodes of a kind in a statement or expression."""
    found: list[Any] = []
    tvm_ffi.structural_walk(node, (kind, lambda part: found.append(part)))
    return found


def store(buffer: Any, position: Any, value: Any) -> Any:
    """Return ``buffer[position] = value`` for a flat buffer."""
    return tirx.BufferStore(buffer, value, [index(position)])


def load(buffer: Any, position: Any) -> Any:
    """Return ``buffer[position]`` of a flat buffer."""
    return tirx.BufferLoad(buffer, [index(position)])


SEPARATE = "optc.separate_scratch"
"""Attribute of functions whose scratch buffers do not share memory.

TVM gives buffers that are not alive at once the same place. Where one is read in vectors of 16 elements and the other
in vectors of 8, LLVM takes what should be registers apart and together again in every step.
"""


def scratch(name: str, size: Any, dtype: str) -> tuple[Any, Any]:
    """Return a flat scratch buffer and the statement that allocates it.

    TVM puts a buffer of scope "global" of less than 1 KiB on the stack, from where LLVM gets it into registers; one
    of scope "local" goes to the heap.
    """
    buffer = tirx.decl_buffer([index(size)], dtype, name, scope="global")
    return buffer, tirx.AllocBuffer(buffer)


def tile(name: str, rows: int, size: int, dtype: str) -> tuple[list[Any], list[Any]]:
    """Return a scratch buffer of ``size`` for each row of a register tile, and the statements that allocate them.

    All rows of a tile of 512-bit vectors in one buffer would be too large for the stack.
    """
    buffers, allocations = zip(*(scratch(f"{name}{i}", size, dtype) for i in range(rows)), strict=True)
    return list(buffers), list(allocations)


def unravel(flat: Any, extents: Sequence[Any]) -> list[Any]:
    """Return the row-major coordinates of ``flat`` in a box of ``extents``."""
    coordinates: list[Any] = []
    for extent in reversed(list(extents)[1:]):
        coordinates.insert(0, index(flat) % index(extent))
        flat = index(flat) // index(extent)
    return [flat, *coordinates]


def replace(expression: Any, variables: Mapping[Any, Any], on_load: Callable[[Any], Any] | None = None) -> Any:
    """Substitute variables in an expression; ``on_load`` sees every tensor load before its indices are substituted."""

    def variable(value: Any) -> Any:
        found = variables.get(value)
        return value if found is None else index(found)

    callbacks: list[Any] = [(tvm.ir.Var, variable)]
    if on_load is not None:
        callbacks.insert(0, (tvm.ir.TensorLoad, on_load))
    return tvm_ffi.structural_map(expression, callbacks, order="pre")


def hoisted(expression: Any) -> Any:
    """Return ``expression`` with the values that it binds by Let bound around all of it, each once.

    TVM vectorizes the operands of a product twice, and takes a Let in one of them for two that contradict each other.
    What is bound under a condition may be defined only there: such expressions stay as they are. So do those that bind
    within a comparison, where the Let keeps TVM from turning ``not a < b`` into ``b <= a``, which NaN tells apart.
    """
    conditions: list[Any] = []
    tvm_ffi.structural_walk(expression, (tvm.ir.Call, lambda x: conditions.append(str(x.op.name))))
    if "tirx.if_then_else" in conditions:
        return expression
    if any(str(let.ty) == "bool" for let in collect(expression, tirx.Let)):
        return expression
    bound: list[tuple[Any, Any]] = []

    def lift(let: Any) -> Any:
        # The map goes on with the operands of what it is given back.
        while isinstance(let, tirx.Let):
            fresh = tirx.Var(let.var.name, let.var.ty)
            bound.append((fresh, inside(let.value)))
            let = replace(let.body, {let.var: fresh})
        return let

    def inside(part: Any) -> Any:
        return tvm_ffi.structural_map(part, [(tirx.Let, lift)], order="pre")

    result = inside(expression)
    for variable, value in reversed(bound):
        result = tirx.Let(variable, value, result)
    return result


def uses(expression: Any, variables: Sequence[Any]) -> bool:
    """Tell whether an expression mentions one of ``variables``."""
    found: list[bool] = []
    wanted = set(variables)
    tvm_ffi.structural_walk(expression, (tvm.ir.Var, lambda v: found.append(v in wanted)))
    return any(found)


def loads(expression: Any) -> list[Any]:
    """Return the tensor loads of an expression."""
    found: list[Any] = []
    tvm_ffi.structural_walk(expression, (tvm.ir.TensorLoad, lambda x: found.append(x)))
    return found


def bind(name: str, value: Any, body: Callable[[Any], Any]) -> Any:
    """Return ``body(name)`` with ``name`` bound to ``value`` before it; numbers and variables are passed as they are.

    Addresses are built from these values, and TVM simplifies each address, with what it knows of every variable in
    it, over and over: two thirds of the time to generate code for symbolic sizes. So the value goes through memory,
    where TVM does not see it; LLVM does, and keeps it in a register.
    """
    value = index(value)
    if isinstance(value, tirx.IntImm | tvm.ir.Var):
        return body(value)
    variable = tirx.Var(name, "int64")
    memory, allocate = scratch(f"{name}_value", 1, "int64")
    return sequence(allocate, store(memory, 0, value), tirx.Bind(variable, load(memory, 0)), body(variable))
