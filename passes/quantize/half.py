"""float16 or bfloat16 in place of float32, except for islands whose numbers would not survive it.

Inputs and outputs of the model keep their types. An operator is an island if it adds up many terms or needs the range
of float32 (normalization, softmax, reductions, powers and exponentials), if a constant of it overflows or vanishes in
float16, or if a value that it reads or makes was seen to come near the largest float16.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import ml_dtypes
import numpy as np
import onnx_ir as oir

from optc.passes.base import Pass, PassResult
from optc.passes.match import constant
from optc.passes.quantize.edit import Edit

KINDS: Mapping[str, tuple[oir.DataType, np.dtype]] = {
    "float16": (oir.DataType.FLOAT16, np.dtype(np.float16)),
    "bfloat16": (oir.DataType.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
}
LARGEST = 65504.0 / 4
"""Values that calibration saw above this stay in float32: other data may be larger."""
_ISLANDS = frozenset(
    {
        *("LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization"),
        *("BatchNormalization", "LpNormalization", "Softmax", "LogSoftmax", "GlobalLpPool", "CumSum"),
        *("ReduceSum", "ReduceMean", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp"),
        *("ReduceProd", "Pow", "Exp", "Log", "Erf", "Range", "Resize", "LSTM", "GRU", "RNN", "Loop", "Scan", "If"),
        *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "NonMaxSuppression", "Cast", "CastLike"),
        *("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"),
        *("EyeLike", "ConstantOfShape", "OneHot", "STFT", "DFT", "MelWeightMatrix"),
    }
)


class HalfPass(Pass):
    """Converts to ``kind`` (a key of KINDS). ``large`` are names of values that calibration saw above LARGEST."""

    name = "half-precision"

    def __init__(self, kind: str, large: Collection[str] = (), exclude: Collection[str] = ()) -> None:
        self.dtype, self.numpy = KINDS[kind]
        self.large, self.exclude = frozenset(large), frozenset(exclude)

    def call(self, model: oir.Model) -> PassResult:
        """Convert, in place."""
        edit = Edit(model, self.name)
        converted = [node for node in model.graph if self.island(node) is None]
        inside = set(converted)
        halves: dict[oir.Value, oir.Value] = {}
        for node in converted:
            for index, value in enumerate(node.inputs):
                if value is None or value.dtype != oir.DataType.FLOAT or value.producer() in inside:
                    continue
                if value not in halves:
                    halves[value] = self._half(edit, value)
                node.replace_input_with(index, halves[value])
                edit.discard(value)
        for node in converted:
            for output in node.outputs:
                if output.dtype == oir.DataType.FLOAT:
                    self._widen(edit, output, inside)
        return PassResult(bool(converted), {"converted": len(converted)} if converted else {})

    def island(self, node: oir.Node) -> str | None:
        """Return why a node of the outermost graph stays in float32, None if it is converted."""
        values = [v for v in (*node.inputs, *node.outputs) if v is not None and v.dtype == oir.DataType.FLOAT]
        if not values:
            return "no float32"
        if node.domain != "" or node.op_type in _ISLANDS:
            return "needs float32"
        if str(node.name) in self.exclude:
            return "excluded"
        if any(str(v.name) in self.large for v in values):
            return "large values"
        if not all(self._fits(constant(v)) for v in values):
            return "a constant overflows or vanishes"
        return None

    def _fits(self, array: np.ndarray | None) -> bool:
        if array is None or array.dtype != np.float32 or array.size == 0:
            return True
        with np.errstate(over="ignore"):
            half = array.astype(self.numpy).astype(np.float32)
        if not np.array_equal(np.isfinite(half), np.isfinite(array)):
            return False
        # Single weights near 0 may become 0; a whole tensor (an epsilon, say) must not.
        return bool(half.any() or not array.any())

    def _half(self, edit: Edit, value: oir.Value) -> oir.Value:
        array = constant(value)
        if array is not None:
            return edit.constant(array.astype(self.numpy), f"{value.name}.half")
        return edit.node("Cast", [value], value, dtype=self.dtype, to=int(self.dtype))

    def _widen(self, edit: Edit, output: oir.Value, inside: set[oir.Node]) -> None:
        """Make ``output`` a half; who needs float32, the model's outputs too, reads a Cast of it."""
        others = [(node, index) for node, index in output.uses() if node not in inside]
        shown = output.is_graph_output()
        output.type = oir.TensorType(self.dtype)
        if not others and not shown:
            return
        wide = edit.node("Cast", [output], output, dtype=oir.DataType.FLOAT, to=int(oir.DataType.FLOAT))
        for node, index in others:
            node.replace_input_with(index, wide)
        if shown:
            name = str(output.name)
            for position, value in enumerate(edit.graph.outputs):
                if value is output:
                    edit.graph.outputs[position] = wide
            output.name = edit.namer.fresh(f"{name}.half")
            wide.name = name
