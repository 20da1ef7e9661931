"""Records to write logs with."""

from __future__ import annotations

from dataclasses import replace

import pytest

from optc.autotune.machine import machine_of
from optc.autotune.record import Record, tvm_version
from optc.backends.cpu.target import resolve
from optc.backends.kernels.templates import VERSIONS
from optc.backends.kernels.workload import Workload

MACHINE = machine_of(resolve("x86-64-v3"), 2)


def matmul(m=128, k=768, n=768, epilogue=(), **layout):
    return Workload({"op": "matmul", "m": m, "k": k, "n": n, "dtype": "float32"}, epilogue, layout or {"vectors": 2})


@pytest.fixture
def record():
    """Return a function that makes a record: a ratio to the untuned kernel, and what differs from the usual."""

    def make(ratio=0.9, decisions=None, **changes):
        workload = changes.pop("workload", matmul())
        defaults = {"rows": 6, "unroll": 1, "vectors": 2}
        base = Record(
            workload=workload,
            template="contraction",
            template_version=VERSIONS["contraction"],
            decisions={**defaults, **workload.layout, **(decisions or {"unroll": 4})},
            defaults=defaults,
            machine=MACHINE,
            tvm=tvm_version(),
            seconds=(float(f"{1e-3 * ratio:.5g}"), float(f"{1.1e-3 * ratio:.5g}")),
            baseline=(1e-3, 1.1e-3),
        )
        return replace(base, **changes)

    return make
