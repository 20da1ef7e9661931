"""What the lowerer knows about a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


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
