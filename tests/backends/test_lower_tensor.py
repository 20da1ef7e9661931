"""Operators that move elements, and those whose result's size depends on data, against onnxruntime and NumPy."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import helper

from optc.errors import UnsupportedModelError

X = np.arange(24, dtype="f4").reshape(2, 3, 4)


def parse(text: str, opset: int = 21) -> onnx.ModelProto:
    header = f'<ir_version: 10, opset_import: ["" : {opset}]>'
    return onnx.parser.parse_model(header + text.replace("'", '"'))


def unary(body: str, shape: str = "a, b, 4", out: str = "float[p, q, r] y") -> str:
    return f"g (float[{shape}] x) => ({out}) {{ {body} }}"


def constant(name: str, *values: int) -> str:
    return f"{name} = Constant<value_ints = [{', '.join(map(str, values))}]>()"


@pytest.mark.parametrize("wanted", [(0, -1), (-1,), (4, 0, -1), (6, 4), (0, 0, 2, -1)])
def test_reshape(check, wanted):
    check(unary(f"{constant('s', *wanted)} y = Reshape(x, s)", "2, 3, 4"), (X,))


@pytest.mark.parametrize("wanted", [(0, -1), (-1, 0), (0, 2, -1)])
def test_reshape_of_symbolic_sizes(check, wanted):
    y = X[:, :2]
    check(unary(f"{constant('s', *wanted)} y = Reshape(x, s)"), (y,), (y[:1],))


def test_reshape_to_a_shape_known_at_run_time(check):
    text = "g (float[a, b, 4] x, int64[2] s) => (float[p, q] y) { y = Reshape(x, s) }"
    check(text, *((X, np.array(s)) for s in [(-1, 3), (0, -1), (4, 6), (12, 2)]))


def test_reshape_of_nothing(check):
    empty = np.zeros((0, 5, 4), "f4")
    check(unary(f"{constant('s', 0, 20)} y = Reshape(x, s)", "0, 5, 4", "float[p, q] y"), (empty,))
    check(unary(f"{constant('s', 3, 0)} y = Reshape<allowzero = 1>(x, s)", "0, 5, 4", "float[p, q] y"), (empty,))


def many(operator: str, variants: list[str], shape: str = "a, b, 4") -> str:
    """Return a model that applies variants of an operator, each ``attributes or constants | arguments``."""
    body, outputs = [], []
    for k, variant in enumerate(variants):
        before, attributes, arguments = variant.split("|")
        call = f"{operator}<{attributes}>" if attributes else operator
        body.append(f"{before} y@ = {call}(x{arguments})".replace("@", str(k)))
        outputs.append(f"float y{k}")
    return f"g (float[{shape}] x) => ({', '.join(outputs)}) {{ {' '.join(body)} }}"


def test_flatten(check):
    check(many("Flatten", [f"|axis = {axis}|" for axis in (0, 1, 2, 3, -1)]), (X,))


def test_squeeze_and_unsqueeze(check):
    check(unary(f"{constant('s', 0, -1)} u = Unsqueeze(x, s) y = Squeeze(u, s)"), (X,))
    check(unary("y = Squeeze(x)", "1, 3, 1"), (np.ones((1, 3, 1), "f4"),))


def test_axes_known_at_run_time(check):
    text = "g (float[a, b, 4] x, int64[2] s) => (float[p, q, r, t, u] y) { y = Unsqueeze(x, s) }"
    check(text, (X, np.array([0, 2])), (X, np.array([-1, 1])))
    text = "g (float[a, b, 4, c] x, int64[1] s) => (float[p, q, r] y) { y = Squeeze(x, s) }"
    check(text, (X[..., None], np.array([3])), (X[:1, :, :, None], np.array([-4])))


def test_squeeze_of_unknown_rank_is_refused(compile_model):
    with pytest.raises(UnsupportedModelError, match="rank of the result"):
        compile_model(parse(unary("y = Squeeze(x)")))


def test_transpose(check):
    orders = ["[0, 2, 1]", "[2, 1, 0]", "[1, 0, 2]", "[2, 0, 1]"]
    check(many("Transpose", [f"|perm = {order}|" for order in orders]), (X,))


def test_transpose_that_only_moves_ones_is_a_view(check):
    check(unary("y = Transpose<perm = [1, 2, 0]>(x)", "1, a, 4"), (X[:1],))
    check(unary("y = Transpose(x)"), (X,))


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_concat(check, axis):
    check(unary(f"z = Neg(x) y = Concat<axis = {axis}>(x, z, x)"), (X,))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shape", [(2, 150, 120), (20, 50, 40)])
def test_concat_of_much_data(check, axis, shape):
    x = np.arange(np.prod(shape), dtype="f4").reshape(shape)
    w = np.ones([3 if i == axis else d for i, d in enumerate(shape)], "f4")
    inputs = ", ".join(f"float{list(a.shape)} {name}" for name, a in (("x", x), ("w", w)))
    check(f"g ({inputs}) => (float[p, q, r] y) {{ y = Concat<axis = {axis}>(x, w) }}", (x, w))


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "float16", "int64", "double"])
@pytest.mark.parametrize("shape", [(3, 4, 64), (3, 4, 7), (9, 2, 24)])
def test_concat_of_types(check, shape, dtype):
    kind = {"bool": "?", "double": "f8"}.get(dtype, dtype)
    x, w = (np.random.default_rng(seed).integers(0, 2 if kind == "?" else 100, shape).astype(kind) for seed in range(2))
    inputs = ", ".join(f"{dtype}{list(shape)} {name}" for name in "xw")
    for axis in range(3):
        check(f"g ({inputs}) => ({dtype}[p, q, r] y) {{ y = Concat<axis = {axis}>(x, w) }}", (x, w))


def test_concat_of_different_sizes_and_of_nothing(check):
    text = "g (float[a, b, 4] x, float[a, c, 4] w) => (float[p, q, r] y) { y = Concat<axis = 1>(x, w) }"
    check(text, (X, X[:, :1]), (X, X[:, :0]))
    text = "g (float[2, 0] x, float[3, 0] w) => (float[p, q] y) { y = Concat<axis = 0>(x, w) }"
    check(text, (np.zeros((2, 0), "f4"), np.zeros((3, 0), "f4")))


def test_split(check):
    outputs = "float[p, q, r] y, float[s, t, u] z"
    check(unary("y, z = Split<axis = 1, num_outputs = 2>(x)", out=outputs), (X,))
    check(unary(f"{constant('s', 1, 3)} y, z = Split<axis = -1>(x, s)", out=outputs), (X,))
    text = f"g (float[a, b, 4] x, int64[2] s) => ({outputs}) {{ y, z = Split<axis = 1>(x, s) }}"
    check(text, (X, np.array([1, 2])), (X, np.array([3, 0])))


SLICES = [
    (0, 2, 1), (1, 100, 1), (-2, 2**63 - 1, 1), (-100, -1, 1), (2, 1, 1), (2**31 - 1, -(2**31), -1),
    (-1, -100, -2), (0, -1, -1), (1, 0, -1), (0, 3, 2), (-100, -200, -1), (5, 5, 1),
]  # fmt: skip


@pytest.mark.parametrize("shape", ["2, 3, 4", "a, b, c"])
def test_slice(check, shape):
    variants = []
    for start, end, step in SLICES:
        limits = (("s@", start), ("e@", end), ("t@", step))
        body = " ".join(constant(name, value, value) for name, value in limits)
        variants.append(f"{body} {constant('a@', 1, -1)}||, s@, e@, a@, t@")
    check(many("Slice", variants, shape), (X,))


def test_slice_known_at_run_time(check):
    text = """g (float[a, b, 4] x, int64[1] s, int64[1] e, int64[1] k, int64[1] t) => (float[p, q, r] y) {
        y = Slice(x, s, e, k, t) }"""
    feeds = [(X, *(np.array([v]) for v in (s, e, 1, t))) for s, e, t in SLICES]
    check(text, *feeds, (X, *(np.array([v]) for v in (1, 3, -1, 1))))


def test_slice_of_an_empty_axis(check):
    body = f"{constant('s', -1)} {constant('e', -100)} {constant('a', 1)} {constant('t', -1)}"
    text = unary(body + " y = Slice(x, s, e, a, t)")
    check(text, (X[:, :0],), (X,))


def test_expand(check):
    check(unary(f"{constant('s', 5, 1, 1, 1)} y = Expand(x, s)", out="float[p, q, r, t] y"), (X,))
    text = "g (float[a, b, 4] x, int64[3] s) => (float[p, q, r] y) { y = Expand(x, s) }"
    check(text, (X[:1], np.array([5, 1, 4])), (X, np.array([1, 3, 1])))


def test_tile(check):
    check(unary(f"{constant('s', 1, 2, 3)} y = Tile(x, s)"), (X,))
    text = "g (float[a, b, 4] x, int64[3] s) => (float[p, q, r] y) { y = Tile(x, s) }"
    check(text, (X, np.array([2, 1, 0])), (X, np.array([1, 3, 2])))


def test_pad(check):
    modes, amounts = ["constant", "reflect", "edge", "wrap"], [(0, 1, 2, 0, 1, 1), (1, 0, 3, 0, 2, 0)]
    check(many("Pad", [f"{constant('p@', *a)}|mode = '{m}'|, p@" for m in modes for a in amounts]), (X,))


def test_pad_negative_axes_value(check):
    text = "g (float[a, b, 4] x, float v) => (float[p, q, r] y) { %s %s y = Pad(x, n, v, k) }"
    text %= (constant("n", -1, 2, 1, -1), constant("k", -1, 1))
    check(text, (X, np.array(7, "f4")))
    text = "g (float[a, b, 4] x, int64[6] n, float v) => (float[p, q, r] y) { y = Pad(x, n, v) }"
    check(text, *((X, np.array(n), np.array(9, "f4")) for n in [(1, -1, 0, 0, 2, -1), (0, 0, 0, 0, 0, 0)]))


def test_constant_of_shape_and_range(check):
    check(unary("s = Shape(x) y = ConstantOfShape<value = float[1] {2.5}>(s)"), (X,), (X[:0],))
    text = "g (int64[2] s) => (float[p, q] y) { y = ConstantOfShape(s) }"
    check(text, (np.array([2, 0]),), (np.array([3, 1]),))
    for kind, dtype in (("int64", "i8"), ("int32", "i4"), ("float", "f4")):
        text = f"g ({kind} a, {kind} b, {kind} c) => ({kind}[n] y) {{ y = Range(a, b, c) }}"
        feeds = [(0, 5, 1), (5, 0, -2), (3, 3, 1), (3, 1, 1), (-4, 9, 3)]
        check(text, *(tuple(np.array(v, dtype) for v in feed) for feed in feeds))


def test_non_zero(check):
    text = "g (float[a, b] x) => (int64[p, q] y) { y = NonZero(x) }"
    check(text, (np.eye(3, dtype="f4"),), (np.zeros((2, 2), "f4"),), (np.ones((0, 4), "f4"),))
    check("g (bool[a] x) => (int64[p, q] y) { y = NonZero(x) }", (np.array([True, False, True]),))


def test_a_kernel_that_reads_a_size_waits_for_it(check):
    # The kernels before and after the size is known could be fused, but not moved in front of it.
    body = """r = Relu(x) n = NonZero(x) s = Shape<start = 1>(n) zero = Constant<value_int = 0>()
        a = Gather(r, zero) b = Sqrt(a) y = Expand(b, s)"""
    check("g (float[4] x) => (float[d] y) { " + body + " }", (np.array([4, 0, 3, 0], "f4"),))


def test_compress(check):
    text = "g (float[a, b, 4] x, bool[c] k) => (float[p, q, r] y) { y = Compress<axis = 1>(x, k) }"
    check(text, (X, np.array([True, False, True])), (X, np.array([False, True])))
    text = "g (float[a, b, 4] x, bool[c] k) => (float[p] y) { y = Compress(x, k) }"
    check(text, (X, np.array([False, True, True, False, True])))


def test_unique(check):
    values = np.array([2, 1, 1, 3, 4, 3, 2], "f4")
    outputs = "float[n] y, int64[m] i, int64[k] v, int64[l] c"
    for order in (0, 1):
        text = f"g (float[a] x) => ({outputs}) {{ y, i, v, c = Unique<sorted = {order}>(x) }}"
        check(text, (values,), (values[:1],))
        rows = np.array([[1, 0, 0], [1, 0, 0], [2, 3, 4], [0, 9, 9]], "f4")
        outputs2 = outputs.replace("float[n]", "float[n, w]")
        for axis, data in ((0, rows), (1, rows.T)):
            text = f"g (float[a, b] x) => ({outputs2}) {{ y, i, v, c = Unique<axis = {axis}, sorted = {order}>(x) }}"
            check(text, (np.ascontiguousarray(data),))


def test_unique_of_booleans(compile_model, make_model):
    node = helper.make_node("Unique", ["x"], ["y", "first", "inverse", "counts"])
    outputs = {"y": np.bool_, "first": np.int64, "inverse": np.int64, "counts": np.int64}
    x = np.array([True, True, False, True])
    found = compile_model(make_model([node], {"x": (np.bool_, ["n"])}, outputs))(x)
    for got, want in zip(found, ([False, True], [2, 0], [1, 1, 0, 1], [1, 3]), strict=True):
        np.testing.assert_array_equal(got, want)


def test_non_max_suppression(check):
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 1, size=(2, 30, 2)).astype("f4")
    boxes = np.concatenate([corner, corner + rng.uniform(0.1, 0.5, size=(2, 30, 2)).astype("f4")], axis=2)
    scores = rng.uniform(size=(2, 3, 30)).astype("f4")
    for center in (0, 1):
        text = f"""g (float[n, b, 4] x, float[n, c, b] s, int64[1] m, float[1] o, float[1] t) => (int64[k, 3] y) {{
            y = NonMaxSuppression<center_point_box = {center}>(x, s, m, o, t) }}"""
        limits = [(5, 0.3, 0.2), (100, 0.5, 0.0), (0, 0.5, 0.5), (3, 0.1, 2.0)]
        check(
            text,
            *((boxes, scores, np.array([m]), np.array([o], "f4"), np.array([t], "f4")) for m, o, t in limits),
        )


def test_center_crop_pad_and_trilu(check):
    check(unary(f"{constant('s', 3, 2)} y = CenterCropPad<axes = [0, -1]>(x, s)"), (X,))
    for upper in (0, 1):
        text = f"g (float[a, b, 4] x, int64 k) => (float[a, b, 4] y) {{ y = Trilu<upper = {upper}>(x, k) }}"
        check(text, *((X, np.array(k)) for k in (-1, 0, 2, 9)))
