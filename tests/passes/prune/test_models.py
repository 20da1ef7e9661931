"""Real networks: legal, consistent, and equal to the masked original, which onnxruntime runs."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest

import optc
from optc.compression.prune import normalized
from optc.ir import serialize
from optc.ir.verifier import violations
from optc.passes.prune.select import Structured
from optc.passes.prune.structured import prune
from optc.peers import OnnxRuntime

CACHE = Path(os.environ.get("OPTC_MODEL_CACHE") or Path(__file__).resolve().parents[3] / ".cache" / "models")

# Ratio, input shapes, and the share of parameters that at most remains.
CASES = [
    ("ppocr/cls", 0.7, {"x": (2, 3, 48, 96)}, 0.2),
    ("ppocr/rec", 0.5, {"x": (1, 3, 48, 64)}, 0.45),
]


@pytest.mark.models
@pytest.mark.parametrize(("name", "ratio", "shapes", "most"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_equal_to_the_masked_original(name, ratio, shapes, most, rng):
    path = CACHE / f"{name}.onnx"
    if not path.is_file():
        pytest.skip(f"{name} is not in the model cache")
    model = optc.capture(path)
    normalized(model)
    zero = model.clone()
    report = prune(model, Structured(ratio), zero=zero)
    assert report.parameters[1] < most * report.parameters[0]
    onnx.checker.check_model(serialize.to_proto(model), full_check=True)
    assert violations(model) == []
    feeds = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    expected = OnnxRuntime(zero, 1).run(feeds)
    for key, found in OnnxRuntime(model, 1).run(feeds).items():
        assert found.shape == expected[key].shape
        np.testing.assert_allclose(found, expected[key], rtol=0, atol=1e-5 * np.abs(expected[key]).max())


def test_unet():
    """Down, up, and skips that are concatenated; two channels of the result stay."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    nn = torch.nn

    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.down = self.block(3, 16), self.block(16, 32)
            self.up, self.leave = nn.ConvTranspose2d(32, 16, 2, stride=2), self.block(32, 16)
            self.head = nn.Conv2d(16, 2, 1)

        def block(self, width, out):
            norm = nn.BatchNorm2d(out)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            return nn.Sequential(nn.Conv2d(width, out, 3, padding=1), norm, nn.SiLU())

        def forward(self, x):
            a = self.enter(x)
            b = self.up(self.down(nn.functional.max_pool2d(a, 2)))
            return self.head(self.leave(torch.cat([a, b], 1)))

    torch.manual_seed(0)
    model = optc.capture(UNet().eval(), example_inputs=(torch.randn(1, 3, 16, 16),))
    for ratio in (0.1, 0.7):
        result = optc.prune(model, structured=Structured(ratio, multiple=1))
        assert result.report["parameters"][1] < (1 - ratio / 1.2) * result.report["parameters"][0]
        assert max(o["relative"] for o in result.report["verification"]["outputs"]) <= 1e-5
        assert [str(v.shape) for v in result.model.graph.outputs] == ["[1,2,16,16]"]
