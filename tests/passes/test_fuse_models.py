"""All fusions on what exporters really write: transformers through PyTorch's exporter, PaddleOCR's own models."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from optc.frontend import onnx as frontend
from optc.passes.fuse import passes, portable

ATTENTION = "Softmax(s*q@k^T+mask)@v => Attention(q,k,v,mask)"
NORM = "d/sqrt(mean(d^2)+eps) => LayerNormalization|RMSNormalization"
SWISH = "x*Sigmoid(alpha*x) => Swish(x, alpha)"
GELU_TANH = "0.5*x*(1+tanh(sqrt(2/pi)*(x+0.044715*x^3))) => Gelu(x, tanh)"
HARD_SWISH = "x*k*Clip(x+3,0,6) => HardSwish(x)"

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def compare(path: Path, run, feeds) -> tuple[Counter[str], list[str]]:
    """Fuse the model of ``path``, compare its outputs before and after, return what fired and what is left."""
    model = frontend.load(path)
    before = run(model, feeds)
    fired: Counter[str] = Counter()
    for one in passes():
        fired.update(one.call(model).fired)
    left = [node.op_type for node in model.graph]
    for one in portable():
        one.call(model)
    for want, got in zip(before, run(model, feeds), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    return fired, left


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """Export a small transformer with dynamic batch and sequence; return its path."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    class Hidden(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids, mask):
            return self.model(input_ids=ids, attention_mask=mask).last_hidden_state

    def make(family: str, attention: str, **config) -> Path:
        torch.manual_seed(0)
        settings = getattr(transformers, f"{family}Config")(vocab_size=99, attn_implementation=attention, **config)
        model = Hidden(getattr(transformers, f"{family}Model")(settings).eval())
        ids = torch.randint(0, 99, (2, 12))
        dims = {0: torch.export.Dim("b", min=2, max=32), 1: torch.export.Dim("s", min=2, max=32)}
        program = torch.onnx.export(
            model,
            (ids, torch.ones_like(ids)),
            dynamo=True,
            opset_version=20,
            verbose=False,
            dynamic_shapes=(dims, dims),
        )
        path = tmp_path_factory.mktemp(family) / "model.onnx"
        program.save(path)
        return path

    return make


@pytest.fixture
def tokens(rng):
    mask = np.ones((3, 9), np.int64)
    mask[0, 6:] = 0
    return {"ids": rng.integers(0, 99, (3, 9)), "mask": mask}


def test_bert(export, run, tokens):
    fired, left = compare(export("Bert", "sdpa", max_position_embeddings=64, **SMALL), run, tokens)
    assert fired[ATTENTION] == 2
    assert "Softmax" not in left


def test_gpt2(export, run, tokens):
    config = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "use_cache": False}
    fired, left = compare(export("GPT2", "eager", **config), run, tokens)
    assert (fired[ATTENTION], fired[GELU_TANH]) == (2, 2)
    assert not {"Softmax", "Tanh", "Gemm"} & set(left)


def test_llama(export, run, tokens):
    path = export("Llama", "sdpa", num_key_value_heads=2, use_cache=False, max_position_embeddings=64, **SMALL)
    fired, left = compare(path, run, tokens)
    assert (fired[ATTENTION], fired[NORM], fired[SWISH]) == (2, 5, 2)
    assert not {"Softmax", "ReduceMean", "Sigmoid"} & set(left)


@pytest.mark.models
def test_paddle_recognition(run, rng):
    path = Path(__file__).parents[2] / ".cache" / "models" / "ppocr" / "rec.onnx"
    if not path.exists():
        pytest.skip("run scripts/fetch_models.py first")
    fired, left = compare(path, run, {"x": rng.random((1, 3, 48, 160), np.float32) * 2 - 1})
    assert (fired[ATTENTION], fired[NORM], fired[SWISH], fired[HARD_SWISH]) == (2, 5, 7, 28)
    assert not {"Clip", "BatchNormalization", "ReduceMean", "Sub"} & set(left)
