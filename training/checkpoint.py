"""Checkpoints that any number of ranks can read: torch's distributed checkpoints under the weights' original names.

    folder/
      latest                name of the newest complete checkpoint
      step-00000100/        tensors of all ranks, and training.json

A checkpoint is written into a folder of another name, renamed when every rank has finished, and only then named by
``latest``, each by an atomic rename: whoever is killed at any moment leaves ``latest`` at a complete one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from optc.errors import CheckpointError
from optc.training.capture import canonical_names
from optc.training.distributed import agree

FORMAT = 1
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
        content = {"format": FORMAT, "step": step, **info}
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
    _first_rank(finish, rank, folder)
    return final


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
        raise CheckpointError(f"{pointer} names {path.name}, which is no complete checkpoint")
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
    first = canonical_names(module)
    state = module.state_dict(keep_vars=True)
    load(find(path), {f"model/{first.get(name, name)}": tensor.detach() for name, tensor in state.items()})


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
