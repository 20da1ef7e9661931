"""The Python interface, end to end on a small model."""

import numpy as np
import onnx_ir as oir
import onnxruntime
import pytest

import optc
from optc import verification
from optc.driver import Trace, verify_artifact
from optc.errors import AccuracyError, NoLegalInputsError, UnsupportedModelError, UsageError


def expected(path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("batch", [1, 2, 17])
def test_one_artifact_serves_every_size(mlp, artifact, batch):
    x = np.random.default_rng(batch).standard_normal((batch, 8), np.float32)
    model = optc.load(artifact)
    found = model.run({"x": x})["y"]
    assert np.abs(found - expected(mlp, x)).max() < 1e-5
    (again,) = model(x) if isinstance(model(x), tuple) else (model(x),)
    assert np.array_equal(again, found)


def test_a_bound_dim_becomes_fixed(mlp):
    model = optc.compile(mlp, dims={"batch": 3}).model()
    assert model.inputs[0].shape == (3, 8)
    model = optc.compile(mlp, input_shapes={"x": [5, 8]}).model()
    assert model.inputs[0].shape == (5, 8)


def test_unknown_names_show_the_inputs(mlp):
    with pytest.raises(UsageError, match=r"(?s)z.*x"):
        optc.compile(mlp, input_shapes={"z": [1]})
    with pytest.raises(UsageError, match=r"(?s)width.*batch"):
        optc.compile(mlp, dims={"width": 1})


def test_the_report_carries_errors_kernels_and_passes(artifact):
    report = optc.load(artifact).report
    verification = report["verification"]
    assert verification["reference"].startswith("onnxruntime")
    assert verification["outputs"][0]["relative"] < 1e-5
    assert all(kernel["schedule"] for kernel in report["kernels"])
    assert report["tuning"].startswith("none")


def test_an_impossible_tolerance_fails_the_compile(mlp):
    with pytest.raises(AccuracyError, match="differ from onnxruntime"):
        optc.compile(mlp, tolerance=-1.0)


def test_two_compiles_are_byte_identical(mlp, tmp_path, monkeypatch):
    files = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        copy = folder / f"{name}.onnx"
        copy.write_bytes(mlp.read_bytes())
        monkeypatch.chdir(folder)
        optc.compile(copy).save(folder / "model.optc")
        files.append((folder / "model.optc").read_bytes())
    assert files[0] == files[1]


def test_the_callers_model_is_left_alone():
    text = '<ir_version: 10, opset_import: ["": 18]> g (float[n] x) => (float[n] y) { t = Identity(x) y = Relu(t) }'
    model = oir.from_onnx_text(text)
    before = oir.to_proto(model).SerializeToString()
    optc.compile(model, verify=False)
    assert oir.to_proto(model).SerializeToString() == before


def test_everything_unsupported_is_named_at_once():
    text = """<ir_version: 10, opset_import: ["": 20, "acme": 1]>
    g (float[4] x, string[2] s) => (float[4] y, float[4] z) { y = acme.Warp(x) z = acme.Weft(y) }"""
    model = oir.from_onnx_text(text.replace(", string[2] s", ""))
    for node in model.graph:
        node.name = f"my_{node.op_type}"
    with pytest.raises(UnsupportedModelError) as raised:
        optc.compile(model)
    assert "my_Warp" in str(raised.value)
    assert raised.value.exit_code == 3


def test_check_builds_nothing(mlp):
    assert len(list(optc.check(mlp).graph)) <= 4


def test_the_trace_times_every_stage(mlp):
    trace = Trace()
    optc.compile(mlp, trace=trace)
    assert list(trace.seconds) == ["capture", "optimize", "build", "pack", "verify"]
    assert trace.passes


def test_an_artifact_for_another_machine_says_it_was_not_run(mlp):
    pytest.importorskip("ziglang", reason="the cross linker is not installed")
    artifact = optc.compile(mlp, target="aarch64")
    assert artifact.report["verification"].startswith("not run")
    elf = artifact.code[:20]
    assert elf[:4] == b"\x7fELF"
    assert int.from_bytes(elf[18:20], "little") == 183  # EM_AARCH64


@pytest.mark.parametrize("name", ["z80", "x86-64-v9", "mips-unknown:r9000", "sparc-linux-gnu:nope"])
def test_an_unknown_target_is_a_usage_error(mlp, name):
    with pytest.raises(UsageError, match="target"):
        optc.compile(mlp, target=name)


RESHAPE = """<ir_version: 10, opset_import: ["": 20]>
g (float[n, c] x) => (float[a, b] y) <int64[2] shape = {%s}> { y = Reshape(x, shape) }"""


def test_random_sizes_are_tried_until_the_reference_accepts_some():
    artifact = optc.compile(oir.from_onnx_text(RESHAPE % "512, 1"))
    assert artifact.report["verification"]["dims"] == {"n": 1, "c": 512}


def test_a_model_that_refuses_all_random_sizes_is_compiled_but_not_called_verified():
    model = oir.from_onnx_text(RESHAPE % "3, 7")
    artifact = optc.compile(model)
    assert "refuses random inputs" in artifact.report["verification"]
    x = np.ones((7, 3), np.float32)
    assert artifact.model().run({"x": x})["y"].shape == (3, 7)
    with pytest.raises(NoLegalInputsError, match="refuses") as raised:
        verify_artifact(artifact.model(), model)
    assert raised.value.exit_code == 2


def test_an_output_that_is_no_tensor_is_refused_by_name():
    text = """<ir_version: 10, opset_import: ["": 20]>
    g (float[n, 4] x) => (seq(float[2, 4]) parts) { parts = SplitToSequence(x) }"""
    with pytest.raises(UnsupportedModelError, match=r"'parts': type Sequence.*cannot be an output"):
        optc.compile(oir.from_onnx_text(text))


def test_a_second_reference_that_cannot_run_the_model_leaves_the_first_opinion(mlp, monkeypatch):
    original, model = optc.capture(mlp), optc.compile(mlp).model()
    first = verification.reference

    def references(captured, prefer=None):
        def fail(inputs):
            raise TypeError

        return ("evaluator", fail) if prefer == "onnx" else first(captured, prefer)

    monkeypatch.setattr(verification, "reference", references)
    result = verify_artifact(model, original, tolerance=-1.0)
    assert "cannot run it: TypeError" in result.reference
    with pytest.raises(AccuracyError):
        result.require(-1.0)
