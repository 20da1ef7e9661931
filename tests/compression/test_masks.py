"""Masks by the names of a module's parameters, and what pruning makes of a masked module."""

import numpy as np
import pytest

import optc
from optc.compression.masks import structured_masks
from optc.errors import UsageError
from optc.passes.prune.select import Structured

torch = pytest.importorskip("torch", reason="PyTorch is not installed")


class Mixed(torch.nn.Module):
    """A convolution that keeps its name, a product that is transposed, and heads in one matrix."""

    def __init__(self):
        super().__init__()
        self.patches = torch.nn.Conv2d(1, 8, 2, stride=2)
        self.qkv, self.out = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)
        self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(torch.nn.functional.layer_norm(x, (8,))).unflatten(-1, (3, 4, 2)).permute(2, 0, 3, 1, 4)
        x = x + self.out(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.down(torch.relu(self.up(x)))


def test_a_masked_module_is_pruned_without_a_trace():
    torch.manual_seed(0)
    module, x = Mixed().eval(), torch.randn(2, 1, 8, 8)
    how = Structured(0.5, multiple=1)
    masks = structured_masks(module, (x,), how)
    assert {name: mask.mean() for name, mask in masks.items()} == {
        "qkv.weight": 0.5, "qkv.bias": 0.5, "out.weight": 0.5, "up.weight": 0.5, "up.bias": 0.5, "down.weight": 0.5,
    }  # fmt: skip
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in masks:
                parameter.mul_(torch.from_numpy(masks[name]))
        expected = module(x).numpy()
    result = optc.prune(module, (x,), structured=how, verify=False)
    assert result.report["parameters"][1] < 0.7 * result.report["parameters"][0]
    model = optc.compile(result.model, verify=False).model()
    found = next(iter(model.run({model.inputs[0].name: x.numpy()}).values()))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_criterion_that_needs_data():
    with pytest.raises(UsageError, match="comes as saliency"):
        structured_masks(Mixed(), (torch.randn(2, 1, 8, 8),), Structured(0.5, criterion="taylor"))


def test_saliency_by_the_names_of_parameters():
    module = Mixed().eval()
    worth = {"up.weight": np.repeat(np.arange(16.0), 8).reshape(16, 8)}
    how = Structured(0.5, multiple=1, layers={"*qkv*": 0.0})
    masks = structured_masks(module, (torch.randn(2, 1, 8, 8),), how, saliency=worth)
    assert masks["up.bias"].tolist() == [False] * 8 + [True] * 8
    assert "qkv.weight" not in masks
