"""The IR that every room speaks: an ``onnx_ir.Model`` in canonical form, with checks and views.

Submodules: ``dims`` and ``shapes`` (symbolic shapes), ``verifier``, ``provenance``, ``graph`` (networkx view),
``cost``, ``text``, ``reference`` (evaluation by onnx), ``serialize`` (ONNX files). Functions are loaded when they are
first used: ``import optc.ir`` loads neither networkx nor onnx's reference evaluator nor the shape rules.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from optc.ir import provenance

if TYPE_CHECKING:
    from optc.ir.cost import estimate
    from optc.ir.dims import bind, dim_names
    from optc.ir.graph import to_networkx
    from optc.ir.reference import evaluate
    from optc.ir.serialize import save, to_proto
    from optc.ir.shapes import infer
    from optc.ir.text import summary, to_text
    from optc.ir.verifier import verify, violations

CANONICAL_OPSET = 26
"""The version of the default operator set that the frontend converts every model to."""

IR_VERSION = 13
"""The ONNX IR version that models are saved with, unless one of their types needs a newer one."""

_HOMES = {
    "bind": "dims",
    "dim_names": "dims",
    "estimate": "cost",
    "evaluate": "reference",
    "infer": "shapes",
    "save": "serialize",
    "summary": "text",
    "to_networkx": "graph",
    "to_proto": "serialize",
    "to_text": "text",
    "verify": "verifier",
    "violations": "verifier",
}

__all__ = [
    "CANONICAL_OPSET",
    "IR_VERSION",
    "bind",
    "dim_names",
    "estimate",
    "evaluate",
    "infer",
    "provenance",
    "save",
    "summary",
    "to_networkx",
    "to_proto",
    "to_text",
    "verify",
    "violations",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"optc.ir.{_HOMES[name]}"), name)
