"""Transforms as products with constant matrices, compared with NumPy's."""

from __future__ import annotations

import numpy as np
import pytest

from optc.passes.fuse.fourier import fourier_pass

DFT = "dft(x) => matmul(x, roots)"
STFT = "stft(x, step, window) => conv(x, window * roots)"


@pytest.fixture
def transform(build, run, verify):
    """Rewrite the one node of a model, and run what became of it."""

    def attempt(text, x, **constants):
        model = build(text, **constants)
        result = fourier_pass().call(model)
        assert sum(result.fired.values()) == 1
        verify(model)
        (y,) = run(model, {"x": x})
        return y[..., 0] + 1j * y[..., 1] if y.shape[-1] == 2 else y[..., 0]

    return attempt


def signal(rng, *shape):
    return rng.standard_normal((*shape, 2)).astype(np.float32)


def numbers(x):
    return x[..., 0] + 1j * x[..., 1] if x.shape[-1] == 2 else x[..., 0]


def close(found, expected):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize("n", [1, 2, 7, 12, 128, 131, 144, 390])
@pytest.mark.parametrize("axis", [0, 1])
def test_complex(n, axis, transform, rng):
    x = signal(rng, *((n, 3) if axis == 0 else (3, n)))
    shape = f"float[{n},k,2]" if axis == 0 else f"float[k,{n},2]"
    a = np.array(axis)
    close(
        transform(f"({shape} x) => (float[?,?,?] y) {{ y = DFT(x, , a) }}", x, a=a), np.fft.fft(numbers(x), axis=axis)
    )
    found = transform(f"({shape} x) => (float[?,?,?] y) {{ y = DFT<inverse=1>(x, , a) }}", x, a=a)
    close(found, np.fft.ifft(numbers(x), axis=axis))


@pytest.mark.parametrize("n", [2, 5, 128, 130, 147])
def test_real(n, transform, rng):
    x = signal(rng, 2, 3, n)[..., :1]
    text = f"(float[2,k,{n},1] x) => (float[?,?,?,?] y) {{ y = DFT<onesided=1>(x) }}"
    close(transform(text, x), np.fft.rfft(numbers(x)))
    close(transform(text.replace("onesided", "inverse"), x), np.fft.ifft(numbers(x)))


@pytest.mark.parametrize(("given", "n"), [(9, 16), (9, 17), (9, 12), (9, 24), (65, 128)])
def test_back_to_real(given, n, transform, rng):
    x = signal(rng, 4, given)
    text = f"(float[b,{given},2] x) => (float[?,?,?] y) {{ y = DFT<inverse=1,onesided=1>(x, n) }}"
    close(transform(text, x, n=np.array(n)), np.fft.irfft(numbers(x), n))


@pytest.mark.parametrize("n", [100, 144, 200])
def test_padded_and_cut(n, transform, rng):
    x = signal(rng, 2, 144)
    text = "(float[b,144,2] x) => (float[?,?,?] y) { y = DFT(x, n) }"
    close(transform(text, x, n=np.array(n)), np.fft.fft(numbers(x), n))


@pytest.mark.parametrize(("length", "onesided"), [(16, 1), (15, 1), (16, 0)])
@pytest.mark.parametrize("windowed", [True, False])
def test_frames(length, onesided, windowed, transform, rng):
    x = signal(rng, 2, 50)[..., :1]
    window = np.hanning(length).astype(np.float32) if windowed else None
    constants = {"s": np.array(6), "n": np.array(length)} | ({"w": window} if windowed else {})
    text = "(float[b,t,1] x) => (float[?,?,?,?] y) { y = STFT<onesided=%d>(x, s, %s, n) }"
    found = transform(text % (onesided, "w" if windowed else ""), x, **constants)
    frames = np.lib.stride_tricks.sliding_window_view(x[..., 0], length, 1)[:, ::6]
    frames = frames if window is None else frames * window
    close(found, np.fft.rfft(frames) if onesided else np.fft.fft(frames))


@pytest.mark.parametrize("windowed", [True, False])
def test_long_frames(windowed, transform, rng):
    x, window = signal(rng, 2, 1500)[..., :1], np.hanning(600).astype(np.float32)
    text = "(float[b,1500,1] x) => (float[?,?,?,?] y) { y = STFT(x, s, %s, n) }"
    constants = {"s": np.array(75), "n": np.array(600)} | ({"w": window} if windowed else {})
    found = transform(text % ("w" if windowed else ""), x, **constants)
    frames = np.lib.stride_tricks.sliding_window_view(x[..., 0], 600, 1)[:, ::75]
    close(found, np.fft.rfft(frames * window if windowed else frames))


@pytest.mark.parametrize(
    ("text", "constants", "rule", "reason"),
    [
        ("(float[b,t,2] x) => (float[?,?,?] y) { y = DFT(x) }", {}, DFT, "sizes"),
        ("(float[b,c,8,2] x) => (float[?,?,?,?] y) { y = DFT(x) }", {}, DFT, "sizes"),
        ("(float[b,8,2] x, int64 n) => (float[?,?,?] y) { y = DFT(x, n) }", {}, DFT, "not constant"),
        ("(float[b,9973,2] x) => (float[?,?,?] y) { y = DFT(x) }", {}, DFT, "too large"),
        ("(float[b,t,2] x) => (float[?,?,?,?] y) { y = STFT<onesided=0>(x, s, , s) }", {"s": 8}, STFT, "complex"),
        ("(float[b,t,1] x, float[8] w) => (float[?,?,?,?] y) { y = STFT(x, s, w) }", {"s": 8}, STFT, "not constant"),
        ("(float[b,t,1] x) => (float[?,?,?,?] y) { y = STFT(x, s, , s) }", {"s": 4096}, STFT, "too large"),
        ("(float[b,t,1] x) => (float[?,?,?,?] y) { y = STFT(x, s, , n) }", {"s": 0, "n": 8}, STFT, "do not fit"),
    ],
)
def test_others_stay(text, constants, rule, reason, build):
    model = build(text, **{name: np.array(value) for name, value in constants.items()})
    result = fourier_pass().call(model)
    assert not result.fired
    assert [(s.rule, reason in s.reason) for s in result.skipped] == [(rule, True)]
