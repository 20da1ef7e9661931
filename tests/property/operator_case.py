"""One operator with drawn attributes, shapes and element types; many of them in one model, against a reference.

Compiling is what costs time, so cases that have nothing to do with each other share a model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import optc

FLOATS = ("float32", "float16", "bfloat16", "float64")
SIGNED = ("int8", "int16", "int32", "int64")
UNSIGNED = ("uint8", "uint16", "uint32", "uint64")
INTEGERS = (*SIGNED, *UNSIGNED)
NUMBERS = (*FLOATS, *INTEGERS)
ANY = (*NUMBERS, "bool")
TARGETS = ("cpu", "haswell", "nehalem")
OPSET = 23
EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def dtype_of(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


@dataclass
class Case:
    """A node, its inputs, and how exact its results have to be.

    ``arrays`` may hold None for an absent input; those in ``constants`` are initializers; ``symbolic`` names dimensions
    that are not known while compiling, by input and axis. ``roundings`` counts how often a result may be off by one
    unit of the largest magnitude in it (``scale`` where sums cancel; ``relative``: of its own magnitude). ``single``
    makes those units of float32 for float64: the standard computes so, or the reference. Integers and booleans must be
    equal unless ``off_by`` says how far they may be off. With ``wide``, the reference computes in float64;
    ``reference`` replaces onnx's evaluator, which knows no ``domain`` but ONNX's.
    """

    op: str
    arrays: list[np.ndarray | None]
    outputs: Sequence[str]
    attributes: dict[str, Any] = field(default_factory=dict)
    constants: frozenset[int] = frozenset()
    symbolic: dict[tuple[int, int], str] = field(default_factory=dict)
    roundings: float = 4.0
    scale: float = 0.0
    off_by: int = 0
    relative: bool = False
    single: bool = False
    wide: bool = True
    reference: Callable[[Case], list[np.ndarray]] | None = None
    opset: int = OPSET
    domain: str = ""

    def node(self, prefix: str = "") -> onnx.NodeProto:
        inputs = [f"{prefix}i{k}" if a is not None else "" for k, a in enumerate(self.arrays)]
        outputs = [f"{prefix}o{k}" if kind else "" for k, kind in enumerate(self.outputs)]
        name = f"{prefix}{self.op}"
        return helper.make_node(self.op, inputs, outputs, name=name, domain=self.domain, **self.attributes)

    def feeds(self, prefix: str = "") -> dict[str, np.ndarray]:
        return {f"{prefix}i{k}": a for k, a in enumerate(self.arrays) if a is not None and k not in self.constants}

    def describe(self) -> str:
        inputs = [
            "-" if a is None
            else f"{a.dtype}{[self.symbolic.get((k, i), d) for i, d in enumerate(a.shape)]}{list(a.shape)}"
            + (f"={a.tolist()}" if a.size <= 8 else "") + (" const" if k in self.constants else "")
            for k, a in enumerate(self.arrays)
        ]  # fmt: skip
        return f"{self.op}({'; '.join(inputs)}) {self.attributes} -> {list(self.outputs)}"

    def expected(self) -> list[np.ndarray]:
        """Return the wanted results; what has no output is left out."""
        if self.reference is not None:
            return self.reference(self)
        try:
            return evaluate(self, wide=self.wide)
        except (TypeError, ValueError):  # onnx's evaluator fails at some scalars, negative pads and empty tensors
            return onnxruntime_result(self)


def model_of(cases: Sequence[Case]) -> onnx.ModelProto:
    """Return one model with all ``cases`` in it; names begin with ``c0_``, ``c1_``, ..."""
    nodes, inputs, outputs, constants = [], [], [], []
    for number, case in enumerate(cases):
        prefix = f"c{number}_"
        nodes.append(case.node(prefix))
        for k, array in enumerate(case.arrays):
            if array is None:
                continue
            if k in case.constants:
                constants.append(numpy_helper.from_array(array, f"{prefix}i{k}"))
                continue
            shape = [
                prefix + case.symbolic[k, axis] if (k, axis) in case.symbolic else size
                for axis, size in enumerate(array.shape)
            ]
            code = helper.np_dtype_to_tensor_dtype(array.dtype)
            inputs.append(helper.make_tensor_value_info(f"{prefix}i{k}", code, shape))
        for k, kind in enumerate(case.outputs):
            if kind:
                code = helper.np_dtype_to_tensor_dtype(dtype_of(kind))
                outputs.append(helper.make_tensor_value_info(f"{prefix}o{k}", code, None))
    graph = helper.make_graph(nodes, "cases", inputs, outputs, constants)
    opset = max(case.opset for case in cases)
    imports = [helper.make_opsetid("", opset)]
    imports += [helper.make_opsetid(domain, 1) for domain in {case.domain for case in cases} - {""}]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def evaluate(case: Case, *, wide: bool) -> list[np.ndarray]:
    """Return what onnx's reference evaluator computes, in float64 where ``wide``."""
    model, feeds = model_of([case]), case.feeds("c0_")
    if wide:
        halves = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
        for value in (*model.graph.input, *model.graph.output):
            if value.type.tensor_type.elem_type in halves:
                value.type.tensor_type.elem_type = TensorProto.DOUBLE
        for tensor in model.graph.initializer:
            if tensor.data_type in halves:
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
        feeds = {name: a.astype(np.float64) if a.dtype.name in EPSILON else a for name, a in feeds.items()}
    with np.errstate(all="ignore"):
        return [np.asarray(a) for a in ReferenceEvaluator(model).run(None, feeds)]


def onnxruntime_result(case: Case) -> list[np.ndarray]:
    """Return what onnxruntime computes, in float32 or float64."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    model = model_of([case])
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, case.feeds("c0_"))


def mismatches(case: Case, found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> list[str]:
    """Say how ``found`` differs from ``expected``, for each output that does."""
    kinds = [kind for kind in case.outputs if kind]
    wrong = []
    for k, (kind, a, b) in enumerate(zip(kinds, found, expected, strict=True)):
        if a.dtype != dtype_of(kind) or a.shape != b.shape:
            wrong.append(f"output {k} is {a.dtype}{list(a.shape)}, expected {kind}{list(b.shape)}")
        elif kind in EPSILON:
            wrong += [f"output {k}: {text}" for text in _float_mismatch(case, kind, a, b)]
        elif case.off_by:
            distance = np.abs(a.astype(np.int64) - b.astype(np.int64)).max(initial=0)
            wrong += [f"output {k} is off by {distance}"] if distance > case.off_by else []
        elif not np.array_equal(a, b):
            wrong.append(f"output {k}: {_first(a, b, a != b)}")
    return wrong


def _float_mismatch(case: Case, kind: str, a: np.ndarray, b: np.ndarray) -> list[str]:
    with np.errstate(all="ignore"):
        # What is beyond the type's range rounds to infinity.
        rounded = b.astype(dtype_of(kind)).astype(np.float64)
        a, b = a.astype(np.float64), b.astype(np.float64)
        finite = np.isfinite(rounded)
        scale = np.abs(b) if case.relative else max(case.scale, float(np.abs(b[finite]).max(initial=0.0)))
        epsilon = max(EPSILON[kind], EPSILON["float32"]) if case.single else EPSILON[kind]
        allowed = case.roundings * epsilon * scale + float(ml_dtypes.finfo(dtype_of(kind)).tiny)
        limit = float(ml_dtypes.finfo(dtype_of(kind)).max) * (1 - case.roundings * EPSILON[kind])
        same = (a == rounded) | (np.isnan(a) & np.isnan(rounded)) | (np.abs(a - b) <= allowed)
        # At the end of the range a rounding decides between the largest number and infinity.
        same |= (np.abs(a) >= limit) & (np.abs(b) >= limit) & (np.sign(a) == np.sign(b))
    return [] if same.all() else [f"{_first(a, b, ~same)} (allowed {np.max(allowed):.2e})"]


def _first(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> str:
    index = tuple(int(i) for i in np.argwhere(where)[0])
    return f"{int(where.sum())} of {a.size} differ, first at {list(index)}: {a[index]!r}, expected {b[index]!r}"


def complaints(cases: Sequence[Case], target: str) -> list[str]:
    """Compile all ``cases`` as one model for ``target`` and compare each; says which are wrong, and how."""
    feeds = {name: array for number, case in enumerate(cases) for name, array in case.feeds(f"c{number}_").items()}
    try:
        found = optc.compile(model_of(cases), verify=False, target=target).model().run(feeds)
    except Exception as error:
        if len(cases) == 1:
            return [f"{cases[0].describe()}: {type(error).__name__}: {error}"]
        # Which of them it is.
        half = len(cases) // 2
        return complaints(cases[:half], target) + complaints(cases[half:], target)
    wrong = []
    for number, case in enumerate(cases):
        outputs = [found[f"c{number}_o{k}"] for k, kind in enumerate(case.outputs) if kind]
        wrong += [f"{case.describe()}: {text}" for text in mismatches(case, outputs, case.expected())]
    return wrong


class Draw:
    """Draws what cases are made of: a case is a function of the seed.

    Not hypothesis's: its shrinking would compile hundreds of models, and cases are small.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.rng = np.random.default_rng(seed)

    def integer(self, low: int, high: int) -> int:
        return self._random.randint(low, high)

    def pick(self, choices: Sequence[Any]) -> Any:
        return choices[self.integer(0, len(choices) - 1)]

    def flag(self) -> bool:
        return self.pick([False, True])

    def subset(self, choices: Sequence[Any]) -> list[Any]:
        return [c for c in choices if self.flag()]

    def shape(self, low: int = 0, high: int = 4, *, empty: bool = True) -> list[int]:
        """Return a shape of ``low`` to ``high`` dimensions; one in ten has an empty one where allowed."""
        sizes = [self.size() for _ in range(self.integer(low, high))]
        if empty and sizes and self.integer(0, 9) == 9:
            sizes[self.integer(0, len(sizes) - 1)] = 0
        while np.prod(sizes) > 6000:
            sizes[int(np.argmax(sizes))] //= 2
        return sizes

    def size(self) -> int:
        """Return a size: 1, odd, below and above the width of vectors."""
        return self.pick([1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 33])

    def axis(self, rank: int) -> int:
        """Return an axis, counted from either end."""
        return self.integer(-rank, rank - 1)

    def permutation(self, n: int) -> list[int]:
        return self._random.sample(range(n), n)

    def array(
        self, dtype: str, shape: Sequence[int], low: float | None = None, high: float | None = None
    ) -> np.ndarray:
        """Return random numbers; floats are normal unless bounded, integers take the whole range."""
        kind = dtype_of(dtype)
        if dtype == "bool":
            return self.rng.integers(0, 2, shape).astype(bool)
        if dtype in EPSILON:
            values = self.rng.standard_normal(shape) if low is None else self.rng.uniform(low, high, shape)
            return np.asarray(values).astype(kind)
        info = np.iinfo(kind)
        low, high = (info.min, info.max) if low is None else (max(low, info.min), min(high, info.max))
        return np.asarray(self.rng.integers(low, high, shape, kind, endpoint=True))

    def special(self, array: np.ndarray) -> np.ndarray:
        """Return ``array`` with a few infinities, zeros of both signs and NaN in it."""
        if array.dtype.name in EPSILON and array.size and self.flag():
            flat = array.reshape(-1).copy()
            for value in (np.nan, np.inf, -np.inf, -0.0, 0.0):
                flat[self.rng.integers(0, flat.size)] = value
            return flat.reshape(array.shape)
        return array

    def symbols(
        self, arrays: Sequence[np.ndarray | None], axes: dict[int, Sequence[int]]
    ) -> dict[tuple[int, int], str]:
        """Return names for some dimensions: ``axes`` says which of each array may be unknown while compiling.

        Dimensions of one size may share their name or not.
        """
        if self.flag():
            return {}
        return {
            (k, axis): f"d{k}_{axis}" for k, listed in axes.items() for axis in listed
            if arrays[k] is not None and self.integer(0, 2)
        }  # fmt: skip

    def all_symbols(self, *arrays: np.ndarray | None) -> dict[tuple[int, int], str]:
        return self.symbols(arrays, {k: range(a.ndim) for k, a in enumerate(arrays) if a is not None})
