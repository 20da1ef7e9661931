"""The machine that a measurement speaks about, as tuning records name it."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, fields

from optc.backends.base import Target


@dataclass(frozen=True)
class Machine:
    """A CPU as code generation knows it, and how many threads ran. ``features`` is a digest of LLVM's list."""

    triple: str
    cpu: str
    features: str
    vector_bits: int
    l1: int
    l2: int
    threads: int

    def differences(self, other: Machine) -> list[str]:
        """Return in what ``other`` is another machine, in words."""
        ours, theirs = asdict(self), asdict(other)
        return [
            f"{f.name} {theirs[f.name]} is not {ours[f.name]}" for f in fields(self) if ours[f.name] != theirs[f.name]
        ]

    def __str__(self) -> str:
        return f"{self.cpu}, {self.threads} thread{'s' if self.threads > 1 else ''}, L2 {self.l2 // 1024}K"


def machine_of(target: Target, threads: int) -> Machine:
    """Return what records call ``target`` with ``threads``."""
    digest = hashlib.sha256(",".join(target.features).encode()).hexdigest()[:16]
    caches = target.caches
    return Machine(target.triple, target.cpu, digest, target.vector_bits, caches.l1, caches.l2, threads)
