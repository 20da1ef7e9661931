"""Operators of onnxruntime's own domain, ``com.microsoft``, become operators of ONNX.

Its optimizer and its quantizers write them, and so do the tools around it (optimum, Olive, onnxruntime-genai).
Definitions are those of its schemas (``docs/ContribOperators.md`` there); where these leave something open, what its
CPU kernels compute.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as oir

from optc.errors import UnsupportedModelError
from optc.frontend import (
    contrib_attention,
    contrib_cached,
    contrib_data,
    contrib_layers,
    contrib_normalization,
    contrib_quantized,
    contrib_weights,
)
from optc.frontend.check import UNDECLARED
from optc.frontend.contrib_node import ContribEdit, Unsettled
from optc.frontend.names import Names
from optc.frontend.upgrade import Refused
from optc.ir import provenance, shapes

DOMAIN = "com.microsoft"
OPERATORS: dict[str, Callable[[ContribEdit], None]] = {
    **contrib_attention.OPERATORS,
    **contrib_cached.OPERATORS,
    **contrib_data.OPERATORS,
    **contrib_layers.OPERATORS,
    **contrib_normalization.OPERATORS,
    **contrib_quantized.OPERATORS,
    **contrib_weights.OPERATORS,
}
"""How each operator is expanded, by its name."""
_BLOCKED = "com.microsoft.nchwc"
_REASONS = {
    "DynamicQuantizeLSTM": "each step rounds its own input to bytes, which LSTM of ONNX does not",
    "MatMulBnb4": "weights are places in a table, which DequantizeLinear cannot say",
    "QMoE": "no operator of ONNX routes rows to experts",
    "MoE": "no operator of ONNX routes rows to experts",
    "SparseAttention": "no operator of ONNX skips blocks of scores",
}


def expand(model: oir.Model, values: Names, nodes: Names) -> None:
    """Replace nodes of ``com.microsoft`` that have an equal in ONNX and need no shape for it, in place.

    Constants are initializers, and names are unique.

    Raises:
        InvalidModelError: attributes or weights that contradict each other.
        UnsupportedModelError: names every node that has no equal in ONNX.
    """
    for node in model.graph.all_nodes():
        if node.domain == "" and node.op_type in UNDECLARED:
            node.domain = DOMAIN
            model.opset_imports.setdefault(DOMAIN, 1)
    _Expansion(model, values, nodes).round(inferred=False)


def settle(model: oir.Model, values: Names, nodes: Names) -> None:
    """Replace the nodes that ``expand`` left because shapes were not known; the rest of the model is canonical.

    Other operators of the domain stay.

    Raises:
        InvalidModelError: attributes or weights that contradict each other.
        UnsupportedModelError: names every node that has no equal in ONNX, or whose shapes nothing tells.
    """
    expansion = _Expansion(model, values, nodes)
    left = expansion.count()
    while left:
        shapes.infer(model)
        unsettled = expansion.round(inferred=True)
        if expansion.count() == left:
            raise _error(unsettled)
        left = expansion.count()
    if not any(node.domain == DOMAIN for node in model.graph.all_nodes()):
        model.opset_imports.pop(DOMAIN, None)


class _Expansion:
    def __init__(self, model: oir.Model, values: Names, nodes: Names) -> None:
        self._model = model
        self._values = values
        self._nodes = nodes

    def count(self) -> int:
        return sum(_function(node) is not None for node in self._model.graph.all_nodes())

    def round(self, *, inferred: bool) -> list[str]:
        """Expand what can be expanded; return what has to wait, with the reason."""
        refused, unsettled = [], []
        for node in list(self._model.graph.all_nodes()):
            function = _function(node)
            if node.domain == _BLOCKED:
                refused.append(f"{provenance.describe(node)}: its memory layout is that of one machine")
            elif node.domain == DOMAIN and node.op_type in _REASONS:
                refused.append(f"{provenance.describe(node)}: {_REASONS[node.op_type]}")
            if function is None:
                continue
            try:
                function(ContribEdit(self._model, node, self._values, self._nodes, inferred=inferred))
            except Unsettled as reason:
                unsettled.append(f"{provenance.describe(node)}: {reason}")
            except Refused as reason:
                refused.append(f"{provenance.describe(node)}: {reason}")
        if refused:
            raise _error(refused)
        return unsettled


def _function(node: oir.Node) -> Callable[[ContribEdit], None] | None:
    return OPERATORS.get(node.op_type) if node.domain == DOMAIN else None


def _error(reasons: list[str]) -> UnsupportedModelError:
    blocked = any("memory layout" in reason for reason in reasons)
    return UnsupportedModelError(
        "nodes of onnxruntime's own domains that have no equal in ONNX:\n  " + "\n  ".join(reasons),
        hint="save the model with ORT_ENABLE_EXTENDED instead of ORT_ENABLE_ALL, or give the one before optimization"
        if blocked
        else "give the model before onnxruntime's optimizer, or quantized as QuantizeLinear and DequantizeLinear (QDQ)",
    )
