"""TVM's search for kernels without a template: it proposes, learns, and ends."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
from tvm import te

from optc.autotune import evolution as module
from optc.autotune.evolution import BATCH, Evolution, target_of
from optc.backends.cpu.single import aligned, compile_kernel
from optc.backends.cpu.target import resolve, to_tvm
from optc.backends.kernels import traces

CPU = resolve("cpu")


def sums(rows=64, columns=96):
    a = te.placeholder((rows, columns), "float32", "a")
    k = te.reduce_axis((0, columns), "k")
    return te.create_prim_func([a, te.compute((rows,), lambda i: te.sum(a[i, k], k), "total")])


def copy():
    a = te.placeholder((7,), "float32", "a")
    return te.create_prim_func([a, te.compute((7,), lambda i: a[i] + 1.0, "more")])


def evolution(function, seed=1):
    return Evolution(function, target_of(to_tvm(CPU), 2), seed)


def test_every_proposal_is_another_right_schedule():
    search, data = evolution(sums()), np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)
    texts = []
    for _ in range(2 * BATCH):
        texts.append(search.propose())
        result = aligned(np.zeros(64, np.float32))
        compile_kernel(traces.replay(sums(), texts[-1]), CPU)(aligned(data), result)
        np.testing.assert_allclose(result.numpy(), data.astype(np.float64).sum(1), rtol=1e-5, atol=1e-5)
        search.learn(texts[-1], 1.0)
    assert len(set(texts)) == 2 * BATCH
    assert [evolution(sums()).propose(), evolution(sums()).propose()] == texts[:1] * 2, "the same in every run"


def many_sums(count=8):
    a = te.placeholder((16, 64), "float32", "a")

    def total(i):
        k = te.reduce_axis((0, 64), f"k{i}")
        return te.compute((16,), lambda r: te.sum(a[r, k] * float(i + 1), k), f"sum{i}")

    stages = [total(i) for i in range(count)]
    return te.create_prim_func([a, te.compute((16,), lambda r: sum(s[r] for s in stages), "all")])


def test_many_sums_do_not_multiply_spaces():
    """Each of them with partial sums of either kind, or none, would be 3^8 spaces: minutes."""
    search = evolution(many_sums())
    text = search.propose()
    assert text and "RFactor" not in text
    assert any("RFactor" in evolution(sums(), seed).propose() for seed in range(1, 4))


def test_instructions_of_gpus_are_not_parsed():
    evolution(sums()).propose()
    assert not [name for name in sys.modules if name.startswith("tvm.s_tir.tensor_intrin")]


def test_a_small_space_ends():
    search = evolution(copy())
    texts = [search.propose() for _ in range(40)]
    assert texts[0] and not texts[-1]
    assert search.promise(1.0) == 0.0


def test_bad_results_promise_less():
    bad, good = evolution(sums()), evolution(sums())
    assert bad.promise(1.0) == good.promise(1.0) > 0.01
    for search, ratio in ((bad, 2.0), (good, 0.8)):
        for _ in range(8):
            search.learn(search.propose(), ratio)
    assert bad.promise(1.0) < 0.01 < good.promise(0.8)
    bad.learn(bad.propose(), math.inf)


def product(size=64):
    a, b = (te.placeholder((size, size), "float32", name) for name in "ab")
    k = te.reduce_axis((0, size), "k")
    return te.create_prim_func([a, b, te.compute((size, size), lambda i, j: te.sum(a[i, k] * b[k, j], k), "c")])


def wide(text):
    """Tell whether the innermost loop of the columns of ``product`` has 8 turns or more."""
    instructions, decisions = json.loads(text)
    tiles = [d for i, d in decisions if instructions[i][0] == "SamplePerfectTile" and len(d) == 4]
    return len(tiles) > 1 and tiles[1][-1] >= 8


@pytest.mark.parametrize("fast", [True, False])
def test_it_goes_where_it_was_fast(fast):
    search = evolution(product())
    for _ in range(5 * BATCH):
        text = search.propose()
        search.learn(text, 0.5 if wide(text) == fast else 2.0)
    later = [wide(search.propose()) == fast for _ in range(BATCH)]
    assert sum(later) >= BATCH - 1


@pytest.mark.parametrize("text", ["[[], []]", "nonsense"])
def test_traces_of_other_runs_are_learned_or_left(text):
    search = evolution(sums())
    search.learn(text, 0.7)
    assert search.values == [math.log(0.7)]
    assert search.propose()


def test_a_search_that_fails_ends_and_says_why(monkeypatch):
    search = evolution(sums())
    first = search.propose()
    monkeypatch.setattr(module.search.database, "TuningRecord", lambda *_: 1 / 0)
    search.learn(first, 0.5)
    assert search.failure == "TVM's search failed: ZeroDivisionError: division by zero"
    assert search.propose() == "" and search.promise(1.0) == 0.0
    search.learn(first, 0.5)
    broken = evolution(None)
    assert broken.propose() == "" and broken.failure.startswith("TVM's search failed")


@pytest.mark.parametrize("raised", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupt_inside_of_tvm_is_one(monkeypatch, raised):
    def interrupted(*_):
        raise raised

    search = evolution(sums())
    for text in [search.propose() for _ in range(BATCH)]:
        search.learn(text, 1.0)
    monkeypatch.setattr(module, "_squares", interrupted)
    if raised is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            search.propose()
    else:
        assert search.propose() == "" and "ZeroDivisionError" in search.failure
