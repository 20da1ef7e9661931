"""What the lowerer knows about a value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Dequantized:
    """A constant ``(values - zero) * scale`` that is computed where it is read.

    ``values`` are integers; ``scale`` and ``zero`` (None for 0) are one number, one for each position of ``axis``, or
    one for each ``block`` positions of it where ``block`` > 0.

    ``parts`` gives tensors that hold all this, integers of 4 bits packed, and the function that computes an element:
    ``read(index, *tensors)``. ``make`` emits the kernel that computes all elements.
    """

    values: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None
    axis: int
    block: int
    parts: Callable[[], tuple[list[Any], Callable[..., Any]]]
    make: Callable[[], Any]

    @cached_property
    def dense(self) -> np.ndarray:
        """All elements, in the type of the scale, for readers that rearrange a constant while compiling."""
        values = self.values.astype(np.int32)
        if self.zero is not None:
            values = values - self._spread(self.zero).astype(np.int32)
        result: np.ndarray = values.astype(np.float32) * self._spread(self.scale).astype(np.float32)
        return result.astype(self.scale.dtype)

    def _spread(self, parameter: np.ndarray) -> np.ndarray:
        """Return a scale or zero point in a shape that broadcasts with the values."""
        if parameter.size == 1:
            return parameter.reshape(())
        if self.block:
            stop = self.values.shape[self.axis]
            return np.repeat(parameter, self.block, self.axis).take(range(stop), self.axis)
        return parameter.reshape([-1 if i == self.axis else 1 for i in range(self.values.ndim)])


@dataclass(frozen=True)
class Known:
    """What is known about a value: a Relax tensor, integers, a constant array, or the elements of a sequence.

    ``last`` is the tensor with its channels (axis 1) moved to the end (``layout.py``).
    """

    tensor: Any = None
    last: Any = None
    integers: np.ndarray | None = None
    constant: np.ndarray | None = None
    sequence: tuple[Known, ...] | None = None
    dequantized: Dequantized | None = None


TABLES = {
    "tensors": "tensor",
    "channels_last": "last",
    "integers": "integers",
    "constants": "constant",
    "sequences": "sequence",
    "dequantized": "dequantized",
}
"""Where the lowerer keeps what is known about values, by the name that ``Known`` has for it."""
