"""One line of a tuning log: a measurement of one decision about one workload on one machine, complete in itself.

docs/autotuning.md describes the fields. Each line carries the CRC-32 of the rest, so that a damaged one is found even
where it still is JSON.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from statistics import median
from typing import Any

from optc.autotune.machine import Machine
from optc.backends.kernels import workload as workloads
from optc.backends.kernels.decisions import TRACE, number_of
from optc.backends.kernels.workload import Workload
from optc.errors import OptcError

FORMAT = 1
OK = "ok"
KEPT = "kept"
HINT = "hint"
FAILURES = ("crash", "timeout", "memory", "wrong", "error")
"""How a candidate can fail: it killed its worker, hung, took too much memory, gave wrong numbers, did not build."""
STATES = (OK, KEPT, HINT, *FAILURES)
ALONE, MODEL = "alone", "model"
"""Where a kernel was timed: by itself, or inside of the whole model."""


class BadRecordError(OptcError):
    """A line of a log that is no record; the message says why."""


@dataclass(frozen=True)
class Record:
    """What was measured.

    ``decisions`` are all that differ or could differ, ``defaults`` the untuned ones, of layout and template alike.
    ``seconds`` and ``baseline`` are samples of the candidate and of the untuned kernel, taken in turns. ``state`` is
    "ok", a failure, "kept" (it was decided not to search, for the ``note``'s reason), or "hint": not measured here, to
    be tried first. ``trace`` is the text of the one that the decisions name, if they do.
    """

    workload: Workload
    template: str
    template_version: int
    decisions: Mapping[str, int]
    defaults: Mapping[str, int]
    machine: Machine
    tvm: str
    state: str = OK
    where: str = ALONE
    seconds: tuple[float, ...] = ()
    baseline: tuple[float, ...] = ()
    noise: float = 0.0
    error: float = 0.0
    note: str = ""
    trace: str = ""

    @property
    def ratio(self) -> float:
        """The candidate's time over that of the untuned kernel in the same turn, median; infinite for a failure."""
        return paired(self.seconds, self.baseline) if self.state == OK else math.inf

    @cached_property
    def choice(self) -> str:
        """The decisions as text."""
        return json.dumps(dict(self.decisions), sort_keys=True, separators=(",", ":"))

    @cached_property
    def line(self) -> str:
        """The record as a line, without its end."""
        body = {
            "format": FORMAT,
            "workload": self.workload.describe(),
            "template": [self.template, self.template_version],
            "decisions": dict(self.decisions),
            "defaults": dict(self.defaults),
            "machine": asdict(self.machine),
            "tvm": self.tvm,
            "state": self.state,
            "where": self.where,
            "seconds": [_short(s) for s in self.seconds],
            "baseline": [_short(s) for s in self.baseline],
            "noise": _short(self.noise),
            "error": _short(self.error),
            "note": self.note,
        }
        if self.trace:
            body["trace"] = self.trace
        return _dump(body | {"crc": zlib.crc32(_dump(body).encode())})


def parse(line: str) -> Record:
    """Return the record of a line; raises BadRecordError."""
    try:
        data = json.loads(line)
        crc = data.pop("crc")
    except (ValueError, RecursionError, TypeError, AttributeError, KeyError) as error:
        raise BadRecordError("not a JSON object with a checksum") from error
    if data.get("format") != FORMAT:
        raise BadRecordError(f"format {data.get('format')!r}; this optc reads {FORMAT}")
    if zlib.crc32(_dump(data).encode()) != crc:
        raise BadRecordError("damaged: the checksum does not fit")
    try:
        return _record(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadRecordError(f"incomplete: {error}") from error


def _record(data: dict[str, Any]) -> Record:
    name, number = data["template"]
    record = Record(
        workload=workloads.parse(data["workload"]),
        template=str(name),
        template_version=int(number),
        decisions={str(k): int(v) for k, v in data["decisions"].items()},
        defaults={str(k): int(v) for k, v in data["defaults"].items()},
        machine=Machine(**data["machine"]),
        tvm=str(data["tvm"]),
        state=str(data["state"]),
        where=str(data["where"]),
        seconds=tuple(float(s) for s in data["seconds"]),
        baseline=tuple(float(s) for s in data["baseline"]),
        noise=float(data["noise"]),
        error=float(data["error"]),
        note=str(data["note"]),
        trace=str(data.get("trace", "")),
    )
    if record.decisions.get(TRACE, 0) != (number_of(record.trace) if record.trace else 0):
        raise ValueError("the trace is not the one that was decided for")
    if record.state not in STATES or record.where not in (ALONE, MODEL):
        raise ValueError(f"state {record.state!r} at {record.where!r}")
    samples = [*record.seconds, *record.baseline]
    if any(not math.isfinite(s) or s <= 0 for s in samples):
        raise ValueError("times must be positive")
    if len(record.seconds) != len(record.baseline) or (record.state == OK and not samples):
        raise ValueError("samples do not come in pairs")
    return record


def paired(seconds: Sequence[float], baseline: Sequence[float]) -> float:
    """Return the median of the ratios of samples that were taken right after each other."""
    return median(s / b for s, b in zip(seconds, baseline, strict=True))


def tvm_version() -> str:
    """Return the version of TVM that compiles here."""
    return version("apache-tvm")


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
