"""Loads an artifact, trusting nothing in it before it is checked."""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
from pathlib import Path
from typing import Literal

import numpy as np

from optc.errors import ArtifactError, HashMismatchError, OptcError, TruncatedArtifactError, UsageError
from optc.runtime import container, ffi
from optc.runtime.cpu import check_target, default_threads
from optc.runtime.dtypes import dlpack_type
from optc.runtime.executor import NAIVE_ALLOCATOR, POOLED_ALLOCATOR, Code, Executor
from optc.runtime.format import ACTIVATIONS, CODE, MANIFEST, REPORT, TUNING, WEIGHTS, Manifest, parse_manifest
from optc.runtime.inputs import address
from optc.runtime.model import Model

Verify = Literal["full", "code"]
_CHUNK = 1 << 20


def load(path: str | os.PathLike[str], *, verify: Verify = "full", threads: int | None = None) -> Model:
    """Load the artifact at ``path``.

    ``verify="full"`` checks the hash of every file in it; ``"code"`` skips the weights, for large models on
    trusted storage. The weights are memory-mapped: replace the file if you must, never write into it.
    Hashes find damage, not malice: an artifact holds native code, so load only what you trust.

    Raises UsageError if the file cannot be read, ArtifactError (and subclasses) if it is not a sound
    artifact, TargetMismatchError if this machine cannot run it.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"cannot read {os.fspath(path)!r}: {error.strerror}") from error
    try:
        return load_descriptor(fd, verify=verify, threads=threads)
    except OptcError as error:
        error.message = f"{Path(path).name}: {error.message}"
        raise
    finally:
        os.close(fd)


def load_descriptor(fd: int, *, verify: Verify = "full", threads: int | None = None) -> Model:
    """Load the artifact in the open file ``fd``, which may be closed afterwards."""
    if verify not in ("full", "code"):
        raise UsageError(f"verify must be 'full' or 'code', not {verify!r}")
    mapped = _map(fd)
    data = memoryview(mapped)
    _expect(fd, mapped, "RANDOM")
    manifest, files = _read(data)
    for name, spec in manifest.files.items():
        if name == WEIGHTS and verify != "full":
            continue
        found = _digest(fd, data, files[name])
        if found != spec.sha256:
            raise HashMismatchError(
                f"the artifact is damaged: {name} does not have the hash its manifest states",
                hint="copy it again, or compile the model again",
            )
    _expect(fd, mapped, "NORMAL")
    check_target(manifest.target, files[CODE])
    _check_tvm(manifest)

    weights = np.frombuffer(files[WEIGHTS], np.uint8)
    start = address(weights) if weights.size else 0
    views = [ffi.view(start + weight.offset, *dlpack_type(weight.dtype), weight.shape) for weight in manifest.weights]
    try:
        code = Code(files[CODE], manifest.entry)
    except ffi.TvmError as error:
        raise ArtifactError(f"the artifact's code does not load: {error.message}") from error
    executor = Executor(
        code,
        views,
        weights,
        clock=manifest.calls is not None,
        allocator=_allocator(manifest),
        threads=manifest.target.threads or default_threads(),
    )
    model = Model(manifest, bytes(files[REPORT]), executor, (start, start + weights.size))
    if threads is not None:
        model.threads = threads
    return model


def read_manifest(path: str | os.PathLike[str]) -> tuple[Manifest, bytes]:
    """Return the manifest and the report of the artifact at ``path``, whatever machine it is for.

    Checks the structure and the hash of the report, but neither code nor weights.
    """
    return _read_file(path, REPORT)


def read_tuning(path: str | os.PathLike[str]) -> bytes:
    """Return the tuning records that the artifact at ``path`` was built with: lines of JSON, empty for none."""
    return _read_file(path, TUNING)[1]


def _read_file(path: str | os.PathLike[str], name: str) -> tuple[Manifest, bytes]:
    """Return the manifest and a small file of the artifact, whose hash is checked; empty if it has none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"cannot read {os.fspath(path)!r}: {error.strerror}") from error
    try:
        manifest, files = _read(memoryview(_map(fd)))
        content = bytes(files[name]) if name in files else b""
    finally:
        os.close(fd)
    if name in manifest.files and hashlib.sha256(content).hexdigest() != manifest.files[name].sha256:
        raise HashMismatchError(f"the artifact is damaged: {name} does not have the hash its manifest states")
    return manifest, content


def _map(fd: int) -> mmap.mmap:
    """Return the content of a regular file, memory-mapped."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise UsageError("not a regular file")
    if status.st_size == 0:
        raise TruncatedArtifactError("the file is empty")
    return mmap.mmap(fd, status.st_size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)


def _expect(fd: int, mapped: mmap.mmap, order: Literal["RANDOM", "NORMAL"]) -> None:
    """Tell the system in which order the file will be read, if it wants to know.

    Linux caches in large pieces what it reads ahead, and maps all of a piece where a run reads a part: one row, say.
    """
    if hasattr(os, "posix_fadvise") and hasattr(mmap, f"MADV_{order}"):
        os.posix_fadvise(fd, 0, 0, getattr(os, f"POSIX_FADV_{order}"))
        mapped.madvise(getattr(mmap, f"MADV_{order}"))


def _digest(fd: int, data: memoryview, part: memoryview) -> str:
    """Return the SHA-256 of ``part`` of the file mapped as ``data``.

    The file is read, because pages touched in the mapping would count as memory of the process, although a run may
    never need them: the rows of an embedding, say.
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(len(part), _CHUNK)))
    position = _start(part) - _start(data)
    end = position + len(part)
    while position < end:
        count = os.preadv(fd, [buffer[: end - position]], position)
        if count == 0:
            raise TruncatedArtifactError("the file became shorter while it was read")
        digest.update(buffer[:count])
        position += count
    return digest.hexdigest()


def _start(data: memoryview) -> int:
    return address(np.frombuffer(data, np.uint8)) if len(data) else 0


def _read(data: memoryview) -> tuple[Manifest, dict[str, memoryview]]:
    """Return the manifest and the files of an artifact after checking that they belong together."""
    files = container.read_directory(data)
    text = files.pop(MANIFEST, None)
    if text is None:
        raise ArtifactError(f"the artifact has no {MANIFEST}")
    if container.crc32(text) != container.stored_crc(data, MANIFEST):
        raise HashMismatchError(f"the artifact is damaged: {MANIFEST} does not have its checksum")
    manifest = parse_manifest(bytes(text))
    if files.keys() != manifest.files.keys():
        odd = sorted(files.keys() ^ manifest.files.keys())
        raise ArtifactError(f"the artifact's files are not those its manifest lists: {', '.join(odd)}")
    for name, spec in manifest.files.items():
        if len(files[name]) != spec.size:
            raise ArtifactError(f"{name} has {len(files[name])} bytes; the manifest states {spec.size}")
    return manifest, files


def _allocator(manifest: Manifest) -> int:
    """Choose how activations are allocated.

    TVM's pool keeps a list of free blocks per exact size: ideal when the compiler has planned all sizes, but
    with changing sizes it only grows, so those models take their memory from malloc.
    """
    planned = ACTIVATIONS in manifest.memory and not manifest.symbolic
    return POOLED_ALLOCATOR if planned else NAIVE_ALLOCATOR


def _check_tvm(manifest: Manifest) -> None:
    """Raise ArtifactError unless the code was made by the series of TVM (major.minor) installed here."""
    text = (ffi.library_folder("tvm").parent / "_version.py").read_text()
    installed = next((line.split("'")[1] for line in text.splitlines() if line.startswith("__version__ =")), "")
    made_by = manifest.producer.get("tvm", "")
    if made_by.split(".")[:2] != installed.split(".")[:2]:
        raise ArtifactError(
            f"the artifact was made with TVM {made_by or '(unknown)'}; the runtime here is {installed}",
            hint="compile the model again, or install the same TVM",
        )
