"""A loaded model: checks inputs, runs the compiled code, hands out the outputs."""

from __future__ import annotations

import ctypes
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optc.errors import InputError, OptcError, UsageError
from optc.runtime import ffi
from optc.runtime.dlpack import DLPackTensor, contiguous
from optc.runtime.dtypes import numpy_dtype
from optc.runtime.executor import SPREAD_SECONDS, Executor, Machine
from optc.runtime.format import Manifest, TensorSpec
from optc.runtime.inputs import Inputs

_MAX_THREADS = 1024

Output = tuple[ffi.Ref, int, tuple[int, ...], int]
"""A tensor, where its data starts, its shape and its size in bytes."""
_OWN_HOLDERS = 2
"""Who holds a fresh output: we and the machine's last result."""


class _Result:
    """One output of a model, and how to read the tensor that stands for it."""

    def __init__(self, spec: TensorSpec) -> None:
        self.name = spec.name
        self.dtype = numpy_dtype(spec.dtype)
        self._bits = self.dtype.itemsize * 8
        self._last: tuple[list[int], tuple[int, ...], int] = [], (), self.dtype.itemsize

    def read(self, tensor: ffi.Tensor) -> tuple[int, tuple[int, ...], int]:
        """Return where the data of a tensor starts, its shape and its size in bytes."""
        if tensor.bits * tensor.lanes != self._bits:
            raise OptcError(f"the code returned elements of {tensor.bits} bits instead of {self.dtype.name}")
        dims = tensor.shape[: tensor.ndim]
        last = self._last  # one read: another thread may replace it
        if dims != last[0]:
            self._last = last = dims, tuple(dims), math.prod(dims) * self.dtype.itemsize
        return (tensor.data or 0) + tensor.byte_offset, last[1], last[2]


@dataclass(frozen=True)
class KernelTime:
    """Time spent in the calls of one kernel during a run, the median of several."""

    name: str
    calls: int
    seconds: float


class Model:
    """A compiled model. All methods may be called from several threads at once."""

    def __init__(self, manifest: Manifest, report: bytes, executor: Executor, weights: tuple[int, int]) -> None:
        self._manifest = manifest
        self._inputs = Inputs(manifest.inputs, manifest.alignment)
        self._outputs = [_Result(spec) for spec in manifest.outputs]
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
        lists. They are read in place if contiguous and aligned as the manifest says; nothing may change them
        meanwhile. Outputs own their memory. Raises InputError if the inputs do not fit, OptcError if the code fails.
        """
        results = {}
        for output, (ref, start, shape, size) in zip(self._outputs, self._run(inputs), strict=True):
            results[output.name] = contiguous(ref, start, shape, output.dtype, size)
        return results

    def run_dlpack(self, inputs: Mapping[str, object]) -> dict[str, DLPackTensor]:
        """Like ``run``; returns DLPack tensors, for consumers such as ``torch.from_dlpack``."""
        return {
            output.name: DLPackTensor(ref) for output, (ref, *_) in zip(self._outputs, self._run(inputs), strict=True)
        }

    def _run(self, inputs: Mapping[str, object]) -> list[Output]:
        arrays, starts = self._inputs.prepare(inputs)
        try:
            outputs = self._executor.run(arrays, starts)
        except ffi.TvmError as error:
            raise self._explain(error, arrays) from error
        if len(outputs) != len(self._outputs):
            raise OptcError(f"the code returned {len(outputs)} outputs instead of {len(self._outputs)}")
        return self._own(outputs, arrays, starts)

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
        """Run ``repeat`` times after warming up; return the median time per kernel of a run, the slowest first.

        What is not spent in kernels is called "between kernels".
        """
        calls = self._manifest.calls
        if calls is None:
            raise UsageError("this artifact cannot be profiled: its code has no clock")
        arrays, starts = self._inputs.prepare(inputs)
        clock = np.zeros((len(calls), 2), np.int64)
        runs: list[NDArray[Any]] = []
        elapsed: list[int] = []

        def measure(machine: Machine) -> None:
            # Threads that have just begun may share a core until the system notices.
            warm = time.perf_counter() + (SPREAD_SECONDS if self.threads > 1 else 0.0)
            machine.run(arrays, starts)
            while time.perf_counter() < warm:
                machine.run(arrays, starts)
            machine.measure(clock)
            for _ in range(repeat):
                clock[:] = 0
                start = time.perf_counter_ns()
                machine.run(arrays, starts)
                elapsed.append(time.perf_counter_ns() - start)
                runs.append(clock.copy())

        self._executor.call_on_new_machine(measure)
        found = np.array(runs)
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(calls):
            rows.setdefault(name, []).append(row)
        times = [KernelTime("between kernels", 1, float(np.median(elapsed - found[:, :, 0].sum(1))) / 1e9)]
        for name, own in rows.items():
            nanoseconds, count = found[:, own].sum(1).T
            # Branches that were not taken have no time.
            if count.any():
                times.append(KernelTime(name, int(np.median(count)), float(np.median(nanoseconds)) / 1e9))
        return sorted(times, key=lambda time: -time.seconds)

    def _own(self, outputs: Sequence[ffi.Ref], arrays: Sequence[NDArray[Any]], starts: Sequence[int]) -> list[Output]:
        """Copy outputs that lie in an input, a weight, a constant or another output."""
        taken = [self._weights]
        for start, array in zip(starts, arrays, strict=True):
            taken.append((start, start + array.nbytes))
        owned: list[Output] = []
        for ref, output in zip(outputs, self._outputs, strict=True):
            tensor = ref.tensor()
            start, shape, size = output.read(tensor)
            stop = start + size
            shared = tensor.holders > _OWN_HOLDERS
            for begin, end in taken:
                if start < end and begin < stop:
                    shared = True
            if shared and size:
                ref, source = ffi.empty(tensor.code, tensor.bits, shape), start
                start = ref.tensor().data or 0
                ctypes.memmove(start, source, size)
            else:
                taken.append((start, stop))
            owned.append((ref, start, shape, size))
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
