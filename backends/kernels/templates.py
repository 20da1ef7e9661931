"""The schedule templates by name, as kernels ask for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from optc.backends.base import Target
from optc.backends.kernels import (
    attention,
    attention_schedule,
    contraction,
    contraction_schedule,
    few_rows,
    generic,
    integer_contraction,
    integer_depthwise,
    integer_depthwise_schedule,
    integer_schedule,
    unpacked_rows,
    weight_only,
    weight_only_schedule,
    window,
    winograd,
    winograd_schedule,
)

ScheduleFunction = Callable[[Any, Target], Any]
"""Takes a fused PrimFunc and the target; returns the scheduled PrimFunc, or None if it cannot handle it."""


VERSIONS = {
    **dict.fromkeys(generic.RULES, 4),
    attention.TEMPLATE: 1,
    contraction.TEMPLATE: 5,
    integer_contraction.TEMPLATE: 5,
    integer_depthwise.TEMPLATE: 2,
    weight_only.TEMPLATE: 2,
    window.TEMPLATE: 5,
    winograd.TEMPLATE: 5,
}
"""Counts changes of each template and rule after which older tuning records no longer hold: decisions mean something
else, or the untuned kernel, which they are relative to, has become another one."""


def _contraction(function: Any, target: Target) -> Any:
    for template in (few_rows, unpacked_rows, contraction_schedule):
        scheduled = template.schedule(function, target)
        if scheduled is not None:
            return scheduled
    return None


TEMPLATES: dict[str, ScheduleFunction] = {
    attention.TEMPLATE: attention_schedule.schedule,
    contraction.TEMPLATE: _contraction,
    integer_contraction.TEMPLATE: integer_schedule.schedule,
    weight_only.TEMPLATE: weight_only_schedule.schedule,
    integer_depthwise.TEMPLATE: integer_depthwise_schedule.schedule,
    window.TEMPLATE: window.schedule,
    winograd.TEMPLATE: winograd_schedule.schedule,
}
