"""A model in which each product can be computed in float32 or quantized, as an input of the run says.

For a search that tries many mixtures: one compiled graph computes both forms of each product and takes one. Numbers are
those of the model that ``StaticPass`` makes for the same plan, restricted to the products that are on.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as oir

from optc.passes.base import Pass, PassResult
from optc.passes.quantize.products import Product, product, products
from optc.passes.quantize.static import Placement, Plan, bias, dequantized, integers
from optc.passes.quantize.weight_only import turned
from optc.passes.quantize.weights import Integers


def switch_name(product: str) -> str:
    """Return the name of the input that says whether a product is quantized."""
    return f"optc.quantized.{product}"


def rounding_name(value: str) -> str:
    """Return the name of the input that says whether readers other than products take a value rounded."""
    return f"optc.rounded.{value}"


def switches(model: oir.Model, names: frozenset[str], on: frozenset[str], values: bool) -> dict[str, np.ndarray]:
    """Return the inputs of a run with the products ``on``; ``values`` for a plan that rounds activations."""
    found = [p for p in products(model) if p.name in names]
    feeds = {switch_name(p.name): np.array(p.name in on) for p in found}
    if values:
        feeds |= {rounding_name(str(p.x.name)): np.array(False) for p in found}
        feeds |= {rounding_name(str(p.x.name)): np.array(True) for p in found if p.name in on}
    return feeds


class SwitchablePass(Pass):
    """Makes the products of a plan, or those with ``packed`` weights, switchable."""

    name = "switchable-quantization"

    def __init__(self, plan: Plan | None = None, packed: Mapping[str, Integers] | None = None) -> None:
        self.plan, self.packed = plan, packed or {}

    def call(self, model: oir.Model) -> PassResult:
        """Add inputs and the other forms, in place."""
        names = self.plan.products if self.plan is not None else frozenset(self.packed)
        chosen = [p.node for p in products(model) if p.name in names]
        edit = Placement(model, self.plan or Plan(frozenset(), {}))
        for node in chosen:
            found = product(node)
            assert found is not None
            self._double(edit, found)
        for (value, _), rounded in list(edit.rounded.items()):
            switch = _input(edit, rounding_name(str(value.name)))
            edit.readers(value, edit.node("Where", [switch, rounded, value], rounded))
        return PassResult(bool(chosen), {"doubled": len(chosen)} if chosen else {})

    def _double(self, edit: Placement, found: Product) -> None:
        node, output = found.node, found.node.outputs[0]
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        other = edit.node(node.op_type, node.inputs, output, before=node, **attributes)
        copy = other.producer()
        assert copy is not None
        if self.plan is not None:
            twin = Product(copy, found.x, found.weight, found.bias, found.channels)
            edit.product(twin, integers(found, self.plan), bias(found, self.plan))
        else:
            array = self.packed[found.name]
            array = turned(array) if found.channels == 0 else array
            copy.replace_input_with(1, dequantized(edit, found.weight, array, copy))
        uses = list(output.uses())
        result = edit.node("Where", [_input(edit, switch_name(found.name)), other, output], output)
        for user, index in uses:
            user.replace_input_with(index, result)
        for position, value in enumerate(edit.graph.outputs):
            if value is output:
                edit.graph.outputs[position] = result
        # The plan speaks of values by name: the mixture takes the place of what it mixes.
        name = str(output.name)
        output.name = edit.namer.fresh(f"{name}.float")
        result.name = name


def _input(edit: Placement, name: str) -> oir.Value:
    value = oir.Value(name=name, shape=oir.Shape([]), type=oir.TensorType(oir.DataType.BOOL))
    edit.graph.inputs.append(value)
    return value
