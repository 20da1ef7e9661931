"""Workloads: what their fingerprints are made of, and that those of today are found tomorrow."""

from __future__ import annotations

import json

import onnx.parser
import pytest

from optc.backends.cpu.build import CpuBackend
from optc.backends.cpu.target import resolve
from optc.backends.kernels import schedule, workload
from optc.backends.kernels.workload import Workload
from optc.frontend.onnx import load

CONV = {
    "op": "conv",
    "batch": 1,
    "out": [56, 56],
    "filters": [64, 64, 3, 3],
    "groups": 1,
    "strides": [1, 1],
    "dilations": [1, 1],
    "padded": 1,
    "last": 1,
    "dtype": "float32",
}


def test_golden_fingerprints():
    """A change here makes every log ever written unusable: count workload.VERSION up only if there is no other way."""
    assert Workload(CONV).core_key == "w1-c2b88429cd4051cbf75c"
    assert Workload(CONV, ("bias", "relu")).key == "w1-8032e7be02ba1e4aa00f"
    assert (
        Workload({"op": "matmul", "m": 128, "k": 768, "n": 3072, "dtype": "float32"}).key == "w1-566b9ac0d11f15df5c98"
    )


def kernels(text):
    model = load(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> {text}'))
    target = resolve("x86-64-v3")
    return schedule.schedule(CpuBackend(target).fuse(model)[0], target)[1]


ZEROS = ", ".join(["0.5"] * 36)
CONVOLUTION = f"""g (float[1, 2, 9, 8] x, float[1, 2, 9, 8] r) => (float[1, 2, 9, 8] y)
    <float[2, 2, 3, 3] w = {{{ZEROS}}}>
    {{ c = Conv<pads = [1, 1, 1, 1]>(x, w)  s = Add(c, r)  y = Relu(s) }}"""


def test_golden_workloads_of_a_model():
    """What the compiler makes of a model: the same words after a refactoring."""
    found = {k.workload.operator: k.workload for k in kernels(CONVOLUTION)}
    conv = found["conv"]
    assert conv.core == CONV | {"out": [9, 8], "filters": [2, 2, 3, 3], "last": 0}
    assert conv.epilogue == ("add", "relu")
    assert conv.layout == {}
    assert conv.key == "w1-85f38549f9b47b3d58a2"


def test_a_kernel_without_description_is_told_by_its_blocks():
    text = "{ y = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x) }"
    (pool,) = [k for k in kernels(f"g (float[1, 3, 8, 8] x) => (float[1, 3, 4, 4] y) {text}") if k.wanted]
    assert pool.workload.core["op"] == "window"
    assert pool.workload.core["strides"] == [2, 2]
    (add,) = kernels("g (float[4] x, float[4] r) => (float[4] y) { y = Add(x, r) }")
    assert add.workload.core == {"op": "generic", "stages": ["add"], "tensors": ["float32[4]"] * 3}


def test_only_what_is_computed_counts():
    named = kernels(CONVOLUTION.replace("c =", "other =").replace("Add(c", "Add(other"))
    assert {k.workload.key for k in named} == {k.workload.key for k in kernels(CONVOLUTION)}
    assert Workload(CONV, layout={"vectors": 1}).key == Workload(CONV, layout={"vectors": 2}).key
    assert Workload(CONV, ("relu",)).key != Workload(CONV, ("clip",)).key
    assert Workload(CONV, ("relu",)).core_key == Workload(CONV).core_key


@pytest.mark.parametrize("key", CONV)
def test_every_part_of_the_core_counts(key):
    assert Workload({k: v for k, v in CONV.items() if k != key}).core_key != Workload(CONV).core_key


def test_symbolic_sizes_are_not_fixed():
    assert Workload(CONV).fixed
    assert not Workload(CONV | {"batch": None}).fixed
    assert not Workload(CONV | {"out": [None, 4]}).fixed
    assert not Workload({"op": "generic", "tensors": ["float32[?]"]}).fixed


def test_a_workload_survives_json():
    original = Workload(CONV, ("bias", "relu"), {"vectors": 2})
    assert workload.parse(json.loads(json.dumps(original.describe()))) == original
    assert str(original).startswith("conv batch=1 dilations=1x1")


@pytest.mark.parametrize(
    "damage", [{"core": {}}, {"core": 3}, {"core": {"op": 4}}, {"layout": {"a": "b"}}, {"epilogue": 3}]
)
def test_what_is_no_workload_is_refused(damage):
    data = Workload(CONV).describe() | damage
    with pytest.raises((KeyError, TypeError, ValueError)):
        workload.parse(data)
