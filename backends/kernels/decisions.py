"""What a template decides about a kernel, by name, so that a search can decide otherwise.

A template asks ``decide(name, default, options)`` where its analytic model has an answer. Outside of ``deciding`` that
answer is the result. Inside, given decisions replace it, and what was asked is recorded: the space of a kernel is what
its template asks for, with options that follow from the target and the sizes, so every option is legal.

Where there is no template, a whole schedule can be the decision: a trace (``traces.py``), told by its number.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from math import log2
from typing import Protocol, TypeVar

from optc.backends.kernels.workload import Workload
from optc.errors import OptcError

Schedule = TypeVar("Schedule")
Cost = Callable[[int], float]
"""What an option takes by an analytic model, in any unit."""


TRACE = "trace"
"""The decision that a trace is the schedule: its number, 0 for none."""


class IllegalDecisionError(OptcError):
    """A decision that is no option of the kernel: it was made for another kernel, target or template."""


@dataclass(frozen=True)
class Knob:
    """One decision: its options in ascending order, the analytic choice, and the analytic cost of each over its."""

    default: int
    options: tuple[int, ...]
    costs: tuple[float, ...]

    def cost(self, option: int) -> float:
        """Return the cost of ``option`` relative to that of the default."""
        return self.costs[self.options.index(option)]


_UNKNOWN = 1.02
"""The relative cost of an option that no model speaks about: the default goes first."""


@dataclass
class Space:
    """The decisions asked for so far, and those taken; ``refused`` are given ones that are illegal, if not strict.

    The legal option nearest to a refused one takes its place. ``trace`` is the one that may be decided for.
    """

    given: Mapping[str, int] = field(default_factory=dict)
    strict: bool = True
    trace: str = ""
    refused: list[str] = field(default_factory=list)
    knobs: dict[str, Knob] = field(default_factory=dict)
    taken: dict[str, int] = field(default_factory=dict)

    def decide(self, name: str, default: int, options: Iterable[int], cost: Cost | None) -> int:
        """Record the question; return the given answer, else the default."""
        if name in self.taken:
            return self.taken[name]
        legal = tuple(sorted({default, *options}))
        wanted = self.given.get(name, default)
        if wanted not in legal and not self.strict:
            self.refused.append(name)
            wanted = min(legal, key=lambda option: abs(log2((option + 1) / (wanted + 1))))
        if wanted not in legal:
            raise IllegalDecisionError(f"{name}={wanted} is not among {', '.join(map(str, legal))}")
        if len(legal) > 1:
            base = cost(default) if cost else 1.0
            costs = [cost(o) / base if cost else 1.0 if o == default else _UNKNOWN for o in legal]
            self.knobs[name] = Knob(default, legal, tuple(costs))
        self.taken[name] = wanted
        return wanted

    @property
    def decisions(self) -> dict[str, int]:
        """The decisions taken where there was a choice."""
        return {name: self.taken[name] for name in sorted(self.knobs)}


_CURRENT: ContextVar[Space | None] = ContextVar("space", default=None)


def decide(name: str, default: int, options: Iterable[int], cost: Cost | None = None) -> int:
    """Return ``default``, or what the decisions in force say about ``name``, which must be one of ``options``.

    Raises IllegalDecisionError.
    """
    space = _CURRENT.get()
    return default if space is None else space.decide(name, default, options, cost)


def number_of(trace: str) -> int:
    """Return the number that tells a trace from others."""
    return zlib.crc32(trace.encode()) or 1


def traced(replay: Callable[[str], Schedule]) -> Schedule | None:
    """Return what ``replay`` makes of the trace in force, None if the decisions take none.

    Raises IllegalDecisionError; so may ``replay``, for a trace of another kernel, which is refused then if not strict.
    """
    space = _CURRENT.get()
    if space is None or not space.decide(TRACE, 0, [number_of(space.trace)] if space.trace else [], None):
        return None
    try:
        return replay(space.trace)
    except IllegalDecisionError:
        if space.strict:
            raise
        space.refused.append(TRACE)
        space.taken[TRACE] = 0
        return None


@contextmanager
def deciding(given: Mapping[str, int], *, strict: bool = True, trace: str = "") -> Iterator[Space]:
    """Let ``given``, which may name ``trace``, decide inside of the block; the result tells what was asked.

    Illegal decisions raise if ``strict``; else the nearest legal ones take their place.
    """
    space = Space(given, strict, trace)
    token = _CURRENT.set(space)
    try:
        yield space
    finally:
        _CURRENT.reset(token)


def counts(most: int) -> list[int]:
    """Return numbers of parts to try, up to ``most``: 1, 2, 3, 4, 6, 8, 12, 16 and so on."""
    return [n for i in range(12) for n in (1 << i, 3 << i) if n <= most]


class Tuning(Protocol):
    """Where decisions come from while a model is compiled. An empty answer is the analytic one."""

    def layout(self, workload: Workload) -> Mapping[str, int]:
        """Return decisions that lowering takes, before it is known what is fused behind the kernel."""

    def schedule(self, workload: Workload) -> Mapping[str, int]:
        """Return decisions of the template, for a workload with its epilogue and layout."""

    def trace(self, workload: Workload) -> str:
        """Return the trace that what ``schedule`` has served names, an empty text for none."""

    def holds(self, workload: Workload, space: Space) -> bool:
        """Tell whether what ``schedule`` has served fits the untuned kernel of ``space``; else that is taken."""
