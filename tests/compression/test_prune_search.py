"""Structured pruning within a budget."""

import json

import numpy as np
import onnx
import onnx.parser
import pytest

import optc
from optc.cli import main
from optc.compression import prune_search
from optc.compression.budget import Goal
from optc.compression.evaluate import Budget
from optc.errors import AccuracyError, UsageError
from optc.passes.prune.select import Structured
from optc.peers import OnnxRuntime

MLP = """<ir_version: 10, opset_import: ["": 20]>
mlp (float[8,12] x) => (float[8,3] y) {
 a = Gemm(x, w1, b1)  r = Relu(a)  c = Gemm(r, w2, b2)  s = Relu(c)  y = Gemm(s, w3, b3) }"""


@pytest.fixture(scope="module")
def mlp(tmp_path_factory):
    """The path of a network whose first hidden layer has half of its neurons for nothing; x [8, 12] -> y [8, 3]."""
    random = np.random.default_rng(0)
    model = onnx.parser.parse_model(MLP)
    shapes = {"w1": (12, 32), "b1": (32,), "w2": (32, 32), "b2": (32,), "w3": (32, 3), "b3": (3,)}
    arrays = {name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    arrays["w1"][:, 16:], arrays["b1"][16:], arrays["w2"][16:] = 1e-3, 0, 1e-3
    for name, array in arrays.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    path = tmp_path_factory.mktemp("models") / "mlp.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def samples():
    return np.random.default_rng(1).normal(0, 1, (64, 12)).astype(np.float32)


def test_as_much_goes_as_fits_and_a_search_goes_on(mlp, samples, tmp_path, capsys, monkeypatch):
    np.save(tmp_path / "x.npy", samples)
    command = ["prune", str(mlp), "-o", str(tmp_path / "small.onnx"), "--structured", "50%", "--multiple", "1"]
    command += ["--calibrate", str(tmp_path / "x.npy"), "--max-error", "cosine:1e-5", "--objective", "size", "--json"]
    command += ["--journal", str(tmp_path / "j.jsonl"), "--plot", str(tmp_path / "p.svg"), "--no-recover"]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["search"]["loss"] <= 1e-5
    assert found["search"]["layers"]["w1"]["why"] == "pruned"
    assert found["search"]["layers"]["w2"]["why"] == "over the budget"
    assert found["search"]["cost"]["pruned"] < found["search"]["cost"]["float32"]
    assert found["search"]["resumed"] == 0
    assert {f["name"]: f["after"] for f in found["families"]} == {"w1": 16, "w2": 32}
    (want,) = OnnxRuntime(optc.optimize(mlp), 1).run({"x": samples[:8]}).values()
    (got,) = OnnxRuntime(optc.optimize(tmp_path / "small.onnx"), 1).run({"x": samples[:8]}).values()
    # What went had weights of 1e-3 on both sides.
    np.testing.assert_allclose(got, want, atol=2e-4)
    assert (tmp_path / "p.svg").read_text().startswith("<svg")

    def never(*_):
        raise AssertionError("evaluated again")

    monkeypatch.setattr(prune_search.Candidates, "evaluate", never)
    with pytest.raises(SystemExit) as ended:
        main(command)
    again = json.loads(capsys.readouterr().out)["search"]
    assert again["resumed"] == again["evaluations"]
    assert {**again, "resumed": 0} == found["search"]


def test_an_unreachable_budget_shows_the_front(mlp, samples):
    goal = Goal(Budget("relative", 1e-9), objective="time")
    with pytest.raises(AccuracyError, match=r"no layer can be pruned within relative <= 1e-09(.|\n)*\(time, loss"):
        optc.prune(mlp, structured=0.9, goal=goal, evaluation=samples[:16], recover=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low_rank": 0.1}, "for structured pruning, alone"),
        ({"structured": 0.5}, "needs samples"),
        ({"structured": 0.0, "evaluation": True}, "the share to prune at most"),
        ({"structured": Structured(0.5, "global"), "evaluation": True}, "for each family"),
    ],
)
def test_errors_come_before_the_work(mlp, samples, options, message, monkeypatch):
    monkeypatch.setattr(prune_search, "Candidates", None)
    if "evaluation" in options:
        options = {**options, "evaluation": samples}
    with pytest.raises(UsageError, match=message):
        optc.prune(mlp, goal=Goal(Budget("cosine", 0.1)), **options)
