"""Cases of operators that compute element by element, and of casts."""

from __future__ import annotations

import math

import numpy as np
from onnx import helper
from operator_case import ANY, EPSILON, FLOATS, INTEGERS, NUMBERS, SIGNED, UNSIGNED, Case, Draw, dtype_of

# Function: (lowest, highest) argument, and roundings that the result may be off by, at float32.
FUNCTIONS = {
    "Acos": (-1, 1), "Acosh": (1, 50), "Asin": (-1, 1), "Asinh": (-50, 50), "Atan": (-50, 50), "Atanh": (-0.99, 0.99),
    "Cos": (-50, 50), "Cosh": (-9, 9), "Erf": (-5, 5), "Exp": (-10, 10), "Log": (1e-3, 1e3), "Sin": (-50, 50),
    "Sinh": (-9, 9), "Tan": (-1.5, 1.5), "Sqrt": (0, 1e3), "Tanh": (-10, 10), "Sigmoid": (-20, 20),
    "Softplus": (-30, 30), "Softsign": (-30, 30), "Mish": (-20, 20), "HardSwish": (-5, 5), "Reciprocal": (0.1, 9),
    "Relu": (-3, 3), "Floor": (-9, 9), "Ceil": (-9, 9), "Round": (-9, 9), "Elu": (-9, 9), "Selu": (-9, 9),
    "Celu": (-9, 9), "LeakyRelu": (-9, 9), "ThresholdedRelu": (-3, 3), "HardSigmoid": (-9, 9), "Gelu": (-9, 9),
    "Swish": (-20, 20), "Shrink": (-3, 3),
}  # fmt: skip
_ALPHA = {"Elu", "Celu", "LeakyRelu", "ThresholdedRelu", "HardSigmoid", "Swish", "Selu"}
# Sums of values of about one size: their error is relative to those.
_CANCEL = {
    "Gelu",
    "Mish",
    "Selu",
    "Elu",
    "Celu",
    "HardSigmoid",
    "Shrink",
    "HardSwish",
    "Acos",
    "Acosh",
    "Log",
    "Cos",
    "Sin",
    "Swish",
}
_ONLY_FLOAT32 = {"Celu"}
# Their results jump: a wide reference would decide otherwise than the type itself.
_PLAIN_ARITHMETIC = {"Relu", "Floor", "Ceil", "Round"}


def function(d: Draw) -> Case:
    op = d.pick(sorted(FUNCTIONS))
    dtype = "float32" if op in _ONLY_FLOAT32 else d.pick(FLOATS)
    x = d.array(dtype, d.shape(), *FUNCTIONS[op])
    relative = op not in _CANCEL
    if relative and FUNCTIONS[op][0] < 0 and d.flag():
        # Of all magnitudes.
        x = (x * 10.0 ** d.array("float64", x.shape, -12, 0)).astype(x.dtype)
    if op in ("Relu", "Floor", "Ceil", "Round", "Exp", "Sqrt", "Tanh", "Sigmoid", "Erf", "Log"):
        x = d.special(x)
    attributes = {}
    if op in _ALPHA and d.flag():
        attributes["alpha"] = d.pick([0.0, 0.25, 0.5, 1.0, 1.5])
        if op == "Celu":
            attributes["alpha"] = d.pick([0.5, 1.0, 2.0])
    if op == "Gelu":
        attributes["approximate"] = d.pick(["none", "tanh"])
    if op == "Shrink":
        attributes = {"lambd": 0.5, "bias": d.pick([0.0, 0.5])}
    if op in ("HardSigmoid", "Selu") and d.flag():
        attributes |= {"beta": 0.25} if op == "HardSigmoid" else {"gamma": 1.25}
    case = Case(op, [x], [dtype], attributes, symbolic=d.all_symbols(x), wide=op not in _PLAIN_ARITHMETIC)
    case.relative, case.roundings = relative, 6
    if op == "Gelu" and attributes["approximate"] == "none":
        case.reference = lambda c: [_gelu(c.arrays[0].astype(np.float64))]
    case.opset = 24 if op == "Swish" else case.opset
    return case


def _gelu(x: np.ndarray) -> np.ndarray:
    """Gelu-20; that of onnx's evaluator has constants in float32."""
    return np.asarray(x * 0.5 * np.vectorize(math.erfc, otypes=[np.float64])(-x / math.sqrt(2)))


def integer_function(d: Draw) -> Case:
    op = d.pick(["Abs", "Neg", "Sign", "Relu", "Not", "BitwiseNot", "Identity", "Shrink", "Round"])
    kinds = {"Not": ("bool",), "BitwiseNot": INTEGERS, "Neg": (*FLOATS, *SIGNED), "Relu": (*FLOATS, *SIGNED)}
    kinds |= {"Identity": ANY, "Round": FLOATS}
    dtype = d.pick(kinds.get(op, NUMBERS))
    if op == "Shrink" and dtype == "bfloat16":
        dtype = "float16"
    x = d.array(
        dtype, d.shape(), *((0, 100) if op == "Shrink" and dtype in UNSIGNED else (-100, 100)) if op == "Shrink" else ()
    )
    x = d.special(x) if op != "Shrink" else x
    attributes = {"lambd": 1.0, "bias": 0.0} if op == "Shrink" else {}
    return Case(op, [x], [dtype], attributes, symbolic=d.all_symbols(x), wide=False)


def broadcast(d: Draw, *, one_way: bool = False) -> tuple[list[int], list[int]]:
    """Return two shapes that broadcast: missing dimensions and ones on either side."""
    a = d.shape(0, 4)
    b = [1 if d.integer(0, 3) == 3 else n for n in a][d.integer(0, len(a)) :]
    if not one_way:
        a = [1 if d.integer(0, 5) == 5 else n for n in a]
    return (a, b) if one_way or d.flag() else (b, a)


ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Max", "Min", "Mod", "Pow")
COMPARISONS = ("Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual")
LOGIC = ("And", "Or", "Xor")
BITS = ("BitwiseAnd", "BitwiseOr", "BitwiseXor")


def binary(d: Draw) -> Case:
    op = d.pick(ARITHMETIC)
    dtype = d.pick(NUMBERS)
    if op == "Pow":
        return power(d)
    shapes = broadcast(d)
    x, y = (d.array(dtype, s) for s in shapes)
    attributes = {}
    if op in ("Div", "Mod") and dtype in INTEGERS:
        # Division by zero, and of the lowest number by -1, is not defined.
        y = np.where((y == 0) | (y == -1) if dtype in SIGNED else y == 0, dtype_of(dtype).type(3), y)
    if op == "Mod":
        attributes = {"fmod": 1} if dtype in FLOATS or d.flag() else {}
        if dtype in FLOATS:
            y = np.where(np.abs(y) < 0.1, y.dtype.type(0.7), y)
    elif op == "Div" and dtype in FLOATS:
        y = np.where(np.abs(y) < 1e-2, y.dtype.type(0.7), y)
    elif op in ("Max", "Min", "Add", "Mul"):
        x = d.special(x)
    constants = frozenset([d.integer(0, 1)]) if d.flag() else frozenset()
    return Case(op, [x, y], [dtype], attributes, constants, d.all_symbols(x, y), wide=False, roundings=1)


def power(d: Draw) -> Case:
    base, exponent = (
        d.pick(("float32", "float64", "int32", "int64", "float16", "bfloat16")),
        d.pick(("float32", "float64", "int32", "int64", "float16")),
    )
    x, y = broadcast(d)
    low, high = (1, 6) if base in SIGNED else (0.1, 4)
    a = d.array(base, x, low, high)
    b = d.array(exponent, y, 0, 5) if base in SIGNED else d.array(exponent, y, -3, 3)
    if base in SIGNED and exponent in FLOATS:
        b = np.rint(b.astype(np.float64)).astype(b.dtype)
    constants = frozenset([1]) if d.flag() else frozenset()

    def reference(case: Case) -> list[np.ndarray]:
        x, y = (a.astype(np.float64) for a in case.arrays)
        result = np.power(x, y)
        return [result if base in FLOATS else np.rint(result).astype(dtype_of(base))]

    return Case("Pow", [a, b], [base], {}, constants, d.all_symbols(a, b), reference=reference, roundings=16)


def comparison(d: Draw) -> Case:
    op = d.pick((*COMPARISONS, *LOGIC, *BITS, "BitShift"))
    dtype = "bool" if op in LOGIC else d.pick(INTEGERS if op in BITS else UNSIGNED if op == "BitShift" else NUMBERS)
    if op == "Equal" and d.integer(0, 4) == 4:
        dtype = "bool"
    x, y = (d.array(dtype, s) for s in broadcast(d))
    if op in COMPARISONS and dtype != "bool":
        # Few values, so that some are equal.
        x, y = (np.asarray(d.rng.integers(0, 3, a.shape)).astype(a.dtype) for a in (x, y))
        x = d.special(x)
    attributes = {}
    if op == "BitShift":
        attributes = {"direction": d.pick(["LEFT", "RIGHT"])}
        y = (y % x.dtype.type(8 * x.dtype.itemsize)).astype(y.dtype)
    output = "bool" if op in (*COMPARISONS, *LOGIC) else dtype
    return Case(op, [x, y], [output], attributes, symbolic=d.all_symbols(x, y), wide=False)


def variadic(d: Draw) -> Case:
    op = d.pick(["Sum", "Mean", "Max", "Min"])
    dtype = d.pick(NUMBERS if op in ("Max", "Min") else FLOATS)
    first, second = broadcast(d)
    shapes = [first, second, *([first] if d.flag() else [])]
    arrays = [d.array(dtype, s) for s in shapes]
    return Case(op, arrays, [dtype], symbolic=d.all_symbols(*arrays))


def where(d: Draw) -> Case:
    dtype = d.pick(ANY)
    shapes = [*broadcast(d), []]
    shapes[2] = [n if d.flag() else 1 for n in np.broadcast_shapes(*map(tuple, shapes[:2]))]
    shapes = [shapes[i] for i in d.permutation(3)]
    arrays = [d.array("bool", shapes[0]), d.array(dtype, shapes[1]), d.array(dtype, shapes[2])]
    return Case("Where", arrays, [dtype], symbolic=d.all_symbols(*arrays), wide=False)


def clip(d: Draw) -> Case:
    dtype = d.pick(NUMBERS)
    x = d.special(d.array(dtype, d.shape()))
    low, high = sorted(d.array(dtype, [2]).tolist())
    bounds = [np.array(b).astype(x.dtype) if d.flag() else None for b in (low, high)]
    while bounds and bounds[-1] is None:
        bounds.pop()
    constants = frozenset([1, 2]) if d.flag() else frozenset()
    return Case("Clip", [x, *bounds], [dtype], {}, constants, d.symbols([x], {0: range(x.ndim)}), wide=False)


def prelu(d: Draw) -> Case:
    dtype = d.pick((*FLOATS, "int32", "int64", "uint32"))
    a, b = broadcast(d, one_way=True)
    x, slope = d.array(dtype, a, -9, 9), d.array(dtype, b, -9, 9)
    constants = frozenset([1]) if d.flag() else frozenset()
    return Case("PRelu", [x, slope], [dtype], {}, constants, d.all_symbols(x, slope))


def cast(d: Draw) -> Case:
    source, to = d.pick(ANY), d.pick(ANY)
    shape = d.shape()
    if source in FLOATS and to in INTEGERS:
        # What does not fit is not defined.
        info = np.iinfo(dtype_of(to))
        x = d.array(source, shape, max(info.min, -100), min(info.max, 100))
    elif to in FLOATS and source in INTEGERS:
        x = d.array(source, shape, -100000, 100000)
    else:
        x = d.special(d.array(source, shape))
    if d.flag():
        x = np.where(d.array("bool", shape), x, x.dtype.type(0)) if source != "bool" else x

    def reference(case: Case) -> list[np.ndarray]:
        (x,) = case.arrays
        if source in EPSILON and to == "bool":
            return [x.astype(np.float64) != 0]
        return [x.astype(np.float64 if source in EPSILON and to in INTEGERS else x.dtype).astype(dtype_of(to))]

    code = helper.np_dtype_to_tensor_dtype(dtype_of(to))
    return Case("Cast", [x], [to], {"to": code}, symbolic=d.all_symbols(x), roundings=0, reference=reference)


def classify(d: Draw) -> Case:
    op = d.pick(["IsNaN", "IsInf"])
    x = d.special(d.array(d.pick(FLOATS), d.shape()))
    attributes = {"detect_negative": d.integer(0, 1), "detect_positive": d.integer(0, 1)} if op == "IsInf" else {}
    return Case(op, [x], ["bool"], attributes, symbolic=d.all_symbols(x), wide=False)


FAMILIES = (function, integer_function, binary, comparison, variadic, where, clip, prelu, cast, classify)
