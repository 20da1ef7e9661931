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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from optc.errors import CheckpointError

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
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
    _barrier()
    try:
        dcp.save(dict(tensors), checkpoint_id=partial)
    except Exception as error:  # the writer wraps what each rank met
        raise CheckpointError(f"cannot write {partial}: {_innermost(error)}") from error
    if rank == 0:
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
    _barrier()
    return final


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
        raise CheckpointError(f"{path}: cannot read its metadata: {_innermost(error)}") from error
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
    except Exception as error:
        raise CheckpointError(f"cannot read {path}: {_innermost(error)}") from error


def load_weights(path: Path, module: torch.nn.Module) -> None:
    """Read the weights of a checkpoint into ``module``, merged from all stages; needs no process group."""
    state = module.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    for name, tensor in [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]:
        first.setdefault(id(tensor), name)
    wanted = {f"model/{first.get(id(tensor), name)}": tensor.detach() for name, tensor in state.items()}
    load(find(path), wanted)


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


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
