"""Tuning a model: measure it untuned, search for better kernels, and compare the artifacts before anything is believed.

A kernel alone is not a kernel in a model, where its neighbours have used the caches. So what the search found is built
into a whole artifact and timed kernel by kernel beside the untuned one; these measurements go into the log too, and
count more than those of kernels alone: what did not get faster in the model is not used.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx_ir as oir

from optc import driver, sample, verification
from optc.autotune import log
from optc.autotune.lookup import Lookup
from optc.autotune.machine import Machine, machine_of
from optc.autotune.place import Tracker
from optc.autotune.pool import Pool, Settings
from optc.autotune.record import MODEL, OK, Record
from optc.autotune.tasks import Task, extract
from optc.autotune.tuner import Budget, Status, Tuner, weigh
from optc.backends.base import ALGORITHMS, Build, Target
from optc.errors import OptcError, UsageError
from optc.passes import pipeline
from optc.runtime import Model
from optc.runtime.cpu import architecture, default_threads, missing_features
from optc.source import capture
from optc.timing import alternate

COMPARE_SECONDS = 6.0
"""What a comparison of two artifacts may take, at least a few runs of each."""
_LAST = 1 / 30
"""The part of the time for the last comparison, if that is longer: a gain of 2 % takes many runs to be told."""
ROUND_SECONDS = 2.5
"""The same for one round of kernels that were timed alone only."""
_ALONE = 0.55
"""The part of the time for kernels alone; the rest is for artifacts."""
_FEW_ROUNDS, _MOST_ROUNDS = 3, 40
_ACTIVATIONS = 4 << 20
"""Bytes of activations to cycle through: more than the caches of a core."""
_PROFILES = 5
_RUNS, _PROFILE_SECONDS = 3, 0.1
"""What a profile is the median of: at least this many runs, and as many as there is time for."""


@dataclass(frozen=True)
class Plan:
    """What to spend and how to measure. ``seconds`` counts everything, ``trials`` candidates; None is no limit.

    With a ``tracker``, kernels run on its servers, alone and with warm caches: there is no comparison of whole models.
    """

    log: Path
    seconds: float | None = None
    trials: int | None = None
    threads: int | None = None
    cold: bool = True
    tracker: Tracker | None = None


@dataclass
class Kernel:
    """A tuned kernel of the final comparison: milliseconds in the model."""

    name: str
    workload: str
    decisions: dict[str, int]
    untuned: float
    tuned: float


@dataclass
class Outcome:
    """What came out. Times in milliseconds, alternating in one process; None if it was interrupted before.

    They are None too where kernels ran on ``servers``.
    """

    machine: Machine
    tasks: int
    servers: int = 0
    skipped: int = 0
    trials: int = 0
    failures: int = 0
    rounds: int = 0
    stopped: str = ""
    curve: list[tuple[float, int, float]] = field(default_factory=list)
    untuned: float | None = None
    tuned: float | None = None
    kernels: list[Kernel] = field(default_factory=list)
    interrupted: bool = False

    @property
    def speedup(self) -> float | None:
        """The untuned time over the tuned one."""
        return self.untuned / self.tuned if self.untuned and self.tuned else None


@dataclass
class _Built:
    """An artifact in memory with what its kernels compute."""

    model: Model
    workloads: dict[str, str]
    weights: int
    served: Lookup | None = None
    runs: int = 0
    """To a profile; 0 while nothing was run."""


Progress = Callable[[str, Status | None], None]


def tune(
    path_or_model: Any,
    plan: Plan,
    *,
    target: str = "cpu",
    disable_passes: Collection[str] = (),
    progress: Progress = lambda _stage, _status: None,
    **capture_options: Any,
) -> Outcome:
    """Tune the kernels of a model for this machine and write what was measured into ``plan.log``.

    ``progress`` is told each stage, and during the search how far it is. An interruption ends the search; what was
    measured is in the log, and the next run goes on from there.

    Raises:
        UsageError, InvalidModelError, UnsupportedModelError; OptcError where workers do not start.
    """
    start = time.monotonic()
    resolved = driver.resolve_target(target)
    if plan.tracker is None:
        _check_runs_here(target, resolved)
    elif plan.threads is None:
        raise UsageError("how many threads the servers have is not known here", hint="--threads N")
    servers = plan.tracker.servers() if plan.tracker else 0
    threads = plan.threads or default_threads()
    machine = machine_of(resolved, threads)
    progress("capturing", None)
    model = capture(path_or_model, **capture_options)
    algorithms = ALGORITHMS.intersection(disable_passes)
    integers = verification.integer_choices(model)
    pipeline.run(model, disable=set(disable_passes) - algorithms)
    settings = Settings(target, threads, tracker=plan.tracker)
    rounds: _Rounds | None = None
    if plan.tracker is None:
        progress("building untuned", None)
        rounds = _Rounds.of(model, resolved, algorithms, machine, plan.log, integers)
        if plan.cold:
            settings = replace(settings, weights=rounds.untuned.weights, activations=_ACTIVATIONS)
    progress("finding tasks", None)
    tasks = extract(model, resolved, algorithms)
    if not tasks:
        raise UsageError("nothing to tune: no kernel of the model has fixed sizes", hint="fix them with --dim")
    outcome = Outcome(machine, len(tasks), servers)
    with (
        tempfile.TemporaryDirectory(prefix="optc-tune-") as temporary,
        Pool(settings, servers or default_threads()) as pool,
    ):
        folder = Path(temporary)
        if rounds is not None:
            rounds.weigh(tasks)
        else:
            weigh(tasks, pool, folder, lambda i: progress(f"untuned kernels, {i + 1} of {len(tasks)}", None))
        tuner = Tuner(tasks, machine, pool, plan.log, folder, _budget(plan, time.monotonic() - start))
        tuner.progress = lambda status: progress("tuning", status)
        try:
            tuner.run()
            pool.stop()
            if rounds is not None:
                progress("comparing in the model", None)
                last = max(COMPARE_SECONDS, (plan.seconds or 0) * _LAST)
                left = None if plan.seconds is None else plan.seconds - rounds.build_seconds - COMPARE_SECONDS - last
                rounds.run(
                    None if left is None else start + left,
                    lambda number: progress(f"comparing in the model, round {number}", None),
                )
                progress("comparing artifacts", None)
                rounds.finish(outcome, last)
        except KeyboardInterrupt:
            tuner.stopped, outcome.interrupted = "interrupted", True
    offset = tuner.start - start
    outcome.skipped, outcome.trials, outcome.failures = len(tuner.skipped), tuner.trials, tuner.failures
    outcome.curve = [(seconds + offset, trials, predicted) for seconds, trials, predicted in tuner.curve]
    outcome.stopped, outcome.rounds = tuner.stopped, rounds.done if rounds is not None else 0
    return outcome


def _check_runs_here(name: str, target: Target) -> None:
    missing = [] if target.native else missing_features(target.features)
    if missing or architecture(target.triple) != os.uname().machine:
        what = f"lacks {', '.join(missing)}" if missing else f"is {os.uname().machine}"
        raise UsageError(
            f"kernels for '{name}' cannot be measured here: this machine {what}",
            hint="--target cpu, or --rpc-tracker to measure on another machine",
        )


def _budget(plan: Plan, spent: float) -> Budget:
    """Return what is left for kernels alone."""
    if plan.seconds is None:
        return Budget(None, plan.trials)
    left = plan.seconds - spent
    part = left if plan.tracker else (left - COMPARE_SECONDS) * _ALONE
    return Budget(max(plan.seconds / 3, part), plan.trials)


def _build(model: oir.Model, target: Target, without: Collection[str], threads: int, served: Lookup | None) -> _Built:
    build: Build = driver.backend(target, None, without, served).build(model.clone())
    loaded = driver.pack(model, build, target, report={}).model()
    loaded.threads = threads
    weights = sum(array.nbytes for array in build.weights.values())
    return _Built(loaded, {name: workload.key for name, workload in build.workloads.items()}, weights, served)


def _times(built: _Built, inputs: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the seconds of one run by task; under "" those of all kernels."""
    totals: dict[str, float] = {"": 0.0}
    if not built.runs:
        built.model.run(inputs)
        start = time.monotonic()
        built.model.run(inputs)
        built.runs = max(_RUNS, round(_PROFILE_SECONDS / (time.monotonic() - start)))
    for kernel in built.model.profile(inputs, repeat=built.runs):
        key = built.workloads.get(kernel.name)
        totals[""] += kernel.seconds
        if key is not None:
            totals[key] = totals.get(key, 0.0) + kernel.seconds
    return totals


@dataclass
class _Rounds:
    """Comparisons of whole artifacts: each holds for every kernel the best choice that was not timed in a model yet."""

    model: oir.Model
    target: Target
    without: Collection[str]
    machine: Machine
    log: Path
    untuned: _Built
    inputs: Mapping[str, np.ndarray]
    build_seconds: float
    done: int = 0

    @classmethod
    def of(
        cls,
        model: oir.Model,
        target: Target,
        without: Collection[str],
        machine: Machine,
        log: Path,
        integers: Mapping[str, Sequence[int]],
    ) -> _Rounds:
        """Build the untuned model, with random inputs."""
        began = time.monotonic()
        untuned = _build(model, target, without, machine.threads, None)
        wanted = untuned.model.inputs
        inputs = sample.random_inputs(wanted, dims=sample.default_dims(wanted), integers=integers)
        return cls(model, target, without, machine, log, untuned, inputs, time.monotonic() - began)

    def weigh(self, tasks: list[Task]) -> None:
        """Tell each task what its calls take in the untuned model."""
        profiles = [_times(self.untuned, self.inputs) for _ in range(_PROFILES)]
        whole = median(p[""] for p in profiles)
        for task in tasks:
            task.seconds = median(p.get(task.key, 0.0) for p in profiles)
            task.share = task.seconds / whole

    def run(self, end: float | None, progress: Callable[[int], None]) -> None:
        """Compare until ``end`` of the clock, at least once; without such an end a few times."""
        most = _FEW_ROUNDS if end is None else _MOST_ROUNDS
        while self.done < most and (not self.done or end is None or time.monotonic() < end):
            served = Lookup(self.machine, self._records(), explore=True)
            tuned = self._build(served)
            if not served.exploring:
                return
            self.done += 1
            progress(self.done)
            _, records = _compare(self.untuned, tuned, self.inputs, ROUND_SECONDS)
            log.append(self.log, records)

    def finish(self, outcome: Outcome, seconds: float) -> None:
        """Time what the log serves now; what does not hold once more is not served afterwards."""
        for last in (False, True):
            tuned = self._build(Lookup(self.machine, self._records()))
            outcome.kernels, records = _compare(self.untuned, tuned, self.inputs, COMPARE_SECONDS)
            log.append(self.log, records)
            if last or all(r.ratio < 1.0 for r in records):
                break
        timings = alternate(
            {"untuned": lambda: self.untuned.model.run(self.inputs), "tuned": lambda: tuned.model.run(self.inputs)},
            seconds=seconds,
        )
        outcome.untuned, outcome.tuned = (timing.median for timing in timings)
        errors = verification.compare_all(tuned.model.run(self.inputs), self.untuned.model.run(self.inputs))
        wrong = [e.name for e in errors if not e.within(None) and e.dtype in verification.TOLERANCE]
        if wrong:
            raise OptcError(f"tuned and untuned artifact differ in {', '.join(wrong)}", hint="please report this log")

    def _records(self) -> list[Record]:
        return log.read(self.log).records if self.log.exists() else []

    def _build(self, served: Lookup) -> _Built:
        return _build(self.model, self.target, self.without, self.machine.threads, served)


def _compare(
    untuned: _Built, tuned: _Built, inputs: Mapping[str, np.ndarray], seconds: float
) -> tuple[list[Kernel], list[Record]]:
    """Time both artifacts kernel by kernel, in turns; returns the kernels that differ, and records of them."""
    assert tuned.served is not None
    samples: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])
    end = time.monotonic() + seconds
    while len(samples[0]) < 3 or time.monotonic() < end:
        for built, into in zip((untuned, tuned), samples, strict=True):
            into.append(_times(built, inputs))
    names = {key: name for name, key in sorted(tuned.workloads.items(), reverse=True)}
    kernels, records = [], []
    for (key, _), answer in sorted(tuned.served.answers.items()):
        choice = answer.choice
        if choice is None or not answer.decisions or key not in names or choice.workload.key != key:
            continue
        pairs = [(a[key], b[key]) for a, b in zip(*samples, strict=True) if a.get(key) and b.get(key)]
        if not pairs:
            continue
        before, after = (tuple(p[i] for p in pairs) for i in (0, 1))
        base = median(before)
        noise = median(abs(s - base) for s in before) / base
        first = choice.records[0]
        records.append(replace(first, state=OK, where=MODEL, seconds=after, baseline=before, noise=noise, note=""))
        decisions = {k: v for k, v in choice.decisions.items() if choice.defaults.get(k) != v}
        kernels.append(Kernel(names[key], str(choice.workload), decisions, base * 1e3, median(after) * 1e3))
    return sorted(kernels, key=lambda k: k.tuned - k.untuned), records
