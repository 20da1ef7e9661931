"""Inputs from the command line: files, images, random numbers."""

import numpy as np
import pytest
from PIL import Image

from optc.cli.common import read_inputs, write_atomically
from optc.errors import InputError, UsageError
from optc.runtime.format import TensorSpec

X = TensorSpec("x", "float32", (1, 3, 4, 5))
K = TensorSpec("k", "int64", (2,))


def test_arrays_by_name_alone_and_from_npz(tmp_path):
    x, k = np.ones((1, 3, 4, 5), np.float32), np.array([1, 2])
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "all.npz", x=x, k=k)
    assert np.array_equal(read_inputs([f"x={tmp_path}/x.npy"], [X, K])["x"], x)
    assert np.array_equal(read_inputs([f"{tmp_path}/x.npy"], [X])["x"], x)
    assert set(read_inputs([f"{tmp_path}/all.npz"], [X, K])) == {"x", "k"}
    assert np.array_equal(read_inputs([f"k={tmp_path}/all.npz"], [X, K])["k"], k)


def test_random_fills_what_is_not_given(tmp_path):
    np.save(tmp_path / "k.npy", np.array([5, 6]))
    inputs = read_inputs(["random:3", f"k={tmp_path}/k.npy"], [X, K])
    assert inputs["k"].tolist() == [5, 6]
    assert inputs["x"].shape == (1, 3, 4, 5)
    again = read_inputs(["x=random:3"], [X, K])
    assert set(again) == {"x"}


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_image_is_resized_and_scaled(tmp_path, suffix):
    Image.new("RGB", (50, 40), (255, 0, 51)).save(tmp_path / f"i.{suffix}", quality=100)
    x = read_inputs([f"x={tmp_path}/i.{suffix}"], [X])["x"]
    assert x.shape == (1, 3, 4, 5)
    assert x.dtype == np.float32
    assert np.allclose(x[0, :, 0, 0], [1.0, 0.0, 0.2], atol=0.02)


def test_channels_last_gray_integers(tmp_path):
    Image.new("L", (5, 4), 7).save(tmp_path / "i.png")
    spec = TensorSpec("g", "uint8", ("n", "h", "w", 1))
    assert np.array_equal(read_inputs([f"g={tmp_path}/i.png"], [spec])["g"], np.full((1, 4, 5, 1), 7, np.uint8))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("y=a.npy", "unknown input 'y'"),
        ("a.npy", "does not say which input"),
        ("x=missing.npy", "cannot read"),
        ("x=broken.npy", "cannot read"),
        ("broken.npz", "cannot read"),
        ("text.npz", "no NumPy file of plain numbers"),
        ("x=broken.png", "cannot read the image"),
        ("k=good.png", "not an image batch"),
        ("x=a.csv", "cannot read '.csv'"),
    ],
)
def test_mistakes_are_named(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    for name in ("broken.npy", "broken.npz", "broken.png"):
        (tmp_path / name).write_bytes(b"\x93NUMPYrubbish")
    (tmp_path / "text.npz").write_bytes(b"rubbish")
    Image.new("L", (5, 4)).save("good.png")
    with pytest.raises(InputError, match=message):
        read_inputs([text], [X, K])


def test_pickles_are_refused(tmp_path):
    np.save(tmp_path / "evil.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="cannot read"):
        read_inputs([f"x={tmp_path}/evil.npy"], [X])


def test_the_seed_must_be_a_number():
    with pytest.raises(UsageError, match="seed"):
        read_inputs(["random:tea"], [X])


def test_a_failed_write_leaves_nothing(tmp_path):
    target = tmp_path / "out.npz"
    target.write_bytes(b"old")

    def fail(path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UsageError, match="No space left"):
        write_atomically(target, fail)
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["out.npz"]
