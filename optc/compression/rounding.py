"""Layers of PyTorch that compute with the rounding of a compiled model, so that training can make up for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from optc.passes.quantize.encoding import DTYPES, Encoding, limits
from optc.passes.quantize.weights import Integers

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers that can round."""


class Rounding(nn.Module):
    """Rounds float32 to the integers of a scale and back, to nearest even, saturating.

    Gradients pass straight through where nothing is cut off (Bengio et al., "Estimating or Propagating Gradients
    Through Stochastic Neurons", 2013). Scales and zero points are tensors of the shape of what is rounded, or scalars.
    ``least`` and ``largest`` are the integers less the zero point.
    """

    def __init__(self, scale: np.ndarray, least: np.ndarray, largest: np.ndarray) -> None:
        super().__init__()
        for name, array in (("scale", scale), ("least", least), ("largest", largest)):
            self.register_buffer(name, torch.tensor(np.asarray(array, np.float32)))

    def steps(self, x: torch.Tensor) -> torch.Tensor:
        """Return the integers less the zero point, as float32."""
        exact = torch.clamp(x / self.scale, self.least, self.largest)
        # A number and the integer that it is rounded to are within a factor of two of each other, or the integer is 0:
        # their difference is exact, and so is the sum.
        return exact + (torch.round(exact) - exact).detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the integers stand for."""
        rounded: torch.Tensor = self.steps(x) * self.scale
        return rounded


def of_encoding(encoding: Encoding) -> Rounding:
    """Return the rounding of a tensor with one scale and zero point."""
    low, high = limits(encoding.dtype)
    return Rounding(*(np.asarray(value) for value in (encoding.scale, low - encoding.zero, high - encoding.zero)))


def of_integers(array: Integers, bits: int | None) -> tuple[Rounding, np.ndarray]:
    """Return the rounding of weights with the scales of ``array``, and the zero points; both of the weights' shape.

    ``bits`` are those of symmetric integers, whose least one is not used; None for all that the type can hold.
    """
    kind = next(name for name, dtype in DTYPES.items() if dtype == array.values.dtype)
    low, high = limits(kind) if bits is None else (1 - (1 << (bits - 1)), (1 << (bits - 1)) - 1)
    ones = np.ones_like(array.values)
    scale = replace(array, values=ones, zero=None).dequantized()
    zero = np.zeros_like(scale)
    if array.zero is not None:
        zero = replace(array, values=ones, scale=array.zero.astype(np.float32), zero=None).dequantized()
    return Rounding(scale, low - zero, high - zero), zero


class _Rounded(nn.Module):
    """A layer whose weights, and what it reads, are rounded while ``rounds`` is true."""

    rounds: bool
    of_input: Rounding | None
    of_weight: Rounding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer: Any = self
        if not self.rounds:
            plain: torch.Tensor = super().forward(x)
            return plain
        x = x if self.of_input is None else self.of_input(x)
        weight = self.of_weight(layer.weight)
        if isinstance(self, nn.Linear):
            return nn.functional.linear(x, weight, layer.bias)
        result: torch.Tensor = layer._conv_forward(x, weight, layer.bias)
        return result


def let_round(layer: nn.Module, of_input: Rounding | None, of_weight: Rounding) -> None:
    """Let a layer of LAYERS round, in place; its parameters stay and keep their names."""
    kind = type(layer)
    layer.__class__ = type(f"Rounded{kind.__name__}", (_Rounded, kind), {})
    layer.rounds, layer.of_input, layer.of_weight = True, of_input, of_weight
    layer.to(layer.weight.device)
