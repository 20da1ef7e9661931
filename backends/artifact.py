"""Writes artifacts: one file with the compiled code, the weights and what is known about them.

docs/artifact-format.md describes the file; optc.runtime reads it. Equal contents give equal bytes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from optc.errors import OptcError, UsageError
from optc.runtime.container import Entry, crc32, lay_out
from optc.runtime.format import (
    CODE,
    MANIFEST,
    REPORT,
    TUNING,
    WEIGHT_ALIGNMENT,
    WEIGHTS,
    FileSpec,
    Manifest,
    Target,
    TensorSpec,
    WeightSpec,
    canonical_json,
    parse_manifest,
)

if TYPE_CHECKING:
    from optc.runtime import Model

Array = NDArray[Any]

ENTRY = "main"


class Weights:
    """The content of weights.bin: where each weight lies, and its bytes in order, never joined in memory.

    Weights of the same bytes share one place, whatever their dtype and shape.
    """

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self.arrays = {name: _little_endian(name, array) for name, array in arrays.items()}
        self.specs: list[WeightSpec] = []
        self._stored: list[Array] = []
        places: dict[tuple[int, bytes], int] = {}
        end = 0
        for name, array in self.arrays.items():
            key = (array.nbytes, hashlib.sha256(_bytes(array)).digest())
            if key not in places:
                places[key] = -(-end // WEIGHT_ALIGNMENT) * WEIGHT_ALIGNMENT
                end = places[key] + array.nbytes
                self._stored.append(array)
            self.specs.append(WeightSpec(name, array.dtype.name, array.shape, places[key], array.nbytes))
        self.size = end

    def chunks(self) -> Iterator[memoryview | bytes]:
        """Yield the content piece by piece."""
        end = 0
        for array in self._stored:
            padding = -end % WEIGHT_ALIGNMENT
            if padding:
                yield bytes(padding)
            yield _bytes(array)
            end += padding + array.nbytes

    @cached_property
    def digest(self) -> tuple[str, int]:
        """The SHA-256 (hex) and the CRC-32 of the content."""
        sha, crc = hashlib.sha256(), 0
        for chunk in self.chunks():
            sha.update(chunk)
            crc = crc32(chunk, crc)
        return sha.hexdigest(), crc


_WRITTEN_BYTES = 64 * 1024
"""Linux caches a file in pieces as large as it was written in, and maps all of a piece where a process reads a part of
it: large pieces of an embedding table would be memory of each process that looks up one row."""


@dataclass(frozen=True)
class Artifact:
    """A compiled model in memory; ``manifest`` describes the rest, its ``files`` are filled in on writing."""

    manifest: Manifest
    code: bytes
    weights: Weights
    report: dict[str, Any]
    tuning: str = ""

    def with_report(self, report: Mapping[str, Any]) -> Artifact:
        """Return the same artifact with another report."""
        return replace(self, report=dict(report))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the artifact to ``path``, completely or not at all, replacing a file that is there.

        Raises UsageError if the folder cannot be written to, OptcError if the disk is full.
        """
        target = Path(path)
        if target.is_dir():
            raise UsageError(f"cannot write {str(path)!r}: it is a folder", hint="name a file in it")
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
        try:
            with temporary.open("xb") as file:
                try:
                    self._write(file)
                    file.flush()
                    os.fsync(file.fileno())
                    temporary.replace(target)
                except BaseException:
                    temporary.unlink(missing_ok=True)
                    raise
        except OSError as error:
            raise _explain(error, path) from error

    def model(self) -> Model:
        """Load the artifact from memory, exactly as its saved file would be loaded."""
        from optc.runtime.loader import load_descriptor

        fd = os.memfd_create("optc-artifact", os.MFD_CLOEXEC)
        try:
            with open(fd, "wb", closefd=False) as file:
                self._write(file)
            return load_descriptor(fd, verify="code")
        finally:
            os.close(fd)

    def _write(self, file: BinaryIO) -> None:
        """Write all bytes to ``file``."""
        contents = {CODE: self.code, REPORT: _report_json(self.report)}
        if self.tuning:
            contents[TUNING] = self.tuning.encode()
        sha, crc = self.weights.digest
        files = {name: FileSpec(len(data), hashlib.sha256(data).hexdigest()) for name, data in contents.items()}
        files[WEIGHTS] = FileSpec(self.weights.size, sha)
        contents = {MANIFEST: replace(self.manifest, files=files).to_json(), **contents}
        parse_manifest(contents[MANIFEST])  # what cannot be read must not be written

        entries = [Entry(name, len(data), crc32(data)) for name, data in contents.items()]
        layout = lay_out([*entries, Entry(WEIGHTS, self.weights.size, crc)])
        for header, data in zip(layout.headers, contents.values(), strict=False):
            file.write(header)
            file.write(data)
        file.write(layout.headers[-1])
        for chunk in self.weights.chunks():
            for start in range(0, len(chunk), _WRITTEN_BYTES):
                file.write(chunk[start : start + _WRITTEN_BYTES])
        file.write(layout.tail)


def build_artifact(
    *,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    code: bytes,
    weights: Mapping[str, Array],
    target: Mapping[str, Any],
    report: Mapping[str, Any],
    metadata: Mapping[str, str],
    memory: Mapping[str, int | None],
    tuning: str = "",
    calls: Sequence[str] | None = None,
    alignment: int = WEIGHT_ALIGNMENT,
) -> Artifact:
    """Put an artifact together.

    ``code`` is a shared library whose Relax function ``main`` takes the inputs, then the weights in the order
    of ``weights``, and returns the outputs. ``target`` has kind, triple, cpu, features (LLVM names of what
    the code may use) and possibly threads. ``memory`` gives bytes by use (``activations``); unknown ones
    (None) are left out, and ``weights`` is added.
    The arrays are kept, not copied: leave them unchanged. ``calls`` and ``alignment`` are those of the manifest.
    """
    packed = Weights(weights)
    manifest = Manifest(
        producer={name: version(package) for name, package in _PRODUCERS.items()},
        target=Target(
            kind=target["kind"],
            triple=target["triple"],
            cpu=target["cpu"],
            features=tuple(target["features"]),
            threads=target.get("threads"),
        ),
        entry=ENTRY,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        weights=tuple(packed.specs),
        files={},
        memory={name: size for name, size in memory.items() if size is not None} | {"weights": packed.size},
        metadata=dict(metadata),
        calls=None if calls is None else tuple(calls),
        alignment=alignment,
    )
    return Artifact(manifest, code, packed, dict(report), tuning)


_PRODUCERS = {"optc": "optc", "tvm": "apache-tvm", "tvm_ffi": "apache-tvm-ffi"}


def _little_endian(name: str, array: Array) -> Array:
    """Return ``array`` in the artifact's byte order and layout."""
    if not array.dtype.isnative:
        raise OptcError(f"weight {name!r} is not in this machine's byte order")
    return np.ascontiguousarray(array).reshape(array.shape)  # ascontiguousarray makes 0-d arrays 1-d


def _bytes(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")


def _report_json(report: Mapping[str, Any]) -> bytes:
    try:
        return canonical_json(report)
    except (TypeError, ValueError) as error:
        raise OptcError(f"the report cannot be written as JSON: {error}") from error


def _explain(error: OSError, path: str | os.PathLike[str]) -> OptcError:
    where = f"cannot write {os.fspath(path)!r}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OptcError(
            f"{where}: {error.strerror}; nothing was left behind",
            hint="free some space, or write to another disk",
        )
    return UsageError(f"{where}: {error.strerror}", hint="check that the folder exists and may be written to")
