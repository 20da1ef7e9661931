"""Training with the rounding of the compiled model: the same integers, gradients, masks, what cannot be trained."""

import numpy as np
import pytest

import optc
from optc.compression.masks import structured_masks
from optc.compression.options import Options
from optc.errors import UnsupportedModelError, UsageError
from optc.passes.prune.select import Structured
from optc.peers import OnnxRuntime

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from optc.compression import finetune  # noqa: E402 - needs PyTorch


class Network(torch.nn.Module):
    """A convolution with batch normalization, a skip, two products."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(2, 8, 3, padding=1, bias=False), torch.nn.BatchNorm2d(8)
        self.mix = torch.nn.Conv2d(8, 8, 1)
        self.up, self.down = torch.nn.Linear(72, 64), torch.nn.Linear(64, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        x = (x + torch.relu(self.mix(x))).flatten(1)
        return self.down(torch.relu(self.up(x)))


@pytest.fixture(scope="module")
def trained():
    """The network with statistics of its batch normalization, and data [32, 2, 3, 3]."""
    torch.manual_seed(0)
    module, x = Network(), torch.randn(32, 2, 3, 3)
    with torch.no_grad():
        for _ in range(20):
            module(x)
    return module.eval(), x


def steps(prepared, x, count=20, masks=None):
    """Train towards outputs of the sign of a channel; return the losses."""
    optimizer, losses = torch.optim.Adam(prepared.module.parameters(), 1e-2), []
    target = x[:, :1, 0, 0].sign().repeat(1, 3)
    for _ in range(count):
        loss = ((prepared.module(x) - target) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, mask in (masks or {}).items():
                prepared.module.get_parameter(name).mul_(torch.from_numpy(mask))
        losses.append(float(loss.detach()))
    return losses


def integers(model):
    return {str(v.name): v.const_value.numpy() for v in model.graph.initializers.values()}


@pytest.mark.parametrize(
    "options",
    [
        Options("int8", bits=4, activations="int8", smooth=None, correct_bias=False),
        Options("int4-weights", zero_points=True),
    ],
    ids=lambda o: o.kind,
)
def test_what_is_compiled_is_what_was_trained(trained, options):
    module, x = trained
    calibrate = {"x": x.numpy()} if options.kind == "int8" else None
    prepared = finetune.prepare(module, (x[:4],), options, calibrate=calibrate)
    before = integers(prepared.quantized().model)
    direct = integers(optc.quantize(prepared._capture(finetune._folded(module)), options, calibrate=calibrate).model)
    assert before.keys() == direct.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(array, direct[name])
    losses = steps(prepared, x)
    assert losses[-1] < 0.7 * losses[0]
    result = prepared.quantized().model
    for name, layer in prepared._layers.items():
        want = layer.integers()
        assert any(a.shape == want.values.shape and np.array_equal(a, want.values) for a in integers(result).values())
        with torch.no_grad():
            rounded = layer._as_product(layer.module.of_weight(layer.module.weight))
        np.testing.assert_array_equal(rounded, want.dequantized(), err_msg=name)
    with torch.no_grad():
        expected = prepared.module(x[:4]).numpy()
    compiled = optc.compile(result, verify=False).model()
    (found,) = compiled.run({compiled.inputs[0].name: x[:4].numpy()}).values()
    # Sums in another order may round one activation the other way.
    np.testing.assert_allclose(found, expected, atol=0.01 * np.abs(expected).max())


def test_masks_are_kept_and_removed_from_the_integers(trained):
    module, x = trained
    how = Structured(0.5, multiple=1, layers={"*conv*": 0.0, "*mix*": 0.0})
    masks = structured_masks(module, (x[:4],), how)
    assert masks.keys() == {"up.weight", "up.bias", "down.weight"}
    prepared = finetune.prepare(module, (x[:4],), Options("int8-weights"))
    assert "conv.weight" in {name for name, _ in prepared.module.named_parameters()}
    steps(prepared, x, 5, masks)
    whole = prepared.quantized().model
    small = optc.prune(whole, structured=how, verify=False).model
    assert any(set(array.shape) == {72, 32} for array in integers(small).values())
    inputs = {str(whole.graph.inputs[0].name): x[:4].numpy()}
    (expected,), (found,) = (OnnxRuntime(model, 1).run(inputs).values() for model in (whole, small))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_gradients_stop_where_values_are_cut_off():
    from optc.compression.rounding import Rounding

    rounding = Rounding(np.array(0.5), np.array(-2), np.array(3))
    x = torch.tensor([-3.0, -0.2, 0.25, 0.76, 9.0], requires_grad=True)
    y = rounding(x)
    y.sum().backward()
    assert y.tolist() == [-1.0, 0.0, 0.0, 1.0, 1.5]
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_what_cannot_be_trained(trained):
    module, x = trained
    with pytest.raises(UsageError, match="not for float16"):
        finetune.prepare(module, (x[:4],), Options("float16"))
    with pytest.raises(UsageError, match="training does their work"):
        finetune.prepare(module, (x[:4],), Options(smooth=0.5), calibrate={"x": x.numpy()})
    with pytest.raises(UsageError, match="needs calibration data"):
        finetune.prepare(module, (x[:4],))

    class Functional(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = torch.nn.Parameter(torch.randn(64, 64))

        def forward(self, x):
            return x @ self.matrix.T

    with pytest.raises(UnsupportedModelError, match="not those of one Linear or Conv"):
        finetune.prepare(Functional(), (torch.randn(4, 64),), Options("int4-weights"))
