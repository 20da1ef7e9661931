"""This machine's CPU: whether it has what a target needs, and how many threads to use."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from optc.errors import TargetMismatchError
from optc.runtime.format import Target

_ARCHITECTURES = {"amd64": "x86_64", "x86-64": "x86_64", "arm64": "aarch64"}

_SAME_NAME = (
    "avx avx2 avx512f avx512cd avx512bw avx512dq avx512vl avx512ifma avx512vbmi fma fma4 f16c xop bmi2 adx "
    "aes popcnt movbe cx16 sse sse2 ssse3 sse4a gfni vaes vpclmulqdq tbm"
)
X86_FLAGS = {name: name for name in _SAME_NAME.split()} | {
    "sse3": "pni",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "crc32": "sse4_2",
    "bmi": "bmi1",
    "lzcnt": "abm",
    "sahf": "lahf_lm",
    "pclmul": "pclmulqdq",
    "sha": "sha_ni",
    "avxvnni": "avx_vnni",
    "avxifma": "avx_ifma",
    "avxvnniint8": "avx_vnni_int8",
    "avxneconvert": "avx_ne_convert",
    "avx512vnni": "avx512_vnni",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512bitalg": "avx512_bitalg",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avx512vp2intersect": "avx512_vp2intersect",
    "amx-tile": "amx_tile",
    "amx-int8": "amx_int8",
    "amx-bf16": "amx_bf16",
    "amx-fp16": "amx_fp16",
}
"""Flag in /proc/cpuinfo of each LLVM feature of x86 that a compiler emits instructions of by itself."""

ARM_FLAGS = {
    "fp-armv8": "fp",
    "neon": "asimd",
    "fullfp16": "asimdhp",
    "dotprod": "asimddp",
    "fp16fml": "asimdfhm",
    "rdm": "asimdrdm",
    "complxnum": "fcma",
    "jsconv": "jscvt",
    "lse": "atomics",
    "rcpc": "lrcpc",
    "crc": "crc32",
    "aes": "aes",
    "sha2": "sha2",
    "sha3": "sha3",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
    "sme": "sme",
    "sme2": "sme2",
    "sve-aes": "sveaes",
    "sve-bitperm": "svebitperm",
    "sve-sha3": "svesha3",
    "sve-sm4": "svesm4",
    "sve2-aes": "sveaes",
    "sve2-bitperm": "svebitperm",
    "sve2-sha3": "svesha3",
    "sve2-sm4": "svesm4",
}
"""The same for 64-bit ARM."""

_VECTOR_FAMILIES = ("sse4", "avx", "amx", "sve", "sme")

_TABLES = {"x86_64": X86_FLAGS, "aarch64": ARM_FLAGS}
_ELF_MACHINES = {"x86_64": 62, "aarch64": 183}  # e_machine


def architecture(triple: str) -> str:
    """Return the architecture of an LLVM triple in Linux's spelling."""
    first = triple.split("-")[0].lower()
    return _ARCHITECTURES.get(first, first)


@cache
def host_features() -> frozenset[str]:
    """Return the LLVM names of the instruction sets that this CPU and its kernel offer."""
    flags: set[str] = set()
    with Path("/proc/cpuinfo").open() as file:
        for line in file:
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                flags.update(value.split())
                break
    table = _TABLES.get(os.uname().machine, {})
    return frozenset(name for name, flag in table.items() if flag in flags)


def missing_features(features: Iterable[str]) -> list[str]:
    """Return those of ``features`` (LLVM names) that code may use and this machine lacks.

    LLVM's names include tuning hints and instructions of operating systems, which matter nowhere and are not
    all visible in /proc/cpuinfo. A vector extension that the tables do not know counts as missing.
    """
    table = _TABLES.get(os.uname().machine, {})
    used = {name for name in features if name in table or name.startswith(_VECTOR_FAMILIES)}
    return sorted(used - host_features())


def check_target(target: Target, code: bytes | memoryview) -> None:
    """Raise TargetMismatchError unless this machine can run ``code``, a library made for ``target``."""
    wanted, here = architecture(target.triple), os.uname().machine
    hint = "compile the model for this machine, for instance with --target cpu"
    if wanted != here or not sys.platform.startswith("linux") or "linux" not in target.triple:
        raise TargetMismatchError(
            f"the artifact is for {target.triple}; this machine is {here}-{sys.platform}", hint=hint
        )
    if bytes(code[:5]) != b"\x7fELF\x02" or int.from_bytes(code[18:20], "little") != _ELF_MACHINES.get(here):
        raise TargetMismatchError(f"the artifact's code is not a shared library for {here}", hint=hint)
    missing = missing_features(target.features)
    if missing:
        raise TargetMismatchError(
            f"the artifact is for CPU {target.cpu!r} and uses instructions that this CPU lacks: {', '.join(missing)}",
            hint=hint,
        )


@cache
def default_threads() -> int:
    """Return the number of physical cores this process may use, within the limit of its cgroup."""
    cores = set()
    allowed = os.sched_getaffinity(0)
    for cpu in allowed:
        try:
            siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
        except OSError:  # not every virtual machine or sandbox shows the topology
            siblings = str(cpu)
        cores.add(siblings)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):  # no version 2 cgroup
        return len(cores)
    if quota == "max":
        return len(cores)
    return max(1, min(len(cores), -(-int(quota) // int(period))))
