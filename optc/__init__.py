"""optc: compile neural networks into one verified, self-contained artifact.

    artifact = optc.compile("model.onnx", target="cpu")
    artifact.save("model.optc")
    outputs = optc.load("model.optc").run({"x": x})

Names are resolved on first use, so that ``import optc`` and ``optc.load`` never import the compiler.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "compile": "optc.driver",
    "optimize": "optc.driver",
    "check": "optc.driver",
    "quantize": "optc.compression.quantize",
    "sensitivity": "optc.compression.sensitivity",
    "capture": "optc.source",
    "prune": "optc.compression.prune",
    "load": "optc.runtime",
    "Model": "optc.runtime",
    "Artifact": "optc.backends.artifact",
    "OptcError": "optc.errors",
}

__all__ = [
    "Artifact",
    "Model",
    "OptcError",
    "capture",
    "check",
    "compile",
    "load",
    "optimize",
    "prune",
    "quantize",
    "sensitivity",
]

if TYPE_CHECKING:
    from optc.backends.artifact import Artifact
    from optc.compression.prune import prune
    from optc.compression.quantize import quantize
    from optc.compression.sensitivity import sensitivity
    from optc.driver import check, compile, optimize
    from optc.errors import OptcError
    from optc.runtime import Model, load
    from optc.source import capture


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        if name == "training":
            return import_module("optc.training")
        raise AttributeError(f"module 'optc' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)
