"""Runs of kernels as one function: memory plans, views, errors, the clock."""

from __future__ import annotations

import itertools
import resource
import time
from pathlib import Path

import numpy as np
import onnx.numpy_helper
import onnx.parser
import pytest

import optc
from optc.backends.cpu import arena
from optc.runtime.executor import Machine

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'


@pytest.mark.parametrize("seed", range(30))
def test_tensors_alive_together_never_overlap_whatever_their_sizes(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 25))
    first = rng.integers(0, 20, count)
    last = first + rng.integers(0, 6, count)
    lives = [arena.Life(int(a), int(b), int(64 * rng.integers(1, 50))) for a, b in zip(first, last, strict=True)]
    order = arena.stack(lives)
    assert sorted(i for i, _ in order) == list(range(count))
    for sizes in ([life.size for life in lives], 64 * rng.integers(0, 100, count)):
        ends: dict[int, int] = {}
        for i, below in order:
            ends[i] = max((ends[j] for j in below), default=0) + int(sizes[i])
        for i in range(count):
            for j in range(i):
                if lives[i].meets(lives[j]):
                    assert ends[i] <= ends[j] - sizes[j] or ends[j] <= ends[i] - sizes[i]
        assert max(ends[i] for i in arena.top(order)) == max(ends.values())
    alive = [sum(life.size for life in lives if life.first <= n <= life.last) for n in range(26)]
    assert arena.bound(lives) == max(alive)


def test_a_chain_of_tensors_takes_the_memory_of_two():
    lives = [arena.Life(i, i + 1, 64) for i in range(10)]
    ends: dict[int, int] = {}
    for i, below in arena.stack(lives):
        ends[i] = max((ends[j] for j in below), default=0) + 64
    assert max(ends.values()) == 128 == arena.bound(lives)


MODEL = (
    HEADER
    + """
agraph (float[n, 4, m] x, float[k] w) => (float[n, r] y, float[a, b] z, float[c, d] t)
<float[4, 4] m1 = {1, 2, 0, 0, 0, 1, 0, 0, 1, 0, 1, 0, 0, 0, 0, 2}, int64[2] flat = {0, -1}> {
    a = Transpose<perm = [0, 2, 1]>(x)
    p = MatMul(a, m1)
    e = Tanh(p)
    s = ReduceSum<keepdims = 1>(e)
    q = Mul(e, s)
    y = Reshape(q, flat)
    b0, b1 = Split<axis = 2, num_outputs = 2>(q)
    u = Add(b0, b1)
    z = Reshape(u, flat)
    t = Reshape(b1, flat)
}"""
)


def inputs(n, m):
    rng = np.random.default_rng(n * m)
    return {"x": rng.normal(size=(n, 4, m)).astype(np.float32), "w": np.zeros(1, np.float32)}


@pytest.fixture(scope="module")
def model():
    return optc.compile(onnx.parser.parse_model(MODEL), verify=False).model()


def expected(x):
    m1 = np.array([[1, 2, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 2]], np.float32)
    e = np.tanh(x.transpose(0, 2, 1) @ m1)
    q = e * e.sum(dtype=np.float32)
    n = x.shape[0]
    return q.reshape(n, -1), (q[..., :2] + q[..., 2:]).reshape(n, -1), q[..., 2:].reshape(n, -1)


@pytest.mark.parametrize("threads", [1, 2])
def test_symbolic_sizes_and_views_that_are_seen_outside(model, threads):
    model.threads = threads
    for n, m in ((1, 1), (3, 50), (2, 7), (40, 33), (1, 4)):
        given = inputs(n, m)
        for found, wanted in zip(model.run(given).values(), expected(given["x"]), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [1, 3, 4])
def test_inputs_may_lie_anywhere(model, shift):
    given = inputs(3, 40)
    wanted = model.run(given)
    buffer = np.zeros(given["x"].nbytes + 16, np.uint8)
    moved = buffer[shift : shift + given["x"].nbytes].view(np.float32).reshape(given["x"].shape)
    moved[...] = given["x"]
    for name, value in model.run(given | {"x": moved}).items():
        np.testing.assert_array_equal(value, wanted[name])


def test_the_clock_counts_every_call_of_a_kernel(model):
    times = model.profile(inputs(3, 40), repeat=4)
    names = [found.name for found in times]
    assert "between kernels" in names
    assert len(names) > 3
    calls = model.manifest.calls
    assert all(found.calls == calls.count(found.name) for found in times if found.name in calls)
    assert all(found.seconds >= 0 for found in times)


def test_a_run_that_is_held_up_does_not_count(model, monkeypatch):
    clock, calls = time.perf_counter_ns, itertools.count()

    def held_up():
        return clock() + 10**11 * (next(calls) == 3)

    monkeypatch.setattr("optc.runtime.model.time.perf_counter_ns", held_up)
    times = {found.name: found.seconds for found in model.profile(inputs(3, 40), repeat=5)}
    assert next(calls) == 10
    assert times["between kernels"] < 1


@pytest.mark.parametrize("threads", [1, 2])
def test_a_profile_waits_until_threads_are_on_cores_of_their_own(model, monkeypatch, threads):
    """While they share one, a second thread looks as if it did not help."""
    run, began = Machine.run, []

    def noted(machine, *arguments):
        began.append(time.perf_counter())
        return run(machine, *arguments)

    monkeypatch.setattr(model, "threads", threads, raising=False)
    monkeypatch.setattr(Machine, "run", noted)
    monkeypatch.setattr("optc.runtime.model.SPREAD_SECONDS", 0.05)
    model.profile(inputs(3, 40), repeat=5)
    if threads == 1:
        assert len(began) == 1 + 5
    else:
        assert began[-5] - began[0] >= 0.05


def test_kernels_named_like_functions_of_the_c_library_do_not_stand_in_for_them():
    text = HEADER + "agraph (double[n] x) => (double[n] y, double[n] z) { y = Exp(x) z = Sin(x) }"
    model = optc.compile(onnx.parser.parse_model(text), verify=False).model()
    x = np.linspace(-2, 2, 50)
    y, z = model(x)
    np.testing.assert_allclose(y, np.exp(x), rtol=1e-14)
    np.testing.assert_allclose(z, np.sin(x), rtol=1e-14, atol=1e-15)


def test_runs_release_the_scratch_memory_of_kernels():
    """A Winograd convolution and a product of rows allocate scratch buffers outside of their parallel loops."""
    model = onnx.parser.parse_model(
        HEADER
        + """
        g (float[1, 64, 14, 14] x, float[64, 64, 3, 3] k) => (float[1, 64, 14, 14] y) {
            y = Conv<pads = [1, 1, 1, 1]>(x, k) }"""
    )
    (kernel,) = model.graph.input[1:]
    del model.graph.input[1:]
    weights = np.random.default_rng(0).standard_normal((64, 64, 3, 3)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, kernel.name))
    compiled = optc.compile(model, verify=False).model()
    x = np.ones((1, 64, 14, 14), np.float32)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    for _ in range(10):
        compiled.run({"x": x})
    before = resident()
    for _ in range(200):
        compiled.run({"x": x})
    assert resident() - before < 8 << 20
