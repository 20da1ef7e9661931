"""Which backend compiles for which target name."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from optc.backends.base import Backend, Target

if TYPE_CHECKING:
    from optc.backends.kernels.decisions import Tuning


def resolve(name: str) -> Target:
    """Return the target called ``name``; UsageError if no backend knows it."""
    from optc.backends.cpu import target as cpu

    return cpu.resolve(name)


def backend(
    target: Target,
    progress: Callable[[str], None] | None = None,
    without: Collection[str] = (),
    tuning: Tuning | None = None,
) -> Backend:
    """Return the backend for ``target``; ``progress`` is told the name of each stage of a build.

    ``without`` names algorithms of ``base.ALGORITHMS`` to leave out; ``tuning`` decides about kernels.
    """
    from optc.backends.cpu.build import CpuBackend

    return CpuBackend(target, progress, without, tuning)
