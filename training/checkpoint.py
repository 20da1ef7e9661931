"""Checkpoints that any number of ranks can read: torch's distributed checkpoints under the weights' original names.

    folder/
      latest                name of the newest complete checkpoint
      step-00000100/        tensors of all ranks, and training.json

A checkpoint is written into a folder of another name, renamed when every rank has finished, and only then named by
``latest``, each by an atomic rename: whoever is killed at any moment leaves ``latest`` at a complete one. It says what
its files have to be, because torch reads many that a disk has spoiled without a word.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from optc.errors import CheckpointError
from optc.training.capture import canonical_names
from optc.training.distributed import agree

FORMAT = 2
LATEST = "latest"
_INFO = "training.json"
_NAME = re.compile(r"step-\d{8}")


def save(
    folder: Path, step: int, tensors: Mapping[str, torch.Tensor], info: Mapping[str, Any], *, rank: int, keep: int
) -> Path:
    """Write a checkpoint; collective. ``tensors`` are this rank's, ``info`` (JSON) is rank 0's.

    ``keep`` newest checkpoints stay. CheckpointError if a rank cannot write.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".{final.name}.partial"

    def prepare() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if partial.exists():
            shutil.rmtree(partial)

    def finish() -> None:
        content = {"format": FORMAT, "step": step, "files": files, **info}
        (partial / _INFO).write_text(json.dumps(content), encoding="utf-8")
        for path in partial.iterdir():
            _sync(path)
        _sync(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(folder)
        _replace(folder / LATEST, final.name)
        complete = sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
        for old in complete[:-keep]:
            shutil.rmtree(old, ignore_errors=True)

    _first_rank(prepare, rank, folder)
    try:
        dcp.save(dict(tensors), checkpoint_id=partial)
    except CheckpointException as error:  # what any rank met; a rank that is gone is another error
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)  # the disk may be full
        raise CheckpointError(f"cannot write {partial}: {_reason(error)}") from error
    files = _digests(partial, agree(sorted(path.name for path in partial.iterdir()) if rank == 0 else None))
    if None in files.values():
        raise CheckpointError(f"cannot read what was just written to {partial}")
    _first_rank(finish, rank, folder)
    return final


def require_writable(folder: Path, *, rank: int) -> None:
    """CheckpointError, on every rank, if checkpoints cannot be written: better now than after hours. Collective."""

    def attempt() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"?")

    _first_rank(attempt, rank, folder)


def _first_rank(action: Callable[[], None], rank: int, folder: Path) -> None:
    """Let rank 0 act while the others wait; they all learn that it could not."""
    failure = None
    if rank == 0:
        try:
            action()
        except (OSError, TypeError) as error:  # the disk, or something in `info` that is no JSON
            failure = CheckpointError(f"cannot write to {folder}: {error}")
    failure = agree(failure)
    if failure is not None:
        raise failure


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in ``folder``; None if there is none. CheckpointError if ``latest`` is broken."""
    pointer = folder / LATEST
    if not pointer.exists():
        return None
    path = folder / pointer.read_text(encoding="utf-8").strip()
    if not (path / _INFO).is_file():
        raise CheckpointError(f"{pointer} names {path.name}, which is no complete checkpoint", hint=_others(path))
    return path


def find(path: Path) -> Path:
    """The checkpoint that ``path`` means: one itself, or a folder with ``latest``. CheckpointError if there is none."""
    if (path / _INFO).is_file():
        return path
    found = latest(path) if path.is_dir() else None
    if found is None:
        raise CheckpointError(f"{path} is no checkpoint", hint="give a checkpoint, or a folder with a file `latest`")
    return found


def read_info(path: Path) -> dict[str, Any]:
    """What rank 0 said when it was written."""
    try:
        info = json.loads((path / _INFO).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot read {_INFO}: {error}") from error
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise CheckpointError(f"{path} was written by another version of optc")
    return info


def verify(path: Path) -> dict[str, Any]:
    """``read_info`` of a checkpoint whose files are what was written; CheckpointError if not. Collective."""
    info = read_info(path)
    found = _digests(path, sorted(info["files"]))
    broken = sorted(name for name, digest in info["files"].items() if found[name] != digest)
    if broken:
        raise CheckpointError(f"{path} is damaged: {', '.join(broken[:5])}", hint=_others(path))
    return info


def _digests(folder: Path, names: Sequence[str]) -> dict[str, str | None]:
    """Hashes of files, None for those that cannot be read; all ranks share the work. Collective."""
    several = dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    mine: dict[str, str | None] = {}
    for name in names[rank::size]:
        try:
            with (folder / name).open("rb") as file:
                mine[name] = hashlib.file_digest(file, "blake2b").hexdigest()
        except OSError:
            mine[name] = None
    everyone: list[dict[str, str | None]] = [mine]
    if several:
        everyone = [{}] * size
        dist.all_gather_object(everyone, mine)
    return {name: digest for part in everyone for name, digest in part.items()}


def _others(path: Path) -> str | None:
    """Which checkpoints there are besides ``path``."""
    others = sorted(p.name for p in path.parent.iterdir() if _NAME.fullmatch(p.name) and p.name != path.name)
    return f"checkpoints beside it: {', '.join(others)}" if others else None


def require_same_weights(path: Path, info: Mapping[str, Any], module: torch.nn.Module) -> None:
    """CheckpointError if a checkpoint holds weights that ``module`` has not."""
    foreign = sorted(set(info["weights"]) - set(weight_names(module)))
    if foreign:
        raise CheckpointError(
            f"{path} belongs to another model: this one lacks {len(foreign)} of its weights: {', '.join(foreign[:5])}"
        )


def weight_names(module: torch.nn.Module) -> list[str]:
    """The first names of everything in ``module.state_dict()``."""
    first = canonical_names(module)
    return sorted({first.get(name, name) for name in module.state_dict()})


def shapes(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor in a checkpoint."""
    try:
        metadata = dcp.FileSystemReader(path).read_metadata()
    except Exception as error:  # torch raises whatever its unpickler met
        raise CheckpointError(f"{path}: cannot read its metadata: {error!r}") from error
    return {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if hasattr(entry, "size")
    }


def load(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill ``tensors`` in place from a checkpoint, whatever ranks wrote it. CheckpointError names what is missing."""
    known = shapes(path)
    missing = sorted(set(tensors) - set(known))
    if missing:
        raise CheckpointError(f"{path} lacks {len(missing)} tensors of this model: {', '.join(missing[:5])}")
    wrong = [name for name, tensor in tensors.items() if tuple(tensor.shape) != known[name][0]]
    if wrong:
        described = ", ".join(f"{n} {known[n][0]} instead of {tuple(tensors[n].shape)}" for n in sorted(wrong)[:5])
        raise CheckpointError(f"{path} belongs to another model: {described}")
    try:
        dcp.load(dict(tensors), checkpoint_id=path)
    except CheckpointException as error:
        raise CheckpointError(f"cannot read {path}: {_reason(error)}") from error


def load_weights(path: Path, module: torch.nn.Module) -> None:
    """Read the weights of a checkpoint into ``module``, merged from all stages; needs no process group."""
    found = find(path)
    require_same_weights(found, verify(found), module)
    first = canonical_names(module)
    state = module.state_dict(keep_vars=True)
    load(found, {f"model/{first.get(name, name)}": tensor.detach() for name, tensor in state.items()})


def _reason(error: CheckpointException) -> str:
    rank, (failure, _) = min(error.failures.items())
    return f"{failure!r} on rank {rank}"


def _replace(path: Path, text: str) -> None:
    """Write a file so that readers see the old or the new content, also after a crash."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
