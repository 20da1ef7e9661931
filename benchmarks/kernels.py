"""Efficiency of single kernels: those of the benchmark models, and 200 random shapes of matrix products and so on.

    python benchmarks/kernels.py [--only models|gemm|conv|softmax] [--no-write] [--page NAME]

The kernels of the models are timed inside of the compiled models that benchmarks/performance.py left in
build/performance/. Random shapes are models of one node, checked against NumPy or onnxruntime and timed beside
onnxruntime. Everything runs with one thread; kernels of the models with two as well. Writes docs/NAME.md; NAME is
kernels unless --page says so.

    --prepare compiles the random shapes only, --prepared measures them afterwards, --report writes the page only
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import cases
import machine
import numpy as np
import shapes
from performance import FOLDER, difference, slug
from report import milliseconds, number

LARGE = 20_000_000
"""Operations from which a kernel counts for the median."""
PROFILES = 7
WORST = 12
"""How many of the worst shapes the page lists."""
RESULTS = FOLDER / "kernels"


def of_models() -> list[dict[str, Any]]:
    """Time every kernel of at least LARGE operations in the compiled models, each distinct one once."""
    import optc

    rows: dict[str, dict[str, Any]] = {}
    for name, case in cases.CASES.items():
        artifact = FOLDER / f"{slug(name)}.optc"
        if cases.kind(case) == "any size" or not artifact.is_file():
            continue
        models = {threads: optc.load(artifact, threads=threads) for threads in (1, 2)}
        model = models[1]
        large = {k["name"]: k for k in model.report["kernels"] if k.get("operations", 0) >= LARGE}
        if not large:
            continue
        with tempfile.TemporaryDirectory() as folder:
            inputs = cases.make_inputs(case, optc.capture(cases.fixed_file(case, Path(folder))))
        samples: dict[str, dict[int, list[float]]] = {kernel: {1: [], 2: []} for kernel in large}
        for _ in range(PROFILES):
            for threads, running in models.items():
                for timed in running.profile(inputs):
                    if timed.name in samples:
                        samples[timed.name][threads].append(timed.seconds / timed.calls)
        for kernel, seconds in samples.items():
            what = {k: large[kernel][k] for k in ("schedule", "extents", "accumulates")}
            row = {**what, "models": [name], "kernel": kernel, "operations": large[kernel]["operations"]}
            row["ms"] = median(seconds[1]) * 1e3
            row["scaling"] = median(seconds[1]) / median(seconds[2])
            known = rows.setdefault(json.dumps([what, kernel]), row)
            if known is not row:
                known["models"].append(name)
    return list(rows.values())


def of_shapes(kind: str) -> list[dict[str, Any]]:
    """Check and time the random shapes of a kind that are compiled already."""
    import contestants

    import optc
    from optc.timing import alternate

    rows = []
    for shape in shapes.SHAPES[kind]:
        with tempfile.TemporaryDirectory() as folder:
            file = shape.save(Path(folder))
            peer = contestants.onnxruntime(file, 1)
        model = optc.load(FOLDER / "shapes" / f"{slug(shape.name)}.optc", threads=1)
        inputs = shape.inputs()
        expected = shape.expected(inputs) or peer(inputs)
        error = difference(list(model.run(inputs).values()), expected)
        running = {"optc": lambda m=model, x=inputs: m.run(x), "onnxruntime": lambda p=peer, x=inputs: p(x)}
        times = {t.name: t.median for t in alternate(running, seconds=0.1, min_runs=3, warmup=2)}
        row = {"name": shape.name, "operations": shape.operations, "error": error}
        rows.append({**row, "ms": times["optc"], "onnxruntime_ms": times["onnxruntime"]})
    return rows


def prepare(kind: str) -> None:
    """Compile the random shapes of a kind."""
    import optc

    folder = FOLDER / "shapes"
    folder.mkdir(parents=True, exist_ok=True)
    for shape in shapes.SHAPES[kind]:
        optc.compile(shape.model(), verify=False).save(folder / f"{slug(shape.name)}.optc")


def page(peak: float, results: dict[str, list[dict[str, Any]]], name: str) -> str:
    """Return the page ``name`` of all tables; it refers to the page about models of the same machine."""
    models = f"{name.replace('kernels', 'performance')}.md"
    lines = [
        "# Kernels",
        "",
        f"One thread, float32 peak of this machine {peak:.1f} GFLOP/s (measured: fused multiply-adds in registers);",
        f"see [performance]({models}) for the machine. `make kernels` measures this page.",
    ]
    if "models" in results:
        lines += ["", *_models(peak, results["models"])]
    for kind in shapes.SHAPES:
        if kind in results:
            lines += ["", *_shapes(peak, kind, results[kind])]
    return "\n".join(lines) + "\n"


def _models(peak: float, rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## In the benchmark models",
        "",
        f"Kernels of at least {LARGE // 10**6} million operations (a multiply-add is two), timed inside of the model,",
        "fused epilogues included. Extents are those of the output and of the sum. Integer kernels have another peak.",
        "Scaling is the time with one thread over that with two.",
    ]
    for title, wanted in (("float32", True), ("integers", False)):
        chosen = sorted((r for r in rows if (r["accumulates"] == "float32") == wanted), key=_speed)
        if not chosen:
            continue
        shares = [_speed(r) / peak for r in chosen]
        share = f", {median(shares):.0%} of the peak" if wanted else ""
        lines += [
            "",
            f"### {title}: median {median(map(_speed, chosen)):.1f} G/s{share}, {len(chosen)} kernels; "
            f"two threads {median(r['scaling'] for r in chosen):.2f} times as fast",
            "",
            "| kernel | schedule | output | sum | ms | G/s | of peak | scaling | models |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in chosen:
            outputs, summed = ("·".join(map(str, extents)) for extents in row["extents"])
            cells = [f"`{row['kernel']}`", row["schedule"], outputs, summed, milliseconds(row["ms"])]
            cells += [f"{_speed(row):.1f}", number(_speed(row) / peak if wanted else None, ".0%")]
            cells.append(f"{row['scaling']:.2f}")
            lines.append(f"| {' | '.join([*cells, ', '.join(row['models'])])} |")
    return lines


def _shapes(peak: float, kind: str, rows: list[dict[str, Any]]) -> list[str]:
    ratios = [r["onnxruntime_ms"] / r["ms"] for r in rows]
    large = [_speed(r) / peak for r in rows if r["operations"] >= LARGE]
    worst = max(rows, key=lambda r: r["error"])
    lines = [
        f"## {len(rows)} random shapes: {kind}",
        "",
        "Models of one node, layout changes included. Against onnxruntime, geometric mean of the ratios: "
        f"{geometric_mean(ratios):.2f},",
        f"least {min(ratios):.2f}. Largest relative error {worst['error']:.1e} ({worst['name']}).",
    ]
    if large and kind != "softmax":
        share = f"{median(large):.0%}"
        lines.append(f"Shapes of at least {LARGE // 10**6} million operations reach {share} of the peak in median.")
        slow = sorted((r for r in rows if r["operations"] >= LARGE), key=_speed)[:WORST]
        lines += ["", *_worst("large, farthest from the peak", slow, peak)]
    slow = sorted(rows, key=lambda r: r["onnxruntime_ms"] / r["ms"])[:WORST]
    return [*lines, "", *_worst("slowest beside onnxruntime", slow, peak if kind != "softmax" else None)]


def _worst(title: str, rows: list[dict[str, Any]], peak: float | None) -> list[str]:
    lines = [f"| {title} | ms | onnxruntime | ratio | G/s | of peak |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row["name"], milliseconds(row["ms"]), milliseconds(row["onnxruntime_ms"])]
        cells += [f"{row['onnxruntime_ms'] / row['ms']:.2f}", f"{_speed(row):.1f}"]
        cells.append(number(_speed(row) / peak if peak else None, ".0%"))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _speed(row: dict[str, Any]) -> float:
    return float(row["operations"] / row["ms"] / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["models", *shapes.SHAPES], help="measure one part")
    parser.add_argument("--no-write", action="store_true", help="print the page only")
    parser.add_argument("--page", default="kernels", help="name of the page that is written")
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--prepared", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--report", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for part in [options.only] if options.only else ["models", *shapes.SHAPES]:
        if part != "models" and not options.prepared and not options.report:
            prepare(part)
        if not options.prepare and not options.report:
            rows = of_models() if part == "models" else of_shapes(part)
            peak = machine.measure(1).gflops
            (RESULTS / f"{part}.json").write_text(json.dumps({"peak": peak, "rows": rows}))
            print(f"measured {part}", file=sys.stderr)
    found = {part: RESULTS / f"{part}.json" for part in ["models", *shapes.SHAPES]}
    read = {part: json.loads(file.read_text()) for part, file in found.items() if file.is_file()}
    if read and not options.prepare:
        peak = float(np.median([part["peak"] for part in read.values()]))
        text = page(peak, {part: content["rows"] for part, content in read.items()}, options.page)
        print(text)
        if not options.no_write:
            (cases.ROOT / "docs" / f"{options.page}.md").write_text(text)


if __name__ == "__main__":
    main()
