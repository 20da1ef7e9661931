"""``optc prune`` and ``optc.prune`` as users call them."""

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import optc
from optc.cli import cli
from optc.errors import AccuracyError, UsageError
from optc.passes.prune.select import Structured


def invoke(*arguments, error=None):
    """Run the command line in this process."""
    result = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=True)
    if error is not None:
        assert isinstance(result.exception, error), result.output
        return str(result.exception)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def test_prune_writes_smaller_onnx(mlp, tmp_path):
    out = tmp_path / "small.onnx"
    report = json.loads(invoke("prune", mlp, "--structured", "50%", "-o", out, "--json"))
    assert [(f["before"], f["after"]) for f in report["families"]] == [(16, 8)]
    assert report["verification"]["outputs"][0]["relative"] < 1e-6
    onnx.checker.check_model(out, full_check=True)
    model = optc.compile(out).model()
    assert model.run({"x": np.ones((3, 8), np.float32)})["y"].shape == (3, 4)
    invoke("prune", mlp, "--structured", "0.25", "-o", out)
    assert onnx.load(out).graph.initializer


def test_layers_have_their_own_share(mlp, tmp_path):
    out = tmp_path / "small.onnx"
    options = ["--scope", "global", "--importance", "l1", "--multiple", 4, "--no-verify", "--json"]
    report = json.loads(invoke("prune", mlp, "--structured", "50%", "--layer", "w*=25%", "-o", out, *options))
    assert [(f["before"], f["after"]) for f in report["families"]] == [(16, 12)]
    assert "verification" not in report


def test_compile_can_prune_first(mlp, tmp_path):
    out = tmp_path / "small.optc"
    summary = json.loads(invoke("compile", mlp, "--prune", "50%", "-o", out, "--json"))
    assert summary["report"]["pruning"]["families"][0]["after"] == 8
    assert summary["report"]["verification"]["outputs"][0]["relative"] < 1e-5


def test_values_of_weights(mlp, tmp_path):
    out = tmp_path / "sparse.onnx"
    report = json.loads(invoke("prune", mlp, "--sparsity", "2:4", "--clip", 99, "--cluster", 8, "-o", out, "--json"))
    assert [t["zeros"] for t in report["zeros"]["tensors"]] == [0.5, 0.5]
    assert report["clustered"] and report["clipped"]
    for tensor in onnx.load(out).graph.initializer:
        if len(tensor.dims) == 2:
            assert len(np.unique(onnx.numpy_helper.to_array(tensor))) <= 9
    report = json.loads(invoke("prune", mlp, "--magnitude", "50%", "--block", "4x2", "-o", out, "--json"))
    assert [t["zeros"] for t in report["zeros"]["tensors"]] == [0.5, 0.5]
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).standard_normal((20, 1, 8)).astype(np.float32))
    options = ["--low-rank", "5%", "--calibrate", tmp_path / "x.npz"]
    assert json.loads(invoke("prune", mlp, *options, "-o", out, "--json"))["low_rank"] == []
    invoke("prune", mlp, "--sparsity", "2:4", "--cluster", 4, "--structured", "25%", "-o", out)


def test_errors(mlp, tmp_path):
    out = tmp_path / "small.onnx"
    assert "between 0 and 1" in invoke("prune", mlp, "--structured", "100%", "-o", out, error=UsageError)
    text = invoke("prune", mlp, "--structured", "1%", "--layer", "nothing=1%", "-o", out, error=UsageError)
    assert "nothing that can be pruned is called 'nothing'" in text
    assert "write NAME=SHARE" in invoke(
        "prune", mlp, "--structured", "1%", "--layer", "5%", "-o", out, error=UsageError
    )
    assert "--prune" in invoke("compile", mlp, "--prune", "50%", "--tune", "1s", error=UsageError)
    assert "nothing to do" in invoke("prune", mlp, "-o", out, error=UsageError)
    assert "exclude" in invoke("prune", mlp, "--magnitude", "5%", "--sparsity", "2:4", "-o", out, error=UsageError)
    assert "pair of numbers" in invoke("prune", mlp, "--sparsity", "half", "-o", out, error=UsageError)
    assert "--block" in invoke("prune", mlp, "--block", "4x4", "--clip", 99, "-o", out, error=UsageError)
    assert "--layer" in invoke("prune", mlp, "--layer", "w1=5%", "--clip", 99, "-o", out, error=UsageError)
    assert not list(tmp_path.iterdir())


def test_a_wrong_removal_is_an_error(mlp, monkeypatch):
    monkeypatch.setattr("optc.passes.prune.structured.mask", lambda model, coupling, removed: None)
    with pytest.raises(AccuracyError):
        optc.prune(mlp, structured=Structured(0.5))


@pytest.mark.parametrize("verb", ["optimize", "quantize", "prune"])
def test_outputs_are_checked_before_the_work(mlp, tmp_path, verb):
    assert "an .onnx file" in invoke(verb, mlp, "-o", tmp_path / "a.optc", error=UsageError)
    assert "does not exist" in invoke(verb, mlp, "-o", tmp_path / "missing" / "a.onnx", error=UsageError)
