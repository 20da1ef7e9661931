"""Explicit Pad nodes move into the padding of the convolution or pooling that follows."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from optc.passes.fuse.bias import copied
from optc.passes.fuse.pattern import integer, integers, leak, text
from optc.passes.match import constant, producer, rank
from optc.passes.rewrite import Miss, Ops, Outcome, Rewrite, RewritePass, rule


def _spatial_pads(pad: oir.Node) -> tuple[list[int], float] | Miss:
    """Return the padding of the spatial dimensions (all begins, all ends) and the value it fills in."""
    dims = rank(pad.inputs[0])
    amounts = constant(pad.inputs[1])
    if dims is None or amounts is None:
        return Miss("the rank or the amount of padding is not known")
    if text(pad, "mode", "constant") != "constant":
        return Miss(f"mode '{text(pad, 'mode', 'constant')}' is not padding with a constant")
    fill = pad.inputs[2] if len(pad.inputs) > 2 else None
    value = constant(fill)
    if fill is not None and value is None:
        return Miss("the value to pad with is not constant")
    axes = list(range(dims))
    if len(pad.inputs) > 3 and pad.inputs[3] is not None:
        chosen = constant(pad.inputs[3])
        if chosen is None:
            return Miss("the axes to pad are not constant")
        axes = [int(a) % dims for a in chosen.reshape(-1)]
    full = np.zeros((2, dims), np.int64)
    full[:, axes] = amounts.reshape(2, -1)
    if (full < 0).any():
        return Miss("negative padding crops")
    if full[:, :2].any():
        return Miss("the batch or channel dimension is padded")
    return [int(n) for n in full[:, 2:].reshape(-1)], 0.0 if value is None else float(value.reshape(()))


def _into(node: oir.Node, ops: Ops, fill: float, **changed: int) -> Outcome:
    """Rebuild ``node`` with the padding of the Pad before it, if that pads with ``fill``."""
    pad = producer(node.inputs[0], "Pad")
    if pad is None:
        return None
    found = _spatial_pads(pad)
    if isinstance(found, Miss):
        return found
    amounts, value = found
    if value != fill:
        return Miss(f"padding with {value:g}, where {node.op_type} pads with {fill:g}")
    if text(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return Miss("auto_pad depends on the padded size")
    if integer(node, "ceil_mode", 0):
        return Miss("with ceil_mode a window may not begin in padding, but it may in what Pad added")
    if (reason := leak(node, pad.inputs[0])) is not None:
        return Miss(reason)
    own = integers(node, "pads") or (0,) * len(amounts)
    total = [a + b for a, b in zip(amounts, own, strict=True)]
    kernel = integers(node, "kernel_shape")
    if node.op_type != "Conv" and any(p >= k for p, k in zip(total, kernel * 2, strict=True)):
        return Miss(f"pads {total} reach over the kernel {list(kernel)}")
    output = copied(ops, node, pad.inputs[0], *node.inputs[1:], pads=total, auto_pad="NOTSET", **changed)
    return Rewrite([output])


@rule("Conv(Pad(x,0)) => Conv(x,pads)", "Conv")
def pad_into_conv(node: oir.Node, ops: Ops) -> Outcome:
    """Fold padding with zeros into a convolution."""
    return _into(node, ops, 0.0)


@rule("AveragePool(Pad(x,0)) => AveragePool(x,pads,count_include_pad=1)", "AveragePool")
def pad_into_average_pool(node: oir.Node, ops: Ops) -> Outcome:
    """Fold padding with zeros into an average, which has to count the zeros as Pad's consumer did."""
    if producer(node.inputs[0], "Pad") is None:
        return None
    if any(integers(node, "pads")) and not integer(node, "count_include_pad", 0):
        return Miss("the pool does not count its own padding, but would have to count that of Pad")
    return _into(node, ops, 0.0, count_include_pad=1)


@rule("MaxPool(Pad(x,-inf)) => MaxPool(x,pads)", "MaxPool")
def pad_into_max_pool(node: oir.Node, ops: Ops) -> Outcome:
    """Fold padding with minus infinity into a maximum."""
    if producer(node.inputs[0], "Pad") is None:
        return None
    if len(node.outputs) > 1:
        return Miss("the indices count padded positions")
    return _into(node, ops, -np.inf)


def fold_padding_pass() -> RewritePass:
    """Return the pass that folds Pad into convolutions and pools."""
    return RewritePass("fold-padding", [pad_into_conv, pad_into_average_pool, pad_into_max_pool])
