"""Operators that move, select or join slices, and what they say about sizes."""

from __future__ import annotations

import numpy as np
import onnx_ir as oir

from optc.passes.match import constant, input_or_none, int_attribute, integers, producer
from optc.passes.prune import factors
from optc.passes.prune.axes import Axes, Axis, Kept, NotUnderstoodError, couples, fixed, updates
from optc.passes.simplify.evaluate import clamp_slice


@couples("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(node: oir.Node, axes: Axes) -> None:
    """Of an axis that is split, one factor carries the labels: slices along the other factors go together."""
    x, result = node.inputs[0], node.outputs[0]
    labels = axes.of(x)
    if x is None or x.shape is None or result.shape is None:
        raise NotUnderstoodError("the rank of its result is unknown")
    if node.op_type == "Reshape" and constant(node.inputs[1]) is None:
        raise NotUnderstoodError("its target is computed")
    if node.op_type == "Squeeze" and input_or_none(node, 1) is None:
        raise NotUnderstoodError("which axes it drops depends on their sizes")
    parts = factors.common(x.shape.dims, result.shape.dims)
    carried: dict[int, np.ndarray] = {}
    for axis, (own, found) in enumerate(zip(labels, parts.before, strict=True)):
        if found is None:
            axes.pin(own, "the reshape is not understood")
        elif own is not None and found:
            chosen, carrier = _carrier(node, axes, axis, own, [_int(parts.sizes[f]) for f in found])
            carried[found[chosen]] = carrier
    made: list[Axis] = []
    for factor_indices, dim in zip(parts.after, result.shape, strict=True):
        if factor_indices is None or not isinstance(dim, int):
            for factor in factor_indices or ():
                axes.pin(carried.get(factor), "it is merged with an axis of symbolic size")
            made.append(fixed(dim))
        else:
            made.append(_merged(axes, [(_int(parts.sizes[f]), carried.get(f)) for f in factor_indices]))
    axes.set(result, made)


def _int(size: int | None) -> int:
    assert size is not None  # a factor of a known size is known
    return size


def _carrier(node: oir.Node, axes: Axes, axis: int, own: np.ndarray, sizes: list[int]) -> tuple[int, np.ndarray]:
    """Choose the factor that keeps labels of its own; return its position and its labels."""
    if len(sizes) == 1:
        return 0, own
    grid = own.reshape(sizes)
    roots = axes.labels.roots(grid)
    for position in range(len(sizes)):
        lines = np.moveaxis(roots, position, 0).reshape(sizes[position], -1)
        if (lines == lines[:, :1]).all():
            break
    else:
        key = (node.name or "", axis)
        position = axes.choices.get(key, len(sizes) - 1 if _is_shuffle(node) else 0)
        lines = np.moveaxis(grid, position, 0).reshape(sizes[position], -1)
        axes.labels.unite(lines[:, :1], lines, axes.reason("it takes blocks of this axis apart"))
        axes.splits[key] = (len(sizes), lines[:, 0])
    return position, np.moveaxis(grid, position, 0).reshape(sizes[position], -1)[:, 0]


def _is_shuffle(node: oir.Node) -> bool:
    """Tell whether the axis is split, transposed and merged again: the slices of each block keep their order."""
    (readers,) = [list(value.uses()) for value in node.outputs]
    if len(readers) != 1 or readers[0].node.op_type != "Transpose":
        return False
    further = list(readers[0].node.outputs[0].uses())
    before, after = node.inputs[0], further[0].node.outputs[0] if len(further) == 1 else None
    return (
        after is not None
        and producer(after, "Reshape") is not None
        and before is not None
        and before.shape is not None
        and before.shape == after.shape
    )


def _merged(axes: Axes, parts: list[tuple[int, np.ndarray | None]]) -> np.ndarray:
    """Return the labels of the product of factors; only one of them may have labels that can go."""
    if not parts:
        return np.zeros(1, np.int64)
    sizes = [size for size, _ in parts]
    best = max(range(len(parts)), key=lambda i: -1 if parts[i][1] is None else axes.labels.free(_some(parts[i][1])))
    for position, (_, labels) in enumerate(parts):
        if position != best:
            axes.pin(labels, "it is merged with another axis")
    labels = parts[best][1]
    if labels is None:
        return np.zeros(int(np.prod(sizes)), np.int64)
    shape = [1] * len(sizes)
    shape[best] = -1
    return np.broadcast_to(labels.reshape(shape), sizes).reshape(-1)


def _some(labels: np.ndarray | None) -> np.ndarray:
    assert labels is not None
    return labels


@updates("Reshape")
def new_target(node: oir.Node, kept: Kept) -> None:
    """0 (as before) and -1 (what is left) hold as they are."""
    target = integers(node.inputs[1])
    assert target is not None
    sizes = [
        kept.count(node.outputs[0], axis) if size > 0 and kept.shrinks(node.outputs[0], axis) else size
        for axis, size in enumerate(target)
    ]
    kept.replace(node, 1, np.array(sizes, np.int64))


@couples("Transpose")
def transpose(node: oir.Node, axes: Axes) -> None:
    """Axes change places."""
    x = axes.of(node.inputs[0])
    order = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(len(x))[::-1]
    axes.set(node.outputs[0], [x[axis] for axis in order])


@couples("Concat")
def concat(node: oir.Node, axes: Axes) -> None:
    """Along one axis slices follow each other, along the others they are coupled."""
    operands = [list(axes.of(value)) for value in node.inputs]
    axis = int_attribute(node, "axis", 0) % len(operands[0])
    along = [operand[axis] for operand in operands]
    for operand in operands:
        operand[axis] = np.zeros(1, np.int64)
    result = axes.broadcast(operands)
    if any(part is None for part in along):
        for part in along:
            axes.pin(part, "it is joined with an axis of symbolic size")
        result[axis] = None
    else:
        result[axis] = np.concatenate([part for part in along if part is not None])
    axes.set(node.outputs[0], result)


@couples("Split")
def split(node: oir.Node, axes: Axes) -> None:
    """Each output takes its part of the labels."""
    x = axes.of(node.inputs[0])
    axis = int_attribute(node, "axis", 0) % len(x)
    labels, start = x[axis], 0
    for value in node.outputs:
        size = value.shape[axis] if value.shape is not None else None
        if labels is None or not isinstance(size, int):
            raise NotUnderstoodError("its sizes are symbolic")
        part = list(x)
        part[axis] = labels[start : start + size]
        start += size
        axes.set(value, part)


@updates("Split")
def new_sizes(node: oir.Node, kept: Kept) -> None:
    """State the sizes, which need not be equal any more."""
    x = node.inputs[0]
    assert x is not None and x.shape is not None
    axis = int_attribute(node, "axis", 0) % len(x.shape)
    if not kept.shrinks(x, axis):
        return
    node.attributes.pop("num_outputs", None)
    if len(node.inputs) < 2:
        node.resize_inputs(2)
    kept.replace(node, 1, np.array([kept.count(value, axis) for value in node.outputs], np.int64))


def _slices(node: oir.Node, x: list[Axis]) -> dict[int, tuple[int, int, int]]:
    starts, ends = integers(node.inputs[1]), integers(node.inputs[2])
    if starts is None or ends is None:
        raise NotUnderstoodError("its bounds are computed")
    given, strides = input_or_none(node, 3), input_or_none(node, 4)
    chosen = integers(given) if given is not None else tuple(range(len(starts)))
    steps = integers(strides) if strides is not None else (1,) * len(starts)
    if chosen is None or steps is None:
        raise NotUnderstoodError("its axes are computed")
    return {a % len(x): (s, e, n) for a, s, e, n in zip(chosen, starts, ends, steps, strict=True)}


@couples("Slice")
def cut(node: oir.Node, axes: Axes) -> None:
    """The part that is cut out keeps its labels."""
    x = list(axes.of(node.inputs[0]))
    shape = node.outputs[0].shape
    for axis, (start, end, step) in _slices(node, x).items():
        labels = x[axis]
        if labels is None:
            x[axis] = None if shape is None else fixed(shape[axis])
            continue
        if step != 1:
            axes.pin(labels, "it takes every so many slices")
        x[axis] = labels[clamp_slice(len(labels), start, end, step)]
    axes.set(node.outputs[0], x)


@updates("Slice")
def new_bounds(node: oir.Node, kept: Kept) -> None:
    """Bounds count the slices that are kept before them."""
    x = node.inputs[0]
    assert x is not None and x.shape is not None
    bounds = _slices(node, [None] * len(x.shape))
    for axis, (start, end, step) in bounds.items():
        mask = kept.mask(x, axis)
        if mask is not None and not mask.all():
            part = clamp_slice(len(mask), start, end, step)
            before = int(mask[: part.start].sum())
            bounds[axis] = (before, before + int(mask[part].sum()), step)
    for index, column in ((1, 0), (2, 1)):
        kept.replace(node, index, np.array([bound[column] for bound in bounds.values()], np.int64))


@couples("Gather")
def gather(node: oir.Node, axes: Axes) -> None:
    """Constant indices select labels; the axis that data select from stays."""
    data, indices = list(axes.of(node.inputs[0])), node.inputs[1]
    axis = int_attribute(node, "axis", 0) % len(data)
    known, along = constant(indices), data[axis]
    if known is not None and along is not None and known.ndim == 1:
        chosen: list[Axis] = [along[known]]
    else:
        axes.pin(along, "slices are looked up by number")
        if indices is None or indices.shape is None:
            raise NotUnderstoodError("the rank of its indices is unknown")
        # Numbers are data: an axis of theirs has the labels it has, if they are computed, and none if constant.
        chosen = [fixed(d) for d in indices.shape] if known is not None else axes.of(indices)
    if axes.is_constant(node.inputs[0]):
        for other in (*data[:axis], *data[axis + 1 :]):
            if other is not None:
                axes.labels.want(other)
    axes.set(node.outputs[0], [*data[:axis], *chosen, *data[axis + 1 :]])


@updates("Gather")
def new_indices(node: oir.Node, kept: Kept) -> None:
    """Indices are places among the slices that are kept."""
    x, known = node.inputs[0], constant(node.inputs[1])
    assert x is not None and x.shape is not None
    axis = int_attribute(node, "axis", 0) % len(x.shape)
    mask = kept.mask(x, axis)
    if known is not None and known.ndim == 1 and mask is not None and not mask.all():
        places = known % len(mask)
        kept.replace(node, 1, (np.cumsum(mask) - 1)[places[mask[places]]].astype(known.dtype))


@couples("Pad")
def pad(node: oir.Node, axes: Axes) -> None:
    """What is added has to stay: its place and its number are given."""
    x, pads, given = list(axes.of(node.inputs[0])), integers(node.inputs[1]), input_or_none(node, 3)
    chosen = integers(given) if given is not None else tuple(range(len(x)))
    shape = node.outputs[0].shape
    if pads is None or chosen is None or shape is None:
        raise NotUnderstoodError("its sizes are computed")
    constant_mode = node.attributes.get_string("mode", "constant") == "constant"
    for position, axis in enumerate(chosen):
        before, after = pads[position], pads[position + len(chosen)]
        labels = x[axis]
        if before == after == 0:
            continue
        if labels is None or before < 0 or after < 0 or not constant_mode:
            axes.pin(labels, "it continues this axis from its ends")
            x[axis] = fixed(shape[axis])
        else:
            x[axis] = np.pad(labels, (before, after))
    axes.set(node.outputs[0], x)


@couples("Expand")
def expand(node: oir.Node, axes: Axes) -> None:
    """Like an operand of the target's shape; axes that are made by copying stay."""
    target, shape = integers(node.inputs[1]), node.outputs[0].shape
    if target is None or shape is None:
        raise NotUnderstoodError("its target is computed")
    x = axes.of(node.inputs[0])
    x = [*(fixed(1) for _ in range(len(shape) - len(x))), *x]
    own: list[Axis] = [fixed(d) if a is None or len(a) == 1 else a for a, d in zip(x, shape, strict=True)]
    axes.set(node.outputs[0], own)


@updates("Expand")
def new_expansion(node: oir.Node, kept: Kept) -> None:
    """1 stands for the size that is there."""
    target, rank = integers(node.inputs[1]), len(node.outputs[0].shape or ())
    assert target is not None
    sizes = [
        1 if kept.shrinks(node.outputs[0], axis + rank - len(target)) else size for axis, size in enumerate(target)
    ]
    kept.replace(node, 1, np.array(sizes, np.int64))


@couples("Tile")
def tile(node: oir.Node, axes: Axes) -> None:
    """Copies have the labels of the original."""
    repeats = integers(node.inputs[1])
    if repeats is None:
        raise NotUnderstoodError("its repeats are computed")
    x = axes.of(node.inputs[0])
    axes.set(node.outputs[0], [a if a is None else np.tile(a, r) for a, r in zip(x, repeats, strict=True)])


@couples("DepthToSpace", "SpaceToDepth")
def depth_and_space(node: oir.Node, axes: Axes) -> None:
    """[N, C * b * b, H, W] and [N, C, H * b, W * b]: the pixels of a block go together."""
    x, block = axes.of(node.inputs[0]), node.attributes["blocksize"].as_int()
    channels, shape = x[1], node.outputs[0].shape
    if channels is None or shape is None:
        raise NotUnderstoodError("the number of channels is symbolic")
    if node.op_type == "SpaceToDepth":
        made = np.tile(channels, block * block)
    else:
        outer = node.attributes.get_string("mode", "DCR") == "DCR"
        grid = channels.reshape(block * block, -1) if outer else channels.reshape(-1, block * block).T
        axes.labels.unite(grid[:1], grid, axes.reason("the pixels of a block go together"))
        made = grid[0]
    axes.set(node.outputs[0], [x[0], made, *(fixed(d) for d in shape.dims[2:])])


_POOLS = "AveragePool GlobalAveragePool GlobalLpPool GlobalMaxPool LpPool MaxPool"


@couples(*_POOLS.split())
def pool(node: oir.Node, axes: Axes) -> None:
    """[N, C, ...]: channels stay apart."""
    x, shape = axes.of(node.inputs[0]), node.outputs[0].shape
    if shape is None or any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        raise NotUnderstoodError("its indices are read")
    axes.set(node.outputs[0], [*x[:2], *(fixed(d) for d in shape.dims[2:])])


@couples("Resize")
def resize(node: oir.Node, axes: Axes) -> None:
    """Axes that keep their size keep their slices."""
    x, shape = axes.of(node.inputs[0]), node.outputs[0].shape
    if shape is None or node.attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise NotUnderstoodError("its sizes are computed")
    if input_or_none(node, 3) is not None and integers(node.inputs[3]) is None:
        raise NotUnderstoodError("its sizes are computed")
    made: list[Axis] = []
    for axis, (labels, dim) in enumerate(zip(x, shape, strict=True)):
        if axis < 2 and labels is not None and len(labels) == dim:
            made.append(labels)
        else:
            axes.pin(labels, "it is resized")
            made.append(fixed(dim))
    axes.set(node.outputs[0], made)


@updates("Resize")
def new_resize(node: oir.Node, kept: Kept) -> None:
    """Sizes are stated for all axes, or for some."""
    given = input_or_none(node, 3)
    sizes = integers(given)
    if sizes is None:
        return
    stated = node.attributes["axes"].as_ints() if "axes" in node.attributes else range(len(sizes))
    result = [
        kept.count(node.outputs[0], axis) if kept.shrinks(node.outputs[0], axis) else size
        for axis, size in zip(stated, sizes, strict=True)
    ]
    kept.replace(node, 3, np.array(result, np.int64))


@couples("GridSample")
def grid_sample(node: oir.Node, axes: Axes) -> None:
    """[N, C, ...]: channels stay apart; the grid stays."""
    x, shape = axes.of(node.inputs[0]), node.outputs[0].shape
    if shape is None or node.inputs[1] is None:
        raise NotUnderstoodError("the rank of its result is unknown")
    axes.pin_value(node.inputs[1], "it is a grid of places")
    axes.pin(x[0], "the batch stays")
    axes.set(node.outputs[0], [fixed(shape[0]), x[1], *(fixed(d) for d in shape.dims[2:])])
