"""Structured pruning of whole architectures: equal to the masked original, and how much faster.

    python benchmarks/pruning.py --prepare       prune and compile (half an hour); checks equality at 10, 30, 50, 70 %
    python benchmarks/pruning.py                 time what was compiled, one thread; rewrites docs/pruning.md's table
    python benchmarks/pruning.py --double --only REGEX    compare in float64 what differs by rounding alone (minutes)
    python benchmarks/pruning.py --only REGEX

What is compiled lies in .cache/pruning. ``examples/prune_digits.py`` measures accuracy.
"""

import argparse
import json
import re
from pathlib import Path
from time import perf_counter

import numpy as np
import onnx
import onnx_ir as oir
from models import CACHE, CASES, inputs_for

import optc
from optc.compression.prune import normalized
from optc.ir import dims, serialize
from optc.ir.verifier import violations
from optc.passes.prune.select import Structured
from optc.passes.prune.structured import prune
from optc.peers import OnnxRuntime
from optc.timing import alternate

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".cache" / "pruning"
RATIOS = (0.1, 0.3, 0.5, 0.7)
TIMED = 0.5
SMALL = {"PP-OCRv4 det": {"x": (1, 3, 320, 320)}}
NAMES = (
    "ResNet-50", "MobileNetV2", "UNet", "BERT, 6 layers", "ViT-base",
    "PP-OCRv4 det", "PP-OCRv4 rec", "PP-OCRv4 cls",
)  # fmt: skip
MARK = "<!-- written by benchmarks/pruning.py -->"


def unet():
    """A U-Net of four levels for images of 128 x 128 pixels: concatenated skips, transposed convolutions."""
    import torch
    from torch import nn

    class UNet(nn.Module):
        def __init__(self, widths=(32, 64, 128, 256)):
            super().__init__()
            self.down = nn.ModuleList(self.block(a, b) for a, b in zip((3, *widths), widths, strict=False))
            pairs = list(zip(widths[::-1], widths[-2::-1], strict=False))
            self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairs)
            self.merge = nn.ModuleList(self.block(2 * b, b) for _, b in pairs)
            self.head = nn.Conv2d(widths[0], 2, 1)

        def block(self, a, b):
            layers = []
            for width in (a, b):
                norm = nn.BatchNorm2d(b)
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                layers += [nn.Conv2d(width, b, 3, padding=1, bias=False), norm, nn.ReLU()]
            return nn.Sequential(*layers)

        def forward(self, x):
            skips = []
            for index, block in enumerate(self.down):
                x = block(nn.functional.max_pool2d(x, 2) if index else x)
                skips.append(x)
            for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
                x = merge(torch.cat([skip, up(x)], 1))
            return self.head(x)

    torch.manual_seed(0)
    return optc.capture(UNet().eval(), example_inputs=(torch.randn(1, 3, 128, 128),))


def load(name):
    model = unet() if name == "UNet" else optc.capture(CACHE / CASES[name].file)
    normalized(model)
    return model


class Described:
    """A graph with the inputs that ``inputs_for`` asks for."""

    def __init__(self, model):
        self.inputs = optc.driver.specs(model.graph.inputs)


def feeds_for(name, model):
    sizes = CASES[name].sizes if name in CASES else []
    return inputs_for(Described(model), model, SMALL.get(name) or (sizes or [{}])[0])


def equality(name, model, feeds):
    """Prune at each ratio; error, parameters and operations of each; the model at ``TIMED`` is returned too."""
    rows, chosen = [], None
    for ratio in RATIOS:
        small, zero = model.clone(), model.clone()
        start = perf_counter()
        report = prune(small, Structured(ratio), zero=zero)
        seconds = perf_counter() - start
        onnx.checker.check_model(serialize.to_proto(small), full_check=True)
        assert not violations(small)
        error = 0.0
        expected = OnnxRuntime(zero, 1).run(feeds)
        for key, found in OnnxRuntime(small, 1).run(feeds).items():
            assert found.shape == expected[key].shape
            # Probabilities far below 1 are approximations in onnxruntime: their error is measured against 1.
            scale = max(float(np.abs(expected[key]).max()), 1.0 if ends_in_sigmoid(small, key) else 0.0)
            error = max(error, float(np.abs(found.astype(np.float64) - expected[key]).max()) / scale)
        print(f"{name} {ratio:.0%}: error {error:.1e}, parameters {report.parameters}, {seconds:.1f} s", flush=True)
        rows.append({"ratio": ratio, "error": error, "parameters": report.parameters, "flops": report.flops})
        if ratio == TIMED:
            chosen = small
    return rows, chosen


def in_double(model):
    """A copy of the model that computes in float64."""
    wide = model.clone()
    for value in wide.graph.initializers.values():
        if value.dtype == oir.DataType.FLOAT:
            value.const_value = oir.tensor(value.const_value.numpy().astype(np.float64))
    for value in dims.all_values(wide.graph):
        if value.dtype == oir.DataType.FLOAT:
            value.type = oir.TensorType(oir.DataType.DOUBLE)
    for node in wide.graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == oir.DataType.FLOAT:
            node.attributes["to"] = oir.AttrInt64("to", int(oir.DataType.DOUBLE))
    return wide


def rounding(name):
    """Print how far the pruned model is from the masked one in float32 and in float64, and float32 from float64."""
    from onnx.reference import ReferenceEvaluator

    model = load(name)
    feeds = feeds_for(name, model)
    wide = {key: x.astype(np.float64) if x.dtype == np.float32 else x for key, x in feeds.items()}
    for ratio in RATIOS:
        small, zero = model.clone(), model.clone()
        prune(small, Structured(ratio), zero=zero)
        single = [next(iter(OnnxRuntime(m, 1).run(feeds).values())).astype(np.float64) for m in (zero, small)]
        double = [ReferenceEvaluator(serialize.to_proto(in_double(m))).run(None, wide)[0] for m in (zero, small)]
        pairs = {
            "pruned from masked, float32": single,
            "the same, float64": double,
            "masked, float32 from float64": (single[0], double[0]),
            "pruned, float32 from float64": (single[1], double[1]),
        }
        scale = np.abs(double[0]).max()
        found = ", ".join(f"{key} {np.abs(a - b).max() / scale:.1e}" for key, (a, b) in pairs.items())
        print(f"{name} {ratio:.0%}: {found}", flush=True)


def ends_in_sigmoid(model, name):
    (value,) = (v for v in model.graph.outputs if v.name == name)
    return value.producer() is not None and value.producer().op_type == "Sigmoid"


def prepare(name):
    folder = WORK / re.sub(r"\W+", "_", name)
    folder.mkdir(parents=True, exist_ok=True)
    model = load(name)
    feeds = feeds_for(name, model)
    rows, small = equality(name, model, feeds)
    np.savez(folder / "inputs.npz", **feeds)
    for file, graph in (("whole", model), ("pruned", small)):
        optc.compile(graph, verify=False).save(folder / f"{file}.optc")
        serialize.save(graph, folder / f"{file}.onnx")
    (folder / "equality.json").write_text(json.dumps(rows))


def measure(name, seconds):
    """Median times of the whole and the pruned model, in ours and in onnxruntime, one thread, alternating."""
    folder = WORK / re.sub(r"\W+", "_", name)
    feeds = dict(np.load(folder / "inputs.npz"))
    contestants = {}
    for file in ("whole", "pruned"):
        model = optc.load(folder / f"{file}.optc")
        model.threads = 1
        peer = OnnxRuntime(optc.capture(folder / f"{file}.onnx"), 1)
        contestants[file] = lambda model=model: model.run(feeds)
        contestants[f"{file} onnxruntime"] = lambda peer=peer: peer.run(feeds)
    return {t.name: t.median for t in alternate(contestants, seconds=seconds)}


def table(results):
    lines = [
        "| model | error at 10 / 30 / 50 / 70 % | parameters, 50 % | operations, 50 % | optc | onnxruntime |",
        "|---|---|---|---|---|---|",
    ]
    for name, (rows, times) in results.items():
        half = next(row for row in rows if row["ratio"] == TIMED)
        errors = " / ".join(f"{row['error']:.0e}" for row in rows)
        before, after = half["parameters"]
        flops = f"{half['flops'][1] / half['flops'][0]:.0%}" if half["flops"][0] else "by size"
        speeds = [
            f"{times[f'whole{who}']:.2f} -> {times[f'pruned{who}']:.2f} ms, "
            f"{times[f'whole{who}'] / times[f'pruned{who}']:.2f} x"
            for who in ("", " onnxruntime")
        ]
        lines.append(f"| {name} | {errors} | {after / before:.0%} | {flops} | {' | '.join(speeds)} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--double", action="store_true")
    parser.add_argument("--only", default="", help="a regular expression on the model's name")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each comparison")
    parser.add_argument("--no-write", action="store_true", help="print the table only")
    options = parser.parse_args()
    names = [name for name in NAMES if re.search(options.only, name)]
    if options.prepare or options.double:
        for name in names:
            (prepare if options.prepare else rounding)(name)
        return
    results = {}
    for name in names:
        folder = WORK / re.sub(r"\W+", "_", name)
        if not (folder / "equality.json").exists():
            raise SystemExit(f"{name} is not prepared: run with --prepare first")
        results[name] = (json.loads((folder / "equality.json").read_text()), measure(name, options.seconds))
        print(name, results[name][1], flush=True)
    text = table(results)
    print(text)
    page = ROOT / "docs" / "pruning.md"
    if not options.no_write and not options.only:
        before, _, after = page.read_text().split(MARK)
        page.write_text(f"{before}{MARK}\n\n{text}\n{MARK}{after}")


if __name__ == "__main__":
    main()
