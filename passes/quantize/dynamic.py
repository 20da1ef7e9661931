"""Dynamic int8: weights are integers, and what they are multiplied with is rounded by the range that each run has.

No calibration data is needed; each product pays for finding the range. In the graph it is what ONNX has for it:
DynamicQuantizeLinear, MatMulInteger or ConvInteger, and a multiplication with both scales.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from optc.passes.base import Pass, PassResult
from optc.passes.match import rank
from optc.passes.quantize import weights
from optc.passes.quantize.edit import Edit
from optc.passes.quantize.products import Product, product, products
from optc.passes.rewrite import replace_value


class DynamicPass(Pass):
    """Quantizes the products called ``names``."""

    name = "dynamic-quantization"

    def __init__(self, names: frozenset[str], bits: int = 8) -> None:
        self.names, self.bits = names, bits

    def call(self, model: oir.Model) -> PassResult:
        """Replace the products, in place."""
        edit, rounded = Edit(model, self.name), dict[oir.Value, oir.Node]()
        chosen = [p.node for p in products(model) if p.name in self.names]
        for node in chosen:
            found = product(node)  # anew: what it reads may have been replaced since
            assert found is not None
            if found.x not in rounded:
                rounded[found.x] = _rounded(edit, found.x)
            self._replace(edit, found, rounded[found.x])
        return PassResult(bool(chosen), {"quantized": len(chosen)} if chosen else {})

    def _replace(self, edit: Edit, found: Product, source: oir.Node) -> None:
        node, output = found.node, found.node.outputs[0]
        x, x_scale, x_zero = source.outputs
        conv = node.op_type == "Conv"
        array = weights.per_channel(found.array(), found.channels, bits=self.bits)
        turned = not conv and found.channels == 0
        values = edit.constant(array.values.T if turned else array.values, f"{found.weight.name}.integers")
        attributes = {k: a.value for k, a in node.attributes.items()} if conv else {}
        total = edit.node(
            "ConvInteger" if conv else "MatMulInteger",
            [x, values, x_zero],
            output,
            before=node,
            dtype=oir.DataType.INT32,
            **attributes,
        )
        wide = edit.node("Cast", [total], output, before=node, to=int(oir.DataType.FLOAT))
        along = [1, -1, *[1] * ((rank(output) or 2) - 2)] if conv else [-1]
        scale = edit.constant(array.scale.reshape(along), f"{found.weight.name}.scale")
        both = edit.node("Mul", [x_scale, scale], scale, before=node)
        result = edit.node("Mul", [wide, both], output, before=node)
        if found.bias is not None and found.bias.const_value is not None:
            bias = np.asarray(found.bias.const_value.numpy())
            addend = edit.constant(bias.reshape(along) if conv else bias, f"{found.bias.name}.bias")
            result = edit.node("Add", [result, addend], output, before=node)
        replace_value(edit.graph, output, result, edit.namer)
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)
        edit.graph.remove(node, safe=True)
        edit.discard(found.weight)
        edit.discard(found.bias)


def _rounded(edit: Edit, x: oir.Value) -> oir.Node:
    first = edit.node("DynamicQuantizeLinear", [x], x, dtype=oir.DataType.UINT8, outputs=3)
    node = first.producer()
    assert node is not None
    for output, dtype in zip(node.outputs[1:], (oir.DataType.FLOAT, oir.DataType.UINT8), strict=True):
        output.shape, output.type = oir.Shape([]), oir.TensorType(dtype)
    return node
