from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as oir
import pytest
from onnx.helper import make_node as node
from onnx.helper import make_opsetid

from optc.errors import InvalidModelError, UnsupportedModelError, UsageError
from optc.frontend.onnx import load

CACHE = Path(os.environ.get("OPTC_MODEL_CACHE") or Path(__file__).parents[2] / ".cache" / "models")
F32 = np.float32


@pytest.fixture
def model(build):
    weights = {"w": np.arange(400, dtype=F32).reshape(4, 100)}
    return build([node("MatMul", ["x", "w"], ["y"], name="mm")], {"x": ["n", 4]}, ["y"], weights=weights)


@pytest.fixture
def external(model, tmp_path):
    """Return the path of a model with its weight in ``model.bin``."""
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.bin", size_threshold=0)
    return path


def relocate(path: Path, **entries: str) -> None:
    message = onnx.load(path, load_external_data=False)
    for tensor in message.graph.initializer:
        for entry in tensor.external_data:
            entry.value = entries.get(entry.key, entry.value)
    path.write_bytes(message.SerializeToString())


def test_sources(model, tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    for source in (model, path, str(path), oir.from_proto(model)):
        assert [n.name for n in load(source).graph] == ["mm"]


def test_the_model_of_the_caller_is_left_alone(build):
    weight = onnx.numpy_helper.from_array(np.ones(3, F32), "w")
    branch = onnx.helper.make_graph(
        [node("Add", ["x", "w"], ["o"])], "b", [], [onnx.helper.make_tensor_value_info("o", 1, None)], [weight]
    )
    nodes = [node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)]
    model = build(nodes, {"c": [], "x": [2, 3]}, ["y"], types={"c": 9})
    before = model.SerializeToString()
    load(model)
    assert model.SerializeToString() == before


def test_metadata_survives(model):
    onnx.helper.set_model_props(model, {"character": "a\nb", "k": "v"})
    assert load(model).metadata_props == {"character": "a\nb", "k": "v"}


def test_external_data_is_not_read(external):
    tensor = load(external).graph.initializers["w"].const_value
    assert isinstance(tensor, oir.ExternalTensor)
    assert tensor._array is None
    np.testing.assert_array_equal(tensor.numpy().reshape(-1), np.arange(400))


def test_external_data_from_another_directory(external, monkeypatch):
    monkeypatch.chdir(external.parent)
    assert load("model.onnx").graph.initializers["w"].const_value.numpy()[3, 99] == 399


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"location": "../model.bin"}, "outside of the model's directory"),
        ({"location": "/etc/passwd"}, "outside of the model's directory"),
        ({"location": "other.bin"}, "missing: there is no file"),
        ({"offset": "4096"}, "cut off"),
        ({"length": "8"}, "has 8 bytes, its shape needs 1600"),
    ],
)
def test_bad_external_data(external, change, message):
    relocate(external, **change)
    with pytest.raises(InvalidModelError, match=message) as caught:
        load(external)
    assert "'w'" in str(caught.value) and str(external) in str(caught.value)


def test_external_data_behind_a_link(external, tmp_path):
    outside = tmp_path.parent / f"{tmp_path.name}.bin"
    (tmp_path / "model.bin").rename(outside)
    (tmp_path / "model.bin").symlink_to(outside)
    with pytest.raises(InvalidModelError, match="outside"):
        load(external)


def test_external_data_with_hard_links(external, tmp_path):
    (tmp_path / "second").hardlink_to(tmp_path / "model.bin")
    with pytest.raises(InvalidModelError, match="hard links"):
        load(external)


def test_external_data_without_file(external):
    with pytest.raises(InvalidModelError, match="load it from its file"):
        load(onnx.load(external, load_external_data=False))


def test_external_constant_in_a_subgraph_is_checked(build, external):
    weight = onnx.load(external, load_external_data=False).graph.initializer[0]
    weight.external_data[0].value = "gone.bin"
    branch = onnx.helper.make_graph(
        [node("Constant", [], ["o"], value=weight)], "b", [], [onnx.helper.make_tensor_value_info("o", 1, None)]
    )
    model = build([node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)], {"c": []}, ["y"], types={"c": 9})
    external.write_bytes(model.SerializeToString())
    with pytest.raises(InvalidModelError, match=r"gone\.bin"):
        load(external)


def test_missing_file(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        load(tmp_path / "no.onnx")
    with pytest.raises(UsageError, match="is a directory"):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n" + bytes(64), b"hello world\n" * 9])
def test_not_onnx(tmp_path, content):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(InvalidModelError, match="truncated or not an ONNX model"):
        load(path)


def test_every_truncation_is_an_error(model, tmp_path):
    content = model.SerializeToString()
    path = tmp_path / "m.onnx"
    for size in range(0, len(content), 37):
        path.write_bytes(content[:size])
        with pytest.raises(InvalidModelError):
            load(path)


def test_empty_graph(build):
    with pytest.raises(InvalidModelError, match="no graph or an empty one"):
        load(build([], {}, []))


def test_no_opset(model):
    del model.opset_import[:]
    with pytest.raises(InvalidModelError, match="no opset"):
        load(model)


def test_contradictory_opsets(model):
    model.opset_import.append(make_opsetid("ai.onnx", 11))
    with pytest.raises(InvalidModelError, match="opset 17 and opset 11"):
        load(model)


def test_domain_without_import(build):
    model = build([node("Gelu", ["x"], ["y"], domain="com.microsoft")], {"x": [2]}, ["y"])
    with pytest.raises(InvalidModelError, match=r"'com\.microsoft'"):
        load(model)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (node("Relu", ["q"], ["y"], name="n"), r"'q', an input of Relu 'n'"),
        (node("Relu", ["x"], ["x"], name="n"), r"'x' is defined again by Relu 'n'"),
        (node("Nope", ["x"], ["y"], name="n"), r"Nope 'n': ONNX has no such operator"),
        (node("Gelu", ["x"], ["y"], name="n"), r"Gelu 'n': the operator came with opset 20"),
        (node("Relu", ["x"], ["y"], name="n", alpha=1), r"Relu 'n': unknown attribute 'alpha'"),
        (node("Relu", ["x", "x"], ["y"], name="n"), r"Relu 'n': 2 inputs, expected 1"),
        (node("Add", ["x"], ["y"], name="n"), r"Add 'n': 1 inputs, expected 2"),
        (node("Relu", ["x"], ["y", "z"], name="n"), r"Relu 'n': 2 outputs"),
        (node("Concat", ["x"], ["y"], name="n"), r"Concat 'n': attribute 'axis' is missing"),
        (node("Concat", ["x"], ["y"], name="n", axis=1.5), r"Concat 'n': attribute 'axis' has type FLOAT"),
    ],
)
def test_illegal_nodes(build, bad, message):
    with pytest.raises(InvalidModelError, match=message):
        load(build([bad], {"x": [2]}, ["y"]))


def test_all_illegal_nodes_are_named(build):
    nodes = [node("Nope", ["x"], ["a"], name="first"), node("Huh", ["a"], ["y"], name="second")]
    with pytest.raises(InvalidModelError, match=r"(?s)'first'.*'second'"):
        load(build(nodes, {"x": [2]}, ["y"]))


def test_output_that_nothing_computes(build):
    with pytest.raises(InvalidModelError, match="'z', an output"):
        load(build([node("Relu", ["x"], ["y"])], {"x": [2]}, ["y", "z"]))


def test_cycle(build):
    nodes = [node("Add", ["x", "b"], ["a"]), node("Relu", ["a"], ["b"])]
    with pytest.raises(InvalidModelError, match="cycle"):
        load(build(nodes, {"x": [2]}, ["b"]))


def test_weight_of_the_wrong_length(model):
    model.graph.initializer[0].raw_data = b"\0" * 12
    with pytest.raises(InvalidModelError, match="'w' has 12 bytes, its shape needs 1600"):
        load(model)


def test_weight_of_an_unknown_type(model):
    model.graph.initializer[0].data_type = 99
    with pytest.raises(InvalidModelError, match="'w' has the unknown type 99"):
        load(model)


def test_constant_of_the_wrong_length(build):
    value = onnx.helper.make_tensor("k", onnx.TensorProto.FLOAT, [3], [1, 2, 3])
    value.float_data.pop()
    nodes = [node("Constant", [], ["c"], value=value), node("Relu", ["c"], ["y"])]
    with pytest.raises(InvalidModelError, match="'k' has 2 elements, its shape needs 3"):
        load(build(nodes, {}, ["y"]))


@pytest.mark.parametrize("version", [0, -1, 2**40])
def test_impossible_opset(model, version):
    model.opset_import.append(make_opsetid("other", version))
    with pytest.raises(InvalidModelError, match=f"opset {version} of the domain 'other'"):
        load(model)


def test_names_that_are_no_text(model, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString().replace(b"mm", b"\xffm"))
    with pytest.raises(InvalidModelError, match="UTF-8"):
        load(path)


def test_sparse_weight_out_of_range(build):
    values = onnx.numpy_helper.from_array(np.array([5], F32), "w")
    where = onnx.numpy_helper.from_array(np.array([99], np.int64), "i")
    model = build([node("MatMul", ["x", "w"], ["y"])], {"x": [2, 4]}, ["y"])
    model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, where, [4, 3]))
    with pytest.raises(InvalidModelError, match="sparse tensor 'w'"):
        load(model)


@pytest.mark.parametrize("linear", [True, False])
def test_sparse_weight(build, same_results, linear):
    dense = np.zeros((4, 3), F32)
    dense[1, 2], dense[3, 0] = 5, 7
    positions = np.array([5, 9]) if linear else np.array([[1, 2], [3, 0]])
    sparse = onnx.helper.make_sparse_tensor(
        onnx.numpy_helper.from_array(np.array([5, 7], F32), "w"),
        onnx.numpy_helper.from_array(positions.astype(np.int64), "w_indices"),
        [4, 3],
    )
    model = build([node("MatMul", ["x", "w"], ["y"])], {"x": [2, 4]}, ["y"])
    model.graph.sparse_initializer.append(sparse)
    canonical = load(model)
    np.testing.assert_array_equal(canonical.graph.initializers["w"].const_value.numpy(), dense)
    assert len(model.graph.sparse_initializer) == 1


def test_other_domains_stay(build):
    model = build(
        [node("Inverse", ["x"], ["h"], domain="com.microsoft"), node("Relu", ["h"], ["y"], domain="ai.onnx")],
        {"x": [2, 2]},
        ["y"],
        imports=[make_opsetid("ai.onnx", 12), make_opsetid("com.microsoft", 1)],
    )
    loaded = load(model)
    assert [(n.domain, n.op_type) for n in loaded.graph] == [("com.microsoft", "Inverse"), ("", "Relu")]
    assert loaded.opset_imports == {"": 26, "com.microsoft": 1}


def test_refusal_before_anything_else(model):
    model.opset_import[0].version = 5
    with pytest.raises(UnsupportedModelError, match="supported are 6 to"):
        load(model)


@pytest.mark.models
@pytest.mark.parametrize("name", ["ppocr/det", "ppocr/rec", "ppocr/cls"])
def test_ppocr(evaluate, name):
    path = CACHE / f"{name}.onnx"
    if not path.is_file():
        pytest.skip("run scripts/fetch_models.py")
    loaded = load(path)
    assert all(v.shape is not None and v.dtype is not None for n in loaded.graph.all_nodes() for v in n.outputs)
    size = (1, 3, 64, 96) if name != "ppocr/cls" else (1, 3, 48, 192)
    size = (1, 3, 48, 96) if name == "ppocr/rec" else size
    feeds = {"x": np.random.default_rng(0).standard_normal(size).astype(F32)}
    for a, b in zip(evaluate(loaded, feeds), evaluate(onnx.load(path), feeds), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    if name == "ppocr/rec":
        assert "character" in loaded.metadata_props


@pytest.mark.models
def test_silero(evaluate):
    files = sorted((CACHE / "silero").glob("*.onnx"))
    if not files:
        pytest.skip("run scripts/fetch_models.py")
    for path in files:
        loaded = load(path)
        inputs = {v.name: v for v in loaded.graph.inputs}
        if set(inputs) != {"input", "state", "sr"}:
            continue
        rng = np.random.default_rng(0)
        feeds = {
            "input": rng.standard_normal((1, 576)).astype(F32),
            "state": rng.standard_normal((2, 1, 128)).astype(F32),
            "sr": np.array(16000, np.int64),
        }
        for a, b in zip(evaluate(loaded, feeds), evaluate(onnx.load(path), feeds), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
