"""Time, memory and compile time of real models, side by side with other programs.

    python benchmarks/performance.py [--only REGEX] [--seconds 6] [--threads 1,2] [--no-slow-peers] [--no-write]
        [--page NAME]

Each model runs in a process of its own, where the contestants take turns. The measurements are kept in
build/performance/ and merged, so a run may cover a part of the models. Writes docs/NAME.md, .json and .svg; NAME is
performance unless --page says so.

    --prepare    only compile the models, --prepared measures them afterwards: no compiler runs in between
    --report     only write the page from the measurements that are there
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import cases
import contestants
import machine
import numpy as np
import report

FOLDER = cases.ROOT / "build" / "performance"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def prepare(name: str) -> None:
    """Compile a model into FOLDER, in a process that has compiled nothing before."""
    import optc
    from optc.driver import Trace

    case, trace = cases.CASES[name], Trace()
    with tempfile.TemporaryDirectory() as folder:
        file = cases.fixed_file(case, Path(folder))
        start = perf_counter()
        artifact = optc.compile(file, trace=trace, verify=False)
        artifact.save(FOLDER / f"{slug(name)}.optc")
        seconds = perf_counter() - start
    found = {"compile": seconds, "stages": trace.seconds, "memory_report": artifact.report.get("memory", {})}
    (FOLDER / f"{slug(name)}.compile.json").write_text(json.dumps(found))


def measure(name: str, seconds: float, threads: list[int], slow: bool) -> dict[str, Any]:
    """Measure one model that is compiled already."""
    import optc

    case = cases.CASES[name]
    artifact = FOLDER / f"{slug(name)}.optc"
    model = optc.load(artifact)
    with tempfile.TemporaryDirectory() as folder:
        file = cases.fixed_file(case, Path(folder))
        original = optc.capture(file)
        inputs = cases.make_inputs(case, original)
        result: dict[str, Any] = {
            **json.loads((FOLDER / f"{slug(name)}.compile.json").read_text()),
            "kind": cases.kind(case),
            "flops": operations(file, case),
            "weights": sum(w.nbytes for w in model.manifest.weights),
            "activations": model.manifest.memory.get("activations"),
            "peak_memory": peak_memory(artifact, file, inputs),
            "times": {},
            "missing": {},
        }
        for count in threads:
            model.threads = count
            times, result["missing"][str(count)] = side_by_side(case, file, model, inputs, count, seconds, slow, result)
            result["times"][str(count)] = times
        if slow:
            outcome = tvm_alone(file, inputs)
            if isinstance(outcome, str):
                result["missing"]["1"]["tvm"] = outcome
            else:
                result["times"]["1"]["tvm"] = outcome
    return result


def operations(file: Path, case: cases.Case) -> int | None:
    """Return the operations that the graph asks for at the case's sizes, None if data decides some sizes."""
    import optc
    from optc.errors import IRError
    from optc.ir import cost

    sized = optc.capture(file, input_shapes=case.shapes if case.any_size else None)
    try:
        return cost.totals(cost.estimate(sized)).at({}).flops
    except IRError:
        return None


def side_by_side(
    case: cases.Case,
    file: Path,
    model: Any,
    inputs: dict[str, np.ndarray],
    threads: int,
    seconds: float,
    slow: bool,
    result: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the times of the contestants, and why others have none."""
    from optc.timing import alternate

    running = {"optc": lambda: model.run(inputs)}
    missing: dict[str, str] = {}
    expected = list(model.run(inputs).values())
    for name, opener in openers(case, file, threads, slow).items():
        if isinstance(opener, str):
            missing[name] = opener
            continue
        try:
            run = opener()
            found = run(inputs)
        except Exception as error:  # other programs raise errors of every kind for what they cannot run
            missing[name] = reason(error)
            continue
        result.setdefault("differences", {})[name] = difference(found, expected)
        running[name] = lambda run=run: run(inputs)
    timings = alternate(running, seconds=seconds)
    return {t.name: {k: v for k, v in t.describe().items() if k != "name"} for t in timings}, missing


def openers(case: cases.Case, file: Path, threads: int, slow: bool) -> dict[str, Any]:
    """Return a function that opens each contestant, or the reason why it is left out."""
    peers: dict[str, Any] = {
        "onnxruntime": lambda: contestants.onnxruntime(file, threads),
        "openvino": lambda: contestants.openvino(file, threads),
    }
    if not case.module:
        return peers | dict.fromkeys(("torch", "torch.compile"), "no PyTorch module")
    peers["torch"] = lambda: contestants.torch_eager(cases.torch_module(case), threads)
    compiled = lambda: contestants.torch_compiled(cases.torch_module(case), threads)  # noqa: E731
    return peers | {"torch.compile": compiled if slow else "not run"}


def reason(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"fails: {text[:200]}"


def difference(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Return the largest difference over the output's largest magnitude, of the worst output."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        scale = float(np.abs(b).max(initial=0.0)) or 1.0
        worst = max(worst, float(np.abs(np.asarray(a, np.float64) - b).max(initial=0.0)) / scale)
    return worst


def tvm_alone(file: Path, inputs: dict[str, np.ndarray], limit: float = 300.0) -> dict[str, Any] | str:
    """Time TVM's default pipeline in a process of its own: it is slow, and may crash."""
    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder) / "inputs.npz"
        np.savez(arrays, **inputs)
        command = [sys.executable, __file__, "--tvm", str(file), str(arrays)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            return f"fails: not done in {limit:.0f} s"
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        return f"fails: {lines[-1][:200] if lines else f'exit code {done.returncode}'}"
    return dict(json.loads(done.stdout.splitlines()[-1]))


def time_tvm(file: Path, arrays: Path) -> None:
    inputs = dict(np.load(arrays))
    run = contestants.plain_tvm(file, inputs)
    run(inputs)
    samples: list[float] = []
    while len(samples) < 3 or (sum(samples) < 2e3 and len(samples) < 20):
        start = perf_counter()
        run(inputs)
        samples.append((perf_counter() - start) * 1e3)
    print(json.dumps({"median_ms": float(np.median(samples)), "runs": len(samples), "alone": True}))


_LOAD_OPTC = "from optc.runtime import load; model = load(sys.argv[1], threads=1); run = lambda: model.run(inputs)"
_LOAD_ONNXRUNTIME = """import onnxruntime
options = onnxruntime.SessionOptions(); options.intra_op_num_threads = 1; options.log_severity_level = 4
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
run = lambda: session.run(None, inputs)"""
_RUN = """
import sys
import numpy
{load}
inputs = dict(numpy.load(sys.argv[2]))
for _ in range(3):
    run()
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


def peak_memory(artifact: Path, file: Path, inputs: dict[str, np.ndarray]) -> dict[str, int | None]:
    """Return the peak resident bytes of processes that load and run the model, and nothing else."""
    found: dict[str, int | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder) / "inputs.npz"
        np.savez(arrays, **inputs)
        for name, load, path in (("optc", _LOAD_OPTC, artifact), ("onnxruntime", _LOAD_ONNXRUNTIME, file)):
            command = [sys.executable, "-c", _RUN.format(load=load), str(path), str(arrays)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            found[name] = None if done.returncode else int(done.stdout) * 1024
    return found


def limits() -> dict[str, Any]:
    counts = range(1, len(os.sched_getaffinity(0)) + 1)
    return {"description": machine.describe(), "limits": {str(c): asdict(machine.measure(c)) for c in counts}}


def child(*arguments: str) -> str | None:
    """Run this program in a process of its own; None, after a message, if it fails."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(f"{' '.join(arguments)} failed", file=sys.stderr)
        return None
    return done.stdout


def load_results() -> dict[str, Any]:
    """Return the measurements so far, in the order of the cases."""
    folder = FOLDER / "results"
    return {
        name: json.loads((folder / f"{slug(name)}.json").read_text())
        for name in cases.CASES
        if (folder / f"{slug(name)}.json").is_file()
    }


def run_all(options: argparse.Namespace) -> bool:
    """Compile and measure the models asked for, each step in a process of its own; False if one of them failed."""
    (FOLDER / "results").mkdir(parents=True, exist_ok=True)
    names = [name for name in cases.CASES if re.search(options.only, name)]
    compiled = [name for name in names if options.prepared or child("--prepare-one", name) is not None]
    if options.prepare:
        return compiled == names
    about = child("--limits")
    if about is None:
        return False
    (FOLDER / "machine.json").write_text(about)
    measured = 0
    for name in compiled:
        arguments = ["--measure-one", name, "--seconds", str(options.seconds), "--threads", options.threads]
        text = child(*arguments, *(["--no-slow-peers"] if options.no_slow_peers else []))
        if text is not None:
            measured += 1
            (FOLDER / "results" / f"{slug(name)}.json").write_text(text.splitlines()[-1])
            report.show(name, json.loads(text.splitlines()[-1]))
    return measured == len(names)


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression on the model's name")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for each comparison")
    parser.add_argument("--threads", default=",".join(dict.fromkeys(("1", str(cores)))), help="thread counts, by comma")
    parser.add_argument("--no-slow-peers", action="store_true", help="leave out torch.compile and plain TVM")
    parser.add_argument("--no-write", action="store_true", help="do not write the page")
    parser.add_argument("--page", default="performance", help="the page's name: one for each kind of machine")
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--prepared", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--report", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--prepare-one", help=argparse.SUPPRESS)
    parser.add_argument("--measure-one", help=argparse.SUPPRESS)
    parser.add_argument("--limits", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--tvm", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare_one:
        prepare(options.prepare_one)
    elif options.measure_one:
        threads = [int(count) for count in options.threads.split(",")]
        print(json.dumps(measure(options.measure_one, options.seconds, threads, not options.no_slow_peers)))
    elif options.limits:
        print(json.dumps(limits()))
    elif options.tvm:
        time_tvm(*options.tvm)
    else:
        complete = options.report or run_all(options)
        results = load_results()
        if results and not options.prepare:
            about = json.loads((FOLDER / "machine.json").read_text())
            report.summarize(about, results)
            if not options.no_write:
                report.write(cases.ROOT / "docs", options.page, about, results)
        if not complete:
            raise SystemExit("some models failed")


if __name__ == "__main__":
    main()
