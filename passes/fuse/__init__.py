"""Fusions: folding constants into weights, and recognising operators that exporters spelled out."""

from __future__ import annotations

from optc.passes.base import Pass
from optc.passes.fuse.activations import activations_pass
from optc.passes.fuse.attention import attention_pass
from optc.passes.fuse.attention_layout import attention_layout_pass
from optc.passes.fuse.bias import bias_pass
from optc.passes.fuse.fold_batch_norm import fold_batch_norm_pass
from optc.passes.fuse.fold_padding import fold_padding_pass
from optc.passes.fuse.fourier import fourier_pass
from optc.passes.fuse.gelu import gelu_pass
from optc.passes.fuse.normalization import normalization_pass
from optc.passes.fuse.pointwise import pointwise_pass
from optc.passes.fuse.portable import portable_pass
from optc.passes.fuse.softmax import softmax_pass

__all__ = ["passes", "portable"]


def passes() -> list[Pass]:
    """Return the fuse passes in order: transforms become products first, which others fold into; then recognition,
    while the patterns are whole, then folding. Last what moves convolutions, with all that folds into their weights.
    """
    return [
        fourier_pass(),
        gelu_pass(),
        normalization_pass(),
        activations_pass(),
        softmax_pass(),
        attention_pass(),
        attention_layout_pass(),
        fold_padding_pass(),
        fold_batch_norm_pass(),
        bias_pass(),
        pointwise_pass(),
    ]


def portable() -> list[Pass]:
    """Return the passes that prepare an optimized model for execution by onnxruntime."""
    return [portable_pass()]
