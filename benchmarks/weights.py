"""Weights of 8 and 4 bits beside float32: single products, and a step of GPT-2, beside onnxruntime.

    python benchmarks/weights.py [--only products|gpt2] [--seconds 2] [--no-write]

Weights are rounded to nearest: 8 bits with a scale per column, 4 bits with one per column and 32 rows, no zero points.
Everything in one process takes turns. onnxruntime runs MatMulNBits at accuracy level 0 (float32) and 4 (rows rounded
to 8 bits), and GPT-2 as it makes it from the same QDQ file. Writes docs/weights.md.

    --prepare compiles only, --prepared measures what was compiled, --report writes the page only
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import cases
import contestants
import ml_dtypes
import numpy as np
import onnx
from onnx import helper, numpy_helper
from performance import FOLDER, peak_memory

BLOCK = 32
KINDS = ("float32", "int8", "int4")
SHAPES = ((4096, 4096), (768, 3072))
ROWS = (1, 8, 128)
RESULTS = FOLDER / "weights"
GPT2 = "GPT-2 decode, past 256"


def rounded(matrix: np.ndarray, kind: str, axis: int) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Return integers, scales and the attributes of DequantizeLinear for a matrix that is summed along ``axis``."""
    if kind == "int8":
        scale = np.maximum(np.abs(matrix).max(axis=axis), 1e-12) / 127
        integers = np.rint(matrix / np.expand_dims(scale, axis)).astype(np.int8)
        return integers, scale.astype(np.float32), {"axis": 1 - axis}
    matrix = np.moveaxis(matrix, axis, 0)
    depth, columns = matrix.shape
    padded = np.zeros((-(-depth // BLOCK) * BLOCK, columns), np.float32)
    padded[:depth] = matrix
    blocks = padded.reshape(-1, BLOCK, columns)
    extremes = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    # The largest magnitude of a block becomes -8.
    scale = np.where(extremes == 0, 1.0, extremes / -8).astype(np.float32)
    integers = np.clip(np.rint(blocks / scale), -8, 7).reshape(-1, columns)[:depth].astype(ml_dtypes.int4)
    attributes = {"axis": axis, "block_size": BLOCK}
    return np.moveaxis(integers, 0, axis), np.moveaxis(scale[:, 0], 0, axis), attributes


def quantize(model: onnx.ModelProto, kind: str) -> None:
    """Put the constant matrices that MatMul, Gemm and Gather read under DequantizeLinear, in place."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer if len(tensor.dims) == 2}
    axes: dict[str, int] = {}
    for node in model.graph.node:
        second = node.input[1] if len(node.input) > 1 else ""
        if node.op_type in ("MatMul", "Gemm") and second in constants:
            axes.setdefault(second, 0)
        elif node.op_type in ("Gather", "Transpose") and node.input[0] in constants:
            axes[node.input[0]] = 1
    added = []
    for name, axis in axes.items():
        matrix = numpy_helper.to_array(constants[name])
        if matrix.size < 1 << 16:
            continue
        integers, scale, attributes = rounded(matrix, kind, axis)
        model.graph.initializer.remove(constants[name])
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(integers), f"{name}.integers"))
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(scale), f"{name}.scale"))
        added.append(helper.make_node("DequantizeLinear", [f"{name}.integers", f"{name}.scale"], [name], **attributes))
    nodes = [*added, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def product(rows: int, depth: int, columns: int, kind: str) -> onnx.ModelProto:
    """Return the model of one MatMul with a constant."""
    matrix = np.random.default_rng(0).standard_normal((depth, columns)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [rows, depth])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [rows, columns])],
        [numpy_helper.from_array(matrix, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    if kind != "float32":
        quantize(model, kind)
    return model


def nbits(rows: int, depth: int, columns: int, kind: str, level: int) -> onnx.ModelProto:
    """Return the same product as onnxruntime's own operator."""
    bits = 8 if kind == "int8" else 4
    rng = np.random.default_rng(0)
    blocks = -(-depth // BLOCK)
    weights = rng.integers(0, 256, (columns, blocks, BLOCK * bits // 8)).astype(np.uint8)
    scales = rng.uniform(0.01, 0.1, (columns, blocks)).astype(np.float32)
    attributes = {"K": depth, "N": columns, "bits": bits, "block_size": BLOCK, "accuracy_level": level}
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **attributes)
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [rows, depth])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [rows, columns])],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(scales, "s")],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def artifact(kind: str, *sizes: int) -> Path:
    return RESULTS / f"{kind}-{'x'.join(map(str, sizes)) if sizes else 'gpt2'}.optc"


def gpt2_file(kind: str) -> Path:
    return cases.CACHE / cases.CASES[GPT2].file if kind == "float32" else RESULTS / f"gpt2-{kind}.onnx"


def prepare(part: str) -> None:
    import optc

    if part == "gpt2":
        for kind in KINDS:
            if kind != "float32":
                model = onnx.load(gpt2_file("float32"))
                quantize(model, kind)
                model.ir_version = max(model.ir_version, 10)
                for imported in model.opset_import:
                    imported.version = max(imported.version, 21) if imported.domain == "" else imported.version
                onnx.save(model, gpt2_file(kind))
            optc.compile(gpt2_file(kind), verify=False).save(artifact(kind))
        return
    for kind in KINDS:
        for depth, columns in SHAPES:
            for rows in ROWS:
                compiled = optc.compile(product(rows, depth, columns, kind), verify=False)
                compiled.save(artifact(kind, rows, depth, columns))


def measure_products(seconds: float) -> list[dict[str, Any]]:
    import optc
    from optc.timing import alternate

    results = []
    with tempfile.TemporaryDirectory() as folder:
        for depth, columns in SHAPES:
            for rows in ROWS:
                x = {"x": np.random.default_rng(1).standard_normal((rows, depth)).astype(np.float32)}
                models = {kind: optc.load(artifact(kind, rows, depth, columns)) for kind in KINDS}
                for threads in (1, 2):
                    running: dict[str, Any] = {}
                    for kind, model in models.items():
                        model.threads = threads
                        running[kind] = lambda m=model, x=x: m.run(x)
                    for kind in KINDS[1:]:
                        for level in (0, 4):
                            file = Path(folder) / "product.onnx"
                            onnx.save(nbits(rows, depth, columns, kind, level), file)
                            peer = contestants.onnxruntime(file, threads)
                            running[f"onnxruntime {kind} {level}"] = lambda p=peer, x=x: p(x)
                    timings = alternate(running, seconds=seconds, min_runs=2, warmup=1)
                    times = {t.name: t.median for t in timings}
                    results.append({"sizes": [rows, depth, columns], "threads": threads, "ms": times})
    return results


def measure_gpt2(seconds: float) -> dict[str, Any]:
    import optc
    from optc.driver import verify_artifact
    from optc.timing import alternate

    inputs = cases.make_inputs(cases.CASES[GPT2], optc.capture(gpt2_file("float32")))
    models = {kind: optc.load(artifact(kind)) for kind in KINDS}
    result: dict[str, Any] = {"memory": {}, "weights": {}, "threads": {}, "difference": {}}
    for kind, model in models.items():
        result["memory"][kind] = peak_memory(artifact(kind), gpt2_file(kind), inputs)
        result["weights"][kind] = sum(w.nbytes for w in model.manifest.weights)
        checked = verify_artifact(model, optc.capture(gpt2_file(kind)), inputs=inputs)
        result["difference"][kind] = max(output.relative for output in checked.outputs)
    for threads in (1, 2):
        running: dict[str, Any] = {}
        for kind, model in models.items():
            model.threads = threads
            running[kind] = lambda m=model: m.run(inputs)
            peer = contestants.onnxruntime(gpt2_file(kind), threads)
            running[f"onnxruntime {kind}"] = lambda p=peer: p(inputs)
        result["threads"][threads] = {t.name: t.median for t in alternate(running, seconds=seconds, min_runs=3)}
    return result


def page(found: dict[str, Any]) -> str:
    lines = [
        "# Weights of 8 and 4 bits",
        "",
        "Constant weights under DequantizeLinear stay packed in the artifact and are dequantized in registers;",
        "products are computed in float32. `backends/kernels/weight_only.py` states the formula and its error bound.",
        "`python benchmarks/weights.py` measures this page: medians of alternating runs in one process, in",
        f"milliseconds. 8 bits have a scale per column, 4 bits one per column and {BLOCK} rows; onnxruntime one per",
        f"{BLOCK} rows for both. At accuracy level 4 it rounds the rows to 8 bits, which optc does not do.",
    ]
    for threads in (1, 2):
        rows = [r for r in found.get("products", []) if r["threads"] == threads]
        if rows:
            names = list(rows[0]["ms"])
            lines += ["", f"## Products, {threads} thread{'s' if threads > 1 else ''}", ""]
            lines += [
                f"| rows x depth x columns | {' | '.join(names)} | float32 / int8 | float32 / int4 |",
                f"|---|{'---|' * (len(names) + 2)}",
            ]
            for row in rows:
                ms = row["ms"]
                cells = [f"{ms[name]:.3g}" for name in names]
                cells += [f"{ms['float32'] / ms[kind]:.2f}" for kind in KINDS[1:]]
                lines.append(f"| {' x '.join(map(str, row['sizes']))} | {' | '.join(cells)} |")
    if "gpt2" in found:
        lines += ["", f"## {GPT2}", "", *_gpt2(found["gpt2"])]
    return "\n".join(lines) + "\n"


def _gpt2(found: dict[str, Any]) -> list[str]:
    lines = [
        "Peak memory is that of a process that loads the model and runs it three times with one thread. Weights are",
        "random, so nothing is said of what 4 bits cost in accuracy. The difference, of the largest output, is that",
        "to onnxruntime when it runs the graph as written; timed, it rounds the rows that meet weights of 4 bits.",
        "",
        "| weights | 1 thread | onnxruntime | 2 threads | onnxruntime | speed-up, 1 / 2 threads "
        "| peak memory, MB: optc / onnxruntime | of float32 | weights, MB | difference |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    first, second = (found["threads"][key] for key in sorted(found["threads"], key=int))
    for kind in KINDS:
        memory, whole = found["memory"][kind], found["memory"]["float32"]
        cells = [kind, *(f"{t[n]:.1f}" for t in (first, second) for n in (kind, f"onnxruntime {kind}"))]
        cells.append(" / ".join(f"{t['float32'] / t[kind]:.2f}" for t in (first, second)))
        cells.append(" / ".join(f"{memory[name] / 2**20:.0f}" for name in ("optc", "onnxruntime")))
        cells += [f"{memory['optc'] / whole['optc']:.0%}", f"{found['weights'][kind] / 1e6:.0f}"]
        lines.append(f"| {' | '.join([*cells, format(found['difference'][kind], '.1e')])} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["products", "gpt2"], help="measure one part")
    parser.add_argument("--seconds", type=float, default=2.0, help="time of each measurement")
    parser.add_argument("--no-write", action="store_true", help="print the page only")
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--prepared", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--report", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    measure = {"products": measure_products, "gpt2": measure_gpt2}
    for part in [options.only] if options.only else list(measure):
        if not options.prepared and not options.report:
            prepare(part)
        if not options.prepare and not options.report:
            (RESULTS / f"{part}.json").write_text(json.dumps(measure[part](options.seconds)))
            print(f"measured {part}", file=sys.stderr)
    if options.prepare:
        return
    files = {part: RESULTS / f"{part}.json" for part in measure}
    text = page({part: json.loads(file.read_text()) for part, file in files.items() if file.is_file()})
    print(text)
    if not options.no_write:
        (cases.ROOT / "docs" / "weights.md").write_text(text)


if __name__ == "__main__":
    main()
