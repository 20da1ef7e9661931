from __future__ import annotations

import onnx_ir as oir
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.errors import InvalidModelError, IRError
from optc.ir import dims


def symbol(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, positive=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n", 7),
        ("2*n + 1", 15),
        ("n//2", 3),
        ("floor(n/2 - 1/2) + 1", 4),
        ("-floor(-n/2)", 4),
        ("Max(n, 9)", 9),
        ("min(n, 3)", 3),
        ("Mod(n, 4)", 3),
        ("n % 4", 3),
        ("n**2", 49),
        ("sqrt(n*n)", 7),
        ("ceiling(n/2)", 4),
    ],
)
def test_to_expr_reads_the_language_of_dimensions(text: str, expected: int) -> None:
    assert dims.evaluate(dims.to_expr(text), {"n": 7}) == expected


def test_to_expr_reads_names_that_python_could_not() -> None:
    assert dims.to_expr("2*input_ids.45_dim_1") == 2 * symbol("input_ids.45_dim_1")
    assert dims.names("max + max(floor, p2o.Dynamic.0)") == {"max", "floor", "p2o.Dynamic.0"}
    assert dims.evaluate(dims.to_expr("lambda + max"), {"lambda": 1, "max": 2}) == 3


@pytest.mark.parametrize("text", ["", "a b", "a +", "f(x)", "'a'", "1.5*a", "a if b else c", "[a]", "a < b"])
def test_to_expr_refuses_what_is_no_expression(text: str) -> None:
    with pytest.raises(IRError, match="is not an expression"):
        dims.to_expr(text)


def test_an_anonymous_dimension_has_no_expression() -> None:
    with pytest.raises(IRError, match="anonymous"):
        dims.to_expr(oir.SymbolicDim(None))


def test_ceilings_are_written_as_floors_that_onnx_ir_can_parse() -> None:
    dim = dims.from_expr(sympy.ceiling(symbol("n") / 2) + 1)
    assert isinstance(dim, oir.SymbolicDim)
    assert "ceiling" not in str(dim)
    assert oir.SymbolicDim(str(dim)).evaluate({"n": 5}) == 4
    assert dims.from_expr(dims.to_expr(dim)) == dim


def test_constants_become_ints() -> None:
    assert dims.from_expr(symbol("n") - symbol("n") + 3) == 3
    assert dims.canonical([oir.SymbolicDim("12"), 4, oir.SymbolicDim("b*a")]) == [12, 4, oir.SymbolicDim("a*b")]


@st.composite
def expressions(draw: st.DrawFn) -> sympy.Expr:
    """What chains of strided layers make out of dimensions: sums, multiples and rounded quotients."""
    expr: sympy.Expr = symbol(draw(st.sampled_from("ab")))
    for _ in range(draw(st.integers(0, 5))):
        kind = draw(st.sampled_from(["add", "multiply", "floor", "ceiling", "other"]))
        number = draw(st.integers(1, 6))
        if kind == "add":
            expr = expr + number
        elif kind == "multiply":
            expr = expr * number
        elif kind == "other":
            expr = expr + number * symbol("b")
        else:
            rounding = sympy.floor if kind == "floor" else sympy.ceiling
            expr = rounding(expr / number)
    return expr


@given(expressions(), st.integers(1, 200), st.integers(1, 200))
def test_from_expr_keeps_the_value(expr: sympy.Expr, a: int, b: int) -> None:
    sizes = {"a": a, "b": b}
    dim = dims.from_expr(expr)
    assert dims.evaluate(dims.to_expr(dim), sizes) == dims.evaluate(expr, sizes)


@settings(max_examples=300)
@given(expressions())
def test_text_is_stable(expr: sympy.Expr) -> None:
    dim = dims.from_expr(expr)
    assert dims.from_expr(dims.to_expr(dim)) == dim


def test_nested_floors_merge() -> None:
    n = symbol("n")
    strided = n
    for _ in range(3):
        strided = sympy.floor((strided - 1) / 2) + 1
    assert dims.from_expr(strided) == dims.from_expr(sympy.floor((n - 1) / 8) + 1)


@given(expressions(), expressions(), st.integers(1, 100), st.integers(1, 100))
def test_maximum_is_the_larger_one(first: sympy.Expr, second: sympy.Expr, a: int, b: int) -> None:
    sizes = {"a": a, "b": b}
    found = dims.maximum(dims.from_expr(first), dims.from_expr(second))
    assert dims.evaluate(dims.to_expr(found), sizes) == max(dims.evaluate(first, sizes), dims.evaluate(second, sizes))


def test_maximum_proves_what_pyramids_need() -> None:
    down = [dims.from_expr(sympy.ceiling(symbol("h") / 2**level)) for level in range(1, 6)]
    up = dims.from_expr(2 * dims.to_expr(down[4]))
    assert dims.maximum(up, down[3]) is up
    assert dims.maximum(down[3], up) is up
    assert "Max" in str(dims.maximum(oir.SymbolicDim("a"), oir.SymbolicDim("b")))


def test_evaluate_names_what_is_missing() -> None:
    with pytest.raises(IRError, match="no value for dimension b"):
        dims.evaluate(dims.to_expr("a + b"), {"a": 1})


def graph_with(*shapes: list[int | str | None]) -> oir.Graph:
    inputs = [
        oir.Value(name=f"x{i}", shape=oir.Shape(shape), type=oir.TensorType(oir.DataType.FLOAT))
        for i, shape in enumerate(shapes)
    ]
    return oir.Graph(inputs, [], nodes=[], opset_imports={"": 26}, name="g")


def test_anonymous_and_illegal_dims_get_names_of_their_own() -> None:
    graph = graph_with([None, "?", -1, 3, "?"], ["batch", "x0_dim0", None])
    used = dims.name_input_dims(graph)
    first, second = ([str(d) for d in v.shape] for v in graph.inputs if v.shape is not None)
    assert first == ["x0_dim0_1", "x0_dim1", "x0_dim2", "3", "x0_dim4"]
    assert second == ["batch", "x0_dim0", "x1_dim2"]
    assert used == {*first, *second} - {"3"}


def test_expressions_over_other_inputs_stay_and_other_texts_become_one_name() -> None:
    graph = graph_with(["past", "seq"], ["past+seq", "batch-size", "batch-size"], ["heads*2", 0])
    dims.name_input_dims(graph)
    assert [[str(d) for d in v.shape] for v in graph.inputs if v.shape is not None] == [
        ["past", "seq"],
        ["past + seq", "batch_size", "batch_size"],
        ["heads_2", "0"],
    ]


def test_bind_replaces_names_everywhere(canonical, value) -> None:
    model = canonical(
        """
        g (float[batch,3,h,w] x, bool c) => (float[] y)
        {
            p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x)
            y = If(c) <then_branch = t () => (float[] a) { a = Relu(p) },
                       else_branch = e () => (float[] b) { b = Neg(p) }>
        }
        """
    )
    assert dims.dim_names(model) == ("batch", "h", "w")
    dims.bind(model, {"h": 33, "batch": 2})
    assert list(map(str, model.graph.inputs[0].shape)) == ["2", "3", "33", "w"]
    for name in ("p", "a", "b", "y"):
        shape = value(model, name).shape
        assert list(shape)[:3] == [2, 3, 16]
        assert dims.names(str(shape[3])) == {"w"}


def test_bind_refuses_unknown_names_and_sizes_below_one(canonical) -> None:
    model = canonical("g (float[n] x) => (float[n] y) { y = Relu(x) }")
    with pytest.raises(InvalidModelError, match=r"no dimension named 'batch'(.|\n)*its dimensions are: n"):
        dims.bind(model, {"batch": 1})
    with pytest.raises(InvalidModelError, match="cannot have size 0"):
        dims.bind(model, {"n": 0})


def test_bind_refuses_sizes_that_leave_a_negative_dimension(canonical) -> None:
    model = canonical("g (float[1,1,n] x) => (float[] y) { y = MaxPool<kernel_shape=[5]>(x) }")
    with pytest.raises(InvalidModelError, match="value 'y'"):
        dims.bind(model, {"n": 2})
