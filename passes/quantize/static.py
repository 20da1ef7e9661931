"""Static quantization: QuantizeLinear and DequantizeLinear around the products of a plan.

They stand where the integer pass can use them: operators that only move elements pass integers on, a sum or pooling
that reads what is quantized anyway reads the integers, and a bias is added to the sum in int32. What comes between
a product and the next rounding (activations, residual sums) stays in float32, where fused kernels keep it in registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as oir

from optc.ir import provenance, schemas
from optc.passes.base import Pass, PassResult
from optc.passes.match import constant, producer
from optc.passes.quantize import weights
from optc.passes.quantize.encoding import DTYPES, Encoding
from optc.passes.quantize.products import Product, products
from optc.passes.rewrite import Namer, is_unused_initializer

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


def integers(found: Product, plan: Plan) -> weights.Integers:
    """Return the weights of a product as the plan has them."""
    given = plan.weights.get(found.name)
    if given is not None:
        return given
    bias = plan.biases.get(found.name, constant(found.bias))
    return weights.per_channel(
        found.array(),
        found.channels,
        bits=plan.bits,
        single=not plan.per_channel,
        bias=bias,
        x_scale=plan.encodings[str(found.x.name)].scale,
    )


class StaticPass(Pass):
    """Quantizes what a plan says. What the plan names must be in the model."""

    name = "static-quantization"

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def call(self, model: oir.Model) -> PassResult:
        """Insert the nodes, in place."""
        chosen = [found for found in products(model) if found.name in self.plan.products]
        work = _Insertion(model, self.plan)
        for found in chosen:
            work.product(found)
        for value, read in list(work.rounded.items()):
            work.readers(value[0], read)
        return PassResult(bool(chosen), {"quantized": len(chosen)} if chosen else {})


class _Insertion:
    def __init__(self, model: oir.Model, plan: Plan) -> None:
        self.graph, self.plan, self.namer = model.graph, plan, Namer(model)
        self.rounded: dict[tuple[oir.Value, Encoding], oir.Value] = {}
        self.scalars: dict[Encoding, list[oir.Value]] = {}

    def product(self, found: Product) -> None:
        encoding = self.plan.encodings[str(found.x.name)]
        wide = encoding.dtype.endswith("16")
        array = integers(found, self.plan)
        node = found.node
        node.replace_input_with(0, self.round(found.x, encoding))
        inputs = [self._constant(array.values, f"{found.weight.name}.integers"), *self._parameters(array, found.weight)]
        node.replace_input_with(
            1, self._dequantize(inputs, found.weight, node, axis=array.axis, block_size=array.block)
        )
        self._discard(found.weight)
        bias = self.plan.biases.get(found.name, constant(found.bias))
        if found.bias is None or bias is None:
            return
        if wide or array.zero is not None or array.block or array.scale.size not in (1, bias.size) or bias.ndim != 1:
            new = self._constant(np.asarray(bias, np.float32), f"{found.bias.name}.corrected")
        else:
            scale = np.asarray(np.float32(encoding.scale) * array.scale, np.float32)
            scales = np.full(bias.shape, scale, np.float32) if scale.ndim == 0 else scale
            inputs = [self._constant(weights.round_bias(bias, scales), f"{found.bias.name}.integers")]
            inputs.append(self._constant(scale, f"{found.bias.name}.scale"))
            new = self._dequantize(inputs, found.bias, node, axis=0)
        node.replace_input_with(2, new)
        self._discard(found.bias)

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
        quantized = self._node("QuantizeLinear", [value, *self._scalars(value, encoding)], value, value.producer())
        quantized.type = oir.TensorType(oir.DataType.from_numpy(DTYPES[encoding.dtype]))
        made = quantized.producer()
        result = self._node("DequantizeLinear", [quantized, *self._scalars(value, encoding)], value, made)
        result.type = value.type
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
            scale = self._constant(np.array(encoding.scale, np.float32), f"{value.name}.scale")
            zero = self._constant(np.array(encoding.zero, DTYPES[encoding.dtype]), f"{value.name}.zero")
            self.scalars[encoding] = [scale, zero]
        return self.scalars[encoding]

    def _parameters(self, array: weights.Integers, weight: oir.Value) -> list[oir.Value]:
        found = [self._constant(array.scale, f"{weight.name}.scale")]
        if array.zero is not None:
            found.append(self._constant(array.zero, f"{weight.name}.zero"))
        return found

    def _dequantize(self, inputs: list[oir.Value], like: oir.Value, reader: oir.Node, **attributes: int) -> oir.Value:
        output = self._node("DequantizeLinear", inputs, like, None, before=reader, **attributes)
        output.type = like.type
        return output

    def _node(
        self,
        op: str,
        inputs: list[oir.Value],
        like: oir.Value,
        after: oir.Node | None,
        before: oir.Node | None = None,
        **attributes: int,
    ) -> oir.Value:
        node = oir.node(op, inputs, attributes, name=self.namer.fresh(f"{like.name}/{op}"))
        schemas.state_defaults(node, self.graph.opset_imports[""])
        output = node.outputs[0]
        output.name, output.shape = self.namer.fresh(f"{like.name}.{op}"), like.shape
        provenance.inherit(node, [after] if after is not None else [], made_by="static-quantization")
        if before is not None:
            self.graph.insert_before(before, [node])
        elif after is not None:
            self.graph.insert_after(after, [node])
        else:
            self.graph.insert_before(self.graph[0], [node])
        return output

    def _constant(self, array: np.ndarray, name: str) -> oir.Value:
        tensor = oir.tensor(np.ascontiguousarray(array).reshape(array.shape))
        value = oir.Value(
            name=self.namer.fresh(name),
            shape=oir.Shape(array.shape),
            type=oir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.initializers.add(value)
        return value

    def _discard(self, value: oir.Value) -> None:
        if is_unused_initializer(value):
            self.graph.initializers.pop(str(value.name))


def _moved(mover: oir.Node) -> range:
    """Return the inputs whose elements an operator moves."""
    return range(len(mover.inputs) if mover.op_type == "Concat" else 1)


def _normalized(node: oir.Node) -> bool:
    """Tell whether a sum is normalized: what normalization divides by may be far smaller than the largest value."""
    return node.op_type == "Add" and any(user.op_type in _NORMALIZING for user, _ in node.outputs[0].uses())
