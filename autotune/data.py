"""What kernels are measured on: the model's weights, and random activations, in files that workers read."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from optc.autotune.tasks import Task


def write(task: Task, number: int, folder: Path) -> Path:
    """Write variant ``number`` of a task, with inputs that all its variants share; returns the file."""
    file = folder / f"{task.key}-{number}.npz"
    if file.exists():
        return file
    variant = task.variants[number]
    count = len(variant.function.params) - variant.outputs
    generator = np.random.default_rng(zlib.crc32(task.key.encode()))
    arrays: dict[str, Any] = {}
    for i in range(count):
        kind = variant.function.params[i].ty
        shape = [int(d) for d in kind.shape]
        arrays[f"in{i}"] = variant.weights[i] if i in variant.weights else _random(generator, shape, str(kind.dtype))
    weights = [i for i in variant.weights if i < count]
    function = np.array(tvm.ir.save_json(variant.function))
    np.savez(file, function=function, inputs=np.array(count), weights=np.array(weights, np.int64), **arrays)
    return file


def _random(generator: np.random.Generator, shape: list[int], dtype: str) -> np.ndarray:
    """Return values of usual magnitude; integers wider than a byte may be indices and are zero."""
    if "float" in dtype:
        return generator.standard_normal(shape).astype(dtype)
    if dtype == "bool":
        return generator.integers(0, 2, shape).astype(bool)
    if dtype in ("int8", "uint8"):
        information = np.iinfo(dtype)
        return generator.integers(information.min, information.max + 1, shape, dtype=dtype)
    return np.zeros(shape, dtype)
