"""Speed of models that optc's own quantizer makes: int8 beside float32, and beside other programs on the same file.

    python benchmarks/compression_speed.py --prepare [--only REGEX]    quantize and compile (minutes for each model)
    python benchmarks/compression_speed.py [--only REGEX]              time what was prepared; rewrites its rows

Layers stay in float32 that are no faster in int8 by themselves, as with --only-paying. One thread, all contestants
alternating in one process. Float32 artifacts are those of performance.py where it has
prepared them. onnxruntime and OpenVINO get the quantized ONNX file. Writes its table into docs/compression.md.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cases
import compression_data as texts
import contestants
import numpy as np
import performance
from compression import FOLDER, PAGE, tokens

import optc
from optc.compression import data
from optc.compression.options import Options
from optc.compression.quantize import Quantizer
from optc.driver import specs
from optc.ir import serialize
from optc.timing import alternate

NAMES = (
    "PP-OCRv4 rec 48x320", "PP-OCRv4 det 640x640", "ResNet-50", "MobileNetV2", "BERT, 6 layers, 128 tokens",
    "MiniLM, 128 tokens",
)  # fmt: skip
SAMPLES = 8


def calibration(name: str, model: Any) -> list[dict[str, np.ndarray]]:
    """Return text for models with real weights, else standard normal values and random tokens."""
    if name.startswith("PP-OCRv4 det"):
        return [{"x": page.pixels} for page in texts.pages(SAMPLES, 2, 640)]
    if name.startswith("PP-OCRv4 rec"):
        shown = [line.pixels[..., :320] for line in texts.lines(8 * SAMPLES, 2)]
        return [{"x": x} for x in shown if x.shape[-1] == 320][:SAMPLES]
    if name.startswith("MiniLM"):
        return [tokens(sentence) for sentence in texts.sentences(200, 0)[:SAMPLES]]
    random = np.random.default_rng(0)

    def values(spec: Any) -> np.ndarray:
        if spec.dtype == "float32":
            return random.standard_normal(spec.shape, np.float32)
        if spec.name == "input_ids":
            return random.integers(0, 30_000, spec.shape)
        return np.full(spec.shape, int(spec.name == "attention_mask"), np.int64)

    return [{spec.name: values(spec) for spec in specs(model.graph.inputs)} for _ in range(SAMPLES)]


def prepare(name: str) -> None:
    """Quantize and compile a model."""
    with tempfile.TemporaryDirectory() as folder:
        file = cases.fixed_file(cases.CASES[name], Path(folder))
        model = optc.optimize(file)
        whole = FOLDER / f"{performance.slug(name)}.float32.optc"
        if not whole.exists() and not (performance.FOLDER / f"{performance.slug(name)}.optc").exists():
            optc.compile(file, verify=False).save(whole)
    samples = data.load(calibration(name, model), specs(model.graph.inputs))
    quantized = Quantizer(model, samples).run_paying(Options(), "cpu")
    stays = {layer: row["after"] / row["before"] for layer, row in quantized.report["does not pay"].items()}
    print(name, "stays in float32, by how many times slower it would be:", stays, flush=True)
    serialize.save(quantized.model, FOLDER / f"{performance.slug(name)}.int8.onnx")
    optc.compile(quantized.model, verify=False).save(FOLDER / f"{performance.slug(name)}.int8.optc")
    np.savez(FOLDER / f"{performance.slug(name)}.npz", **samples.calls[0])


def artifacts(name: str) -> tuple[Path, Path]:
    """Return the artifacts of a prepared model: float32, int8."""
    stem = performance.slug(name)
    whole = FOLDER / f"{stem}.float32.optc"
    return whole if whole.exists() else performance.FOLDER / f"{stem}.optc", FOLDER / f"{stem}.int8.optc"


def loaded(artifact: Path, inputs: dict[str, np.ndarray]) -> Callable[[], list[np.ndarray]]:
    """Return a run of an artifact on one thread; inputs are given in its order."""
    model = optc.load(artifact)
    model.threads = 1
    named = dict(zip((spec.name for spec in model.inputs), inputs.values(), strict=True))
    return lambda: list(model.run(named).values())


def measure(name: str, seconds: float) -> dict[str, float]:
    """Return median milliseconds of one thread."""
    stem = performance.slug(name)
    inputs = dict(np.load(FOLDER / f"{stem}.npz"))
    whole, small = artifacts(name)
    running: dict[str, Callable[[], object]] = {"float32": loaded(whole, inputs), "int8": loaded(small, inputs)}
    for peer in (contestants.onnxruntime, contestants.openvino):
        running[peer.__name__] = partial(peer(FOLDER / f"{stem}.int8.onnx", 1), inputs)
    return {timing.name: timing.median for timing in alternate(running, seconds=seconds)}


def table(results: dict[str, dict[str, float]]) -> str:
    """Return the table, with geometric means of the ratios."""
    lines = [
        "| model | float32, ms | int8, ms | faster | onnxruntime | OpenVINO | best of them / int8 |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    faster, ahead = [], []
    for name, t in results.items():
        best = min(t["onnxruntime"], t["openvino"])
        faster.append(t["float32"] / t["int8"])
        ahead.append(best / t["int8"])
        lines.append(
            f"| {name} | {t['float32']:.2f} | {t['int8']:.2f} | {faster[-1]:.2f} x | {t['onnxruntime']:.2f} | "
            f"{t['openvino']:.2f} | {ahead[-1]:.2f} |"
        )
    means = [float(np.exp(np.mean(np.log(ratios)))) for ratios in (faster, ahead)]
    return "\n".join([*lines, f"| geometric mean | | | {means[0]:.2f} x | | | {means[1]:.2f} |"])


def shown() -> dict[str, dict[str, float]]:
    """Return the times in the rows of the page's table."""
    text = PAGE.read_text(encoding="utf-8").split("<!-- speed -->")[1].split("<!-- end of speed -->")[0]
    rows = [line.split(" | ") for line in text.splitlines()]
    cells = {row[0].removeprefix("| "): row for row in rows}
    columns = {"float32": 1, "int8": 2, "onnxruntime": 4, "openvino": 5}
    return {name: {who: float(cells[name][i]) for who, i in columns.items()} for name in NAMES if name in cells}


def main() -> None:
    """Prepare, or measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="quantize and compile")
    parser.add_argument("--only", default="", help="models whose name matches this expression")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for each model")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    results = shown()
    for name in NAMES:
        if not re.search(options.only, name):
            continue
        if options.prepare:
            prepare(name)
        else:
            results[name] = measure(name, options.seconds)
            print(name, results[name], flush=True)
            # At once: a run of all models takes a while.
            texts.write_between(PAGE, "speed", table({name: results[name] for name in NAMES if name in results}))


if __name__ == "__main__":
    main()
