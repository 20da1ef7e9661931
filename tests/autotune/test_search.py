"""The cost model and the search: what is learned, what is proposed, and that nothing is proposed twice."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from optc.autotune.model import CostModel, Point, features, improvement
from optc.autotune.search import NEXT, Candidate, Search, candidate_of
from optc.backends.kernels.decisions import Knob, Space
from optc.backends.kernels.workload import Workload


def workload(m):
    return Workload({"op": "matmul", "m": m, "k": 64, "n": 64, "dtype": "float32"}, (), {"vectors": 2})


def knob(default, *options, cost=lambda o: 1.0):
    return Knob(default, options, tuple(cost(o) for o in options))


def task(m=128):
    """Return a task with two panel widths, a knob with an analytic model, and one without."""
    knobs = {"rows": knob(4, 1, 2, 4, 6, cost=lambda o: 4 / o if o < 4 else 1.1), "unroll": knob(1, 1, 2, 4)}
    variants = []
    for vectors in (2, 3):
        own = Workload(workload(m).core, (), {"vectors": vectors})
        space = Space(knobs=dict(knobs), taken={name: k.default for name, k in knobs.items()})
        variants.append(SimpleNamespace(workload=own, layout=own.layout, space=space))
    return SimpleNamespace(variants=variants, key=variants[0].workload.key, workload=variants[0].workload)


def truth(search, candidate):
    """Return what a machine would measure: unrolling by 2 and six rows are fast, three vectors are slow."""
    d = search.full(candidate)
    return (
        (0.9 if d["unroll"] == 2 else 1.0)
        * (0.93 if d["rows"] == 6 else 1.0 + 0.1 * (4 - d["rows"]) * (d["rows"] < 4))
        * (1.2 if d["vectors"] == 3 else 1.0)
    )


def searching(*tasks):
    model = CostModel({t.key: t.workload for t in tasks})
    return model, [Search(t, model) for t in tasks]


def run(search, trials):
    for _ in range(trials):
        ((_, candidate),) = search.propose(1)
        assert candidate not in search.tried
        search.learn(candidate, truth(search, candidate))


def test_the_search_finds_the_best_of_a_small_space():
    _, (search,) = searching(task())
    run(search, 12)
    assert search.full(search.best.candidate) == {"rows": 6, "unroll": 2, "vectors": 2}
    assert search.best.ratio == pytest.approx(0.9 * 0.93)


def test_a_space_ends():
    _, (search,) = searching(task())
    for _ in range(200):
        proposed = search.propose(1)
        if not proposed:
            break
        search.learn(proposed[0][1], truth(search, proposed[0][1]))
    assert not search.propose(1)
    assert len(search.tried) <= 2 * 4 * 3


def test_candidate_zero_is_the_untuned_kernel():
    _, (search,) = searching(task())
    assert search.best.candidate == search.zero and search.best.ratio == 1.0
    search.learn(search.propose(1)[0][1], math.inf)
    assert search.best.ratio == 1.0
    assert search.defaults == {"rows": 4, "unroll": 1, "vectors": 2}


def test_what_the_analytic_model_calls_slow_comes_late():
    _, (search,) = searching(task())
    order = [dict(c.decisions).get("rows") for _, c in search.propose(100) if len(c.decisions) == 1 and c.variant == 0]
    rows = [r for r in order if r]
    assert rows.index(6) < rows.index(1)


def test_kernels_learn_from_each_other():
    near, far, other = task(160), task(128 * 2**12), task()
    model, (search, *_) = searching(other, near, far)
    before, _ = model.predict([Point(t.key, features({"unroll": 2}, {"unroll": 1}), 1.0) for t in (near, far)])
    for _ in range(3):
        model.add(Point(search.task.key, features({"unroll": 2}, {"unroll": 1}), 1.0), 0.8)
    after, deviation = model.predict([Point(t.key, features({"unroll": 2}, {"unroll": 1}), 1.0) for t in (near, far)])
    assert after[0] < before[0] - 0.05
    assert abs(after[1] - before[1]) < abs(after[0] - before[0]) / 3
    assert deviation[0] < deviation[1]


def test_a_measured_point_is_believed():
    model, (search,) = searching(task())
    point = Point(search.task.key, {"unroll": 1.0}, 1.0)
    for _ in range(4):
        model.add(point, 0.7)
    mean, deviation = model.predict([point])
    assert math.exp(mean[0]) == pytest.approx(0.7, rel=0.03)
    assert deviation[0] < 0.03


def test_expected_improvement():
    gain = improvement(np.array([0.0, -0.1, 0.5]), np.array([0.1, 0.1, 0.1]), 0.0)
    assert gain[1] > gain[0] > gain[2] >= 0
    assert gain[0] == pytest.approx(0.1 / math.sqrt(2 * math.pi))


class Traces:
    """An evolution that knows three traces."""

    def __init__(self, gain):
        self.gain, self.left, self.learned = gain, ["c", "b", "a"], {}

    def promise(self, best):
        return self.gain if self.left else 0.0

    def propose(self):
        return self.left.pop() if self.left else ""

    def learn(self, text, ratio):
        self.learned[text] = ratio


def test_traces_are_tried_while_they_promise_more_than_decisions():
    _, (search,) = searching(task())
    search.evolution = evolution = Traces(gain=1.0)
    search.remember("b", 0.5)
    for expected in ("a", "c"):
        ((gain, candidate),) = search.propose(1)
        assert (gain, candidate) == (1.0, NEXT)
        settled = search.settle(candidate)
        assert search.trace(settled) == expected, "what another run has measured is not tried again"
        search.learn(settled, 0.9, {"trace": knob(0, 0, 1)})
    assert evolution.learned == {"b": 0.5, "a": 0.9, "c": 0.9}
    assert search.best.ratio == 0.5 and search.trace(search.best.candidate) == "b"
    assert search.settle(NEXT) is None
    run(search, 12)
    assert all(len(c.decisions) < 2 or "trace" not in c.given for c in search.tried), "a trace decides alone"
    assert "trace" not in search.knobs[0]


def test_traces_wait_while_they_promise_less():
    _, (search,) = searching(task())
    search.evolution = Traces(gain=0.0)
    assert search.propose(1)[0][1] != NEXT
    assert search.settle(search.propose(1)[0][1]) == search.propose(1)[0][1]


def test_recorded_decisions_are_found_again():
    one = task()
    assert candidate_of(one, {"rows": 4, "unroll": 2, "vectors": 3}) == Candidate(1, (("unroll", 2),))
    assert candidate_of(one, {"rows": 4, "unroll": 1, "vectors": 4}) is None
