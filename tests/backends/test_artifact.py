"""Writing artifacts: the same bytes for the same content, all of them or none."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import zipfile
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import optc.runtime
from optc.backends.artifact import Artifact, build_artifact
from optc.errors import ArtifactError, OptcError, UsageError
from optc.runtime.container import read_directory
from optc.runtime.format import TensorSpec, parse_manifest

TARGET = {"kind": "cpu", "triple": "riscv64-unknown-linux-gnu", "cpu": "generic", "features": ["v"]}


def make(weights=None, **changes) -> Artifact:
    parts = {
        "inputs": [TensorSpec("x", "float32", ("batch", 4))],
        "outputs": [TensorSpec("y", "float32", ("batch", 4))],
        "code": b"\x7fELF" + bytes(5000),
        "weights": {"w": np.arange(4, dtype=np.float32)} if weights is None else weights,
        "target": TARGET,
        "report": {"z": 1, "a": [1, 2]},
        "metadata": {"author": "someone"},
        "memory": {"activations": 64, "unknown": None},
    }
    return build_artifact(**parts | changes)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def read(path):
    files = read_directory(memoryview(path.read_bytes()))
    return parse_manifest(bytes(files["manifest.json"])), {name: bytes(data) for name, data in files.items()}


def test_content(tmp_path):
    make(tuning='{"record":1}\n').save(tmp_path / "m.optc")
    manifest, files = read(tmp_path / "m.optc")
    assert list(files) == ["manifest.json", "code/model.so", "report.json", "tuning.jsonl", "weights.bin"]
    assert manifest.entry == "main"
    assert manifest.producer.keys() == {"optc", "tvm", "tvm_ffi"}
    assert manifest.target.triple == "riscv64-unknown-linux-gnu"
    assert manifest.memory == {"activations": 64, "weights": 16}
    assert manifest.metadata == {"author": "someone"}
    assert json.loads(files["report.json"]) == {"a": [1, 2], "z": 1}
    assert files["tuning.jsonl"] == b'{"record":1}\n'
    with zipfile.ZipFile(tmp_path / "m.optc") as archive:
        assert archive.testzip() is None


def test_same_content_same_bytes(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    make(report={"x": 1, "y": 2}).save(tmp_path / "a" / "one.optc")
    make(report={"y": 2, "x": 1}).save(tmp_path / "b" / "two.optc")
    assert (tmp_path / "a" / "one.optc").read_bytes() == (tmp_path / "b" / "two.optc").read_bytes()


def test_weights_are_aligned_and_exact(tmp_path):
    rng = np.random.default_rng(0)
    weights = {
        "odd": rng.integers(0, 9, 7, np.int8),
        "scalar": np.array(3, np.int64),
        "empty": np.empty((0, 5), np.float32),
        "strided": rng.normal(size=(6, 8)).astype(np.float32)[::2, ::3],
        "half": rng.normal(size=(3, 5)).astype(ml_dtypes.bfloat16),
        "flag": np.array([True, False]),
        "large": rng.normal(size=100_000),
    }
    make(weights).save(tmp_path / "m.optc")
    manifest, files = read(tmp_path / "m.optc")
    assert [spec.name for spec in manifest.weights] == list(weights)
    for spec, array in zip(manifest.weights, weights.values(), strict=True):
        assert spec.offset % 64 == 0
        assert (spec.dtype, spec.shape) == (array.dtype.name, array.shape)
        stored = files["weights.bin"][spec.offset : spec.offset + spec.nbytes]
        assert stored == np.ascontiguousarray(array).tobytes()
    with zipfile.ZipFile(tmp_path / "m.optc") as archive:
        info = archive.getinfo("weights.bin")
        start = info.header_offset + 30 + len(info.filename) + len(info.extra)
    content = (tmp_path / "m.optc").read_bytes()
    name_and_extra = content[info.header_offset + 26 : info.header_offset + 30]
    start = info.header_offset + 30 + int.from_bytes(name_and_extra[:2], "little")
    start += int.from_bytes(name_and_extra[2:], "little")
    assert start % 4096 == 0
    assert content[start : start + 7] == weights["odd"].tobytes()


def test_equal_bytes_are_stored_once(tmp_path):
    table = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    make({"a": table, "b": table.copy().reshape(10, 100), "c": table.view(np.int32), "d": table + 1}).save(
        tmp_path / "m.optc"
    )
    manifest, files = read(tmp_path / "m.optc")
    a, b, c, d = (spec.offset for spec in manifest.weights)
    assert a == b == c != d
    assert len(files["weights.bin"]) == 4032 + 4000


def test_weights_that_cannot_be_stored():
    with pytest.raises(OptcError, match="'w' is not in this machine's byte order"):
        make({"w": np.zeros(2, ">f4")})
    with pytest.raises(ArtifactError, match="unknown dtype 'complex64'"):
        make({"w": np.zeros(2, np.complex64)}).save(os.devnull + "x")


def test_with_report(tmp_path):
    first = make()
    second = first.with_report({"verified": True})
    assert first.report == {"z": 1, "a": [1, 2]}
    assert second.weights is first.weights
    second.save(tmp_path / "m.optc")
    assert json.loads(read(tmp_path / "m.optc")[1]["report.json"]) == {"verified": True}
    with pytest.raises(OptcError, match="report cannot be written as JSON"):
        first.with_report({"x": object()}).save(tmp_path / "n.optc")
    with pytest.raises(OptcError, match="report cannot be written as JSON"):
        first.with_report({"x": float("inf")}).save(tmp_path / "n.optc")
    assert names(tmp_path) == ["m.optc"]


def test_save_replaces(tmp_path):
    path = tmp_path / "m.optc"
    path.write_bytes(b"old")
    make().save(path)
    assert read(path)[0].entry == "main"
    assert names(tmp_path) == ["m.optc"]


class FailingFile:
    """A file that fails after some bytes."""

    def __init__(self, file, error, after):
        self.file, self.error, self.left = file, error, after

    def __enter__(self):
        return self

    def __exit__(self, *details):
        self.file.close()

    def write(self, data):
        self.left -= len(data)
        if self.left < 0:
            raise self.error
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("after", [0, 100, 6000])
@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OptcError, "No space left on device; nothing was left"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (MemoryError(), MemoryError, None),
    ],
)
def test_failed_save_leaves_nothing(tmp_path, monkeypatch, error, raised, message, after):
    from pathlib import Path

    path = tmp_path / "m.optc"
    path.write_bytes(b"old")
    original = Path.open
    artifact = make()
    monkeypatch.setattr(Path, "open", lambda self, mode: FailingFile(original(self, mode), error, after))
    with pytest.raises(raised, match=message):
        artifact.save(path)
    assert names(tmp_path) == ["m.optc"]
    assert path.read_bytes() == b"old"


LIMITED = """
import os, signal, sys
import numpy as np
from optc.backends.artifact import build_artifact
from optc.errors import OptcError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
artifact = build_artifact(
    inputs=[], outputs=[], code=b"", weights={"w": np.zeros(1 << 20)},
    target={"kind": "cpu", "triple": "t", "cpu": "c", "features": []}, report={}, metadata={}, memory={},
)
try:
    artifact.save("m.optc")
except OptcError as error:
    print(error)
print(os.listdir())
"""


def test_file_size_limit(tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    done = subprocess.run(
        [sys.executable, "-c", LIMITED], cwd=tmp_path, preexec_fn=limit, capture_output=True, text=True, check=True
    )
    assert "cannot write 'm.optc': File too large; nothing was left behind" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_unwritable_places(tmp_path):
    with pytest.raises(UsageError, match="it is a folder"):
        make().save(tmp_path)
    with pytest.raises(UsageError, match="No such file or directory"):
        make().save(tmp_path / "missing" / "m.optc")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="Not a directory"):
        make().save(tmp_path / "file" / "m.optc")


def test_model_loads_the_bytes_that_save_writes(tmp_path, monkeypatch):
    """``model`` goes the way of a saved file: what ``load`` refuses, it refuses too."""
    from optc.errors import TargetMismatchError

    artifact = make()
    with pytest.raises(TargetMismatchError, match="riscv64") as from_memory:
        artifact.model()
    artifact.save(tmp_path / "m.optc")
    with pytest.raises(TargetMismatchError) as from_file:
        optc.runtime.load(tmp_path / "m.optc")
    assert from_file.value.message == f"m.optc: {from_memory.value.message}"


def test_nothing_unreadable_is_written(tmp_path):
    artifact = make(inputs=[TensorSpec("x", "float33", (1,))])
    with pytest.raises(ArtifactError, match="unknown dtype 'float33'"):
        artifact.save(tmp_path / "m.optc")
    wrong = make()
    wrong = replace(wrong, manifest=replace(wrong.manifest, entry=""))
    with pytest.raises(ArtifactError):
        wrong.save(tmp_path / "m.optc")
    assert names(tmp_path) == []
