"""What can be asked of quantization, checked before any work starts."""

from __future__ import annotations

from dataclasses import dataclass

from optc.errors import UsageError
from optc.passes.quantize import ranges

KINDS = ("int8",)
CALIBRATED = ("int8",)
"""Kinds that cannot do without calibration data."""
ACTIVATIONS = ("uint8", "int8", "int16", "uint16")


@dataclass(frozen=True)
class Options:
    """How to quantize.

    Attributes:
        kind: ``int8``, weights and activations in integers.
        activations: the type of activations, one of ACTIVATIONS. Products with 16 bits are computed in float32.
        symmetric: zero points of activations in the middle of their type.
        method: how ranges of activations are chosen, one of ``passes.quantize.ranges.METHODS``.
        per_channel: a scale for each output channel of the weights.
        bits: of the weights; 7 keep sums of two products in 16 bits, for runtimes that add them there on old CPUs.
        exclude: names of products that stay in float32.
    """

    kind: str = "int8"
    activations: str = "uint8"
    symmetric: bool = False
    method: str = "mse"
    per_channel: bool = True
    bits: int = 8
    exclude: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        _one_of("quantization is to", self.kind, KINDS)
        _one_of("activations are", self.activations, ACTIVATIONS)
        _one_of("ranges are chosen by", self.method, ranges.METHODS)
        if not 2 <= self.bits <= 8:
            raise UsageError(f"weights have 2 to 8 bits, not {self.bits}")


def _one_of(what: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise UsageError(f"{what} {', '.join(known)}, not {given!r}")
