"""A sample of onnx's backend suite; ``make conformance`` runs all of it and writes ``passing.txt``."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PASSING = (Path(__file__).parent / "passing.txt").read_text(encoding="utf-8").split()
STEP = 45
# The light models are whole networks: their place is the full run.
SAMPLE = [name for name in PASSING if not name.startswith("light/")][::STEP]
UNSUPPORTED = {
    "node/test_strnormalizer_export_monday_casesensintive_lower": "STRING",
    "node/test_bernoulli": "Bernoulli",
    "node/test_image_decoder_decode_jpeg_rgb": "ImageDecoder",
}


@pytest.fixture(scope="module")
def conformance():
    spec = importlib.util.spec_from_file_location("conformance", ROOT / "scripts" / "conformance.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def suite(conformance):
    return conformance.tests()


@pytest.mark.parametrize("name", SAMPLE)
def test_what_passed_passes(conformance, suite, name):
    result = conformance.judge(suite[name], "optc")
    assert result["status"] == "pass", result.get("message")


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_name(conformance, suite, name):
    result = conformance.judge(suite[name], "optc")
    assert result["status"] == "unsupported"
    assert UNSUPPORTED[name] in result["message"]


def test_the_harness_sees_a_wrong_result(conformance, suite, monkeypatch):
    monkeypatch.setattr(conformance, "run_optc", lambda model, sets: [[o + 1 for o in outs] for _, outs in sets])
    assert conformance.judge(suite["node/test_relu"], "optc")["status"] == "wrong"


def test_the_harness_survives_a_crash(conformance, suite, monkeypatch):
    import os
    import signal

    monkeypatch.setattr(conformance, "run_optc", lambda model, sets: os.kill(os.getpid(), signal.SIGSEGV))
    assert conformance.in_a_process(suite["node/test_relu"], "optc")["status"] == "crash"
