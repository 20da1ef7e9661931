from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as oir
import pytest

from optc.errors import InputError, UnsupportedModelError
from optc.ir.reference import evaluate


def test_outputs_by_name_match_numpy(mlp: oir.Model) -> None:
    x = np.random.default_rng(0).standard_normal((3, 4), dtype=np.float32)
    w1, b1, w2 = (mlp.graph.initializers[n].const_value.numpy() for n in ("w1", "b1", "w2"))
    found = evaluate(mlp, {"x": x})
    assert list(found) == ["y"]
    np.testing.assert_allclose(found["y"], np.maximum(x @ w1 + b1, 0) @ w2, rtol=1e-5)


def test_external_weights_are_read(mlp: oir.Model, tmp_path: Path) -> None:
    x = np.ones((2, 4), np.float32)
    expected = evaluate(mlp, {"x": x})["y"]
    oir.save(mlp, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    loaded = oir.load(tmp_path / "m.onnx")
    assert isinstance(loaded.graph.initializers["w1"].const_value, oir.ExternalTensor)
    np.testing.assert_array_equal(evaluate(loaded, {"x": x})["y"], expected)


def test_wrong_inputs_are_named(mlp: oir.Model) -> None:
    with pytest.raises(InputError, match=r"no value for input 'x'; no input 'z'(.|\n)*x \(FLOAT\[batch,4\]\)"):
        evaluate(mlp, {"z": np.zeros(1)})
    with pytest.raises(InputError, match="'x' is float64, the model wants float32"):
        evaluate(mlp, {"x": np.zeros((1, 4))})


def test_what_the_evaluator_lacks_is_named(canonical: Callable[..., oir.Model]) -> None:
    model = canonical(
        '<ir_version: 13, opset_import: ["" : 26, "optc" : 1]>\n g (float[2] x) => (float[2] y) { y = optc.Own(x) }'
    )
    with pytest.raises(UnsupportedModelError, match="Own"):
        evaluate(model, {"x": np.zeros(2, np.float32)})
