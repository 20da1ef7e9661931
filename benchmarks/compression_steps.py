"""How far the integers of a compiled model are from those that onnxruntime computes from the same file, in steps (LSB).

    python benchmarks/compression_steps.py [--only REGEX]      after compression_speed.py --prepare

A model is cut at every QuantizeLinear, and each part is given what onnxruntime has found there: one model, whose inputs
and outputs are all rounded activations. Whole models are compared too, but not judged: a number that lies between two
integers may be rounded either way, and what such a step makes of later ones grows through many layers up to the error
of quantization itself. onnxruntime runs the file as it is written, without optimizations: with them it adds pairs of
products of bytes in 16 bits, saturated, on CPUs without VNNI. Writes its table into docs/compression.md.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import compression_data as texts
import compression_speed as speed
import numpy as np
import onnx_ir as oir
import performance
from compression import FOLDER, PAGE

import optc
from optc.passes.match import constant
from optc.peers import OnnxRuntime


@dataclass(frozen=True)
class Steps:
    """Differences in steps: of every rounding by itself, of the whole model, of int8 from float32."""

    roundings: int
    elements: int
    worst: int
    equal: float
    whole: float
    whole_within: float
    quantization: float


def cut(model: oir.Model) -> tuple[oir.Model, list[str], list[str]]:
    """Return the model with every rounded activation as an input and an output; names of inputs, and of outputs."""
    opened = model.clone()
    graph, given, made = opened.graph, [], []
    for node in list(graph):
        if node.op_type != "QuantizeLinear" or constant(node.inputs[0]) is not None:
            continue
        value = node.outputs[0]
        fed = oir.Value(name=f"{value.name}.given", shape=value.shape, type=value.type)
        for user, index in list(value.uses()):
            user.replace_input_with(index, fed)
        graph.inputs.append(fed)
        graph.outputs.append(value)
        given.append(str(fed.name))
        made.append(str(value.name))
    return opened, given, made


def seen(model: oir.Model, names: list[str], inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the values called ``names`` of a run of onnxruntime."""
    opened = model.clone()
    values = {str(v.name): v for node in opened.graph for v in node.outputs}
    opened.graph.outputs.extend(values[name] for name in names)
    return OnnxRuntime(opened, 1, literal=True).run(inputs)


def differences(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the differences of outputs, in steps of 8 bits over each output's range."""
    found = []
    for name, b in theirs.items():
        step = (float(max(b.max(), 0)) - float(min(b.min(), 0))) / 255
        found.append(np.abs(ours[name].astype(np.float64) - b).reshape(-1) / step)
    return np.concatenate(found)


def measure(name: str) -> Steps:
    """Compare a model that compression_speed.py has prepared."""
    stem = FOLDER / performance.slug(name)
    if not Path(f"{stem}.npz").exists():
        raise SystemExit(f"{name} is not prepared: python benchmarks/compression_speed.py --prepare --only '{name}'")
    inputs = dict(np.load(f"{stem}.npz"))
    model = oir.load(f"{stem}.int8.onnx")
    opened, given, made = cut(model)
    rounded = seen(model, made, inputs)
    feeds = {**inputs, **{a: rounded[b] for a, b in zip(given, made, strict=True)}}
    ours = optc.compile(opened, verify=False).model().run(feeds)
    apart = [np.abs(ours[n].astype(np.int32) - rounded[n].astype(np.int32)).reshape(-1) for n in made]
    every = np.concatenate(apart)

    outputs = [str(v.name) for v in model.graph.outputs]
    expected = {n: rounded[n] for n in outputs}
    full, whole = (speed.loaded(path, inputs)() for path in speed.artifacts(name))
    wrong = differences(dict(zip(outputs, whole, strict=True)), expected)
    quantization = differences(dict(zip(outputs, full, strict=True)), expected)
    return Steps(
        len(made),
        every.size,
        int(every.max()),
        float((every == 0).mean()),
        float(wrong.max()),
        float((wrong <= 1).mean()),
        float(quantization.max()),
    )


def main() -> None:
    """Compare, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="models whose name matches this expression")
    options = parser.parse_args()
    kept = FOLDER / "steps.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    for name in speed.NAMES:
        if re.search(options.only, name):
            results[name] = asdict(measure(name))
            kept.write_text(json.dumps(results, indent=1))
            print(name, results[name], flush=True)
    lines = [
        "| model | roundings | elements | largest difference | equal | whole model, largest | within one step | "
        "int8 from float32, largest |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in speed.NAMES:
        if name in results:
            s = Steps(**results[name])
            lines.append(
                f"| {name} | {s.roundings} | {s.elements:,} | {s.worst} | {s.equal:.4%} | {s.whole:.1f} | "
                f"{s.whole_within:.2%} | {s.quantization:.1f} |"
            )
    texts.write_between(PAGE, "steps", "\n".join(lines))


if __name__ == "__main__":
    main()
