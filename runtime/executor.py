"""Runs compiled code: one virtual machine per concurrent call, since TVM's machine is not re-entrant.

TVM's thread pools belong to the calling thread: they live as long as it, never grow, and break the exit of a
forked child. So calls that use several threads run on a thread of our own, which costs a hand-over of some
tens of microseconds; calls that use one thread run where they are made. For short calls that is the faster way, so
both ways are tried.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from math import inf
from queue import SimpleQueue
from time import perf_counter

from optc.runtime import ffi
from optc.runtime.dtypes import dlpack_type
from optc.runtime.inputs import Array

NAIVE_ALLOCATOR = 1
POOLED_ALLOCATOR = 2

_SHARE_CORES = -3  # kSpecifyThreadShareAllCore of threading_backend.h
_MAX_IDLE = 8
_MAX_TRIALS = 256
_SHORT_CALL = 1e-3
"""Seconds beyond which a hand-over does not matter."""
_TRIES = 5
SPREAD_SECONDS = 0.15
"""After this time the system has moved threads that share a core apart; seen are up to 0.1 s."""


class Code:
    """A shared library held in memory and its entry function."""

    def __init__(self, image: bytes | memoryview, entry: str) -> None:
        self.entry = entry
        # The loader knows libraries by path, so the number in this path must not be reused while it is
        # loaded: the descriptor is closed after the module is released.
        self._fd = os.memfd_create("optc-model", os.MFD_CLOEXEC)
        try:
            with open(self._fd, "wb", closefd=False) as file:
                file.write(image)
            loader = ffi.global_function("ffi.Module.load_from_file.so")
            self._module = ffi.call_for_object(loader, f"/proc/self/fd/{self._fd}", "so")
        except BaseException:
            os.close(self._fd)
            raise

    def __del__(self) -> None:
        if hasattr(self, "_module"):
            del self._module
            os.close(self._fd)

    def new_machine(self, allocator: int) -> tuple[ffi.Ref, ffi.Ref]:
        """Return a new virtual machine and its entry function."""
        machine = ffi.call_for_object(ffi.module_function(self._module, "vm_load_executable"))
        ffi.call(ffi.module_function(machine, "vm_initialization"), ffi.CPU, 0, allocator)
        return machine, ffi.module_function(machine, self.entry)


class _Pool:
    """The state that the runners of a model share with it."""

    def __init__(
        self, code: Code, weights: Sequence[ffi.Ref], keep: object, clock: bool, allocator: int, threads: int
    ) -> None:
        self.code = code
        self.weights = weights
        self.keep = keep
        self.clock = clock
        self.allocator = allocator
        self.threads = threads
        self.closed = False
        self.reset()

    def reset(self) -> None:
        """Forget all runners: in the child of a fork none of their threads exists."""
        self.lock = threading.RLock()  # a finalizer may run wherever the lock is held
        self.inline: list[_Inline] = []  # taken and given back without the lock: both are atomic
        self.idle: list[_Worker] = []
        self.trials: dict[tuple[tuple[int, ...], ...], Trial] = {}

    def machine(self) -> Machine:
        return Machine(self.code, self.weights, self.allocator, clock=self.clock)

    def take(self, alone: bool) -> _Inline | _Worker:
        """Return a runner; ``alone`` asks for one that uses the caller's thread only."""
        if alone or self.threads == 1:
            try:
                return self.inline.pop()
            except IndexError:
                return _Inline(self)
        with self.lock:
            threads = self.threads
            if self.idle:
                return self.idle.pop()
        return _Worker(self, threads)

    def trial(self, arrays: Sequence[Array]) -> Trial:
        """Return what is known about calls with arrays of these shapes."""
        shapes = tuple([array.shape for array in arrays])
        trial = self.trials.get(shapes)
        if trial is None:
            if len(self.trials) >= _MAX_TRIALS:
                self.trials.clear()
            trial = self.trials[shapes] = Trial()
        return trial

    def give_back(self, runner: _Worker) -> bool:
        """Keep an idle runner for the next call; False if it is to end."""
        with self.lock:
            keep = not self.closed and runner.threads == self.threads and len(self.idle) < _MAX_IDLE
            if keep:
                self.idle.append(runner)
            return keep

    def set_threads(self, threads: int) -> None:
        with self.lock:
            self.threads = threads
            self.trials = {}
            idle, self.idle = self.idle, []
        for runner in idle:
            runner.stop()

    def close(self) -> None:
        self.closed = True
        self.inline.clear()
        self.set_threads(self.threads)
        if self.allocator == POOLED_ALLOCATOR:
            ffi.call(_clear_memory())


class Trial:
    """Finds out whether calls with inputs of certain shapes are faster in the caller's thread alone.

    Only short calls can be: then both ways take turns a few times, and the one with the fastest call is kept. Threads
    that have just begun may share a core: one thread is not found faster before they had time to move apart.
    """

    def __init__(self) -> None:
        self.alone = False
        self.decided = False
        self._began = perf_counter()
        self._calls = {False: 0, True: 0}
        self._fastest = {False: inf, True: inf}

    def add(self, alone: bool, seconds: float) -> None:
        """Take note of the time of a call; the first of each way is not counted."""
        self._calls[alone] += 1
        if self._calls[alone] > 1:
            self._fastest[alone] = min(self._fastest[alone], seconds)
        several, single = self._calls[False] - 1, self._calls[True] - 1
        faster_alone = self._fastest[True] < self._fastest[False]
        if several >= 2 and self._fastest[False] > _SHORT_CALL:
            self.alone, self.decided = False, True
        elif min(several, single) >= _TRIES and (not faster_alone or perf_counter() - self._began > SPREAD_SECONDS):
            self.alone, self.decided = faster_alone, True
        else:
            self.alone = several >= 2 and single < several


class _Inline:
    """A virtual machine that runs in the caller's thread."""

    def __init__(self, pool: _Pool) -> None:
        self._pool = pool
        self._machine = pool.machine()

    def run(self, arrays: Sequence[Array], starts: Sequence[int]) -> list[ffi.Ref]:
        if not getattr(_this_thread, "serial", False):
            configure_threads(1)
            _this_thread.serial = True
        try:
            return self._machine.run(arrays, starts)
        finally:
            if not self._pool.closed and len(self._pool.inline) < _MAX_IDLE:
                self._pool.inline.append(self)


class _Job:
    """A call handed to a worker."""

    __slots__ = ("arrays", "done", "error", "outputs", "starts")

    def __init__(self, arrays: Sequence[Array], starts: Sequence[int]) -> None:
        self.arrays: Sequence[Array] = arrays
        self.starts = starts
        self.outputs: list[ffi.Ref] = []
        self.error: BaseException | None = None
        self.done = threading.Lock()
        self.done.acquire()


class _Worker:
    """A virtual machine on a thread of its own, whose kernels use ``threads`` threads."""

    def __init__(self, pool: _Pool, threads: int) -> None:
        self.threads = threads
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        # A daemon, so that a call abandoned by Ctrl-C does not keep the process from ending.
        self._thread = threading.Thread(target=self._loop, args=(pool,), name="optc-model", daemon=True)
        self._thread.start()

    def run(self, arrays: Sequence[Array], starts: Sequence[int]) -> list[ffi.Ref]:
        job = _Job(arrays, starts)
        self._jobs.put(job)
        job.done.acquire()
        if job.error is not None:
            raise job.error
        return job.outputs

    def stop(self) -> None:
        """End the thread, which is idle, and with it TVM's threads."""
        self._jobs.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _loop(self, pool: _Pool) -> None:
        machine: Machine | None = None
        while (job := self._jobs.get()) is not None:
            try:
                if machine is None:
                    configure_threads(self.threads)
                    machine = pool.machine()
                job.outputs = machine.run(job.arrays, job.starts)
            except BaseException as error:
                job.error = error
            job.arrays = ()
            stays = pool.give_back(self)
            job.done.release()
            del job
            if not stays:
                break


class _Argument:
    """A tensor over an input's memory, used again for the next array of the same shape."""

    def __init__(self, array: Array, start: int) -> None:
        self.shape = array.shape
        dtype = array.dtype.name
        self.ref = ffi.view(start, *dlpack_type(dtype), array.shape)
        self._tensor = self.ref.tensor()

    def move(self, array: Array, start: int) -> bool:
        """Let the tensor lie at ``start``; False if it cannot stand for ``array``, or somebody holds it."""
        tensor = self._tensor
        if array.shape != self.shape or tensor.holders != 1:
            return False
        tensor.data = start
        return True


class Machine:
    """A virtual machine with the model's weights bound; used by one thread at a time."""

    def __init__(self, code: Code, weights: Sequence[ffi.Ref], allocator: int, *, clock: bool) -> None:
        self._machine, self._entry = code.new_machine(allocator)
        self._clock: list[ffi.Ref] = [ffi.empty(*dlpack_type("int64"), (0,))] if clock else []
        self._weights = weights
        self._inputs: list[_Argument] = []
        self._bind()

    def _bind(self) -> None:
        self._arguments, _ = ffi.pack([*(i.ref for i in self._inputs), *self._weights, *self._clock])
        self._call = ffi.Call(self._entry, self._arguments)

    def measure(self, clock: Array) -> None:
        """From now on add the time of each call of a kernel to ``clock``, int64 [calls, 2] that the caller keeps."""
        self._clock = [ffi.view(clock.ctypes.data, *dlpack_type("int64"), (clock.size,))]
        self._bind()

    def run(self, arrays: Sequence[Array], starts: Sequence[int]) -> list[ffi.Ref]:
        """Call the entry function on arrays whose data lies at ``starts``; returns its tensors."""
        if len(self._inputs) != len(arrays):
            self._inputs = [_Argument(array, start) for array, start in zip(arrays, starts, strict=True)]
            self._bind()
        else:
            for i, argument in enumerate(self._inputs):
                if not argument.move(arrays[i], starts[i]):
                    self._inputs[i] = _Argument(arrays[i], starts[i])
                    self._arguments[i].content = self._inputs[i].ref.address
        return self._call.objects()


class Executor:
    """Runs calls of one model from any number of threads."""

    def __init__(
        self, code: Code, weights: Sequence[ffi.Ref], keep: object, *, clock: bool, allocator: int, threads: int
    ) -> None:
        self._pool = _Pool(code, weights, keep, clock, allocator, threads)
        _pools.add(self._pool)
        weakref.finalize(self, self._pool.close)

    @property
    def threads(self) -> int:
        """How many threads the kernels of one call use, the call's own included."""
        return self._pool.threads

    @threads.setter
    def threads(self, count: int) -> None:
        self._pool.set_threads(count)

    def run(self, arrays: Sequence[Array], starts: Sequence[int]) -> list[ffi.Ref]:
        """Run one call on arrays whose data lies at ``starts`` and return its outputs."""
        pool = self._pool
        if pool.threads == 1:
            return pool.take(alone=True).run(arrays, starts)
        trial = pool.trial(arrays)
        if trial.decided:
            return pool.take(trial.alone).run(arrays, starts)
        alone = trial.alone
        start = perf_counter()
        outputs = pool.take(alone).run(arrays, starts)
        trial.add(alone, perf_counter() - start)
        return outputs

    def call_on_new_machine(self, function: Callable[[Machine], None]) -> None:
        """Call ``function`` with a machine of its own on a thread configured like those of other calls."""
        pool, errors = self._pool, list[BaseException]()

        def target() -> None:
            try:
                configure_threads(pool.threads)
                function(pool.machine())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=target, name="optc-profile", daemon=True)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]


def configure_threads(count: int) -> None:
    """Make TVM use ``count`` threads for kernels called from this thread, which has called none yet."""
    cores = ffi.call_for_object(_make_array(), *map(str, range(count)))
    ffi.call(_config_threadpool(), _SHARE_CORES, count, cores)


@cache
def _make_array() -> ffi.Ref:
    return ffi.global_function("ffi.Array")


@cache
def _config_threadpool() -> ffi.Ref:
    return ffi.global_function("runtime.config_threadpool")


@cache
def _clear_memory() -> ffi.Ref:
    """Returns the free blocks of TVM's pool, which all models share, to the system."""
    return ffi.global_function("vm.builtin.memory_manager.clear")


_this_thread = threading.local()
_pools: weakref.WeakSet[_Pool] = weakref.WeakSet()


def _after_fork() -> None:
    for pool in list(_pools):
        pool.reset()


os.register_at_fork(after_in_child=_after_fork)
