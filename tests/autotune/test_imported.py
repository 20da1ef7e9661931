"""Databases of meta_schedule: what becomes a hint, what does not, and that hints are tried but never served."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tvm
from tvm import s_tir, te
from tvm.s_tir.meta_schedule.database import JSONDatabase, TuningRecord

from optc.autotune import imported, log
from optc.autotune.lookup import ANALYTIC, Lookup, answer_key
from optc.autotune.machine import machine_of
from optc.autotune.model import CostModel
from optc.autotune.record import HINT, parse
from optc.autotune.search import Candidate, Search
from optc.backends.cpu.target import resolve
from optc.backends.kernels.decisions import Knob, Space
from optc.backends.kernels.work import Work
from optc.backends.kernels.workload import Workload
from optc.errors import UsageError

MACHINE = machine_of(resolve("x86-64-v3"), 2)


def dense():
    a, b = te.placeholder((64, 48), "float32", "a"), te.placeholder((48, 32), "float32", "b")
    r = te.reduce_axis((0, 48), "r")
    return te.create_prim_func([a, b, te.compute((64, 32), lambda i, j: te.sum(a[i, r] * b[r, j], r), "c")])


def double():
    a = te.placeholder((64,), "float32", "a")
    return te.create_prim_func([a, te.compute((64,), lambda i: a[i] * 2.0, "c")])


def commit(database, function, seconds, *tiles):
    module = tvm.IRModule({"main": function})
    schedule = s_tir.Schedule(module)
    loops = schedule.get_loops(schedule.get_sblock("c"))
    for axis, factors in zip(loops, tiles, strict=False):
        schedule.sample_perfect_tile(axis, n=len(factors), max_innermost_factor=64, decision=factors)
    workload = database.commit_workload(module)
    target = tvm.target.Target({"kind": "llvm", "mcpu": "znver3"})
    database.commit_tuning_record(TuningRecord(schedule.trace, workload, seconds, target))


@pytest.fixture
def folder(tmp_path):
    database = JSONDatabase(work_dir=str(tmp_path))
    commit(database, dense(), [2e-3], [8, 1, 2, 4], [1, 1, 2, 16], [12, 4])
    commit(database, dense(), [1e-3, 3e-3, 1e-3], [8, 1, 1, 8], [4, 1, 1, 8], [48, 1])
    commit(database, dense(), [1e10], [8, 1, 1, 8], [4, 1, 1, 8], [48, 1])
    commit(database, dense(), [1e-3])
    commit(database, double(), [1e-3], [2, 2, 2, 8])
    return tmp_path


def test_register_tiles_become_hints(folder):
    found = imported.read(folder, MACHINE)
    assert [dict(r.decisions) for r in found.records] == [{"rows": 8, "vectors": 1}, {"rows": 4, "vectors": 2}]
    assert "meta_schedule measured 1 ms on znver3" in found.records[0].note
    assert found.skipped == {"it failed": 1, "its axes are not tiled in levels": 1, "it is no sum of products": 1}
    for record in found.records:
        assert record.state == HINT and parse(record.line) == record
    transposed = imported.product(Work(0, (1, 32, 64), (48,), "float32"))
    assert {r.workload.key for r in found.records} == {transposed.key}, "layouts differ, extents do not"


def test_only_the_fastest_of_a_workload_count(folder):
    database = JSONDatabase(work_dir=str(folder))
    for i in range(4):
        commit(database, dense(), [1e-4 * (i + 1)], [8, 1, 1, 8], [1, 1, 2, 16])
    found = imported.read(folder, MACHINE)
    assert len(found.records) == 3 and found.skipped["not among the fastest 3 of its workload"] == 3


def test_what_is_no_database_is_refused(folder, tmp_path_factory):
    with pytest.raises(UsageError, match="has no database_workload"):
        imported.read(tmp_path_factory.mktemp("empty"), MACHINE)
    (folder / imported.FILES[1]).write_text("nonsense\n")
    with pytest.raises(UsageError, match="cannot read the database"):
        imported.read(folder, MACHINE)


def test_hints_are_never_served(folder, tmp_path):
    path = tmp_path / "log"
    log.append(path, imported.read(folder, MACHINE).records)
    records = log.read(path).records
    found = Lookup(MACHINE, records)
    for workload in (records[0].workload, Workload({"op": "matmul", "m": 64, "k": 48, "n": 32, "dtype": "float32"})):
        found.schedule(workload)
        assert found.answers[answer_key(workload)].source == ANALYTIC
        assert found.layout(workload) == {}


def test_hints_are_tried_first_at_the_nearest_legal_decisions():
    def variant(vectors):
        workload = Workload({"op": "matmul", "m": 64}, (), {"vectors": vectors})
        knobs = {"rows": Knob(6, (1, 2, 4, 6), (4.0, 2.0, 1.2, 1.0)), "unroll": Knob(1, (1, 2), (1.0, 1.0))}
        return SimpleNamespace(
            workload=workload, layout=workload.layout, space=Space(knobs=knobs, taken={"rows": 6, "unroll": 1})
        )

    task = SimpleNamespace(key="t", workload=variant(2).workload, variants=[variant(2), variant(1), variant(4)])
    search = Search(task, CostModel({"t": task.workload}))
    search.hint({"rows": 3, "vectors": 3})
    ((gain, candidate),) = search.propose(1)
    assert candidate == Candidate(2, (("rows", 4),)) and gain > 0
    search.learn(candidate, 0.9)
    assert search.propose(1)[0][1] != candidate
    search.hint({"rows": 6, "vectors": 2})
    assert search.propose(1)[0][1] != search.zero
