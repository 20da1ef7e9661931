import numpy as np
import pytest

from optc.errors import UsageError
from optc.runtime.format import TensorSpec
from optc.sample import around_examples, default_dims, random_inputs

SPECS = [
    TensorSpec("x", "float32", ("batch", 3, "h", "h")),
    TensorSpec("ids", "int64", ("batch", "length")),
    TensorSpec("flag", "bool", (5,)),
    TensorSpec("half", "bfloat16", (2,)),
]


def test_named_dims_agree_across_inputs():
    inputs = random_inputs(SPECS)
    assert inputs["x"].shape[0] == inputs["ids"].shape[0]
    assert inputs["x"].shape[2] == inputs["x"].shape[3]
    assert [inputs[s.name].dtype.name for s in SPECS] == ["float32", "int64", "bool", "bfloat16"]


def test_the_same_seed_gives_the_same_inputs():
    a, b, c = random_inputs(SPECS, seed=1), random_inputs(SPECS, seed=1), random_inputs(SPECS, seed=2)
    assert np.array_equal(a["x"], b["x"])
    assert not np.array_equal(a["x"], c["x"])


def test_integers_stay_below_their_limit():
    ids = random_inputs(SPECS, dims={"length": 500}, integers={"ids": range(9)})["ids"]
    assert ids.min() >= 0
    assert ids.max() == 8


def test_sizes_can_be_given_and_unknown_names_are_refused():
    assert random_inputs(SPECS, dims={"h": 7})["x"].shape[2:] == (7, 7)
    with pytest.raises(UsageError, match="the model has: batch, h, length"):
        random_inputs(SPECS, dims={"width": 7})
    assert set(default_dims(SPECS)) == {"batch", "h", "length"}


def test_integers_of_examples_are_kept_if_the_examples_fit():
    specs = [TensorSpec("x", "float32", ("n", 3)), TensorSpec("i", "int64", ("n",))]
    rows = np.array([5, 9])
    found = around_examples(specs, [(2, 3), rows])
    assert found is not None
    assert found["x"].shape == (2, 3) and found["i"] is rows
    assert around_examples(specs, [(4, 3), rows]) is None
    assert around_examples(specs, [(2, 3, 1), rows]) is None
    assert around_examples(specs, [(2, 4), rows]) is None
    assert around_examples(specs[:1], [(2, 3), rows]) is None
    assert around_examples(specs[:1], [(2, 3)]) is None
