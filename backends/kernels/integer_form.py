"""How a strip of rows holds 8-bit values less their zero point: widened, or as the bytes some instructions take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import tirx

from optc.backends.kernels.fused import bits


@dataclass(frozen=True)
class Form:
    """Values are held as ``dtype``, ``shift`` added to them."""

    dtype: str
    shift: int = 0

    @property
    def size(self) -> int:
        """Bytes of one value."""
        return bits(self.dtype) // 8

    @property
    def zero(self) -> Any:
        """What stands for 0."""
        return tirx.const(self.shift, self.dtype)

    def of(self, value: Any) -> Any:
        """Return the form of an int32 value."""
        byte = self._byte(value) if self.size == 1 else None
        if byte is not None:
            return byte
        return (value + self.shift if self.shift else value).astype(self.dtype)

    def _byte(self, value: Any) -> Any:
        """Return the form of an 8-bit element less its zero point where it is that element with or without its sign
        bit changed: no arithmetic of 32 bits for each byte. None otherwise.
        """
        # The simplifier makes of a negative zero point's subtraction an addition.
        sign = 1 if isinstance(value, tirx.Sub) else -1 if isinstance(value, tirx.Add) else 0
        shifted = sign and isinstance(value.b, tirx.IntImm)
        element, zero = (value.a, sign * int(value.b)) if shifted else (value, 0)
        read = element.value if isinstance(element, tirx.Cast) else None
        if not isinstance(read, tvm.ir.TensorLoad):
            return None
        dtype = str(read.source.dtype)
        if dtype not in ("int8", "uint8"):
            return None
        if dtype == self.dtype:
            return read if self.shift == zero else None
        change = 128 if self.dtype == "uint8" else -128
        return read.astype(self.dtype) ^ tirx.const(change, self.dtype) if self.shift == zero + change else None


WIDE = Form("int16")
