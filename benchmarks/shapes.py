"""Random shapes of matrix products, convolutions and softmax, as models of one node; the same ones every time."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

SEED = 7
COUNTS = {"gemm": 70, "conv": 90, "softmax": 40}


@dataclass(frozen=True)
class Shape:
    """One node with its sizes; ``weight`` is the shape of its constant operand, if it has one."""

    name: str
    op: str
    data: tuple[int, ...]
    operations: int
    weight: tuple[int, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)

    def model(self) -> onnx.ModelProto:
        """Return the model: one input ``x``, one output ``y``, opset 20."""
        constants = []
        if self.weight:
            values = np.random.default_rng(SEED).standard_normal(self.weight, np.float32) / np.sqrt(self.depth)
            constants = [onnx.numpy_helper.from_array(values.astype(np.float32), "w")]
        node = helper.make_node(self.op, ["x", *(c.name for c in constants)], ["y"], **self.attributes)
        kind = onnx.TensorProto.FLOAT
        x, y = helper.make_tensor_value_info("x", kind, self.data), helper.make_tensor_value_info("y", kind, None)
        graph = helper.make_graph([node], "shape", [x], [y], constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        return onnx.shape_inference.infer_shapes(model)

    @property
    def depth(self) -> int:
        """How many products each output element sums."""
        return self.weight[0] if self.op == "MatMul" else prod(self.weight[1:])

    def save(self, folder: Path) -> Path:
        """Write the model into ``folder``."""
        file = folder / "shape.onnx"
        onnx.save(self.model(), file)
        return file

    def inputs(self) -> dict[str, np.ndarray]:
        """Return the input, aligned so that no contestant has to copy it."""
        from optc.runtime.inputs import aligned_empty

        x = aligned_empty(self.data, np.dtype(np.float32))
        x[...] = np.random.default_rng(SEED + 1).standard_normal(self.data, np.float32)
        return {"x": x}

    def expected(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray] | None:
        """Return the result in float64 by NumPy; None for convolutions."""
        x = inputs["x"].astype(np.float64)
        if self.op == "MatMul":
            weight = onnx.numpy_helper.to_array(self.model().graph.initializer[0])
            return [x @ weight.astype(np.float64)]
        if self.op == "Softmax":
            axis = self.attributes["axis"]
            powers = np.exp(x - x.max(axis, keepdims=True))
            return [powers / powers.sum(axis, keepdims=True)]
        return None


def _gemm(generator: np.random.Generator) -> Shape:
    small = generator.random() < 0.4
    m, n, k = (_size(generator, low if small else 96, 2048) for low in (1, 8, 8))
    m = min(m, max(1, 400_000_000 // (n * k)))
    return Shape(f"gemm {m}x{n}x{k}", "MatMul", (m, k), 2 * m * n * k, (k, n))


def _conv(generator: np.random.Generator) -> Shape:
    pixels = int(generator.choice([7, 13, 14, 20, 28, 35, 40, 56, 80, 112]))
    least = 3 if generator.random() < 0.5 else 48
    channels, outputs = (_size(generator, least, 512 if pixels < 60 else 96) for _ in range(2))
    kernel = int(generator.choice([1, 1, 3, 3, 3, 5, 7]))
    stride = int(generator.choice([1, 1, 1, 2]))
    group = 1
    if generator.random() < 0.2:
        group, outputs = channels, channels
    padding = kernel // 2 if generator.random() < 0.8 else 0
    height = max(kernel, pixels + int(generator.integers(-1, 2)))
    size = [(s + 2 * padding - kernel) // stride + 1 for s in (height, max(kernel, pixels))]
    operations = 2 * outputs * size[0] * size[1] * channels // group * kernel * kernel
    attributes = {"strides": [stride] * 2, "pads": [padding] * 4, "group": group}
    name = f"conv {channels}->{outputs} {height}x{max(kernel, pixels)} k{kernel} s{stride} p{padding}"
    data, weight = (1, channels, height, max(kernel, pixels)), (outputs, channels // group, kernel, kernel)
    return Shape(name + (" depthwise" if group > 1 else ""), "Conv", data, operations, weight, attributes)


def _softmax(generator: np.random.Generator) -> Shape:
    rank = int(generator.integers(2, 5))
    shape = tuple(_size(generator, 1, 3000 if axis == rank - 1 else 256) for axis in range(rank))
    while prod(shape) > 4_000_000:
        shape = (max(1, shape[0] // 2), *(max(1, s - s // 3) for s in shape[1:]))
    axis = -1 if generator.random() < 0.8 else int(generator.integers(0, rank))
    name = f"softmax {'x'.join(map(str, shape))} axis {axis}"
    return Shape(name, "Softmax", shape, 11 * prod(shape), attributes={"axis": axis})


def _size(generator: np.random.Generator, low: int, high: int) -> int:
    """Return a size, small ones as likely as large ones; half of them are multiples of eight."""
    size = round(float(np.exp(generator.uniform(np.log(low), np.log(high)))))
    return max(8, size // 8 * 8) if size > 8 and generator.random() < 0.5 else size


def _draw() -> dict[str, list[Shape]]:
    makers = {"gemm": _gemm, "conv": _conv, "softmax": _softmax}
    drawn = {}
    for kind, count in COUNTS.items():
        generator = np.random.default_rng(SEED)
        found: dict[str, Shape] = {}
        while len(found) < count:
            shape = makers[kind](generator)
            found.setdefault(shape.name, shape)
        drawn[kind] = list(found.values())
    return drawn


SHAPES = _draw()
