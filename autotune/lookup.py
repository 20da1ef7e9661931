"""From a log to decisions: the exact workload, else the nearest shape, else the analytic model.

Nothing depends on the order of records. A choice is judged by the median of its ratios to the untuned kernel, those
measured inside of models before those measured alone. A choice that ever failed is not served.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median

from optc.autotune.distance import distance
from optc.autotune.machine import Machine
from optc.autotune.record import FAILURES, KEPT, MODEL, OK, Record, tvm_version
from optc.backends.kernels.decisions import TRACE, Space
from optc.backends.kernels.templates import VERSIONS
from optc.backends.kernels.workload import Workload

MARGIN = 0.98
"""A choice is served if it takes less than this part of the untuned time: smaller gains are noise."""
LENT = 0.95
"""The same for another shape, which was not measured at all; and it must come from inside of a model."""
NEAR = 4.0
"""The largest distance of shapes that decisions are carried over: factors of two in sizes, added up."""

EXACT, NEAREST, ANALYTIC = "exact", "nearest", "analytic"


@dataclass(frozen=True)
class Choice:
    """Decisions for one workload and layout, and how long they take relative to the untuned kernel."""

    workload: Workload
    decisions: Mapping[str, int]
    defaults: Mapping[str, int]
    ratio: float
    records: tuple[Record, ...]

    @property
    def inside(self) -> bool:
        """Whether the ratio is from inside of a model."""
        return any(r.state == OK and r.where == MODEL for r in self.records)


@dataclass(frozen=True)
class Answer:
    """What was served for a workload, and where it comes from.

    ``stale`` tells that there are records, but relative to an untuned kernel that is no more.
    """

    source: str
    decisions: Mapping[str, int]
    choice: Choice | None = None
    distance: float = 0.0
    stale: bool = False


def refusal(record: Record, machine: Machine) -> str | None:
    """Return why ``record`` must not be served on ``machine`` by this compiler; None if it may."""
    differences = machine.differences(record.machine)
    if differences:
        return f"another target: {', '.join(differences)}"
    if record.tvm != tvm_version():
        return f"measured with TVM {record.tvm}; this is {tvm_version()}"
    if VERSIONS.get(record.template) != record.template_version:
        return (
            f"version {record.template_version} of template {record.template}; this is {VERSIONS.get(record.template)}"
        )
    return None


def choices(records: Iterable[Record]) -> list[Choice]:
    """Return every choice that was measured and never failed, best first."""
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[record.workload.key, record.choice].append(record)
    found = []
    for group in groups.values():
        if any(r.state in FAILURES for r in group):
            continue
        group.sort(key=lambda r: r.line)
        measured = [r for r in group if r.state == OK]
        kept = [r for r in group if r.state == KEPT]
        inside = [r.ratio for r in measured if r.where == MODEL]
        ratios = inside or [r.ratio for r in measured] or ([1.0] if kept else [])
        if ratios:
            first = group[0]
            found.append(Choice(first.workload, first.decisions, first.defaults, median(ratios), tuple(group)))
    return sorted(found, key=lambda c: (c.ratio, c.records[0].choice, c.workload.key))


@dataclass
class Lookup:
    """Serves decisions from ``records`` for ``machine``; ``answers`` tells what was served for what.

    Where something was timed inside of a model, only that counts. To ``explore`` is to serve the best choice that was
    not timed there yet, if it may be better; ``exploring`` counts those.
    """

    machine: Machine
    records: Iterable[Record]
    explore: bool = False
    exploring: int = 0
    answers: dict[tuple[str, str], Answer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._by_key: dict[str, list[Choice]] = defaultdict(list)
        self._by_core: dict[str, list[Choice]] = defaultdict(list)
        self._by_operator: dict[str, list[Choice]] = defaultdict(list)
        for choice in choices(r for r in self.records if refusal(r, self.machine) is None):
            self._by_key[choice.workload.key].append(choice)
            self._by_core[choice.workload.core_key].append(choice)
            self._by_operator[choice.workload.operator].append(choice)

    def layout(self, workload: Workload) -> Mapping[str, int]:
        """Return the layout that is best for what was fused behind ``workload`` where it was measured."""
        if not workload.fixed:
            return {}
        found = self._by_core.get(workload.core_key)
        if found is not None:
            return best_layout(found, self.explore)
        near = self._nearest(workload)
        if near is None or not _lendable(near[0]):
            return {}
        choice = near[0]
        return {k: v for k, v in choice.workload.layout.items() if v != choice.defaults.get(k)}

    def schedule(self, workload: Workload) -> Mapping[str, int]:
        """Return the decisions of the template, and keep in mind where they came from."""
        answer = self._answer(workload)
        self.answers[answer_key(workload)] = answer
        return answer.decisions

    def trace(self, workload: Workload) -> str:
        """Return the trace of what was served."""
        answer = self.answers[answer_key(workload)]
        # All records of a choice have the same.
        return answer.choice.records[0].trace if answer.choice is not None and TRACE in answer.decisions else ""

    def holds(self, workload: Workload, space: Space) -> bool:
        """Tell whether the untuned kernel is still the one that the records are relative to."""
        choice = self.answers[answer_key(workload)].choice
        if choice is None or choice.workload.key != workload.key:
            return True
        # With another layout the template's own choices are others: these are not in the record.
        if any(choice.defaults.get(k, v) != v for k, v in workload.layout.items()):
            return True
        fits = all(choice.defaults.get(name, knob.default) == knob.default for name, knob in space.knobs.items())
        if not fits:
            self.answers[answer_key(workload)] = Answer(ANALYTIC, {}, stale=True)
        return fits

    def _answer(self, workload: Workload) -> Answer:
        if not workload.fixed:
            return Answer(ANALYTIC, {})
        here = [c for c in self._by_key.get(workload.key, ()) if dict(c.workload.layout) == dict(workload.layout)]
        if here:
            best = self._best(here)
            return Answer(EXACT, best.decisions if _faster(best) else {}, best)
        near = self._nearest(workload)
        if near is None:
            return Answer(ANALYTIC, {})
        choice, away = near
        moved = {k: v for k, v in choice.decisions.items() if v != choice.defaults.get(k)} if _lendable(choice) else {}
        # The loops of another shape are other loops.
        moved = {} if TRACE in moved else moved
        return Answer(NEAREST, moved, choice, away)

    def _best(self, here: list[Choice]) -> Choice:
        """Return the best of the choices for one workload and layout, which come best first."""
        inside = [c for c in here if c.inside]
        if self.explore:
            known = inside[0].ratio if inside else 1.0
            fresh = [c for c in here if not c.inside and c.ratio < min(MARGIN, known)]
            if fresh:
                self.exploring += 1
                return fresh[0]
        return inside[0] if inside else here[0]

    def _nearest(self, workload: Workload) -> tuple[Choice, float] | None:
        """Return the best choice of the nearest shape, of the same layout if there is one."""
        shapes: dict[tuple[str, str], tuple[float, Choice]] = {}
        for choice in self._by_operator.get(workload.operator, ()):
            away = distance(workload, choice.workload)
            # Choices come best first: the first of a workload is its best.
            if away <= NEAR and answer_key(choice.workload) not in shapes:
                other = dict(choice.workload.layout) != dict(workload.layout) and bool(workload.layout)
                shapes[answer_key(choice.workload)] = (away + other, choice)
        if not shapes:
            return None
        away, choice = min(shapes.values(), key=lambda s: (s[0], s[1].ratio, s[1].workload.key))
        return choice, away


def answer_key(workload: Workload) -> tuple[str, str]:
    """Return what tells a workload and its layout from others."""
    return workload.key, str(sorted(workload.layout.items()))


def _faster(choice: Choice) -> bool:
    return choice.ratio < MARGIN


def _lendable(choice: Choice) -> bool:
    return choice.inside and choice.ratio < LENT


def best_layout(found: Iterable[Choice], explore: bool = False) -> Mapping[str, int]:
    """Return the layout with the least product of ratios over all epilogues; what was not measured counts as 1.

    Of a workload and layout that was timed inside of models only that counts, unless to ``explore``.
    """
    groups: dict[tuple[str, str], list[Choice]] = defaultdict(list)
    layouts: dict[str, Mapping[str, int]] = {}
    for choice in found:
        layout = str(sorted(choice.workload.layout.items()))
        layouts[layout] = choice.workload.layout
        groups[choice.workload.key, layout].append(choice)
    totals: dict[str, float] = defaultdict(float)
    for (_, layout), group in groups.items():
        inside = [c for c in group if c.inside]
        ratio = min(c.ratio for c in (group if explore or not inside else inside))
        totals[layout] += min(0.0, math.log(max(ratio, 1e-6)))
    best = min(totals, key=lambda layout: (totals[layout], layout))
    return layouts[best] if totals[best] < math.log(MARGIN) else {}
