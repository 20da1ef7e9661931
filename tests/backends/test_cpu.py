"""CPU targets, linking, memory plan: what they say and what they refuse."""

import numpy as np
import onnx_ir as oir
import pytest
import tvm
from tvm import tirx

import optc
from optc.backends.cpu import link
from optc.backends.cpu.build import CpuBackend
from optc.backends.cpu.shape_functions import order_shape_functions
from optc.backends.cpu.target import EXAMPLES, resolve, to_tvm
from optc.errors import MissingDependencyError, OptcError, UsageError

CHAIN = """<ir_version: 10, opset_import: ["": 20]>
g (float[4,64] x) => (float[4,64] y) { a = Softmax(x) b = Softmax <axis=0> (a) y = Softmax(b) }"""


def test_shape_functions_store_in_the_order_of_their_slots():
    sizes = tirx.decl_buffer([3], "int64", "H")
    stores = [tirx.BufferStore(sizes, sizes[0] * slot, [slot]) for slot in (2, 1)]
    function = tirx.PrimFunc([sizes], tirx.SeqStmt(stores))
    module = order_shape_functions(tvm.IRModule({"shape_func": function, "other": function}))
    order = {name: [int(s.indices[0]) for s in module[name].body.seq] for name in ("shape_func", "other")}
    assert order == {"shape_func": [1, 2], "other": [2, 1]}


def test_examples_resolve():
    for name in EXAMPLES:
        assert to_tvm(resolve(name)).kind.name == "llvm"


@pytest.mark.parametrize(
    ("name", "triple", "bits"),
    [
        ("x86-64-v2", "x86_64-linux-gnu", 128),
        ("x86-64-v3", "x86_64-linux-gnu", 256),
        ("x86-64-v4", "x86_64-linux-gnu", 512),
        ("aarch64", "aarch64-linux-gnu", 128),
        ("aarch64-linux-gnu:cortex-a76:+dotprod", "aarch64-linux-gnu", 128),
    ],
)
def test_vector_width_comes_from_the_target(name, triple, bits):
    target = resolve(name)
    assert (target.triple, target.vector_bits, target.native) == (triple, bits, False)


def test_features_can_be_added_and_removed():
    target = resolve("x86_64-linux-gnu:x86-64-v3:-avx2,+avxvnni")
    assert "avx2" not in target.features
    assert "avxvnni" in target.features


@pytest.mark.parametrize("name", ["z80", "x86_64-linux-gnu:z80", "pdp11-linux-gnu:generic", ""])
def test_unknown_targets_are_refused_with_examples(name):
    with pytest.raises(UsageError) as raised:
        resolve(name)
    assert "x86-64-v3" in str(raised.value)


def test_a_missing_cross_linker_says_what_to_install(monkeypatch):
    monkeypatch.delenv("OPTC_CC", raising=False)
    monkeypatch.setattr(link.shutil, "which", lambda _: None)
    monkeypatch.setattr(link.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match=r"optc\[cross\]"):
        link.linker(resolve("aarch64"))


def test_the_linker_can_be_chosen(monkeypatch):
    monkeypatch.setenv("OPTC_CC", "my-cc -O1")
    assert link.linker(resolve("cpu")) == ["my-cc", "-O1"]


def test_a_linker_that_fails_or_is_missing_is_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("OPTC_CC", "false")
    with pytest.raises(OptcError, match="linking for"):
        link.link([tmp_path / "none.o"], tmp_path / "out.so", resolve("cpu"))
    monkeypatch.setenv("OPTC_CC", "optc-no-such-program")
    with pytest.raises(MissingDependencyError, match="cannot run the linker"):
        link.link([tmp_path / "none.o"], tmp_path / "out.so", resolve("cpu"))


def test_planned_activations_are_those_of_the_intermediate_tensors():
    model = optc.optimize(oir.from_onnx_text(CHAIN), portable=False)
    build = CpuBackend(resolve("cpu")).build(model)
    # Two intermediate tensors and the output, 4 x 64 floats each; the planner may share but not exceed them.
    assert 4 * 64 * 4 <= build.activation_bytes <= 3 * 4 * 64 * 4


def test_symbolic_sizes_leave_the_plan_open():
    text = CHAIN.replace("float[4,64]", "float[n,64]")
    build = CpuBackend(resolve("cpu")).build(optc.optimize(oir.from_onnx_text(text), portable=False))
    assert build.activation_bytes is None


@pytest.mark.parametrize("target", ["x86-64-v2", "x86-64-v3"])
def test_another_cpu_of_this_family_computes_the_same(target):
    artifact = optc.compile(oir.from_onnx_text(CHAIN), target=target)
    x = np.random.default_rng(0).standard_normal((4, 64), np.float32)
    native = optc.compile(oir.from_onnx_text(CHAIN)).model().run({"x": x})["y"]
    np.testing.assert_allclose(artifact.model().run({"x": x})["y"], native, rtol=1e-5, atol=1e-7)
