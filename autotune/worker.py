"""A process that builds and times kernels, and may die of it: ``python -m optc.autotune.worker FD ...``.

It answers requests on a socket, one by one (``pool.py`` sends them). A candidate is timed in turns with the untuned
kernel on the same data, so that a machine that changes its clock changes both. In a model, data do not lie where the
last call of the same kernel left them: weights come from memory or the last-level cache, activations from another core.
So calls take turns with copies of both, which add up to what the model has.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from optc.autotune.place import Here, Kernel, Place, Server, SessionLostError, Tracker
from optc.autotune.record import OK, paired

MOST_COPIES = 48
_BASE_CALLS = 5
BLOCK_SECONDS = 2e-3
"""What a turn of one contestant takes at least."""
_PR_SET_PDEATHSIG = 1
HOPELESS = 1.25
"""A candidate is given up when its first turns are slower than the untuned kernel by this factor."""
AGAIN = 3
"""How many times as long a candidate is measured that looks better than any before."""
TOLERANCE = {"float32": 1e-4, "float64": 1e-4, "float16": 5e-3, "bfloat16": 4e-2}
"""Allowed difference of floats, relative to the largest magnitude; integers have to be equal up to one step."""


@dataclass(frozen=True)
class Cold:
    """Bytes of weights and of activations that calls cycle through."""

    weights: int
    activations: int


@dataclass
class Loaded:
    """A variant of a task: how to build it, its inputs, and what it should give."""

    function: Any
    arrays: list[np.ndarray]
    outputs: list[np.ndarray]
    weights: tuple[int, ...]
    sets: list[list[list[Any]]] = field(default_factory=list)
    turn: int = 0

    def arguments(self, cold: Cold, place: Place) -> list[Any]:
        """Return the tensors of the next call."""
        if not self.sets:
            all_arrays = [*self.arrays, *self.outputs]
            self.sets = [[place.tensor(a)] for a in all_arrays]
            moving = [i for i in range(len(all_arrays)) if i not in self.weights]
            for numbers, total in ((self.weights, cold.weights), (moving, cold.activations)):
                size = sum(all_arrays[i].nbytes for i in numbers)
                for _ in range(min(MOST_COPIES, -(-total // size)) - 1 if size else 0):
                    for i in numbers:
                        self.sets[i].append(place.tensor(all_arrays[i]))
        self.turn += 1
        return [copies[self.turn % len(copies)] for copies in self.sets]


class Worker:
    """The state of the process: what was loaded and built."""

    def __init__(self, target: str, cold: Cold, tracker: Tracker | None = None, threads: int = 1) -> None:
        from optc.backends.registry import resolve

        self.target, self.cold = resolve(target), cold
        self.place: Place = Server(self.target, tracker, threads) if tracker else Here(self.target)
        self.loaded: dict[tuple[str, int], Loaded] = {}
        self.built: dict[int, tuple[Kernel, Loaded]] = {}
        self.baseline: dict[str, tuple[Kernel, Loaded]] = {}
        self.expected: dict[str, list[np.ndarray]] = {}

    def load(self, task: str, variant: int, file: str) -> dict[str, Any]:
        """Load a variant that the parent has written; the first of a task is its baseline."""
        import tvm

        with np.load(file, allow_pickle=False) as content:
            function = tvm.ir.load_json(str(content["function"]))
            arrays = [content[f"in{i}"] for i in range(int(content["inputs"]))]
            weights = tuple(int(i) for i in content["weights"])
        shapes = [p.ty for p in function.params[len(arrays) :]]
        outputs = [np.zeros([int(d) for d in t.shape], str(t.dtype)) for t in shapes]
        self.loaded[task, variant] = Loaded(function, arrays, outputs, weights)
        return {}

    def start(self, task: str, naive: bool) -> dict[str, Any]:
        """Build the untuned kernel of a task and compute what is right; ``naive`` without any schedule.

        Answers with the seconds that a call of the untuned kernel takes.
        """
        variant = self.loaded[task, 0]
        if task not in self.baseline:
            self.baseline[task] = self._build(variant, {})[0], variant
        untuned = self._run(*self.baseline[task])
        if naive:
            tensors = [self.place.tensor(a) for a in [*variant.arrays, *variant.outputs]]
            self.place.build(variant.function)(*tensors)
            self.expected[task] = [t.numpy() for t in tensors[len(variant.arrays) :]]
            error = difference(untuned, self.expected[task])
            if error is None or error > 1:
                return {"state": "wrong", "note": "the untuned kernel differs from its definition"}
        else:
            self.expected[task] = untuned
        return {"seconds": median(self._once(*self.baseline[task]) for _ in range(_BASE_CALLS))}

    def build(
        self, task: str, variant: int, decisions: Mapping[str, int], number: int, trace: str = ""
    ) -> dict[str, Any]:
        """Build a candidate, run it once, and compare."""
        loaded = self.loaded[task, variant]
        function, knobs, taken = self._build(loaded, decisions, trace)
        self.built[number] = function, loaded
        error = difference(self._run(function, loaded), self.expected[task])
        if error is None or error > 1:
            del self.built[number]
            return {"state": "wrong", "note": "its numbers differ from those of the untuned kernel"}
        return {"knobs": knobs, "taken": taken, "error": error}

    def measure(self, task: str, number: int, rounds: int, best: float) -> dict[str, Any]:
        """Time a candidate in turns with the untuned kernel: not for long if it is far slower than ``best``."""
        contestants = (self.baseline[task], self.built.pop(number))
        once = [self._once(*contestant) for contestant in contestants]
        counts = [max(1, round(BLOCK_SECONDS / max(seconds, 1e-7))) for seconds in once]
        samples: tuple[list[float], list[float]] = ([], [])
        for turn in range(rounds * AGAIN):
            order = (0, 1) if turn % 2 == 0 else (1, 0)
            for i in order:
                samples[i].append(self._block(*contestants[i], counts[i]))
            ratio = paired(samples[1], samples[0])
            # Of many candidates the luckiest looks best: what looks best is measured for longer.
            if (turn == 1 and ratio > HOPELESS * best) or (turn == rounds - 1 and ratio > best):
                break
        base = median(samples[0])
        noise = median(abs(s - base) for s in samples[0]) / base
        return {"seconds": samples[1], "baseline": samples[0], "noise": noise}

    def _build(
        self, loaded: Loaded, decisions: Mapping[str, int], trace: str = ""
    ) -> tuple[Any, dict[str, Any], dict[str, int]]:
        from optc.backends.kernels.decisions import deciding
        from optc.backends.kernels.schedule import schedule_kernel

        with deciding(decisions, trace=trace) as space:
            scheduled, _, _ = schedule_kernel(loaded.function, self.target)
        return self.place.build(scheduled), dict(space.knobs), space.decisions

    def _run(self, function: Kernel, loaded: Loaded) -> list[np.ndarray]:
        arguments = loaded.arguments(self.cold, self.place)
        results = arguments[len(loaded.arrays) :]
        for result in results:
            # What a kernel does not write must not look right.
            array = np.full(result.shape, _garbage(str(result.dtype)), dtype=str(result.dtype))
            result.copyfrom(array)
        function(*arguments)
        return [np.array(r.numpy()) for r in results]

    def _once(self, function: Kernel, loaded: Loaded) -> float:
        return self._block(function, loaded, 1)

    def _block(self, function: Kernel, loaded: Loaded, count: int) -> float:
        function(*loaded.arguments(self.cold, self.place))
        return self.place.seconds(function, [loaded.arguments(self.cold, self.place) for _ in range(count)])


def difference(actual: list[np.ndarray], expected: list[np.ndarray]) -> float | None:
    """Return the largest error over what is allowed, None where something is not a number that should be one."""
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        tolerance = TOLERANCE.get(e.dtype.name)
        wide_a, wide_e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        same = (wide_a == wide_e) | (np.isnan(wide_a) & np.isnan(wide_e))
        with np.errstate(invalid="ignore"):
            gap = np.where(same, 0.0, np.abs(wide_a - wide_e))
        if not np.isfinite(gap).all():
            return None
        finite = np.abs(wide_e[np.isfinite(wide_e)])
        scale = tolerance * float(finite.max(initial=0.0)) if tolerance else 1.0
        largest = float(gap.max(initial=0.0))
        worst = max(worst, largest / scale if scale else (np.inf if largest else 0.0))
    return worst


def _garbage(dtype: str) -> float:
    return np.nan if "float" in dtype else (1 if dtype == "bool" else 77)


def serve(connection: Connection, make: Callable[[], Worker]) -> None:
    """Answer requests until the parent hangs up."""
    try:
        worker = make()
    except Exception as error:  # a server that is not there, or is another machine
        connection.send({"state": "error", "note": str(error)})
        return
    connection.send({"state": OK})
    while True:
        try:
            name, arguments = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        start = time.perf_counter()
        try:
            answer = {"state": OK, **getattr(worker, name)(**arguments)}
        except MemoryError:
            answer = {"state": "memory", "note": "out of memory"}
        except SessionLostError as error:
            answer = {"state": "crash", "note": str(error)}
        except Exception as error:  # whatever a candidate raises is its own fault
            text = f"{type(error).__name__}: {error}".strip().splitlines()
            full = text[-1] if text[0].startswith("InternalError") else text[0]
            state = "memory" if "out of memory" in str(error) or "bad_alloc" in str(error) else "error"
            answer = {"state": state, "note": full[:200]}
        connection.send(answer | {"took": time.perf_counter() - start})


def main() -> None:
    """Limit this process and serve."""
    parent = os.getppid()
    descriptor, target, settings = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    cold = Cold(settings["weights"], settings["activations"])
    tracker = Tracker(**settings["tracker"]) if settings["tracker"] else None
    if megabytes := settings["megabytes"]:
        import tvm  # noqa: F401 - what it maps does not count

        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        limit = used + (megabytes << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Not even a candidate that never returns outlives the parent.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    serve(Connection(descriptor), partial(Worker, target, cold, tracker, settings["threads"]))


if __name__ == "__main__":
    main()
