"""What a lowering function sees of its node: attributes, lowered inputs, known integers, and how to emit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import onnx_ir as oir
from tvm import relax, tirx

from optc.backends.base import Target
from optc.backends.kernels.decisions import Space, deciding
from optc.backends.kernels.workload import Core, Workload
from optc.backends.lowering import emit as emission
from optc.backends.lowering.known import Dequantized

if TYPE_CHECKING:
    from optc.backends.lowering.lower import Lowerer


class Unsupported(Exception):  # noqa: N818 - not an error yet: the lowerer collects them all and raises one
    """A node that cannot be lowered, and why; raised by lowering functions through ``Site.unsupported``."""


class Poisoned(Unsupported):
    """A value that no node gives because one before it was refused: not a refusal of its own."""


class Impossible(Unsupported):
    """A node that no run can reach because its operands contradict each other: legal in a branch never taken."""


class Site:
    """One node being lowered. Input numbers follow the ONNX operator; an absent optional input has no tensor."""

    def __init__(self, lowerer: Lowerer, node: oir.Node) -> None:
        self.lowerer = lowerer
        self.node = node
        self.op = node.op_type

    @property
    def target(self) -> Target:
        """The machine that is compiled for."""
        return self.lowerer.target

    @contextmanager
    def layout(self, core: Core) -> Iterator[Space]:
        """Let tuning decide inside of the block about operands and algorithm of a kernel that computes ``core``."""
        tuning = self.lowerer.tuning
        with deciding(tuning.layout(Workload(core)) if tuning else {}, strict=False) as space:
            yield space

    def attr(self, name: str, default: Any = None) -> Any:
        """Return the Python value of an attribute (int, float, str, list, array of a tensor), or ``default``."""
        attribute = self.node.attributes.get(name)
        if attribute is None or attribute.value is None:
            return default
        if attribute.type == oir.AttributeType.TENSOR:
            return attribute.as_tensor().numpy()
        if attribute.type in (oir.AttributeType.INTS, oir.AttributeType.FLOATS, oir.AttributeType.STRINGS):
            return list(attribute.value)
        return attribute.value

    @property
    def input_count(self) -> int:
        """Number of inputs, absent ones in the middle included."""
        return len(self.node.inputs)

    @property
    def output_count(self) -> int:
        """Number of outputs of the node."""
        return len(self.node.outputs)

    def has(self, index: int) -> bool:
        """Tell whether optional input ``index`` is given."""
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def wants(self, index: int) -> bool:
        """Tell whether output ``index`` is used by anything."""
        if index >= len(self.node.outputs):
            return False
        value = self.node.outputs[index]
        return bool(value.uses()) or value.is_graph_output()

    def value(self, index: int) -> oir.Value:
        """Return the IR value of input ``index``; it must be given."""
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        if value is None:
            self.unsupported(f"needs input {index}")
        assert value is not None
        return value

    def tensor(self, index: int) -> Any:
        """Return input ``index`` as a Relax tensor expression."""
        return self.lowerer.tensor(self.value(index))

    def last(self, index: int) -> Any:
        """Return input ``index``, ``[N, C, *S]``, as a Relax tensor ``[N, *S, C]``."""
        return self.lowerer.last(self.value(index))

    def is_last(self, index: int) -> bool:
        """Tell whether input ``index`` was computed channels-last."""
        return self.lowerer.is_last(self.value(index))

    def tensors(self) -> list[Any]:
        """Return all inputs as Relax tensor expressions (none may be absent)."""
        return [self.tensor(i) for i in range(self.input_count)]

    def shape(self, index: int) -> list[Any]:
        """Return the dimensions of input ``index``: Python ints or symbolic expressions."""
        return self.lowerer.shape(self.value(index))

    def rank(self, index: int) -> int:
        """Return the number of dimensions of input ``index``."""
        return len(self.shape(index))

    def dtype(self, index: int) -> str:
        """Return TVM's name of the element type of input ``index``."""
        return self.lowerer.dtype(self.value(index))

    def output_dtype(self, index: int = 0) -> str:
        """Return TVM's name of the element type that the IR gives output ``index``."""
        return self.lowerer.dtype(self.node.outputs[index])

    def constant(self, index: int) -> Any:
        """Return the array of input ``index`` if it is known while compiling, else None (also when absent)."""
        if not self.has(index):
            return None
        return self.lowerer.constant(self.value(index))

    def dequantized(self, index: int) -> Dequantized | None:
        """Return input ``index`` as the constant integers that it is dequantized from, None if it is not."""
        return self.lowerer.dequantized.get(self.value(index))

    def ints(self, index: int) -> list[Any]:
        """Return the elements of a 0-D or 1-D integer input, flat: ints or int64 expressions of symbolic dims.

        Elements that only a run can know are read there, into fresh symbolic variables (the tensor's length must
        be known). Their sign and range are unknown: the caller has to write expressions that hold for all.
        """
        return list(self.lowerer.elements(self.value(index)).reshape(-1))

    def emit(
        self,
        compute: Callable[..., Any],
        *tensors: Any,
        name: str | None = None,
        attributes: dict[str, Any] | None = None,
    ) -> Any:
        """Emit a kernel: ``compute`` gets one te tensor per Relax tensor and returns one te tensor or a list.

        The compute may close over any symbolic dimension. ``name`` (default: the operator's) names the kernel.
        """
        hint = (name or self.op).lower()
        return emission.emit(self.lowerer.builder, compute, tensors, hint, self.lowerer.symbols, attributes or {})

    def reshape(self, tensor: Any, shape: Sequence[Any]) -> Any:
        """Return a view of ``tensor`` with another shape (no data moves)."""
        return self.lowerer.reshape(tensor, shape)

    def weight(self, array: np.ndarray, hint: str) -> Any:
        """Return a new compile-time constant, such as a repacked weight, as a Relax tensor."""
        return self.lowerer.weight(array, f"{self.node.name}.{hint}")

    def symbol(self, hint: str) -> Any:
        """Return a fresh symbolic dimension; ``bind_shape`` gives it a value at run time."""
        return self.lowerer.symbol(hint)

    def bind_shape(self, tensor: Any, hint: str = "n") -> list[Any]:
        """Read a 1-D int64 tensor of known length at run time into fresh symbolic dimensions."""
        return self.lowerer.bind_shape(tensor, hint)

    def is_read(self, value: Any) -> bool:
        """Tell whether ``value`` involves an element that ``ints`` reads at run time: its sign is unknown."""
        return self.lowerer.is_read(value)

    def settle(self, dims: Sequence[Any]) -> list[Any]:
        """Return ``dims`` fit for a shape: what depends on elements read at run time gets a symbol of its own."""
        return self.lowerer.settle(dims)

    def nonnegative(self, value: Any) -> bool:
        """Tell whether ``value`` is at least 0 for every legal size."""
        return self.lowerer.nonnegative(value)

    def always(self, condition: Any) -> bool:
        """Tell whether a condition holds for every legal size."""
        return self.lowerer.always(condition)

    def implies(self, condition: Any, conclusion: Any) -> bool:
        """Tell whether ``conclusion`` holds for every legal size for which ``condition`` does."""
        return self.lowerer.implies(condition, conclusion)

    def simplify(self, value: Any) -> Any:
        """Return a simpler equal expression."""
        return self.lowerer.simplify(value)

    def prove_equal(self, a: Any, b: Any) -> bool:
        """Tell whether two dimensions are equal for every legal size."""
        return self.lowerer.prove_equal(a, b)

    def check_equal(self, tensor: Any, shape: Sequence[Any]) -> Any:
        """Return ``tensor`` with ``shape``, which is checked when the model runs unless it is sure already."""
        found = emission.shape_of(tensor)
        if len(found) != len(shape) or any(
            isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(found, shape, strict=True)
        ):
            self.impossible(f"shape {found} does not fit {list(shape)}")
        return self.check(tensor, shape, shape)

    def check(self, tensor: Any, expected: Sequence[Any], shape: Sequence[Any]) -> Any:
        """Return ``tensor`` as one of ``shape``, after a check at run time that its size is as ``expected``."""
        found = emission.shape_of(tensor)
        sure = [self.prove_equal(a, b) for a, b in zip(found, expected, strict=True)]
        if all(sure):
            return tensor
        # TVM takes a match_cast to a variable for its definition, which may run in a circle: "n is min(n, 512)". It
        # sees none in a Select; -1 is no size.
        dims = [
            emission.as_index(b)
            if known or isinstance(b, int)
            else tirx.Select(tirx.EQ(emission.as_index(a), b), emission.as_index(b), emission.as_index(-1))
            for a, b, known in zip(found, expected, sure, strict=True)
        ]
        # FuseOps does not see what a match_cast reads, and would move its producer behind it; a reshape it sees.
        view = self.reshape(tensor, found)
        checked = self.lowerer.builder.match_cast(view, relax.TensorType(dims, tensor.ty.dtype))
        return self.reshape(checked, shape)

    def unsupported(self, reason: str) -> NoReturn:
        """Refuse this node; every refused node of the model is reported in one error before anything is built."""
        raise Unsupported(reason)

    def impossible(self, reason: str) -> Any:
        """Refuse this node because its operands break the standard; inside of a branch, refuse only to take it."""
        raise Impossible(reason)


def scalar(value: Any, dtype: str) -> Any:
    """Return an immediate of ``dtype`` for use inside a compute."""
    if dtype == "bool":
        return tirx.const(bool(value), "bool")
    return tirx.const(value, dtype)
