"""Schedules every kernel of a module: its own template where it has one, else the generic rule.

A template is asked for by a block annotation, ``te.compute(..., attrs={"optc.template": NAME})``, because
annotations survive fusion. A template returns None for a function it cannot handle; the generic rule then takes
it, and the report says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tvm import s_tir, tirx

from optc.backends.base import Target
from optc.backends.kernels import generic, loops, threads
from optc.backends.kernels.decisions import Space, Tuning, deciding
from optc.backends.kernels.templates import TEMPLATES
from optc.backends.kernels.work import Work, work
from optc.backends.kernels.workload import TEMPLATE, Workload
from optc.backends.kernels.workload import of as workload_of


@dataclass(frozen=True)
class Kernel:
    """How one kernel was scheduled. ``wanted`` is the template it asked for, ``work`` its arithmetic, if any.

    ``space`` tells what could be decided about it; given decisions that were refused are in there.
    """

    name: str
    rule: str
    wanted: str | None
    work: Work | None = None
    workload: Workload | None = None
    space: Space = field(default_factory=Space)

    @property
    def tunable(self) -> bool:
        """Whether there is anything to decide, and sizes to measure it with."""
        workload = self.workload
        searched = self.rule in (*generic.SEARCHED, generic.TRACED)
        return workload is not None and workload.fixed and bool(self.space.knobs or workload.layout or searched)

    def describe(self) -> dict[str, Any]:
        """Return the JSON form that the artifact's report carries."""
        entry: dict[str, Any] = {"name": self.name, "schedule": self.rule}
        if self.space.given:
            entry["decisions"] = self.space.decisions
        if self.wanted is not None and self.wanted != self.rule:
            entry["declined"] = self.wanted
        if self.work is not None:
            entry |= self.work.describe()
        return entry


def schedule(module: Any, target: Target, tuning: Tuning | None = None) -> tuple[Any, list[Kernel]]:
    """Return ``module`` with every PrimFunc scheduled for ``target``, as ``tuning`` decides, and how."""
    kernels: list[Kernel] = []
    for var, function in sorted(module.functions.items(), key=lambda item: str(item[0].name_hint)):
        if not isinstance(function, tirx.PrimFunc):
            continue
        name = str(var.name_hint)
        workload = workload_of(function)
        given = tuning.schedule(workload) if tuning else {}
        if tuning and given:
            with deciding({}) as space:
                schedule_kernel(function, target)
            given = given if tuning.holds(workload, space) else {}
        trace = tuning.trace(workload) if tuning and given else ""
        with deciding(given, strict=False, trace=trace) as space:
            scheduled, rule, wanted = schedule_kernel(function, target)
        module[var] = scheduled
        kernels.append(Kernel(name, rule, wanted, work(function), workload, space))
    return module, kernels


def schedule_kernel(function: Any, target: Target) -> tuple[Any, str, str | None]:
    """Return the scheduled function, the rule that did it, and the template that was asked for."""
    wanted = _wanted(function)
    cycles = threads.cycles(function, target, wanted is not None)
    if wanted is not None:
        scheduled = TEMPLATES[wanted](function, target)
        if scheduled is not None:
            return threads.settle(scheduled, cycles), wanted, wanted
    scheduled, rule = generic.schedule(function, target, loops.static(cycles) is None or threads.worth(cycles))
    return threads.settle(scheduled, cycles), rule, wanted


def _wanted(function: Any) -> str | None:
    schedule = s_tir.Schedule(function, enable_check=False)
    for block in schedule.get_child_blocks(schedule.get_sblock("root")) if _has_root(function) else []:
        annotation = schedule.get(block).annotations.get(TEMPLATE)
        if annotation is not None:
            return str(annotation)
    return None


def _has_root(function: Any) -> bool:
    return isinstance(function.body, s_tir.SBlockRealize)
