"""Kernels written as loops: what a tensor expression cannot say (running counters, sorting, recurrence).

``procedure`` turns a Python function that writes loops with ``loop``, ``when`` and ``Cells`` into te tensors, so that
``Site.emit`` takes it like any other compute. Such kernels are opaque to fusion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from tvm import te, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T  # noqa: N812

from optc.backends.kernels.threads import LAUNCH
from optc.backends.lowering.emit import as_index


class Cells:
    """The elements of a buffer, read and written with ``cells[i, j]``; ``cells[()]`` for rank 0."""

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer
        self.shape = list(buffer.shape)
        self.dtype = str(buffer.dtype)

    def __getitem__(self, index: Any) -> Any:
        return tirx.BufferLoad(self.buffer, _indices(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(value, int | float | bool):
            value = tirx.const(value, self.dtype)
        T.buffer_store(self.buffer, value, _indices(index))


def procedure(
    inputs: Sequence[Any],
    outputs: Sequence[tuple[Sequence[Any], str]],
    body: Callable[[list[Cells], list[Cells]], None],
    name: str = "procedure",
) -> Any:
    """Return the te tensors that ``body(input cells, output cells)`` fills; one tensor for one output.

    ``outputs`` gives shape and dtype of each. The body has to write every element of every output.
    """

    def generate(ins: Any, outs: Any) -> Any:
        with IRBuilder() as builder:
            # The builder wants one statement at the root; the scope around them is dropped again.
            with T.seq_scope():
                body([Cells(b) for b in ins], [Cells(b) for b in outs])
            return builder.get().body

    shapes = [[as_index(d) for d in shape] for shape, _ in outputs]
    dtypes = [dtype for _, dtype in outputs]
    # Declared here, because the buffers that extern declares have an offset, which fusion takes for another type.
    return te.extern(
        shapes,
        list(inputs),
        generate,
        name=name,
        dtype=dtypes,
        in_buffers=[tirx.decl_buffer(t.shape, t.dtype, t.op.name, layout=None) for t in inputs],
        out_buffers=[tirx.decl_buffer(s, d, name, layout=None) for s, d in zip(shapes, dtypes, strict=True)],
    )


@contextmanager
def loop(*extents: Any, kind: str = "serial") -> Iterator[Any]:
    """Nested loops from 0 to each extent; gives a tuple of loop variables (``kind``: serial, parallel, ...)."""
    frames = [getattr(T, kind)(0, as_index(extent)) for extent in extents]
    with ExitStack() as stack:
        yield tuple(stack.enter_context(frame) for frame in frames)


@contextmanager
def when(condition: Any) -> Iterator[None]:
    """Run the statements of the block if ``condition`` holds."""
    with T.If(condition), T.Then():
        yield


@contextmanager
def repeat_while(condition: Any) -> Iterator[None]:
    """Repeat the statements of the block while ``condition`` holds."""
    with T.While(condition):
        yield


@contextmanager
def all_threads() -> Iterator[None]:
    """Let every thread run the block, which must be the same for all but for parallel loops: these share their turns.

    What they write elsewhere must not matter. Scratch cells that a thread needs alone belong into a parallel loop.
    """
    with T.attr(tirx.const(0, "int32"), LAUNCH, tirx.const(1, "int32")):
        yield


@contextmanager
def wait_at_end() -> Iterator[None]:
    """Let threads wait for each other at the end of the block; within ``all_threads``, around parallel loops."""
    with T.attr(tirx.const(0, "int32"), "pragma_parallel_barrier_when_finish", tirx.const(1, "int32")):
        yield


def fail(message: str) -> None:
    """End the run with an error."""
    with T.Assert(tirx.const(False, "bool"), message):
        T.evaluate(0)


def cells(shape: Sequence[Any], dtype: str, scope: str = "local") -> Cells:
    """Return uninitialised scratch cells."""
    return Cells(T.alloc_buffer([as_index(d) for d in shape], dtype, scope=scope))


def variable(dtype: str, value: Any) -> Cells:
    """Return one scratch cell set to ``value``; use it as ``cell[0]``."""
    cell = cells([1], dtype)
    cell[0] = value
    return cell


def _indices(index: Any) -> list[Any]:
    return [as_index(i) for i in (index if isinstance(index, tuple | list) else (index,))]
