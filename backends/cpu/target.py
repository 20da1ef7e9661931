"""CPU targets: what a user's ``--target`` means to LLVM.

``cpu`` is this machine. Otherwise a CPU name of x86-64 (``x86-64-v3``, ``znver3``, ``skylake-avx512``), ``aarch64``
(generic 64-bit Arm with NEON), or ``TRIPLE[:CPU[:+feature,-feature]]``, such as
``aarch64-linux-gnu:cortex-a76:+dotprod``. Only what LLVM says of that CPU is used; nothing is read off this machine.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

from tvm.target import Target as TvmTarget
from tvm.target import codegen

from optc.backends.base import Target
from optc.errors import UsageError

X86_TRIPLE = "x86_64-linux-gnu"
ARM_TRIPLE = "aarch64-linux-gnu"
_ALIASES = {
    "aarch64": f"{ARM_TRIPLE}:generic:+neon",
    "arm64": f"{ARM_TRIPLE}:generic:+neon",
    "riscv64": "riscv64-linux-gnu:generic-rv64:+m,+a,+f,+d,+c",
}
EXAMPLES = (
    "cpu",
    "x86-64-v2",
    "x86-64-v3",
    "x86-64-v4",
    "znver3",
    "aarch64",
    f"{ARM_TRIPLE}:cortex-a76",
    "riscv64",
)


def resolve(name: str) -> Target:
    """Return the target called ``name``; UsageError if LLVM does not know it."""
    if name == "cpu":
        triple = ARM_TRIPLE if os.uname().machine == "aarch64" else X86_TRIPLE
        return _target(name, triple, str(codegen.llvm_get_system_cpu()), (), native=True)
    spec = _ALIASES.get(name, name)
    if ":" not in spec and "-linux" not in spec:
        return _target(name, X86_TRIPLE, spec, (), native=False)
    triple, _, rest = spec.partition(":")
    cpu, _, extra = rest.partition(":")
    return _target(name, triple, cpu or "generic", tuple(extra.split(",")) if extra else (), native=False)


def _target(name: str, triple: str, cpu: str, extra: tuple[str, ...], *, native: bool) -> Target:
    probe = _describe(triple, cpu, extra, 1)
    architecture = triple.split("-")[0]
    if architecture not in {str(t) for t in codegen.llvm_get_targets()}:
        raise UsageError(f"target '{name}': LLVM has no architecture '{architecture}'", hint=_hint())
    if cpu not in {str(c) for c in codegen.llvm_get_cpu_archlist(probe)}:
        raise UsageError(f"target '{name}': LLVM knows no {architecture} CPU '{cpu}'", hint=_hint())
    features = {str(f) for f in codegen.llvm_get_cpu_features(probe)}
    features |= {f[1:] for f in extra if f.startswith("+")}
    features -= {f[1:] for f in extra if f.startswith("-")}
    width = _vector_bits(architecture, features)
    return Target(name, "cpu", triple, cpu, tuple(sorted(features)), width, native, extra)


def _hint() -> str:
    return f"`optc targets` lists what can be written; for example {', '.join(EXAMPLES)}"


def _vector_bits(architecture: str, features: set[str]) -> int:
    if architecture == "x86_64":
        if "avx512f" in features:
            return 512
        return 256 if "avx" in features else 128
    return 128


@cache
def _describe(triple: str, cpu: str, extra: tuple[str, ...], cores: int) -> Any:
    spec: dict[str, Any] = {"kind": "llvm", "mtriple": triple, "mcpu": cpu, "num-cores": cores}
    if extra:
        spec["mattr"] = list(extra)
    return TvmTarget(spec)


def to_tvm(target: Target) -> Any:
    """Return TVM's form of ``target``."""
    return _describe(target.triple, target.cpu, target.extra_features, 1)
