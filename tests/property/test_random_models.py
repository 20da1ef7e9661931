"""Random small models, compiled with all passes, against onnxruntime at a random size of their symbolic dimension."""

import numpy as np
import onnx
import onnxruntime
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import optc

UNARY = ("Relu", "Sigmoid", "Tanh", "Abs", "Neg", "Erf", "Softplus", "Identity", "HardSwish")
BINARY = ("Add", "Mul", "Sub", "Max", "Min")


class Builder:
    """Draws nodes on values of shape [n, channels]; ``n`` is symbolic, channels are known."""

    def __init__(self, draw):
        self.draw = draw
        self.nodes, self.initializers = [], []
        self.values = [("x", 6)]
        self.generator = np.random.default_rng(draw(st.integers(0, 2**16)))

    def weight(self, *shape):
        name = f"w{len(self.initializers)}"
        array = self.generator.standard_normal(shape, np.float32) / np.sqrt(np.float32(shape[0]))
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def integers(self, *values):
        name = f"i{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def node(self, op, inputs, channels, **attributes):
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"{op}_{len(self.nodes)}", **attributes))
        self.values.append((name, channels))

    def step(self):
        name, channels = self.draw(st.sampled_from(self.values))
        kind = self.draw(st.sampled_from(STEPS))
        kind(self, name, channels)


def unary(b, name, channels):
    b.node(b.draw(st.sampled_from(UNARY)), [name], channels)


def binary(b, name, channels):
    partners = [v for v, c in b.values if c == channels]
    b.node(b.draw(st.sampled_from(BINARY)), [name, b.draw(st.sampled_from(partners))], channels)


def bias(b, name, channels):
    b.node(b.draw(st.sampled_from(BINARY)), [name, b.weight(channels)], channels)


def matmul(b, name, channels):
    width = b.draw(st.sampled_from([1, 3, 8, 17]))
    b.node("MatMul", [name, b.weight(channels, width)], width)


def gemm(b, name, channels):
    width = b.draw(st.sampled_from([2, 5, 16]))
    b.node("Gemm", [name, b.weight(width, channels), b.weight(width)], width, transB=1, alpha=0.5)


def softmax(b, name, channels):
    b.node("Softmax", [name], channels, axis=b.draw(st.sampled_from([0, 1, -1])))


def normalize(b, name, channels):
    b.node("LayerNormalization", [name, b.weight(channels), b.weight(channels)], channels, axis=-1)


def concat(b, name, channels):
    other, width = b.draw(st.sampled_from(b.values))
    b.node("Concat", [name, other], channels + width, axis=1)


def slice_(b, name, channels):
    if channels > 1:
        start = b.draw(st.integers(0, channels - 1))
        b.node("Slice", [name, b.integers(start), b.integers(channels), b.integers(1)], channels - start)


def reduce(b, name, channels):
    b.node(b.draw(st.sampled_from(["ReduceMean", "ReduceMax", "ReduceSum"])), [name, b.integers(1)], 1, keepdims=1)


def there_and_back(b, name, channels):
    b.node("Transpose", [name], channels, perm=[1, 0])
    turned, _ = b.values.pop()
    b.node("Transpose", [turned], channels, perm=[1, 0])


def regroup(b, name, channels):
    """[n, c] -> [n * c] -> [n, c] through the runtime shape."""
    b.node("Shape", [name], channels)
    shape, _ = b.values.pop()
    b.node("Reshape", [name, b.integers(-1)], channels)
    flat, _ = b.values.pop()
    b.node("Reshape", [flat, shape], channels)


STEPS = (
    unary, unary, binary, binary, bias, matmul, gemm, softmax, normalize, concat, slice_, reduce,
    there_and_back, regroup,
)  # fmt: skip


@st.composite
def models(draw):
    builder = Builder(draw)
    for _ in range(draw(st.integers(1, 10))):
        builder.step()
    if not builder.nodes:
        unary(builder, "x", 6)
    outputs = [builder.values[-1], *draw(st.lists(st.sampled_from(builder.values[1:]), max_size=2))]
    graph = helper.make_graph(
        builder.nodes,
        "random",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 6])],
        [helper.make_tensor_value_info(v, TensorProto.FLOAT, ["n", c]) for v, c in dict(outputs).items()],
        builder.initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(models(), st.integers(1, 9), st.integers(0, 2**16))
def test_a_random_model_computes_what_onnxruntime_computes(model, size, seed):
    onnx.checker.check_model(model)
    x = np.random.default_rng(seed).standard_normal((size, 6), np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, {"x": x})
    found = optc.compile(model, verify=False).model().run({"x": x})
    for value, array in zip(model.graph.output, expected, strict=True):
        scale = max(1.0, float(np.abs(array).max()))
        # Ten layers deep at most, sums of at most ~100 terms: a few hundred float32 roundings.
        np.testing.assert_allclose(found[value.name], array, rtol=1e-4, atol=2e-5 * scale)
