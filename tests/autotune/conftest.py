"""Records to write logs with, and kernels for workers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm
from tvm import s_tir, te, tirx

from optc.autotune.machine import machine_of
from optc.autotune.record import Record, tvm_version
from optc.backends.cpu.target import resolve
from optc.backends.kernels import contraction
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


def product(factor=1.0):
    a = te.placeholder((64, 48), "float32", "a")
    b = te.placeholder((2, 48, 16), "float32", "b")
    packed = contraction.packed_matmul(a, b, 32)
    scaled = te.compute(packed.shape, lambda i, j: packed[i, j] * tirx.const(factor, "float32"), "scaled")
    return te.create_prim_func([a, b, scaled], "int64").without_attr("global_symbol")


def write(path, function):
    generator = np.random.default_rng(0)
    arrays = {"in0": generator.standard_normal((64, 48)), "in1": generator.standard_normal((2, 48, 16))}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    np.savez(path, function=tvm.ir.save_json(function), inputs=2, weights=np.array([1]), **arrays)
    return str(path)


@pytest.fixture(scope="session")
def faulty():
    """Return a function that writes the kernel with a statement instead of what it should do."""

    def make(path, statement):
        root = s_tir.SBlock([], [], [], "root", statement)
        return write(path, product().with_body(s_tir.SBlockRealize([], True, root)))

    return make


@pytest.fixture(scope="session")
def kernels(tmp_path_factory, faulty):
    """Return files of a kernel, of one that computes something else, and of one that ends its process."""
    folder = tmp_path_factory.mktemp("kernels")
    abort = tirx.Evaluate(tirx.call_extern("int32", "abort"))
    return {
        "right": write(folder / "a.npz", product()),
        "wrong": write(folder / "b.npz", product(1.01)),
        "crash": faulty(folder / "c.npz", abort),
    }
