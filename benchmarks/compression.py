"""Accuracy of quantized models, beside onnxruntime's static quantizer with each of its calibrators, and NNCF.

    python benchmarks/compression.py [--only REGEX] [--report]

Real weights (PP-OCRv4, MiniLM) and networks trained on scikit-learn's digits (examples/quantize_digits.py). Calibration
and test data are different. All models are run by onnxruntime as they are written, so that only the quantizers differ.
Behind each score stands how far it is ahead of optc's first one, with 1.96 standard errors over resampled test data.
Measurements are kept in build/compression/ and merged; --report only writes the tables of docs/compression.md.
"""

from __future__ import annotations

import argparse
import functools
import itertools
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
Score = Callable[[list[Any], list[Any]], np.ndarray]
"""From what is seen of a model and of float32 to ``[items, 2]``: what is right of each item of test data, of how much.

The score is the sum of the first column over the sum of the second. Items are what is drawn independently.
"""
RESAMPLED = 1000
PAGES, OTHER_PAGES = 400, 200
CUTS, GROWTHS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5), (1.4, 1.6, 1.8, 2.0, 2.2)
"""Where the detector's map may be cut, and by what boxes may grow."""


@dataclass(frozen=True)
class Task:
    """A model file, calibration data, what is seen of a model on test data, and scores of that (more is better)."""

    file: Callable[[], Path]
    calibration: Callable[[str], list[dict[str, np.ndarray]]]
    see: Callable[[Run], list[Any]]
    scores: Mapping[str, Score]
    int4: bool = False
    transformer: bool = False


def score(parts: np.ndarray) -> float:
    """Return the score of items ``[items, 2]``."""
    right, whole = parts.sum(0)
    return float(right / whole)


def ahead(parts: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Return how much higher the score of ``parts`` is, and 1.96 standard errors of that by resampling items.

    Both are of the same items (paired bootstrap: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993).
    """
    random = np.random.default_rng(0)
    chosen = random.integers(len(parts), size=(RESAMPLED, len(parts)))
    differences = [score(parts[rows]) - score(other[rows]) for rows in chosen]
    return score(parts) - score(other), 1.96 * float(np.std(differences))


def recognition(run: Run) -> list[str]:
    """Return what is read of 200 drawn lines."""
    characters = ["blank", *_metadata()["character"].splitlines(), " "]
    return [texts.decode(next(iter(run({"x": line.pixels}).values()))[0], characters) for line in texts.lines(200, 1)]


def characters_right(read: list[str], _: list[str]) -> np.ndarray:
    """Return how many characters of each line are right."""
    return _right(read, [line.text for line in texts.lines(200, 1)])


def letters_right(read: list[str], _: list[str]) -> np.ndarray:
    """Return how many characters of each line are right, where spaces do not count.

    The recognizer itself reads a third more spaces than there are: what loses some of them by chance looks better.
    """
    whole = [line.text for line in texts.lines(200, 1)]
    return _right([line.replace(" ", "") for line in read], [line.replace(" ", "") for line in whole])


def _right(read: list[str], expected: list[str]) -> np.ndarray:
    return np.array([(len(b) - texts.edits(a, b), len(b)) for a, b in zip(read, expected, strict=True)])


@functools.cache
def _metadata() -> dict[str, str]:
    return dict(oir.load(CACHE / "ppocr" / "rec.onnx").metadata_props)


def _pages() -> tuple[texts.Page, ...]:
    return texts.pages(PAGES, 1)


def _other_pages() -> tuple[texts.Page, ...]:
    return texts.pages(OTHER_PAGES, 3)


def detection(run: Run) -> list[np.ndarray]:
    """Return the detector's maps of 400 pages with 2,253 lines, then of 200 others."""
    return [next(iter(run({"x": page.pixels}).values()))[0, 0] for page in (*_pages(), *_other_pages())]


def drawn(found: list[np.ndarray], _: list[np.ndarray]) -> np.ndarray:
    """Return the intersection over union of the boxes that are found on each page with the lines that were drawn."""
    boxes = [texts.painted(texts.rectangles(p), p.shape) for p in found[:PAGES]]
    return overlap(boxes, [page.text for page in _pages()])


def lines_found(found: list[np.ndarray], _: list[np.ndarray]) -> np.ndarray:
    """Return the F-measure of the drawn lines: found is one that a box overlaps by more than a half (ICDAR 2015)."""
    return _lines_found(found[:PAGES], _pages())


def lines_found_at_best(found: list[np.ndarray], _: list[np.ndarray]) -> np.ndarray:
    """Return the F-measure where the map is cut, and boxes grow, as is best for the same model on other pages.

    A map that is shifted as a whole, by luck, gains nothing here.
    """
    points = itertools.product(CUTS, GROWTHS)
    best = max(points, key=lambda point: score(_lines_found(found[PAGES:], _other_pages(), *point)))
    return _lines_found(found[:PAGES], _pages(), *best)


def _lines_found(maps: list[np.ndarray], pages: tuple[texts.Page, ...], *point: float) -> np.ndarray:
    parts = []
    for found, page in zip(maps, pages, strict=True):
        boxes = texts.rectangles(found, *point)
        parts.append((2 * texts.matches(boxes, page.lines), len(boxes) + len(page.lines)))
    return np.array(parts)


def found_in_float32(found: list[np.ndarray], expected: list[np.ndarray]) -> np.ndarray:
    """Return the intersection over union with what float32 finds on each page, pixel by pixel, before boxes."""
    return overlap([p > 0.3 for p in found[:PAGES]], [p > 0.3 for p in expected[:PAGES]])


def overlap(found: list[np.ndarray], expected: list[np.ndarray]) -> np.ndarray:
    """Return the intersection over union of each of the masks."""
    pairs = zip(found, expected, strict=True)
    return np.array([((a & b).sum() / max((a | b).sum(), 1), 1) for a, b in pairs])


def similarity(run: Run) -> list[float]:
    """Return the similarities of all pairs of 80 sentences."""
    vectors = np.array([_embedding(run, sentence) for sentence in texts.sentences(200, 0)[120:]])
    return list((vectors @ vectors.T)[np.triu_indices(len(vectors), 1)])


def spearman(found: list[float], expected: list[float]) -> np.ndarray:
    """Return Spearman's correlation, of one item: pairs of sentences are not independent of each other."""
    ranks = (np.argsort(np.argsort(values)) for values in (found, expected))
    return np.array([(np.corrcoef(*ranks)[0, 1], 1)])


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
    """Return which of the 360 test images are told right, and each moved by no or one pixel, 10 x 360."""
    images, labels = digits_module().digits()[1]
    padded = np.pad(images.numpy(), [(0, 0), (0, 0), (1, 1), (1, 1)])
    moved = [padded[:, :, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    return [run({"x": np.ascontiguousarray(x)})["y"].argmax(1) == labels.numpy() for x in (images.numpy(), *moved)]


def told(right: list[np.ndarray], _: list[np.ndarray]) -> np.ndarray:
    """Return whether each image is told right."""
    return np.array([(one, 1) for one in right[0]])


def told_moved(right: list[np.ndarray], _: list[np.ndarray]) -> np.ndarray:
    """Return how many of each image's nine places are told right."""
    return np.array([(one, len(right) - 1) for one in np.sum(right[1:], axis=0)])


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
    scores = {"images right": told, "moved too": told_moved}
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
            "F-measure, its own cut": lines_found_at_best,
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
        found[what] = {unit: parts(seen, reference).tolist() for unit, parts in task.scores.items()}
        scores = {unit: round(score(np.array(parts)), 4) for unit, parts in found[what].items()}
        print(f"{name}: {what}: {scores}", flush=True)
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
        own = next(iter(ours(task)))
        heads = [cell for unit in task.scores for cell in (unit, "ahead of ours by")]
        parts += [f"### {name}", "", f"| quantizer | {' | '.join(heads)} |", f"|---{'|---:' * len(heads)}|"]
        for what, seen in sorted(found.items(), key=lambda row: row[0] not in ("float32", own)):
            cells = [seen] if isinstance(seen, str) else _cells(seen, found[own], first=what == own)
            parts.append(f"| {what} | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def _cells(seen: dict[str, Any], own: dict[str, Any], *, first: bool) -> list[str]:
    cells = []
    for unit, parts in seen.items():
        gain, error = ahead(np.array(parts), np.array(own[unit]))
        certain = f" ± {error:.4f}" if len(parts) > 1 else ""
        cells += [f"{score(np.array(parts)):.4f}", "" if first else f"{gain:+.4f}{certain}"]
    return cells


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
