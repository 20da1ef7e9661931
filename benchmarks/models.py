"""Real models, end to end: compile time, errors, speed against peers, memory, size of the optimized graph.

    python benchmarks/models.py [--only REGEX] [--seconds 3] [--no-write]

Each model runs in a process of its own; contestants take turns in it. Writes docs/models.md.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("OPTC_MODEL_CACHE", ROOT / ".cache" / "models"))


@dataclass(frozen=True)
class Case:
    """A model and the input sizes that it is tried at; one artifact serves all of them."""

    file: str
    sizes: list[dict[str, tuple[int, ...]]] = field(default_factory=list)


SPEECH = {"input": (1, 576), "state": (2, 1, 128)}
CASES = {
    "PP-OCRv4 det": Case("ppocr/det.onnx", [{"x": (1, 3, 320, 320)}, {"x": (1, 3, 640, 640)}, {"x": (2, 3, 224, 480)}]),
    "PP-OCRv4 rec": Case("ppocr/rec.onnx", [{"x": (1, 3, 48, 320)}, {"x": (4, 3, 48, 160)}, {"x": (1, 3, 48, 701)}]),
    "PP-OCRv4 cls": Case("ppocr/cls.onnx", [{"x": (1, 3, 48, 192)}, {"x": (6, 3, 48, 192)}, {"x": (2, 3, 48, 100)}]),
    "ResNet-50": Case("exported/resnet50.onnx"),
    "MobileNetV2": Case("exported/mobilenetv2.onnx"),
    "BERT-base, 128 tokens": Case("exported/bert_base.onnx"),
    "BERT, 6 layers": Case("exported/bert_6.onnx"),
    "BERT-base, any size": Case("exported/bert_base_dynamic.onnx"),
    "ViT-base": Case("exported/vit_base.onnx"),
    "silero VAD": Case("silero/silero_vad.onnx", [SPEECH]),
    "silero VAD, 16 kHz, opset 15": Case("silero/silero_vad_16k_op15.onnx", [SPEECH]),
    "silero VAD, half": Case("silero/silero_vad_half.onnx", [SPEECH]),
    "silero VAD, opset 18, no If": Case("silero/silero_vad_op18_ifless.onnx", [SPEECH]),
    "silero VAD, for OpenVINO": Case("silero/silero_vad_openvino_16k.onnx", [SPEECH]),
    "silero VAD, sequence": Case("silero/silero_vad_16k_sequence.onnx", [SPEECH]),
}


def inputs_for(model: object, original: object, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    from optc import sample, verification

    choices = verification.integer_choices(original)
    dims = {}
    for spec in model.inputs:
        for dim, size in zip(spec.shape, shapes.get(spec.name, ()), strict=False):
            if isinstance(dim, str):
                dims[dim] = size
    return sample.random_inputs(model.inputs, dims=dims, integers=choices)


def measure(name: str, seconds: float) -> dict[str, object]:
    """Compile, save, load, compare and time one model; runs in a process of its own."""
    import optc
    from optc.driver import Trace, verify_artifact
    from optc.ir import serialize
    from optc.peers import open_peer
    from optc.timing import alternate

    case = CASES[name]
    path = CACHE / case.file
    trace = Trace()
    start = perf_counter()
    artifact = optc.compile(path, trace=trace, verify=False)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.optc"
        artifact.save(file)
        compile_seconds = perf_counter() - start
        model = optc.load(file)
        original = optc.capture(path)
        given = inputs_for(model, original, (case.sizes or [{}])[0])
        memory = peak_memory(file, given)
    result: dict[str, object] = {
        "compile": compile_seconds,
        "stages": {k: round(v, 2) for k, v in trace.seconds.items()},
        "kernels": len(artifact.report["kernels"]),
        "declined": sum("declined" in kernel for kernel in artifact.report["kernels"]),
        "memory": memory,
        "weights": sum(w.nbytes for w in model.manifest.weights),
        "activations": model.manifest.memory.get("activations"),
    }
    errors = []
    for shapes in case.sizes or [{}]:
        inputs = inputs_for(model, original, shapes)
        checked = verify_artifact(model, original, inputs=inputs)
        errors.append(max(o.relative for o in checked.outputs))
    result["errors"] = errors
    for threads in (1, len(os.sched_getaffinity(0))):
        model.threads = threads
        contestants = {"optc": lambda: model.run(given)}
        for peer_name in ("onnxruntime", "openvino"):
            try:
                peer = open_peer(peer_name, original, threads)
                peer.run(given)
            except Exception as error:  # peers raise errors of every kind for what they cannot run
                print(f"{name}: {peer_name} does not run it: {str(error).splitlines()[0][:200]}", file=sys.stderr)
                continue
            contestants[peer_name] = lambda peer=peer: peer.run(given)
        result[f"ms_{threads}"] = {t.name: t.median for t in alternate(contestants, seconds=seconds)}
    optimized = optc.optimize(path)
    result["nodes"] = count(optimized)
    result["nodes_onnxruntime"], result["fused_onnxruntime"] = extended_nodes(serialize.to_proto(original))
    return result


def count(model: object) -> int:
    return sum(1 for _ in model.graph.all_nodes())


def extended_nodes(proto: object) -> tuple[int, dict[str, int]]:
    """Return how many nodes onnxruntime's extended optimization leaves, and those of its own operators by name."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = f"{folder}/optimized.onnx"
        options.log_severity_level = 4
        onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        left = list(nodes(onnx.load(f"{folder}/optimized.onnx").graph))
    own = Counter(node.op_type for node in left if node.domain not in ("", "ai.onnx"))
    return len(left), dict(sorted(own.items()))


def nodes(graph: object):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes(attribute.g)


MEMORY = """
import sys
import numpy
from optc.runtime import load
model = load(sys.argv[1])
inputs = dict(numpy.load(sys.argv[2]))
for _ in range(2):
    model.run(inputs)
with open('/proc/self/status') as status:
    print(next(line.split()[1] for line in status if line.startswith('VmHWM')))
"""


def peak_memory(artifact: Path, inputs: dict[str, np.ndarray]) -> int:
    """Return the peak resident bytes of a process that loads and runs the artifact, and nothing else."""
    arrays = artifact.with_suffix(".npz")
    np.savez(arrays, **inputs)
    command = [sys.executable, "-c", MEMORY, str(artifact), str(arrays)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) * 1024


def page(results: dict[str, dict[str, object]]) -> str:
    threads = len(os.sched_getaffinity(0))
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    lines = [
        "# Real models",
        "",
        f"{cpu.group(1) if cpu else platform.machine()}, {threads} cores. `make bench` writes this page.",
        "Times are medians in milliseconds of alternating runs in one process; kernels are not tuned. Errors are",
        "relative to the output's largest magnitude: the worst output, for each input size of the one artifact,",
        "against onnxruntime, or against onnx's reference evaluator where those two differ (onnxruntime's Sigmoid is",
        "off far below zero).",
        "",
        "| model | compile | worst error | optc / onnxruntime / openvino, 1 thread | "
        f"{threads} threads | nodes: optc / onnxruntime | peak memory | weights + activations |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        times = [
            " / ".join(milliseconds(r[f"ms_{t}"], p) for p in ("optc", "onnxruntime", "openvino")) for t in (1, threads)
        ]
        errors = ", ".join(f"{e:.0e}" for e in r["errors"])
        activations = "+ by size" if r["activations"] is None else f"+ {r['activations'] / 1e6:.0f}"
        lines.append(
            f"| {name} | {r['compile']:.1f} s | {errors} | {times[0]} | {times[1]} | "
            f"{r['nodes']} / {r['nodes_onnxruntime']} | {r['memory'] / 1e6:.0f} MB | "
            f"{r['weights'] / 1e6:.0f} {activations} MB |"
        )
    more = [
        f"* {name}: onnxruntime leaves {r['nodes'] - r['nodes_onnxruntime']} nodes fewer. It has "
        + ", ".join(f"{count} {op}" for op, count in r["fused_onnxruntime"].items())
        + " of its own domain, which the standard cannot say."
        for name, r in results.items()
        if r["nodes"] > r["nodes_onnxruntime"]
    ]
    if more:
        lines += [
            "",
            "Where the optimized graph has more nodes than onnxruntime's extended optimization leaves:",
            "",
            *more,
        ]
    return "\n".join(lines) + "\n"


def milliseconds(times: dict[str, float], name: str) -> str:
    if name not in times:
        return "–"
    return f"{times[name]:.1f}" if times[name] >= 1 else f"{times[name]:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression on the model's name")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each comparison")
    parser.add_argument("--no-write", action="store_true", help="print the page only")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.seconds)))
        return
    results = {}
    for name in CASES:
        if re.search(options.only, name):
            command = [sys.executable, __file__, "--measure", name, "--seconds", str(options.seconds)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name} failed")
            results[name] = json.loads(done.stdout.splitlines()[-1])
            print(name, json.dumps(results[name]), flush=True)
    text = page(results)
    print(text)
    if not options.no_write and not options.only:
        (ROOT / "docs" / "models.md").write_text(text)


if __name__ == "__main__":
    main()
