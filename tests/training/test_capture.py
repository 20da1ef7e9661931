import pytest
import torch
from torch import nn
from training_models import GPT, MLP

from optc.errors import UnsupportedModelError, UsageError
from optc.training.capture import capture, source_line


class Branches(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x + 1
        return x


class Sizes(nn.Module):
    def forward(self, x):
        return x[x > 0].exp()


def test_weights_keep_their_names_and_are_the_same():
    module = MLP()
    program = capture(module, torch.randn(2, 16))
    assert dict(program.root.named_parameters())["layers.0.weight"] is module.layers[0].weight


def test_tied_weights_have_one_canonical_name():
    program = capture(GPT(), torch.zeros(2, 8, dtype=torch.long))
    assert program.canonical["head.weight"] == program.canonical["wte.weight"] == "wte.weight"


def test_control_flow_that_depends_on_data_names_the_line():
    with pytest.raises(UnsupportedModelError, match=r"test_capture.py:\d+ \(if x.sum\(\) > 0:\)"):
        capture(Branches(), torch.randn(4, 4))


def test_sizes_that_depend_on_data_name_the_line():
    with pytest.raises(UnsupportedModelError, match=r"test_capture.py:\d+"):
        capture(Sizes(), torch.randn(4))


class Mapped(torch.nn.Linear):
    def forward(self, x):
        return torch.vmap(super().forward)(x)


def test_transformations_of_functions_name_the_line():
    with pytest.raises(UnsupportedModelError, match=r"torch.func, such as vmap.*test_capture.py:\d+"):
        capture(Mapped(4, 4), torch.randn(2, 4))


def test_weights_without_a_shape_are_refused():
    with pytest.raises(UnsupportedModelError, match="2 weights have no shape yet: weight, bias"):
        capture(torch.nn.LazyLinear(4), torch.randn(2, 4))


def test_inputs_must_be_tensors():
    with pytest.raises(UsageError, match="input 1 is a str"):
        capture(MLP(), (torch.randn(2, 16), "x"))
    with pytest.raises(UsageError, match="no inputs"):
        capture(MLP(), ())
    with pytest.raises(UsageError, match="not a torch module"):
        capture(len, torch.randn(2, 16))


def test_the_fingerprint_is_of_structure_and_shape_not_of_weights():
    a, b = capture(MLP(), torch.randn(2, 16)), capture(MLP(), torch.randn(2, 16))
    assert a.fingerprint() == b.fingerprint()
    assert a.fingerprint() != capture(MLP(), torch.randn(4, 16)).fingerprint()
    assert a.fingerprint() != capture(MLP(depth=7), torch.randn(2, 16)).fingerprint()


def test_a_node_knows_its_source_line():
    program = capture(MLP(), torch.randn(2, 16))
    node = next(node for node in program.graph.nodes if node.name.startswith("gelu"))
    assert "models.py:" in source_line(node)
