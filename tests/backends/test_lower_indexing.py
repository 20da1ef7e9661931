"""Reading and writing at positions given by a tensor, sorting, and transforms, against onnxruntime and NumPy."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest

from optc.errors import UnsupportedModelError

X = np.arange(24, dtype="f4").reshape(2, 3, 4)


def parse(text: str, opset: int = 21) -> onnx.ModelProto:
    header = f'<ir_version: 10, opset_import: ["" : {opset}]>'
    return onnx.parser.parse_model(header + text.replace("'", '"'))


def test_gather(check):
    for axis in (0, 1, -1):
        text = f"g (float[a, b, 4] x, int64[i, j] k) => (float[p, q, r, s] y) {{ y = Gather<axis = {axis}>(x, k) }}"
        check(text, (X, np.array([[0, -1], [1, -2]])), (X, np.zeros((0, 3), "i8")))
    text = "g (float[a, b, 4] x) => (float[p, q] y) { k = Constant<value_int = -2>() y = Gather<axis = 1>(x, k) }"
    check(text, (X,))


def test_gather_with_int32_from_nothing(check):
    text = "g (float[a, 4] x, int32[i] k) => (float[p, q] y) { y = Gather(x, k) }"
    check(text, (X[0], np.array([2, 0, -3], "i4")), (X[0, :0], np.zeros(0, "i4")))


def test_positions_outside_do_not_read_foreign_memory(compile_model):
    run = compile_model(parse("g (float[4] x, int64[i] k) => (float[j] y) { y = Gather(x, k) }"))
    (y,) = run(X[0, 0], np.array([10**12, -(10**12), 4, -5]))
    assert set(y) <= set(X[0, 0])


def test_gather_elements(check):
    text = "g (float[a, b, 4] x, int64[i, j, k] n) => (float[p, q, r] y) { y = GatherElements<axis = 1>(x, n) }"
    check(text, (X, np.array([[[0, -1], [2, 1]], [[1, 1], [0, 0]]])), (X, np.zeros((2, 0, 4), "i8")))


@pytest.mark.parametrize("batch", [0, 1])
def test_gather_nd(check, batch):
    text = f"g (float[2, b, 4] x, int64[2, j, 2] n) => (float y) {{ y = GatherND<batch_dims = {batch}>(x, n) }}"
    check(text, (X, np.array([[[0, 1], [1, -1]], [[1, 2], [0, 0]]])))


def test_gather_nd_of_unknown_depth_is_refused(compile_model):
    text = "g (float[2, b, 4] x, int64[i, j] n) => (float y) { y = GatherND(x, n) }"
    with pytest.raises(UnsupportedModelError, match="last dimension of the indices"):
        compile_model(parse(text))


@pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
def test_scatter(check, reduction):
    """Duplicate positions are in every case but "none", for which their order is not defined."""
    rows = np.array([[0, 2], [1, -1]]) if reduction == "none" else np.array([[0, 0], [1, -2]])
    text = f"""g (float[a, b] x, int64[i, j] n, float[i, j] u) => (float[a, b] y) {{
        y = ScatterElements<axis = 1, reduction = '{reduction}'>(x, n, u) }}"""
    check(text, (X[0], rows, np.full((2, 2), 3, "f4")))
    where = np.array([[0, 1], [1, -1]]) if reduction == "none" else np.array([[0, 1], [0, 1]])
    text = f"""g (float[a, b, 4] x, int64[i, 2] n, float[i, 4] u) => (float[a, b, 4] y) {{
        y = ScatterND<reduction = '{reduction}'>(x, n, u) }}"""
    check(text, (X, where, np.array([[1, 2, 3, 4], [4, 3, 2, 1]], "f4")), (X, where[:0], np.zeros((0, 4), "f4")))


def test_one_hot(check):
    text = "g (int64[a, b] i, int64[1] d, float[2] v) => (float[p, q, r] y) { y = OneHot<axis = 1>(i, d, v) }"
    check(text, (np.array([[0, 2], [-1, 9]]), np.array([3]), np.array([5, 7], "f4")))


@pytest.mark.parametrize("largest", [0, 1])
def test_top_k(check, largest):
    values = np.random.default_rng(0).integers(0, 9, size=(3, 40, 2)).astype("f4")
    text = f"""g (float[a, b, c] x, int64[1] k) => (float[p, q, r] y, int64[p, q, r] i) {{
        y, i = TopK<axis = 1, largest = {largest}>(x, k) }}"""
    check(text, *((values, np.array([k])) for k in (1, 7, 40, 0)))


def test_top_k_of_nan(compile_model):
    model = parse("g (float[n] x, int64[1] k) => (float[m] y, int64[m] i) { y, i = TopK(x, k) }")
    values, order = compile_model(model)(np.array([1, np.nan, 3, np.nan, 2], "f4"), np.array([5]))
    assert order.tolist() == [1, 3, 2, 4, 0]
    np.testing.assert_array_equal(values, np.array([np.nan, np.nan, 3, 2, 1], "f4"))


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_to_space_and_back(check, mode):
    x = np.arange(48, dtype="f4").reshape(1, 8, 2, 3)
    text = f"g (float[n, 8, h, w] x) => (float y) {{ y = DepthToSpace<blocksize = 2, mode = '{mode}'>(x) }}"
    check(text, (x,))
    check("g (float[n, 2, h, w] x) => (float y) { y = SpaceToDepth<blocksize = 2>(x) }", (x.reshape(1, 2, 4, 6),))


def test_reverse_sequence(check):
    text = "g (float[a, b, 4] x, int64[a] n) => (float y) { y = ReverseSequence<batch_axis = 0, time_axis = 1>(x, n) }"
    check(text, (X, np.array([3, 1])), (X, np.array([2, 0])))


def test_eye_like_and_det(check):
    check("g (float[a, b] x) => (int64[a, b] y) { y = EyeLike<k = 1, dtype = 7>(x) }", (X[0],))
    matrices = np.random.default_rng(1).normal(size=(2, 2, 5, 5)).astype("f4")
    matrices[0, 0, :, 0] = 0
    matrices[0, 1, 0, 0] = 0
    check("g (float[a, b, 5, 5] x) => (float[a, b] y) { y = Det(x) }", (matrices,), evaluator=True, atol=1e-5)


def test_tensor_scatter(check):
    cache, update = np.zeros((2, 3, 4, 2), "f4"), np.ones((2, 3, 2, 2), "f4")
    for mode in ("linear", "circular"):
        text = f"""g (float[n, h, s, d] x, float[n, h, t, d] u, int64[n] w) => (float[n, h, s, d] y) {{
            y = TensorScatter<mode = '{mode}'>(x, u, w) }}"""
        start = np.array([0, 2]) if mode == "linear" else np.array([3, 1])
        check(text, (cache, update, start), opset=24, evaluator=True)


def test_bit_cast(compile_model):
    run = compile_model(parse("g (float[n] x) => (int32[n] y) { y = BitCast<to = 6>(x) }", opset=26))
    (y,) = run(X[0, 0])
    np.testing.assert_array_equal(y, X[0, 0].view("i4"))


def test_transforms_against_numpy(compile_model):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(2, 12, 2)).astype("f4")
    z = x[..., 0] + 1j * x[..., 1]
    length = "n = Constant<value_int = {}>() a = Constant<value_int = 1>() "

    def run(text, value):
        model = parse(f"g (float[b, t, {value.shape[-1]}] x) => (float y) {{ {text} }}")
        return compile_model(model)(value)[0]

    for n in (12, 16, 7):
        got = run(length.format(n) + "y = DFT(x, n, a)", x)
        np.testing.assert_allclose(got[..., 0] + 1j * got[..., 1], np.fft.fft(z, n=n, axis=1), atol=1e-5)
        got = run(length.format(n) + "y = DFT<onesided = 1>(x, n, a)", x[..., :1])
        np.testing.assert_allclose(got[..., 0] + 1j * got[..., 1], np.fft.rfft(x[..., 0], n=n), atol=1e-5)
    got = run("a = Constant<value_int = 1>() y = DFT<inverse = 1>(x, , a)", x)
    np.testing.assert_allclose(got[..., 0] + 1j * got[..., 1], np.fft.ifft(z, axis=1), atol=1e-5)
    for n in (21, 22):
        got = run(length.format(n) + "y = DFT<inverse = 1, onesided = 1>(x, n, a)", x)
        np.testing.assert_allclose(got[..., 0], np.fft.irfft(z, n=n, axis=1), atol=1e-5)


def test_stft(check):
    signal = np.random.default_rng(3).normal(size=(2, 50, 1)).astype("f4")
    text = """g (float[b, t, 1] x, float[16] w) => (float y) {
        s = Constant<value_int = 4>() n = Constant<value_int = 16>() y = STFT(x, s, w, n) }"""
    check(text, (signal, np.hanning(16).astype("f4")), evaluator=True, atol=1e-5)


def test_col2im(check):
    columns = np.random.default_rng(4).normal(size=(1, 12, 9)).astype("f4")
    text = """g (float[n, 12, l] x) => (float[p, q, r, s] y) {
        i = Constant<value_ints = [5, 5]>() b = Constant<value_ints = [2, 2]>()
        y = Col2Im<pads = [1, 0, 0, 1], strides = [2, 2], dilations = [1, 1]>(x, i, b) }"""
    check(text, (columns,), evaluator=True, atol=1e-5)
