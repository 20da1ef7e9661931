"""The runtime: loads and runs artifacts. It imports no compiler, and NumPy only when it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optc.runtime.dlpack import DLPackTensor
    from optc.runtime.loader import load, read_manifest, read_tuning
    from optc.runtime.model import KernelTime, Model

__all__ = ["DLPackTensor", "KernelTime", "Model", "load", "read_manifest", "read_tuning"]

_HOMES = {
    "DLPackTensor": "dlpack",
    "KernelTime": "model",
    "Model": "model",
    "load": "loader",
    "read_manifest": "loader",
    "read_tuning": "loader",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
