"""Shape rules of our own, where those of onnx-shape-inference guess or know less than they could.

A correction runs after the rule of the library and returns the shapes it wants changed, by output index: None for
unknown. Each names the case that the library gets wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import onnx_ir as oir
from onnx_shape_inference import ShapeInferenceContext

from optc.errors import InvalidModelError
from optc.ir import provenance
from optc.ir.dims import Dim

Corrections = dict[int, oir.Shape | None]
Correction = Callable[[ShapeInferenceContext, oir.Node], Corrections]


def correct(context: ShapeInferenceContext, node: oir.Node, before: Sequence[oir.Shape | None]) -> None:
    """Correct what the rule of the library has set; ``before`` are the shapes the outputs had until then."""
    correction = _CORRECTIONS.get(node.op_type) if node.domain == "" else None
    if correction is None:
        return
    for index, shape in correction(context, node).items():
        node.outputs[index].shape = before[index]
        if shape is not None:
            context.set_shape(node.outputs[index], shape)


def broadcast(context: ShapeInferenceContext, node: oir.Node, shapes: Iterable[Iterable[Dim]]) -> list[Dim]:
    """Return the multidirectional broadcast of ``shapes``. Raises InvalidModelError if they do not fit.

    Where two different symbolic dimensions meet, the size is ``Max(a, b)``: right for every legal pair, since
    legal sizes are equal or one of them is 1. A Max of a Max gets a name of its own.
    """
    result: list[Dim] = []
    for shape in shapes:
        dims = list(shape)
        width = max(len(dims), len(result))
        dims[:0] = [1] * (width - len(dims))
        result[:0] = [1] * (width - len(result))
        result = [_broadcast_dim(context, node, a, b) for a, b in zip(result, dims, strict=True)]
    return result


def _broadcast_dim(context: ShapeInferenceContext, node: oir.Node, a: Dim, b: Dim) -> Dim:
    if a == b or b == 1:
        return a
    if a == 1:
        return b
    if isinstance(a, int) and isinstance(b, int):
        raise InvalidModelError(f"{provenance.describe(node)}: sizes {a} and {b} cannot be broadcast together")
    if isinstance(a, int):
        return a
    if isinstance(b, int):
        return b
    return context.larger(a, b)  # type: ignore[no-any-return]


def _elementwise(context: ShapeInferenceContext, node: oir.Node) -> Corrections:
    """The library takes the first of two different symbolic dimensions, which is wrong where that one is 1.

    Sizes that do not fit are an error here; the library leaves the shape unknown.
    """
    shapes = [v.shape for v in node.inputs if v is not None and v.shape is not None]
    if len(shapes) != len(node.inputs):
        return {}
    if node.outputs[0].shape is not None and not _symbols_differ(shapes):
        return {}
    return {0: oir.Shape(broadcast(context, node, shapes))}


def _symbols_differ(shapes: Iterable[oir.Shape]) -> bool:
    columns: dict[int, str] = {}
    for shape in shapes:
        for axis, dim in enumerate(reversed(shape.dims)):
            if not isinstance(dim, int) and columns.setdefault(axis, str(dim)) != str(dim):
                return True
    return False


def _matmul(context: ShapeInferenceContext, node: oir.Node) -> Corrections:
    """As for elementwise operators, in the batch dimensions."""
    a, b = (v.shape if v is not None else None for v in (node.inputs[0], node.inputs[_MATMUL_B[node.op_type]]))
    if a is None or b is None or min(len(a), len(b)) < 3 or not _symbols_differ([_batch(a), _batch(b)]):
        return {}
    return {0: oir.Shape([*broadcast(context, node, [_batch(a), _batch(b)]), a[-2], b[-1]])}


_MATMUL_B = {"MatMul": 1, "MatMulInteger": 1, "QLinearMatMul": 3}


def _batch(shape: oir.Shape) -> oir.Shape:
    return oir.Shape(shape.dims[:-2])


def _expand(context: ShapeInferenceContext, node: oir.Node) -> Corrections:
    """Expand-13 broadcasts both ways; where the target is unknown, its length still tells the rank."""
    data, target = node.inputs[0], node.inputs[1]
    assert data is not None and target is not None
    sizes = context.get_symbolic_value(target)
    length = _length(target)
    if data.shape is None:
        return {0: None}
    if sizes is not None:
        return {0: oir.Shape(broadcast(context, node, [data.shape, sizes]))}
    return {} if length is None else {0: _fresh(context, max(length, len(data.shape)))}


def _from_shape_vector(context: ShapeInferenceContext, node: oir.Node) -> Corrections:
    """Reshape and ConstantOfShape: where the sizes are unknown, their number still tells the rank."""
    if node.outputs[0].shape is not None:
        return {}
    vector = node.inputs[1] if node.op_type == "Reshape" else node.inputs[0]
    length = _length(vector)
    return {} if length is None else {0: _fresh(context, length)}


def _reduction(context: ShapeInferenceContext, node: oir.Node) -> Corrections:
    """Where the axes are data, their number and ``keepdims`` still tell the rank."""
    data = node.inputs[0]
    if node.outputs[0].shape is not None or data is None or data.shape is None or len(node.inputs) < 2:
        return {}
    if node.attributes.get_int("keepdims", 1):
        return {0: _fresh(context, len(data.shape))}
    length = _length(node.inputs[1])
    return {0: _fresh(context, len(data.shape) - length)} if length else {}


def _unsqueeze(context: ShapeInferenceContext, node: oir.Node) -> Corrections:
    """Where the axes are data, their number still tells the rank."""
    data, length = node.inputs[0], _length(node.inputs[1]) if len(node.inputs) > 1 else None
    if node.outputs[0].shape is not None or data is None or data.shape is None or length is None:
        return {}
    return {0: _fresh(context, len(data.shape) + length)}


def _col2im(context: ShapeInferenceContext, node: oir.Node) -> Corrections:
    """The library wants a constant image; where its sizes are data, their number still tells the rank."""
    data, image = node.inputs[0], node.inputs[1]
    if node.outputs[0].shape is not None or data is None or data.shape is None or image is None:
        return {}
    sizes, length = context.get_symbolic_value(image), _length(image)
    if sizes is None and length is not None:
        sizes = [context.new_symbolic_dim() for _ in range(length)]
    return {} if sizes is None else {0: oir.Shape([data.shape[0], context.new_symbolic_dim(), *sizes])}


def _same_rank(context: ShapeInferenceContext, node: oir.Node) -> Corrections:
    """Tile and CenterCropPad: where the sizes are data, the rank is that of the input."""
    data = node.inputs[0]
    if node.outputs[0].shape is not None or data is None or data.shape is None:
        return {}
    return {0: _fresh(context, len(data.shape))}


def _squeeze(context: ShapeInferenceContext, node: oir.Node) -> Corrections:
    """The library drops the sizes known to be 1 when it does not know the axes; the others may be 1 as well."""
    data = node.inputs[0]
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    if data is None or data.shape is None or "axes" in node.attributes:
        return {}
    if axes is None:
        return {} if data.shape.is_static() else {0: None}
    if context.get_symbolic_value(axes) is not None:
        return {}
    length = _length(axes)
    return {0: None if length is None else _fresh(context, len(data.shape) - length)}


def _split(context: ShapeInferenceContext, node: oir.Node) -> Corrections:
    """The library splits evenly where the sizes are data."""
    data, sizes = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    if data is None or data.shape is None or sizes is None or context.get_symbolic_value(sizes) is not None:
        return {}
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    result: Corrections = {}
    for index in range(len(node.outputs)):
        dims = list(data.shape)
        dims[axis] = context.new_symbolic_dim()
        result[index] = oir.Shape(dims)
    return result


def _unique(context: ShapeInferenceContext, node: oir.Node) -> Corrections:
    """The library forgets the axis: the first output keeps the rank of the input."""
    data, count = node.inputs[0], node.outputs[0].shape
    if "axis" not in node.attributes or data is None:
        return {}
    if data.shape is None or count is None:
        return {0: None}
    dims = list(data.shape)
    dims[node.attributes["axis"].as_int()] = count[0]
    return {0: oir.Shape(dims)}


def _pool(context: ShapeInferenceContext, node: oir.Node) -> Corrections:
    """Exact sizes for ``ceil_mode`` (no window starts in the end padding) and for SAME padding of symbolic sizes."""
    data = node.inputs[0]
    if data is None or data.shape is None or node.outputs[0].shape is None:
        return {}
    spatial = list(data.shape)[2:]
    rank = len(spatial)
    strides = _ints(node, "strides", [1] * rank)
    if node.attributes.get_string("auto_pad", "NOTSET").startswith("SAME"):
        sizes = [(x + (s - 1)) // s for x, s in zip(spatial, strides, strict=True)]
    elif node.attributes.get_int("ceil_mode", 0):
        kernel = _ints(node, "kernel_shape", [])
        pads = _ints(node, "pads", [0] * (2 * rank))
        dilations = _ints(node, "dilations", [1] * rank)
        sizes = []
        for axis, x in enumerate(spatial):
            window, stride = dilations[axis] * (kernel[axis] - 1) + 1, strides[axis]
            # Rounded up: (x + begin + end - window + stride - 1) // stride + 1 windows, but the last starts
            # before the end padding, so there are at most (x + begin - 1) // stride + 1.
            slack = min(pads[rank + axis] - window + stride - 1, -1)
            sizes.append((x + (pads[axis] + slack)) // stride + 1)
    else:
        return {}
    shape = oir.Shape([*list(node.outputs[0].shape)[:2], *sizes])
    return dict.fromkeys(range(len(node.outputs)), shape)


def _ints(node: oir.Node, name: str, default: Sequence[int]) -> Sequence[int]:
    attribute = node.attributes.get(name)
    return list(attribute.as_ints()) if attribute is not None else default


def _length(vector: oir.Value | None) -> int | None:
    if vector is None or vector.shape is None or len(vector.shape) != 1:
        return None
    size = vector.shape[0]
    return size if isinstance(size, int) else None


def _fresh(context: ShapeInferenceContext, rank: int) -> oir.Shape:
    return oir.Shape([context.new_symbolic_dim() for _ in range(rank)])


_BROADCASTING = """
    Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod
    Mul Or Pow Sub Sum Where Xor
"""
_REDUCTIONS = """
    ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare
"""
_CORRECTIONS: dict[str, Correction] = {
    **dict.fromkeys(_BROADCASTING.split(), _elementwise),
    **dict.fromkeys(_MATMUL_B, _matmul),
    **dict.fromkeys(["AveragePool", "MaxPool", "LpPool", "Conv", "ConvInteger", "QLinearConv"], _pool),
    **dict.fromkeys(["Reshape", "ConstantOfShape"], _from_shape_vector),
    **dict.fromkeys(_REDUCTIONS.split(), _reduction),
    "CenterCropPad": _same_rank,
    "Col2Im": _col2im,
    "Expand": _expand,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _same_rank,
    "Unique": _unique,
    "Unsqueeze": _unsqueeze,
}
