"""Builds with a tuning log: what is served, required, reported, carried, and reproduced byte for byte."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx.parser
import pytest

from optc import driver
from optc.autotune import log
from optc.autotune.machine import machine_of
from optc.autotune.record import MODEL, Record, tvm_version
from optc.backends.kernels.templates import VERSIONS
from optc.backends.kernels.workload import Workload
from optc.errors import MissingTuningError, UsageError
from optc.runtime import read_tuning
from optc.runtime.cpu import default_threads
from optc.tuning import Tuning, explain

CORE = {"op": "matmul", "m": 40, "k": 24, "n": 48, "dtype": "float32"}


def make_model(rows=40):
    graph = f"g (float[{rows}, 24] x) => (float[{rows}, 48] y) {{ y = MatMul(x, w) }}"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {graph}')
    weights = np.random.default_rng(0).standard_normal((24, 48)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    return model


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(make_model(), path)
    return path


@pytest.fixture
def record():
    """Return the record of a choice for the model that has other panels than the untuned kernel, and other rows."""
    target = driver.resolve_target("cpu")
    return Record(
        workload=Workload(CORE, (), {"vectors": 1}),
        template="contraction",
        template_version=VERSIONS["contraction"],
        decisions={"rows": 2, "vectors": 1},
        defaults={"rows": 5, "vectors": 2},
        machine=machine_of(target, default_threads()),
        tvm=tvm_version(),
        seconds=(0.5e-3,),
        baseline=(1e-3,),
        where=MODEL,
    )


@pytest.fixture
def tuned(tmp_path, record):
    path = tmp_path / "log.jsonl"
    log.append(path, [record, replace(record, note="again", seconds=(0.6e-3,))])
    return path


def test_records_decide_and_travel(model, tuned, tmp_path):
    artifact = driver.compile(str(model), tuning=Tuning(tuned, required=True))
    (kernel,) = artifact.report["kernels"]
    assert kernel["decisions"]["rows"] == 2
    coverage = artifact.report["tuning"]
    assert (coverage["kernels"], coverage["exact"], coverage["nearest"], coverage["analytic"]) == (1, 1, 0, 0)
    assert artifact.report["verification"]["outputs"][0]["relative"] < 1e-5
    (weight,) = [w for w in artifact.manifest.weights if w.name.endswith("packed")]
    assert weight.shape[-1] == driver.resolve_target("cpu").lanes(32), "one vector to a panel"
    artifact.save(tmp_path / "m.optc")
    assert read_tuning(tmp_path / "m.optc") == log.dump(log.read(tuned).records)


def test_the_same_log_gives_the_same_bytes(model, tuned, tmp_path):
    first = driver.compile(str(model), tuning=Tuning(tuned))
    log.rewrite(tuned, lambda found: found.records)
    second = driver.compile(str(model), tuning=Tuning(tuned))
    for artifact, name in ((first, "a.optc"), (second, "b.optc")):
        artifact.save(tmp_path / name)
    assert (tmp_path / "a.optc").read_bytes() == (tmp_path / "b.optc").read_bytes()


def test_missing_records_are_an_error_that_names_them(model, tuned, tmp_path):
    onnx.save(make_model(rows=48), model)
    with pytest.raises(MissingTuningError, match=r"1 of 1 kernels .*\n  - matmul: matmul dtype=float32 k=24 m=48 n=48"):
        driver.compile(str(model), tuning=Tuning(tuned, required=True))
    assert MissingTuningError.exit_code == 5
    coverage = driver.compile(str(model), tuning=Tuning(tuned)).report["tuning"]
    assert coverage["nearest"] == 1
    with pytest.raises(UsageError, match="cannot read the tuning log"):
        driver.compile(str(model), tuning=Tuning(tmp_path / "none"))


def test_a_log_of_another_machine_changes_nothing(model, record, tmp_path):
    path = tmp_path / "other.jsonl"
    log.append(path, [replace(record, machine=replace(record.machine, cpu="other"))])
    path.open("a").write("damaged\n")
    artifact = driver.compile(str(model), tuning=Tuning(path))
    assert artifact.code == driver.compile(str(model)).code
    assert artifact.tuning == ""
    assert artifact.report["tuning"]["untuned"] == ["matmul"]
    assert artifact.report["tuning"]["log"]["bad_lines"] == [2]


def test_records_relative_to_another_untuned_kernel_are_not_served(model, record, tmp_path):
    path = tmp_path / "old.jsonl"
    target = driver.resolve_target("cpu")
    (kernel,) = driver.backend(target).schedule(driver.optimize(str(model))).kernels
    layout = dict(kernel.workload.layout)
    other = next(o for o in kernel.space.knobs["rows"].options if o not in (2, kernel.space.taken["rows"]))
    own = replace(record, workload=kernel.workload, decisions={**layout, "rows": 2}, defaults={**layout, "rows": other})
    log.append(path, [own])
    assert driver.compile(str(model), tuning=Tuning(path)).code == driver.compile(str(model)).code
    (row,) = explain(str(model), Tuning(path), "cpu")
    assert row["source"] == "analytic" and "has changed since" in row["why"]


def test_explanations(model, tuned, record, tmp_path):
    (row,) = explain(str(model), Tuning(tuned), "cpu")
    assert row["source"] == "exact" and "2 records: 1.8" in row["why"]
    other = tmp_path / "other.jsonl"
    log.append(other, [replace(record, tvm="0.1")])
    (row,) = explain(str(model), Tuning(other), "cpu")
    assert row["source"] == "analytic" and "measured with TVM 0.1" in row["why"]


def test_threads_of_another_machine_come_from_the_log(model, record, tmp_path):
    path, target = tmp_path / "arm.jsonl", driver.resolve_target("aarch64")
    arm = replace(record, machine=machine_of(target, 8))
    log.append(path, [arm])
    kernels = explain(str(model), Tuning(path), "aarch64")
    assert kernels[0]["source"] == "exact"
    log.append(path, [replace(arm, machine=machine_of(target, 4))])
    with pytest.raises(UsageError, match="for 4, 8 threads"):
        explain(str(model), Tuning(path), "aarch64")
    assert explain(str(model), Tuning(path, threads=4), "aarch64")[0]["source"] == "exact"
