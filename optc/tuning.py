"""How a build uses a tuning log: lookups for its machine, coverage, the records that travel in the artifact."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optc.autotune import log
from optc.autotune.lookup import ANALYTIC, EXACT, NEAREST, Answer, Lookup, answer_key, refusal
from optc.autotune.machine import machine_of
from optc.autotune.record import Record
from optc.backends.base import Build, Target
from optc.backends.kernels.workload import Workload
from optc.errors import MissingTuningError, UsageError
from optc.runtime.cpu import default_threads


@dataclass(frozen=True)
class Tuning:
    """A log to compile with. ``threads`` are those that the records were measured with (default: this machine's)."""

    path: Path
    threads: int | None = None
    required: bool = False


def lookup(tuning: Tuning, target: Target) -> tuple[Lookup, list[log.BadLine]]:
    """Return what serves ``target`` from the log, and the log's bad lines. Raises UsageError."""
    found = log.read(tuning.path)
    threads = tuning.threads or _threads(found.records, target)
    return Lookup(machine_of(target, threads), found.records), found.bad


def _threads(records: Iterable[Record], target: Target) -> int:
    """Return this machine's threads; for another one those of the log's records for it, if all agree."""
    if target.native:
        return default_threads()
    known = sorted({r.machine.threads for r in records if machine_of(target, r.machine.threads) == r.machine})
    if len(known) > 1:
        counts = ", ".join(map(str, known))
        raise UsageError(f"the log has records of {target.name} for {counts} threads", hint="choose with --threads")
    return known[0] if known else 1


def coverage(build: Build, served: Lookup) -> dict[str, Any]:
    """Return how many kernels that could be tuned got decisions from where, and which got none."""
    sources: dict[str, list[str]] = {EXACT: [], NEAREST: [], ANALYTIC: []}
    for kernel, workload in sorted(build.workloads.items()):
        sources[_answer(served, workload).source].append(kernel)
    return {
        "kernels": len(build.workloads),
        **{source: len(names) for source, names in sources.items()},
        "machine": str(served.machine),
        "untuned": sources[ANALYTIC],
    }


def require(build: Build, served: Lookup) -> None:
    """Raise MissingTuningError that names every kernel with a template that has no record of its own.

    The schedule of others is a rule, and some of them come and go with the layouts around them.
    """
    missing = {
        name: workload
        for name, workload in sorted(build.workloads.items())
        if workload.operator != "generic" and _answer(served, workload).source != EXACT
    }
    if missing:
        lines = "\n".join(f"  - {name}: {workload}" for name, workload in missing.items())
        raise MissingTuningError(
            f"{len(missing)} of {len(build.workloads)} kernels have no tuning record for {served.machine}:\n{lines}",
            hint="`optc tune MODEL --log LOG` measures them; `optc log why` tells why records were not used",
        )


def used(build: Build, served: Lookup) -> str:
    """Return the records that decided something about the build, as the text of a log."""
    answers = [_answer(served, workload) for workload in build.workloads.values()]
    records = [r for answer in answers if answer.choice is not None for r in answer.choice.records]
    return log.dump(records).decode()


def explain(path_or_model: Any, tuning: Tuning, target: str, **capture_options: Any) -> list[dict[str, str]]:
    """Return for each kernel of a model what the log gives it and why not more, without generating code."""
    from optc import driver

    model = driver.optimize(path_or_model, portable=False, **capture_options)
    resolved = driver.resolve_target(target)
    served, _ = lookup(tuning, resolved)
    kernels = driver.backend(resolved, None, (), served).schedule(model).kernels
    return [
        {"kernel": kernel.name, "workload": str(kernel.workload), **_reason(kernel, served)}
        for kernel in kernels
        if kernel.workload is not None
    ]


def _reason(kernel: Any, served: Lookup) -> dict[str, str]:
    workload = kernel.workload
    if not workload.fixed:
        return {"source": ANALYTIC, "why": "its sizes are not known before a run"}
    if not kernel.tunable:
        return {"source": ANALYTIC, "why": "there is nothing to decide about it"}
    answer = _answer(served, workload)
    refused = (
        f"; not legal here, so the nearest was taken: {', '.join(kernel.space.refused)}" if kernel.space.refused else ""
    )
    if answer.choice is not None:
        where = (
            "" if answer.source == EXACT else f" of {answer.choice.workload}, {answer.distance:.1f} factors of two away"
        )
        faster = (
            f"{1 / answer.choice.ratio:.3f} x the untuned kernel" if answer.decisions else "the untuned kernel is best"
        )
        return {"source": answer.source, "why": f"{len(answer.choice.records)} records{where}: {faster}{refused}"}
    if answer.stale:
        return {"source": ANALYTIC, "why": "its records are relative to an untuned kernel that has changed since"}
    own = [r for r in served.records if r.workload.key == workload.key]
    reasons = sorted({refusal(r, served.machine) or f"measured, but it failed: {r.state}" for r in own})
    return {"source": ANALYTIC, "why": "; ".join(reasons) or "no record of this workload or of one near it"}


def _answer(served: Lookup, workload: Workload) -> Answer:
    answers: Mapping[tuple[str, str], Answer] = served.answers
    return answers.get(answer_key(workload), Answer(ANALYTIC, {}))
