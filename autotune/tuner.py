"""The tuner: spends a budget on the tasks that promise most, and writes every measurement into the log at once.

Workers build candidates at the same time, each of its own tasks; then one after the other measures. A task whose best
candidate promises less of the model's time than can be measured is left.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from optc.autotune import data, log
from optc.autotune.evolution import Evolution, target_of
from optc.autotune.imported import product_of
from optc.autotune.lookup import refusal
from optc.autotune.machine import Machine
from optc.autotune.model import CostModel
from optc.autotune.pool import Pool, Process
from optc.autotune.record import HINT, KEPT, OK, Record, paired, tvm_version
from optc.autotune.search import Candidate, Search, candidate_of
from optc.autotune.tasks import Task
from optc.backends.cpu.target import to_tvm
from optc.backends.kernels import winograd
from optc.backends.kernels.templates import VERSIONS
from optc.backends.registry import resolve

LEAST_SHARE = 0.002
"""Tasks that take less of the model's time are not tuned: half of it, the most to hope for, is noise."""
LEAST_GAIN = 2e-5
"""The expected part of the model's time that is worth one more trial."""
ROUNDS = 9
"""Turns of candidate and untuned kernel."""
NAIVE_OPERATIONS = 2_000_000_000
"""Up to this many operations the reference is the kernel as it is defined, without any schedule."""
_REFRESH = 12
"""Trials after which all tasks are ranked again, because the cost model has learned from others."""


@dataclass
class Status:
    """How far a run is, for people."""

    elapsed: float
    trials: int
    failures: int
    active: int
    predicted: float
    """The model's time that the best candidates add up to, relative to the untuned one."""
    task: str = ""


@dataclass
class Budget:
    """Seconds or trials to spend; None for no limit of that kind."""

    seconds: float | None = None
    trials: int | None = None


@dataclass
class Tuner:
    """One run. ``curve`` holds (elapsed seconds, trials, predicted time relative to the untuned model)."""

    tasks: list[Task]
    machine: Machine
    pool: Pool
    path: Path
    folder: Path
    budget: Budget
    progress: Callable[[Status], None] = lambda _: None
    clock: Callable[[], float] = time.monotonic
    curve: list[tuple[float, int, float]] = field(default_factory=list)
    trials: int = 0
    failures: int = 0
    stopped: str = ""

    def __post_init__(self) -> None:
        self.start = self.clock()
        self.skipped = [t for t in self.tasks if t.share < LEAST_SHARE]
        chosen = sorted((t for t in self.tasks if t.share >= LEAST_SHARE), key=lambda t: -t.share)
        self.model = CostModel({t.key: t.workload for t in self.tasks})
        self.searches = [Search(task, self.model, evolution=self._evolution(task)) for task in chosen]
        # Tasks keep to their worker: the heaviest are dealt out first.
        workers = len(self.pool.processes)
        self.owned = [self.searches[i::workers] for i in range(workers)]
        self.dead: set[str] = set()

    def _evolution(self, task: Task) -> Evolution | None:
        """Return TVM's search for a kernel without a template, None for others."""
        if not task.searched:
            return None
        return Evolution(task.variants[0].function, self._cores)

    @cached_property
    def _cores(self) -> Any:
        return target_of(to_tvm(resolve(self.pool.settings.target)), self.machine.threads)

    def run(self) -> None:
        """Tune until the budget is spent or nothing promises enough. May be interrupted at any time."""
        records = log.read(self.path).records if self.path.exists() else []
        self._resume(records)
        self._keep(self.skipped, records, f"takes less than {LEAST_SHARE:.1%} of the model's time")
        self._note()
        try:
            while not self._spent() and self._step():
                pass
        finally:
            # Where every candidate failed there is nothing measured either.
            without = [s for s in self.searches if not any(math.isfinite(r.ratio) for r in s.results[1:])]
            broken = [(s, s.evolution.failure) for s in self.searches if s.evolution is not None]
            self._append([self._record(s.task, s.zero, KEPT, note=why) for s, why in broken if why])
            untried = [s.task for s in without if s.task.key not in self.dead]
            self._keep(untried, records, "the search ended before a candidate of it was measured")

    def _step(self) -> bool:
        """Try one candidate on each worker; False if none promises enough."""
        batch = self._batch()
        if not batch:
            self.stopped = "no candidate promises a gain that could be measured"
            return False
        built: list[tuple[Process, Search, Candidate, int]] = []
        for process, search, candidate in batch:
            if self._prepare(process, search, candidate.variant):
                number, key = self.trials + len(built), search.task.key
                trace = search.trace(candidate)
                process.send(
                    "build", task=key, variant=candidate.variant, decisions=candidate.given, number=number, trace=trace
                )
                built.append((process, search, candidate, number))
        answers = [process.receive(self.pool.settings.build_seconds) for process, *_ in built]
        # Kernels on one machine are measured one after the other; servers do not disturb each other.
        every = list(zip(built, answers, strict=True))
        for turn in [every] if self.pool.settings.tracker else [[one] for one in every]:
            waiting = [(entry, answer, self._measure(*entry, answer)) for entry, answer in turn]
            for entry, answer, asked in waiting:
                self._finish(*entry, answer, asked)
        return True

    @property
    def predicted(self) -> float:
        """The model's time by the best candidates, relative to the untuned one."""
        return 1.0 - sum(s.task.share * (1.0 - min(1.0, s.best.ratio)) for s in self.searches)

    def _spent(self) -> bool:
        if self.budget.seconds is not None and self.clock() - self.start >= self.budget.seconds:
            self.stopped = "the time is used up"
        elif self.budget.trials is not None and self.trials >= self.budget.trials:
            self.stopped = "the trials are used up"
        return bool(self.stopped)

    def _batch(self) -> list[tuple[Process, Search, Candidate]]:
        """Return for each worker the candidate among its tasks with the largest expected gain for the model."""
        batch: list[tuple[Process, Search, Candidate]] = []
        left = math.inf if self.budget.trials is None else self.budget.trials - self.trials
        for process, owned in zip(self.pool.processes, self.owned, strict=True):
            picked = self._pick(owned) if len(batch) < left else None
            if picked is not None:
                batch.append((process, *picked))
        return batch

    def _pick(self, owned: list[Search]) -> tuple[Search, Candidate] | None:
        """Return the candidate that promises most for the model, None if none promises enough."""
        while True:
            found = [
                (gain * search.task.share, i, search, candidate)
                for i, search in enumerate(owned)
                if search.task.key not in self.dead
                for gain, candidate in search.propose(1)
            ]
            if not found:
                return None
            gain, _, search, candidate = max(found, key=lambda f: (f[0], -f[1]))
            if gain < LEAST_GAIN:
                return None
            settled = search.settle(candidate)
            if settled is not None:
                return search, settled

    def _prepare(self, process: Process, search: Search, variant: int) -> bool:
        """Load what a worker needs for a candidate; False if the untuned kernel itself does not work there."""
        task = search.task
        answer = prepare(process, task, variant, self.folder)
        if answer["state"] != OK:
            self.dead.add(task.key)
            self._append([self._record(task, Candidate(0, ()), KEPT, note=f"not measured: {answer.get('note', '')}")])
        return bool(answer["state"] == OK)

    def _measure(
        self, process: Process, search: Search, candidate: Candidate, number: int, built: dict[str, Any]
    ) -> bool:
        """Ask for the measurement of what was built; False if there is nothing to measure."""
        if built["state"] != OK or self._same_as_known(search, candidate, built["taken"]):
            return False
        best = min(1.0, search.best.ratio)
        process.send("measure", task=search.task.key, number=number, rounds=ROUNDS, best=best)
        return True

    def _finish(
        self, process: Process, search: Search, candidate: Candidate, number: int, built: dict[str, Any], asked: bool
    ) -> None:
        """Take the measurement, learn from it, write it down."""
        answer = built
        if asked:
            answer = process.receive(self.pool.settings.measure_seconds)
        elif built["state"] == OK and self._same_as_known(search, candidate, built["taken"]):
            search.skip(candidate)
            search.stale()
            return
        self.trials += 1
        state = answer["state"]
        if state == OK:
            ratio = paired(answer["seconds"], answer["baseline"])
            search.learn(candidate, ratio, built["knobs"])
        else:
            self.failures += 1
            search.learn(candidate, math.inf)
        if not str(answer.get("note", "")).startswith("IllegalDecisionError"):
            note = str(answer.get("note", ""))
            trace = search.trace(candidate)
            self._append([self._record(search.task, candidate, state, {**built, **answer}, note, trace)])
        if self.trials % _REFRESH == 0:
            for other in self.searches:
                other.stale()
        self._note(search)

    def _same_as_known(self, search: Search, candidate: Candidate, taken: dict[str, int]) -> bool:
        """Tell whether a candidate led to the same decisions as one before: some exclude others."""
        variant = search.task.variants[candidate.variant]
        same = Candidate(
            candidate.variant,
            tuple(sorted((k, v) for k, v in taken.items() if variant.space.decisions.get(k) != v)),
        )
        return same != candidate and same in search.tried

    def _record(
        self,
        task: Task,
        candidate: Candidate,
        state: str,
        answer: dict[str, Any] | None = None,
        note: str = "",
        trace: str = "",
    ) -> Record:
        answer = answer or {}
        variant = task.variants[candidate.variant]
        zero = task.variants[0]
        return Record(
            workload=variant.workload,
            template=variant.template,
            template_version=VERSIONS[variant.template],
            decisions={**variant.space.decisions, **variant.layout, **candidate.given},
            defaults={**zero.space.decisions, **zero.layout},
            machine=self.machine,
            tvm=tvm_version(),
            state=state,
            seconds=tuple(answer.get("seconds", ())),
            baseline=tuple(answer.get("baseline", ())),
            noise=float(answer.get("noise", 0.0)),
            error=float(answer.get("error", 0.0)),
            note=note,
            trace=trace,
        )

    def _append(self, records: Iterable[Record]) -> None:
        log.append(self.path, records)

    def _keep(self, tasks: list[Task], records: Iterable[Record], note: str) -> None:
        """Write down which tasks are left untuned, and why."""
        known = {r.workload.key for r in records if r.state in (OK, KEPT) and refusal(r, self.machine) is None}
        self._append([self._record(t, Candidate(0, ()), KEPT, note=note) for t in tasks if t.key not in known])

    def _resume(self, records: Iterable[Record]) -> None:
        """Learn from what the log says about these tasks on this machine."""
        searches = {s.task.key: s for s in self.searches}
        self._hint(records)
        for record in records:
            search = searches.get(record.workload.key)
            if search is None or record.state in (KEPT, HINT) or refusal(record, self.machine) is not None:
                continue
            if record.trace:
                search.remember(record.trace, record.ratio)
                continue
            candidate = candidate_of(search.task, record.decisions)
            if candidate is not None and candidate not in search.tried:
                search.learn(candidate, record.ratio)

    def _hint(self, records: Iterable[Record]) -> None:
        """Tell the searches what was good for products of the same extents elsewhere."""
        hints = [r for r in records if r.state == HINT and refusal(r, self.machine) is None]
        for search in self.searches if hints else ():
            key = product_of(search.task)
            for record in hints:
                if record.workload.key == key:
                    search.hint(record.decisions)

    def _note(self, search: Search | None = None) -> None:
        elapsed = self.clock() - self.start
        self.curve.append((elapsed, self.trials, self.predicted))
        active = sum(1 for s in self.searches if s.task.key not in self.dead)
        name = search.task.names[0] if search else ""
        self.progress(Status(elapsed, self.trials, self.failures, active, self.predicted, name))


def prepare(process: Process, task: Task, variant: int, folder: Path) -> dict[str, Any]:
    """Load what a worker needs for a variant; fails if the untuned kernel itself does not work there.

    The answer holds ``seconds`` of a call of the untuned kernel if it was started by this.
    """
    seconds = process.settings.build_seconds
    process.renew()
    process.start()
    answer: dict[str, Any] = {"state": OK}
    for number in sorted({0, variant}):
        if (task.key, number) not in process.knows:
            file = str(data.write(task, number, folder))
            answer = process.call("load", seconds, task=task.key, variant=number, file=file)
            if answer["state"] != OK:
                return answer
            process.knows.add((task.key, number))
    if task.key not in process.knows:
        template = task.variants[0].template
        naive = template != winograd.TEMPLATE and 0 < task.operations <= NAIVE_OPERATIONS
        answer = process.call("start", 2 * seconds, task=task.key, naive=naive)
        if answer["state"] == OK:
            process.knows.add(task.key)
    return answer


def weigh(tasks: list[Task], pool: Pool, folder: Path, progress: Callable[[int], None]) -> None:
    """Time the untuned kernels where the pool runs them: what cannot be timed in a whole model there."""
    for i, task in enumerate(tasks):
        progress(i)
        answer = prepare(pool.processes[i % len(pool.processes)], task, 0, folder)
        task.seconds = task.calls * float(answer.get("seconds", 0.0))
    whole = sum(task.seconds for task in tasks)
    for task in tasks:
        task.share = task.seconds / whole if whole else 0.0
