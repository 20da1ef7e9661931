"""Workers: a candidate that crashes, hangs, is wrong or takes all memory costs itself only."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import tirx

from optc.autotune.pool import Pool, Process, Settings, WorkerStartError
from optc.autotune.worker import difference
from optc.backends.kernels import loops

SETTINGS = Settings("cpu", threads=2, weights=1 << 20, activations=1 << 18, megabytes=2048)


@pytest.fixture(scope="module")
def process():
    with Pool(SETTINGS, 1) as pool:
        yield pool.processes[0]


def start(process, kernels):
    assert process.call("load", 60, task="t", variant=0, file=kernels["right"])["state"] == "ok"
    answer = process.call("start", 60, task="t", naive=True)
    assert answer["state"] == "ok", answer


def build(process, decisions=None, variant=0, number=1, seconds=60):
    return process.call("build", seconds, task="t", variant=variant, decisions=decisions or {}, number=number)


def test_a_candidate_is_built_compared_and_measured(process, kernels):
    start(process, kernels)
    built = build(process, {"rows": 3})
    assert built["state"] == "ok"
    assert built["taken"]["rows"] == 3 and built["error"] < 1
    measured = process.call("measure", 60, task="t", number=1, rounds=3, best=1.0)
    assert measured["state"] == "ok"
    assert len(measured["seconds"]) == len(measured["baseline"]) >= 2
    assert min(measured["seconds"] + measured["baseline"]) > 0


def test_an_illegal_decision_is_an_error_of_the_candidate(process, kernels):
    start(process, kernels)
    answer = build(process, {"rows": 99})
    assert answer["state"] == "error" and "IllegalDecisionError" in answer["note"]
    assert build(process)["state"] == "ok"


def test_wrong_numbers_are_found(process, kernels):
    start(process, kernels)
    assert process.call("load", 60, task="t", variant=1, file=kernels["wrong"])["state"] == "ok"
    assert build(process, variant=1)["state"] == "wrong"
    assert build(process)["state"] == "ok"


def call(name, *arguments):
    return tirx.Evaluate(tirx.call_extern("int32", name, *arguments))


def hoard():
    buffer, allocate = loops.scratch("hoard", 1 << 34, "float32")
    return loops.sequence(
        allocate, loops.loop("i", 1 << 34, lambda i: loops.store(buffer, i, tirx.const(1, "float32")))
    )


FAULTS = {
    "crash": (lambda: call("abort"), "crash", "SIGABRT"),
    "hang": (lambda: call("pause"), "timeout", "no answer within 2 s"),
    "hoard": (hoard, "memory", "alloc"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_candidate_that_ends_its_process_costs_itself_only(kernels, faulty, name, tmp_path):
    make, state, word = FAULTS[name]
    process = Process(SETTINGS)
    try:
        start(process, kernels)
        process.knows.add("t")
        file = faulty(tmp_path / "c.npz", make())
        assert process.call("load", 60, task="t", variant=1, file=file)["state"] == "ok"
        answer = build(process, variant=1, seconds=2 if name == "hang" else 60)
        assert answer["state"] == state, answer
        assert word in answer["note"]
        gone = process.child is None
        assert gone == (state != "memory") and gone == (not process.knows)
        if name != "hang":
            if gone:
                start(process, kernels)
            assert build(process)["state"] == "ok"
    finally:
        process.stop()


def test_a_worker_that_does_not_start_is_one_clear_error(monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(WorkerStartError, match="does not start"):
        Process(SETTINGS).start()


def test_what_counts_as_right():
    exact = np.array([1.0, -4.0, np.nan], np.float32)
    assert difference([exact], [exact]) == 0
    assert difference([exact + np.float32(2e-4)], [exact]) == pytest.approx(0.5, rel=0.01)
    assert difference([exact + np.float32(1e-3)], [exact]) > 1
    assert difference([np.array([np.nan, 1], np.float32)], [np.ones(2, np.float32)]) is None
    assert difference([np.array([3], np.int8)], [np.array([4], np.int8)]) == 1
    assert difference([np.array([3], np.int8)], [np.array([5], np.int8)]) > 1
    assert difference([np.zeros(1, np.float32)], [np.zeros(1, np.float32)]) == 0
    assert difference([np.ones(1, np.float32)], [np.zeros(1, np.float32)]) > 1
