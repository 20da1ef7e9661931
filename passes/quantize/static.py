"""Static quantization: QuantizeLinear and DequantizeLinear around the products of a plan.

They stand where the integer pass can use them: operators that only move elements pass integers on, a sum or pooling
that reads what is quantized anyway reads the integers, and a bias is added to the sum in int32. What comes between
a product and the next rounding (activations, residual sums) stays in float32, where fused kernels keep it in registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as oir

from optc.passes.base import Pass, PassResult
from optc.passes.match import constant, producer
from optc.passes.quantize import weights
from optc.passes.quantize.edit import Edit
from optc.passes.quantize.encoding import DTYPES, Encoding
from optc.passes.quantize.products import Product, products

_MOVING = (
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "DepthToSpace", "SpaceToDepth", "MaxPool",
    "Concat",
)  # fmt: skip
_READING = ("Add", "Mul", "GlobalAveragePool", "AveragePool", "ReduceMean", "Resize")
_NORMALIZING = ("LayerNormalization", "RMSNormalization", "SkipLayerNormalization")


@dataclass(frozen=True)
class Plan:
    """What is quantized, and how.

    Attributes:
        products: names of the products to quantize.
        encodings: by the name of the value that such a product reads.
        weights: integers to use in place of rounding to nearest, by the name of the product.
        biases: float32 biases to use in place of the model's, by the name of the product.
        bits: of weights that are rounded to nearest; 7 are exact in 16-bit sums of pairs.
        per_channel: whether weights have a scale for each output channel.
    """

    products: frozenset[str]
    encodings: Mapping[str, Encoding]
    weights: Mapping[str, weights.Integers] = field(default_factory=dict)
    biases: Mapping[str, np.ndarray] = field(default_factory=dict)
    bits: int = 8
    per_channel: bool = True

    def restricted(self, names: frozenset[str]) -> Plan:
        """Return the plan for some of its products alone."""
        return replace(self, products=self.products & names)


def integers(found: Product, plan: Plan) -> weights.Integers:
    """Return the weights of a product as the plan has them."""
    given = plan.weights.get(found.name)
    if given is not None:
        return given
    return weights.per_channel(
        found.array(),
        found.channels,
        bits=plan.bits,
        single=not plan.per_channel,
        bias=bias(found, plan),
        x_scale=plan.encodings[str(found.x.name)].scale,
    )


def bias(found: Product, plan: Plan) -> np.ndarray | None:
    """Return the float32 bias of a product as the plan has it, None if there is none."""
    return plan.biases.get(found.name, constant(found.bias))


class StaticPass(Pass):
    """Quantizes what a plan says. What the plan names must be in the model."""

    name = "static-quantization"

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def call(self, model: oir.Model) -> PassResult:
        """Insert the nodes, in place."""
        chosen = [found for found in products(model) if found.name in self.plan.products]
        work = Placement(model, self.plan)
        for found in chosen:
            work.product(found, integers(found, self.plan), bias(found, self.plan))
        for value, read in list(work.rounded.items()):
            work.readers(value[0], read)
        return PassResult(bool(chosen), {"quantized": len(chosen)} if chosen else {})


class Placement(Edit):
    """Puts the nodes of a plan into a model."""

    def __init__(self, model: oir.Model, plan: Plan) -> None:
        super().__init__(model, StaticPass.name)
        self.plan = plan
        self.rounded: dict[tuple[oir.Value, Encoding], oir.Value] = {}
        self.scalars: dict[Encoding, list[oir.Value]] = {}

    def product(self, found: Product, array: weights.Integers, bias: np.ndarray | None) -> None:
        """Quantize what a product reads; ``array`` are its weights."""
        encoding = self.plan.encodings[str(found.x.name)]
        node = found.node
        node.replace_input_with(0, self.round(found.x, encoding))
        node.replace_input_with(1, dequantized(self, found.weight, array, node))
        self.discard(found.weight)
        if found.bias is None or bias is None:
            return
        scale = np.asarray(np.float32(encoding.scale) * array.scale, np.float32)
        scales = np.full(bias.shape, scale, np.float32) if scale.ndim == 0 else scale
        wide = encoding.dtype.endswith("16") or array.zero is not None or bool(array.block)
        if wide or scales.shape != bias.shape or np.any(np.abs(bias / scales) > weights.BIAS_LIMIT):
            new = self.constant(np.asarray(bias, np.float32), f"{found.bias.name}.corrected")
        else:
            inputs = [self.constant(weights.round_bias(bias, scales), f"{found.bias.name}.integers")]
            inputs.append(self.constant(scale, f"{found.bias.name}.scale"))
            new = self.node("DequantizeLinear", inputs, found.bias, before=node, axis=0)
        node.replace_input_with(2, new)
        self.discard(found.bias)

    def round(self, value: oir.Value, encoding: Encoding) -> oir.Value:
        """Return ``value`` rounded; behind operators that move elements, these move what is rounded before."""
        key = (value, encoding)
        if key in self.rounded:
            return self.rounded[key]
        mover = producer(value, *_MOVING)
        if mover is not None and self._moves(mover) and self._all_rounded(value, encoding):
            for index in _moved(mover):
                source = mover.inputs[index]
                assert source is not None
                mover.replace_input_with(index, self.round(source, encoding))
        parameters = self._scalars(value, encoding)
        kind = oir.DataType.from_numpy(DTYPES[encoding.dtype])
        quantized = self.node("QuantizeLinear", [value, *parameters], value, dtype=kind)
        result = self.node("DequantizeLinear", [quantized, *parameters], quantized, dtype=value.dtype)
        self.rounded[key] = result
        return result

    def readers(self, value: oir.Value, rounded: oir.Value) -> None:
        """Let operators that can do with rounded values read them, so that nobody needs the floats."""
        for node, index in list(value.uses()):
            if node.domain != "" or node.op_type not in _READING or node.graph is not self.graph or _normalized(node):
                continue
            if index == 0 or node.op_type in ("Add", "Mul"):
                node.replace_input_with(index, rounded)

    def _moves(self, mover: oir.Node) -> bool:
        sources = [mover.inputs[index] for index in _moved(mover)]
        return (
            mover.graph is self.graph
            and len(mover.outputs) == 1
            and all(s is not None and s.dtype == oir.DataType.FLOAT and constant(s) is None for s in sources)
        )

    def _all_rounded(self, value: oir.Value, encoding: Encoding) -> bool:
        """Tell whether only products of the plan that share an encoding read ``value``."""
        if value.is_graph_output():
            return False
        names = self.plan.products
        return all(
            node.graph is self.graph
            and ((node.name in names and index == 0) or node.op_type in _MOVING or node.op_type == "QuantizeLinear")
            for node, index in value.uses()
        ) and all(e == encoding for (v, e) in self.rounded if v is value)

    def _scalars(self, value: oir.Value, encoding: Encoding) -> list[oir.Value]:
        if encoding not in self.scalars:
            scale = self.constant(np.array(encoding.scale, np.float32), f"{value.name}.scale")
            zero = self.constant(np.array(encoding.zero, DTYPES[encoding.dtype]), f"{value.name}.zero")
            self.scalars[encoding] = [scale, zero]
        return self.scalars[encoding]


def dequantized(edit: Edit, weight: oir.Value, array: weights.Integers, reader: oir.Node) -> oir.Value:
    """Insert a DequantizeLinear of ``array`` in place of ``weight`` in front of ``reader``."""
    inputs = [
        edit.constant(array.values, f"{weight.name}.integers"),
        edit.constant(array.scale, f"{weight.name}.scale"),
    ]
    if array.zero is not None:
        inputs.append(edit.constant(array.zero, f"{weight.name}.zero"))
    return edit.node("DequantizeLinear", inputs, weight, before=reader, axis=array.axis, block_size=array.block)


def _moved(mover: oir.Node) -> range:
    """Return the inputs whose elements an operator moves."""
    return range(len(mover.inputs) if mover.op_type == "Concat" else 1)


def _normalized(node: oir.Node) -> bool:
    """Tell whether a sum is normalized: what normalization divides by may be far smaller than the largest value."""
    return node.op_type == "Add" and any(user.op_type in _NORMALIZING for user, _ in node.outputs[0].uses())
