"""Small models to compress, and data for them."""

import numpy as np
import onnx
import onnx.parser
import pytest

NETWORK = """<ir_version: 10, opset_import: ["": 20]>
network (float[4,32] x) => (float[4,3] y) {
 a = Gemm(x, w1, b1)  r = Relu(a)  c = Gemm(r, w2, b2)  s = Add(c, r)  t = Relu(s)  y = Gemm(t, w3, b3) }"""


@pytest.fixture(scope="session")
def network(tmp_path_factory):
    """The path of a small network with a residual sum: x [4, 32] -> y [4, 3]."""
    random = np.random.default_rng(0)
    model = onnx.parser.parse_model(NETWORK)
    shapes = {"w1": (32, 16), "b1": (16,), "w2": (16, 16), "b2": (16,), "w3": (16, 3), "b3": (3,)}
    for name, shape in shapes.items():
        array = random.normal(0, 1 / np.sqrt(shape[0]), shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    path = tmp_path_factory.mktemp("models") / "network.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="session")
def rows():
    """Calibration data for the network: 6 batches of 4."""
    return np.random.default_rng(1).normal(0, 1, (24, 32)).astype(np.float32)
