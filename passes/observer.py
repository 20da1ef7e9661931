"""What watches the passes: records of each run, and observers that print, dump or verify after every pass.

Passes know nothing of this. An observer sees the model between passes and must not change it.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import onnx
import onnx_ir as oir

from optc.errors import IRError
from optc.ir.verifier import violations
from optc.passes.base import Skipped

ALL = "all"


@dataclass(frozen=True)
class PassRecord:
    """One run of one pass: wall time, nodes with those of subgraphs, rewrites by rule, near-misses."""

    name: str
    seconds: float
    nodes_before: int
    nodes_after: int
    fired: dict[str, int]
    modified: bool
    skipped: list[Skipped] = field(default_factory=list)


class Observer(Protocol):
    """Is told about the model before the first pass and after every run of a pass."""

    def start(self, model: oir.Model) -> None:
        """See the model before the first pass."""

    def after(self, record: PassRecord, model: oir.Model) -> None:
        """See the model after one run of a pass."""


def observers(
    *, print_ir_after: Sequence[str] = (), dump_ir: Path | None = None, verify_ir: bool = False
) -> list[Observer]:
    """Return the observers for the usual command line options."""
    found: list[Observer] = []
    if verify_ir:
        found.append(VerifyAfter())
    if print_ir_after:
        found.append(PrintAfter(print_ir_after))
    if dump_ir is not None:
        found.append(DumpAfter(dump_ir))
    return found


class PrintAfter:
    """Writes the graph as text after the passes called ``names`` (``all``: every pass that changed it)."""

    def __init__(self, names: Collection[str], write: Callable[[str], object] = sys.stderr.write) -> None:
        self.names = frozenset(names)
        self.write = write

    def start(self, model: oir.Model) -> None:
        """Write the graph before the first pass, for ``all``."""
        if ALL in self.names:
            self.write(f"# before the passes\n{model}\n")

    def after(self, record: PassRecord, model: oir.Model) -> None:
        """Write the graph if it was asked for."""
        if record.name in self.names or (ALL in self.names and record.modified):
            self.write(f"# after {record.name}: {record.nodes_after} nodes, {record.fired}\n{model}\n")


class DumpAfter:
    """Writes ``NN-pass.onnx`` into a folder after every pass that changed the model.

    Tensors of 1 KB and more go to ``weights/<hash>.bin`` beside them, once each, so that dumps of a large model stay
    small. The files load in any ONNX tool.
    """

    threshold = 1024

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.count = 0
        # The tensors are kept so that an id is not reused by another one.
        self._written: dict[int, tuple[oir.TensorProtocol, oir.ExternalTensor]] = {}

    def start(self, model: oir.Model) -> None:
        """Write the model before the first pass."""
        (self.directory / "weights").mkdir(parents=True, exist_ok=True)
        self._write(model, "input")

    def after(self, record: PassRecord, model: oir.Model) -> None:
        """Write the model if the pass changed it."""
        if record.modified:
            self._write(model, record.name)

    def _write(self, model: oir.Model, name: str) -> None:
        with self._external(model):
            proto = oir.to_proto(model)
        onnx.save(proto, str(self.directory / f"{self.count:02d}-{name}.onnx"))
        self.count += 1

    @contextmanager
    def _external(self, model: oir.Model) -> Iterator[None]:
        """Let the large initializers refer to files while the model is serialized."""
        originals: list[tuple[oir.Value, oir.TensorProtocol]] = []
        try:
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is not None and tensor.nbytes >= self.threshold:
                    originals.append((value, tensor))
                    value.const_value = self._file(tensor)
            yield
        finally:
            for value, tensor in originals:
                value.const_value = tensor

    def _file(self, tensor: oir.TensorProtocol) -> oir.ExternalTensor:
        if id(tensor) not in self._written:
            data = tensor.tobytes()
            location = f"weights/{hashlib.blake2b(data, digest_size=16).hexdigest()}.bin"
            if not (self.directory / location).exists():
                (self.directory / location).write_bytes(data)
            external = oir.ExternalTensor(
                location,
                0,
                len(data),
                tensor.dtype,
                shape=oir.Shape(tensor.shape.numpy()),
                name=tensor.name or "",
                base_dir=self.directory,
            )
            self._written[id(tensor)] = (tensor, external)
        return self._written[id(tensor)][1]


class VerifyAfter:
    """Checks canonical form after every pass that changed the model, and names the pass that broke it."""

    def start(self, model: oir.Model) -> None:
        """Raise IRError if the model is not canonical to begin with."""
        self._check(model, "the frontend")

    def after(self, record: PassRecord, model: oir.Model) -> None:
        """Raise IRError naming the pass if the model is not canonical any more."""
        if record.modified:
            self._check(model, f"pass {record.name!r}")

    def _check(self, model: oir.Model, culprit: str) -> None:
        if found := violations(model):
            raise IRError(
                f"{culprit} left the model not canonical:\n" + "\n".join(f"  {line}" for line in found),
                hint="leave the pass out with --disable-pass, and report the model",
            )
