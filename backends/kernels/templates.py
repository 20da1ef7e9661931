"""The schedule templates by name, as kernels ask for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from optc.backends.base import Target

ScheduleFunction = Callable[[Any, Target], Any]
"""Takes a fused PrimFunc and the target; returns the scheduled PrimFunc, or None if it cannot handle it."""

TEMPLATES: dict[str, ScheduleFunction] = {}
