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


def test_errors(mlp, tmp_path):
    out = tmp_path / "small.onnx"
    assert "an .onnx file" in invoke("prune", mlp, "--structured", "50%", "-o", tmp_path / "a.optc", error=UsageError)
    assert "between 0 and 1" in invoke("prune", mlp, "--structured", "100%", "-o", out, error=UsageError)
    text = invoke("prune", mlp, "--structured", "1%", "--layer", "nothing=1%", "-o", out, error=UsageError)
    assert "nothing that can be pruned is called 'nothing'" in text
    assert "write NAME=SHARE" in invoke(
        "prune", mlp, "--structured", "1%", "--layer", "5%", "-o", out, error=UsageError
    )
    assert "--prune" in invoke("compile", mlp, "--prune", "50%", "--tune", "1s", error=UsageError)
    assert not list(tmp_path.iterdir())


def test_a_wrong_removal_is_an_error(mlp, monkeypatch):
    monkeypatch.setattr("optc.passes.prune.structured.mask", lambda model, coupling, removed: None)
    with pytest.raises(AccuracyError):
        optc.prune(mlp, structured=Structured(0.5))
