"""When kernels use several threads: by their work, which sizes of the run may decide."""

from __future__ import annotations

import numpy as np
import onnx.parser
import pytest
import tvm
import tvm_ffi
from tvm import te, tirx, topi

import optc
from optc.backends.cpu import tasks
from optc.backends.cpu.target import resolve
from optc.backends.kernels import loops, threads
from optc.backends.kernels.schedule import schedule_kernel

TARGET = resolve("cpu")
WEIGHTS = np.random.default_rng(5).standard_normal((33, 20)).astype(np.float32)
HEADER = '<ir_version: 10, opset_import: ["" : 21]>'


def function(shape, compute):
    x = te.placeholder(shape, "float32", "x")
    return te.create_prim_func([x, compute(x)], "int64")


def kinds(function):
    found = []
    tvm_ffi.structural_walk(function.body, (tirx.For, lambda loop: found.append(int(loop.kind))))
    return found


def test_cycles_follow_the_sizes():
    small, large = (threads.cycles(function(s, topi.exp), TARGET, template=False) for s in ((4, 64), (400, 64)))
    assert large == 100 * small
    cheap = threads.cycles(function((400, 64), topi.negative), TARGET, template=False)
    assert cheap < large / 4


def test_sizes_of_the_run_decide():
    n = tirx.Var("n", "int64")
    scheduled, *_ = schedule_kernel(function((n, 64), topi.exp), TARGET)
    assert threads.CYCLES in scheduled.attrs
    # As kernels are that others call directly: sizes are parameters.
    direct = tirx.PrimFunc([*scheduled.params, n], scheduled.body, scheduled.ret_type, scheduled.attrs)
    module = tasks.split(tvm.IRModule({"kernel": direct}))
    names = {str(var.name_hint) for var in module.functions}
    assert names == {"kernel", "kernel_task0"}
    parallel, serial = int(tirx.ForKind.PARALLEL), int(tirx.ForKind.SERIAL)
    assert kinds(module["kernel"]) == [parallel, serial]
    assert parallel not in kinds(module["kernel_task0"])


@pytest.mark.parametrize("where", ["before", "in the task"])
def test_tasks_that_read_what_was_prepared_before_them_stay(where):
    n, memory = tirx.Var("n", "int64"), tirx.Var("y", tvm.ir.PointerType(tvm.ir.PrimType("float32")))
    y = tirx.decl_buffer([n], "float32", "y")
    ready, allocate = loops.scratch("ready", 4, "float32")
    prepare = loops.store(ready, 0, tirx.const(2.0, "float32"))
    before, inside = (prepare, None) if where == "before" else (None, prepare)

    def task(i):
        return loops.sequence(inside, loops.store(y, i, loops.load(ready, 0)))

    body = loops.sequence(tirx.DeclBuffer(y, data=memory), allocate, before, loops.loop("i", n, task, "parallel"))
    kernel = tirx.PrimFunc([memory, n], body, tvm.ir.PrimType("int32")).with_attr(threads.CYCLES, n)
    module = tasks.split(tvm.IRModule({"kernel": kernel}))
    assert len(module.functions) == (1 if where == "before" else 2)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    "body, reference",
    [
        ("{ y = Tanh(x) }", np.tanh),
        ("<float[33, 20] w = {WEIGHTS}> { y = MatMul(x, w) }", lambda x: x @ WEIGHTS),
        ("{ y = Softmax(x) }", lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)),
        ("{ t = Transpose(x) y = Concat<axis = 1>(t, t) }", lambda x: np.concatenate([x.T, x.T], 1)),
        ("<int64[4] p = {1, 2, 0, 1}> { y = Pad(x, p) }", lambda x: np.pad(x, [(1, 0), (2, 1)])),
    ],
    ids=["tanh", "product", "softmax", "concat", "pad"],
)
def test_every_size_is_right(body, reference, count):
    text = f"{HEADER} g (float[n, 33] x) => (float[p, q] y) {body}"
    weights = ", ".join(map(repr, WEIGHTS.reshape(-1).tolist()))
    model = optc.compile(onnx.parser.parse_model(text.replace("WEIGHTS", weights)), verify=False).model()
    model.threads = count
    for n in (1, 2, 7, 5000, 3):
        x = np.random.default_rng(n).standard_normal((n, 33)).astype(np.float32)
        np.testing.assert_allclose(model.run({"x": x})["y"], reference(x), rtol=1e-5, atol=1e-5)
