"""Our search beside TVM's meta_schedule on the same kernels, with the same wall-clock budget for each.

    python benchmarks/meta_schedule.py search [--seconds 60] [--side ours|meta_schedule] [--only REGEX]
    python benchmarks/meta_schedule.py compare [--only REGEX]                   time what they found, in turns
    python benchmarks/meta_schedule.py report                                   print the table of docs/autotuning.md

Both search one after the other, with all cores for a kernel; time in which the process is stopped does not count. What
they found is kept as libraries in build/autotuning/meta_schedule/, so that only the comparison, seconds a kernel, needs
the machine for itself. For meta_schedule the kernel is the plain definition, channels last, filters [h, w, in, out],
all its own rules and cost model (`pip install xgboost-cpu`); for us it is the kernel as a model of that one node holds
it, filters packed, the turning of images left out. Also told: after how many seconds, the extraction of the task
included, our search was as fast as the best that meta_schedule ever found.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import multiprocessing.pool
import os
import re
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper
import tvm
from tvm import te, tirx
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule
from tvm.s_tir.meta_schedule.builder import local_builder

from optc import driver
from optc.autotune import log
from optc.autotune.evolution import target_of
from optc.autotune.machine import machine_of
from optc.autotune.pool import Pool, Settings
from optc.autotune.record import OK
from optc.autotune.tasks import extract
from optc.autotune.tuner import Budget, Tuner
from optc.backends.cpu.single import aligned, compile_library
from optc.backends.cpu.target import to_tvm
from optc.backends.kernels.decisions import deciding
from optc.backends.kernels.schedule import schedule_kernel
from optc.passes import pipeline
from optc.runtime.cpu import default_threads
from optc.source import capture
from optc.timing import alternate

FOLDER = Path(__file__).resolve().parent.parent / "build" / "autotuning" / "meta_schedule"
COMPARE_SECONDS = 6.0
SIDES = ("ours", "meta_schedule")


@dataclass(frozen=True)
class Gemm:
    """``[m, k] x [k, n]``."""

    m: int
    k: int
    n: int

    @property
    def name(self) -> str:
        return f"gemm {self.m}x{self.k}x{self.n}"

    @property
    def operations(self) -> int:
        return 2 * self.m * self.k * self.n

    def onnx(self) -> onnx.ModelProto:
        return _model("MatMul", [self.m, self.k], [self.k, self.n], [self.m, self.n])

    def plain(self) -> Any:
        a = te.placeholder((self.m, self.k), "float32", "a")
        b = te.placeholder((self.k, self.n), "float32", "b")
        r = te.reduce_axis((0, self.k), "r")
        c = te.compute((self.m, self.n), lambda i, j: te.sum(a[i, r] * b[r, j], r), "c")
        return te.create_prim_func([a, b, c])


@dataclass(frozen=True)
class Conv:
    """A convolution without padding left out: ``size`` is the input's, ``depthwise`` has one filter a channel."""

    channels: int
    maps: int
    size: int
    kernel: int
    stride: int = 1
    depthwise: bool = False

    @property
    def name(self) -> str:
        kind = "depthwise" if self.depthwise else "conv"
        return f"{kind} {self.kernel}x{self.kernel}/{self.stride} {self.channels}->{self.maps} @{self.size}"

    @property
    def out(self) -> int:
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    @property
    def depth(self) -> int:
        return 1 if self.depthwise else self.channels

    @property
    def operations(self) -> int:
        return 2 * self.out**2 * self.maps * self.depth * self.kernel**2

    def onnx(self) -> onnx.ModelProto:
        return _model(
            "Conv",
            [1, self.channels, self.size, self.size],
            [self.maps, self.depth, self.kernel, self.kernel],
            [1, self.maps, self.out, self.out],
            pads=[self.kernel // 2] * 4,
            strides=[self.stride] * 2,
            group=self.channels if self.depthwise else 1,
        )

    def plain(self) -> Any:
        pad, k, s = self.kernel // 2, self.kernel, self.stride
        x = te.placeholder((self.size, self.size, self.channels), "float32", "x")
        w = te.placeholder((k, k, self.depth, self.maps), "float32", "w")
        padded = te.compute(
            (self.size + 2 * pad, self.size + 2 * pad, self.channels),
            lambda i, j, c: tirx.if_then_else(
                tirx.all(i >= pad, i < self.size + pad, j >= pad, j < self.size + pad), x[i - pad, j - pad, c], 0.0
            ),
            "padded",
        )
        a, b, c = te.reduce_axis((0, k), "a"), te.reduce_axis((0, k), "b"), te.reduce_axis((0, self.depth), "c")

        def element(i: Any, j: Any, o: Any) -> Any:
            channel = o if self.depthwise else c
            return te.sum(padded[i * s + a, j * s + b, channel] * w[a, b, c, o], [a, b, c])

        return te.create_prim_func([x, w, te.compute((self.out, self.out, self.maps), element, "y")])


CASES = (
    Gemm(128, 768, 768),
    Gemm(128, 768, 3072),
    Gemm(128, 3072, 768),
    Conv(256, 64, 56, 1),
    Conv(512, 128, 28, 1),
    Conv(1024, 256, 14, 1),
    Conv(64, 64, 56, 3),
    Conv(128, 128, 28, 3),
    Conv(3, 64, 224, 7, 2),
    Conv(144, 144, 56, 3, 1, depthwise=True),
)


def _model(operator: str, x: list[int], w: list[int], y: list[int], **attributes: Any) -> onnx.ModelProto:
    weights = np.random.default_rng(0).standard_normal(w).astype(np.float32)
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(operator, ["x", "w"], ["y"], **attributes)],
        "one",
        [tensor("x", onnx.TensorProto.FLOAT, x)],
        [tensor("y", onnx.TensorProto.FLOAT, y)],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)


class Clock(threading.Thread):
    """Counts the seconds that this process ran for: not those in which something stopped it, and its children."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seconds = 0.0
        self.start()

    def __call__(self) -> float:
        return self.seconds

    def run(self) -> None:
        last = time.monotonic()
        while True:
            time.sleep(0.05)
            now = time.monotonic()
            self.seconds, last = self.seconds + min(now - last, 0.5), now


class _TimeIsUpError(Exception):
    pass


@derived_object
class _Watch(meta_schedule.measure_callback.PyMeasureCallback):
    """Notes when meta_schedule found what, and ends it when its time is up."""

    def __init__(self, seconds: float, clock: Clock) -> None:
        super().__init__()
        self.clock, self.start, self.seconds = clock, clock(), seconds
        self.curve: list[tuple[float, float]] = []
        self.trials = 0

    def apply(self, scheduler: Any, task: int, candidates: Any, builds: Any, runs: Any) -> None:
        elapsed = self.clock() - self.start
        self.trials += len(runs)
        for run in runs:
            if run.run_secs:
                self.curve.append((elapsed, float(np.median([float(s) for s in run.run_secs]))))
        if elapsed > self.seconds:
            raise _TimeIsUpError


_BUILDING: list[Any] = []
"""What the processes of ``_Forked`` inherit: a module cannot be sent to them without being printed and parsed."""
BUILD_SECONDS = 30.0
"""For a candidate; TVM's own limit."""


@derived_object
class _Forked(meta_schedule.builder.PyBuilder):
    """Builds in forked processes, which have the candidates already; TVM's own start anew and parse them.

    For the kernels of this benchmark TVM's needs minutes for what takes this one seconds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.processes = default_threads()

    def build(self, build_inputs: list[Any]) -> list[Any]:
        _BUILDING[:] = build_inputs
        with multiprocessing.get_context("fork").Pool(self.processes) as pool:
            asked = [pool.apply_async(_build, (i,)) for i in range(len(build_inputs))]
            return [meta_schedule.builder.BuilderResult(*_answer(a)) for a in asked]


def _build(number: int) -> str:
    asked = _BUILDING[number]
    return str(local_builder.default_export(local_builder.default_build(asked.mod, asked.target, None)))


def _answer(asked: multiprocessing.pool.AsyncResult[str]) -> tuple[str | None, str | None]:
    try:
        return asked.get(BUILD_SECONDS), None
    except Exception as error:  # whatever a candidate fails with costs only that candidate
        return None, f"{type(error).__name__}: {error}"


def slug(case: Gemm | Conv) -> str:
    """Return the case's name as that of files."""
    return re.sub(r"[^a-z0-9]+", "-", case.name)


def without_gpus() -> None:
    """Leave out the instructions of GPUs, which TVM parses most of a minute in each process."""
    for kind in ("cuda", "hexagon", "metal", "rocm"):
        sys.modules[f"tvm.s_tir.tensor_intrin.{kind}"] = types.ModuleType(kind)


def theirs(case: Gemm | Conv, target: Any, seconds: float, clock: Clock, library: Path) -> _Watch:
    """Write the kernel that meta_schedule finds within ``seconds``, none for none, and return what it did."""
    library.unlink(missing_ok=True)
    without_gpus()
    function, runner = case.plain(), meta_schedule.runner.LocalRunner()
    meta_schedule.cost_model.XGBModel()  # without xgboost it raises here, not where the watch's end is expected
    watch = _Watch(seconds, clock)  # the start of their worker processes does not count
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(Exception):  # the watch ends it; TVM wraps what it raises
            meta_schedule.tir_integration.tune_tir(
                function,
                target,
                folder,
                max_trials_global=100_000,
                num_trials_per_iter=16,
                builder=_Forked(),
                runner=runner,
                measure_callbacks=[*meta_schedule.measure_callback.MeasureCallback.create("default"), watch],
            )
        database = meta_schedule.database.JSONDatabase(work_dir=folder)
        schedule = meta_schedule.tir_integration.compile_tir(database, function, target)
        if schedule is not None:
            tvm.compile(schedule.mod, target=target).export_library(str(library))
    return watch


def ours(case: Gemm | Conv, seconds: float, clock: Clock, folder: Path) -> dict[str, Any]:
    """Write the untuned kernel and the best that our search finds; return (elapsed, ratio to untuned) over time."""
    target = driver.resolve_target("cpu")
    start = clock()
    model = capture(case.onnx())
    pipeline.run(model)
    task = max(extract(model, target), key=lambda t: t.operations)
    task.share = 1.0
    machine = machine_of(target, default_threads())
    with (
        tempfile.TemporaryDirectory() as temporary,
        Pool(Settings("cpu", default_threads()), default_threads()) as pool,
    ):
        path = Path(temporary) / "log.jsonl"
        tuner = Tuner([task], machine, pool, path, Path(temporary), Budget(seconds - (clock() - start)))
        tuner.clock, tuner.start = clock, clock()
        tuner.run()
        best = tuner.searches[0].best
        offset = tuner.start - start
        curve = [(elapsed + offset, predicted) for elapsed, _, predicted in tuner.curve]
        assert all(r.state == OK for r in log.read(path).records if r.seconds)
    arguments = {}
    variants = {"untuned": (0, {}), "tuned": (best.candidate.variant, best.candidate.given)}
    for name, (number, given) in variants.items():
        function = task.variants[number].function
        with deciding(given):
            scheduled, _, _ = schedule_kernel(function, target)
        (folder / f"{name}.so").write_bytes(compile_library(scheduled, target))
        arguments[name] = _arguments(function)
    return {"arguments": arguments, "curve": curve, "trials": tuner.trials, "decisions": best.candidate.given}


def _arguments(function: Any) -> list[tuple[list[int], str]]:
    return [([int(d) for d in p.ty.shape], str(p.ty.dtype)) for p in function.params]


def search(case: Gemm | Conv, seconds: float, side: str) -> None:
    """Search with one of both and keep what it found."""
    folder, clock = FOLDER / slug(case), Clock()
    folder.mkdir(parents=True, exist_ok=True)
    if side == "ours":
        found = ours(case, seconds, clock, folder)
    else:
        target = target_of(to_tvm(driver.resolve_target("cpu")), default_threads())
        watch = theirs(case, target, seconds, clock, folder / "meta_schedule.so")
        arguments = {"meta_schedule": _arguments(case.plain())}
        found = {"arguments": arguments, "curve": watch.curve, "trials": watch.trials}
    (folder / f"{side}.json").write_text(json.dumps(found | {"seconds": seconds}))


def compare(case: Gemm | Conv) -> dict[str, Any]:
    """Time what both found, and our untuned kernel, in turns."""
    folder = FOLDER / slug(case)
    found, other = (json.loads((folder / f"{side}.json").read_text()) for side in SIDES)
    arguments = found["arguments"] | other["arguments"]
    generator = np.random.default_rng(0)

    def call(name: str) -> Any:
        function = tvm.runtime.load_module(str(folder / f"{name}.so"))["main"]
        shapes = arguments[name]
        tensors = [aligned(generator.standard_normal(shape).astype(dtype)) for shape, dtype in shapes]
        return lambda: function(*tensors)

    names = [name for name in arguments if (folder / f"{name}.so").is_file()]
    times = {t.name: t.median for t in alternate({name: call(name) for name in names}, seconds=COMPARE_SECONDS)}
    row = {
        "kernel": case.name,
        "seconds": found["seconds"],
        "decisions": found["decisions"],
        "trials": {"ours": found["trials"], "meta_schedule": other["trials"]},
        "ms": times,
        "gflops": {name: case.operations / ms / 1e6 for name, ms in times.items()},
    }
    if "meta_schedule" in times:
        reached = [e for e, ratio in found["curve"] if ratio * times["untuned"] <= times["meta_schedule"]]
        best = min(s for _, s in other["curve"])
        row |= {
            "ratio": times["meta_schedule"] / times["tuned"],
            "meta_schedule_found_after": next(e for e, s in other["curve"] if s <= 1.01 * best),
            "ours_as_fast_after": reached[0] if reached else None,
        }
    (folder / "compare.json").write_text(json.dumps(row))
    return row


def table(cases: Iterable[Gemm | Conv]) -> str:
    """Return the table of what was compared."""
    lines = [
        "| kernel | trials: meta_schedule, ours | GFLOP/s: meta_schedule | untuned | tuned | ratio "
        "| meta_schedule's best after | ours as fast after |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        if not (FOLDER / slug(case) / "compare.json").is_file():
            continue
        row = json.loads((FOLDER / slug(case) / "compare.json").read_text())
        speed, trials = row["gflops"], row["trials"]
        cells = [row["kernel"], f"{trials['meta_schedule']}, {trials['ours']}"]
        cells += [
            f"{speed[name]:.0f}" if name in speed else "nothing" for name in ("meta_schedule", "untuned", "tuned")
        ]
        cells += [f"{row[key]:.{digits}f}{unit}" if row.get(key) else "-" for key, digits, unit in _TOLD]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


_TOLD = (("ratio", 2, ""), ("meta_schedule_found_after", 0, " s"), ("ours_as_fast_after", 1, " s"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["search", "compare", "report"])
    parser.add_argument("--seconds", type=float, default=60.0, help="for each search")
    parser.add_argument("--side", choices=SIDES, help="search with one of both")
    parser.add_argument("--only", default="", help="a regular expression for names")
    options = parser.parse_args()
    # TVM takes half of the cores that it sees; its processes inherit this.
    os.environ["TVM_NUM_THREADS"] = str(default_threads())
    chosen = [case for case in CASES if re.search(options.only, case.name)]
    if options.part == "report":
        print(table(chosen))
        return
    for case in chosen:
        if options.part == "search":
            for side in [options.side] if options.side else SIDES:
                search(case, options.seconds, side)
        else:
            print(json.dumps(compare(case)), flush=True)


if __name__ == "__main__":
    main()
