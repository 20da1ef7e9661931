"""Models whose layers sleep: four ranks behave like four devices on a machine with fewer cores."""

import time

import torch
from torch import nn


@torch.library.custom_op("optc_benchmarks::sleep", mutates_args=())
def sleep(x: torch.Tensor, forward: float, backward: float) -> torch.Tensor:
    """A copy of ``x`` after ``forward`` seconds; its gradient takes ``backward`` seconds."""
    time.sleep(forward)
    return x.clone()


@sleep.register_fake
def _(x, forward, backward):
    return torch.empty_like(x)


@torch.library.custom_op("optc_benchmarks::sleep_back", mutates_args=())
def sleep_back(gradient: torch.Tensor, seconds: float) -> torch.Tensor:
    time.sleep(seconds)
    return gradient.clone()


@sleep_back.register_fake
def _(gradient, seconds):
    return torch.empty_like(gradient)


def _context(ctx, inputs, output):
    ctx.seconds = inputs[2]


sleep.register_autograd(lambda ctx, g: (sleep_back(g, ctx.seconds), None, None), setup_context=_context)


class Layer(nn.Module):
    """A product whose forward, input gradient and weight gradient take at least the given seconds each."""

    def __init__(self, width, forward, backward_input, backward_weight):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width))
        self.times = (forward, backward_input, backward_weight)

    def forward(self, x):
        forward, backward_input, backward_weight = self.times
        weight = torch.ops.optc_benchmarks.sleep(self.weight, 0.0, backward_weight)
        return torch.ops.optc_benchmarks.sleep(x, forward, backward_input) @ weight


class Sleeper(nn.Module):
    def __init__(self, seconds, width):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, s, s, s) for s in seconds)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def build(name):
    """A model and one microbatch."""
    if name == "even":
        return Sleeper([0.010] * 16, 64), torch.randn(2, 64)
    if name == "uneven":  # an expensive head, as of a large vocabulary, and layers of two kinds
        return Sleeper([0.006, 0.012] * 7 + [0.020, 0.030], 64), torch.randn(2, 64)
    if name == "heavy":  # weights that replicas have to exchange
        return Sleeper([0.004] * 16, 768), torch.randn(4, 768)
    if name == "wide":  # activations that stages have to exchange, weights that are nothing
        return Sleeper([0.004] * 16, 32), torch.randn(16384, 32)
    raise ValueError(name)
