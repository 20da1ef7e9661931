"""What a backend is, and what a build gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnx_ir as oir


@dataclass(frozen=True)
class Target:
    """A machine to compile for. ``name`` is what the user wrote; the rest is what it means.

    ``triple`` and ``cpu`` are LLVM's; ``features`` are LLVM feature names without sign, sorted; ``vector_bits`` is
    the width of the SIMD registers used.
    """

    name: str
    kind: str
    triple: str
    cpu: str
    features: tuple[str, ...]
    vector_bits: int
    native: bool
    extra_features: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """Return the JSON form that artifacts carry."""
        return {
            "kind": self.kind,
            "triple": self.triple,
            "cpu": self.cpu,
            "features": list(self.features),
        }


@dataclass
class Build:
    """Compiled code and what it needs: ``weights`` by name in the order of the parameters of ``main``.

    ``calls`` are the kernels in the order of the clock that ``main`` takes last, None if it takes none. Inputs may lie
    at any multiple of ``alignment`` and of their elements' size.
    """

    code: bytes
    weights: dict[str, np.ndarray]
    activation_bytes: int | None
    kernels: list[dict[str, Any]] = field(default_factory=list)
    calls: list[str] | None = None
    alignment: int = 1


ALGORITHMS = frozenset({"winograd"})
"""Kernel algorithms that trade accuracy for speed and can be left out."""


class Backend(Protocol):
    """Turns a canonical, optimized model into code for one kind of target."""

    def supported(self, model: oir.Model) -> None:
        """Raise UnsupportedModelError naming every node that cannot be compiled; builds nothing."""

    def build(self, model: oir.Model) -> Build:
        """Compile ``model``."""
