from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as oir
import pytest

from optc.ir import serialize
from optc.ir.reference import evaluate


def test_saved_models_are_legal_and_compute_the_same(mlp: oir.Model, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    serialize.save(mlp, path)
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert proto.ir_version == 13
    assert proto.opset_import[0].version == 26
    x = {"x": np.ones((2, 4), np.float32)}
    np.testing.assert_array_equal(evaluate(oir.load(path), x)["y"], evaluate(mlp, x)["y"])
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("limit", [10**9, 0])
def test_the_same_model_gives_the_same_bytes(mlp: oir.Model, tmp_path: Path, limit: int) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        serialize.save(mlp, tmp_path / name / "m.onnx", inline_limit=limit)
    first, second = ({p.name: p.read_bytes() for p in sorted((tmp_path / name).iterdir())} for name in ("a", "b"))
    assert first == second
    assert len(first) == (1 if limit else 2)


def test_large_weights_go_beside_the_model(canonical: Callable[..., oir.Model], tmp_path: Path) -> None:
    model = canonical("g (float[2] x) => (float[] y) <float[2] w = {1,2}> { y = Mul(x, w) }")
    weight = np.arange(2000, dtype=np.float32)
    model.graph.initializers["w"].const_value = oir.tensor(weight, name="w")
    serialize.save(model, tmp_path / "m.onnx", inline_limit=100)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    (tmp_path / "m.onnx").rename(tmp_path / "renamed.onnx")
    loaded = oir.load(tmp_path / "renamed.onnx").graph.initializers["w"].const_value
    assert isinstance(loaded, oir.ExternalTensor)
    np.testing.assert_array_equal(loaded.numpy(), weight)
    assert not isinstance(model.graph.initializers["w"].const_value, oir.ExternalTensor)


def test_a_model_can_be_saved_over_the_files_it_reads(mlp: oir.Model, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    expected = mlp.graph.initializers["w1"].const_value.numpy().copy()
    oir.save(mlp, path, external_data="m.onnx.data", size_threshold_bytes=0)
    loaded = oir.load(path)
    serialize.save(loaded, path, inline_limit=0)
    again = oir.load(path).graph.initializers["w1"].const_value
    np.testing.assert_array_equal(again.numpy(), expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("step", ["write_bytes", "replace"])
def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(
    mlp: oir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, step: str
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    real = getattr(Path, step)

    def fail(self: Path, *arguments: object) -> None:
        if step == "write_bytes":
            real(self, b"half")
        raise error

    monkeypatch.setattr(Path, step, fail)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        serialize.save(mlp, path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_bytes() == b"old"


def test_external_weights_are_inside_the_proto(mlp: oir.Model, tmp_path: Path) -> None:
    oir.save(mlp, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    proto = serialize.to_proto(oir.load(tmp_path / "m.onnx"))
    assert {t.data_location for t in proto.graph.initializer} == {onnx.TensorProto.DEFAULT}
    assert all(t.raw_data for t in proto.graph.initializer)


def test_new_types_raise_the_ir_version(canonical: Callable[..., oir.Model]) -> None:
    model = canonical("g (float[2] x) => (float[] y) { y = Relu(x) }")
    assert serialize.to_proto(model).ir_version == 13
    model.graph.inputs[0].type = oir.TensorType(oir.DataType.FLOAT6E2M3)
    assert serialize.to_proto(model).ir_version == 14
    assert model.ir_version == 13


def test_import_of_the_package_is_light() -> None:
    import subprocess

    code = (
        "import sys, optc.ir; optc.ir.CANONICAL_OPSET; "
        "print([m for m in ('networkx', 'onnx.reference', 'onnx_shape_inference', 'hypothesis') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_functions_of_the_package_are_found_lazily(mlp: oir.Model) -> None:
    import optc.ir

    for name in optc.ir.__all__:
        assert getattr(optc.ir, name) is not None
    optc.ir.verify(mlp)
    with pytest.raises(AttributeError, match="no_such"):
        _ = optc.ir.no_such
