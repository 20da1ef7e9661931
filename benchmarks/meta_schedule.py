"""Our search beside TVM's meta_schedule on the same kernels, with the same wall-clock budget for each.

    python benchmarks/meta_schedule.py [--seconds 120] [--only REGEX]

Both search alone on the machine, one after the other, with all cores for a kernel. What they found is then timed in one
process, in turns. For meta_schedule the kernel is the plain definition, channels last with filters [h, w, in, out], all
its own rules and cost model (`pip install xgboost-cpu`); for us it is the kernel as a model of that one node holds it,
filters packed, the turning of images left out. Also told: after how many seconds our search was as fast as the best
that meta_schedule ever found. Lines of JSON go to build/autotuning/meta_schedule.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import tempfile
import time
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

from optc import driver
from optc.autotune import log
from optc.autotune.machine import machine_of
from optc.autotune.place import Here
from optc.autotune.pool import Pool, Settings
from optc.autotune.record import OK
from optc.autotune.tasks import Task, extract
from optc.autotune.tuner import Budget, Tuner
from optc.backends.cpu.target import to_tvm
from optc.backends.kernels.decisions import deciding
from optc.backends.kernels.schedule import schedule_kernel
from optc.passes import pipeline
from optc.runtime.cpu import default_threads
from optc.source import capture
from optc.timing import alternate

OUTPUT = Path(__file__).resolve().parent.parent / "build" / "autotuning" / "meta_schedule.jsonl"
COMPARE_SECONDS = 6.0


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


class _TimeIsUpError(Exception):
    pass


@derived_object
class _Watch(meta_schedule.measure_callback.PyMeasureCallback):
    """Notes when meta_schedule found what, and ends it when its time is up."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.start, self.seconds = time.monotonic(), seconds
        self.curve: list[tuple[float, float]] = []
        self.trials = 0

    def apply(self, scheduler: Any, task: int, candidates: Any, builds: Any, runs: Any) -> None:
        elapsed = time.monotonic() - self.start
        self.trials += len(runs)
        for run in runs:
            if run.run_secs:
                self.curve.append((elapsed, float(np.median([float(s) for s in run.run_secs]))))
        if elapsed > self.seconds:
            raise _TimeIsUpError


def theirs(case: Gemm | Conv, target: Any, seconds: float) -> tuple[Any, _Watch]:
    """Return the kernel that meta_schedule finds within ``seconds``, None for none, and what it did."""
    function, watch = case.plain(), _Watch(seconds)
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(Exception):  # the watch ends it; TVM wraps what it raises
            meta_schedule.tir_integration.tune_tir(
                function,
                target,
                folder,
                max_trials_global=100_000,
                num_trials_per_iter=16,
                measure_callbacks=[*meta_schedule.measure_callback.MeasureCallback.create("default"), watch],
            )
        database = meta_schedule.database.JSONDatabase(work_dir=folder)
        schedule = meta_schedule.tir_integration.compile_tir(database, function, target)
        return None if schedule is None else tvm.compile(schedule.mod, target=target)["main"], watch


def ours(case: Gemm | Conv, seconds: float) -> tuple[Task, dict[str, int], int, list[tuple[float, float]], int]:
    """Return the task, the variant and decisions of the best candidate, and (elapsed, ratio to untuned) over time."""
    target = driver.resolve_target("cpu")
    start = time.monotonic()
    model = capture(case.onnx())
    pipeline.run(model)
    task = max(extract(model, target), key=lambda t: t.operations)
    task.share = 1.0
    machine = machine_of(target, default_threads())
    with tempfile.TemporaryDirectory() as folder, Pool(Settings("cpu", default_threads()), default_threads()) as pool:
        path = Path(folder) / "log.jsonl"
        tuner = Tuner([task], machine, pool, path, Path(folder), Budget(seconds - (time.monotonic() - start)))
        tuner.run()
        best = tuner.searches[0].best
        offset = tuner.start - start
        curve = [(elapsed + offset, predicted) for elapsed, _, predicted in tuner.curve]
        assert all(r.state == OK for r in log.read(path).records if r.seconds)
    return task, best.candidate.given, best.candidate.variant, curve, tuner.trials


def compare(case: Gemm | Conv, seconds: float) -> dict[str, Any]:
    """Search with both, then time what they found, and our untuned kernel, in turns."""
    target = driver.resolve_target("cpu")
    tvm_target = tvm.target.Target({**to_tvm(target).export(), "num-cores": default_threads()})
    kernel, watch = theirs(case, tvm_target, seconds)
    task, decisions, number, curve, trials = ours(case, seconds)
    place = Here(target)
    generator = np.random.default_rng(0)

    def call(function: Any, prim_func: Any) -> Any:
        shapes = [([int(d) for d in p.ty.shape], str(p.ty.dtype)) for p in prim_func.params]
        tensors = [place.tensor(generator.standard_normal(shape).astype(dtype)) for shape, dtype in shapes]
        return lambda: function(*tensors)

    def scheduled(variant: Any, given: dict[str, int]) -> Any:
        with deciding(given):
            return call(place.build(schedule_kernel(variant.function, target)[0]), variant.function)

    runs = {"untuned": scheduled(task.variants[0], {}), "tuned": scheduled(task.variants[number], decisions)}
    if kernel is not None:
        runs["meta_schedule"] = call(kernel, case.plain())
    times = {t.name: t.median for t in alternate(runs, seconds=COMPARE_SECONDS)}
    row = {"kernel": case.name, "seconds": seconds, "trials": {"ours": trials, "meta_schedule": watch.trials}, **times}
    if kernel is not None:
        reached = [e for e, ratio in curve if ratio * times["untuned"] <= times["meta_schedule"]]
        best = min(s for _, s in watch.curve)
        found = next(e for e, s in watch.curve if s <= 1.01 * best)
        row |= {
            "ratio": times["meta_schedule"] / times["tuned"],
            "meta_schedule_found_after": found,
            "ours_as_fast_after": reached[0] if reached else None,
            "gflops": {name: case.operations / ms / 1e6 for name, ms in times.items()},
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="for each search")
    parser.add_argument("--only", default="", help="a regular expression for names")
    options = parser.parse_args()
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        if re.search(options.only, case.name):
            row = compare(case, options.seconds)
            print(json.dumps(row), flush=True)
            with OUTPUT.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
