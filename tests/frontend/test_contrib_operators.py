"""Operators of com.microsoft: what becomes of them, what waits for shapes, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import optc
from optc import ir
from optc.errors import InvalidModelError, UnsupportedModelError
from optc.frontend import contrib
from optc.frontend.onnx import load

IMPORTS = [helper.make_opsetid("", 14), helper.make_opsetid("com.microsoft", 1)]
INT32 = TensorProto.INT32
RNG = np.random.default_rng(0)


def floats(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.fixture
def one(build):
    """Build a model of one node from ``{input: shape}``; None for an absent input."""

    def make(op, inputs, outputs=("y",), types=None, domain="com.microsoft", **attributes):
        names = [name if shape is not None else "" for name, shape in inputs.items()]
        node = helper.make_node(op, names, list(outputs), domain=domain, **attributes)
        given = {name: shape for name, shape in inputs.items() if shape is not None}
        return build([node], given, [name for name in outputs if name], types=types, imports=IMPORTS)

    return make


def operators(model):
    canonical = load(model)
    ir.verify(canonical)
    assert "com.microsoft" not in canonical.opset_imports
    return [node.op_type for node in canonical.graph]


def test_layers_become_single_operators(one):
    assert operators(one("Gelu", {"x": [2, 3]})) == ["Gelu"]
    assert operators(one("BiasGelu", {"x": [2, 3], "b": [3]})) == ["Add", "Gelu"]
    assert operators(one("QuickGelu", {"x": [2, 3]})) == ["Swish"]
    skip = one("SkipLayerNormalization", {"x": [1, 2, 4], "s": [1, 2, 4], "g": [4], "b": [4]}, ("y", "", "", "sum"))
    assert operators(skip) == ["Add", "LayerNormalization"]
    heads = {"q": ["n", "s", 8], "k": ["n", "t", 8], "v": ["n", "t", 8]}
    assert operators(one("MultiHeadAttention", heads, num_heads=2)) == ["Attention"]


def test_operators_without_kernel_in_onnxruntime(one, build, evaluate):
    x, bias, skip = floats(1, 3, 8), floats(8), floats(1, 3, 8)
    canonical = load(one("BiasAdd", {"x": [1, 3, 8], "b": [8], "s": [1, 3, 8]}))
    np.testing.assert_allclose(evaluate(canonical, {"x": x, "b": bias, "s": skip})[0], x + bias + skip, rtol=1e-6)
    canonical = load(one("BiasSplitGelu", {"x": [1, 3, 8], "b": [8]}))
    left, right = np.split(x + bias, 2, -1)
    (gelu,) = evaluate(one("Gelu", {"x": [1, 3, 4]}), {"x": right})
    np.testing.assert_allclose(evaluate(canonical, {"x": x, "b": bias})[0], left * gelu, rtol=1e-5, atol=1e-6)
    image, weight, added = floats(1, 4, 6, 6), floats(5, 4, 3, 3), floats(1, 5, 6, 6)
    attributes = {"pads": [1, 1, 1, 1], "activation": "Relu"}
    node = helper.make_node("FusedConv", ["x", "w", "", "z"], ["y"], domain="com.microsoft", **attributes)
    shapes = {"x": [1, 4, 6, 6], "w": [5, 4, 3, 3], "z": [1, 5, 6, 6]}
    (expected,) = evaluate(build([node], shapes, ["y"], imports=IMPORTS), {"x": image, "w": weight, "z": added})
    turned = {"x": [1, 6, 6, 4], "w": [5, 4, 3, 3], "b": None, "z": [1, 6, 6, 5]}
    canonical = load(one("NhwcFusedConv", turned, **attributes))
    last = [0, 2, 3, 1]
    feeds = {"x": image.transpose(last), "w": weight, "z": added.transpose(last)}
    np.testing.assert_allclose(evaluate(canonical, feeds)[0], expected.transpose(last), rtol=1e-5, atol=1e-5)


def test_packed_keys_and_values(one, evaluate):
    q, kv = floats(2, 3, 8), floats(2, 5, 2, 2, 4)
    separate = one("MultiHeadAttention", {"q": [2, 3, 8], "k": [2, 5, 8], "v": [2, 5, 8]}, num_heads=2)
    k, v = (kv[:, :, :, half].reshape(2, 5, 8) for half in (0, 1))
    (expected,) = evaluate(separate, {"q": q, "k": k, "v": v})
    packed = load(one("MultiHeadAttention", {"q": [2, 3, 8], "kv": [2, 5, 2, 2, 4]}, num_heads=2))
    np.testing.assert_allclose(evaluate(packed, {"q": q, "kv": kv})[0], expected, rtol=1e-5, atol=1e-5)
    (expected,) = evaluate(separate, {"q": k[:, :3], "k": k, "v": v})
    whole = np.stack([k.reshape(2, 5, 2, 4), *(kv[:, :, :, half] for half in (0, 1))], axis=3)
    packed = load(one("MultiHeadAttention", {"qkv": [2, 5, 2, 3, 4]}, num_heads=2))
    np.testing.assert_allclose(evaluate(packed, {"qkv": whole})[0][:, :3], expected, rtol=1e-5, atol=1e-5)


def test_quantized_attention(build, evaluate):
    columns = RNG.uniform(0.01, 0.03, 24).astype(np.float32)
    # Seven bits: sums of pairs of larger products saturate in onnxruntime on some machines.
    weights = {
        "w": RNG.integers(-64, 64, (8, 24)).astype(np.int8), "b": floats(24), "xs": np.array(0.02, np.float32),
        "ws": columns, "xz": np.array(120, np.uint8), "wz": np.zeros(24, np.int8),
    }  # fmt: skip
    inputs = ["x", "w", "b", "xs", "ws", "mask", "xz", "wz"]
    node = helper.make_node("QAttention", inputs, ["y"], domain="com.microsoft", num_heads=2)
    types = {"x": TensorProto.UINT8, "mask": INT32}
    model = build([node], {"x": [2, 5, 8], "mask": [2, 5]}, ["y"], weights=weights, types=types, imports=IMPORTS)
    x = RNG.integers(0, 256, (2, 5, 8)).astype(np.uint8)
    feeds = {"x": x, "mask": np.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]], np.int32)}
    (expected,) = evaluate(model, feeds)
    canonical = load(model)
    assert [node.op_type for node in canonical.graph].count("MatMulInteger") == 3
    found = optc.compile(model, verify=False).model().run(feeds)["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_shapes_are_waited_for(build, evaluate):
    """A chain in which each node is expanded only when the one before it has a shape, and nothing declares any."""
    nodes = []
    for number in range(3):
        names = [f"h{number}", "w"]
        nodes.append(helper.make_node("FusedMatMul", names, [f"g{number}"], domain="com.microsoft", transA=1))
        nodes.append(helper.make_node("SimplifiedLayerNormalization", [f"g{number}", "s"], [f"h{number + 1}"]))
    model = build(nodes, {"h0": [4, 4]}, ["h3"], weights={"w": floats(4, 4), "s": floats(4)}, imports=IMPORTS)
    x = floats(4, 4)
    (expected,) = evaluate(model, {"h0": x})
    canonical = load(model)
    ir.verify(canonical)
    np.testing.assert_allclose(evaluate(canonical, {"h0": x})[0], expected, rtol=1e-4, atol=1e-4)


def test_a_shape_that_nothing_tells(build):
    nodes = [
        helper.make_node("CDist", ["x", "x"], ["h"], domain="com.microsoft"),
        helper.make_node("FusedMatMul", ["h", "x"], ["y"], domain="com.microsoft", transA=1),
    ]
    with pytest.raises(UnsupportedModelError, match=r"FusedMatMul.*shape of h is not known"):
        load(build(nodes, {"x": [4, 4]}, ["y"], imports=IMPORTS))


def test_prompts_of_different_lengths(build, evaluate):
    """Rows behind the end of a prompt are nobody's; those before it are the same."""
    lengths = np.array([6, 3])
    tensors = {"q": floats(2, 6, 32), "k": floats(2, 6, 16), "v": floats(2, 6, 16)}
    feeds = tensors | {"lengths": (lengths - 1).astype(np.int32), "total": np.array([6], np.int32)}
    inputs = ["q", "k", "v", "", "", "lengths", "total"]
    attributes = {"num_heads": 2, "kv_num_heads": 1}
    node = helper.make_node("GroupQueryAttention", inputs, ["y", "pk", "pv"], domain="com.microsoft", **attributes)
    shapes = {name: list(array.shape) for name, array in feeds.items()}
    model = build([node], shapes, ["y", "pk", "pv"], types={"lengths": INT32, "total": INT32}, imports=IMPORTS)
    expected = evaluate(model, feeds)

    found = optc.compile(model, verify=False).model().run(feeds)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(found["y"][row, :length], expected[0][row, :length], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found["pk"][row, :, :length], expected[1][row, :, :length])


HEADS = {"q": [2, 4, 8], "k": [2, 4, 8], "v": [2, 4, 8]}
LONGER = {"k": [2, 5, 8], "v": [2, 5, 8]}
GROUPED = {"q": [1, 4, 16], "k": [1, 4, 16], "v": [1, 4, 16], "pk": None, "pv": None, "n": [1], "t": [1]}


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "reason"),
    [
        ("Attention", {"x": [1, 2, 8], "w": [8, 24]}, {"num_heads": 2, "do_rotary": 1}, "do_rotary=1"),
        ("Attention", {"x": [1, 2, 8], "w": [8, "k"]}, {"num_heads": 2}, "dimension 1 of w is not known"),
        ("Attention", {"x": [1, 2, 8], "w": [8, 24], "b": [24], "m": [5]}, {"num_heads": 2}, r"shape \[5\]"),
        ("Attention", {"x": [1, 2, 8], "w": [8, 24], "b": [24], "m": [1, 1, 4, 4]}, {"num_heads": 2}, "4 dimensions"),
        ("MultiHeadAttention", HEADS | LONGER, {"num_heads": 2, "unidirectional": 1}, "as many"),
        ("MultiHeadAttention", {"q": [2, 4, 8], "k": [2, 4, 8]}, {"num_heads": 2}, "form of query"),
        ("GroupQueryAttention", GROUPED, {"num_heads": 1, "kv_num_heads": 1, "smooth_softmax": 1}, "smooth_softmax=1"),
        ("RotaryEmbedding", {"x": [1, 2, 8], "p": [1], "c": [9, 4], "s": [9, 4]}, {"scale": 2.0}, "scale=2"),
        ("FusedConv", {"x": [1, 1, 4, 4], "w": [1, 1, 3, 3]}, {"activation": "Gelu"}, "activation Gelu"),
        ("FusedGemm", {"x": [2, 2], "w": [2, 2]}, {"activation": "LeakyRelu"}, "1 parameters, 0 are given"),
        ("GridSample", {"x": [1, 1, 4, 4], "g": [1, 2, 2, 2]}, {"mode": "area"}, "mode area"),
        ("MatMulBnb4", {"x": [1, 16], "w": [8], "s": [1]}, {"K": 16, "N": 1, "block_size": 16}, "table"),
    ],
)  # fmt: skip
def test_what_has_no_equal_is_refused(one, op, inputs, attributes, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        load(one(op, inputs, types={"m": INT32, "n": INT32, "t": INT32}, **attributes))


def test_outputs_without_equal_are_refused(one):
    norm = {"x": [1, 2, 4], "s": [1, 2, 4], "g": [4]}
    with pytest.raises(UnsupportedModelError, match="output 1 is not supported"):
        load(one("SkipSimplifiedLayerNormalization", norm, ("y", "mean")))
    inputs = HEADS | {"b": None, "m": [2, 4]}
    with pytest.raises(UnsupportedModelError, match="scores as an output, with a mask"):
        load(one("MultiHeadAttention", inputs, ("y", "", "", "s"), types={"m": INT32}, num_heads=2))


def test_contradictions_are_invalid(one):
    with pytest.raises(InvalidModelError, match="'num_heads' is missing"):
        load(one("MultiHeadAttention", HEADS))
    with pytest.raises(InvalidModelError, match="'alpha' is no number"):
        load(one("FusedMatMul", {"x": [2, 2], "w": [2, 2]}, alpha=1))


def test_blocked_layouts_are_refused(build):
    node = helper.make_node("Conv", ["x", "w"], ["y"], domain="com.microsoft.nchwc")
    imports = [*IMPORTS, onnx.helper.make_opsetid("com.microsoft.nchwc", 1)]
    with pytest.raises(UnsupportedModelError, match="memory layout is that of one machine") as error:
        load(build([node], {"x": [1, 8, 4, 4], "w": [8, 8, 1, 1]}, ["y"], imports=imports))
    assert "ORT_ENABLE_EXTENDED" in str(error.value.hint)


def test_the_documentation_names_every_operator():
    page = (Path(__file__).parents[2] / "docs" / "onnxruntime.md").read_text()
    words = set(re.findall(r"\w+", page))
    assert set(contrib.OPERATORS) <= words
