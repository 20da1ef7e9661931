"""Shape arithmetic: what ``Shape -> Gather -> ... -> Concat`` chains compute is used where it is needed.

Known contents become constants. Operators that take a shape get a constant one where at most the sizes that they
can deduce themselves are symbolic (0 and -1 of Reshape, 1 of Expand, the open end of Slice). Of equal symbolic
contents that are still needed, the first is kept; a part of an input's shape is read off the input.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as oir

from optc.passes.base import Pass, PassResult
from optc.passes.rewrite import ANY, Miss, Ops, Outcome, Rewrite, RewritePass, Rule, rule
from optc.passes.simplify.contents import Contents, Element, dim_expr, same

CONSTANT = "shape arithmetic => constant"
RESHAPE = "reshape(x, dims) => reshape(x, constant)"
EXPAND = "expand(x, dims) => x or expand(x, constant)"
SLICE = "slice(x, 0, dim) => slice(x, constant)"
RESIZE = "resize(x, sizes = k * dims) => resize(x, scales = k)"
MERGE = "equal shape arithmetic => the first"


class FoldShapes(Pass):
    """See the module. The contents of all values are evaluated once per call."""

    name = "fold-shapes"

    def __init__(self, disabled: frozenset[str] = frozenset()) -> None:
        self.disabled = disabled

    def rule_names(self) -> tuple[str, ...]:
        """Return the names of the rules."""
        return (CONSTANT, RESHAPE, EXPAND, SLICE, RESIZE, MERGE)

    def without(self, names: frozenset[str]) -> Pass:
        """Return this pass without the rules called ``names``."""
        found = names.intersection(self.rule_names())
        return FoldShapes(self.disabled | found) if found else self

    def call(self, model: oir.Model) -> PassResult:
        """Run on a canonical model whose shapes are inferred."""
        rules = _Rules(model)
        # Equal contents are merged among what is left when every consumer that can do without is served.
        first = RewritePass(self.name, rules.consumers()).without(self.disabled).call(model)
        second = RewritePass(self.name, rules.producers()).without(self.disabled).call(model)
        fired = {**first.fired, **second.fired}
        return PassResult(bool(fired), fired, first.skipped + second.skipped)


class _Rules:
    def __init__(self, model: oir.Model) -> None:
        self.model = model
        self.contents = Contents(model)
        self.first: dict[tuple[object, ...], oir.Value] = {}

    def consumers(self) -> list[Rule]:
        return [
            rule(CONSTANT, ANY)(self.constant),
            rule(RESHAPE, "Reshape")(self.reshape),
            rule(EXPAND, "Expand")(self.expand),
            rule(SLICE, "Slice")(self.slice),
            rule(RESIZE, "Resize")(self.resize),
        ]

    def producers(self) -> list[Rule]:
        return [rule(MERGE, ANY)(self.merge)]

    def constant(self, node: oir.Node, ops: Ops) -> Outcome:
        """Replace a node whose outputs hold known integers or booleans."""
        arrays = []
        for value in node.outputs:
            array = self.contents.get(value)
            if array is None or value.dtype is None or not all(isinstance(e, int) for e in array.reshape(-1)):
                return None
            if not all(_fits(e, value.dtype) for e in array.reshape(-1)):
                return Miss("the arithmetic overflows")
            arrays.append(array.astype(value.dtype.numpy()))
        if node.op_type == "Identity":
            return None
        return Rewrite([ops.constant(array, hint="shape") for array in arrays])

    def reshape(self, node: oir.Node, ops: Ops) -> Outcome:
        """Write 0 for a copied dim and -1 for one other symbolic dim."""
        x, shape = node.inputs[0], node.inputs[1]
        target = self._dynamic(shape)
        if target is None or x is None:
            return None
        allow_zero = "allowzero" in node.attributes and node.attributes["allowzero"].as_int()
        if allow_zero and any(_is_int(e, 0) for e in target):
            return Miss("an axis of size 0 cannot be written together with copied sizes")
        dims = self._dims(x)
        constant: list[int] = []
        for axis, element in enumerate(target):
            if isinstance(element, int):
                constant.append(element)
            elif dims is not None and axis < len(dims) and same(element, dims[axis]):
                constant.append(0)
            else:
                constant.append(-1)
        if constant.count(-1) > 1:
            return Miss("more than one symbolic size has to be deduced")
        return Rewrite([ops("Reshape", x, ops.constant(np.array(constant, np.int64), hint="shape"))])

    def expand(self, node: oir.Node, ops: Ops) -> Outcome:
        """Drop an Expand to the same shape; write 1 for the sizes that the input has already."""
        x, shape = node.inputs[0], node.inputs[1]
        target = self.contents.get(shape)
        dims = self._dims(x) if x is not None else None
        if x is None or target is None or dims is None or target.ndim != 1:
            return None
        padded: list[Element] = [1] * (len(target) - len(dims)) + dims
        kept = [1] * (len(padded) - len(target)) + list(target)
        constant = [1 if same(d, e) else e for d, e in zip(padded, kept, strict=True)]
        if len(dims) == len(padded) and all(_is_int(e, 1) for e in constant):
            return Rewrite([x])
        if self._dynamic(shape) is None:
            return None
        if not all(isinstance(e, int) for e in constant):
            return Miss("a symbolic size is not that of the input")
        return Rewrite([ops("Expand", x, ops.constant(np.array(constant, np.int64), hint="shape"))])

    def slice(self, node: oir.Node, ops: Ops) -> Outcome:
        """Write an end at, or at most 2 before, the end of the axis without naming the size of the axis.

        Further from the end the results would differ where the axis is shorter than that.
        """
        x, starts, ends, *rest = node.inputs
        end = self._dynamic(ends)
        dims = self._dims(x) if x is not None else None
        start = self.contents.integers(starts)
        axes = self.contents.integers(rest[0]) if rest else list(range(len(end or ())))
        steps = self.contents.integers(rest[1]) if len(rest) > 1 else [1] * len(end or ())
        if end is None or start is None or dims is None or axes is None or steps is None or ends is None:
            return None
        dtype = np.int32 if ends.dtype == oir.DataType.INT32 else np.int64
        constant = []
        for element, axis, step in zip(end, axes, steps, strict=True):
            distance = element - dims[axis]
            distance = distance if isinstance(distance, int) else distance.expand()
            if isinstance(element, int):
                constant.append(element)
            elif step < 1 or not (isinstance(distance, int) or distance.is_Integer) or distance < -2:
                return Miss("the end of the slice is not near the end of the axis")
            else:
                constant.append(int(distance) if distance < 0 else int(np.iinfo(dtype).max))
        return Rewrite([ops("Slice", x, starts, ops.constant(np.array(constant, dtype), hint="ends"), *rest)])

    def resize(self, node: oir.Node, ops: Ops) -> Outcome:
        """Use scales where the sizes are the input's times powers of two, which scales express exactly."""
        if len(node.inputs) < 4 or node.inputs[3] is None:
            return None
        x = node.inputs[0]
        sizes = self._dynamic(node.inputs[3])
        dims = self._dims(x) if x is not None else None
        if sizes is None or dims is None:
            return None
        text = {k: node.attributes[k].as_string() for k in _RESIZE_MODES if k in node.attributes}
        if any(value in _RESIZE_MODES[key] for key, value in text.items()):
            return Miss("the mode depends on more than the scale")
        axes = node.attributes["axes"].as_ints() if "axes" in node.attributes else range(len(dims))
        scales = []
        for axis, size in zip(axes, sizes, strict=True):
            ratio = size / dims[axis] if isinstance(size, int) else (size / dims[axis]).expand()
            if not (isinstance(ratio, float) or ratio.is_Rational) or not _is_power_of_two(float(ratio)):
                return Miss("a size is not the input's times a power of two")
            scales.append(float(ratio))
        scale = ops.constant(np.array(scales, np.float32), hint="scales")
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        return Rewrite([ops("Resize", x, None, scale, **attributes)])

    def merge(self, node: oir.Node, ops: Ops) -> Outcome:
        """Read sizes off the model's inputs, and compute equal ones once; in the outermost graph only."""
        if len(node.outputs) != 1 or node.graph is not self.model.graph:
            return None
        value = node.outputs[0]
        array = self.contents.get(value)
        if array is None or value.dtype not in (oir.DataType.INT64, oir.DataType.INT32) or array.ndim > 1:
            return None
        elements = list(array.reshape(-1))
        if all(isinstance(e, int) for e in elements) or node.op_type == "Identity":
            return None
        if value.dtype == oir.DataType.INT64 and not self._is_read_off_input(node):
            found = self._find(elements)
            if found is not None:
                source, axis = found
                read = ops("Shape", source, start=axis, end=axis + len(elements))
                if array.ndim == 1:
                    return Rewrite([read])
                return Rewrite([ops("Squeeze", read, ops.constant(np.array([0], np.int64), hint="axes"))])
        key = (value.dtype, array.shape, *map(str, elements))
        first = self.first.setdefault(key, value)
        producer = first.producer()
        if producer is None or producer.graph is None:
            self.first[key] = value
            return None
        return Rewrite([first]) if first is not value else None

    def _is_read_off_input(self, node: oir.Node) -> bool:
        """Tell whether a node is ``Shape(input)``, or takes one element of it."""
        source = node.inputs[0] if node.op_type in ("Gather", "Squeeze") else node.outputs[0]
        shape = source.producer() if source is not None else None
        if shape is None or shape.op_type != "Shape":
            return False
        return shape.inputs[0] is not None and shape.inputs[0].is_graph_input()

    def _find(self, elements: Sequence[Element]) -> tuple[oir.Value, int] | None:
        for source in self.model.graph.inputs:
            dims = self._dims(source)
            for axis in range(len(dims or ()) - len(elements) + 1):
                if dims is not None and all(map(same, elements, dims[axis : axis + len(elements)])):
                    return source, axis
        return None

    def _dynamic(self, value: oir.Value | None) -> list[Element] | None:
        """Return the contents of a vector that is computed at run time so far."""
        if value is None or value.producer() is None:
            return None
        array = self.contents.get(value)
        return list(array) if array is not None and array.ndim == 1 else None

    def _dims(self, value: oir.Value) -> list[Element] | None:
        if value.shape is None or any(not isinstance(d, int) and d.value is None for d in value.shape):
            return None
        return [dim_expr(d) for d in value.shape]


_RESIZE_MODES = {
    "coordinate_transformation_mode": ("tf_crop_and_resize",),
    "keep_aspect_ratio_policy": ("not_larger", "not_smaller"),
}


def _is_int(element: Element, expected: int) -> bool:
    return isinstance(element, int) and element == expected


def _fits(element: int, dtype: oir.DataType) -> bool:
    if not dtype.is_integer():
        return True
    limits = np.iinfo(dtype.numpy())
    return bool(limits.min <= element <= limits.max)


def _is_power_of_two(ratio: float) -> bool:
    return ratio > 0 and float(np.frexp(ratio)[0]) == 0.5


PASS = FoldShapes()
