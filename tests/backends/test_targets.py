"""Every template for every kind of machine: the instructions of its inner loops, and its results where they run here.

Targets with tiny caches take the paths that only large models take otherwise: blocks, chunks, strips.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx.parser
import onnxruntime
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from optc.backends.cpu.build import CpuBackend, generate
from optc.backends.cpu.target import resolve
from optc.backends.kernels.templates import TEMPLATES
from optc.frontend.onnx import load

F = np.float32
Sizes = Sequence[int]


@dataclass(frozen=True)
class Machine:
    """A target, its full vector registers in assembly, and what it multiplies and adds floats and 8-bit integers with.

    ``bytes_`` are for values on one side of their zero point, ``integers`` for values on both.
    """

    target: str
    vector: str
    floats: str
    bytes_: str
    integers: str

    @property
    def pairs(self) -> str:
        """What it multiplies and adds 16-bit integers with: of many sums in a row LLVM makes trees of plain sums."""
        return r"smlal2?" if self.vector.startswith("v") else r"v?pmaddwd|(\{vex\}\s+)?vpdpwssd"


MACHINES = {
    "sse4.2": Machine("nehalem", r"%xmm\d", r"mulps", r"pmaddubsw", r"pmaddwd"),
    "avx2": Machine("haswell", r"%ymm\d", r"vfn?m(add|sub)\d+ps", r"vpmaddubsw", r"vpmaddwd"),
    "avx512": Machine("skylake-avx512", r"%zmm\d", r"vfn?m(add|sub)\d+ps", r"vpmaddubsw", r"vpmaddwd"),
    "vnni": Machine("icelake-server", r"%zmm\d", r"vfn?m(add|sub)\d+ps", r"vpdpbusd", r"vpdpbusd"),
    "avxvnni": Machine("alderlake", r"%ymm\d", r"vfn?m(add|sub)\d+ps", r"\{vex\}\s+vpdpbusd", r"\{vex\}\s+vpdpbusd"),
    "neon": Machine("aarch64", r"v\d+\.4s", r"fml[as]", r"smlal2?", r"smlal2?"),
    "dotprod": Machine("aarch64-linux-gnu:neoverse-n1", r"v\d+\.4s", r"fml[as]", r"sdot", r"sdot"),
}
NAMES = ("exp", "exp2", "expm1", "log", "log1p", "log2", "pow", "erf", "tanh", "sin", "cos", "fma", "floor", "ceil")
LIBRARY = re.compile(r"\b(" + "|".join(NAMES) + r"|nearbyint|l?rint|round|trunc|fmod|fmax|fmin)f?\b(?=@|\s*$)", re.M)


@dataclass(frozen=True)
class Case:
    """A model: ``text`` with sizes to fill in, whose last inputs are constants where ``constants`` says how many.

    ``kind`` is "sums" where a loop adds products into registers, or "values" where it computes element by element;
    ``multiplies`` names the machine's instruction for that.
    """

    template: str
    text: str
    typical: Sizes
    sizes: Callable[[np.random.Generator], Sizes]
    constants: int = 0
    kind: str = "sums"
    multiplies: str = "floats"
    opset: int = 23

    def model(self, sizes: Sizes, rng: np.random.Generator) -> tuple[onnx.ModelProto, list[np.ndarray]]:
        """Return the model of these sizes, and random values for its inputs."""
        text = self.text
        for i, size in enumerate(sizes):
            text = text.replace(f"${i}", str(size))
        model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {self.opset}]> g {text}')
        values = {i.name: self._values(i.type.tensor_type, rng) for i in model.graph.input}
        for name in list(values)[len(values) - self.constants :]:
            model.graph.initializer.append(numpy_helper.from_array(values.pop(name), name))
            model.graph.input.pop()
        return model, list(values.values())

    @staticmethod
    def _values(kind: onnx.TypeProto.Tensor, rng: np.random.Generator) -> np.ndarray:
        shape = [d.dim_value for d in kind.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        if kind.elem_type == onnx.TensorProto.INT4:
            return rng.integers(-8, 8, shape).astype(dtype)
        if dtype.kind in "iu":
            info = np.iinfo(dtype)
            return rng.integers(info.min, info.max, shape, dtype, endpoint=True)
        return rng.standard_normal(shape).astype(dtype)


def between(*ranges: tuple[int, int]) -> Callable[[np.random.Generator], Sizes]:
    """Return a function that draws sizes, ends included."""
    return lambda rng: [int(rng.integers(low, high + 1)) for low, high in ranges]


MATRICES = between((5, 90), (1, 300), (1, 150))
CASES = {
    "packed product": Case(
        "contraction", "(float[$0, $1] x, float[$1, $2] w) => (float[$0, $2] y) { y = MatMul(x, w) }",
        (96, 256, 192), MATRICES, constants=1,
    ),
    "few rows": Case(
        "contraction", "(float[$0, $1] x, float[$1, $2] w) => (float[$0, $2] y) { y = MatMul(x, w) }",
        (4, 255, 192), between((1, 4), (1, 200), (1, 150)), constants=1,
    ),
    "one row": Case(
        "contraction", "(float[$0, $1] x, float[$1, $2] w) => (float[$0, $2] y) { y = MatMul(x, w) }",
        (1, 255, 192), between((1, 1), (1, 200), (1, 150)), constants=1,
    ),
    "product": Case(
        "contraction", "(float[$3, $0, $1] x, float[$3, $1, $2] w) => (float[$3, $0, $2] y) { y = MatMul(x, w) }",
        (96, 256, 192, 2), between((1, 60), (1, 200), (1, 90), (1, 3)),
    ),
    "transposed product": Case(
        "contraction", "(float[$1, $0] x, float[$2, $1] w) => (float[$0, $2] y) { y = Gemm<transA=1, transB=1>(x, w) }",
        (96, 256, 192), between((1, 60), (1, 200), (1, 90)),
    ),
    "convolution": Case(
        "contraction", """(float[$0, $1, $2, $3] x, float[$4, $1, $5, $5] w, float[$4] b) => (float[n, m, h, v] y)
        { y = Conv<strides=[2, 2], pads=[1, 1, 1, 1]>(x, w, b) }""",
        (1, 64, 29, 28, 96, 3), between((1, 2), (1, 40), (5, 20), (5, 20), (1, 50), (1, 5)), constants=2,
    ),
    "grouped dilated convolution": Case(
        "contraction", """(float[1, 6, $0, $1] x, float[9, 2, 3, 3] w) => (float[n, m, h, v] y)
        { y = Conv<group=3, dilations=[2, 1], pads=[2, 1, 2, 1]>(x, w) }""",
        (14, 40), between((3, 20), (2, 20)), constants=1, kind="",
    ),
    "convolution of a line": Case(
        "contraction", """(float[$0, $1, $2] x, float[$3, $1, 3] w) => (float[n, m, h] y)
        { y = Conv<pads=[1, 1]>(x, w) }""",
        (1, 64, 200, 96), between((1, 2), (1, 40), (1, 90), (1, 50)), constants=1,
    ),
    "convolution of a volume": Case(
        "contraction", """(float[1, $0, $1, $2, 6] x, float[$3, $0, 2, 3, 2] w) => (float[n, m, d, h, v] y)
        { y = Conv<strides=[1, 2, 1], pads=[0, 1, 1, 0, 1, 1]>(x, w) }""",
        (32, 8, 9, 96), between((1, 9), (2, 6), (3, 9), (1, 20)), constants=1,
    ),
    "transposed convolution": Case(
        "contraction", """(float[1, $0, $1, $2] x, float[$0, $3, $4, 3] w) => (float[n, m, h, v] y)
        { y = ConvTranspose<strides=[2, 2], pads=[0, 1, 0, 1]>(x, w) }""",
        (64, 14, 14, 32, 3), between((1, 20), (1, 9), (2, 9), (1, 12), (1, 4)), constants=1,
    ),
    "one row and weights of 4 bits": Case(
        "weight_only", """(float[$0, $1] x, int4[$1, $2] w, float[$3, $2] s) => (float[$0, $2] y)
        { d = DequantizeLinear<axis=0, block_size=32>(w, s) y = MatMul(x, d) }""",
        (1, 256, 192, 8), lambda rng: (1, 70, int(rng.integers(1, 150)), 3), constants=2,
    ),
    "few rows and weights of 4 bits": Case(
        "weight_only", """(float[$0, $1] x, int4[$1, $2] w, float[$3, $2] s) => (float[$0, $2] y)
        { d = DequantizeLinear<axis=0, block_size=32>(w, s) y = MatMul(x, d) }""",
        (4, 256, 192, 8), lambda rng: (4, 90, int(rng.integers(1, 150)), 3), constants=2,
    ),
    "many rows and weights of 4 bits": Case(
        "weight_only", """(float[$0, $1] x, int4[$1, $2] w, float[$3, $2] s) => (float[$0, $2] y)
        { d = DequantizeLinear<axis=0, block_size=32>(w, s) y = MatMul(x, d) }""",
        (96, 256, 192, 8), lambda rng: (90, 70, int(rng.integers(1, 150)), 3), constants=2,
    ),
    "one row and weights of 8 bits": Case(
        "weight_only", """(float[$0, $1] x, int8[$1, $2] w, float[$2] s) => (float[$0, $2] y)
        { d = DequantizeLinear<axis=1>(w, s) y = MatMul(x, d) }""",
        (1, 256, 192), between((1, 3), (1, 300), (1, 150)), constants=2,
    ),
    "winograd": Case(
        "winograd", """(float[$0, $1, $2, $3] x, float[$4, $1, 3, 3] w) => (float[n, m, h, v] y)
        { c = Conv<pads=[1, 1, 1, 1]>(x, w) y = Relu(c) }""",
        (1, 64, 56, 56, 64), between((1, 2), (32, 45), (12, 30), (12, 30), (32, 45)), constants=1,
    ),
    "depthwise convolution": Case(
        "window", """(float[$0, $1, $2, $3] x, float[$1, 1, 3, 3] w) => (float[n, m, h, v] y)
        { y = Conv<group=$1, pads=[1, 1, 1, 1]>(x, w) }""",
        (1, 64, 28, 28), between((1, 2), (2, 40), (1, 14), (1, 14)), constants=1, kind="floats",
    ),
    "largest of windows": Case(
        "window", """(float[$0, $1, $2, $3] x) => (float[n, m, h, v] y)
        { y = MaxPool<kernel_shape=[3, 2], strides=[2, 1], pads=[1, 1, 1, 0]>(x) }""",
        (1, 64, 28, 28), between((1, 2), (1, 40), (2, 14), (2, 14)), kind="",
    ),
    "mean of windows": Case(
        "window", """(float[$0, $1, $2, $3] x) => (float[n, m, h, v] y)
        { y = AveragePool<kernel_shape=[2, 3], strides=[1, 2], pads=[0, 1, 1, 1]>(x) }""",
        (1, 64, 28, 28), between((1, 2), (1, 40), (2, 14), (2, 14)), kind="",
    ),
    "attention": Case(
        "attention", """(float[1, $0, $1, $3] q, float[1, $0, $2, $3] k, float[1, $0, $2, $4] v)
        => (float[1, $0, $1, $4] y) { y = Attention(q, k, v) }""",
        (2, 96, 200, 256, 64), between((1, 3), (9, 60), (1, 90), (1, 70), (1, 70)),
    ),
    "attention of one query": Case(
        "attention", """(float[1, $0, $1, $3] q, float[1, $0, $2, $3] k, float[1, $0, $2, $4] v)
        => (float[1, $0, $1, $4] y) { y = Attention(q, k, v) }""",
        (2, 1, 200, 256, 64), between((1, 3), (1, 2), (1, 90), (1, 70), (1, 70)),
    ),
    "integer product": Case(
        "integer_contraction", """(uint8[$0, $1] x, int8[$1, $2] w) => (int32[$0, $2] y) { y = MatMulInteger(x, w) }""",
        (96, 256, 192), between((1, 60), (1, 200), (1, 90)), constants=1, multiplies="bytes_",
    ),
    "integer convolution": Case(
        "integer_contraction", """(uint8[1, $0, $1, $2] x, int8[$3, $0, 3, 3] w) => (int32[n, m, h, v] y)
        { y = ConvInteger<strides=[2, 2], pads=[1, 1, 1, 1]>(x, w) }""",
        (64, 14, 14, 96), between((1, 40), (1, 14), (1, 14), (1, 40)), constants=1, multiplies="bytes_",
    ),
    "integer product around zero": Case(
        "integer_contraction", """(uint8[$0, $1] x, int8[$1, $2] w) => (int32[$0, $2] y)
        { z = Constant<value = uint8 {121}>() y = MatMulInteger(x, w, z) }""",
        (96, 256, 192), between((1, 60), (1, 200), (1, 90)), constants=1, multiplies="integers",
    ),
    "integer depthwise convolution": Case(
        "integer_depthwise", """(uint8[$0, $1, $2, $3] x, int8[$1, 1, $4, 3] w, uint8 z) => (int32[n, m, h, v] y)
        { y = ConvInteger<group=$1, strides=[$5, $5], pads=[1, 1, 1, 1]>(x, w, z) }""",
        (1, 96, 28, 28, 3, 1), between((1, 2), (1, 70), (3, 20), (3, 60), (1, 5), (1, 2)), constants=2, kind="values",
        multiplies="pairs",
    ),
    "recurrent cells": Case(
        "", """(float[$0, $1, $2] x, float[1, 256, $2] w, float[1, 256, 64] r) => (float[t, d, b, h] y)
        { y = LSTM<hidden_size=64>(x, w, r) }""",
        (8, 1, 32), between((1, 6), (1, 3), (1, 20)), constants=2,
    ),
    "softmax": Case(
        "", "(float[$0, $1] x) => (float[$0, $1] y) { y = Softmax(x) }",
        (64, 256), between((1, 20), (1, 200)), kind="floats",
    ),
    "normalization": Case(
        "", "(float[$0, $1] x, float[$1] s, float[$1] b) => (float[$0, $1] y) { y = LayerNormalization(x, s, b) }",
        (64, 256), between((1, 20), (1, 200)), kind="",
    ),
    **{
        op: Case(
            "", f"(float[$0, $1] x) => (float[$0, $1] y) {{ y = {op}(x) }}",
            (64, 256), between((1, 20), (1, 200)), kind="floats",
        )
        for op in ("Exp", "Tanh", "Sigmoid", "Erf", "Gelu", "Softplus", "Elu", "Mish")
    },
}  # fmt: skip


def assembly(case: Case, target: str) -> tuple[set[str | None], str]:
    """Return the templates that kernels of the typical sizes asked for and got, and the code of all kernels."""
    machine = resolve(target)
    model, _ = case.model(case.typical, np.random.default_rng(0))
    module = CpuBackend(machine).schedule(load(model))
    assert all(kernel.wanted in (None, kernel.rule) for kernel in module.kernels)
    code = generate(module.relax, machine).executable.mod.imports[0].inspect_source("asm")
    return {kernel.wanted for kernel in module.kernels} - {None}, code


def blocks(code: str) -> list[list[str]]:
    """Return the instructions of every basic block, its label first; jumps out of the middle of it belong to it."""
    return [
        [instruction for line in block.splitlines() if (instruction := re.split(r"#|//", line)[0].strip())]
        for block in re.split(r"\n(?=\.LBB\d+_\d+:)", code)
    ]


def innermost(block: list[str]) -> list[str]:
    """Return the instructions of a loop that is one block, which jumps back to its own label; else nothing."""
    jump = re.compile(r"(j[a-z]+|b\.[a-z]+|cbn?z|tbn?z)\b.*" + re.escape(block[0].rstrip(":")) + "$")
    return block[: next((i for i, line in enumerate(block) if jump.match(line)), 0)]


def stores(loop: list[str]) -> list[str]:
    """Return the stores of vectors."""
    return [x for x in loop if re.match(r"v?mov\w+\s+%[xyz]mm\d+, [^%]*\(.*\)$|st[pru]+\s+q|st1", x)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", MACHINES)
def test_inner_loops_have_the_instructions_of_the_machine(kind, name):
    case, machine = CASES[name], MACHINES[kind]
    wanted, code = assembly(case, machine.target)
    assert case.template in wanted or not case.template
    assert not LIBRARY.findall(code)
    if not case.kind:
        assert re.search(machine.vector, code)
        return
    multiply = re.compile(rf"({getattr(machine, case.multiplies)})\s")
    full = re.compile(r"v\d+\.4[sh]" if case.multiplies != "floats" and kind in ("neon", "dotprod") else machine.vector)

    def products(block: list[str]) -> list[str]:
        return [x for x in block if multiply.match(x)]

    most = max(blocks(code), key=lambda block: len(products(block)))
    assert products(most)
    assert all(full.search(x) for x in products(most))
    if case.kind == "sums":
        # What only adds products writes nothing: the sums are in registers, of which there are enough.
        sums = max((loop for loop in map(innermost, blocks(code)) if not stores(loop)), key=lambda x: len(products(x)))
        assert len(products(sums)) >= 4
        assert all(full.search(x) for x in products(sums))


ROTATION = Case(
    "", "(float[2, 5, 24] x, float[2, 5, 4] c, float[2, 5, 4] s) => (float[2, 5, 24] y) "
    "{ y = RotaryEmbedding<num_heads=3>(x, c, s) }", (), between(),
)  # fmt: skip


def test_loads_under_a_condition_are_never_masked():
    """LLVM takes some at an index modulo a constant for loads of neighbours."""
    _, code = assembly(ROTATION, "x86-64-v4")
    assert re.search("vf", code)
    assert not re.search(r"\{%k\d\}", code)


@pytest.mark.parametrize(("shape", "axis"), [("1, 64, 64, 64", 1), ("1, 65536, 8", 2), ("1, 64, 40, 25", 1)])
def test_copies_are_loads_and_stores_of_neighbours(shape, axis):
    text = f"(float[{shape}] x, float[{shape}] w) => (float[a, b, c, d] y) {{ y = Concat<axis = {axis}>(x, w) }}"
    text = text if shape.count(",") == 3 else text.replace(", d]", "]")
    _, code = assembly(Case("", text, (), between()), "x86-64-v4")
    assert re.search("vmovu", code)
    assert not re.search("gather|scatter", code)


@pytest.mark.parametrize(("target", "register"), [("znver4", "ymm"), ("skylake-avx512", "zmm")])
@pytest.mark.parametrize("model", ["product", "winograd"])
def test_few_columns_are_halves_of_vectors_where_these_are_as_fast(target, register, model):
    weights = {"product": "float[64, 24]", "winograd": "float[24, 64, 3, 3]"}[model]
    values = ", ".join(["0.5"] * int(np.prod([int(n) for n in re.findall(r"\d+", weights)])))
    body, sizes = {
        "product": ("MatMul(x, k)", "(float[640, 64] x) => (float[640, 24] y)"),
        "winograd": ("Conv<pads = [1, 1, 1, 1]>(x, k)", "(float[1, 64, 40, 40] x) => (float[1, 24, 40, 40] y)"),
    }[model]
    text = f"{sizes} <{weights} k = {{{values}}}> {{ y = {body} }}"
    templates, code = assembly(Case("", text, (), between()), target)
    assert {"product": "contraction", "winograd": "winograd"}[model] in templates
    loops = [[x for x in innermost(block) if "vfmadd" in x] for block in blocks(code) if not stores(innermost(block))]
    sums = max(loops, key=len)
    assert len(sums) >= 12
    assert all(f"%{register}" in x for x in sums)


def test_every_template_has_a_case():
    assert {case.template for case in CASES.values()} - {""} == set(TEMPLATES)


def runtime(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Return a session of onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # Optimized, it would round rows that meet dequantized weights to 8 bits.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="runs code for x86-64")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("target", ["nehalem", *(f"{cpu}:l1=4K,l2=16K" for cpu in ("x86-64-v2", "x86-64-v3"))])
def test_results(compile_model, target, name):
    equal(compile_model, target, name)


@pytest.mark.skipif("avx512vnni" not in resolve("cpu").features, reason="runs code for AVX-512 with VNNI")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("target", [f"x86-64-v4:{add}l1=4K,l2=16K" for add in ("", "+avx512vnni,")])
def test_results_of_wide_vectors(compile_model, target, name):
    equal(compile_model, target, name)


def equal(compile_model, target: str, name: str) -> None:
    """Compare a case of drawn sizes with onnxruntime, one of integers exactly with onnx's evaluator."""
    case = CASES[name]
    for seed in range(2):
        rng = np.random.default_rng([seed, *name.encode()])
        model, feeds = case.model(case.sizes(rng), rng)
        # onnxruntime's sums of 8-bit products saturate on some machines.
        session = ReferenceEvaluator(model) if case.multiplies != "floats" else runtime(model)
        (want,) = session.run(None, {i.name: feed for i, feed in zip(model.graph.input, feeds, strict=True)})
        (got,) = compile_model(model, target)(*feeds)
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        if case.multiplies != "floats":
            np.testing.assert_array_equal(got, want)
        else:
            np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)
