"""CPU targets, linking, memory plan: what they say and what they refuse."""

import numpy as np
import onnx.parser
import onnx_ir as oir
import pytest
import tvm
from tvm import tirx

import optc
from optc.backends.base import Caches
from optc.backends.cpu import link
from optc.backends.cpu.build import CpuBackend
from optc.backends.cpu.caches import of_this_machine
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


def test_caches_come_from_the_cpu_and_can_be_given():
    assert resolve("haswell").caches == Caches(32 * 1024, 256 * 1024)
    assert resolve("znver3").caches.l2 == 512 * 1024
    assert resolve("icelake-server").caches == Caches(48 * 1024, 1280 * 1024)
    assert resolve("x86-64-v3:l1=48K,l2=2M").caches == Caches(48 * 1024, 2 * 1024 * 1024)
    assert resolve("x86-64-v3:-fma,l2=1000").caches.l2 == 1000
    target = resolve("aarch64-linux-gnu:cortex-a76:+dotprod,l2=512K")
    assert "dotprod" in target.features and target.caches == Caches(64 * 1024, 512 * 1024)
    assert resolve("cpu:l2=3M").native and resolve("cpu:l2=3M").caches.l2 == 3 * 1024 * 1024


def test_a_machine_that_has_an_artifact_s_instructions_needs_none_of_its_caches():
    assert resolve("x86-64-v3:l2=64M").describe() == resolve("x86-64-v3").describe()


def test_the_report_says_what_caches_were_assumed():
    model = onnx.parser.parse_model(CHAIN)
    report = optc.compile(model, target="x86-64-v2:l2=1M").report
    assert report["caches"] == {"l1": 32 * 1024, "l2": 1024 * 1024}


def _cache(folder, index, level, kind, size, cpus):
    entry = folder / f"index{index}"
    entry.mkdir()
    for name, text in zip(("level", "type", "size", "shared_cpu_map"), (level, kind, size, cpus), strict=True):
        (entry / name).write_text(f"{text}\n")


def test_caches_of_this_machine_are_one_core_s_part(tmp_path):
    """Two threads share a core, four cores a second level."""
    _cache(tmp_path, 0, "1", "Data", "48K", "00000000,00000003")
    _cache(tmp_path, 1, "1", "Instruction", "32K", "00000000,00000003")
    _cache(tmp_path, 2, "2", "Unified", "2M", "00000000,000000ff")
    _cache(tmp_path, 3, "3", "Unified", "nonsense", "00000000,0000ffff")
    assert of_this_machine(Caches(1, 1), tmp_path) == Caches(48 * 1024, 512 * 1024)


def test_what_linux_does_not_tell_of_caches_is_assumed(tmp_path):
    assert of_this_machine(Caches(1, 2), tmp_path) == Caches(1, 2)
    _cache(tmp_path, 0, "1", "Data", "0K", "0")
    _cache(tmp_path, 1, "2", "Unified", "512K", "0")
    assert of_this_machine(Caches(1, 2), tmp_path) == Caches(1, 512 * 1024)


@pytest.mark.parametrize("name", ["x86-64-v3:l2=0", "x86-64-v3:l2=5X", "cpu:foo=1", "aarch64-linux-gnu:generic:neon"])
def test_unknown_options_are_refused(name):
    with pytest.raises(UsageError, match="is no option"):
        resolve(name)


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
    assert 4 * 64 * 4 <= build.least_activation_bytes <= build.activation_bytes <= 3 * 4 * 64 * 4


def test_symbolic_sizes_leave_the_plan_open():
    text = CHAIN.replace("float[4,64]", "float[n,64]")
    build = CpuBackend(resolve("cpu")).build(optc.optimize(oir.from_onnx_text(text), portable=False))
    assert build.activation_bytes is None
    assert build.least_activation_bytes is None


@pytest.mark.parametrize("target", ["x86-64-v2", "x86-64-v3"])
def test_another_cpu_of_this_family_computes_the_same(target):
    artifact = optc.compile(oir.from_onnx_text(CHAIN), target=target)
    x = np.random.default_rng(0).standard_normal((4, 64), np.float32)
    native = optc.compile(oir.from_onnx_text(CHAIN)).model().run({"x": x})["y"]
    np.testing.assert_allclose(artifact.model().run({"x": x})["y"], native, rtol=1e-5, atol=1e-7)
