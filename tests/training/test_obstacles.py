import pytest
import torch
from torch import nn

from optc.errors import PartitionError
from optc.training import plan
from optc.training.analysis import analyse
from optc.training.capture import capture
from optc.training.linearize import linearize
from optc.training.obstacles import obstacles


class Filled(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        y, h = torch.zeros_like(x), x[:, 0]
        for t in range(x.shape[1]):
            h = torch.tanh(self.cell(h) + x[:, t])
            y[:, t] = h
        return self.head(y)


class Collected(Filled):
    def forward(self, x):
        parts = []
        for t in range(x.shape[1]):
            parts.append(torch.tanh(self.cell(parts[-1] if parts else x[:, 0]) + x[:, t]))
        return self.head(torch.stack(parts, 1))


def found(module, x):
    program = capture(module, x)
    return obstacles(linearize(program, analyse(program)))


def test_memory_that_is_filled_over_the_whole_forward_pass_is_named():
    x = torch.randn(2, 6, 8)
    with pytest.raises(PartitionError, match=r"2 stages at most, not into 3") as raised:
        plan(Filled(), x, {"pp": 3, "dp": 1}, costs="roofline")
    assert "memory is filled bit by bit from" in raised.value.message
    assert "test_obstacles.py" in raised.value.message
    assert found(Collected(), x) == []  # what the message asks for
    assert plan(Collected(), x, {"pp": 3, "dp": 1}, costs="roofline").pp == 3


def test_a_frozen_trunk_is_named():
    trunk = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)]).requires_grad_(False)
    (line,) = found(nn.Sequential(trunk, nn.Linear(8, 4)), torch.randn(2, 8))
    assert line.startswith("nothing is trained before") and "(6 of 6 places)" in line
    assert found(nn.Sequential(nn.Linear(8, 8), trunk), torch.randn(2, 8)) == []
