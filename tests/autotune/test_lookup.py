"""What a log serves: exact, nearest or nothing; never what was measured elsewhere; the same in any order."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.autotune import log
from optc.autotune.distance import distance
from optc.autotune.lookup import ANALYTIC, EXACT, NEAREST, Lookup, answer_key, refusal
from optc.autotune.machine import machine_of
from optc.autotune.record import KEPT, MODEL, parse
from optc.backends.cpu.target import resolve
from optc.backends.kernels import generic
from optc.backends.kernels.decisions import TRACE, number_of
from optc.backends.kernels.templates import TEMPLATES, VERSIONS
from optc.backends.kernels.workload import Workload

MACHINE = machine_of(resolve("x86-64-v3"), 2)


def matmul(m=128, epilogue=(), **layout):
    return Workload(
        {"op": "matmul", "m": m, "k": 768, "n": 768, "dtype": "float32"}, epilogue, layout or {"vectors": 2}
    )


def served(records, workload=None, machine=MACHINE, **options):
    found = Lookup(machine, records, **options)
    workload = workload or matmul()
    found.schedule(workload)
    return found.answers[answer_key(workload)]


def test_the_best_choice_is_served(record):
    answer = served([record(0.9, {"unroll": 4}), record(0.8, {"unroll": 2}), record(1.2, {"rows": 4})])
    assert answer.source == EXACT
    assert answer.decisions["unroll"] == 2
    assert [r.ratio for r in answer.choice.records] == [pytest.approx(0.8)]


def test_the_untuned_kernel_is_candidate_zero(record):
    for records in ([record(1.1)], [record(0.999)], [record(1.0, {}, state=KEPT, seconds=(), baseline=())]):
        answer = served(records)
        assert answer.source == EXACT
        assert answer.decisions == {}


def test_repeated_measurements_are_judged_by_their_median(record):
    lucky = [record(0.5, {"unroll": 4}), record(1.1, {"unroll": 4}), record(1.2, {"unroll": 4})]
    assert served([*lucky, record(0.95, {"unroll": 2})]).decisions["unroll"] == 2


@pytest.mark.parametrize("template", [*TEMPLATES, *generic.RULES])
def test_records_of_every_template_and_rule_are_served(record, template):
    one = replace(record(0.8), template=template, template_version=VERSIONS[template])
    assert refusal(one, MACHINE) is None
    assert served([one]).source == EXACT


def test_a_trace_is_served_for_its_own_shape_only(record):
    traced = record(0.5, {TRACE: number_of("[]")}, trace="[]", where=MODEL)
    found = Lookup(MACHINE, [traced, record(0.6, {"unroll": 2})])
    assert found.schedule(matmul())[TRACE] == number_of("[]")
    assert found.trace(matmul()) == "[]"
    near = matmul(m=96)
    assert found.schedule(near) == {} and found.trace(near) == ""
    assert found.answers[answer_key(near)].source == NEAREST
    plain = Lookup(MACHINE, [record(0.5)])
    assert plain.schedule(matmul()) and plain.trace(matmul()) == ""


@pytest.mark.parametrize("state", ["crash", "timeout", "memory", "wrong", "error"])
def test_what_ever_failed_is_not_served(record, state):
    failed = record(0.5, state=state, seconds=(), baseline=())
    assert served([record(0.5), failed]).source == ANALYTIC


def test_inside_of_a_model_counts_more_than_alone(record):
    records = [record(0.5), record(1.05, where=MODEL), record(0.9, {"unroll": 2})]
    assert served(records).decisions == {}
    assert served(records, explore=True).decisions["unroll"] == 2
    assert served([*records, record(0.95, {"unroll": 2}, where=MODEL)]).decisions["unroll"] == 2


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"machine": replace(MACHINE, threads=4)}, "threads 4 is not 2"),
        ({"machine": replace(MACHINE, cpu="znver9")}, "cpu znver9"),
        ({"machine": replace(MACHINE, features="0")}, "features 0"),
        ({"machine": replace(MACHINE, l2=1)}, "l2 1 is not"),
        ({"tvm": "0.26.0"}, "TVM 0.26.0"),
        ({"template_version": 99}, "version 99 of template contraction"),
        ({"template": "gone"}, "template gone"),
    ],
)
def test_records_from_elsewhere_are_never_served(record, change, reason):
    other = record(0.5, **change)
    assert reason in refusal(other, MACHINE)
    assert served([other]).source == ANALYTIC
    assert served([other], matmul(m=96)).source == ANALYTIC
    assert Lookup(MACHINE, [other]).layout(matmul()) == {}


def test_every_target_is_another_machine():
    machines = [machine_of(resolve(name), 2) for name in ("x86-64-v2", "x86-64-v3", "x86-64-v3:l2=1M", "aarch64")]
    assert len(set(machines)) == 4
    assert MACHINE.differences(MACHINE) == []


def test_a_layout_is_served_to_lowering(record):
    wide = record(0.7, {"rows": 3}, workload=matmul(vectors=4, epilogue=("relu",)))
    found = Lookup(MACHINE, [record(0.9), wide])
    assert found.layout(matmul()) == {"vectors": 4}
    assert found.layout(Workload({**matmul().core, "m": None})) == {}
    # Twice as many epilogues gain with the other one.
    others = [record(0.75, workload=matmul(epilogue=(e,))) for e in ("add", "clip")]
    assert Lookup(MACHINE, [wide, *others]).layout(matmul()) == {"vectors": 2}


def test_the_nearest_shape_lends_what_it_changed(record):
    inside = record(0.8, {"unroll": 4}, where=MODEL)
    answer = served([inside, record(0.5, workload=matmul(m=2048), where=MODEL)], matmul(m=96))
    assert answer.source == NEAREST
    assert answer.decisions == {"unroll": 4}
    assert answer.distance == pytest.approx(0.415, abs=0.01)
    for weak in (record(0.8), record(0.97, where=MODEL)):
        assert served([weak], matmul(m=96)).decisions == {}


def test_nothing_is_lent_across_operators_types_or_far_sizes(record):
    assert served([record(0.5)], matmul(m=128 * 64)).source == ANALYTIC
    half = Workload({**matmul().core, "dtype": "float16"}, (), {"vectors": 2})
    assert served([record(0.5)], half).source == ANALYTIC
    assert served([record(0.5)], Workload({"op": "generic", "tensors": []})).source == ANALYTIC


def test_distance_counts_factors_of_two():
    assert distance(matmul(), matmul()) == 0
    assert distance(matmul(m=128), matmul(m=512)) == 2
    assert distance(matmul(), matmul(epilogue=("relu",))) == 0.25
    conv = {"op": "conv", "filters": [8, 8, 3, 3], "out": [4, 4], "batch": 1}
    assert distance(Workload(conv), Workload(conv | {"batch": 4})) == 2
    assert distance(Workload(conv), Workload(conv | {"filters": [8, 8, 1, 1]})) == float("inf")
    assert distance(Workload(conv), Workload(conv | {"batch": 0})) == float("inf")


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0.5, 1.5), st.booleans()), max_size=12), st.randoms())
@settings(max_examples=30, deadline=None)
def test_merging_in_any_order_gives_the_same_lookups(drawn, order):
    lines = []
    for place, ratio, inside in drawn:
        base = parse(_LINE)
        changed = replace(
            base,
            workload=matmul(m=64 + 32 * (place % 2), vectors=1 + place % 3),
            decisions={**base.decisions, "vectors": 1 + place % 3, "unroll": 1 + place},
            seconds=(ratio * 1e-3,),
            baseline=(1e-3,),
            where="model" if inside else "alone",
        )
        lines.append(changed)
    # As they are written: with five digits, each once.
    lines = log.read_bytes("".join(f"{r.line}\n" for r in lines).encode()).records
    shuffled = list(lines)
    order.shuffle(shuffled)
    cut = order.randrange(len(lines) + 1) if lines else 0
    merged = log.read_bytes(log.dump(shuffled[:cut]) + log.dump(shuffled[cut:] + shuffled[:cut])).records
    for m in (64, 96, 80):
        for vectors in (1, 2, 3):
            workload = matmul(m=m, vectors=vectors)
            a, b = served(lines, workload), served(merged, workload)
            assert (a.source, a.decisions, a.distance) == (b.source, b.decisions, b.distance)
        one, other = Lookup(MACHINE, lines), Lookup(MACHINE, merged)
        assert one.layout(matmul(m=m)) == other.layout(matmul(m=m))


@pytest.fixture(autouse=True)
def _line(record):
    global _LINE
    _LINE = record(0.7).line
