"""A budget from the command line to the compiled result."""

import json

import numpy as np
import pytest

import optc
from optc import driver
from optc.cli import main
from optc.compression.budget import Goal
from optc.compression.data import load
from optc.compression.evaluate import Budget
from optc.compression.options import Options
from optc.compression.quantize import Quantizer
from optc.errors import AccuracyError, UsageError
from optc.peers import OnnxRuntime


@pytest.fixture(scope="module")
def quantizer(network, rows):
    model = driver.optimize(network)
    return Quantizer(model, load(rows, driver.specs(model.graph.inputs)))


def test_a_mixture_computes_what_its_model_computes(quantizer, rows):
    trial = quantizer.trial(Options(bits=5), Goal(Budget("relative", 0.1)))
    names = sorted(trial.mixture.names)
    assert len(names) == 3
    for layers in ({names[0]}, set(names)):
        model = trial.mixture.with_layers(frozenset(layers))
        (want,) = OnnxRuntime(model, threads=1, literal=True).run({"x": rows[:4]}).values()
        (got,) = trial._board.run(frozenset(layers))({"x": rows[:4]}).values()
        np.testing.assert_allclose(got, want, atol=2e-3 * np.abs(want).max())


def test_the_search_stays_within_the_budget(network, rows, tmp_path, capsys):
    np.save(tmp_path / "x.npy", rows)
    command = ["quantize", str(network), "--calibrate", str(tmp_path / "x.npy"), "-o", str(tmp_path / "q.onnx")]
    command += [
        "--objective",
        "size",
        "--journal",
        str(tmp_path / "j.jsonl"),
        "--plot",
        str(tmp_path / "p.svg"),
        "--json",
    ]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--max-error", "relative:0.05"])
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)["search"]
    assert found["loss"] <= 0.05
    assert found["cost"]["quantized"] < found["cost"]["float32"]
    assert found["resumed"] == 0
    assert (tmp_path / "p.svg").read_text().startswith("<svg")


def test_only_what_is_faster_on_the_target(network, rows):
    found = optc.quantize(network, calibrate=rows, only_paying=True)
    layers, slow = found.report["layers"], found.report["does not pay"]
    assert len(slow) + sum(layer["to"] == "int8" for layer in layers) == 3
    assert all(layer["before"] > layer["after"] > 0 for layer in layers if layer["to"] == "int8")
    with pytest.raises(UsageError, match="only what pays by itself"):
        optc.quantize(network, calibrate=rows, only_paying=True, goal=Goal(Budget("kl", 1.0)))


def test_time_of_another_target_is_modelled(quantizer):
    from optc.compression.speed import layer_times

    trial = quantizer.trial(Options(), Goal(Budget("cosine", 0.5)))
    times = layer_times(trial.mixture, quantizer.shapes(), "aarch64", lambda _: None)
    assert all(before > after > 0 for before, after in times.values())


def test_sensitivity(network, rows, tmp_path, capsys):
    np.savez(tmp_path / "x.npz", x=rows)
    arguments = ["sensitivity", str(network), "--calibrate", str(tmp_path / "x.npz"), "--json"]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    losses = [layer["loss"] for layer in found["layers"]]
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)


def test_errors_come_before_the_work(network, rows, monkeypatch):
    def never(*_, **__):
        raise AssertionError("compiled")

    monkeypatch.setattr("optc.driver.compile", never)
    goal = Goal(Budget("accuracy", 0.01), labels=np.zeros(3, int))
    with pytest.raises(UsageError, match="3 labels for 24 samples"):
        optc.quantize(network, calibrate=rows, goal=goal)
    with pytest.raises(UsageError, match="label 3 is no class"):
        optc.quantize(network, calibrate=rows, goal=Goal(Budget("accuracy", 0.01), labels=np.arange(24) % 4))
    with pytest.raises(UsageError, match="layers are chosen for"):
        optc.quantize(network, Options("float16"), calibrate=rows, goal=Goal(Budget("kl", 0.1)))


def test_options_of_a_budget_need_one(network, rows, tmp_path):
    np.save(tmp_path / "x.npy", rows)
    command = ["quantize", str(network), "--calibrate", str(tmp_path / "x.npy"), "-o", str(tmp_path / "q.onnx")]
    for more in (["--labels", "y.npy"], ["--max-drop", "1%", "--max-error", "kl:1"], ["--max-drop", "1%"]):
        with pytest.raises(SystemExit) as ended:
            main([*command, *more])
        assert ended.value.code == 2


def test_nothing_within_an_impossible_budget_shows_the_front(quantizer):
    from optc.compression.budget import search

    goal = Goal(Budget("relative", 0.0), objective="size")
    with pytest.raises(AccuracyError, match=r"the cheapest first"):
        search(quantizer.trial(Options(), goal), goal, quantizer.shapes(), "cpu", lambda _: None)
