"""Small models compiled with TVM directly, so that the runtime is tested without optc's own compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax, s_tir, te, tirx

from optc.backends.artifact import Artifact, build_artifact
from optc.runtime.format import TensorSpec

TARGET = {
    "kind": "cpu",
    "triple": f"{os.uname().machine}-unknown-linux-gnu",
    "cpu": "generic",
    "features": [],
}


def tensor(dims: list[Any], dtype: str = "float32") -> relax.TensorType:
    return relax.TensorType(dims, dtype)


def compile_function(params: list[relax.Var], body: Callable[[relax.BlockBuilder], Any], folder: Path) -> bytes:
    builder = relax.BlockBuilder()
    with builder.function("main", params):
        with builder.dataflow():
            result = body(builder)
            output = builder.emit_output(relax.Tuple(result) if isinstance(result, list) else result)
        builder.emit_func_output(output)
    path = folder / "model.so"
    tvm.compile(builder.get(), tvm.target.Target({"kind": "llvm"})).export_library(str(path))
    return path.read_bytes()


def make(code: bytes, inputs: list[TensorSpec], outputs: list[TensorSpec], **changes: Any) -> Artifact:
    parts: dict[str, Any] = {
        "inputs": inputs,
        "outputs": outputs,
        "code": code,
        "weights": {},
        "target": TARGET,
        "report": {"passes": ["one"]},
        "metadata": {"author": "someone"},
        "memory": {"activations": None},
    }
    return build_artifact(**parts | changes)


def matmul(a: te.Tensor, b: te.Tensor) -> te.Tensor:
    k = te.reduce_axis((0, b.shape[0]), "k")
    return te.compute((a.shape[0], b.shape[1]), lambda i, j: te.sum(a[i, k] * b[k, j], axis=k), name="matmul")


@pytest.fixture(scope="session")
def weight() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)


@pytest.fixture(scope="session")
def affine(tmp_path_factory: pytest.TempPathFactory, weight: np.ndarray) -> Artifact:
    """y = x @ w + bias, positive = y > 0, for x of shape (batch, 16)."""
    batch = tirx.Var("batch", "int64")
    x, w = relax.Var("x", tensor([batch, 16])), relax.Var("w", tensor([16, 16]))
    bias = relax.Var("bias", tensor([16]))

    def add(a: te.Tensor, b: te.Tensor) -> te.Tensor:
        return te.compute(a.shape, lambda i, j: a[i, j] + b[j], name="add")

    def positive(a: te.Tensor) -> te.Tensor:
        return te.compute(a.shape, lambda i, j: a[i, j] > 0, name="positive")

    def body(builder: relax.BlockBuilder) -> list[Any]:
        y = builder.emit_te(add, builder.emit_te(matmul, x, w), bias)
        return [y, builder.emit_te(positive, y)]

    code = compile_function([x, w, bias], body, tmp_path_factory.mktemp("affine"))
    return make(
        code,
        [TensorSpec("x", "float32", ("batch", 16))],
        [TensorSpec("y", "float32", ("batch", 16)), TensorSpec("positive", "bool", ("batch", 16))],
        weights={"w": weight, "bias": np.arange(16, dtype=np.float32)},
    )


@pytest.fixture(scope="session")
def affine_path(affine: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "affine.optc"
    affine.save(path)
    return path


@pytest.fixture(scope="session")
def two_inputs(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """c = a + b for shapes (n, m) and (n, m)."""
    n, m = tirx.Var("n", "int64"), tirx.Var("m", "int64")
    a, b = relax.Var("a", tensor([n, m])), relax.Var("b", tensor([n, m]))

    def add(p: te.Tensor, q: te.Tensor) -> te.Tensor:
        return te.compute(p.shape, lambda i, j: p[i, j] + q[i, j], name="add")

    code = compile_function([a, b], lambda builder: builder.emit_te(add, a, b), tmp_path_factory.mktemp("two"))
    dims = ("n", "m")
    inputs = [TensorSpec("a", "float32", dims), TensorSpec("b", "float32", dims)]
    return make(code, inputs, [TensorSpec("c", "float32", dims)])


@pytest.fixture(scope="session")
def copier(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Artifact]:
    """Make a model that copies its input of a given dtype and shape element by element."""

    def build(dtype: str, *shape: int) -> Artifact:
        x = relax.Var("x", tensor(list(shape), dtype))

        def body(builder: relax.BlockBuilder) -> Any:
            return builder.emit_te(lambda a: te.compute(a.shape, lambda *i: a[i], name="copy"), x)

        code = compile_function([x], body, tmp_path_factory.mktemp("copy"))
        return make(code, [TensorSpec("x", dtype, shape)], [TensorSpec("y", dtype, shape)])

    return build


@pytest.fixture(scope="session")
def aliases(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Outputs that are not fresh memory: an input, a view of it, a weight, a constant, one result twice."""
    x, w = relax.Var("x", tensor([2, 3])), relax.Var("w", tensor([4]))
    constant = relax.const(np.arange(3, dtype=np.float32))

    def body(builder: relax.BlockBuilder) -> list[Any]:
        twice = builder.emit_te(lambda a: te.compute(a.shape, lambda i, j: a[i, j] * 2, name="double"), x)
        return [x, builder.emit(relax.op.reshape(x, (6,))), w, constant, twice, twice]

    code = compile_function([x, w], body, tmp_path_factory.mktemp("aliases"))
    shapes = {"same": (2, 3), "flat": (6,), "weight": (4,), "constant": (3,), "one": (2, 3), "two": (2, 3)}
    return make(
        code,
        [TensorSpec("x", "float32", (2, 3))],
        [TensorSpec(name, "float32", shape) for name, shape in shapes.items()],
        weights={"w": np.arange(4, dtype=np.float32)},
    )


@pytest.fixture(scope="session")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """y = x * 2 (4096, 256) by a kernel whose outer loop is parallel."""
    x = relax.Var("x", tensor([4096, 256]))
    source = te.placeholder((4096, 256), "float32", "x")
    result = te.compute((4096, 256), lambda i, j: source[i, j] * 2, name="double")
    schedule = s_tir.Schedule(te.create_prim_func([source, result]).with_attr("global_symbol", "double"))
    schedule.parallel(schedule.get_loops(schedule.get_sblock("double"))[0])
    kernel = schedule.mod["main"]

    def body(builder: relax.BlockBuilder) -> Any:
        function = builder.add_func(kernel, "double")
        return builder.emit(relax.call_tir(function, (x,), tensor([4096, 256])))

    code = compile_function([x], body, tmp_path_factory.mktemp("parallel"))
    shape = (4096, 256)
    return make(code, [TensorSpec("x", "float32", shape)], [TensorSpec("y", "float32", shape)])


@pytest.fixture(scope="session")
def in_process() -> Callable[..., str]:
    """Run Python code in a fresh process and return what it prints."""

    def run(code: str, *arguments: object, status: int = 0, timeout: float = 300) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run
