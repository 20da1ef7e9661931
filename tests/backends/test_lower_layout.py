"""Channels-last values: random chains of operators behind a convolution give what they give on ``[N, C, *S]``."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import helper

F = np.float32


class Chain:
    """Builds a random model: a convolution, then operators that keep, permute or ask for layouts."""

    def __init__(self, rng, rank):
        self.rng, self.rank = rng, rank
        self.shape = [2, int(rng.integers(1, 9)), *(int(s) for s in rng.integers(3, 9, rank - 2))]
        self.input = list(self.shape)
        maps = int(rng.choice([1, 5, 8, 24]))
        self.nodes, self.constants, self.count = [], {}, 0
        kernel = [1, *[3] * (rank - 3)]
        pads = [k // 2 for k in kernel] * 2
        weights = self.constant(rng.standard_normal((maps, self.shape[1], *kernel)))
        self.last = self.node("Conv", "x", weights, pads=pads)
        self.shape[1] = maps
        self.kept = self.last, list(self.shape)

    def constant(self, values, dtype=F):
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(values, dtype)
        return name

    def node(self, op, *inputs, outputs=1, **attributes):
        self.count += 1
        names = [f"t{self.count}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def axis(self):
        return int(self.rng.integers(-self.rank, self.rank))

    def step(self):
        operation = self.rng.choice([f for f in dir(self) if f.startswith("op_")])
        getattr(self, operation)()

    def op_activation(self):
        self.last = self.node(self.rng.choice(["Relu", "Sigmoid", "HardSwish", "Abs"]), self.last)

    def op_broadcast(self):
        """Combine with a constant of any rank up to the value's, extents 1 or whole."""
        rank = int(self.rng.integers(0, self.rank + 1))
        shape = [1 if self.rng.random() < 0.5 else d for d in self.shape[self.rank - rank :]]
        other = self.constant(self.rng.standard_normal(shape))
        pair = [self.last, other] if self.rng.random() < 0.5 else [other, self.last]
        self.last = self.node(self.rng.choice(["Add", "Mul", "Max"]), *pair)

    def op_residual(self):
        if self.shape == self.kept[1]:
            self.last = self.node("Add", self.last, self.kept[0])

    def op_first_layout(self):
        """Combine with a value that lies as the input does: of the whole shape, from a Transpose."""
        order = [int(i) for i in self.rng.permutation(self.rank)]
        other = self.constant(self.rng.standard_normal([self.shape[i] for i in order]))
        back = [order.index(i) for i in range(self.rank)]
        self.last = self.node("Sub", self.last, self.node("Transpose", self.node("Abs", other), perm=back))

    def op_concat(self):
        axis = self.axis()
        self.last = self.node("Concat", self.last, self.node("Neg", self.last), axis=axis)
        self.shape[axis] *= 2

    def op_split(self):
        axis = self.axis()
        if self.shape[axis] > 1:
            first = int(self.rng.integers(1, self.shape[axis]))
            sizes = self.constant([first, self.shape[axis] - first], np.int64)
            self.last = self.node("Split", self.last, sizes, outputs=2, axis=axis)[1]
            self.shape[axis] -= first

    def op_softmax(self):
        self.last = self.node("Softmax", self.last, axis=self.axis())

    def op_reduce(self):
        axes = {self.axis() % self.rank for _ in range(2)}
        named = [a - self.rank if self.rng.random() < 0.5 else a for a in axes]
        reduced = self.node(
            self.rng.choice(["ReduceMean", "ReduceMax", "ReduceSum"]), self.last, self.constant(named, np.int64)
        )
        self.last = self.node("Sub", self.last, reduced)

    def op_pool(self):
        self.last = self.node("GlobalAveragePool", self.last)
        self.shape[2:] = [1] * (self.rank - 2)

    def op_prelu(self):
        slopes = self.constant(self.rng.standard_normal([self.shape[1], *[1] * (self.rank - 2)]))
        self.last = self.node("PRelu", self.last, slopes)

    def op_where(self):
        condition = self.node("Greater", self.last, self.constant(0.1))
        self.last = self.node("Where", condition, self.last, self.constant(self.rng.standard_normal(self.shape[-1:])))

    def op_quantize(self):
        scale, zero = self.constant(0.05), self.constant(120, np.uint8)
        quantized = self.node("QuantizeLinear", self.node("Relu", self.last), scale, zero)
        scales = self.constant(self.rng.uniform(0.01, 0.1, self.shape[1]))
        self.last = self.node("DequantizeLinear", quantized, scales, axis=1)

    def op_conv(self):
        maps = int(self.rng.choice([3, 8]))
        weights = self.constant(self.rng.standard_normal((maps, self.shape[1], *[1] * (self.rank - 2))) * 0.3)
        self.last = self.node("Conv", self.last, weights)
        self.shape[1] = maps

    def op_slice(self):
        axis = self.axis() % self.rank
        starts, ends, axes = (self.constant([v], np.int64) for v in (0, max(1, self.shape[axis] - 1), axis))
        self.last = self.node("Slice", self.last, starts, ends, axes)
        self.shape[axis] = max(1, self.shape[axis] - 1)


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("seed", range(24))
def test_random_chains(compile_model, make_model, seed, symbolic):
    rng = np.random.default_rng(seed)
    chain = Chain(rng, rank=[4, 4, 3, 5][seed % 4])
    for _ in range(int(rng.integers(2, 7))):
        chain.step()
    result = chain.node("Flatten", chain.last) if rng.random() < 0.3 else chain.last
    shape = ["n", *chain.input[1:]] if symbolic else chain.input
    model = make_model(chain.nodes, {"x": (F, shape)}, {result: F}, chain.constants)
    x = rng.standard_normal(chain.input).astype(F)
    (want,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    (got,) = compile_model(model)(x)
    assert got.shape == want.shape
    # A step between two quantized values may go either way where rounding differs.
    step = 0.1 if any(n.op_type == "QuantizeLinear" for n in chain.nodes) else 0
    close = np.isclose(got, want, rtol=1e-4, atol=1e-4)
    assert close.mean() > 0.99 if step else close.all()
