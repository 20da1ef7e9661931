from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as oir
import pytest

from optc.errors import InvalidModelError
from optc.ir.text import binary, decimal, from_text, summary, to_text


def test_summary_of_a_symbolic_model(mlp: oir.Model) -> None:
    text = summary(mlp)
    assert "input   x: float [batch, 4]" in text
    assert "output  y: float [batch, 2]" in text
    assert "dims    batch" in text
    assert "nodes   3 (depth 3, width 1)" in text
    assert "weights 21 elements, 84 B" in text
    assert "compute 42*batch" in text
    assert "no value for dimension batch" in text
    assert "Gemm       1" in text


def test_summary_for_given_sizes(mlp: oir.Model) -> None:
    text = summary(mlp, {"batch": 1000})
    assert "dims    batch=1000" in text
    assert "compute 42 k operations" in text
    assert "KiB of activations at the peak" in text


def test_summary_says_what_is_unknown(canonical: Callable[..., oir.Model]) -> None:
    text = summary(canonical("g (float[6] x, int64[2] s) => (float[] y) { r = Reshape(x, s)\n y = Relu(r) }"))
    assert "depends on _d0, _d1" in text or "_d0*_d1" in text
    text = summary(canonical("g (float[6] x, int64[k] s) => (float[] y) { y = Reshape(x, s)\n z = Relu(y) }"))
    assert "compute unknown: shapes depend on data" in text
    assert "y: float of unknown shape" in text


@pytest.mark.parametrize(("number", "text"), [(0, "0"), (999, "999"), (1000, "1 k"), (4_089_184_256, "4.09 G")])
def test_decimal(number: int, text: str) -> None:
    assert decimal(number) == text


@pytest.mark.parametrize(("number", "text"), [(1023, "1023 B"), (1024, "1 KiB"), (102_235_000, "97.5 MiB")])
def test_binary(number: int, text: str) -> None:
    assert binary(number) == text


def test_text_form_shows_small_tensors_and_elides_large_ones(mlp: oir.Model) -> None:
    weight = mlp.graph.initializers["w1"]
    weight.const_value = oir.tensor(np.zeros((4, 300), np.float32), name="w1")
    text = to_text(mlp)
    assert 'w1 = ["location": "elided"]' in text
    assert "b1 =  {1,2,3}" in text
    assert "h = Gemm <" in text
    assert weight.const_value.numpy().shape == (4, 300)
    onnx.parser.parse_model(text)


def test_from_text_refuses_what_does_not_parse() -> None:
    with pytest.raises(InvalidModelError, match="no ONNX text"):
        from_text("g (float x => y")
