import numpy as np
import onnx
import onnx_ir as oir
import pytest

MLP = """<ir_version: 10, opset_import: ["": 20]>
mlp (float[batch,8] x) => (float[batch,4] y)
<float[8,16] w1, float[16] b1, float[16,4] w2>
{ h = MatMul(x, w1) hb = Add(h, b1) a = Relu(hb) y = MatMul(a, w2) }"""


@pytest.fixture(scope="session")
def mlp(tmp_path_factory):
    """The path of a small ONNX model: x [batch, 8] -> y [batch, 4]."""
    generator = np.random.default_rng(0)
    model = oir.to_proto(oir.from_onnx_text(MLP))
    arrays = {
        "w1": generator.standard_normal((8, 16), np.float32),
        "b1": generator.standard_normal(16, np.float32),
        "w2": generator.standard_normal((16, 4), np.float32),
    }
    del model.graph.initializer[:]
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    path = tmp_path_factory.mktemp("models") / "mlp.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="session")
def artifact(mlp, tmp_path_factory):
    """The path of the compiled model."""
    import optc

    path = tmp_path_factory.mktemp("artifacts") / "mlp.optc"
    optc.compile(mlp).save(path)
    return path
