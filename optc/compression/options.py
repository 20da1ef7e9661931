"""What can be asked of quantization, checked before any work starts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from optc.errors import UsageError
from optc.passes.quantize import ranges
from optc.passes.quantize.weight_only import ALGORITHMS

KINDS = {
    "int8": "weights and activations in 8 bits, ranges from calibration data",
    "int8-dynamic": "the same, with ranges that each run finds by itself",
    "int8-weights": "weights in 8 bits, computed in float32",
    "int4-weights": "weights in 4 bits, computed in float32",
    "float16": "half precision, with islands of float32",
    "bfloat16": "the other half precision, with islands of float32",
}
ACTIVATIONS = ("uint8", "int8", "int16", "uint16")
_PACKED = ("int8-weights", "int4-weights")
_ONLY = {
    **dict.fromkeys(("activations", "symmetric", "method", "per_channel", "smooth", "correct_bias"), ("int8",)),
    **dict.fromkeys(("bits", "equalize"), ("int8", "int8-dynamic")),
    **dict.fromkeys(("block", "zero_points", "scale_weights"), _PACKED),
    "rounding": ("int8", *_PACKED),
}
"""The kinds that each option has a meaning for."""
AUTO = "auto"
BLOCK = 32
"""Rows of a column that share a scale of 4 bits, unless the caller says otherwise."""


@dataclass(frozen=True)
class Options:
    """How to quantize.

    Attributes:
        kind: one of KINDS.
        activations: the type of activations, one of ACTIVATIONS. Products with 16 bits are computed in float32.
        symmetric: zero points of activations in the middle of their type.
        method: how ranges of activations are chosen, one of ``passes.quantize.ranges.METHODS``.
        per_channel: a scale for each output channel of the weights.
        bits: of int8 weights; 7 keep sums of two products in 16 bits, for runtimes that add them there on old CPUs.
        rounding: of weights of matrices, one of ``passes.quantize.weight_only.ALGORITHMS``; all but ``nearest`` use
            calibration data. ``auto``: GPTQ for 4 bits where there is such data and no budget to search, else nearest.
        block: rows of a weight matrix that share a scale; 0 for whole columns. None: 32 for 4 bits, 0 for 8.
        zero_points: weights that are not computed with have zero points too.
        smooth: the exponent of SmoothQuant for int8 (0.5, say), ``auto``: for each value the exponent with the least
            expected error, or none where that is not much less; None: no smoothing.
        scale_weights: AWQ's scaling for weights of 8 or 4 bits; uses calibration data.
        equalize: cross-layer equalization of convolutions.
        correct_bias: what rounding shifts the means of channels by goes into biases of Conv and Gemm.
        exclude: names of products that stay in float32.
    """

    kind: str = "int8"
    activations: str = "uint8"
    symmetric: bool = False
    method: str = "min-max"
    per_channel: bool = True
    bits: int = 8
    rounding: str = "auto"
    block: int | None = None
    zero_points: bool = False
    smooth: float | str | None = "auto"
    scale_weights: bool = False
    equalize: bool = False
    correct_bias: bool = True
    exclude: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        _one_of("quantization is to", self.kind, tuple(KINDS))
        _one_of("activations are", self.activations, ACTIVATIONS)
        _one_of("ranges are chosen by", self.method, ranges.METHODS)
        _one_of("weights are rounded by", self.rounding, (AUTO, *ALGORITHMS))
        if not 2 <= self.bits <= 8:
            raise UsageError(f"weights have 2 to 8 bits, not {self.bits}")
        known = self.smooth is None or self.smooth == "auto"
        if not known and (isinstance(self.smooth, str) or not 0 <= (self.smooth or 0.0) <= 1):
            raise UsageError(f"the exponent of smoothing is auto or between 0 and 1, not {self.smooth}")
        if self.block is not None and self.block and (self.block < 16 or self.block & (self.block - 1)):
            raise UsageError(f"a block has 16, 32, 64, ... rows, or 0 for whole columns, not {self.block}")
        for name, kinds in _ONLY.items():
            if getattr(self, name) != getattr(type(self), name) and self.kind not in kinds:
                raise UsageError(f"{name.replace('_', '-')} is for {', '.join(kinds)}, not for {self.kind}")
        if self.kind == "int8" and not self.nearest and (self.bits < 8 or not self.per_channel):
            raise UsageError(f"rounding by {self.rounding} is for 8 bits with a scale per channel")

    @property
    def packs_weights(self) -> bool:
        """Whether only weights are quantized."""
        return self.kind in _PACKED

    @property
    def smooths(self) -> bool:
        """Whether ranges of channels are evened out; 16 bits have room for all of them."""
        return (
            self.kind == "int8" and self.smooth is not None and not (self.smooth == "auto" and "16" in self.activations)
        )

    @property
    def needs_data(self) -> bool:
        """Whether nothing can be done without calibration data."""
        return self.kind == "int8" or not self.nearest or self.scale_weights

    @property
    def nearest(self) -> bool:
        """Whether weights are rounded to nearest."""
        return self.rounding in (AUTO, "nearest")

    def with_data(self) -> Options:
        """Return the options where calibration data is there to be used: ``auto`` is settled."""
        return replace(self, rounding="gptq") if self.rounding == AUTO and self.kind == "int4-weights" else self

    @property
    def weight_type(self) -> str:
        """The type of weights that are not computed with."""
        return ("u" if self.zero_points else "") + self.kind.removesuffix("-weights")

    @property
    def rows(self) -> int:
        """Rows of a block; 0 for whole columns."""
        if self.block is not None:
            return self.block
        return BLOCK if self.kind == "int4-weights" else 0


def _one_of(what: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise UsageError(f"{what} {', '.join(known)}, not {given!r}")
