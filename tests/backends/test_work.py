"""The arithmetic that the report states for each kernel."""

import onnx_ir as oir
import pytest

import optc
from optc.backends.cpu.build import CpuBackend
from optc.backends.cpu.target import resolve

MODELS = {
    "gemm": (
        "(float[30,40] a, float[40,50] b) => (float[30,50] y) { m = MatMul(a, b) y = Relu(m) }",
        2 * 30 * 40 * 50,
    ),
    "conv": (
        "(float[1,8,20,21] x, float[12,8,3,3] w) => (float[1,12,18,19] y) { y = Conv(x, w) }",
        2 * 12 * 18 * 19 * 8 * 9,
    ),
    "depthwise": (
        "(float[1,8,20,20] x, float[8,1,3,3] w) => (float[1,8,18,18] y) { y = Conv<group=8>(x, w) }",
        2 * 8 * 18 * 18 * 9,
    ),
    "softmax": ("(float[30,40] x) => (float[30,40] y) { y = Softmax(x) }", 0),
    "symbolic": ("(float[n,40] a, float[40,50] b) => (float[n,50] y) { y = MatMul(a, b) }", 0),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_report_counts_multiply_adds_as_two(name):
    text, expected = MODELS[name]
    model = optc.optimize(
        oir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 20]> {name} {text}'), portable=False
    )
    kernels = [kernel.describe() for kernel in CpuBackend(resolve("cpu")).schedule(model).kernels]
    assert sum(kernel.get("operations", 0) for kernel in kernels) == expected
