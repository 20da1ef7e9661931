"""Compares a compiled model with a reference on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as oir

from optc.errors import AccuracyError, OptcError, UsageError

Arrays = Mapping[str, np.ndarray]
TOLERANCE = {"float32": 1e-4, "float64": 1e-4, "float16": 5e-3, "bfloat16": 4e-2}
"""Allowed error relative to the largest magnitude of an output: sums are ordered differently, halves round."""


@dataclass(frozen=True)
class OutputError:
    """How one output differs. ``relative`` is the largest difference over the reference's largest magnitude.

    ``noise`` is that difference between two runs of the reference itself, where it is known: as the model is written,
    and as integers. A quantized network rounds to 255 steps, and layer by layer amplifies which way a tie fell.
    """

    name: str
    dtype: str
    max_absolute: float
    mean_absolute: float
    relative: float
    cosine: float
    mismatched: float
    noise: float | None = None

    def within(self, tolerance: float | None) -> bool:
        """Tell whether the output is right: floats within ``tolerance``, everything else equal.

        With ``noise``, it may differ by twice that, or an integer by one step.
        """
        limit = TOLERANCE.get(self.dtype) if tolerance is None else tolerance
        if self.noise is not None and tolerance is None:
            return self.relative <= max(limit or 0.0, 2 * self.noise) or (limit is None and self.max_absolute <= 1)
        if self.dtype not in TOLERANCE:
            return self.mismatched == 0
        assert limit is not None
        return self.relative <= limit


@dataclass(frozen=True)
class Verification:
    """The comparison of all outputs. ``reference`` says which program gave the expected values."""

    reference: str
    inputs: str
    dims: dict[str, int]
    outputs: tuple[OutputError, ...]

    def describe(self) -> dict[str, Any]:
        """Return the JSON form that reports carry."""
        return asdict(self) | {"outputs": [asdict(o) for o in self.outputs]}

    def require(self, tolerance: float | None) -> None:
        """Raise AccuracyError naming every output that is off."""
        bad = [o for o in self.outputs if not o.within(tolerance)]
        if not bad:
            return
        lines = "\n".join(
            f"  - {o.name}: relative error {o.relative:.2e}, cosine {o.cosine:.6f}, "
            f"{o.mismatched:.2%} of the elements differ"
            for o in bad
        )
        raise AccuracyError(
            f"{len(bad)} output(s) differ from {self.reference} by more than allowed:\n{lines}",
            hint="`optc verify MODEL --bisect` names the graph pass at fault, --tolerance allows more",
        )


def compare(name: str, actual: np.ndarray, expected: np.ndarray) -> OutputError:
    """Compare one output; NaN equals NaN and an infinity equals itself; shapes and dtypes must agree."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise AccuracyError(
            f"output '{name}' is {actual.dtype}{list(actual.shape)}, "
            f"the reference gives {expected.dtype}{list(expected.shape)}"
        )
    a, e = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    same = (a == e) | (np.isnan(a) & np.isnan(e))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(a - e))
    difference = np.where(np.isnan(difference), np.inf, difference)
    finite = np.isfinite(a) & np.isfinite(e)
    largest = float(np.abs(e[finite]).max(initial=0.0))
    worst = float(difference.max(initial=0.0))
    af, ef = a[finite], e[finite]
    norm = float(np.linalg.norm(af) * np.linalg.norm(ef))
    return OutputError(
        name=name,
        dtype=expected.dtype.name,
        max_absolute=worst,
        mean_absolute=float(difference.mean()) if difference.size else 0.0,
        relative=worst / largest if largest else worst,
        cosine=float(np.dot(af.ravel(), ef.ravel())) / norm if norm else 1.0,
        mismatched=float(1.0 - same.mean()) if same.size else 0.0,
    )


def compare_all(actual: Arrays, expected: Arrays) -> tuple[OutputError, ...]:
    """Compare every output by name."""
    return tuple(compare(name, array, np.asarray(expected[name])) for name, array in actual.items())


def reference(model: oir.Model, prefer: str | None = None) -> tuple[str, Callable[[Arrays], dict[str, np.ndarray]]]:
    """Return the name and the function of the best reference for ``model``.

    onnxruntime when it is installed and accepts the model, else onnx's reference evaluator; ``prefer`` forces
    "onnxruntime" or "onnx". The name says which one it is, and why where it is the second choice.
    """
    if prefer not in (None, "onnxruntime", "onnx"):
        raise UsageError(f"no reference called '{prefer}'; there are onnxruntime and onnx")
    why = ""
    if prefer != "onnx":
        try:
            # Its optimizer rounds the rows that meet dequantized weights to 8 bits, and crashes on some Ifs whose
            # condition is constant.
            return _onnxruntime(model, literal=is_quantized(model) or _has(model, "DequantizeLinear", "If"))
        except (ImportError, OptcError) as error:
            if prefer == "onnxruntime":
                raise UsageError(f"onnxruntime cannot serve as reference: {error}") from error
            why = " (onnxruntime: " + str(error).splitlines()[0][:120] + ")"
    import onnx

    from optc.ir.reference import evaluate

    return f"onnx reference evaluator {onnx.__version__}{why}", lambda inputs: evaluate(model, dict(inputs))


def _onnxruntime(model: oir.Model, *, literal: bool) -> tuple[str, Callable[[Arrays], dict[str, np.ndarray]]]:
    import onnxruntime

    from optc.peers import OnnxRuntime

    peer = OnnxRuntime(model, threads=1, literal=literal)
    return f"onnxruntime {onnxruntime.__version__}" + (" (graph as written)" if literal else ""), peer.run


def is_quantized(model: oir.Model) -> bool:
    """Tell whether the model rounds activations to integers."""
    return _has(model, "QuantizeLinear", "DynamicQuantizeLinear")


def _has(model: oir.Model, *operators: str) -> bool:
    return any(node.op_type in operators for graph in model.graphs() for node in graph)


def with_noise(errors: Sequence[OutputError], model: oir.Model, inputs: Arrays, expected: Arrays) -> list[OutputError]:
    """Return ``errors`` with what onnxruntime's run as integers differs from ``expected``, its run as written."""
    _, run = _onnxruntime(model, literal=False)
    noise = {error.name: error.relative for error in compare_all(run(inputs), expected)}
    return [replace(error, noise=noise[error.name]) for error in errors]


def integer_choices(model: oir.Model) -> dict[str, Sequence[int]]:
    """Return what the values of integer inputs may be, as far as the graph tells.

    An input that indexes a table (Gather on the input or a cast or reshape of it) stays below its length. One that is
    compared with constants (a sample rate, say) is one of them.
    """
    choices: dict[str, Sequence[int]] = {}
    for value in model.graph.inputs:
        limits, constants = _uses_as_integer(value)
        if limits:
            choices[str(value.name)] = range(min(limits))
        elif constants:
            choices[str(value.name)] = sorted(constants)
    return choices


def _uses_as_integer(value: oir.Value) -> tuple[set[int], set[int]]:
    """Return the lengths of the tables that ``value`` indexes, and the constants that it is compared with."""
    limits: set[int] = set()
    constants: set[int] = set()
    stack, seen = [value], set()
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        for node, index in current.uses():
            if node.op_type == "Gather" and index == 1 and node.inputs[0] is not None:
                table = node.inputs[0].shape
                axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
                size = table[axis] if table is not None else None
                if isinstance(size, int):
                    limits.add(size)
            elif node.op_type == "Equal":
                other = node.inputs[1 - index]
                tensor = oir.convenience.get_const_tensor(other) if other is not None else None
                if tensor is not None and tensor.size == 1:
                    constants.add(int(tensor.numpy().reshape(())))
            elif node.op_type in ("Cast", "Reshape", "Unsqueeze", "Squeeze", "Identity") and index == 0:
                stack.extend(node.outputs)
    return limits, constants
