"""The manifest: canonical bytes out, strict parsing in."""

from __future__ import annotations

import copy
import json

import pytest

from optc.errors import ArtifactError, NewerFormatError
from optc.runtime.format import (
    CODE,
    ITEM_SIZES,
    REPORT,
    TUNING,
    WEIGHTS,
    FileSpec,
    Manifest,
    Target,
    TensorSpec,
    WeightSpec,
    canonical_json,
    parse_manifest,
)

HASH = "0123456789abcdef" * 4

MANIFEST = Manifest(
    producer={"optc": "1", "tvm": "0.27.0", "tvm_ffi": "0.1.14"},
    target=Target("cpu", "x86_64-unknown-linux-gnu", "znver3", ("avx2", "fma"), 2),
    entry="main",
    inputs=(TensorSpec("x", "float32", ("batch", 3, "floor(w/2)")),),
    outputs=(TensorSpec("größe", "bfloat16", ()),),
    weights=(WeightSpec("w", "int64", (2, 3), 64, 48),),
    files={CODE: FileSpec(10, HASH), REPORT: FileSpec(2, HASH), WEIGHTS: FileSpec(112, HASH)},
    memory={"weights": 112, "activations": 5},
    metadata={"characters": "α β"},
)


def test_round_trip():
    assert parse_manifest(MANIFEST.to_json()) == MANIFEST


def test_canonical_form():
    text = MANIFEST.to_json()
    assert text == canonical_json(json.loads(text))
    assert b" " not in text.replace("α β".encode(), b"")
    assert text == parse_manifest(text).to_json()
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"x": float("nan")})


def test_symbolic():
    assert MANIFEST.symbolic
    fixed = Manifest(**{**MANIFEST.__dict__, "inputs": (TensorSpec("x", "float32", (1,)),)})
    assert not fixed.symbolic


def test_item_sizes_are_those_of_numpy():
    from optc.runtime.dtypes import dlpack_type, name_of, numpy_dtype

    for name, size in ITEM_SIZES.items():
        assert numpy_dtype(name).itemsize == size
        assert numpy_dtype(name).name == name
        assert name_of(*dlpack_type(name)) == name
    assert name_of(5, 64) is None  # complex


def test_newer_version():
    root = json.loads(MANIFEST.to_json()) | {"format": 3, "something": "new"}
    with pytest.raises(NewerFormatError, match="format version 3; this optc reads up to 2"):
        parse_manifest(json.dumps(root).encode())


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], 0, "unknown version 0"),
        (["format"], "1", "format: not an integer"),
        (["format"], True, "format: not an integer"),
        (["extra"], 1, r"unknown \['extra'\]"),
        (["entry"], None, "entry: not a string"),
        (["entry"], "", "entry: empty"),
        (["producer"], [], "producer: not an object"),
        (["producer", "tvm"], 1, "producer.tvm: not a string"),
        (["target", "triple"], "", "target.triple: empty"),
        (["target", "features"], "avx2", "target.features: not a list"),
        (["target", "features"], [1], r"target.features\[0\]: not a string"),
        (["target", "threads"], 0, "target.threads: not positive"),
        (["target", "more"], 0, r"target: unknown \['more'\]"),
        (["inputs"], {}, "inputs: not a list"),
        (["inputs", 0, "dtype"], "complex64", r"inputs\[0\].dtype: unknown dtype 'complex64'"),
        (["inputs", 0, "shape"], [-1], "out of range"),
        (["inputs", 0, "shape"], [1.5], "not an integer"),
        (["inputs", 0, "shape"], [""], "empty"),
        (["inputs", 0], 3, r"inputs\[0\]: not an object"),
        (["outputs", 0, "name"], 1, r"outputs\[0\].name: not a string"),
        (["weights", 0, "shape"], ["n"], "not an integer"),
        (["weights", 0, "nbytes"], 47, "47 bytes do not hold int64"),
        (["weights", 0, "offset"], 8, "unaligned"),
        (["weights", 0, "offset"], 128, "past the end"),
        (["weights", 0, "offset"], 1 << 63, "out of range"),
        (["files", CODE, "sha256"], "0" * 63, "not a SHA-256"),
        (["files", CODE, "sha256"], "G" * 64, "not a SHA-256"),
        (["files", CODE, "size"], -1, "out of range"),
        (["files", "other"], {"size": 1, "sha256": HASH}, "unknown file 'other'"),
        (["memory", "weights"], 1.0, "not an integer"),
        (["metadata", "a"], 1, "metadata.a: not a string"),
    ],
)
def test_malformed(path, value, message):
    root = json.loads(MANIFEST.to_json())
    at = root
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(ArtifactError, match=message):
        parse_manifest(json.dumps(root).encode())


@pytest.mark.parametrize("key", list(json.loads(MANIFEST.to_json())))
def test_every_key_is_needed(key):
    root = json.loads(MANIFEST.to_json())
    del root[key]
    with pytest.raises(ArtifactError):
        parse_manifest(json.dumps(root).encode())


@pytest.mark.parametrize("label", ["inputs", "outputs", "weights"])
def test_repeated_name(label):
    root = json.loads(MANIFEST.to_json())
    root[label].append(copy.deepcopy(root[label][0]))
    with pytest.raises(ArtifactError, match=f"{label}: a name is repeated"):
        parse_manifest(json.dumps(root).encode())


def test_missing_file_and_optional_file():
    root = json.loads(MANIFEST.to_json())
    root["files"][TUNING] = {"size": 1, "sha256": HASH}
    parse_manifest(json.dumps(root).encode())
    del root["files"][REPORT]
    with pytest.raises(ArtifactError, match=r"report\.json is missing"):
        parse_manifest(json.dumps(root).encode())


@pytest.mark.parametrize(
    "data",
    [b"", b"[", b"\xff", b"[" * 100_000, b'{"a":1,"a":2}', b'{"format":NaN}', b"3", b"null"],
)
def test_not_a_manifest(data):
    with pytest.raises(ArtifactError):
        parse_manifest(data)
