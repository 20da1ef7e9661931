"""The most that better schedules could give: each kernel's time in the untuned model beside its bound.

    python benchmarks/tuning_bound.py prepare [NAME ...]            compile the models, untuned
    python benchmarks/tuning_bound.py measure [NAME ...] [--threads 2]
    python benchmarks/tuning_bound.py report                        the tables of docs/autotuning.md

A kernel's bound is the longest of three times, which no schedule of it can go below: its multiply-adds (of Winograd's
algorithm those of whole tiles in its transformed domain) at the measured peak; its weights at the bandwidth of
memory, if the model's weights exceed the last-level cache; what else it reads and writes, at the bandwidth of reading
as much again and again. What functions like exp take, a transform's additions, and that writing is slower, is not in
it: the real bound is higher. Of many runs the fastest counts, for kernels and limits alike. What all kernels take
beyond their bounds is the most that better schedules could ever save.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import cases
import machine

import optc
from optc import driver
from optc.autotune.tasks import calls_of
from optc.backends.cpu.build import CpuBackend
from optc.backends.kernels.fused import bits
from optc.backends.kernels.work import work
from optc.backends.kernels.workload import of as workload_of

FOLDER = cases.ROOT / "build" / "autotuning" / "bound"
NAMES = {
    "resnet50": "ResNet-50",
    "mobilenetv2": "MobileNetV2",
    "bert_6": "BERT, 6 layers, 128 tokens",
    "det": "PP-OCRv4 det 640x640",
}
PROFILES = 60
FOOTPRINTS = tuple(1 << power for power in range(17, 27))
"""Bytes that are read again and again where bandwidth is measured."""
SHOWN = 8


@dataclass(frozen=True)
class Demand:
    """What one call of a kernel has to do: floating-point operations, bytes of weights and of activations."""

    operations: int
    weights: int
    activations: int


def demand(function: Any, weights: dict[int, Any]) -> Demand:
    """Return the demand of an unscheduled kernel whose parameters ``weights`` are constants."""
    sizes = [prod(int(d) for d in p.ty.shape) * bits(str(p.ty.dtype)) // 8 for p in function.params]
    constant = sum(size for i, size in enumerate(sizes) if i in weights)
    asked = work(function)
    operations = asked.operations if asked else 0
    if asked is not None and workload_of(function).layout.get("winograd"):
        # The definition sums over spots of the domain, channels, and a tile of the image.
        (spots, channels, size, _), (batch, rows, columns, maps) = asked.summed, asked.outputs
        tiles = batch * -(-rows // (size - 2)) * -(-columns // (size - 2))
        operations = 2 * spots * tiles * channels * maps
    return Demand(operations, constant, sum(sizes) - constant)


def prepare(name: str) -> None:
    """Compile a model and write down what its kernels have to do."""
    case, target = cases.CASES[NAMES[name]], driver.resolve_target("cpu")
    with tempfile.TemporaryDirectory() as folder:
        file = cases.fixed_file(case, Path(folder))
        optc.compile(file, verify=False).save(FOLDER / f"{name}.optc")
        module, lowered = CpuBackend(target).fuse(driver.optimize(file, portable=False))
    calls = calls_of(module, lowered)
    kernels = {str(var.name_hint): function for var, function in module.functions.items()}
    asked = {kernel: asdict(demand(kernels[kernel], call.weights)) for kernel, call in calls.items()}
    (FOLDER / f"{name}.demand.json").write_text(json.dumps(asked))


def measure(name: str, threads: int) -> None:
    """Profile a model and write the time and the bound of each kernel."""
    case, model = cases.CASES[NAMES[name]], optc.load(FOLDER / f"{name}.optc", threads=threads)
    asked = {k: Demand(**v) for k, v in json.loads((FOLDER / f"{name}.demand.json").read_text()).items()}
    with tempfile.TemporaryDirectory() as folder:
        inputs = cases.make_inputs(case, optc.capture(cases.fixed_file(case, Path(folder))))
    limits = machine.measure(threads)
    near = {size: machine.bandwidth(threads, size // 4) for size in FOOTPRINTS}
    cold = sum(w.nbytes for w in model.manifest.weights) > machine.last_level_bytes()
    schedules = {k["name"]: k["schedule"] for k in model.report["kernels"]}
    samples: dict[str, list[float]] = {}
    for _ in range(PROFILES):
        for timed in model.profile(inputs):
            samples.setdefault(timed.name, []).append(timed.seconds)
    calls = {timed.name: timed.calls for timed in model.profile(inputs)}
    rows = []
    for kernel, seconds in samples.items():
        need = asked.get(kernel, Demand(0, 0, 0))
        bound = max(
            need.operations / limits.gflops,
            need.weights / (limits.bandwidth if cold else _bandwidth(near, need.weights)),
            need.activations / _bandwidth(near, need.activations),
        )
        ms, least = min(seconds) * 1e3, bound * calls[kernel] / 1e6
        rows.append({"kernel": kernel, "schedule": schedules.get(kernel, "-"), "ms": ms, "bound": min(least, ms)})
    speeds = {"gflops": limits.gflops, "memory": limits.bandwidth, "near": near}
    (FOLDER / f"{name}.{threads}.json").write_text(json.dumps({"limits": speeds, "kernels": rows}))


def _bandwidth(near: dict[int, float], size: int) -> float:
    """Return the highest bandwidth of footprints from the largest that is not above ``size`` on."""
    first = max((footprint for footprint in near if footprint <= size), default=min(near))
    return max(speed for footprint, speed in near.items() if footprint >= first)


def report(threads: int) -> str:
    """Return a table of the models, and one of the kernels that are farthest from their bounds."""
    lines = ["| model | ms | bound | beyond it | by template |", "|---|---|---|---|---|"]
    worst = [
        "| model | kernel | schedule | ms | bound | share of the model's time beyond it |",
        "|---|---|---|---|---|---|",
    ]
    for name, title in NAMES.items():
        rows = json.loads((FOLDER / f"{name}.{threads}.json").read_text())["kernels"]
        whole = sum(r["ms"] for r in rows)
        gaps = {r["kernel"]: (r["ms"] - r["bound"]) / whole for r in rows}
        groups: dict[str, float] = {}
        for row in rows:
            groups[row["schedule"]] = groups.get(row["schedule"], 0.0) + gaps[row["kernel"]]
        parts = ", ".join(f"{k} {v:.1%}" for k, v in sorted(groups.items(), key=lambda g: -g[1]) if v >= 0.001)
        bound = sum(r["bound"] for r in rows)
        lines.append(f"| {title} | {whole:.2f} | {bound:.2f} | {1 - bound / whole:.1%} | {parts} |")
        for row in sorted(rows, key=lambda r: -gaps[r["kernel"]])[:SHOWN]:
            cells = [title, f"`{row['kernel']}`", row["schedule"], f"{row['ms']:.3f}", f"{row['bound']:.3f}"]
            cells.append(f"{gaps[row['kernel']]:.1%}")
            worst.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *worst])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["prepare", "measure", "report"])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if options.part == "report":
        print(report(options.threads))
        return
    for name in options.names or NAMES:
        if options.part == "prepare":
            prepare(name)
        else:
            measure(name, options.threads)


if __name__ == "__main__":
    main()
