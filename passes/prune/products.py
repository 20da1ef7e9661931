"""Convolutions and matrix products: what makes slices, and what sums over them."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from optc.passes.match import input_or_none, int_attribute
from optc.passes.prune.axes import Axes, Axis, Kept, NotUnderstoodError, couples, fixed, updates

_SUMMED = "it is summed over together with slices that have to stay"
_GROUP = "channels of a group depend on each other"


def _spatial(node: oir.Node) -> list[Axis]:
    shape = node.outputs[0].shape
    if shape is None:
        raise NotUnderstoodError("the rank of its result is unknown")
    return [fixed(d) for d in shape.dims[2:]]


@couples("Conv")
def convolution(node: oir.Node, axes: Axes) -> None:
    """X [N, C, ...] with W [M, C/group, ...]: groups go as a whole."""
    x, weight = axes.of(node.inputs[0]), axes.of(node.inputs[1])
    group = int_attribute(node, "group", 1)
    if group == 1:
        axes.unite(x[1], weight[1], _SUMMED)
    else:
        axes.pin(weight[1], "all groups share this axis")
        outgoing = axes.unite_blocks(weight[0], group, _GROUP)
        axes.unite(axes.unite_blocks(x[1], group, _GROUP), outgoing, _GROUP)
    _made(node, axes, weight[0])
    axes.couple_vector(input_or_none(node, 2), weight[0])
    axes.set(node.outputs[0], [x[0], weight[0], *_spatial(node)])


@couples("ConvTranspose")
def transposed_convolution(node: oir.Node, axes: Axes) -> None:
    """X [N, C, ...] with W [C, M/group, ...]: groups go as a whole."""
    x, weight = axes.of(node.inputs[0]), axes.of(node.inputs[1])
    group = int_attribute(node, "group", 1)
    axes.unite(x[1], weight[0], _SUMMED)
    outgoing = weight[1]
    if group > 1:
        axes.pin(weight[1], "all groups share this axis")
        blocks = axes.unite_blocks(weight[0], group, _GROUP)
        outgoing = None if weight[1] is None else np.repeat(blocks, len(weight[1]))
    _made(node, axes, outgoing)
    axes.couple_vector(input_or_none(node, 2), outgoing)
    axes.set(node.outputs[0], [x[0], outgoing, *_spatial(node)])


@updates("Conv", "ConvTranspose")
def fewer_groups(node: oir.Node, kept: Kept) -> None:
    """Groups keep their size."""
    group = int_attribute(node, "group", 1)
    if group > 1:
        mask = kept.mask(node.inputs[0], 1)
        assert mask is not None
        node.attributes["group"] = oir.AttrInt64("group", int(mask.reshape(group, -1)[:, 0].sum()))


def _made(node: oir.Node, axes: Axes, outgoing: Axis) -> None:
    if outgoing is not None and axes.is_constant(node.inputs[1]):
        axes.labels.want(outgoing)


@couples("MatMul")
def matrix_product(node: oir.Node, axes: Axes) -> None:
    """[..., M, K] times [..., K, N]; vectors have no M or no N."""
    a, b = axes.of(node.inputs[0]), axes.of(node.inputs[1])
    axes.unite(a[-1], b[0] if len(b) == 1 else b[-2], _SUMMED)
    rows, columns = a[-2:-1], b[-1:] if len(b) > 1 else []
    stacks = [operand for operand in (a[:-2], b[:-2]) if operand]
    for value, made in ((node.inputs[0], rows), (node.inputs[1], columns)):
        if made and made[0] is not None and axes.is_constant(value):
            axes.labels.want(made[0])
    axes.set(node.outputs[0], [*(axes.broadcast(stacks) if stacks else []), *rows, *columns])


@couples("Gemm")
def general_product(node: oir.Node, axes: Axes) -> None:
    """A' [M, K] times B' [K, N] plus C, which broadcasts."""
    a, b = axes.of(node.inputs[0]), axes.of(node.inputs[1])
    rows, left = reversed(a) if int_attribute(node, "transA", 0) else a
    right, columns = reversed(b) if int_attribute(node, "transB", 0) else b
    axes.unite(left, right, _SUMMED)
    if columns is not None and axes.is_constant(node.inputs[1]):
        axes.labels.want(columns)
    result = [rows, columns]
    if input_or_none(node, 2) is not None:
        result = axes.broadcast([result, axes.of(node.inputs[2])])
    axes.set(node.outputs[0], result)


@couples("Einsum")
def einsum(node: oir.Node, axes: Axes) -> None:
    """Axes of the same letter are one axis."""
    equation = node.attributes["equation"].as_string().replace(" ", "")
    if "." in equation or "->" not in equation:
        raise NotUnderstoodError("its equation leaves axes open")
    terms, result = equation.split("->")
    found: dict[str, list[list[Axis]]] = {}
    for term, value in zip(terms.split(","), node.inputs, strict=True):
        for letter, axis in zip(term, axes.of(value), strict=True):
            found.setdefault(letter, []).append([axis])
            if axis is not None and axes.is_constant(value) and letter in result:
                axes.labels.want(axis)
    axes.set(node.outputs[0], [axes.broadcast(found[letter])[0] for letter in result])
    for letter in found.keys() - set(result):
        axes.broadcast(found[letter])


@couples("RNN", "GRU", "LSTM")
def recurrent(node: oir.Node, axes: Axes) -> None:
    """The input is a sum over its last axis (W [directions, gates * hidden, input]); all the rest stays."""
    x, weight = axes.of(node.inputs[0]), axes.of(node.inputs[1])
    axes.unite(x[2], weight[2], _SUMMED)
    for axis in (*x[:2], *weight[:2]):
        axes.pin(axis, "recurrent state keeps its size")
    for value in node.inputs[2:]:
        if value is not None:
            axes.pin_value(value, "recurrent state keeps its size")
    for value in node.outputs:
        axes.leave(value)


@couples("Attention")
def attention(node: oir.Node, axes: Axes) -> None:
    """Heads go as a whole: [batch, heads, rows, width], or [batch, rows, heads * width]."""
    query, key, value = (axes.of(v) for v in node.inputs[:3])
    if any(v.uses() or v.is_graph_output() for v in node.outputs[3:]):
        raise NotUnderstoodError("its scores are read")
    packed = len(query) == 3
    if packed:
        counts = [node.attributes[name].as_int() for name in ("q_num_heads", "kv_num_heads", "kv_num_heads")]
        heads = [
            axes.unite_blocks(operand[2], count, "a head goes as a whole")
            for operand, count in zip((query, key, value), counts, strict=True)
        ]
    else:
        heads = [_known(operand[1]) for operand in (query, key, value)]
        for operand in (query, key, value):
            axes.pin(operand[3], "the width of heads stays")
    axes.unite(heads[1], heads[2])
    axes.unite_blocks(heads[0], len(heads[1]), "these heads share keys and values")
    axes.unite(heads[0].reshape(len(heads[1]), -1)[:, 0], heads[1], "a head goes as a whole")
    for operand in (query, key, value):
        axes.pin(operand[0], "the batch stays")
        axes.pin(operand[1 if packed else 2], "the number of rows stays")
    mask = input_or_none(node, 3)
    if mask is not None:
        given = axes.of(mask)
        axes.broadcast([given, [query[0], heads[0], *(fixed(oir.SymbolicDim(None)) for _ in range(2))]])
    for past in node.inputs[4:6]:
        if past is not None:
            axes.unite(axes.of(past)[1], heads[1])
            for axis in (0, 2, 3):
                axes.pin(axes.of(past)[axis], "the past keeps its size")
    shape = node.outputs[0].shape
    if shape is None:
        raise NotUnderstoodError("the rank of its result is unknown")
    result = [fixed(d) for d in shape.dims]
    if not packed:
        result[1] = heads[0]
    elif isinstance(shape[2], int):
        result[2] = np.repeat(heads[0], shape[2] // len(heads[0]))
    axes.set(node.outputs[0], result)
    for present in node.outputs[1:3]:
        if present.shape is not None:
            whole = [fixed(d) for d in present.shape.dims]
            whole[1] = heads[1]
            axes.set(present, whole)
    for other in node.outputs[3:]:
        axes.leave(other)


@updates("Attention")
def fewer_heads(node: oir.Node, kept: Kept) -> None:
    """Heads keep their width; a stated scale stays, an implied one depends on the width alone."""
    for index, name in ((0, "q_num_heads"), (1, "kv_num_heads")):
        count = int_attribute(node, name, 0)
        if count:
            mask = kept.mask(node.inputs[index], 2)
            assert mask is not None
            node.attributes[name] = oir.AttrInt64(name, int(mask.reshape(count, -1)[:, 0].sum()))


def _known(axis: Axis) -> np.ndarray:
    if axis is None:
        raise NotUnderstoodError("the number of heads is symbolic")
    return axis
