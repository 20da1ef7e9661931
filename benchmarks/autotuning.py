"""What tuning gives: models against their untuned artifacts, transfer to other sizes, compile times with a log.

    python benchmarks/autotuning.py tune NAME [--time 10m]    tunes into build/autotuning/NAME.jsonl; goes on from there
    python benchmarks/autotuning.py compare NAME              untuned and tuned artifact, alternating, and the transfer
    python benchmarks/autotuning.py compile NAME              compile times without and with the log, alternating

NAME is one of resnet50, mobilenetv2, bert_6, det. Each part prints lines of JSON. Tuning may be cut into pieces: each
run resumes from the log.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

import optc
from optc.sample import random_inputs
from optc.timing import alternate
from optc.tuning import Tuning

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / ".cache" / "models"
FOLDER = ROOT / "build" / "autotuning"
SECONDS = 12.0
REPEATS = 3

CASES: dict[str, dict[str, Any]] = {
    "resnet50": {
        "file": "exported/resnet50.onnx",
        "other": ("exported/resnet50_dynamic.onnx", {"pixel_values": [4, 3, 224, 224]}),
    },
    "mobilenetv2": {
        "file": "exported/mobilenetv2.onnx",
        "other": ("exported/mobilenetv2_dynamic.onnx", {"pixel_values": [4, 3, 224, 224]}),
    },
    "bert_6": {"file": "exported/bert_6.onnx"},
    "det": {
        "file": "ppocr/det.onnx",
        "input_shapes": {"x": [1, 3, 640, 640]},
        "other": ("ppocr/det.onnx", {"x": [1, 3, 480, 640]}),
    },
}
"""Models with the sizes they are tuned for, and a file and sizes that the log is carried over to."""


def compare(file: Path, shapes: dict[str, list[int]], log: Path) -> dict[str, Any]:
    """Return the times of untuned and tuned artifact in milliseconds, their ratio, and the coverage."""
    artifacts = {
        name: optc.compile(str(file), input_shapes=shapes, verify=False, tuning=tuning)
        for name, tuning in (("untuned", None), ("tuned", Tuning(log)))
    }
    models = {name: artifact.model() for name, artifact in artifacts.items()}
    inputs = random_inputs(models["untuned"].inputs)
    outputs = {name: list(model.run(inputs).values()) for name, model in models.items()}
    error = max(
        float(np.abs(a.astype(np.float64) - b).max() / max(np.abs(a).max(), 1e-30))
        for a, b in zip(outputs["untuned"], outputs["tuned"], strict=True)
    )
    runs = {name: (lambda model=model: model.run(inputs)) for name, model in models.items()}
    times = {t.name: t.median for t in alternate(runs, seconds=SECONDS)}
    coverage = {k: artifacts["tuned"].report["tuning"][k] for k in ("kernels", "exact", "nearest", "analytic")}
    return {**times, "ratio": times["untuned"] / times["tuned"], "error": error, "coverage": coverage}


def compile_times(file: Path, shapes: dict[str, list[int]], log: Path) -> dict[str, Any]:
    """Return the seconds of compiling without and with the log, alternating, and their ratio."""
    samples: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(REPEATS):
        for name, tuning in (("without", None), ("with", Tuning(log))):
            start = perf_counter()
            optc.compile(str(file), input_shapes=shapes, verify=False, tuning=tuning)
            samples[name].append(perf_counter() - start)
    times = {name: median(values) for name, values in samples.items()}
    return {**times, "ratio": times["with"] / times["without"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["tune", "compare", "compile"])
    parser.add_argument("name", choices=CASES)
    parser.add_argument("--time", default="10m", help="for tuning")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    case, log = CASES[options.name], FOLDER / f"{options.name}.jsonl"
    file, shapes = MODELS / case["file"], case.get("input_shapes", {})
    if options.part == "tune":
        arguments = [f"--input-shape={name}:{','.join(map(str, shape))}" for name, shape in shapes.items()]
        plot = FOLDER / f"{options.name}.svg"
        command = [sys.executable, "-m", "optc", "tune", str(file), "--log", str(log), "--time", options.time]
        subprocess.run([*command, "--plot", str(plot), *arguments], check=True)
    elif options.part == "compile":
        print(json.dumps({"name": options.name, **compile_times(file, shapes, log)}))
    else:
        print(json.dumps({"name": options.name, **compare(file, shapes, log)}))
        if "other" in case:
            other, sizes = case["other"]
            print(json.dumps({"name": f"{options.name}, other sizes", **compare(MODELS / other, sizes, log)}))


if __name__ == "__main__":
    main()
