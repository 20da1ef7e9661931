"""The IR that every room speaks: an ``onnx_ir.Model`` in canonical form, with checks and views.

Imports are lazy: ``import optc.ir`` loads none of sympy, networkx and onnx's reference evaluator.
"""

from __future__ import annotations

from optc.ir import provenance

CANONICAL_OPSET = 26
"""The version of the default operator set that the frontend converts every model to."""

IR_VERSION = 13
"""The ONNX IR version that models are saved with, unless one of their types needs a newer one."""

__all__ = ["CANONICAL_OPSET", "IR_VERSION", "provenance"]
