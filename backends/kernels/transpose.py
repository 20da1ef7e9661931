"""Transposition of a square of vectors in registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from optc.backends.kernels.loops import index


def transpose(square: Any, lanes: int, target: Callable[[int], tuple[Any, Any]]) -> list[Any]:
    """Return statements that store column ``d`` of ``square`` (flat, ``lanes`` x ``lanes``) at ``target(d)``.

    ``target`` gives a buffer and a position. Blocks off the diagonal are exchanged, larger ones first (Eklundh, "A fast
    computer method for matrix transposing", 1972): ``lanes * log2(lanes)`` shuffles of two vectors.
    """
    statements: list[Any] = []

    def bind(value: Any) -> Any:
        variable = tirx.Var("row", value.ty)
        statements.append(tirx.Bind(variable, value))
        return variable

    def shuffle(a: Any, b: Any, order: list[int]) -> Any:
        return bind(tirx.Shuffle([a, b], [tirx.IntImm("int32", k) for k in order]))

    rows = [bind(tirx.BufferLoad(square, [_ramp(i * lanes, lanes)])) for i in range(lanes)]
    step = lanes // 2
    while step:
        for i in (i for i in range(lanes) if not i & step):
            a, b = rows[i], rows[i + step]
            rows[i] = shuffle(a, b, [lanes + k - step if k & step else k for k in range(lanes)])
            rows[i + step] = shuffle(a, b, [lanes + k if k & step else k + step for k in range(lanes)])
        step //= 2
    for d, row in enumerate(rows):
        buffer, position = target(d)
        statements.append(tirx.BufferStore(buffer, row, [_ramp(position, lanes)]))
    return statements


def _ramp(position: Any, lanes: int) -> Any:
    return tirx.Ramp(index(position), index(1), lanes)
