"""The default pipeline on real models: canonical after every pass, same results, no debris, quick."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from optc.frontend.onnx import load
from optc.passes import bisection, pipeline
from optc.passes.observer import VerifyAfter

pytestmark = pytest.mark.models

ROOT = Path(os.environ.get("OPTC_MODEL_CACHE") or Path(__file__).resolve().parents[2] / ".cache" / "models")


def load_cached(name: str):
    path = ROOT / f"{name}.onnx"
    if not path.is_file():
        pytest.skip(f"{name} is not in the model cache")
    return load(path)


IMAGE = {"x": [(1, 3, 48, 96), (2, 3, 48, 160)]}
TEXT = {"input_ids": [(2, 7), (1, 12)], "attention_mask": [(2, 7), (1, 12)], "token_type_ids": [(2, 7), (1, 12)]}

# Nodes left, and operators that must not be.
CASES = {
    "ppocr/cls": ({"x": [(1, 3, 48, 192), (2, 3, 48, 192)]}, 125, ()),
    "ppocr/rec": (IMAGE, 160, ("Shape", "Gather", "BatchNormalization")),
    "exported/bert_6": ({name: [(1, 128)] for name in TEXT}, 130, ("Shape", "Expand", "Concat")),
    "silero/silero_vad_16k_sequence": ({"input": [(3, 576)], "h": [(1, 1, 128)], "c": [(1, 1, 128)]}, 25, ("Pow",)),
}


@pytest.mark.parametrize("name", CASES)
def test_results_and_size(name):
    shapes, most, never = CASES[name]
    model = load_cached(name)
    run = bisection.default_runner()
    generator = np.random.default_rng(0)
    feeds = []
    for index in range(len(next(iter(shapes.values())))):
        feed = {}
        for value in model.graph.inputs:
            shape = shapes[value.name][index]
            integer = value.dtype is not None and value.dtype.is_integer()
            feed[value.name] = (
                generator.integers(0, 2, shape) if integer else generator.standard_normal(shape, np.float32)
            )
        feeds.append(feed)
    expected = [run(model, feed) for feed in feeds]
    pipeline.run(model, observers=[VerifyAfter()])
    for feed, want in zip(feeds, expected, strict=True):
        for a, b in zip(want, run(model, feed), strict=True):
            assert bisection.is_close(a, b, 2e-5)
    left = Counter(node.op_type for node in model.graph.all_nodes())
    assert left.total() <= most
    assert not set(never) & set(left)


# Half of the target each: it is for an idle machine, and the simplify phases are most of a pipeline.
@pytest.mark.parametrize(("name", "seconds"), [("exported/bert_base", 3), ("ppocr/rec", 2), ("exported/resnet50", 1.5)])
def test_simplification_is_quick(name, seconds):
    model = load_cached(name)
    started = time.process_time()
    pipeline.run(model)
    assert time.process_time() - started < seconds


@pytest.mark.parametrize("name", ["ppocr/cls", "ppocr/det", "ppocr/rec", "exported/bert_6"])
def test_no_more_nodes_than_onnxruntime_leaves(name, tmp_path):
    model = load_cached(name)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(ROOT / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
    theirs = load_nodes(tmp_path / "optimized.onnx")
    pipeline.run(model)
    assert pipeline.count_nodes(model) <= theirs


def load_nodes(path: Path) -> int:
    import onnx

    return len(onnx.load(str(path), load_external_data=False).graph.node)
