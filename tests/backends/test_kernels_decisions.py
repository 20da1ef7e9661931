"""Decisions about kernels: what is asked, what is refused, and that every option of every template is right."""

from __future__ import annotations

import re

import numpy as np
import onnx.parser
import onnxruntime
import pytest
import tvm
from tvm import relax

from optc.backends.cpu.build import CpuBackend, generate
from optc.backends.cpu.single import aligned
from optc.backends.cpu.target import resolve
from optc.backends.kernels import schedule
from optc.backends.kernels.decisions import IllegalDecisionError, counts, decide, deciding
from optc.frontend.onnx import load

CPU = resolve("cpu")
CASES = {
    "matmul": """g (float[2, 19, 70] x) => (float[2, 19, 50] y) <float[70, 50] w, float[50] b>
        { m = MatMul(x, w)  a = Add(m, b)  y = Relu(a) }""",
    "long sums": """g (float[70, 1030] x) => (float[70, 40] y) <float[1030, 40] w> { y = MatMul(x, w) }""",
    "conv": """g (float[1, 20, 13, 11] x) => (float[1, 36, 7, 6] y) <float[36, 20, 3, 3] w, float[36] b>
        { c = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(x, w, b)  y = Relu(c) }""",
    "pointwise": """g (float[1, 24, 28, 27] x, float[1, 40, 28, 27] r) => (float[1, 40, 28, 27] y)
        <float[40, 24, 1, 1] w> { c = Conv(x, w)  y = Add(c, r) }""",
    "winograd": """g (float[1, 24, 29, 30] x) => (float[1, 40, 29, 30] y) <float[40, 24, 3, 3] w, float[40] b>
        { c = Conv<pads = [1, 1, 1, 1]>(x, w, b)  y = Relu(c) }""",
    "depthwise": """g (float[1, 20, 15, 17] x) => (float[1, 20, 15, 17] y) <float[20, 1, 3, 3] w>
        { y = Conv<group = 20, pads = [1, 1, 1, 1]>(x, w) }""",
    "attention": """g (float[1, 2, 37, 24] q, float[1, 2, 45, 24] k, float[1, 2, 45, 24] v) => (float[1, 2, 37, 24] y)
        { y = Attention(q, k, v) }""",
}


class Forced:
    """Answers every question of lowering with ``layouts``, and of kernels by name with ``kernels``."""

    def __init__(self, layouts, turn=0):
        self.layouts, self.turn, self.spaces = layouts, turn, {}

    def layout(self, workload):
        return self.layouts

    def trace(self, workload):
        return ""

    def holds(self, workload, space):
        return True

    def schedule(self, workload):
        space = self.spaces.get(workload.key)
        return (
            {n: k.options[(self.turn + i) % len(k.options)] for i, (n, k) in enumerate(space.knobs.items())}
            if space
            else {}
        )


def build(model, tuning):
    module, lowered = CpuBackend(CPU, tuning=tuning).fuse(load(model))
    module, kernels = schedule.schedule(module, CPU, tuning)
    machine = relax.VirtualMachine(generate(module, CPU).executable, tvm.cpu())
    weights = [aligned(w) for w in lowered.weights.values()]
    clock = tvm.runtime.tensor(np.zeros(0, np.int64))
    return lambda feeds: machine["main"](*map(aligned, feeds), *weights, clock)[0].numpy(), kernels


def with_weights(text):
    """Return the model of ``text`` with random weights, as the parser takes none without values."""
    head, _, rest = text.partition("<")
    names, _, body = rest.partition(">")
    if "{" in head:
        return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> {text}')
    generator = np.random.default_rng(1)
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> {head} {body}')
    for shape, name in re.findall(r"float\[([\d, ]+)\] (\w+)", names):
        dims = [int(d) for d in shape.split(",")]
        array = generator.standard_normal(dims).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


@pytest.mark.parametrize("name", CASES)
def test_every_option_of_every_knob_is_right(name):
    model = with_weights(CASES[name])
    generator = np.random.default_rng(2)
    feeds = {
        value.name: generator.standard_normal([d.dim_value for d in value.type.tensor_type.shape.dim]).astype(
            np.float32
        )
        for value in model.graph.input
    }
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, feeds)
    layouts = {"winograd": [{"winograd": w, "vectors": v} for w, v in ((0, 1), (2, 2), (4, 3))]}
    asked = set()
    for layout in layouts.get(
        name, [{"vectors": v} for v in (1, 2, 3, 4)] if name not in ("depthwise", "attention") else [{}]
    ):
        tuning = Forced(layout)
        _, kernels = build(model, tuning)
        tuning.spaces = {k.workload.key: k.space for k in kernels}
        turns = max(len(knob.options) for k in kernels for knob in k.space.knobs.values())
        # Every option once; several panel widths share the turns among them.
        for turn in range(0, turns, 1 if len(layout) != 1 else 3):
            tuning.turn = turn
            run, kernels = build(model, tuning)
            asked |= {(n, v) for k in kernels for n, v in k.space.decisions.items()}
            got = run(list(feeds.values()))
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=str(kernels))
    assert len(asked) > 4


def test_without_decisions_the_analytic_choice_is_taken():
    assert decide("rows", 4, (1, 2)) == 4


def test_what_is_asked_is_recorded():
    with deciding({"rows": 2}) as space:
        assert decide("rows", 4, (1, 2), float) == 2
        assert decide("rows", 5, (5,)) == 2, "the first answer stands"
        assert decide("fixed", 1, ()) == 1
    assert space.decisions == {"rows": 2}
    assert space.knobs["rows"].options == (1, 2, 4)
    assert space.knobs["rows"].cost(2) == 0.5


def test_an_illegal_decision_is_an_error_or_refused():
    with deciding({"rows": 3}), pytest.raises(IllegalDecisionError, match="rows=3 is not among 1, 2, 4"):
        decide("rows", 4, (1, 2))
    with deciding({"rows": 3}, strict=False) as space:
        assert decide("rows", 4, (1, 2)) == 4
    assert space.refused == ["rows"]


def test_numbers_of_parts():
    assert counts(9) == [1, 3, 2, 6, 4, 8]
