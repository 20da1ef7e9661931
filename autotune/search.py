"""The search in the decisions of one task: what was tried, and what to try next.

Decisions of a template are chosen by the cost model. Where there is no template, TVM's evolution has a say.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from optc.autotune.evolution import Evolution
from optc.autotune.model import CostModel, Point, features, improvement
from optc.autotune.tasks import Task
from optc.backends.kernels.decisions import TRACE, Knob, number_of

_PAIRS = 24
"""Random changes of two decisions that are looked at beside all changes of one."""
_LEADERS = 3
"""Candidates whose neighbours are looked at."""
_HINTED = 0.05
"""What a hint promises: the decrease of the logarithm of the time that counts until it is tried."""


@dataclass(frozen=True)
class Candidate:
    """One variant of the task, decided in one way; only what differs from the variant's analytic choice is given."""

    variant: int
    decisions: tuple[tuple[str, int], ...]

    @property
    def given(self) -> dict[str, int]:
        """The decisions."""
        return dict(self.decisions)


NEXT = Candidate(0, ((TRACE, 0),))
"""The next trace of the evolution, whichever that is: it is made when it is tried."""


@dataclass
class Result:
    """A candidate with its ratio to the untuned kernel, infinite for a failure."""

    candidate: Candidate
    ratio: float


@dataclass
class Search:
    """Candidates of one task; candidate zero is the untuned kernel, with ratio 1."""

    task: Task
    model: CostModel
    seed: int = 0
    results: list[Result] = field(default_factory=list)
    tried: set[Candidate] = field(default_factory=set)
    knobs: dict[int, dict[str, Knob]] = field(default_factory=dict)
    hints: list[Candidate] = field(default_factory=list)
    evolution: Evolution | None = None
    traces: dict[int, str] = field(default_factory=dict)
    _ranked: list[tuple[float, Candidate]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(f"{self.task.key} {self.seed}")
        self.zero = Candidate(0, ())
        self.tried.add(self.zero)
        self.results.append(Result(self.zero, 1.0))
        self.model.add(self.point(self.zero), 1.0)
        self.knobs = {i: dict(variant.space.knobs) for i, variant in enumerate(self.task.variants)}

    @property
    def best(self) -> Result:
        """The best result so far."""
        return min(self.results, key=lambda r: r.ratio)

    def full(self, candidate: Candidate) -> dict[str, int]:
        """Return all decisions of a candidate, its layout included."""
        variant = self.task.variants[candidate.variant]
        return {**variant.space.decisions, **variant.layout, **candidate.given}

    @property
    def defaults(self) -> dict[str, int]:
        """All decisions of the untuned kernel."""
        return self.full(self.zero)

    def point(self, candidate: Candidate) -> Point:
        """Return what the model knows of a candidate."""
        variant = self.task.variants[candidate.variant]
        prior = 1.0
        for name, value in candidate.decisions:
            knob = self.knobs.get(candidate.variant, {}).get(name)
            prior *= knob.cost(value) if knob is not None and value in knob.options else 1.0
        own = {**variant.space.decisions, **variant.layout}
        # Panels of another width are another kernel: its own choices are where it starts from.
        moved = features({**own, **candidate.given}, {**own, **self.task.variants[0].layout})
        return Point(self.task.key, moved, min(prior, 4.0))

    def propose(self, count: int) -> list[tuple[float, Candidate]]:
        """Return the candidates that promise most, with the expected decrease of the logarithm of the time."""
        if not self._ranked:
            self._rank()
        self._ranked = [entry for entry in self._ranked if entry[1] not in self.tried]
        hinted = [(_HINTED, candidate) for candidate in self.hints if candidate not in self.tried]
        gain = 0.0 if self.evolution is None else self.evolution.promise(self.best.ratio)
        traced = [(gain, NEXT)] if gain > 0 else []
        decided = sorted([*traced, *self._ranked[:count]], key=lambda entry: -entry[0])
        return [*hinted, *decided][:count]

    def settle(self, candidate: Candidate) -> Candidate | None:
        """Return the candidate that ``NEXT`` stands for, None if there is none left; any other as it is."""
        if candidate != NEXT or self.evolution is None:
            return candidate
        while text := self.evolution.propose():
            found = self._traced(text)
            if found not in self.tried:
                return found
        return None

    def trace(self, candidate: Candidate) -> str:
        """Return the text of a candidate's trace, empty if it has none."""
        return self.traces.get(candidate.given.get(TRACE, 0), "")

    def remember(self, text: str, ratio: float) -> None:
        """Take note of a trace that another run has measured."""
        candidate = self._traced(text)
        if candidate not in self.tried:
            self.learn(candidate, ratio)

    def _traced(self, text: str) -> Candidate:
        self.traces[number_of(text)] = text
        return Candidate(0, ((TRACE, number_of(text)),))

    def hint(self, wanted: Mapping[str, int]) -> None:
        """Try first what is nearest to decisions that were good elsewhere."""

        def away(layout: Mapping[str, int]) -> float:
            return sum(abs(math.log2((layout[k] + 1) / (wanted[k] + 1))) for k in layout.keys() & wanted.keys())

        number = min(range(len(self.task.variants)), key=lambda i: away(self.task.variants[i].layout))
        near = {
            name: min(knob.options, key=lambda option: away({name: option}))
            for name, knob in self.knobs[number].items()
            if name in wanted
        }
        self.hints.append(self._changed(Candidate(number, ()), near.items()))

    def learn(self, candidate: Candidate, ratio: float, knobs: Mapping[str, Knob] | None = None) -> None:
        """Take note of a result, and of decisions that this candidate led to."""
        self.tried.add(candidate)
        self.results.append(Result(candidate, ratio))
        if TRACE in candidate.given:
            if self.evolution is not None:
                self.evolution.learn(self.trace(candidate), ratio)
            return
        self.model.add(self.point(candidate), ratio)
        if knobs:
            self.knobs[candidate.variant] = {**self.knobs[candidate.variant], **knobs}
        self.stale()

    def stale(self) -> None:
        """Forget the ranking: the model has learned."""
        self._ranked = []

    def skip(self, candidate: Candidate) -> None:
        """Never propose a candidate again."""
        self.tried.add(candidate)

    def _rank(self) -> None:
        pool = sorted(self._pool(), key=lambda c: (c.variant, c.decisions))
        if not pool:
            return
        mean, deviation = self.model.predict([self.point(c) for c in pool])
        gain = improvement(mean, deviation, math.log(self.best.ratio))
        self._ranked = [(float(gain[i]), pool[i]) for i in np.argsort(-gain, kind="stable")]

    def _pool(self) -> set[Candidate]:
        """Return the neighbours of the best candidates so far, and the other variants as they come."""
        pool = {Candidate(i, ()) for i in range(len(self.task.variants))}
        decided = (r for r in self.results if math.isfinite(r.ratio) and TRACE not in r.candidate.given)
        finite = sorted(decided, key=lambda r: r.ratio)
        for result in finite[:_LEADERS]:
            start = result.candidate
            changes = [(n, o) for n, knob in sorted(self.knobs[start.variant].items()) for o in knob.options]
            pool |= {self._changed(start, [change]) for change in changes}
            for _ in range(_PAIRS if changes else 0):
                pool.add(self._changed(start, [self.random.choice(changes), self.random.choice(changes)]))
        return pool - self.tried

    def _changed(self, start: Candidate, changes: Iterable[tuple[str, int]]) -> Candidate:
        own = self.task.variants[start.variant].space.decisions
        decisions = {**start.given, **dict(changes)}
        return Candidate(start.variant, tuple(sorted((k, v) for k, v in decisions.items() if own.get(k) != v)))


def candidate_of(task: Task, decisions: Mapping[str, int]) -> Candidate | None:
    """Return the candidate that recorded decisions were; None if its variant is not there."""
    for i, variant in enumerate(task.variants):
        if all(decisions.get(k) == v for k, v in variant.layout.items()):
            own = {**variant.space.decisions, **variant.layout}
            return Candidate(i, tuple(sorted((k, v) for k, v in decisions.items() if own.get(k) != v)))
    return None
