"""Calibration data: every way to give it, and every way to give it wrong."""

import numpy as np
import pytest
from PIL import Image

from optc.compression.data import load, split
from optc.errors import InputError, UsageError
from optc.runtime.format import TensorSpec

X = TensorSpec("x", "float32", ("batch", 3))
K = TensorSpec("k", "int64", ("batch",))
FIXED = TensorSpec("x", "float32", (2, 3))


def rows(count: int) -> np.ndarray:
    return np.arange(count * 3, dtype=np.float32).reshape(count, 3)


def samples():
    return [{"x": rows(2)}, {"x": rows(5)}]


def test_stacked_samples_are_split_into_the_models_batches():
    assert [call["x"].shape for call in load(rows(4), [X])] == [(1, 3)] * 4
    assert [call["x"].shape for call in load(rows(4), [FIXED])] == [(2, 3)] * 2
    assert [call["x"].shape for call in load(rows(4).reshape(2, 2, 3), [X])] == [(2, 3)] * 2
    both = load({"x": rows(2), "k": np.array([7, 8])}, [X, K])
    assert [int(call["k"][0]) for call in both] == [7, 8]


def test_an_iterable_of_mappings_tuples_or_arrays():
    assert len(load(samples(), [X])) == 2
    assert len(load([(rows(2), np.array([1, 2])), (rows(1), np.array([1]))], [X, K])) == 2
    assert len(load((rows(n) for n in (1, 2, 3)), [X])) == 3
    again = load(load(samples(), [X]), [X])
    assert again.calls[1]["x"].shape == (5, 3)


def test_a_limit_leaves_the_rest_unread():
    def endless():
        while True:
            yield from samples()

    assert len(load(endless(), [X], limit=5)) == 5


def test_a_folder_and_files(tmp_path):
    for number in range(3):
        np.savez(tmp_path / f"{number}.npz", x=rows(2) + number, k=np.array([1, number]))
    (tmp_path / "notes.txt").write_text("no sample")
    found = load(tmp_path, [X, K])
    assert [int(call["k"][1]) for call in found] == [0, 1, 2]
    np.savez(tmp_path / "all.npz", x=rows(6), k=np.arange(6))
    assert len(load(str(tmp_path / "all.npz"), [X, K])) == 6
    np.save(tmp_path / "x.npy", rows(6))
    assert len(load(tmp_path / "x.npy", [X])) == 6


def test_a_folder_of_images(tmp_path):
    for color in ("red", "blue"):
        Image.new("RGB", (8, 6), color).save(tmp_path / f"{color}.png")
    found = load(tmp_path, [TensorSpec("image", "float32", (1, 3, 4, 4))])
    assert found.calls[0]["image"][0, 2].max() == 1.0


def test_a_function(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "readers_of_a_test.py").write_text(
        "import numpy as np\ndef read():\n    for n in (1, 2):\n        yield {'x': np.full((n, 3), n, np.float32)}\n"
    )
    assert len(load("readers_of_a_test:read", [X])) == 2
    with pytest.raises(UsageError, match="has no 'write'"):
        load("readers_of_a_test:write", [X])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "holds no samples"),
        (rows(1), "holds one sample"),
        ([{"x": rows(1)}, {"x": rows(1)}], "2 samples that are all the same"),
        ("nowhere", "no such file or folder"),
        ("nowhere_at_all:read", "cannot import"),
        (7, "is a int, not samples"),
    ],
)
def test_too_little_data_is_a_usage_error(source, message):
    with pytest.raises(UsageError, match=message):
        load(source, [X])


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"y": rows(1)}, "sample 1: .*'x'"),
        ({"x": rows(1).astype(np.float64)}, "sample 1: .*dtype float64"),
        ({"x": rows(2).reshape(1, 6)}, "sample 1: .*shape"),
        ({"x": np.full((1, 3), np.nan, np.float32)}, "sample 1: 'x' holds values that are no finite"),
        ({"x": np.full((1, 3), np.inf, np.float32)}, "sample 1: 'x' holds values that are no finite"),
        ({"x": np.zeros((0, 3), np.float32)}, "sample 1: 'x' is empty"),
        ((rows(1), rows(1)), "sample 1 has 2 arrays for 1 inputs"),
        ("x", "sample 1 is a str"),
    ],
)
def test_a_bad_sample_is_named(second, message):
    with pytest.raises(InputError, match=message):
        load([{"x": rows(2)}, second], [X])


def test_stacks_that_do_not_fit():
    with pytest.raises(InputError, match="5 rows of 'x' do not make batches of 2"):
        split({"x": rows(5)}, [FIXED], "data")
    with pytest.raises(InputError, match="different numbers of samples"):
        split({"x": rows(5), "k": np.arange(4)}, [X, K], "data")
    with pytest.raises(InputError, match="no input 'z'"):
        split({"z": rows(5)}, [X], "data")
    with pytest.raises(InputError, match="'x' has shape"):
        split({"x": np.zeros(3, np.float32)}, [X], "data")


def test_what_cannot_be_samples_of_this_model(tmp_path):
    with pytest.raises(UsageError, match="no inputs"):
        load(rows(2), [])
    with pytest.raises(UsageError, match="the model has 2 inputs"):
        load(rows(2), [X, K])
    with pytest.raises(UsageError, match="are none"):
        load(rows(2), [X], limit=0)
    with pytest.raises(UsageError, match="holds no calibration data"):
        load(tmp_path, [X])
    (tmp_path / "data.csv").write_text("1,2")
    with pytest.raises(UsageError, match="not calibration data"):
        load(tmp_path / "data.csv", [X])
