"""From a canonical model to a shared library for a CPU: lower, fuse, schedule, generate code, link."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as oir
import tvm
from tvm import relax

from optc.backends.base import Build, Target
from optc.backends.cpu import memory
from optc.backends.cpu.link import link
from optc.backends.cpu.segments import outline
from optc.backends.cpu.shape_functions import order_shape_functions
from optc.backends.cpu.target import to_tvm
from optc.backends.cpu.tir_pipeline import NAME as TIR_PIPELINE
from optc.backends.kernels import schedule
from optc.backends.kernels.decisions import Tuning
from optc.backends.kernels.deduplicate import deduplicate
from optc.backends.kernels.name_dims import name_dims
from optc.backends.lowering import TABLE
from optc.backends.lowering.expand import expand_functions
from optc.backends.lowering.lower import Lowered, lower

Progress = Callable[[str], None]


@dataclass
class Module:
    """A fused, scheduled Relax module, and how each kernel was scheduled."""

    relax: Any
    lowered: Lowered
    kernels: list[schedule.Kernel]


class CpuBackend:
    """The CPU backend for one target."""

    def __init__(
        self,
        target: Target,
        progress: Progress | None = None,
        without: Collection[str] = (),
        tuning: Tuning | None = None,
    ) -> None:
        self.target = target
        self.without = frozenset(without)
        self.tuning = tuning
        self.progress = progress or (lambda _: None)

    def supported(self, model: oir.Model) -> None:
        """Raise UnsupportedModelError naming every node that cannot be compiled. ``model`` gets expanded."""
        expand_functions(model, TABLE.keys())
        lower(model, TABLE, self.target, self.without)

    def fuse(self, model: oir.Model) -> tuple[Any, Lowered]:
        """Lower and fuse ``model`` (which gets expanded in place): a Relax module of unscheduled kernels."""
        self.progress("lowering")
        expand_functions(model, TABLE.keys())
        lowered = lower(model, TABLE, self.target, self.without, self.tuning)
        self.progress("fusing")
        return _fuse(lowered.module), lowered

    def schedule(self, model: oir.Model) -> Module:
        """Lower, fuse and schedule ``model`` (which gets expanded in place)."""
        module, lowered = self.fuse(model)
        self.progress("scheduling")
        module, kernels = schedule.schedule(module, self.target, self.tuning)
        module = deduplicate(module)
        left = {str(var.name_hint) for var in module.get_global_vars()}
        return Module(module, lowered, [kernel for kernel in kernels if kernel.name in left])

    def build(self, model: oir.Model) -> Build:
        """Compile ``model`` to a shared library."""
        scheduled = self.schedule(model)
        self.progress("generating code")
        generated = generate(scheduled.relax, self.target)
        self.progress("linking")
        return Build(
            code=shared_library(generated.executable, self.target),
            weights=scheduled.lowered.weights,
            activation_bytes=generated.activation_bytes,
            least_activation_bytes=generated.least_activation_bytes,
            kernels=[kernel.describe() for kernel in scheduled.kernels],
            calls=generated.calls,
            workloads={k.name: k.workload for k in scheduled.kernels if k.tunable and k.workload is not None},
        )


def _fuse(module: Any) -> Any:
    transform = relax.transform
    passes = [
        *_to_dataflow(),
        transform.AnnotateTIROpPattern(),
        transform.FuseOps(),
        transform.FuseTIR(),
        # Here, because it wants every kernel in the form that it has before it is scheduled.
        transform.RewriteDataflowReshape(),
        transform.DeadCodeElimination(),
    ]
    return name_dims(tvm.transform.Sequential(passes)(module))


def _to_dataflow() -> list[Any]:
    """Return the steps of ConvertToDataflow but for the one that canonicalizes symbolic variables.

    Where a match_cast checks that a size ``min(n, 512)`` is ``n``, that step takes it for a definition of ``n`` and
    recurses without end.
    """
    convert, canonicalize = relax.transform.ConvertToDataflow(1).passes
    return [convert, *(p for p in canonicalize.passes if p.info.name != "CanonicalizeTIRVariables")]


@dataclass
class Generated:
    """Code for the virtual machine; ``main`` takes inputs, weights and the clock of ``calls`` (``segments.py``).

    The bytes of activations, and the least that any plan takes, are None when symbolic sizes leave them open.
    """

    executable: Any
    activation_bytes: int | None
    least_activation_bytes: int | None
    calls: list[str]


def generate(module: Any, target: Target) -> Generated:
    """Generate code for a scheduled module."""
    transform = relax.transform
    tvm_target = to_tvm(target)
    flatten = tvm.transform.Sequential(
        [
            transform.ToNonDataflow(),
            transform.RemovePurityChecking(),
        ]
    )
    plan = tvm.transform.Sequential([transform.CallTIRRewrite(), transform.StaticPlanBlockMemory()])
    finish = tvm.transform.Sequential(
        [
            transform.LowerAllocTensor(),
            transform.KillAfterLastUse(),
            transform.LowerRuntimeBuiltin(),
            transform.ComputePrimValue(),
            transform.VMShapeLower(),
            order_shape_functions,
            transform.AttachGlobalSymbol(),
        ]
    )
    with tvm_target:
        outlined = outline(flatten(module))
        planned = plan(outlined.module)
        executable = tvm.compile(planned, target=tvm_target, relax_pipeline=finish, tir_pipeline=TIR_PIPELINE)
    planned_bytes, least = (memory.planned_bytes(planned, blocks) for blocks in (outlined.blocks, outlined.least))
    return Generated(executable, planned_bytes, least, outlined.calls)


def shared_library(executable: Any, target: Target) -> bytes:
    """Return what TVM generated, linked for ``target``."""
    with tempfile.TemporaryDirectory(prefix="optc-") as folder:
        output = Path(folder) / "model.so"

        def compile_objects(path: str, objects: list[str], **_: Any) -> None:
            link([Path(o) for o in objects], Path(path), target)

        compile_objects.need_system_lib = False  # type: ignore[attr-defined]
        executable.export_library(str(output), fcompile=compile_objects, workspace_dir=folder)
        return output.read_bytes()
