"""What loading and running costs a process: imports, start-up time, memory."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import onnx
import pytest

import optc

RUN = """
import time
start = time.process_time()
import sys
import optc.runtime
imported = time.process_time()
assert "numpy" not in sys.modules
import numpy as np
x = np.ones((2, 16), np.float32)
ready = time.process_time()
y = optc.runtime.load(sys.argv[1]).run({"x": x})["y"]
done = time.process_time()
assert y.shape == (2, 16)
for name in ("tvm", "tvm_ffi", "onnx", "onnx_ir", "torch", "ml_dtypes", "zipfile"):
    assert name not in sys.modules, name
print(imported - start, ready - imported, done - ready)
"""


def test_no_compiler_is_imported_and_the_start_is_quick(affine_path, in_process):
    runs = [list(map(float, in_process(RUN, affine_path).split())) for _ in range(3)]
    # Seconds of the processor: what it takes, not what the machine was doing.
    imported, numpy, run = (min(times) for times in zip(*runs, strict=True))
    print(f"\nimport optc.runtime {imported:.3f} s, numpy {numpy:.3f} s, load and run {run:.3f} s")
    assert imported < 0.1
    assert run < 0.3


COEXIST = """
import sys
import numpy as np
if sys.argv[2] == "tvm first":
    import tvm
import optc.runtime
model = optc.runtime.load(sys.argv[1])
first = model.run({"x": np.ones((2, 16), np.float32)})["y"]
import tvm
from tvm import te
a = te.placeholder((4,), name="a")
b = te.compute((4,), lambda i: a[i] * 2)
built = tvm.compile(te.create_prim_func([a, b]), target="llvm")
x, y = tvm.runtime.tensor(np.ones(4, np.float32)), tvm.runtime.tensor(np.zeros(4, np.float32))
built(x, y)
assert (y.numpy() == 2).all()
assert (model.run({"x": np.ones((2, 16), np.float32)})["y"] == first).all()
"""


@pytest.mark.parametrize("order", ["runtime first", "tvm first"])
def test_the_compiler_in_the_same_process(affine_path, in_process, order):
    in_process(COEXIST, affine_path, order)


SIZES = """
import sys
import numpy as np, optc.runtime
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
model = optc.runtime.load(sys.argv[1])
rng = np.random.default_rng(0)
def run(rows):
    model.run({"x": np.ones((rows, 16), np.float32)})
run(60_000)
before = resident()
for rows in rng.integers(30_000, 60_000, 60):
    run(int(rows))
print((resident() - before) / 1e6)
"""


def test_many_sizes_do_not_pile_up(affine_path, in_process):
    assert float(in_process(SIZES, affine_path)) < 40  # one run needs 10 MB; TVM's pool would keep 400


WEIGHTS = """
import sys
import numpy as np, optc.runtime
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
model = optc.runtime.load(sys.argv[1])
model.run({"x": np.ones((2, 16), np.float32)})
weights = model.manifest.memory["weights"]
print(peak() / 1e6, weights / 1e6)
with open("/proc/self/smaps") as file:
    assert "model.optc" in file.read()
"""


def test_weights_are_mapped_not_copied(affine, weight, tmp_path, in_process):
    """A large weight that the code takes but does not use costs its own size at most, once."""
    from optc.backends.artifact import Weights

    ballast = np.random.default_rng(0).integers(0, 255, 100 << 20, np.uint8)
    big = Weights({"w": weight, "bias": np.arange(16, dtype=np.float32), "ballast": ballast})
    path = tmp_path / "model.optc"
    replace(affine, weights=big, manifest=replace(affine.manifest, memory={"weights": big.size})).save(path)
    # The manifest keeps naming the two weights the code takes; the ballast lies in the same file.
    total, weights = map(float, in_process(WEIGHTS, path).split())
    assert weights > 100
    assert total < 1.2 * weights + 80


ROWS = """
import sys
import numpy as np, optc.runtime
model = optc.runtime.load(sys.argv[1])
model.run({"rows": np.arange(64) * 1024})
mapped = 0
with open("/proc/self/smaps") as file:
    for line in file:
        if "-" in line.split()[0]:
            name = line
        elif line.startswith("Rss:") and "table.optc" in name:
            mapped += int(line.split()[1]) * 1024
print(mapped / 1e6)
"""


def test_rows_of_a_table_are_no_more_memory_where_the_file_was_not_cached(tmp_path, in_process):
    table = np.zeros((64 * 1024, 256), np.float32)
    nodes = [onnx.helper.make_node("Gather", ["table", "rows"], ["y"])]
    rows, y = (
        onnx.helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in (("rows", onnx.TensorProto.INT64, [64]), ("y", onnx.TensorProto.FLOAT, [64, 256]))
    )
    graph = onnx.helper.make_graph(nodes, "g", [rows], [y], [onnx.numpy_helper.from_array(table, "table")])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    path = tmp_path / "table.optc"
    optc.compile(model, verify=False).save(path)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert float(in_process(ROWS, path)) < 10  # the table has 67 MB
