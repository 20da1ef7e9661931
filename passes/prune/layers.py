"""Layers that are a product with constant weights, as rows of what goes in and what comes out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as oir

from optc.ir import provenance
from optc.passes.match import constant, input_or_none, int_attribute
from optc.passes.rewrite import Namer, replace_value


@dataclass(frozen=True)
class Layer:
    """A Conv without groups, MatMul or Gemm whose weights nothing else reads; its bias is a constant vector or none."""

    node: oir.Node
    weight: oir.Value

    @property
    def input(self) -> str:
        """The name of what goes in."""
        assert self.node.inputs[0] is not None
        return str(self.node.inputs[0].name)

    @property
    def output(self) -> str:
        """The name of what comes out."""
        return str(self.node.outputs[0].name)

    @property
    def input_axis(self) -> int:
        """The axis of the weights that is summed over with channels of the input."""
        if self.node.op_type == "Conv":
            return 1
        return int(self.node.op_type == "Gemm" and int_attribute(self.node, "transB", 0))

    @property
    def _columns_first(self) -> bool:
        return self.input_axis == 1

    def matrix(self) -> np.ndarray:
        """Return the weights as [features, columns]; the features of a Conv are channels, then places of the kernel."""
        array = constant(self.weight)
        assert array is not None
        return self.as_matrix(array)

    def as_matrix(self, array: np.ndarray) -> np.ndarray:
        """Return something in the shape of the weights as [features, columns]."""
        flat = array.reshape(array.shape[0], -1)
        return flat.T if self._columns_first else flat

    def bias(self) -> np.ndarray | float:
        """Return what the layer itself adds to its columns."""
        known = constant(input_or_none(self.node, 2))
        return 0.0 if known is None else known

    def like_weight(self, matrix: np.ndarray) -> np.ndarray:
        """Return a matrix of that form in the shape and type of the weights."""
        array = constant(self.weight)
        assert array is not None
        flat = (matrix.T if self._columns_first else matrix).reshape(array.shape)
        return np.ascontiguousarray(flat, dtype=array.dtype)

    def set(self, matrix: np.ndarray) -> None:
        """Replace the weights by a matrix of that form."""
        self.weight.const_value = oir.tensor(self.like_weight(matrix), name=self.weight.name)

    def rows(self, x: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return some rows [places, features] of the input [..., features] or [N, C, ...]; see ``outputs``."""
        if self.node.op_type != "Conv":
            picked: np.ndarray = x.reshape(-1, x.shape[-1])[places]
            return picked
        # [N, C, places..., kernel...]: the chosen places alone are copied.
        order = np.moveaxis(self._windows(x), 1, x.ndim - 1)
        chosen: np.ndarray = order[np.unravel_index(places, order.shape[: x.ndim - 1])]
        return chosen.reshape(len(places), -1)

    def _windows(self, x: np.ndarray) -> np.ndarray:
        """Return a view [N, C, places..., kernel...] of what the kernel sees at each place."""
        spatial = x.ndim - 2
        pads = _ints(self.node, "pads", [0] * 2 * spatial)
        strides, dilations = _ints(self.node, "strides", [1] * spatial), _ints(self.node, "dilations", [1] * spatial)
        assert self.weight.shape is not None
        kernel = [int(n) for n in self.weight.shape.numpy()[2:]]
        padded = np.pad(x, [(0, 0), (0, 0), *zip(pads[:spatial], pads[spatial:], strict=True)])
        extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        windows = np.lib.stride_tricks.sliding_window_view(padded, extent, tuple(range(2, 2 + spatial)))
        steps = (slice(None), slice(None), *(slice(None, None, s) for s in strides))
        seen: np.ndarray = windows[(*steps, *(slice(None, None, d) for d in dilations))]
        return seen

    def outputs(self, y: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return some rows [places, columns] of the output, whose places are counted in row-major order."""
        last = np.moveaxis(y, 1, -1) if self.node.op_type == "Conv" else y
        rows: np.ndarray = last.reshape(-1, last.shape[-1])[places]
        return rows

    def places(self, x: np.ndarray) -> int:
        """Return how many places the output for the input ``x`` has."""
        if self.node.op_type != "Conv":
            return math.prod(x.shape[:-1])
        shape = self._windows(x).shape
        return math.prod((shape[0], *shape[2 : x.ndim]))


def find(model: oir.Model) -> list[Layer]:
    """Return the layers of a model in order."""
    return [
        Layer(node, weight)
        for node in model.graph
        if node.domain == "" and node.op_type in ("Conv", "MatMul", "Gemm")
        and (weight := node.inputs[1]) is not None
        and _is_plain(node, weight)
    ]  # fmt: skip


def _is_plain(node: oir.Node, weight: oir.Value) -> bool:
    array = constant(weight)
    if array is None or array.dtype != np.float32 or len(weight.uses()) != 1:
        return False
    bias = input_or_none(node, 2)
    known = constant(bias)
    if bias is not None and (known is None or known.ndim != 1):
        return False
    if node.op_type == "Conv":
        return int_attribute(node, "group", 1) == 1 and node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
    return array.ndim == 2 and not int_attribute(node, "transA", 0) and not _scaled(node)


def _scaled(node: oir.Node) -> bool:
    return any(node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta"))


def _ints(node: oir.Node, name: str, default: list[int]) -> list[int]:
    attribute = node.attributes.get(name)
    return list(attribute.as_ints()) if attribute is not None else default


def shift(model: oir.Model, node: oir.Node, amount: np.ndarray) -> None:
    """Add a vector to the columns of a layer's output: to its bias, or by an addition of its own."""
    bias = input_or_none(node, 2)
    known = constant(bias)
    if bias is not None and known is not None and len(bias.uses()) == 1:
        bias.const_value = oir.tensor(known + amount.astype(known.dtype), name=bias.name)
        return
    value = initializer(model, f"{node.name}.shift", amount)
    if node.op_type != "MatMul" and bias is None:
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, value)
        return
    old = node.outputs[0]
    if node.op_type == "Conv":
        rank = len(old.shape or ())
        value.const_value = oir.tensor(amount.reshape(-1, *[1] * (rank - 2)), name=value.name)
        value.shape = oir.Shape((len(amount), *[1] * (rank - 2)))
    _add_after(model, node, value)


def initializer(model: oir.Model, name: str, array: np.ndarray) -> oir.Value:
    """Add float32 weights to a model."""
    tensor = oir.tensor(np.ascontiguousarray(array, dtype=np.float32), name=name)
    value = oir.Value(name=name, shape=oir.Shape(array.shape), type=oir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.initializers.add(value)
    return value


def _add_after(model: oir.Model, node: oir.Node, value: oir.Value) -> None:
    old = node.outputs[0]
    add = oir.node("Add", [old, value], name=f"{node.name}.shifted")
    (new,) = add.outputs
    new.name, new.type, new.shape = f"{old.name}.shifted", old.type, old.shape
    provenance.inherit(add, [node], made_by="reconstruction")
    model.graph.insert_after(node, [add])
    replace_value(model.graph, old, new, Namer(model))
    add.replace_input_with(0, old)
