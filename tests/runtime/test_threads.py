"""Threads: those of the caller, those of the kernels, and processes forked off."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest


def expected(x, weight):
    return x @ weight + np.arange(16, dtype=np.float32)


@pytest.mark.parametrize("kernel_threads", [1, 2])
def test_eight_callers(affine, weight, kernel_threads):
    model = affine.model()
    model.threads = kernel_threads
    errors = []

    def call(seed):
        rng = np.random.default_rng(seed)
        try:
            for _ in range(50):
                x = rng.normal(size=(int(rng.integers(1, 64)), 16)).astype(np.float32)
                np.testing.assert_allclose(model.run({"x": x})["y"], expected(x, weight), rtol=1e-4, atol=1e-4)
        except BaseException as error:
            errors.append(error)

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert not errors


COUNT = """
import os, sys, time
import numpy as np, optc.runtime
def tasks(): return len(os.listdir("/proc/self/task"))
x = np.ones((4096, 256), np.float32)
before = tasks()
affinity = os.sched_getaffinity(0)
model = optc.runtime.load(sys.argv[1])
for count in map(int, sys.argv[2:]):
    model.threads = count
    deadline = time.monotonic() + 10  # idle helpers spin for a while before they notice their end
    while tasks() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (model.run({"x": x})["y"] == 2).all()
    print(tasks() - before, end=" ")
assert os.sched_getaffinity(0) == affinity
"""


def test_number_of_threads(parallel, tmp_path, in_process):
    parallel.save(tmp_path / "m.optc")
    # One thread: the caller's. More: a thread that calls the kernels and the helpers that TVM gives it.
    assert in_process(COUNT, tmp_path / "m.optc", 1, 3, 2, 4, 1).split() == ["0", "3", "2", "4", "0"]


def test_default_threads_are_the_physical_cores(parallel):
    from optc.runtime.cpu import default_threads

    assert parallel.model().threads == default_threads()
    assert 1 <= default_threads() <= len(os.sched_getaffinity(0))


def test_threads_fixed_by_the_target(affine):
    from dataclasses import replace

    target = replace(affine.manifest.target, threads=3)
    assert replace(affine, manifest=replace(affine.manifest, target=target)).model().threads == 3


FORK = """
import os, sys
import numpy as np, optc.runtime
model = optc.runtime.load(sys.argv[1])
model.threads = int(sys.argv[2])
x = np.ones((4096, 256), np.float32)
model.run({"x": x})
child = os.fork()
assert (model.run({"x": x})["y"] == 2).all()
if child == 0:
    sys.exit(7)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize("kernel_threads", [1, 3])
def test_forked_child_runs_and_ends(parallel, tmp_path, in_process, kernel_threads):
    parallel.save(tmp_path / "m.optc")
    assert in_process(FORK, tmp_path / "m.optc", kernel_threads).strip() == "7"


def test_threads_end_with_the_model(parallel):
    model = parallel.model()
    before = threading.active_count()
    model.threads = 2
    model.run({"x": np.ones((4096, 256), np.float32)})
    assert threading.active_count() == before + 1
    del model
    assert threading.active_count() == before


def test_descriptors_end_with_the_model(affine_path):
    import optc.runtime

    x = np.ones((1, 16), np.float32)
    optc.runtime.load(affine_path).run({"x": x})
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        optc.runtime.load(affine_path).run({"x": x})
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_many_models_keep_apart(copier, affine, weight):
    # Libraries are known to the loader by a path with a descriptor's number, which gets used again.
    x = np.ones((2, 16), np.float32)
    doubles = np.ones((2, 3), np.float64)
    copy = copier("float64", 2, 3)
    for _ in range(5):
        np.testing.assert_allclose(affine.model().run({"x": x})["y"], expected(x, weight), rtol=1e-5)
        np.testing.assert_array_equal(copy.model()(doubles), doubles)


INTERRUPT = """
import signal, sys, threading, time, os
import numpy as np, optc.runtime
model = optc.runtime.load(sys.argv[1])
model.threads = 2
x = np.ones((4096, 256), np.float32)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    while True:
        model.run({"x": x})
except KeyboardInterrupt:
    pass
assert (model.run({"x": x})["y"] == 2).all()
print("interrupted")
"""


def test_interrupt(parallel, tmp_path, in_process):
    parallel.save(tmp_path / "m.optc")
    assert in_process(INTERRUPT, tmp_path / "m.optc").strip() == "interrupted"
