"""The search on problems whose best answer is known, and its journal."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.compression.journal import Journal
from optc.compression.search import Layer, Search
from optc.errors import UsageError

A, B, C = Layer("a", 10.0, 4.0), Layer("b", 5.0, 3.0), Layer("c", 1.0, 2.0)


def additive(losses):
    return lambda layers: sum(losses[name] for name in layers)


def test_everything_that_pays_if_it_fits():
    outcome = Search([A, B, C], additive({"a": 0.1, "b": 0.1, "c": 0.0})).run(0.5)
    assert outcome.best.layers == {"a", "b"}  # c is slower compressed
    assert outcome.best.cost == 8.0


def test_nothing_fits():
    outcome = Search([A, B], additive({"a": 0.1, "b": 0.2})).run(0.05)
    assert outcome.best is None
    assert outcome.front()[0].layers == {"a", "b"}


def test_a_weaker_form_where_the_layer_does_not_fit():
    strong = Layer("a", 10.0, 2.0, (Layer("a, half", 10.0, 6.0), Layer("a, a little", 10.0, 9.0)))
    search = Search([strong, B], additive({"a": 0.5, "a, half": 0.2, "a, a little": 0.1, "b": 0.2}))
    assert search.run(0.4).best.layers == {"a, half", "b"}
    assert search.run(0.4).best.cost == 9.0
    search = Search([strong, B], additive({"a": 0.5, "a, half": 0.5, "a, a little": 0.1, "b": 0.2}))
    assert search.run(0.4).best.layers == {"a, a little", "b"}


def test_costs_may_be_measured_with_the_loss():
    def evaluate(layers):
        costs[layers] = 15.0 - 4.0 * len(layers)
        return 0.1 * len(layers)

    costs = {}
    assert Search([A, B], evaluate, measured=costs.__getitem__).run(0.2).best.cost == 7.0


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_never_worse_than_thirty_random_mixtures(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    before, shares, alone = rng.uniform(1, 10, 12), rng.uniform(0.2, 1.1, 12), rng.exponential(0.1, 12)
    layers = [Layer(str(i), float(before[i]), float(before[i] * shares[i])) for i in range(12)]
    losses = {str(i): float(alone[i]) for i in range(12)}

    def evaluate(chosen):
        # Not additive: errors of several layers add up like noise does.
        return float(np.sqrt(sum(losses[name] ** 2 for name in chosen)))

    search, limit = Search(layers, evaluate), 0.2
    outcome = search.run(limit)
    mixtures = [frozenset(str(i) for i in np.flatnonzero(rng.random(12) < rng.random())) for _ in range(30)]
    costs = [search.cost(m) for m in mixtures if m and evaluate(m) <= limit]
    if costs:
        assert outcome.best is not None
        assert outcome.best.cost <= min(costs) + 1e-9
    if outcome.best is not None:
        assert evaluate(outcome.best.layers) <= limit


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("seed", range(20))
def test_the_best_of_all_mixtures_where_powers_of_losses_add_up(power, seed):
    rng = np.random.default_rng(seed)
    before, shares, alone = rng.uniform(1, 10, 9), rng.uniform(0.2, 1.1, 9), rng.exponential(0.1, 9)
    layers = [Layer(str(i), float(before[i]), float(before[i] * shares[i])) for i in range(9)]

    def loss(chosen):
        return float(sum(alone[int(name)] ** power for name in chosen)) ** (1 / power)

    outcome = Search(layers, loss).run(0.2)
    names = [layer.name for layer in layers]
    every = [frozenset(c) for n in range(1, 10) for c in itertools.combinations(names, n)]
    least = min((cost for c in every if loss(c) <= 0.2 for cost in [Search(layers, loss).cost(c)]), default=None)
    assert (outcome.best and outcome.best.cost) == pytest.approx(least, rel=1e-3)
    assert len(outcome.points) <= 3 * len(layers)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_layer_whose_outputs_are_no_numbers_is_left(bad):
    search = Search([A, B], lambda layers: bad if "a" in layers else 0.1)
    assert search.run(0.2).best.layers == {"b"}


def test_no_loss_allowed():
    search = Search([A, B], additive({"a": 0.0, "b": 0.1}))
    assert search.run(0.0).best.layers == {"a"}


def test_the_front_is_what_nothing_beats():
    outcome = Search([A, B], additive({"a": 0.1, "b": 0.2})).run(1.0)
    front = outcome.front()
    for one, two in itertools.pairwise(front):
        assert one.cost < two.cost
        assert one.loss > two.loss


def test_a_journal_is_not_evaluated_again(tmp_path):
    path, calls = tmp_path / "j.jsonl", []

    def evaluate(layers):
        calls.append(layers)
        return 0.1 * len(layers)

    first = Search([A, B], evaluate, Journal(path, "m")).run(0.1)
    done = len(calls)
    # A killed search leaves a line that is cut off.
    path.write_text(path.read_text() + '{"subject": "m", "lay')
    again = Search([A, B], evaluate, Journal(path, "m")).run(0.1)
    assert len(calls) == done
    assert again == first
    Search([A, B], evaluate, Journal(path, "another model")).run(0.1)
    assert len(calls) == 2 * done
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_another_file_is_no_journal(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("dear diary\n")
    with pytest.raises(UsageError, match="line 1: not a line of a journal"):
        Journal(path, "m")
