from __future__ import annotations

import pytest
from onnx.helper import make_node as node

from optc.errors import UsageError
from optc.frontend.bind import parse_dim, parse_input_shape
from optc.frontend.onnx import load


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x:1,3,224,224", ("x", (1, 3, 224, 224))),
        ("x: batch, 3 ,?,?", ("x", ("batch", 3, "?", "?"))),
        ("serving_default:0:8", ("serving_default:0", (8,))),
        ("x:", ("x", ())),
    ],
)
def test_parse_input_shape(text, expected):
    assert parse_input_shape(text) == expected


@pytest.mark.parametrize("text", ["x", ":1,2", "x:1,,2", "x:-1", "x:1.5", "x:1;2", ""])
def test_parse_input_shape_errors(text):
    with pytest.raises(UsageError):
        parse_input_shape(text)


def test_parse_dim():
    assert parse_dim("batch=8") == ("batch", 8)
    assert parse_dim(" a=b = 3") == ("a=b", 3)


@pytest.mark.parametrize("text", ["batch", "=8", "batch=", "batch=-1", "batch=x", "batch=1.5"])
def test_parse_dim_errors(text):
    with pytest.raises(UsageError, match="batch=8"):
        parse_dim(text)


@pytest.fixture
def model(build):
    return build(
        [node("Add", ["x", "y"], ["z"]), node("Relu", ["free"], ["f"])],
        {"x": ["batch", 4, "w"], "y": ["batch", 4, "w"], "free": ["?", -1, 2]},
        ["z", "f"],
    )


def shapes(model) -> list[list[int | str]]:
    values = [*model.graph.inputs, *model.graph.outputs]
    return [[d if isinstance(d, int) else d.value for d in v.shape] for v in values]


def test_nothing_bound_stays_symbolic(model):
    found = shapes(load(model))
    assert found[0] == found[1] == found[3] == ["batch", 4, "w"]
    assert len({*found[2], *found[0]}) == 6  # two anonymous dimensions with names of their own


def test_a_bound_dimension_holds_everywhere(model):
    found = shapes(load(model, dims={"batch": 8}))
    assert found[0] == found[1] == found[3] == [8, 4, "w"]


def test_an_input_shape_binds_the_dimensions_of_other_inputs(model):
    found = shapes(load(model, input_shapes={"x": [2, 4, 5], "free": [7, "?", 2]}))
    assert found[:2] == [[2, 4, 5], [2, 4, 5]]
    assert found[2][0] == 7 and isinstance(found[2][1], str)


def test_an_input_shape_renames_dimensions(model):
    found = shapes(load(model, input_shapes={"x": ["n", 4, "?"]}, dims={"w": 3}))
    assert found[0] == found[1] == found[3] == ["n", 4, 3]


def test_shape_for_an_input_of_unknown_rank(build):
    model = build([node("Relu", ["x"], ["y"])], {"x": None}, ["y"])
    assert shapes(load(model, input_shapes={"x": ["n", 3]})) == [["n", 3], ["n", 3]]


def test_expressions_follow_their_names(build):
    model = build(
        [node("Relu", ["x"], ["y"]), node("Relu", ["m"], ["z"])],
        {"x": ["past"], "m": ["past + 1"]},
        ["y", "z"],
    )
    assert shapes(load(model, dims={"past": 4})) == [[4], [5], [4], [5]]
    renamed = shapes(load(model, input_shapes={"x": ["p"]}))
    assert renamed == [["p"], ["p + 1"], ["p"], ["p + 1"]]
    assert shapes(load(model, input_shapes={"x": [4], "m": [5]})) == [[4], [5], [4], [5]]
    with pytest.raises(UsageError, match="is 6, but its dimensions make it 5"):
        load(model, input_shapes={"x": [4], "m": [6]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_shapes": {"q": [1]}}, "no input 'q'"),
        ({"input_shapes": {"x": [1, 4]}}, "2 sizes, the input has 3"),
        ({"input_shapes": {"x": [1, 5, 1]}}, "is 5, the model fixes it to 4"),
        ({"input_shapes": {"x": [1, "c", 1]}}, "is c, the model fixes it to 4"),
        ({"input_shapes": {"x": [1, 4, 1], "y": [2, 4, 1]}}, "'batch' 2, elsewhere it is 1"),
        ({"input_shapes": {"x": [1, 4, 1]}, "dims": {"batch": 3}}, "'batch' 1, elsewhere it is 3"),
        ({"input_shapes": {"x": [0, 4, 1]}}, "sizes start at 1"),
        ({"dims": {"q": 1}}, "no input has a dimension 'q'"),
        ({"dims": {"batch": 0}}, "sizes start at 1"),
    ],
)
def test_misfits_are_errors_that_show_the_inputs(model, options, message):
    with pytest.raises(UsageError, match=message) as caught:
        load(model, **options)
    assert "x: float[batch, 4, w]" in str(caught.value)
