"""Databases of TVM's meta_schedule as hints: what to try first, never what to serve.

A record there is a trace of schedule primitives for a function of its own layout, with the time that it took; there is
no untuned kernel beside it, so it proves nothing about ours. What carries over is the register tile: meta_schedule
tiles each axis of a sum of products in levels, and the innermost level of the axes of the output is its tile of rows
and columns. That becomes a record in state "hint". Traces of other kernels, or tiled otherwise, say nothing here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from tvm import tirx

from optc.autotune.machine import Machine
from optc.autotune.record import HINT, Record, tvm_version
from optc.autotune.tasks import Task
from optc.backends.kernels import contraction
from optc.backends.kernels.fused import bits
from optc.backends.kernels.templates import VERSIONS
from optc.backends.kernels.work import Work, work
from optc.backends.kernels.workload import Workload
from optc.errors import UsageError

FILES = ("database_workload.json", "database_tuning_record.json")
OPERATOR = "product"
_BEST = 3
"""Records of a workload that become hints: the fastest ones."""
_LEVELS = 4
"""How often meta_schedule tiles an axis of the output on a CPU."""


@dataclass
class Imported:
    """Hints, and how many records of the database gave none, by reason."""

    records: list[Record] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


def read(folder: Path, machine: Machine) -> Imported:
    """Return what a database says to the templates here; raises UsageError if there is none in ``folder``."""
    from tvm.s_tir.meta_schedule.database import JSONDatabase

    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise UsageError(f"{folder} is no database of meta_schedule: it has no {' and no '.join(missing)}")
    try:
        database = JSONDatabase(work_dir=str(folder), allow_missing=False)
        entries = [(entry, _seconds(entry)) for entry in database.get_all_tuning_records()]
    except (RuntimeError, ValueError, TypeError) as error:  # TVM's own, of several types
        raise UsageError(f"TVM cannot read the database in {folder}: {str(error).splitlines()[0]}") from error
    found, seen = Imported(), Counter[str]()
    for entry, seconds in sorted(entries, key=lambda e: e[1]):
        hint = _hint(entry, seconds, machine)
        if isinstance(hint, str):
            found.skipped[hint] += 1
        elif seen[hint.workload.key] >= _BEST:
            found.skipped[f"not among the fastest {_BEST} of its workload"] += 1
        else:
            seen[hint.workload.key] += 1
            found.records.append(hint)
    return found


def _seconds(entry: Any) -> float:
    # A candidate that failed has a time of 1e10 there.
    return median(float(s) for s in entry.run_secs) if entry.run_secs else 1e10


def _hint(entry: Any, seconds: float, machine: Machine) -> Record | str:
    if seconds >= 1e9:
        return "it failed"
    functions = [f for f in entry.workload.mod.functions.values() if isinstance(f, tirx.PrimFunc)]
    asked = work(functions[0]) if len(functions) == 1 else None
    if asked is None:
        return "it is no sum of products"
    tiles = _tiles(entry.trace)
    if len(tiles) != len(asked.outputs):
        return "its axes are not tiled in levels"
    *rows, columns = [tile[-1] for tile in tiles]
    height = 1
    for tile in rows:
        height *= tile
    lanes = machine.vector_bits // bits(asked.dtype)
    return Record(
        workload=product(asked),
        template=contraction.TEMPLATE,
        template_version=VERSIONS[contraction.TEMPLATE],
        decisions={"rows": height, "vectors": max(1, -(-columns // lanes))},
        defaults={},
        machine=machine,
        tvm=tvm_version(),
        state=HINT,
        note=f"meta_schedule measured {seconds * 1e3:.4g} ms on {_target(entry)}",
    )


def _tiles(trace: Any) -> list[list[int]]:
    """Return the factors of each tiled axis of the output, in order."""
    found = []
    for instruction in trace.insts:
        if str(instruction.kind.name) == "SamplePerfectTile":
            factors = [int(f) for f in trace.get_decision(instruction) or ()]
            if len(factors) == _LEVELS:
                found.append(factors)
    return found


def _target(entry: Any) -> str:
    described = entry.target.export() if entry.target is not None else {}
    return str(described.get("mcpu", described.get("kind", "an unknown target")))


def product(asked: Work) -> Workload:
    """Return the workload of hints: the extents of a sum of products, whatever its operator."""
    return Workload({"op": OPERATOR, "outputs": _long(asked.outputs), "summed": _long(asked.summed)})


def product_of(task: Task) -> str | None:
    """Return the key of the hints for a task, None for what is no sum of products."""
    asked = work(task.variants[0].function)
    return product(asked).key if asked is not None else None


def _long(extents: Sequence[int]) -> list[int]:
    """Return extents in ascending order, since layouts differ, without those of one step."""
    return sorted(e for e in extents if e != 1)
