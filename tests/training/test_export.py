"""What torch.export drops without a word: recorded as it is, or refused."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from training_models import Round

from optc.errors import UnsupportedModelError
from optc.training import faithful
from optc.training.analysis import analyse, written
from optc.training.capture import capture
from optc.training.linearize import linearize


class Noisy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x + torch.rand_like(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, x):
        return function(x)


class Writes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Between(nn.Module):
    """Does something between two layers."""

    def __init__(self, what):
        super().__init__()
        self.first, self.second, self.what = nn.Linear(8, 8), nn.Linear(8, 8), what
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x):
        return self.second(self.what(self, self.first(x)))


def gradients(model, module, x):
    module.zero_grad()
    outputs = model(x)
    output = outputs[0] if isinstance(outputs, tuple) else outputs
    output.square().mean().backward()
    return [parameter.grad for parameter in module.parameters()]


def without_gradient(self, x):
    with torch.no_grad():
        self.seen.mul_(0.9).add_(x.mean(0))
        weight = torch.softmax(self.first(x), -1)
        x.clamp_(-1, 1)
    return x * weight + self.seen


def nested(self, x):
    with torch.no_grad():
        y = x * 2
        with torch.enable_grad():
            return self.first(y)


KEPT = {
    "autograd function": lambda self, x: Round.apply(x * 4),
    "reentrant checkpoint": lambda self, x: checkpoint(F.gelu, x, use_reentrant=True),
    "checkpoint": lambda self, x: checkpoint(F.gelu, x, use_reentrant=False),
    "no_grad": without_gradient,
    "enable_grad": nested,
    "cond": lambda self, x: torch.cond(x.sum() > 0, lambda v: self.first(v), lambda v: v * 2, (x,)),
}


@pytest.mark.parametrize("what", KEPT)
def test_gradients_are_kept(what):
    torch.manual_seed(0)
    module, x = Between(KEPT[what]), torch.randn(4, 8)
    program = capture(module, x)
    faithful.check(program, module)
    start = module.seen.clone()
    expected, seen = gradients(module, module, x), module.seen.clone()
    module.seen.copy_(start)
    for found, wanted in zip(gradients(program.root, module, x), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert torch.equal(module.seen, seen)
    linearize(program, analyse(program))


def test_operators_without_gradient_are_nodes_like_others():
    program = capture(Between(without_gradient), torch.randn(4, 8))
    names = [node.name for node in program.graph.nodes]
    assert any(name.startswith("softmax") for name in names)
    assert not any("set_grad" in name for name in names)
    facts = analyse(program)
    softmax = next(node for node in program.graph.nodes if node.name.startswith("softmax"))
    assert not facts[softmax].value.requires_grad
    assert linearize(program, facts).units[-1].name.startswith("linear")


def hooked(self, x):
    x.register_hook(lambda gradient: gradient / 2)
    return x


def slope(self, x):
    return torch.autograd.grad(x.sum(), x, create_graph=True)[0]


class Local(Round):
    pass


Local.__qualname__ = "f.<locals>.Local"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (hooked, r"a hook on a gradient.*test_export\.py:\d+"),
        (slope, "asks for a gradient"),
        (lambda self, x: Local.apply(x), "cannot name the autograd function"),
        (lambda self, x: Apply.apply(F.gelu, x), "something that a graph cannot hold"),
    ],
)
def test_what_a_graph_cannot_say_is_refused(what, message):
    with pytest.raises(UnsupportedModelError, match=message):
        capture(Between(what), torch.randn(4, 8))


@pytest.mark.parametrize(
    ("function", "message"), [(Noisy, "Noisy draws random numbers"), (Writes, "writes to its argument")]
)
def test_autograd_functions_that_hide_what_they_do_are_refused(function, message):
    program = capture(Between(lambda self, x: function.apply(x * 1)), torch.randn(4, 8))
    with pytest.raises(UnsupportedModelError, match=message):
        analyse(program)


def test_hooks_on_weights_and_modules_are_refused():
    module = Between(lambda self, x: x)
    handle = module.first.weight.register_hook(lambda gradient: gradient / 2)
    with pytest.raises(UnsupportedModelError, match=r"hooks on gradients: first\.weight"):
        capture(module, torch.randn(4, 8))
    handle.remove()
    module.second.register_full_backward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match="hooks on gradients: second"):
        capture(module, torch.randn(4, 8))


def test_names_that_graphs_use_themselves_are_refused():
    module = Between(lambda self, x: x)
    module.register_buffer("code", torch.zeros(2))
    with pytest.raises(UnsupportedModelError, match="weights or modules called code"):
        capture(module, torch.randn(4, 8))


def test_a_failing_export_prints_nothing(capfd):
    with pytest.raises(UnsupportedModelError, match=r"batchnorm\.py:\d+"):
        capture(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=None)), torch.randn(4, 8))
    assert capfd.readouterr() == ("", "")


def test_numbers_that_python_draws_are_found():
    module, x = Between(lambda self, x: x * random.random()), torch.randn(4, 8)
    with pytest.raises(UnsupportedModelError, match="does not do what the module does: output 0"):
        faithful.check(capture(module, x), module)


def test_checking_changes_nothing():
    module, x = Between(without_gradient), torch.randn(4, 8)
    program, state = capture(module, x), torch.get_rng_state()
    faithful.check(program, module)
    assert torch.equal(torch.get_rng_state(), state)
    assert not module.seen.any()
    assert module.first.weight.grad is None


def test_regions_tell_what_they_write_to():
    def low_precision(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            self.seen.add_(1)
            return self.first(x)

    program = capture(Between(low_precision), torch.randn(4, 8))
    region = next(node for node in program.graph.nodes if "autocast" in node.name or len(written(node)) > 1)
    assert "seen" in {str(node.target) for node in written(region)}
