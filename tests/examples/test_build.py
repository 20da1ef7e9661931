"""The build files of examples/offline: make and CMake build from a log, and only when something changed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx.parser
import pytest

from optc import driver
from optc.autotune import log
from optc.autotune.machine import machine_of
from optc.autotune.record import KEPT, Record, tvm_version
from optc.backends.kernels.templates import VERSIONS
from optc.runtime import read_tuning
from optc.runtime.cpu import default_threads

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "offline"


@pytest.fixture
def project(tmp_path):
    folder = tmp_path / "project"
    shutil.copytree(EXAMPLE, folder)
    text = '<ir_version: 10, opset_import: ["" : 21]> g (float[40, 24] x) => (float[40, 48] y) { y = MatMul(x, w) }'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((24, 48), np.float32), "w"))
    onnx.save(model, folder / "model.onnx")
    target = driver.resolve_target("cpu")
    (kernel,) = driver.backend(target).schedule(driver.optimize(str(folder / "model.onnx"))).kernels
    decisions = {**kernel.space.decisions, **kernel.workload.layout}
    record = Record(
        workload=kernel.workload,
        template=kernel.rule,
        template_version=VERSIONS[kernel.rule],
        decisions=decisions,
        defaults=decisions,
        machine=machine_of(target, default_threads()),
        tvm=tvm_version(),
        state=KEPT,
        note="nothing was measured",
    )
    log.append(folder / "tuning.jsonl", [record])
    return folder


def run(*command, cwd, fails=False):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_make(project):
    run("make", cwd=project)
    assert read_tuning(project / "model.optc")
    assert "up to date" in run("make", cwd=project)
    (project / "tuning.jsonl").write_text("")
    assert "have no tuning record" in run("make", cwd=project, fails=True)


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_cmake(project):
    run("cmake", "-S", ".", "-B", "out", cwd=project)
    run("cmake", "--build", "out", cwd=project)
    assert read_tuning(project / "out" / "model.optc")


def test_the_dockerfile_builds_from_the_same_files():
    text = (EXAMPLE / "Dockerfile").read_text()
    assert "COPY optc.toml model.onnx tuning.jsonl ./" in text
    assert "optc compile --config optc.toml" in text
