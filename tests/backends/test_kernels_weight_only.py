"""Products with packed weights against their formula in float64: bits, blocks, zero points, rows, machines."""

from __future__ import annotations

import numpy as np
import tvm
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tvm import te

from optc.backends.cpu.single import aligned
from optc.backends.cpu.target import resolve, to_tvm
from optc.backends.kernels import weight_only, weight_only_schedule

F = np.float32
RUNS_HERE = ["x86-64-v2", "x86-64-v3", "x86-64-v3:l1=4K,l2=16K"]


class Problem:
    """A random product: integers, scales, zero points of one block size."""

    def __init__(self, m, k, n, *, bits, block, zeros, seed=0):
        rng = np.random.default_rng(seed)
        low, high = (0, 16) if bits == 4 else (-128, 128)
        blocks = -(-k // block)
        self.a = rng.standard_normal((m, k)).astype(F)
        self.q = rng.integers(low, high, (k, n))
        self.scales = rng.uniform(0.5, 2.0, (blocks, n)).astype(F)
        each = rng.integers(low, high, (blocks, n))
        self.zeros = {"none": each * 0, "one": each * 0 + each.flat[0], "each": each}[zeros]
        self.bits, self.block = bits, block

    def spread(self, x):
        return np.repeat(x, self.block, axis=0)[: len(self.q)].astype(np.float64)

    def expected(self):
        return self.a.astype(np.float64) @ ((self.q - self.spread(self.zeros)) * self.spread(self.scales))

    def bound(self):
        """The error bound that the module states."""
        magnitudes = (np.abs(self.q) + np.abs(self.spread(self.zeros))) * self.spread(self.scales)
        chains = -(-len(self.q) // min(self.block, weight_only.CHAIN)) + len(self.q) // weight_only.CHAIN
        return (weight_only.CHAIN + 4 + chains) * 2.0**-24 * (np.abs(self.a.astype(np.float64)) @ magnitudes)

    def pack(self, width):
        return weight_only.pack(self.q, self.scales, self.zeros, bits=self.bits, block=self.block, width=width)


def function(packed, m, k, epilogue=lambda x: x):
    arrays = [packed.words, packed.scales, *([] if packed.zeros is None else [packed.zeros])]
    a = te.placeholder((m, k), "float32", "a")
    words, scales, *zeros = (te.placeholder(x.shape, x.dtype.name, f"w{i}") for i, x in enumerate(arrays))
    out = epilogue(weight_only.matmul(a, packed, words, scales, zeros))
    return te.create_prim_func([a, words, scales, *zeros, out], "int64"), arrays


def run(problem, target, width, *, symbolic=False, epilogue=lambda x: x):
    machine = resolve(target)
    (m, k), n = problem.a.shape, problem.q.shape[1]
    f, arrays = function(problem.pack(width), te.var("m", "int64") if symbolic else m, k, epilogue)
    scheduled = weight_only_schedule.schedule(f, machine)
    library = tvm.compile(scheduled.with_attr("global_symbol", "main"), target=to_tvm(machine))
    tensors = [aligned(x) for x in (problem.a, *arrays, np.full((m, n), np.nan, F))]
    library["main"](*tensors)
    return tensors[-1].numpy()


@settings(max_examples=40, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.data())
def test_the_result_is_within_the_bound(data):
    blocks = data.draw(st.sampled_from([8, 16, 32, 64, 200, 256, 1 << 20]), "block")
    problem = Problem(
        data.draw(st.integers(1, 20), "rows"),
        data.draw(st.integers(1, 600), "depth"),
        data.draw(st.integers(1, 70), "columns"),
        bits=data.draw(st.sampled_from([4, 8]), "bits"),
        block=blocks,
        zeros=data.draw(st.sampled_from(["none", "one", "each"]), "zeros"),
        seed=data.draw(st.integers(0, 1000), "seed"),
    )
    target = data.draw(st.sampled_from(RUNS_HERE), "target")
    got = run(problem, target, 8 * data.draw(st.integers(1, 3)), symbolic=data.draw(st.booleans(), "symbolic"))
    assert (np.abs(got - problem.expected()) <= problem.bound()).all()
