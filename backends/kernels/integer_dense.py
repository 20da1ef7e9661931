"""Strips of which many bytes are outside of their windows: products of 16 bits take the place of those of bytes.

    many = lists are long
    if many:  wide[rows, K] = int16(strip) + int16(left)          even depths of a quad, then odd ones
    ...
        if many:  acc += even depths of wide * even depths of columns + odd depths of both
        else:     acc += products of bytes, and of the lists

Columns stay quads of bytes: shifts widen their halves in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx

from optc.backends.kernels import integer_dot, loops
from optc.backends.kernels.integer_contraction import QUAD
from optc.backends.kernels.integer_dot import put, vector_at
from optc.backends.kernels.loops import load, loop, sequence, store

_SHARE = 3
"""The part of all quads, 1 / 3, from which the second loop takes longer than words do."""


class Dense:
    """The choice for a strip of ``size`` bytes, and the strip in 16 bits. ``signed`` tells whether what is left is."""

    def __init__(self, size: Any, lanes: int, signed: bool, dot: integer_dot.Dot) -> None:
        self.size, self.lanes, self.signed, self.dot = size, lanes, signed, dot
        self.wide, self._allocate_wide = loops.scratch("wide", size, "int16")
        self.listed, self._allocate_listed = loops.scratch("listed", 1, "int64")
        # Volatile: LLVM would write all that follows twice, once for each answer.
        self.many, _ = loops.scratch("many", 1, "int64")
        self._allocate_many = tirx.AllocBuffer(self.many, {"tirx.volatile": True})

    @property
    def allocations(self) -> list[Any]:
        """The statements that allocate what is here, and begin to count."""
        nothing = store(self.listed, 0, loops.index(0))
        return [self._allocate_wide, self._allocate_listed, self._allocate_many, nothing]

    def count(self, longest: Any) -> Any:
        """Return the statement that counts the longest list of a tile of rows."""
        return store(self.listed, 0, load(self.listed, 0) + longest)

    def decide(self, rows: Any, left: Any, quads: Any) -> Any:
        """Return the statement that decides, the lists of all tiles having ``quads`` entries if full."""
        many = load(self.listed, 0) * _SHARE > quads
        widened = loop("v", self.size // self.lanes, lambda v: self._widen(rows, left, v * self.lanes))
        return sequence(
            store(self.many, 0, many.astype("int64")), tirx.IfThenElse(load(self.many, 0) != 0, widened, None)
        )

    def _widen(self, rows: Any, left: Any, at: Any) -> Any:
        words = self.lanes // 2
        halves = zip(
            self._halves(vector_at(rows, at, self.lanes), False),
            self._halves(vector_at(left, at, self.lanes), self.signed),
            strict=True,
        )
        pairs = [tirx.reinterpret(f"int32x{words // 2}", inside + outside) for inside, outside in halves]
        order = [tirx.IntImm("int32", i + half * (words // 2)) for i in range(words // 2) for half in (0, 1)]
        return put(self.wide, at, self.lanes, tirx.reinterpret(f"int16x{self.lanes}", tirx.Shuffle(pairs, order)))

    def _halves(self, quads: Any, signed: bool) -> tuple[Any, Any]:
        """Return the even and the odd bytes of ``quads`` in 16 bits."""
        kind, words = "int" if signed else "uint", self.lanes // 2
        both = tirx.reinterpret(f"{kind}16x{words}", quads)
        eight = tirx.Broadcast(tirx.const(8, f"{kind}16"), words)
        even, odd = (x.astype(f"int16x{words}") for x in ((both << eight) >> eight, both >> eight))
        return even, odd

    def add(self, vectors: Sequence[tuple[Any, int, Any]], at: Any, columns: Any, quad: Any) -> Any:
        """Return the statement that adds one quad.

        ``vectors`` are (the row's sums, column, where the quad of the row begins in ``wide``); the columns of the quad
        begin at ``quad`` of ``columns``; ``at`` is added to the places of rows.
        """
        lanes, statements, known = self.dot.lanes, [], {}
        for sums, column, base in vectors:
            if column not in known:
                whole = vector_at(columns, quad + column * QUAD, QUAD * lanes)
                both = tirx.reinterpret(f"int16x{2 * lanes}", whole)
                eight = tirx.Broadcast(tirx.const(8, "int16"), 2 * lanes)
                known[column] = ((both << eight) >> eight, both >> eight)
            total = vector_at(sums, column, lanes)
            for half, factors in enumerate(known[column]):
                total = self.dot.add(total, vector_at(self.wide, base + at + 2 * half, 2), factors)
            statements.append(put(sums, column, lanes, total))
        return sequence(*statements)
