"""What this machine can do: floating-point peak and memory bandwidth, measured with kernels of the compiler's own kind.

    python benchmarks/machine.py

The peak kernel keeps more independent chains of fused multiply-adds in registers than the units' latency needs; the
bandwidth kernel adds up an array far larger than any cache.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import tvm
from tvm import te

from optc.backends.base import Target
from optc.backends.cpu.target import resolve, to_tvm
from optc.backends.kernels.loops import index, load, loop, scratch, sequence, store
from optc.runtime.executor import configure_threads

CHAINS = 12
"""Independent accumulators: two units times a latency of four or five cycles, in sixteen registers."""
SUMS = 8
"""Vectors that the bandwidth kernel adds to."""
STEPS = 1 << 23
ARRAY = 1 << 26
"""Floats that the bandwidth kernel reads: 256 MiB."""


@dataclass(frozen=True)
class Limits:
    """Measured limits for a number of threads: GFLOP/s in float32, GB/s of reads."""

    threads: int
    gflops: float
    bandwidth: float


def describe() -> dict[str, object]:
    """Return what identifies the machine and the programs that a benchmark compares."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    target = resolve("cpu")
    wide = ("avx2", "avx512f", "avx512vnni", "avxvnni", "fma", "dotprod", "i8mm", "neon")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": name.group(1) if name else platform.machine(),
        "llvm": target.cpu,
        "features": [f for f in wide if f in target.features],
        "cores": len(os.sched_getaffinity(0)),
        "caches": _caches(),
        "memory_gb": round(memory / 1e9, 1),
        "system": f"{platform.system()} {platform.release().split('-')[0]}, Python {platform.python_version()}",
    }


def _caches() -> dict[str, str]:
    """Return the size of each cache of the first core."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((folder / f).read_text().strip() for f in ("level", "type", "size"))
        if kind != "Instruction":
            found[f"L{level}"] = size
    return found


def measure(threads: int, repeat: int = 9) -> Limits:
    """Measure the limits with ``threads`` threads, one per core; the best of ``repeat`` runs counts."""
    with ThreadPoolExecutor(1) as own:  # the threads of kernels belong to the thread that calls them
        return own.submit(_measure, threads, repeat).result()


def _measure(threads: int, repeat: int) -> Limits:
    configure_threads(threads)
    target = resolve("cpu")
    lanes = target.vector_bits // 32
    seed = tvm.runtime.tensor(np.full(lanes, 1.0 - 2.0**-20, np.float32))
    result = tvm.runtime.tensor(np.zeros((threads, CHAINS * lanes), np.float32))
    peak = _compile(_multiply_adds(threads, lanes), target)
    flops = 2.0 * STEPS * CHAINS * lanes * threads
    fastest = _best(lambda: peak(seed, result), repeat)
    return Limits(threads, flops / fastest / 1e9, _reading(threads, ARRAY, repeat))


def bandwidth(threads: int, floats: int, repeat: int = 99) -> float:
    """Return the GB/s at which ``threads`` threads read the same ``floats`` numbers again and again."""
    with ThreadPoolExecutor(1) as own:
        return own.submit(_reading, threads, floats, repeat).result()


def _reading(threads: int, floats: int, repeat: int) -> float:
    configure_threads(threads)
    target = resolve("cpu")
    lanes = target.vector_bits // 32
    array = tvm.runtime.tensor(np.ones(floats, np.float32))
    sums = tvm.runtime.tensor(np.zeros((threads, SUMS * lanes), np.float32))
    total = _compile(_sum(threads, lanes, floats), target)
    seconds = _best(lambda: total(array, sums), repeat)
    if not np.isclose(sums.numpy().sum(), floats):
        raise RuntimeError("the bandwidth kernel did not read the whole array")
    return 4.0 * floats / seconds / 1e9


def last_level_bytes() -> int:
    """Return the size of the largest cache of the first core."""
    units = {"K": 1 << 10, "M": 1 << 20}
    return max(int(size[:-1]) * units[size[-1]] for size in _caches().values())


def _best(run: Callable[[], object], repeat: int) -> float:
    run()
    times = []
    for _ in range(repeat):
        start = perf_counter()
        run()
        times.append(perf_counter() - start)
    return min(times)


def _compile(function: Any, target: Target) -> Any:
    return tvm.compile(tvm.IRModule({"main": function}), target=to_tvm(target))["main"]


def _kernel(size: int, threads: int, width: int, body: Callable[[Any, Any, Any], Any]) -> Any:
    """Return a kernel from ``size`` floats to ``width`` floats per thread: ``body(thread, source, destination)``."""
    source = te.placeholder((size,), "float32", "source")
    result = te.compute((threads, width), lambda t, i: source[i], "result")
    function = te.create_prim_func([source, result])
    read, written = function.params
    flat = tvm.tirx.decl_buffer([index(threads * width)], "float32", "flat", data=written.data)
    declare = tvm.tirx.DeclBuffer(flat, data=written.data)
    return function.with_body(sequence(declare, loop("t", threads, lambda t: body(t, read, flat), "parallel")))


def _multiply_adds(threads: int, lanes: int) -> Any:
    """Return the peak kernel: CHAINS vectors, each multiplied and added to STEPS times."""

    def body(thread: Any, source: Any, result: Any) -> Any:
        chains, allocate = scratch("chains", CHAINS * lanes, "float32")

        def each(make: Callable[[Any, Any], Any]) -> Any:
            rows = [
                loop("lane", lanes, lambda lane, i=i: make(i * lanes + lane, lane), "vectorized") for i in range(CHAINS)
            ]
            return sequence(*rows)

        start = each(lambda at, lane: store(chains, at, load(source, lane)))
        step = each(lambda at, lane: store(chains, at, load(chains, at) * load(source, lane) + load(source, lane)))
        end = each(lambda at, lane: store(result, thread * (CHAINS * lanes) + at, load(chains, at)))
        return sequence(allocate, start, loop("step", STEPS, lambda _: step), end)

    return _kernel(lanes, threads, CHAINS * lanes, body)


def _sum(threads: int, lanes: int, floats: int) -> Any:
    """Return the bandwidth kernel: each thread adds up its part of ``floats`` numbers in SUMS vectors."""
    block = SUMS * lanes
    steps = floats // threads // block

    def body(thread: Any, source: Any, result: Any) -> Any:
        sums, allocate = scratch("sums", block, "float32")

        def each(make: Callable[[Any], Any]) -> Any:
            rows = [loop("lane", lanes, lambda lane, i=i: make(i * lanes + lane), "vectorized") for i in range(SUMS)]
            return sequence(*rows)

        zero = tvm.tirx.const(0.0, "float32")
        start = each(lambda at: store(sums, at, zero))
        begin = thread * (steps * block)

        def step(s: Any) -> Any:
            return each(lambda at: store(sums, at, load(sums, at) + load(source, begin + s * block + at)))

        end = each(lambda at: store(result, thread * block + at, load(sums, at)))
        return sequence(allocate, start, loop("step", steps, step), end)

    return _kernel(floats, threads, block, body)


if __name__ == "__main__":
    print(describe())
    for count in range(1, len(os.sched_getaffinity(0)) + 1):
        limits = measure(count)
        print(f"{count} thread(s): {limits.gflops:.1f} GFLOP/s, {limits.bandwidth:.1f} GB/s")
