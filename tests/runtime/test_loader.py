"""Loading: damaged, foreign and malicious files each give one clear error."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import optc.runtime
from optc.backends.artifact import Weights
from optc.errors import (
    ArtifactError,
    HashMismatchError,
    NewerFormatError,
    OptcError,
    TargetMismatchError,
    TruncatedArtifactError,
    UnsafePathError,
    UsageError,
)
from optc.runtime.container import Entry, crc32, lay_out, read_directory
from optc.runtime.cpu import ARM_FLAGS, X86_FLAGS, host_features, missing_features
from optc.runtime.format import CODE, MANIFEST, WEIGHTS

SLOW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def packed(affine_path):
    return affine_path.read_bytes()


@pytest.fixture
def parts(packed):
    return {name: bytes(data) for name, data in read_directory(memoryview(packed)).items()}


def pack(parts, *, fix_hashes=False):
    """Put files into a well-formed container, optionally with a manifest that states their hashes."""
    if fix_hashes:
        manifest = json.loads(parts[MANIFEST])
        for name in manifest["files"]:
            data = parts[name]
            manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        parts = parts | {MANIFEST: json.dumps(manifest).encode()}
    layout = lay_out([Entry(name, len(data), crc32(data)) for name, data in parts.items()])
    return b"".join(h + d for h, d in zip(layout.headers, parts.values(), strict=True)) + layout.tail


@pytest.fixture
def make_artifact_with_weights(affine, tmp_path):
    """A function: the path of an artifact with so many bytes of weights that its code does not look at."""

    def build(size):
        arrays = affine.weights.arrays | {"unused": np.random.default_rng(0).bytes(size)}
        arrays["unused"] = np.frombuffer(arrays["unused"], np.uint8)
        packed = Weights(arrays)
        path = tmp_path / "large.optc"
        manifest = replace(affine.manifest, weights=tuple(packed.specs), memory={"weights": packed.size})
        replace(affine, manifest=manifest, weights=packed).save(path)
        return path

    return build


@pytest.fixture
def load_bytes(tmp_path):
    def load(data, **options):
        path = tmp_path / "model.optc"
        path.write_bytes(data)
        return optc.runtime.load(path, **options)

    return load


def test_repacked_parts_load(load_bytes, parts):
    load_bytes(pack(parts)).run({"x": np.ones((2, 16), np.float32)})


@SLOW
@given(data=st.data())
def test_flipped_bit_anywhere(load_bytes, packed, data):
    position = data.draw(st.integers(0, len(packed) - 1))
    bit = data.draw(st.integers(0, 7))
    damaged = bytearray(packed)
    damaged[position] ^= 1 << bit
    with pytest.raises(ArtifactError):
        load_bytes(bytes(damaged))


@SLOW
@given(data=st.data())
def test_truncation_anywhere(load_bytes, packed, data):
    with pytest.raises(TruncatedArtifactError, match=r"truncated or is not an optc artifact|empty"):
        load_bytes(packed[: data.draw(st.integers(0, len(packed) - 1))])


@SLOW
@given(st.binary(max_size=2000))
def test_random_bytes(load_bytes, data):
    with pytest.raises(ArtifactError):
        load_bytes(data)


@SLOW
@given(data=st.data())
def test_random_manifest(load_bytes, parts, data):
    """Whatever replaces a part of the manifest, loading ends in our own error or in a model."""
    text = bytearray(parts[MANIFEST])
    start = data.draw(st.integers(0, len(text)))
    text[start : start + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=20))
    with contextlib.suppress(OptcError):
        load_bytes(pack(parts | {MANIFEST: bytes(text)}))


def test_appended_bytes(load_bytes, packed):
    with pytest.raises(ArtifactError):
        load_bytes(packed + b"\0")
    with pytest.raises(ArtifactError):
        load_bytes(b"\0" + packed)


@pytest.mark.parametrize("name", [CODE, WEIGHTS, "report.json"])
def test_wrong_hash(load_bytes, parts, name):
    changed = bytearray(parts[name])
    changed[-1] ^= 1
    with pytest.raises(HashMismatchError, match=f"{name} does not have the hash"):
        load_bytes(pack(parts | {name: bytes(changed)}))


def test_verify_code_skips_only_the_weights(load_bytes, parts):
    changed = bytearray(parts[WEIGHTS])
    changed[0] ^= 1
    load_bytes(pack(parts | {WEIGHTS: bytes(changed)}), verify="code")
    with pytest.raises(HashMismatchError):
        load_bytes(pack(parts | {CODE: parts[CODE][:-1] + b"\xff"}), verify="code")
    with pytest.raises(UsageError, match="verify must be"):
        load_bytes(pack(parts), verify="none")


def test_newer_version_with_files_of_its_own(load_bytes, parts):
    manifest = json.loads(parts[MANIFEST]) | {"format": 9}
    new = parts | {MANIFEST: json.dumps(manifest).encode(), "novelty.bin": b"?"}
    with pytest.raises(NewerFormatError, match=r"model.optc: .* format version 9"):
        load_bytes(pack(new))


def test_path_escape(load_bytes, parts, tmp_path):
    with pytest.raises(UnsafePathError, match=r"\.\./evil"):
        load_bytes(pack(parts | {"../evil": b"x"}))
    assert not (tmp_path.parent / "evil").exists()


def test_files_and_manifest_disagree(load_bytes, parts):
    with pytest.raises(ArtifactError, match=r"not those its manifest lists: extra\.txt"):
        load_bytes(pack(parts | {"extra.txt": b"x"}))
    without = {name: data for name, data in parts.items() if name != WEIGHTS}
    with pytest.raises(ArtifactError, match=r"not those its manifest lists: weights\.bin"):
        load_bytes(pack(without))
    with pytest.raises(ArtifactError, match=r"has no manifest\.json"):
        load_bytes(pack({name: data for name, data in parts.items() if name != MANIFEST}))
    with pytest.raises(ArtifactError, match="the manifest states"):
        load_bytes(pack(parts | {WEIGHTS: parts[WEIGHTS] + b"x"}))


def test_code_that_is_no_library(load_bytes, parts):
    for code in (b"", b"no library at all", parts[CODE][:200]):
        with pytest.raises(ArtifactError):
            load_bytes(pack(parts | {CODE: code}, fix_hashes=True))


def test_code_without_entry(affine):
    broken = replace(affine, manifest=replace(affine.manifest, entry="other"))
    with pytest.raises(OptcError, match="no function 'other'"):
        broken.model().run({"x": np.ones((1, 16), np.float32)})


def retarget(affine, **changes):
    manifest = replace(affine.manifest, target=replace(affine.manifest.target, **changes))
    return replace(affine, manifest=manifest)


def test_target(affine, monkeypatch):
    assert "linux" in affine.manifest.target.triple
    with pytest.raises(TargetMismatchError, match="the artifact is for riscv64-unknown-linux-gnu"):
        retarget(affine, triple="riscv64-unknown-linux-gnu").model()
    with pytest.raises(TargetMismatchError, match="windows"):
        retarget(affine, triple=affine.manifest.target.triple.replace("linux-gnu", "windows-msvc")).model()
    retarget(affine, features=tuple(host_features())).model()
    retarget(affine, features=("64bit", "fast-lzcnt", "prfchw", "mwaitx")).model()
    with pytest.raises(TargetMismatchError, match=r"'turbo' .* lacks: avx99"):
        retarget(affine, cpu="turbo", features=("avx99",)).model()
    monkeypatch.setattr("optc.runtime.cpu.host_features", frozenset)
    name = "sse2" if "sse2" in X86_FLAGS and "x86_64" in affine.manifest.target.triple else "neon"
    assert name in X86_FLAGS | ARM_FLAGS
    assert missing_features([name, "slow-3ops-lea"]) == [name]


def test_foreign_code_under_our_triple(load_bytes, parts):
    code = bytearray(parts[CODE])
    code[18:20] = (243).to_bytes(2, "little")  # e_machine: RISC-V
    with pytest.raises(TargetMismatchError, match="not a shared library for"):
        load_bytes(pack(parts | {CODE: bytes(code)}, fix_hashes=True))


def test_other_tvm(affine):
    other = replace(affine, manifest=replace(affine.manifest, producer={"tvm": "0.99.1"}))
    with pytest.raises(ArtifactError, match=r"made with TVM 0\.99\.1"):
        other.model()


def test_paths(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        optc.runtime.load(tmp_path / "missing.optc")
    with pytest.raises(UsageError, match="not a regular file"):
        optc.runtime.load(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(TruncatedArtifactError, match="empty"):
        optc.runtime.load(tmp_path / "empty")


def test_read_manifest_of_any_target(affine, tmp_path):
    path = tmp_path / "riscv.optc"
    retarget(affine, triple="riscv64-unknown-linux-gnu").save(path)
    manifest, report = optc.runtime.read_manifest(path)
    assert manifest.target.triple.startswith("riscv64")
    assert json.loads(report) == {"passes": ["one"]}
    with pytest.raises(UsageError):
        optc.runtime.read_manifest(tmp_path / "missing")


def test_checking_the_weights_does_not_make_them_resident(make_artifact_with_weights, in_process):
    path = make_artifact_with_weights(64 << 20)
    code = """
import sys
from optc.runtime import load

def resident():
    with open("/proc/self/status") as status:
        return int(next(line.split()[1] for line in status if line.startswith("VmHWM"))) * 1024

before = resident()
load(sys.argv[1])
print(resident() - before)
"""
    assert int(in_process(code, path)) < 32 << 20
