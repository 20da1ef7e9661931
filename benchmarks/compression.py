"""Accuracy of quantized models, beside onnxruntime's static quantizer with each of its calibrators, and NNCF.

    python benchmarks/compression.py [--only REGEX] [--report]

Real weights (PP-OCRv4, MiniLM) and networks trained on scikit-learn's digits (examples/quantize_digits.py). Calibration
and test data are different. All models are run by onnxruntime as they are written, so that only the quantizers differ.
Measurements are kept in build/compression/ and merged; --report only writes the tables of docs/compression.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import compression_data as texts
import compression_peers as peers
import numpy as np
import onnx
import onnx_ir as oir
from cases import CACHE, ROOT

import optc
from optc.compression import data
from optc.compression.options import Options
from optc.compression.quantize import Quantizer
from optc.driver import specs
from optc.peers import OnnxRuntime

FOLDER = ROOT / "build" / "compression"
PAGE = ROOT / "docs" / "compression.md"

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Task:
    """A model file, calibration data, what is seen of a model on test data, and scores of that (more is better).

    Scores, by what they are called, take what is seen of the model and of the float32 one.
    """

    file: Callable[[], Path]
    calibration: Callable[[str], list[dict[str, np.ndarray]]]
    see: Callable[[Run], list[Any]]
    scores: Mapping[str, Callable[[list[Any], list[Any]], float]]
    int4: bool = False
    transformer: bool = False


def recognition(run: Run) -> list[str]:
    """Return what is read of 200 drawn lines."""
    characters = ["blank", *_metadata()["character"].splitlines(), " "]
    return [texts.decode(next(iter(run({"x": line.pixels}).values()))[0], characters) for line in texts.lines(200, 1)]


def characters_right(read: list[str], _: list[str]) -> float:
    """Return the share of characters that are right."""
    return texts.character_accuracy(read, [line.text for line in texts.lines(200, 1)])


def letters_right(read: list[str], _: list[str]) -> float:
    """Return the share of characters that are right, where spaces do not count.

    The recognizer itself reads a third more spaces than there are: what loses some of them by chance looks better.
    """
    whole = [line.text for line in texts.lines(200, 1)]
    return texts.character_accuracy([line.replace(" ", "") for line in read], [line.replace(" ", "") for line in whole])


@functools.cache
def _metadata() -> dict[str, str]:
    return dict(oir.load(CACHE / "ppocr" / "rec.onnx").metadata_props)


def _pages() -> tuple[texts.Page, ...]:
    return texts.pages(400, 1)


def detection(run: Run) -> list[np.ndarray]:
    """Return the detector's maps of 400 pages with 2,253 lines."""
    return [next(iter(run({"x": page.pixels}).values()))[0, 0] for page in _pages()]


def drawn(found: list[np.ndarray], _: list[np.ndarray]) -> float:
    """Return the mean intersection over union of the boxes that are found with the lines that were drawn."""
    return overlap([texts.painted(texts.rectangles(p), p.shape) for p in found], [page.text for page in _pages()])


def lines_found(found: list[np.ndarray], _: list[np.ndarray]) -> float:
    """Return the F-measure of the drawn lines: found is one that a box overlaps by more than a half (ICDAR 2015)."""
    pages = _pages()
    right = [texts.matches(texts.rectangles(p), page.lines) for p, page in zip(found, pages, strict=True)]
    boxes = sum(len(texts.rectangles(p)) for p in found)
    return 2 * sum(right) / (boxes + sum(len(page.lines) for page in pages))


def found_in_float32(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Return the mean intersection over union with what the float32 model finds, pixel by pixel, before boxes."""
    return overlap([p > 0.3 for p in found], [p > 0.3 for p in expected])


def overlap(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Return the mean intersection over union of masks."""
    pairs = zip(found, expected, strict=True)
    return float(np.mean([(a & b).sum() / max((a | b).sum(), 1) for a, b in pairs]))


def similarity(run: Run) -> list[float]:
    """Return the similarities of all pairs of 80 sentences."""
    vectors = np.array([_embedding(run, sentence) for sentence in texts.sentences(200, 0)[120:]])
    return list((vectors @ vectors.T)[np.triu_indices(len(vectors), 1)])


def spearman(found: list[float], expected: list[float]) -> float:
    """Return Spearman's correlation."""
    return float(np.corrcoef(*(np.argsort(np.argsort(values)) for values in (found, expected)))[0, 1])


def _embedding(run: Run, sentence: str) -> np.ndarray:
    feeds = tokens(sentence)
    hidden, mask = next(iter(run(feeds).values()))[0], feeds["attention_mask"][0][:, None]
    mean = (hidden * mask).sum(0) / mask.sum()
    return np.asarray(mean / np.linalg.norm(mean))


def tokens(sentence: str) -> dict[str, np.ndarray]:
    found = _tokenizer().encode(sentence)
    values = {"input_ids": found.ids, "attention_mask": found.attention_mask, "token_type_ids": found.type_ids}
    return {name: np.array([value]) for name, value in values.items()}


@functools.cache
def _tokenizer() -> Any:
    return texts.tokenizer()


def classification(run: Run) -> list[np.ndarray]:
    """Return which of the 360 test images are told right, then of these and the same moved by a pixel, 9 x 360."""
    images, labels = digits_module().digits()[1]
    padded = np.pad(images.numpy(), [(0, 0), (0, 0), (1, 1), (1, 1)])
    moved = [padded[:, :, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    right = [run({"x": np.ascontiguousarray(x)})["y"].argmax(1) == labels.numpy() for x in (images.numpy(), *moved)]
    return [right[0], np.concatenate(right[1:])]


def share(right: list[np.ndarray], _: list[np.ndarray]) -> float:
    """Return the share of the images that are told right."""
    return float(right[0].mean())


def share_moved(right: list[np.ndarray], _: list[np.ndarray]) -> float:
    """Return the share that is told right of the images and of those moved by a pixel."""
    return float(right[1].mean())


@functools.cache
def digits_module() -> Any:
    sys.path.insert(0, str(ROOT / "examples"))
    import quantize_digits

    return quantize_digits


def _digits_file(name: str) -> Path:
    path = FOLDER / f"{name}.onnx"
    if not path.exists():
        digits_module().export(digits_module().network(name), path)
    return path


def _on_digits(name: str) -> Task:
    def calibration(name: str) -> list[dict[str, np.ndarray]]:
        return [{name: images} for images in digits_module().calibration()]

    file = functools.partial(_digits_file, name)
    scores = {"images right": share, "of them, moved too": share_moved}
    return Task(file, calibration, classification, scores, int4=True, transformer=name == "vit")


TASKS = {
    "PP-OCRv4 recognition": Task(
        lambda: CACHE / "ppocr" / "rec.onnx",
        # One width, for the calibrators that can take no other.
        lambda name: [{name: texts.widened(line.pixels, 320)} for line in texts.lines(32, 2)],
        recognition,
        {"characters right": characters_right, "without spaces": letters_right},
        transformer=True,
    ),
    "PP-OCRv4 detection": Task(
        lambda: CACHE / "ppocr" / "det.onnx",
        lambda name: [{name: page.pixels} for page in texts.pages(16, 2)],
        detection,
        {
            "F-measure of lines": lines_found,
            "IoU with the lines": drawn,
            "IoU of pixels with float32": found_in_float32,
        },
    ),
    "MiniLM": Task(
        lambda: CACHE / "exported" / "minilm.onnx",
        lambda _: [tokens(sentence) for sentence in texts.sentences(200, 0)[:64]],
        similarity,
        {"Spearman with float32": spearman},
        int4=True,
        transformer=True,
    ),
    "digits CNN": _on_digits("cnn"),
    "digits ViT": _on_digits("vit"),
}


def ours(task: Task) -> dict[str, Options]:
    """Return what is measured of optc."""
    int8 = {
        "optc int8": Options(),
        "optc int8, AdaRound": Options(rounding="adaround"),
        "optc int8, percentile": Options(method="percentile"),
        "optc int8, mse": Options(method="mse"),
        "optc int8, entropy": Options(method="entropy"),
        "optc int8, not smoothed": Options(smooth=None),
        "optc int8, biases not corrected": Options(correct_bias=False),
        "optc int8, equalized": Options(equalize=True),
        "optc int8, activations in 16 bits": Options(activations="uint16"),
        "optc int8 dynamic": Options("int8-dynamic"),
    }
    int4 = {
        "optc int4 weights, nearest": Options("int4-weights", rounding="nearest"),
        "optc int4 weights, nearest, zero points": Options("int4-weights", zero_points=True, rounding="nearest"),
        "optc int4 weights, GPTQ": Options("int4-weights", rounding="gptq"),
    }
    return int8 | (int4 if task.int4 else {})


def runner(model: Any) -> Run:
    """Return a model as a function, run by onnxruntime as it is written."""
    return OnnxRuntime(oir.from_proto(model) if isinstance(model, onnx.ModelProto) else model, 1, literal=True).run


def measure(name: str) -> None:
    """Measure one task and keep each figure as soon as it is there."""
    task, results = TASKS[name], FOLDER / f"{re.sub('[^a-z0-9]+', '-', name.lower())}.json"
    found: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    file = task.file()
    model = optc.optimize(file)
    calls = task.calibration(str(model.graph.inputs[0].name))
    quantizer = Quantizer(model, data.load(calls, specs(model.graph.inputs)))
    reference = task.see(runner(model))

    def keep(what: str, make: Callable[[], Any]) -> None:
        if what in found:
            return
        seen = task.see(runner(make()))
        found[what] = {unit: score(seen, reference) for unit, score in task.scores.items()}
        print(f"{name}: {what}: {found[what]}", flush=True)
        results.write_text(json.dumps(found, indent=1))

    def keep_of_peer(what: str, make: Callable[[], onnx.ModelProto]) -> None:
        try:
            keep(what, make)
        except Exception as error:  # the peer raises errors of every kind for what it cannot do
            found[what] = f"fails: {type(error).__name__}"
            print(f"{name}: {what}: {found[what]}", flush=True)
            results.write_text(json.dumps(found, indent=1))

    keep("float32", lambda: model)
    variants = ours(task)
    first = next(iter(variants))
    keep(first, lambda: quantizer.run(variants[first]).model)
    for method in peers.CALIBRATORS:
        how = functools.partial(peers.onnxruntime_static, file, calls, method)
        keep_of_peer(f"onnxruntime {method}", how)
        if isinstance(found[f"onnxruntime {method}"], str):
            keep_of_peer(f"onnxruntime {method}, per tensor", functools.partial(how, per_channel=False))
    for what, accurate in (("NNCF", False), ("NNCF, accurate bias correction", True)):
        how = functools.partial(peers.nncf_static, file, calls, transformer=task.transformer, accurate=accurate)
        keep_of_peer(what, how)
    for what, options in variants.items():
        keep(what, lambda options=options: quantizer.run(options).model)


def tables() -> str:
    """Return the tables of what has been measured."""
    parts = []
    for name, task in TASKS.items():
        path = FOLDER / f"{re.sub('[^a-z0-9]+', '-', name.lower())}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        parts += [f"### {name}", "", f"| quantizer | {' | '.join(task.scores)} |", f"|---{'|---:' * len(task.scores)}|"]
        first = ("float32", next(iter(ours(task))))
        for what, scores in sorted(found.items(), key=lambda row: row[0] not in first):
            cells = [scores] if isinstance(scores, str) else [f"{value:.4f}" for value in scores.values()]
            parts.append(f"| {what} | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def main() -> None:
    """Measure, and write the tables into the page."""
    parser = argparse.ArgumentParser(description="Measure the accuracy of quantized models.")
    parser.add_argument("--only", default="", help="tasks whose name matches this expression")
    parser.add_argument("--report", action="store_true", help="only write the tables from what was measured")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not options.report:
        for name in TASKS:
            if re.search(options.only, name, re.IGNORECASE):
                measure(name)
    texts.write_between(PAGE, "accuracy", tables())


if __name__ == "__main__":
    main()
