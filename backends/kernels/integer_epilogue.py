"""What follows the sums of an integer product, for a tile of rows and a block of columns.

    for block of columns:
        first[columns] = terms of ``sum + bias - zero`` that are the same for all rows
        hoisted[columns] = all else that is the same for all rows: scales, for example
        for tile of rows:
            sums begin with ``first``
            sums = round(float(sums) * hoisted)
            out = bytes of the sums

AVX2 packs vectors half by half: four of int32 become one of bytes, whose parts are then put in order at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx

from optc.backends.base import Target
from optc.backends.kernels import loops, rounding
from optc.backends.kernels.fused import Reader
from optc.backends.kernels.integer_dot import put, vector_at
from optc.backends.kernels.integer_rows import spans
from optc.backends.kernels.loops import load, loop, sequence, store

_PACKED = 4
"""Vectors of int32 that make one of bytes."""
_LANES = 8
_ORDER = [half * _PACKED + vector for vector in range(_PACKED) for half in (0, 1)]
"""Where packing leaves the halves of the vectors."""
_OPERATIONS = (tirx.Add, tirx.Sub, tirx.Mul, tirx.Div, tirx.Min, tirx.Max, tirx.Cast, tvm.ir.Call)


@dataclass(frozen=True)
class Row:
    """A row of a tile: column ``j`` of it is ``sums[at + j]`` and lies where ``Reader.store`` finds it by these."""

    sums: Any
    at: Any
    places: Callable[[Any], dict[Any, Any]]
    flat: Callable[[Any], list[Any]] = lambda j: []


class Epilogue:
    """Makes outputs of sums that begin with ``first``, ``width`` columns a block; takes the place of the reader's own.

    ``rows`` are the variables that tell rows apart.
    """

    def __init__(self, reader: Reader, rows: Sequence[Any], width: int, target: Target) -> None:
        self.reader, self.rows, self.width, self.target = reader, list(rows), width, target
        self.accumulator = reader.fused.accumulator
        self.dtype = str(reader.fused.output.dtype)
        # Volatile, since registers in which LLVM would keep them are those that the sums need.
        self.first, _ = loops.scratch("first", width, "int32")
        self._allocate = tirx.AllocBuffer(self.first, {"tirx.volatile": True})
        self.hoisted: list[tuple[Any, Any, Any]] = []
        value, self.start = self._without_start(reader.fused.epilogue)
        packs = target.triple.startswith("x86_64") and target.vector_bits == 256 and "avx2" in target.features
        narrowed = rounding.narrowed(value) if packs else None
        self.rounded: tuple[Any, int] | None = None
        if narrowed is not None:
            self.rounded = self._hoist(rounding.simplify(narrowed[0])), narrowed[1]
        reader.fused = replace_fields(reader.fused, epilogue=self._hoist(rounding.simplify(value)))

    def _without_start(self, value: Any) -> tuple[Any, Any]:
        """Return ``value`` of a sum that contains them, and the int32 terms that it adds to the sum; None for none."""
        starts: list[Any] = []

        def cut(x: Any) -> Any:
            terms = self._terms(x)
            if terms is None:
                return x
            starts.append(terms)
            return tirx.BufferLoad(self.accumulator, self.reader.fused.spatial.variables)

        result = tvm_ffi.structural_map(value, [((tirx.Add, tirx.Sub), cut)], order="pre")
        sums = [x for x in loops.loads(result) if x.source.same_as(self.accumulator)]
        same = all(tvm_ffi.structural_equal(s, starts[0]) for s in starts)
        return (result, starts[0]) if starts and same and len(sums) == len(starts) else (value, None)

    def _terms(self, x: Any) -> Any:
        """Return what ``x`` adds to the sum if that is all it does with it, None otherwise."""
        if not isinstance(x, tirx.Add | tirx.Sub) or str(x.ty.dtype) != "int32":
            return None
        left, right = x.a, x.b
        if isinstance(x, tirx.Add) and self._invariant(left):
            left, right = right, left
        if not self._invariant(right):
            return None
        if isinstance(left, tvm.ir.TensorLoad) and left.source.same_as(self.accumulator):
            return right if isinstance(x, tirx.Add) else tirx.const(0, "int32") - right
        terms = self._terms(left)
        return terms if terms is None else terms + right if isinstance(x, tirx.Add) else terms - right

    def _invariant(self, x: Any) -> bool:
        """Tell whether ``x`` is the same for all rows."""
        return not loops.uses(x, self.rows) and not any(r.source.same_as(self.accumulator) for r in loops.loads(x))

    def _hoist(self, value: Any) -> Any:
        """Return ``value`` with reads of ``hoisted``, at no place yet, for what is the same for all rows."""

        def visit(x: Any) -> Any:
            dtype = str(x.ty.dtype)
            if dtype not in ("int32", "float32") or not loops.loads(x) or not self._invariant(x):
                return x
            for known, buffer, _ in self.hoisted:
                if tvm_ffi.structural_equal(known, x):
                    return load(buffer, 0)
            self.hoisted.append((x, *loops.scratch("hoisted", self.width, dtype)))
            return load(self.hoisted[-1][1], 0)

        return tvm_ffi.structural_map(value, [(_OPERATIONS, visit)], order="pre")

    @property
    def allocations(self) -> list[Any]:
        """The statements that allocate what ``prepare`` fills."""
        return [self._allocate, *(allocate for _, _, allocate in self.hoisted)]

    def prepare(self, places: Callable[[Any], dict[Any, Any]], columns: Any) -> Any:
        """Return the statement that makes a block of ``columns`` columns ready; ``places`` are those of column ``j``.

        Columns that the block lacks begin as its last one does.
        """
        values = [(buffer, value) for value, buffer, _ in self.hoisted]
        values.append((self.first, tirx.const(0, "int32") if self.start is None else self.start))

        def column(j: Any, from_: Any) -> Any:
            where = places(from_)
            return sequence(*(store(buffer, j, self.reader.value(value, where)) for buffer, value in values))

        if loops.static(columns) == self.width:
            return self.reader.lanewise(self.width, lambda j: column(j, j))
        return loop("j", self.width, lambda j: column(j, loops.smaller(j, columns - 1)))

    def together(self, columns: int) -> int:
        """Return how many rows of ``columns`` are best stored together."""
        return max(1, _PACKED * _LANES // columns) if self.rounded is not None else 1

    def store(self, rows: Sequence[Row], columns: int, lanes: int) -> Any:
        """Return the statement that makes the first ``columns`` outputs of ``rows``, in vectors of ``lanes``."""
        if self.rounded is None or columns % _LANES:
            wide = columns if columns == self.width else lanes
            return sequence(*(spans(self.reader, columns, wide, lambda j, r=row: self.element(r, j)) for row in rows))
        vectors = [(row, j) for row in rows for j in range(0, columns, _LANES)]
        value, plus = self.rounded
        return sequence(*(self._pack(value, plus, vectors[i : i + _PACKED]) for i in range(0, len(vectors), _PACKED)))

    def element(self, row: Row, j: Any) -> Any:
        """Return the store of one output."""
        return self.reader.store(row.places(j), row.flat(j), load(row.sums, row.at + j), self._given(j))

    def _given(self, j: Any) -> dict[Any, Any]:
        return {buffer: load(buffer, j) for _, buffer, _ in self.hoisted}

    def _pack(self, value: Any, plus: int, vectors: Sequence[tuple[Row, int]]) -> Any:
        """Return the statement that rounds ``value`` in at most four vectors and stores its bytes ``plus`` more."""
        short, allocate = loops.scratch("rounded", _PACKED * _LANES, "int32")
        packed, allocate_packed = loops.scratch("packed", _PACKED * _LANES, self.dtype)

        def round_(place: int, row: Row, at: int) -> Any:
            def lane(i: Any) -> Any:
                j = at + i
                given = {self.accumulator: load(row.sums, row.at + j), **self._given(j)}
                rounded = self.reader.value(value, row.places(j), flat=row.flat(j), given=given)
                return store(short, place * _LANES + i, rounded)

            return self.reader.lanewise(_LANES, lane)

        def write(place: int, count: int, row: Row, at: int) -> Any:
            slot = tirx.BufferLoad(self.reader.fused.output, self.reader.fused.spatial.variables)
            position = self.reader.value(slot, row.places(at), flat=row.flat(at))
            size = count * _LANES
            return put(position.source, position.indices[0], size, vector_at(packed, place * _LANES, size))

        writes, place = [], 0
        while place < len(vectors):
            row, at = vectors[place]
            count = sum(1 for other, _ in vectors[place:] if other is row)
            writes.append(write(place, count, row, at))
            place += count
        rounded = [round_(place, row, at) for place, (row, at) in enumerate(vectors)]
        sources = [vector_at(short, min(i, len(vectors) - 1) * _LANES, _LANES) for i in range(_PACKED)]
        whole = put(packed, 0, _PACKED * _LANES, self._bytes(sources, plus))
        return sequence(allocate, allocate_packed, *rounded, whole, *writes)

    def _bytes(self, vectors: Sequence[Any], plus: int) -> Any:
        """Return the bytes of ``vectors + plus``, saturated to 16 bits before the sum and to 8 behind it."""
        sign = -128 if self.dtype == "int8" else 128
        pairs = []
        for pair in (vectors[:2], vectors[2:]):
            words = tirx.call_llvm_pure_intrin("int16x16", "llvm.x86.avx2.packssdw", *pair)
            if plus not in (0, sign):
                added = tirx.Broadcast(tirx.const(plus, "int16"), 2 * _LANES)
                words = tirx.call_llvm_pure_intrin("int16x16", "llvm.sadd.sat", words, added)
            pairs.append(words)
        # A sum that only changes the sign bit is left to the other saturation and that bit.
        signed = (self.dtype == "int8") != (plus == sign)
        name = f"llvm.x86.avx2.pack{'s' if signed else 'u'}swb"
        packed = tirx.call_llvm_pure_intrin("int8x32", name, *pairs)
        order = [tirx.IntImm("int32", i) for i in _ORDER]
        packed = tirx.reinterpret("int8x32", tirx.Shuffle([tirx.reinterpret("int32x8", packed)], order))
        if plus == sign:
            packed = packed ^ tirx.Broadcast(tirx.const(-128, "int8"), _PACKED * _LANES)
        return packed if self.dtype == "int8" else tirx.reinterpret("uint8x32", packed)
