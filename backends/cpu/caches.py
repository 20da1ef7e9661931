"""Sizes of data caches: those of this machine, and what is known of CPUs by LLVM's name."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from optc.backends.base import Caches

_FOLDER = Path("/sys/devices/system/cpu/cpu0/cache")
_KIB = 1024
# First match counts. Of a CPU with two kinds of cores the smaller one, of a cache for several cores one core's part.
_KNOWN = (
    (r"sapphirerapids|emeraldrapids|graniterapids|diamondrapids", 48, 2048),
    (r"icelake-server", 48, 1280),
    (r"x86-64-v4|skylake-avx512|skx|cascadelake|cooperlake", 32, 1024),
    (r"icelake|tigerlake|rocketlake", 48, 512),
    (r"alderlake|raptorlake|meteorlake|arrowlake|lunarlake|pantherlake", 32, 512),
    (r"znver[5-9]", 48, 1024),
    (r"znver4", 32, 1024),
    (r"znver", 32, 512),
    (r"neoverse|apple-m", 64, 1024),
    (r"a64fx|cortex-x", 64, 512),
    (r"cortex-a7[5-9]|cortex-a7\d\d", 64, 256),
    (r"cortex-a[35]", 32, 128),
)


def of_cpu(name: str) -> Caches:
    """Return the caches of a CPU by LLVM's name; small, common ones for a CPU that is not known."""
    for pattern, l1, l2 in _KNOWN:
        if re.match(pattern, name):
            return Caches(l1 * _KIB, l2 * _KIB)
    return Caches()


def of_this_machine(default: Caches, folder: Path = _FOLDER) -> Caches:
    """Return the caches that Linux reports for the first core; ``default`` for a level of which it says nothing."""
    shares: dict[int, tuple[int, int]] = {}
    for entry in sorted(folder.glob("index*")):
        try:
            level, kind, size, cpus = (
                (entry / name).read_text().strip() for name in ("level", "type", "size", "shared_cpu_map")
            )
            number, unit = re.fullmatch(r"(\d+)([KM]?)", size).groups()  # type: ignore[union-attr]
            if kind in ("Data", "Unified") and int(number):
                total = int(number) * {"": 1, "K": _KIB, "M": _KIB * _KIB}[unit]
                shares[int(level)] = total, int(cpus.replace(",", ""), 16).bit_count()
        except (OSError, ValueError, AttributeError):
            continue
    # Hardware threads of one core share its first level and count once.
    threads = shares[1][1] if 1 in shares else 1
    parts = {level: total // max(1, cpus // max(1, threads)) for level, (total, cpus) in shares.items()}
    return replace(default, **{f"l{level}": size for level, size in parts.items() if level in (1, 2)})
