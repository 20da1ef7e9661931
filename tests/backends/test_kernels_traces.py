"""Traces: a schedule as text, replayed on the kernel it was made for, refused by any other."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from tvm import s_tir, te

from optc.backends.cpu.single import aligned, compile_kernel
from optc.backends.cpu.target import resolve
from optc.backends.kernels import traces
from optc.backends.kernels.decisions import IllegalDecisionError, deciding, number_of
from optc.backends.kernels.schedule import schedule_kernel

CPU = resolve("cpu")


def sums(rows=24, columns=40):
    """Return the kernel of the sums of rows, twice."""
    a = te.placeholder((rows, columns), "float32", "a")
    k = te.reduce_axis((0, columns), "k")
    total = te.compute((rows,), lambda i: te.sum(a[i, k], k), "total")
    return te.create_prim_func([a, te.compute((rows,), lambda i: total[i] * 2.0, "twice")])


def trace():
    """Return the text of a schedule of ``sums``: partial sums, in parallel."""
    schedule = s_tir.Schedule(sums())
    block = schedule.get_sblock("total")
    _, column = schedule.get_loops(block)
    outer, _ = schedule.split(column, [None, 8])
    schedule.rfactor(outer, 1)
    schedule.parallel(schedule.get_loops(schedule.get_sblock("twice"))[0])
    return traces.text_of(schedule.trace)


def run(function):
    data = np.random.default_rng(0).standard_normal((24, 40)).astype(np.float32)
    result = aligned(np.zeros(24, np.float32))
    compile_kernel(function, CPU)(aligned(data), result)
    return result.numpy(), 2 * data.astype(np.float64).sum(1)


def test_a_trace_is_replayed():
    replayed = traces.replay(sums(), trace())
    assert "T.parallel" in replayed.script() and "total_rf" in replayed.script()
    np.testing.assert_allclose(*run(replayed), rtol=1e-5, atol=1e-5)


def test_a_trace_takes_the_place_of_the_rule():
    text = trace()
    with deciding({"trace": number_of(text)}, trace=text) as space:
        scheduled, rule, _ = schedule_kernel(sums(), CPU)
    assert rule == "traced" and space.decisions["trace"] == number_of(text)
    np.testing.assert_allclose(*run(scheduled), rtol=1e-5, atol=1e-5)
    with deciding({}, trace=text):
        assert schedule_kernel(sums(), CPU)[1] == "generic"


def renamed(text):
    return text.replace("total", "other")


def unchecked(_):
    schedule = s_tir.Schedule(sums())
    schedule.unsafe_set_dtype(schedule.get_sblock("total"), 0, "float16")
    return traces.text_of(schedule.trace)


@pytest.mark.parametrize("change", [renamed, unchecked, lambda t: t[:-9], lambda t: "{}", lambda t: "[[[7]], []]"])
def test_other_traces_are_refused(change):
    text = change(trace())
    given = {"trace": number_of(text)}
    with pytest.raises(IllegalDecisionError, match="the trace"), deciding(given, trace=text):
        schedule_kernel(sums(), CPU)
    with deciding(given, strict=False, trace=text) as space:
        scheduled, rule, _ = schedule_kernel(sums(), CPU)
    assert rule == "generic" and space.refused == ["trace"] and not space.decisions.get("trace")
    np.testing.assert_allclose(*run(scheduled), rtol=1e-5, atol=1e-5)


def test_a_number_without_its_trace_is_refused():
    with pytest.raises(IllegalDecisionError), deciding({"trace": 7}):
        schedule_kernel(sums(), CPU)
    with deciding({"trace": 7}, strict=False) as space:
        assert schedule_kernel(sums(), CPU)[1] == "generic"
    assert space.refused == ["trace"]


@pytest.mark.parametrize("seed", range(40))
def test_changed_traces_are_refused_or_right(seed):
    generator, content = random.Random(seed), json.loads(trace())
    instructions = content[0]
    for _ in range(generator.randint(1, 3)):
        at = generator.randrange(len(instructions))
        match generator.randrange(3):
            case 0:
                del instructions[at]
            case 1:
                instructions.insert(generator.randrange(len(instructions)), instructions[at])
            case _:
                instructions[at] = json.loads(json.dumps(instructions[at]).replace("8", str(generator.randint(0, 50))))
    try:
        replayed = traces.replay(sums(), json.dumps(content))
    except IllegalDecisionError:
        return
    np.testing.assert_allclose(*run(replayed), rtol=1e-5, atol=1e-5)


def test_a_trace_is_text_of_one_line():
    assert "\n" not in trace()
    assert json.loads(trace())[0][0][0] == "GetSBlock"
