"""Types and shapes of single new nodes: a rewrite leaves the model canonical without a whole inference."""

from __future__ import annotations

import re
from collections.abc import Iterable

import onnx_ir as oir
import onnx_shape_inference

_IDENTIFIER = re.compile(r"[A-Za-z_][\w.]*")


class NodeTyper:
    """Fills in the missing output types and shapes of nodes whose inputs are typed. One per pass call."""

    def __init__(self, model: oir.Model) -> None:
        self._model = model
        self._context: onnx_shape_inference.ShapeInferenceContext | None = None

    def infer(self, nodes: Iterable[oir.Node]) -> None:
        """Infer, in order, the nodes that have an output without type or shape.

        What an operator's inference cannot tell stays unknown; unknown dims get fresh names.
        """
        for node in nodes:
            if all(v.type is not None and v.shape is not None for v in node.outputs):
                continue
            function = onnx_shape_inference.registry.get(
                node.domain, node.op_type, version=self._model.opset_imports.get(node.domain, 1)
            )
            if function is None:
                continue
            function(self._ready(), node)
            for value in node.outputs:
                # Inference leaves symbolic contents on values; only initializers are constant in our IR.
                value.metadata_props.pop(onnx_shape_inference.SYM_DATA_KEY, None)
                value.const_value = None

    def _ready(self) -> onnx_shape_inference.ShapeInferenceContext:
        if self._context is None:
            onnx_shape_inference.registry.collect()
            self._context = onnx_shape_inference.ShapeInferenceContext(self._model.opset_imports)
            self._context.reserve_symbol_names(symbol_names(self._model))
        return self._context


def symbol_names(model: oir.Model) -> set[str]:
    """Return every identifier that a dim of the model uses."""
    texts: set[str] = set()
    for graph in model.graphs():
        for value in graph.inputs:
            _collect(value, texts)
        for node in graph:
            for value in node.outputs:
                _collect(value, texts)
    return {name for text in texts for name in _IDENTIFIER.findall(text)}


def _collect(value: oir.Value, texts: set[str]) -> None:
    if value.shape is not None:
        texts.update(d.value for d in value.shape if isinstance(d, oir.SymbolicDim) and d.value)
