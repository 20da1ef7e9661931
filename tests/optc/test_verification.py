import numpy as np
import onnx_ir as oir
import pytest

from optc import verification
from optc.errors import AccuracyError, UsageError
from optc.verification import Verification, compare

RELU = '<ir_version: 10, opset_import: ["": 20]> g (float[n] x) => (float[n] y) { y = Relu(x) }'


def test_equal_outputs_have_no_error():
    x = np.array([1.0, -2.0, np.inf, np.nan], np.float32)
    error = compare("y", x, x.copy())
    assert (error.max_absolute, error.relative, error.mismatched) == (0.0, 0.0, 0.0)
    assert error.within(None)


def test_the_error_is_relative_to_the_largest_magnitude():
    expected = np.array([100.0, 1.0], np.float32)
    error = compare("y", expected + np.float32([0.0, 0.5]), expected)
    assert error.relative == pytest.approx(0.005)
    assert error.max_absolute == pytest.approx(0.5)
    assert not error.within(None)
    assert error.within(0.01)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_instead_of_a_number_are_infinite_errors(bad):
    error = compare("y", np.array([bad, 1.0], np.float32), np.array([1.0, 1.0], np.float32))
    assert error.relative == np.inf


def test_integers_must_be_equal():
    error = compare("y", np.array([1, 2, 3, 5]), np.array([1, 2, 3, 4]))
    assert error.mismatched == 0.25
    assert not error.within(None)
    assert not error.within(10.0)


def test_an_empty_output_is_right():
    empty = np.zeros((0, 3), np.float32)
    assert compare("y", empty, empty).within(None)


@pytest.mark.parametrize("other", [np.zeros((3, 2), np.float32), np.zeros((2, 3), np.float64)])
def test_shape_and_dtype_must_agree(other):
    with pytest.raises(AccuracyError, match="the reference gives"):
        compare("y", other, np.zeros((2, 3), np.float32))


def test_require_names_every_output_that_is_off():
    good = compare("good", np.ones(2), np.ones(2))
    bad = compare("bad", np.ones(2), np.ones(2) * 2)
    result = Verification("reference", "given", {}, (good, bad))
    with pytest.raises(AccuracyError, match="bad") as raised:
        result.require(None)
    assert "good" not in str(raised.value).split("hint")[0]
    assert raised.value.exit_code == 4
    result.require(0.6)


def test_vocabulary_limits_integer_inputs():
    text = """<ir_version: 10, opset_import: ["": 20]>
    g (int64[n] ids, int64[n] other) => (float[n,4] y, int64[n] z)
    <float[7,4] table = {0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0}>
    { c = Cast<to=6>(ids) y = Gather(table, c) z = Identity(other) }"""
    assert verification.integer_choices(oir.from_onnx_text(text)) == {"ids": range(7)}


def test_an_integer_that_is_compared_with_constants_is_one_of_them():
    text = """<ir_version: 10, opset_import: ["": 20]>
    g (int64 rate, float[n] x) => (bool y, bool z)
    <int64 a = {16000}, int64 b = {8000}> { y = Equal(rate, a) z = Equal(b, rate) }"""
    assert verification.integer_choices(oir.from_onnx_text(text)) == {"rate": [8000, 16000]}


def test_an_unknown_reference_is_a_usage_error():
    with pytest.raises(UsageError, match="no reference called"):
        verification.reference(
            oir.from_onnx_text("<ir_version: 10, opset_import: ['': 20]> g () => () {}".replace("'", '"')), "tea"
        )
