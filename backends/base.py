"""What a backend is, and what a build gives."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnx_ir as oir

if TYPE_CHECKING:
    from optc.backends.kernels.workload import Workload


@dataclass(frozen=True)
class Caches:
    """Bytes of data that one core may keep in its caches; of a cache that cores share it has its part."""

    l1: int = 32 * 1024
    l2: int = 256 * 1024


_HALVED = "znver4|cannonlake|icelake-client|tigerlake|rocketlake"
"""CPUs, by LLVM's names, whose two units of 256 bits make one of 512."""


@dataclass(frozen=True)
class Target:
    """A machine to compile for. ``name`` is what the user wrote; the rest is what it means.

    ``triple`` and ``cpu`` are LLVM's; ``features`` are LLVM feature names without sign, sorted; ``vector_bits`` is
    the width of the SIMD registers used. Everything that depends on a machine is decided from here: code may require
    ``features``, while ``caches`` only make it fast.
    """

    name: str
    kind: str
    triple: str
    cpu: str
    features: tuple[str, ...]
    vector_bits: int
    native: bool
    extra_features: tuple[str, ...] = ()
    caches: Caches = Caches()

    def lanes(self, bits: int) -> int:
        """Return how many elements of ``bits`` a vector register holds."""
        return max(1, self.vector_bits // bits)

    @property
    def registers(self) -> int:
        """The number of vector registers."""
        wide = "avx512f" in self.features or self.triple.startswith(("aarch64", "riscv"))
        return 32 if wide else 16

    @property
    def addresses(self) -> int:
        """The number of addresses that an inner loop keeps in general registers: half of them."""
        return 8 if self.triple.startswith("x86_64") else 15

    @property
    def multipliers(self) -> int:
        """How many full vectors of floats are multiplied in a cycle: two, where they take no two halves of a unit."""
        return 1 if self.vector_bits == 512 and re.match(_HALVED, self.cpu) else 2

    @property
    def fuses(self) -> bool:
        """Whether one instruction multiplies and adds."""
        return not self.triple.startswith("x86_64") or "fma" in self.features

    def describe(self) -> dict[str, Any]:
        """Return the JSON form that artifacts carry: what the machine that loads one must have."""
        return {
            "kind": self.kind,
            "triple": self.triple,
            "cpu": self.cpu,
            "features": list(self.features),
        }


@dataclass
class Build:
    """Compiled code and what it needs: ``weights`` by name in the order of the parameters of ``main``.

    ``activation_bytes`` are those of tensors between kernels as planned, ``least_activation_bytes`` what any plan takes
    at least; None if a run decides. ``calls`` are the kernels in the order of the clock that ``main`` takes last, None
    if it takes none. Inputs may lie at any multiple of ``alignment`` and of their elements' size. ``workloads`` are
    what can be tuned, by kernel.
    """

    code: bytes
    weights: dict[str, np.ndarray]
    activation_bytes: int | None
    least_activation_bytes: int | None = None
    kernels: list[dict[str, Any]] = field(default_factory=list)
    calls: list[str] | None = None
    alignment: int = 1
    workloads: dict[str, Workload] = field(default_factory=dict)


ALGORITHMS = frozenset({"winograd"})
"""Kernel algorithms that trade accuracy for speed and can be left out."""


class Backend(Protocol):
    """Turns a canonical, optimized model into code for one kind of target."""

    def supported(self, model: oir.Model) -> None:
        """Raise UnsupportedModelError naming every node that cannot be compiled; builds nothing."""

    def build(self, model: oir.Model) -> Build:
        """Compile ``model``."""
