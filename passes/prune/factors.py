"""How the axes before and after a reshape split and merge: both are products of the same factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as oir

from optc.ir import dims


@dataclass(frozen=True)
class Factors:
    """Indices of factors, outermost first, per axis before and after; None for an axis that is not understood.

    ``sizes`` has the size of each factor, None where it is symbolic.
    """

    before: list[list[int] | None]
    after: list[list[int] | None]
    sizes: list[int | None]


def common(before: Sequence[int | oir.SymbolicDim], after: Sequence[int | oir.SymbolicDim]) -> Factors:
    """Return the common factors of two shapes of equally many elements, found from the first axis on.

    Axes of size 1 have no factors. Where two sizes have no common factor that can be told, the rest is not understood.
    """
    result = Factors([None] * len(before), [None] * len(after), [])
    left, right = _Side(before, result.before), _Side(after, result.after)
    while left.next() and right.next():
        if left.size == right.size or _divides(left.size, right.size):
            factor = left.size
        elif _divides(right.size, left.size):
            factor = right.size
        else:
            break
        result.sizes.append(int(factor) if _is_int(factor) else None)
        left.take(factor, len(result.sizes) - 1)
        right.take(factor, len(result.sizes) - 1)
    else:
        return result
    for side in (left, right):
        side.result[side.index] = None
    return result


class _Side:
    """One of the two shapes, consumed factor by factor."""

    def __init__(self, shape: Sequence[int | oir.SymbolicDim], result: list[list[int] | None]) -> None:
        self.shape, self.result = shape, result
        self.index = -1
        self.size: Any = 1

    def next(self) -> bool:
        """Move to an axis with something left of it; tell whether there is one."""
        while self.size == 1 and self.index + 1 < len(self.shape):
            self.index += 1
            dim = self.shape[self.index]
            if not isinstance(dim, int) and dim.value is None:
                return False
            self.size = dim if isinstance(dim, int) else dims.to_expr(dim)
            self.result[self.index] = []
        return bool(self.size != 1)

    def take(self, factor: Any, index: int) -> None:
        """Divide what is left."""
        self.size = self.size // factor if _is_int(self.size) else self.size / factor
        found = self.result[self.index]
        assert found is not None
        found.append(index)


def _is_int(size: Any) -> bool:
    return isinstance(size, int) or bool(size.is_Integer)


def _divides(factor: Any, size: Any) -> bool:
    if _is_int(factor) and _is_int(size):
        return int(factor) > 0 and int(size) % int(factor) == 0
    return bool((size / factor).is_integer)
