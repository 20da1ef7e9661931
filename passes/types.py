"""Types and shapes of single new nodes: a rewrite leaves the model canonical without a whole inference."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as oir
import onnx_shape_inference

from optc.ir import dims, schemas, shape_rules


class NodeTyper:
    """Fills in what new nodes lack: default attributes, output types and shapes. One per pass call."""

    def __init__(self, model: oir.Model) -> None:
        self._model = model
        self._context: onnx_shape_inference.ShapeInferenceContext | None = None

    def infer(self, nodes: Iterable[oir.Node]) -> None:
        """Complete new nodes, in order; the inputs of the first have to be typed.

        What an operator's inference cannot tell stays unknown; unknown dims get fresh names.
        """
        for node in nodes:
            version = self._model.opset_imports.get(node.domain, 1)
            schemas.state_defaults(node, version)
            if all(v.type is not None and v.shape is not None for v in node.outputs):
                continue
            context = self._ready()
            function = onnx_shape_inference.registry.get(node.domain, node.op_type, version=version)
            if function is None:
                continue
            before = [v.shape for v in node.outputs]
            function(context, node)
            shape_rules.correct(context, node, before)
            for value in node.outputs:
                # Inference leaves symbolic contents on values; only initializers are constant in our IR.
                value.metadata_props.pop(onnx_shape_inference.SYM_DATA_KEY, None)
                value.const_value = None
                if value.shape is not None:
                    value.shape = oir.Shape(dims.canonical(value.shape.dims))

    def _ready(self) -> onnx_shape_inference.ShapeInferenceContext:
        if self._context is None:
            onnx_shape_inference.registry.collect()
            self._context = onnx_shape_inference.ShapeInferenceContext(self._model.opset_imports)
            self._context.reserve_symbol_names(dims.used_names(dims.all_values(self._model.graph)))
        return self._context
