"""Tuning end to end, on a small model: search, comparison in the model, the log, resuming, the command line."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx.parser
import pytest
from click.testing import CliRunner

from optc import driver, plot, tuner
from optc.autotune import log
from optc.autotune.evolution import Evolution
from optc.autotune.record import KEPT, MODEL, OK
from optc.cli import cli
from optc.errors import UsageError
from optc.tuner import Plan, tune
from optc.tuning import Tuning


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[1, 32, 28, 28] x) => (float[1, 48, 28, 28] y)
        { c = Conv(x, w)  r = Relu(c)  d = Conv<pads = [1, 1, 1, 1]>(r, v)  y = Relu(d) }"""
    model = onnx.parser.parse_model(text)
    generator = np.random.default_rng(0)
    for name, shape in (("w", (64, 32, 1, 1)), ("v", (48, 64, 3, 3))):
        array = generator.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module", autouse=True)
def _short():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuner, "COMPARE_SECONDS", 0.2)
        patch.setattr(tuner, "ROUND_SECONDS", 0.1)
        yield


@pytest.fixture(scope="module")
def tuned(model):
    path = model.with_name("log.jsonl")
    return path, tune(str(model), Plan(path, trials=6))


def test_every_trial_is_in_the_log(tuned):
    path, outcome = tuned
    assert 0 < outcome.trials <= 6, "fewer if what was measured leaves nothing that is worth a trial"
    assert outcome.untuned and outcome.tuned
    found = log.read(path)
    assert not found.bad
    alone = [r for r in found.records if r.where != MODEL and r.state != KEPT]
    assert 0 < len(alone) <= outcome.trials, "illegal combinations are no trials worth a record"
    assert all(len(r.seconds) == len(r.baseline) for r in alone if r.state == OK)
    assert {r.workload.operator for r in alone} <= {"conv", "generic"}


def test_a_second_run_goes_on(model, tuned):
    path, _ = tuned
    before = {r.line for r in log.read(path).records}
    tried = {(r.workload.key, r.choice) for r in log.read(path).records if r.where != MODEL}
    tune(str(model), Plan(path, trials=2))
    new = [r for r in log.read(path).records if r.line not in before and r.where != MODEL and r.state != KEPT]
    assert not {(r.workload.key, r.choice) for r in new} & tried


def test_what_was_tuned_compiles_and_is_right(model, tuned, tmp_path):
    artifact = driver.compile(str(model), tuning=Tuning(tuned[0], required=True))
    assert artifact.report["tuning"]["exact"] > 0
    assert artifact.report["verification"]["outputs"][0]["relative"] < 1e-5


def test_the_command_line(model, tuned, tmp_path):
    path, run = tuned[0], CliRunner().invoke
    for verb in (["ls"], ["ls", "--json"], ["verify"]):
        result = run(cli, ["log", verb[0], str(path), *verb[1:]])
        assert result.exit_code == 0, result.output
    rows = json.loads(run(cli, ["log", "ls", str(path), "--json"]).stdout)
    shown = run(cli, ["log", "show", str(path), rows[0]["key"]]).stdout.splitlines()
    assert len(shown) == rows[0]["records"]
    why = run(cli, ["log", "why", str(path), str(model)])
    assert "exact" in why.stdout
    artifact = tmp_path / "m.optc"
    built = run(cli, ["compile", str(model), "-o", str(artifact), "--log", str(path), "--offline", "--require-tuned"])
    assert built.exit_code == 0, built.output
    exported = run(cli, ["log", "export", str(artifact)])
    assert log.read_bytes(exported.stdout.encode()).records
    with path.open("a") as file:
        file.write("damaged\n")
    assert run(cli, ["log", "verify", str(path)]).exit_code == 1
    merged = tmp_path / "merged.jsonl"
    assert run(cli, ["log", "merge", str(path), str(path), "-o", str(merged)]).exit_code == 0
    assert log.read(merged).records and not log.read(merged).bad
    before = run(cli, ["log", "why", str(merged), str(model), "--json"]).stdout
    assert run(cli, ["log", "prune", str(merged)]).exit_code == 0
    after = run(cli, ["log", "why", str(merged), str(model), "--json"]).stdout
    assert [r["source"] for r in json.loads(before)] == [r["source"] for r in json.loads(after)]


@pytest.mark.parametrize(
    "arguments",
    [
        ["compile", "MODEL", "--require-tuned"],
        ["compile", "MODEL", "--threads", "2"],
        ["compile", "MODEL", "--tune", "1m", "--offline"],
        ["compile", "MODEL", "--tune", "soon"],
        ["tune", "MODEL"],
        ["tune", "MODEL", "--log", "/no/such/folder/log"],
        ["log", "ls", "/no/such/log"],
    ],
)
def test_wrong_usage(model, arguments):
    result = CliRunner().invoke(cli, [str(model) if a == "MODEL" else a for a in arguments])
    assert result.exit_code == 2 or isinstance(result.exception, UsageError)


def test_what_cannot_be_measured_here_is_refused(model, tmp_path):
    with pytest.raises(UsageError, match="cannot be measured here"):
        tune(str(model), Plan(tmp_path / "log", trials=1), target="aarch64")


@pytest.fixture(scope="module")
def normalized(tmp_path_factory):
    """Return a model of kernels without a template."""
    path = tmp_path_factory.mktemp("normalized") / "model.onnx"
    text = """<ir_version: 10, opset_import: ["" : 21]>
        g (float[1, 96, 32, 40] x) => (float[1, 96] y, float[1, 32, 40, 96] z)
        { y = ReduceMean<keepdims = 0>(x, axes)  z = Transpose<perm = [0, 2, 3, 1]>(x) }"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2, 3]), "axes"))
    onnx.save(model, path)
    return path


def test_kernels_without_a_template_are_searched_too(normalized):
    path = normalized.with_name("log.jsonl")
    tune(str(normalized), Plan(path, trials=10))
    found = log.read(path)
    traced = [r for r in found.records if r.trace]
    assert not found.bad and len({r.trace for r in traced}) > 2
    assert {r.state for r in traced} <= {OK}, [r.note for r in traced]
    # Whatever was faster here: a log in which traces are makes a model of them.
    served = normalized.with_name("served.jsonl")
    log.append(served, [replace(r, seconds=tuple(0.5 * s for s in r.baseline)) for r in traced])
    artifact = driver.compile(str(normalized), tuning=Tuning(served))
    assert "traced" in {k["schedule"] for k in artifact.report["kernels"]}
    assert all(o["relative"] < 1e-5 for o in artifact.report["verification"]["outputs"])
    again = driver.compile(str(normalized), tuning=Tuning(served))
    assert again.report["kernels"] == artifact.report["kernels"]
    before = {r.trace for r in traced}
    tune(str(normalized), Plan(path, trials=3))
    new = [r for r in log.read(path).records if r.trace and r.where != MODEL and r not in traced]
    assert not {r.trace for r in new} & before, "a second run goes on"


@pytest.mark.parametrize("part", ["_next", "_take"])
def test_a_search_of_tvm_that_fails_is_told(normalized, monkeypatch, part):
    path = normalized.with_name(f"failed{part}.jsonl")
    monkeypatch.setattr(Evolution, part, lambda *_: 1 / 0)
    tune(str(normalized), Plan(path, trials=4))
    records = log.read(path).records
    assert bool([r for r in records if r.trace]) == (part == "_take")
    assert "ZeroDivisionError" in {r.note.split(": ")[1] for r in records if r.note.startswith("TVM's search failed")}


def test_a_model_without_fixed_sizes_is_refused(tmp_path):
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[n, m] x) => (float[n, m] y) { y = Relu(x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="nothing to tune"):
        tune(str(tmp_path / "m.onnx"), Plan(tmp_path / "log", trials=1))


def test_curves():
    points = [(1.0, 0, 1.0), (2.0, 5, 0.9), (4.0, 9, 0.8)]
    assert plot.spark([1.0, 0.5]) == "█▁"
    assert plot.spark([]) == "" and plot.spark([1.0]) == "▁"
    svg = plot.curve(points)
    assert svg.startswith("<svg") and "4 s, 9 trials" in svg
    # A step for each change, and none where nothing changes.
    assert 'points="184.0,48.0 320.0,48.0 320.0,140.0 592.0,140.0 592.0,232.0 592.0,232.0"' in svg
    assert plot.curve([*points[:2], (3.0, 6, 0.9), (3.5, 7, 0.9), points[2]]) == svg
    assert "polyline" in plot.curve([])
