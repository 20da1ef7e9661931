"""Schedules as traces: the primitives that TVM's search applied to a kernel, in its JSON form, one after the other.

A trace names blocks and loops of the kernel as it is defined, and needs none of the rules that found it. Every
primitive checks that the kernel still computes the same.
"""

from __future__ import annotations

import json
from typing import Any

from tvm import s_tir
from tvm.s_tir.schedule import Trace

from optc.backends.kernels.decisions import IllegalDecisionError


def text_of(trace: Any) -> str:
    """Return a trace as text."""
    return json.dumps(trace.as_json(), separators=(",", ":"), default=lambda number: number.value)


def replay(function: Any, text: str) -> Any:
    """Return ``function`` scheduled as a trace says; raises IllegalDecisionError if it is that of another kernel."""
    return replayed(function, text).mod["main"]


def replayed(function: Any, text: str) -> Any:
    """Return the schedule of ``replay``."""
    schedule = s_tir.Schedule(function, error_render_level="none")
    try:
        content = json.loads(text)
        names = {str(instruction[0]) for instruction in content[0]}
        if any(name.startswith("Unsafe") for name in names):
            raise IllegalDecisionError("the trace has primitives that do not check what they do")
        Trace.apply_json_to_schedule(content, schedule)
    except (s_tir.ScheduleError, ValueError, TypeError, IndexError, KeyError, RuntimeError) as error:
        raise IllegalDecisionError("the trace is that of another kernel") from error
    return schedule
