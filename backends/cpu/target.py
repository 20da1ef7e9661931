"""CPU targets: what a user's ``--target`` means to LLVM.

``cpu`` is this machine. Otherwise a CPU name of x86-64 (``x86-64-v3``, ``znver3``, ``skylake-avx512``), ``aarch64``
(generic 64-bit Arm with NEON), or ``TRIPLE[:CPU]``. Options may follow: features of LLVM's to add or leave out, and the
data caches of one core, as in ``aarch64-linux-gnu:cortex-a76:+dotprod,l2=512K``. Only for ``cpu`` anything is read off
this machine.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from functools import cache
from typing import Any

from tvm.target import Target as TvmTarget
from tvm.target import codegen

from optc.backends.base import Target
from optc.backends.cpu.caches import of_cpu, of_this_machine
from optc.errors import UsageError

X86_TRIPLE = "x86_64-linux-gnu"
ARM_TRIPLE = "aarch64-linux-gnu"
_ALIASES = {
    "aarch64": (ARM_TRIPLE, "generic", ""),
    "arm64": (ARM_TRIPLE, "generic", ""),
    "riscv64": ("riscv64-linux-gnu", "generic-rv64", "+m,+a,+f,+d,+c"),
}
EXAMPLES = (
    "cpu",
    "x86-64-v2",
    "x86-64-v3",
    "x86-64-v4",
    "znver3",
    "aarch64",
    f"{ARM_TRIPLE}:cortex-a76:+dotprod,l2=512K",
    "riscv64",
)


def resolve(name: str) -> Target:
    """Return the target called ``name``; UsageError if LLVM does not know it or an option is malformed."""
    first, *parts = name.split(":")
    options = parts.pop().split(",") if len(parts) > 1 or (parts and re.search(r"=|^[+-]", parts[0])) else []
    if parts or "-linux" in first:
        return _target(name, first, ":".join(parts) or "generic", options, native=False)
    if first == "cpu":
        triple = ARM_TRIPLE if os.uname().machine == "aarch64" else X86_TRIPLE
        return _target(name, triple, str(codegen.llvm_get_system_cpu()), options, native=True)
    triple, cpu, features = _ALIASES.get(first, (X86_TRIPLE, first, ""))
    return _target(name, triple, cpu, [*features.split(","), *options] if features else options, native=False)


def _target(name: str, triple: str, cpu: str, options: list[str], *, native: bool) -> Target:
    extra, sizes = _options(name, options)
    probe = _describe(triple, cpu, extra, 1)
    architecture = triple.split("-")[0]
    if architecture not in {str(t) for t in codegen.llvm_get_targets()}:
        raise UsageError(f"target '{name}': LLVM has no architecture '{architecture}'", hint=_hint())
    if cpu not in {str(c) for c in codegen.llvm_get_cpu_archlist(probe)}:
        raise UsageError(f"target '{name}': LLVM knows no {architecture} CPU '{cpu}'", hint=_hint())
    features = {str(f) for f in codegen.llvm_get_cpu_features(probe)}
    features |= {f[1:] for f in extra if f.startswith("+")}
    # A preference is no instruction.
    features -= {f[1:] for f in extra if f.startswith("-")} | {f[1:] for f in _NO_GATHERS}
    width = _vector_bits(architecture, features)
    caches = of_cpu(cpu)
    caches = replace(of_this_machine(caches) if native else caches, **sizes)
    return Target(name, "cpu", triple, cpu, tuple(sorted(features)), width, native, extra, caches)


def _options(name: str, options: list[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return features with their signs, and sizes of caches."""
    features, sizes = [], {}
    for option in options:
        size = re.fullmatch(r"(l[12])=(\d+)([KM]?)", option)
        if size is not None and int(size[2]):
            sizes[size[1]] = int(size[2]) * {"": 1, "K": 1024, "M": 1024 * 1024}[size[3]]
        elif re.fullmatch(r"[+-][\w.-]+", option):
            features.append(option)
        else:
            hint = "options are +feature, -feature, l1=SIZE and l2=SIZE with sizes such as 32K or 1M"
            raise UsageError(f"target '{name}': '{option}' is no option", hint=hint)
    return tuple(features), sizes


def _hint() -> str:
    return f"`optc targets` lists what can be written; for example {', '.join(EXAMPLES)}"


def _vector_bits(architecture: str, features: set[str]) -> int:
    if architecture == "x86_64":
        if "avx512f" in features:
            return 512
        return 256 if "avx" in features else 128
    if architecture.startswith("riscv"):
        return 128 if "v" in features else 64
    return 128


# TVM says of two functions' accesses to one buffer that they are apart (its TBAA nodes are named after variables, and
# each function has its own). Where LLVM inlines kernels, or tasks of a kernel, into what calls them one after the
# other, it may so take what the first writes for unused, or read by the second too early. At this price per
# instruction it inlines no loop.
_NO_INLINING = ("-inline-instr-cost:int=100000",)
# Under a condition LLVM's vectorizer takes a load at ``v % 4`` for one of neighbours (``v`` of 4 to 7 then reads what
# lies at 4 to 7), where vectors may be masked. It leaves loops with branches as they are.
_NO_MASKS = ("-enable-if-conversion=false",)


# Where the innermost loop is short LLVM unrolls it and makes vectors of the loop around it, gathered element by
# element: 2 to 10 times slower than what it does otherwise.
_NO_GATHERS = ("+prefer-no-gather", "+prefer-no-scatter")


@cache
def _describe(triple: str, cpu: str, extra: tuple[str, ...], cores: int) -> Any:
    spec: dict[str, Any] = {"kind": "llvm", "mtriple": triple, "mcpu": cpu, "num-cores": cores}
    spec["cl-opt"] = [*_NO_INLINING, *_NO_MASKS]
    if triple.startswith("x86_64"):
        # It turns sums of integer products into trees that need more registers than there are.
        spec["cl-opt"].append("-x86-machine-combiner=false")
        extra = (*_NO_GATHERS, *extra)
    if extra:
        spec["mattr"] = list(extra)
    return TvmTarget(spec)


def to_tvm(target: Target) -> Any:
    """Return TVM's form of ``target``."""
    return _describe(target.triple, target.cpu, target.extra_features, 1)
