"""The integer multiply-add instruction of a target, as TIR expressions on vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from optc.backends.base import Target
from optc.backends.kernels import loops
from optc.backends.kernels.integer_contraction import QUAD
from optc.backends.kernels.loops import load, store

_PMADDWD = {128: "llvm.x86.sse2.pmadd.wd", 256: "llvm.x86.avx2.pmadd.wd", 512: "llvm.x86.avx512.pmaddw.d.512"}


MOST_ROWS = 15
"""Rows of a register tile: more gain nothing, and each has an address of its own."""


@dataclass(frozen=True)
class Dot:
    """Sums of ``group`` neighbouring int16 products in each of ``lanes`` int32 lanes, exact for factors of 9 bits."""

    name: str
    group: int
    lanes: int
    registers: int

    def rows(self, columns: int) -> int:
        """Return how many rows of ``columns`` sums stay in registers beside a vector each, a row's value, a product."""
        vectors = columns // self.lanes
        return max(1, min((self.registers - vectors - 2) // vectors, MOST_ROWS))

    def add(self, total: Any, row: Any, column: Any) -> Any:
        """Return ``total + dot(row, column)``: int32 lanes, ``group`` int16 values, ``lanes * group`` int16 values."""
        if self.group == 1:
            spread = tirx.Broadcast(row.astype("int32"), self.lanes)
            return total + spread * column.astype(f"int32x{self.lanes}")
        pair = tirx.Broadcast(tirx.reinterpret("int32", row), self.lanes)
        factors = tirx.reinterpret(f"int16x{2 * self.lanes}", pair)
        return total + tirx.call_llvm_pure_intrin(f"int32x{self.lanes}", self.name, factors, column)


def choose(target: Target) -> Dot:
    """Return the best instruction that is exact for every pair of 9-bit factors."""
    if target.triple.startswith("x86_64"):
        bits = min(target.vector_bits, 512 if "avx512bw" in target.features else 256)
        if bits == 256 and "avx2" not in target.features:
            bits = 128
        return Dot(_PMADDWD[bits], 2, bits // 32, target.registers)
    # Widening multiply-add of 16-bit lanes, which LLVM finds by itself (smlal on Arm).
    return Dot("widen", 1, target.lanes(32), target.registers)


_PMADDUBSW = {
    128: "llvm.x86.ssse3.pmadd.ub.sw.128",
    256: "llvm.x86.avx2.pmadd.ub.sw",
    512: "llvm.x86.avx512.pmaddubs.w.512",
}


@dataclass(frozen=True)
class ByteDot:
    """Sums of four neighbouring products of bytes in each of ``lanes`` int32 lanes, columns signed, rows ``row``.

    ``widen`` names the second instruction where the first adds only pairs of products, and ends at 16 bits.
    """

    name: str
    row: str
    lanes: int
    registers: int
    widen: str | None = None
    group: int = QUAD

    def rows(self, columns: int) -> int:
        """Return how many rows of ``columns`` sums stay in registers, as ``Dot.rows``."""
        vectors = columns // self.lanes
        # A row's value and a product, beside the columns; ones and a second product where there are two instructions.
        others = 2 if self.widen is None else 4
        return max(1, min((self.registers - vectors - others) // vectors, MOST_ROWS))

    def add(self, total: Any, row: Any, column: Any) -> Any:
        """Return ``total + dot(row, column)``: int32 lanes, one int32 of four bytes, ``4 * lanes`` int8 values."""
        return self._sum(
            total, tirx.reinterpret(f"{self.row}x{4 * self.lanes}", tirx.Broadcast(row, self.lanes)), column
        )

    def add_signed(self, total: Any, row: Any, column: Any) -> Any:
        """Return ``add`` for four signed bytes where the instruction takes unsigned ones; no column may be -128."""
        spread = tirx.reinterpret(f"int8x{4 * self.lanes}", tirx.Broadcast(row, self.lanes))
        negative = spread >> tirx.Broadcast(tirx.const(7, "int8"), 4 * self.lanes)
        magnitude = ((spread ^ negative) - negative).astype(f"uint8x{4 * self.lanes}")
        return self._sum(total, magnitude, (column ^ negative) - negative)

    def add_two(self, total: Any, rows: Sequence[Any], columns: Sequence[Any]) -> Any:
        """Return ``add`` of two rows and columns where the instruction is one of two, whose sums fit 16 bits."""
        spread = [tirx.reinterpret(f"uint8x{4 * self.lanes}", tirx.Broadcast(row, self.lanes)) for row in rows]
        first, second = (self._pairs(*both) for both in zip(spread, columns, strict=True))
        return self._widened(total, first + second)

    def _sum(self, total: Any, spread: Any, column: Any) -> Any:
        if self.widen is None:
            return tirx.call_llvm_pure_intrin(f"int32x{self.lanes}", self.name, total, spread, column)
        return self._widened(total, self._pairs(spread, column))

    def _pairs(self, spread: Any, column: Any) -> Any:
        return tirx.call_llvm_pure_intrin(f"int16x{2 * self.lanes}", self.name, spread, column)

    def _widened(self, total: Any, pairs: Any) -> Any:
        ones = tirx.Broadcast(tirx.const(1, "int16"), 2 * self.lanes)
        return total + tirx.call_llvm_pure_intrin(f"int32x{self.lanes}", self.widen, pairs, ones)


def choose_bytes(target: Target) -> ByteDot | None:
    """Return the best instruction for sums of products of bytes, None if the target has none."""
    features = target.features
    if target.triple.startswith("aarch64") and "dotprod" in features:
        return ByteDot("llvm.aarch64.neon.sdot.v4i32.v16i8", "int8", 4, target.registers)
    if not target.triple.startswith("x86_64"):
        return None
    if "avx512vnni" in features and target.vector_bits == 512:
        return ByteDot("llvm.x86.avx512.vpdpbusd.512", "uint8", 16, target.registers)
    if "avxvnni" in features and target.vector_bits >= 256:
        return ByteDot("llvm.x86.avx512.vpdpbusd.256", "uint8", 8, target.registers)
    bits = min(target.vector_bits, 512 if "avx512bw" in features else 256 if "avx2" in features else 128)
    if bits < 128 or "ssse3" not in features:
        return None
    return ByteDot(_PMADDUBSW[bits], "uint8", bits // 32, target.registers, _PMADDWD[bits])


def vector_at(buffer: Any, position: Any, lanes: int) -> Any:
    """Return the load of ``lanes`` neighbours."""
    if lanes == 1:
        return load(buffer, position)
    return tirx.BufferLoad(buffer, [tirx.Ramp(loops.index(position), loops.index(1), lanes)])


def put(buffer: Any, position: Any, lanes: int, value: Any) -> Any:
    """Return the store of ``lanes`` neighbours."""
    if lanes == 1:
        return store(buffer, position, value)
    return tirx.BufferStore(buffer, value, [tirx.Ramp(loops.index(position), loops.index(1), lanes)])
