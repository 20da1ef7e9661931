"""A loaded model: checks inputs, runs the compiled code, hands out the outputs."""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from optc.errors import InputError, OptcError, UsageError
from optc.runtime import ffi
from optc.runtime.dlpack import DLPackTensor
from optc.runtime.dtypes import dlpack_type
from optc.runtime.executor import Executor, Machine
from optc.runtime.format import Manifest, TensorSpec
from optc.runtime.inputs import address, prepare

_MAX_THREADS = 1024


@dataclass(frozen=True)
class KernelTime:
    """Time spent in one function of the compiled code during a profiled run, its callees excluded."""

    name: str
    calls: int
    seconds: float


class Model:
    """A compiled model. All methods may be called from several threads at once."""

    def __init__(self, manifest: Manifest, report: bytes, executor: Executor, weights: tuple[int, int]) -> None:
        self._manifest = manifest
        self._report = report
        self._executor = executor
        self._weights = weights  # where the weights start and end

    @property
    def manifest(self) -> Manifest:
        """Everything the artifact states about itself."""
        return self._manifest

    @property
    def inputs(self) -> list[TensorSpec]:
        """The inputs, in the order ``__call__`` takes them."""
        return list(self._manifest.inputs)

    @property
    def outputs(self) -> list[TensorSpec]:
        """The outputs, in the order ``__call__`` returns them."""
        return list(self._manifest.outputs)

    @property
    def metadata(self) -> dict[str, str]:
        """The source model's metadata."""
        return dict(self._manifest.metadata)

    @property
    def report(self) -> dict[str, Any]:
        """What the compiler wrote about the build: passes, kernels, verification errors."""
        report: dict[str, Any] = json.loads(self._report)
        return report

    @property
    def threads(self) -> int:
        """How many threads one call uses: one per physical core unless set. Concurrent calls share none."""
        return self._executor.threads

    @threads.setter
    def threads(self, count: int) -> None:
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= _MAX_THREADS:
            raise UsageError(f"threads must be an integer from 1 to {_MAX_THREADS}, not {count!r}")
        self._executor.threads = count

    def run(self, inputs: Mapping[str, object]) -> dict[str, NDArray[Any]]:
        """Run the model on inputs by name and return its outputs by name.

        Inputs are NumPy arrays or DLPack tensors (``torch.Tensor``) of the exact dtype, or Python numbers and
        lists. They are read in place if contiguous and 64-byte aligned; nothing may change them meanwhile.
        Outputs own their memory. Raises InputError if the inputs do not fit, OptcError if the code fails.
        """
        return {name: tensor.numpy() for name, tensor in self.run_dlpack(inputs).items()}

    def run_dlpack(self, inputs: Mapping[str, object]) -> dict[str, DLPackTensor]:
        """Like ``run``; returns DLPack tensors, for consumers such as ``torch.from_dlpack``."""
        arrays = prepare(self._manifest.inputs, inputs)
        try:
            outputs = self._executor.run(self._views(arrays), arrays)
        except ffi.TvmError as error:
            raise self._explain(error, arrays) from error
        if len(outputs) != len(self._manifest.outputs):
            raise OptcError(f"the code returned {len(outputs)} outputs instead of {len(self._manifest.outputs)}")
        outputs = self._own(outputs, arrays)
        return {spec.name: DLPackTensor(ref) for spec, ref in zip(self._manifest.outputs, outputs, strict=True)}

    def __call__(self, *inputs: object) -> NDArray[Any] | tuple[NDArray[Any], ...]:
        """Run on inputs by position; returns the output, or a tuple if the model has several (or none)."""
        specs = self._manifest.inputs
        if len(inputs) != len(specs):
            raise InputError(
                f"{len(inputs)} inputs given; the model takes {len(specs)}",
                hint="; ".join(map(str, specs)) or None,
            )
        results = tuple(self.run({spec.name: x for spec, x in zip(specs, inputs, strict=True)}).values())
        return results[0] if len(results) == 1 else results

    def profile(self, inputs: Mapping[str, object], *, repeat: int = 1) -> list[KernelTime]:
        """Run ``repeat`` times after one warm-up; return the time per function and run, the slowest first."""
        arrays = prepare(self._manifest.inputs, inputs)
        views = self._views(arrays)
        clock = _Clock()

        def measure(machine: Machine) -> None:
            machine.run(views)
            machine.instrument(clock.function)
            for _ in range(repeat):
                machine.run(views)

        self._executor.call_on_new_machine(measure)
        times = [
            KernelTime(name, calls // repeat, total / repeat / 1e9) for name, (calls, total) in clock.totals.items()
        ]
        return sorted(times, key=lambda time: -time.seconds)

    def _views(self, arrays: Sequence[NDArray[Any]]) -> list[ffi.Ref]:
        return [
            ffi.view(address(array), *dlpack_type(spec.dtype), array.shape)
            for spec, array in zip(self._manifest.inputs, arrays, strict=True)
        ]

    def _own(self, outputs: Sequence[ffi.Ref], arrays: Sequence[NDArray[Any]]) -> list[ffi.Ref]:
        """Copy outputs that lie in an input, a weight, a constant or another output."""
        taken = [self._weights, *((address(array), address(array) + array.nbytes) for array in arrays)]
        owned = []
        for ref in outputs:
            start, size = _extent(ref.tensor())
            # A fresh output is held by us and by the machine's last result; more holders share it.
            holders = ctypes.c_uint32.from_address(ref.address).value
            if size and (holders > 2 or any(start < end and begin < start + size for begin, end in taken)):
                owned.append(_copy(ref))
            else:
                owned.append(ref)
                taken.append((start, start + size))
        return owned

    def _explain(self, error: ffi.TvmError, arrays: Sequence[NDArray[Any]]) -> OptcError:
        """Say which inputs the compiled code failed on."""
        given = ", ".join(
            f"{spec.name}: {spec.dtype}{list(array.shape)}"
            for spec, array in zip(self._manifest.inputs, arrays, strict=True)
        )
        return OptcError(
            f"the compiled code failed for inputs {given or '(none)'}: {error.message}",
            hint="check that these sizes are legal for the model",
        )


def _extent(tensor: ffi.DLTensor) -> tuple[int, int]:
    size = tensor.bits * tensor.lanes // 8
    for dim in tensor.shape[: tensor.ndim]:
        size *= dim
    return (tensor.data or 0) + tensor.byte_offset, size


def _copy(ref: ffi.Ref) -> ffi.Ref:
    """Return a copy of a contiguous tensor in memory of its own."""
    tensor = ref.tensor()
    copy = ffi.empty(tensor.code, tensor.bits, tensor.shape[: tensor.ndim])
    start, size = _extent(tensor)
    ctypes.memmove(copy.tensor().data, start, size)
    return copy


class _Clock:
    """Sums up the time between the callbacks before and after each call of the virtual machine."""

    def __init__(self) -> None:
        self.totals: dict[str, tuple[int, int]] = {}
        self._open: list[list[int]] = []  # start, time in callees
        self._callback = ffi.SAFE_CALL(self._call)
        self.function = ffi.make_function(self._callback)

    def _call(self, _handle: int, args: Any, _count: int, _result: Any) -> int:
        now = time.perf_counter_ns()
        if args[2].content & 1:
            self._open.append([time.perf_counter_ns(), 0])
            return 0
        start, inner = self._open.pop()
        elapsed = now - start
        if self._open:
            self._open[-1][1] += elapsed
        name = ffi.text_of(args[1])
        calls, total = self.totals.get(name, (0, 0))
        self.totals[name] = (calls + 1, total + elapsed - inner)
        return 0
