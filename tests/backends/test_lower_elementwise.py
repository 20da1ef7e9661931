"""Element-wise operators, activations and comparisons against NumPy in float64 and onnxruntime."""

from __future__ import annotations

import math
import platform
import warnings

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from optc.errors import UnsupportedModelError

SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-40, 3e38, -3e38, 88.8, -87.5, -103.5, 1.0, -1.0]


def samples(dtype=np.float32) -> np.ndarray:
    rng = np.random.default_rng(0)
    spread = 10.0 ** rng.uniform(-20, 20, 2000) * rng.choice([-1, 1], 2000)
    return np.concatenate([SPECIAL, rng.uniform(-2, 2, 4000), rng.uniform(-100, 100, 4000), spread]).astype(dtype)


def error_in_ulp(got: np.ndarray, exact: np.ndarray) -> float:
    """Largest error in units of the last place of the exact result; special values must match exactly."""
    expected = exact.astype(got.dtype)
    finite = np.isfinite(expected) & np.isfinite(got)
    np.testing.assert_array_equal(got[~finite], expected[~finite])
    smallest = np.finfo(got.dtype).smallest_normal
    step = np.spacing(np.maximum(np.abs(expected[finite]), smallest))
    return float(np.max(np.abs(got[finite].astype(np.float64) - exact[finite]) / step))


def sigmoid(x):
    return np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x))))


UNARY = {
    "Exp": (np.exp, 2),
    "Log": (np.log, 2),
    "Erf": (np.vectorize(math.erf), 6),
    "Tanh": (np.tanh, 3),
    "Sigmoid": (sigmoid, 3),
    "Softplus": (lambda x: np.logaddexp(0, x), 3),
    "Sin": (np.sin, 1),
    "Cos": (np.cos, 1),
    "Tan": (np.tan, 2),
    "Asin": (np.arcsin, 2),
    "Acos": (np.arccos, 2),
    "Atan": (np.arctan, 2),
    "Sinh": (np.sinh, 2),
    "Cosh": (np.cosh, 2),
    "Asinh": (np.arcsinh, 2),
    "Acosh": (np.arccosh, 2),
    "Atanh": (np.arctanh, 2),
    "Sqrt": (np.sqrt, 1),
    "Reciprocal": (lambda x: 1 / x, 1),
    "Ceil": (np.ceil, 0),
    "Floor": (np.floor, 0),
    "Round": (np.rint, 0),
    "Abs": (np.abs, 0),
    "Neg": (np.negative, 0),
    "Sign": (np.sign, 0),
    "Relu": (lambda x: np.maximum(x, 0), 0),
    "Softsign": (lambda x: x / (1 + np.abs(x)), 2),
    "Elu": (lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))), 2),
    "IsNaN": (np.isnan, 0),
    "IsInf": (np.isinf, 0),
}


@pytest.fixture(scope="module")
def unary(compile_model, make_model):
    """All functions of one argument in one model per dtype."""

    def build(dtype, target="cpu"):
        nodes = [helper.make_node(op, ["x"], [op]) for op in UNARY]
        outputs = {op: np.bool_ if op.startswith("Is") else dtype for op in UNARY}
        return compile_model(make_model(nodes, {"x": (dtype, ["n"])}, outputs), target)

    return build


@pytest.mark.parametrize("target", ["cpu", *(["nehalem"] if platform.machine() == "x86_64" else [])])
def test_functions_float32(unary, target):
    x = samples()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for (op, (reference, limit)), got in zip(UNARY.items(), unary(np.float32, target)(x), strict=True):
            exact = np.asarray(reference(x.astype(np.float64)))
            if got.dtype == np.bool_:
                np.testing.assert_array_equal(got, exact, err_msg=op)
            else:
                assert error_in_ulp(got, exact) <= limit, op


def test_functions_float64(unary):
    x = samples(np.float64)[:5000]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for (op, (reference, _)), got in zip(UNARY.items(), unary(np.float64)(x), strict=True):
            np.testing.assert_allclose(got, reference(x), rtol=1e-14, atol=1e-300, err_msg=op)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_functions_of_half_types_are_rounded_float32(unary, dtype):
    x = np.linspace(-9, 9, 1001).astype(dtype)
    step = float(ml_dtypes.finfo(dtype).eps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for (op, (reference, _)), got in zip(UNARY.items(), unary(dtype)(x), strict=True):
            exact = np.asarray(reference(x.astype(np.float64)))
            np.testing.assert_allclose(got.astype(np.float64), exact, rtol=step / 2 * 1.01, atol=1e-7, err_msg=op)


ACTIVATIONS = [
    ("LeakyRelu", {"alpha": 0.1}),
    ("Elu", {"alpha": 2.0}),
    ("Selu", {}),
    ("Celu", {"alpha": 2.0}),
    ("ThresholdedRelu", {"alpha": 0.7}),
    ("HardSigmoid", {"alpha": 0.3}),
    ("HardSwish", {}),
    ("Mish", {}),
    ("Gelu", {}),
    ("Gelu", {"approximate": "tanh"}),
    ("Shrink", {"lambd": 0.6, "bias": 0.2}),
]


def test_activations_match_onnxruntime(compile_model, make_model):
    nodes = [helper.make_node(op, ["x"], [f"y{i}"], **a) for i, (op, a) in enumerate(ACTIVATIONS)]
    outputs = {f"y{i}": np.float32 for i in range(len(nodes))}
    model = make_model(nodes, {"x": (np.float32, ["n", 3])}, outputs)
    x = np.random.default_rng(1).uniform(-30, 30, (500, 3)).astype(np.float32)
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    for (op, _), got, want in zip(ACTIVATIONS, compile_model(model)(x), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6, err_msg=op)


def test_swish(compile_model, make_model):
    node = helper.make_node("Swish", ["x"], ["y"], alpha=1.5)
    run = compile_model(make_model([node], {"x": (np.float32, [1000])}, {"y": np.float32}, opset=24))
    x = np.linspace(-40, 40, 1000).astype(np.float32)
    exact = x * sigmoid((np.float32(1.5) * x).astype(np.float64))
    np.testing.assert_allclose(run(x)[0], exact, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64, np.float32])
def test_arithmetic(compile_model, make_model, dtype):
    operators = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Max": np.maximum, "Min": np.minimum}
    rng = np.random.default_rng(2)
    a = rng.integers(0, 100, (4, 5)).astype(dtype)
    b = rng.integers(1, 20, (5,)).astype(dtype)
    if np.dtype(dtype).kind != "u":
        a, b = a - 50, b * rng.choice([-1, 1], 5).astype(dtype)
    nodes = [helper.make_node(op, ["a", "b"], [op]) for op in (*operators, "Div", "Mod")]
    nodes[-1].attribute.append(helper.make_attribute("fmod", int(np.dtype(dtype).kind == "f")))
    outputs = dict.fromkeys((*operators, "Div", "Mod"), dtype)
    run = compile_model(make_model(nodes, {"a": (dtype, ["n", 5]), "b": (dtype, [5])}, outputs))
    *results, quotient, remainder = run(a, b)
    for (op, function), got in zip(operators.items(), results, strict=True):
        np.testing.assert_array_equal(got, function(a, b), err_msg=op)
    if np.dtype(dtype).kind == "f":
        np.testing.assert_allclose(quotient, a / b, rtol=1e-7)
        np.testing.assert_array_equal(remainder, np.fmod(a, b))
    else:
        np.testing.assert_array_equal(quotient, np.trunc(a.astype(float) / b.astype(float)).astype(dtype))
        np.testing.assert_array_equal(remainder, np.mod(a, b))


def test_integer_division_never_traps(compile_model, make_model):
    nodes = [helper.make_node("Div", ["a", "b"], ["q"]), helper.make_node("Mod", ["a", "b"], ["r"])]
    inputs = {"a": (np.int32, [4]), "b": (np.int32, [4])}
    run = compile_model(make_model(nodes, inputs, {"q": np.int32, "r": np.int32}))
    low = np.iinfo(np.int32).min
    quotient, remainder = run(np.array([5, low, low, 7], np.int32), np.array([0, -1, 1, -1], np.int32))
    np.testing.assert_array_equal(quotient, [0, low, low, -7])
    np.testing.assert_array_equal(remainder, [0, 0, 0, 0])


def test_simplifier_does_not_break_special_values(compile_model, make_model):
    """x - x, x == x, x * 0 and (x + c) - c are not what algebra says for NaN, infinity and rounding."""
    nodes = [
        helper.make_node("Sub", ["x", "x"], ["difference"]),
        helper.make_node("Equal", ["x", "x"], ["same"]),
        helper.make_node("Mul", ["x", "zero"], ["nothing"]),
        helper.make_node("Add", ["x", "magic"], ["shifted"]),
        helper.make_node("Sub", ["shifted", "magic"], ["rounded"]),
        helper.make_node("Sub", ["shifted", "x"], ["back"]),
    ]
    outputs = {"difference": np.float32, "same": np.bool_, "nothing": np.float32}
    outputs |= {"rounded": np.float32, "back": np.float32}
    constants = {"zero": np.float32(0), "magic": np.float32(1.5 * 2**23)}
    constants = {k: np.array(v) for k, v in constants.items()}
    run = compile_model(make_model(nodes, {"x": (np.float32, [4])}, outputs, constants))
    x = np.array([np.inf, np.nan, 2.6, -3.5], np.float32)
    difference, same, nothing, rounded, back = run(x)
    np.testing.assert_array_equal(difference, [np.nan, np.nan, 0, 0])
    np.testing.assert_array_equal(same, [True, False, True, True])
    np.testing.assert_array_equal(nothing, [np.nan, np.nan, 0, 0])
    np.testing.assert_array_equal(rounded, [np.inf, np.nan, 3, -4])
    np.testing.assert_array_equal(back[2:], (x[2:] + constants["magic"]) - x[2:])


@pytest.mark.parametrize("exponent", [-1.0, 0.5, 1.0, 2.0, 3.0, 0.7, None])
def test_power_of_floats(compile_model, make_model, exponent):
    constants = {} if exponent is None else {"e": np.array(exponent, np.float32)}
    inputs = {"x": (np.float32, [8])}
    if exponent is None:
        inputs["e"] = (np.float32, [8])
    run = compile_model(make_model([helper.make_node("Pow", ["x", "e"], ["y"])], inputs, {"y": np.float32}, constants))
    x = np.array([0.0, 2.5, -2.0, np.inf, -np.inf, np.nan, 1e-20, 0.5], np.float32)
    e = (
        np.array([0.0, 2.5, 3.0, -1.0, 0.5, 0.0, 0.1, 2.0], np.float32)
        if exponent is None
        else np.full(8, exponent, np.float32)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = np.power(x.astype(np.float64), e).astype(np.float32)
    np.testing.assert_allclose(run(x, *([e] if exponent is None else []))[0], expected, rtol=3e-7)


def test_power_of_integers(compile_model, make_model):
    nodes = [helper.make_node("Pow", ["x", "e"], ["y"]), helper.make_node("Pow", ["x", "f"], ["z"])]
    inputs = {"x": (np.int64, [8]), "e": (np.int32, [8]), "f": (np.float32, [8])}
    run = compile_model(make_model(nodes, inputs, {"y": np.int64, "z": np.int64}))
    x = np.array([0, 1, -1, 2, 3, -3, 10, -1], np.int64)
    e = np.array([0, 70, 71, 62, 39, 3, 18, -3], np.int32)
    y, z = run(x, e, np.full(8, 2.0, np.float32))
    np.testing.assert_array_equal(y, [1, 1, -1, 2**62, 3**39, -27, 10**18, -1])
    np.testing.assert_array_equal(z, x * x)


def test_variadic_and_clip(compile_model, make_model):
    nodes = [helper.make_node(op, ["a", "b", "c"], [op]) for op in ("Max", "Min", "Sum", "Mean")]
    nodes += [
        helper.make_node("Clip", ["a", "low", "high"], ["both"]),
        helper.make_node("Clip", ["a", "", "high"], ["upper"]),
        helper.make_node("Clip", ["a", "c"], ["lower"]),
    ]
    inputs = {"a": (np.float32, [2, 3]), "b": (np.float32, [3]), "c": (np.float32, [])}
    constants = {"low": np.array(-0.5, np.float32), "high": np.array(0.25, np.float32)}
    names = ["Max", "Min", "Sum", "Mean", "both", "upper", "lower"]
    run = compile_model(make_model(nodes, inputs, dict.fromkeys(names, np.float32), constants))
    a = np.array([[np.nan, 1, -1], [0.1, 5, -6]], np.float32)
    b, c = np.array([2, np.nan, -3], np.float32), np.array(0.2, np.float32)
    largest, smallest, total, mean, both, upper, lower = run(a, b, c)
    np.testing.assert_array_equal(largest, np.maximum(np.maximum(a, b), c))
    np.testing.assert_array_equal(smallest, np.minimum(np.minimum(a, b), c))
    np.testing.assert_allclose(total, a + b + c, rtol=1e-6)
    np.testing.assert_allclose(mean, (a + b + c) / 3, rtol=1e-6)
    np.testing.assert_array_equal(both, np.clip(a, np.float32(-0.5), np.float32(0.25)))
    np.testing.assert_array_equal(upper, np.minimum(a, np.float32(0.25)))
    np.testing.assert_array_equal(lower, np.maximum(a, c))


def test_logic_bits_where(compile_model, make_model):
    logical = {"And": np.logical_and, "Or": np.logical_or, "Xor": np.logical_xor, "Equal": np.equal}
    bitwise = {"BitwiseAnd": np.bitwise_and, "BitwiseOr": np.bitwise_or, "BitwiseXor": np.bitwise_xor}
    nodes = [helper.make_node(op, ["p", "q"], [op]) for op in logical]
    nodes += [helper.make_node(op, ["u", "v"], [op]) for op in bitwise]
    nodes += [
        helper.make_node("Not", ["p"], ["not"]),
        helper.make_node("BitwiseNot", ["u"], ["inverted"]),
        helper.make_node("BitShift", ["u", "v"], ["left"], direction="LEFT"),
        helper.make_node("BitShift", ["u", "v"], ["right"], direction="RIGHT"),
        helper.make_node("Where", ["p", "u", "v"], ["chosen"]),
    ]
    inputs = {"p": (np.bool_, [4]), "q": (np.bool_, [4]), "u": (np.uint8, [4]), "v": (np.uint8, [4])}
    outputs = dict.fromkeys(logical, np.bool_) | dict.fromkeys(bitwise, np.uint8) | {"not": np.bool_}
    outputs |= dict.fromkeys(["inverted", "left", "right", "chosen"], np.uint8)
    p, q = np.array([0, 0, 1, 1], bool), np.array([0, 1, 0, 1], bool)
    u, v = np.array([200, 3, 255, 128], np.uint8), np.array([1, 9, 7, 8], np.uint8)
    results = compile_model(make_model(nodes, inputs, outputs))(p, q, u, v)
    expected = [f(p, q) for f in logical.values()] + [f(u, v) for f in bitwise.values()]
    expected += [~p, ~u, np.array([144, 0, 128, 0], np.uint8), np.array([100, 0, 1, 0], np.uint8)]
    for got, want in zip(results, [*expected, np.where(p, u, v)], strict=True):
        np.testing.assert_array_equal(got, want)


def test_comparisons_with_nan(compile_model, make_model):
    operators = {
        "Equal": np.equal,
        "Greater": np.greater,
        "GreaterOrEqual": np.greater_equal,
        "Less": np.less,
        "LessOrEqual": np.less_equal,
    }
    nodes = [helper.make_node(op, ["a", "b"], [op]) for op in operators]
    inputs = {"a": (np.float32, [6]), "b": (np.float32, [6])}
    run = compile_model(make_model(nodes, inputs, dict.fromkeys(operators, np.bool_)))
    a = np.array([1, 2, 2, np.nan, 1, np.inf], np.float32)
    b = np.array([2, 1, 2, np.nan, np.nan, np.inf], np.float32)
    for (op, function), got in zip(operators.items(), run(a, b), strict=True):
        np.testing.assert_array_equal(got, function(a, b), err_msg=op)


@pytest.mark.parametrize("negation", ["Not", "Xor"])
def test_negated_comparisons_with_nan(compile_model, make_model, negation):
    """Fused, ``not a < b`` must not become ``a >= b``."""
    operators = {"Equal": np.equal, "Less": np.less, "GreaterOrEqual": np.greater_equal}
    nodes = []
    for op in operators:
        nodes.append(helper.make_node(op, ["a", "b"], [op]))
        nodes.append(helper.make_node(negation, ["p", op] if negation == "Xor" else [op], ["no" + op]))
    inputs = {"a": (np.float32, [3]), "b": (np.float32, [3]), "p": (np.bool_, [3])}
    run = compile_model(make_model(nodes, inputs, {"no" + op: np.bool_ for op in operators}))
    a, b = np.array([np.nan, 1, 2], np.float32), np.array([1, np.nan, 2], np.float32)
    for function, got in zip(operators.values(), run(a, b, np.array([True, True, True])), strict=True):
        np.testing.assert_array_equal(got, ~function(a, b))


CASTS = [np.float16, ml_dtypes.bfloat16, np.float64, np.int8, np.uint8, np.int32, np.int64, np.uint64, np.bool_]


@pytest.mark.parametrize("source", [np.float32, np.float16, ml_dtypes.bfloat16, np.int32, np.uint8, np.bool_])
def test_cast(compile_model, make_model, source):
    names = [f"y{i}" for i in range(len(CASTS))]
    codes = [helper.np_dtype_to_tensor_dtype(np.dtype(d)) for d in CASTS]
    nodes = [helper.make_node("Cast", ["x"], [n], to=code) for n, code in zip(names, codes, strict=True)]
    run = compile_model(make_model(nodes, {"x": (source, ["n"])}, dict(zip(names, CASTS, strict=True))))
    x = np.array([0, 1, 2.7, 100.5, 3.14159, 0.1], np.float32).astype(source)
    for dtype, got in zip(CASTS, run(x), strict=True):
        np.testing.assert_array_equal(got, x.astype(np.float32).astype(dtype), err_msg=str(dtype))


def test_cast_of_special_values(compile_model, make_model):
    nodes = [
        helper.make_node("Cast", ["x"], ["b"], to=TensorProto.BOOL),
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.BFLOAT16),
        helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT8),
    ]
    outputs = {"b": np.bool_, "h": ml_dtypes.bfloat16, "i": np.int8}
    run = compile_model(make_model(nodes, {"x": (np.float32, [6])}, outputs))
    x = np.array([np.nan, -0.0, np.inf, 1.00390625, -2.7, 300.0], np.float32)
    b, h, i = run(x)
    np.testing.assert_array_equal(b, [True, False, True, True, True, True])
    np.testing.assert_array_equal(h.astype(np.float32), x.astype(ml_dtypes.bfloat16).astype(np.float32))
    np.testing.assert_array_equal(i[3:], np.array([1, -2, 44], np.int8))


def test_prelu_and_dropout(compile_model, make_model):
    nodes = [
        helper.make_node("PRelu", ["x", "slope"], ["y"]),
        helper.make_node("Dropout", ["x"], ["z", "mask"]),
    ]
    outputs = {"y": np.float32, "z": np.float32, "mask": np.bool_}
    slope = np.array([[0.1], [0.2]], np.float32)
    run = compile_model(make_model(nodes, {"x": (np.float32, ["n", 2, 3])}, outputs, {"slope": slope}))
    x = np.random.default_rng(3).standard_normal((4, 2, 3)).astype(np.float32)
    y, z, mask = run(x)
    np.testing.assert_array_equal(y, np.where(x < 0, x * slope, x))
    np.testing.assert_array_equal(z, x)
    assert mask.shape == x.shape and mask.all()


@pytest.mark.parametrize(
    ("left", "right", "cases"),
    [
        (["n", 3], ["m", 3], [(4, 4), (1, 4), (4, 1), (1, 0), (0, 1), (1, 1)]),
        (["n", 3], [4, 3], [(4, 4), (1, 4)]),
        (["n", 3], ["n", 1], [(4, 4), (1, 1)]),
    ],
)
def test_symbolic_broadcast(compile_model, make_model, left, right, cases):
    nodes = [helper.make_node("Relu", ["a"], ["r"]), helper.make_node("Add", ["r", "b"], ["y"])]
    inputs = {"a": (np.float32, left), "b": (np.float32, right)}
    run = compile_model(make_model(nodes, inputs, {"y": np.float32}))
    rng = np.random.default_rng(4)
    for n, m in cases:
        a = rng.standard_normal((n, 3)).astype(np.float32)
        b = rng.standard_normal((m, right[1])).astype(np.float32)
        np.testing.assert_array_equal(run(a, b)[0], np.maximum(a, 0) + b)


@pytest.mark.parametrize("right", [["m", 3], [4, 3]])
def test_illegal_symbolic_broadcast_is_an_error(compile_model, make_model, right):
    node = helper.make_node("Add", ["a", "b"], ["y"])
    inputs = {"a": (np.float32, ["n", 3]), "b": (np.float32, right)}
    run = compile_model(make_model([node], inputs, {"y": np.float32}))
    with pytest.raises(Exception, match="mismatch"):
        run(np.zeros((2, 3), np.float32), np.zeros((4, 3), np.float32))


def test_dropout_while_training_is_refused(compile_model, make_model):
    node = helper.make_node("Dropout", ["x", "ratio", "training"], ["y"], name="drop")
    constants = {"ratio": np.array(0.5, np.float32), "training": np.array(True)}
    with pytest.raises(UnsupportedModelError, match=r"drop.*random while training"):
        compile_model(make_model([node], {"x": (np.float32, [3])}, {"y": np.float32}, constants))


def test_sizes_that_are_one_only_together_are_not_stretched(compile_model, make_model):
    """``min(n, 5)`` and n: legal when equal, and then no broadcast; anything else is an error when the model runs."""
    nodes = [
        helper.make_node("Slice", ["table", "zero", "size"], ["part"]),
        helper.make_node("Shape", ["x"], ["size"], start=0, end=1),
        helper.make_node("Add", ["x", "part"], ["sum"]),
        helper.make_node("Add", ["part", "sum"], ["again"]),
        helper.make_node("LayerNormalization", ["again", "scale"], ["y"]),
    ]
    nodes[:2] = nodes[1::-1]
    constants = {
        "table": np.arange(20, dtype=np.float32).reshape(5, 4) ** 2,
        "zero": np.array([0]),
        "scale": np.ones(4, np.float32),
    }
    run = compile_model(make_model(nodes, {"x": (np.float32, ["n", 4])}, {"y": np.float32}, constants))
    for size in (1, 3, 5):
        x = np.random.default_rng(size).standard_normal((size, 4)).astype(np.float32)
        total = (x + 2 * constants["table"][:size]).astype(np.float64)
        centered = total - total.mean(1, keepdims=True)
        expected = centered / np.sqrt((centered**2).mean(1, keepdims=True) + 1e-5)
        np.testing.assert_allclose(run(x)[0], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError):
        run(np.ones((6, 4), np.float32))


def test_buckets_of_relative_positions(compile_model, make_model):
    """As in T5: integers through a logarithm and back, in one kernel."""
    nodes = [
        helper.make_node("Sub", ["x", "column"], ["distance"]),
        helper.make_node("Abs", ["distance"], ["far"]),
        helper.make_node("Cast", ["far"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Log", ["real"], ["log"]),
        helper.make_node("Cast", ["log"], ["bucket"], to=TensorProto.INT64),
        helper.make_node("Min", ["bucket", "four"], ["capped"]),
        helper.make_node("Less", ["far", "eight"], ["near"]),
        helper.make_node("Where", ["near", "far", "capped"], ["y"]),
    ]
    constants = {"four": np.array(4), "eight": np.array(8)}
    inputs = {"x": (np.int64, [1, "n"]), "column": (np.int64, ["n", 1])}
    run = compile_model(make_model(nodes, inputs, {"y": np.int64}, constants))
    positions = np.arange(70)
    far = np.abs(positions[None] - positions[:, None])
    expected = np.where(far < 8, far, np.minimum(np.log(np.maximum(far, 1)).astype(np.int64), 4))
    np.testing.assert_array_equal(run(positions[None], positions[:, None])[0], expected)


@pytest.mark.parametrize("op", ["Sinh", "Cosh"])
def test_hyperbolic_functions_of_whole_vectors(compile_model, make_model, op):
    x = np.linspace(-3, 3, 256, dtype=np.float32)
    run = compile_model(
        make_model([helper.make_node(op, ["x"], ["y"])], {"x": ("f4", x.shape)}, {"y": "f4"}), "haswell"
    )
    np.testing.assert_allclose(run(x)[0], getattr(np, op.lower())(x.astype(np.float64)), rtol=2**-22)
