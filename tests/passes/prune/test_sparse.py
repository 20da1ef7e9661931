"""Zeros, shared values, bounds and low rank: what is left, and that nothing else changes."""

import numpy as np
import pytest

from optc.errors import UsageError
from optc.passes.prune.low_rank import factor
from optc.passes.prune.permute import permute, search
from optc.passes.prune.sparse import best_of_groups, clip, cluster, magnitude, n_of_m

TEXT = """(float[1,4,6,6] x) => (float[1,5] y) <float[8,4,3,3] w, float[8] b, float[128,5] v>
{ h = Conv(x, w, b) r = Relu(h) f = Flatten(r) y = MatMul(f, v) }"""
CHAIN = """(float[1,4,6,6] x) => (float[1,5,4,4] y) <float[16,4,3,3] w, float[16] b, float[5,16,1,1] v>
{ h = Conv(x, w, b) r = Relu(h) y = Conv(r, v) }"""


def weights(model, *names):
    return [model.graph.initializers[name].const_value.numpy() for name in names]


def test_magnitude_per_layer_and_global(filled, verify):
    model = filled(TEXT)
    w, v = (a.copy() for a in weights(model, "w", "v"))
    found = magnitude(model, 0.75)
    verify(model)
    for before, after in zip((w, v), weights(model, "w", "v"), strict=True):
        assert (after == 0).sum() == int(0.75 * after.size)
        assert np.abs(before[after == 0]).max() <= np.abs(after[after != 0]).min()
    assert [(s.name, s.zeros) for s in found] == [("w", 0.75), ("v", 0.75)]
    assert all(0.25 < s.left < 1 for s in found)
    model = filled(TEXT)
    both = magnitude(model, 0.5, scope="global")
    assert sum(s.zeros * s.size for s in both) == pytest.approx(0.5 * (w.size + v.size), abs=1)
    assert magnitude(model, 0.0, scope="global")[0].zeros == both[0].zeros


def test_blocks_go_as_a_whole(filled, verify):
    model = filled(TEXT)
    magnitude(model, 0.5, block=(4, 2))
    verify(model)
    (v,) = weights(model, "v")
    zero = v == 0
    # Columns 0-1, 2-3, and the one that is left over.
    for part in (zero[:, :2], zero[:, 2:4], zero[:, 4:]):
        blocks = part.reshape(32, -1)
        assert (blocks.all(1) | ~blocks.any(1)).all()
    assert zero.any(1).sum() > 0


def test_saliency_decides(filled):
    model = filled(TEXT)
    worth = np.arange(128 * 5, dtype=np.float32).reshape(128, 5)
    magnitude(model, 0.5, saliency={"v": worth})
    (v,) = weights(model, "v")
    assert (v[:64] == 0).all() and (v[64:] != 0).all()


def test_two_of_four(filled, verify):
    model = filled(TEXT)
    found = n_of_m(model, 2, 4)
    verify(model)
    w, v = weights(model, "w", "v")
    assert ((w.reshape(8, 1, 4, 3, 3) != 0).sum(axis=2) == 2).all()
    assert ((v.reshape(32, 4, 5) != 0).sum(axis=1) == 2).all()
    assert [s.zeros for s in found] == [0.5, 0.5]
    odd = filled(TEXT.replace("4,3,3] w", "4,3,3] w"))
    assert len(n_of_m(odd, 1, 3)) == 0


def test_ties_keep_exactly_n():
    assert best_of_groups(np.ones((8, 3)), 2, 4).sum() == 12


def test_permutation_keeps_results_and_more_of_the_weights(filled, run, rng):
    model = filled(CHAIN)
    feeds = {"x": rng.standard_normal((1, 4, 6, 6)).astype(np.float32)}
    plain = model.clone()
    (before,) = run(model, feeds)
    assert permute(model, 2, 4) == 1
    np.testing.assert_allclose(run(model, feeds)[0], before, rtol=1e-5, atol=1e-5)
    better, worse = n_of_m(model, 2, 4)[-1], n_of_m(plain, 2, 4)[-1]
    assert better.left > worse.left


def test_channels_whose_order_matters_are_not_permuted(filled):
    """Flatten sees channels in rows of 16 pixels; a split sees two halves."""
    assert permute(filled(TEXT), 2, 4) == 0
    halves = CHAIN.replace("r = Relu(h)", "p, q = Split <axis=1, num_outputs=2> (h) r = Concat <axis=1> (q, p)")
    assert permute(filled(halves), 2, 4) == 0


def test_search_finds_the_even_spread():
    """Two strong rows of four in one group, none in the other: one swap keeps everything."""
    worth = np.array([9, 9, 9, 9, 0, 0, 0, 0], float)[:, None]
    order = search(worth, 2, 4)
    assert sorted(order) == list(range(8))
    assert (worth[order].reshape(2, 4) > 0).sum(axis=1).tolist() == [2, 2]


def test_clusters_share_values(filled, verify):
    model = filled(TEXT)
    magnitude(model, 0.5)
    zeros = [a == 0 for a in weights(model, "w", "v")]
    originals = [a.copy() for a in weights(model, "w", "v")]
    assert cluster(model, 16) > 0
    verify(model)
    for zero, before, after in zip(zeros, originals, weights(model, "w", "v"), strict=True):
        assert len(np.unique(after[~zero])) <= 16
        assert (after[zero] == 0).all()
        # No worse than a uniform grid of as many values.
        step = (before.max() - before.min()) / 15
        grid = np.round((before - before.min()) / step) * step + before.min()
        assert np.square(after - before)[~zero].sum() <= np.square(grid - before)[~zero].sum()
    few = filled(TEXT, v=np.tile(np.float32([1, 2, 3, 4, 5]), (128, 1)))
    cluster(few, 8)
    assert np.unique(weights(few, "v")[0]).tolist() == [1, 2, 3, 4, 5]


def test_clipping(filled):
    model = filled(TEXT)
    (v,) = (a.copy() for a in weights(model, "v"))
    assert clip(model, 90) > 0
    assert np.abs(weights(model, "v")[0]).max() == pytest.approx(np.percentile(np.abs(v), 90))
    assert clip(model, 100) == 0


PRODUCT = "(float[3,80] x) => (float[3,96] y) { y = MatMul(x, w) }"
GEMM = "(float[3,80] x) => (float[3,96] y) <float[96] b> { y = Gemm <transB=1> (x, w, b) }"


@pytest.mark.parametrize("text", [PRODUCT, GEMM])
def test_a_product_of_low_rank_becomes_two(text, filled, run, verify, rng):
    w = (rng.standard_normal((80, 12)) @ rng.standard_normal((12, 96))).astype(np.float32)
    model = filled(text, w=w if text is PRODUCT else np.ascontiguousarray(w.T))
    feeds = {"x": rng.standard_normal((3, 80)).astype(np.float32)}
    (before,) = run(model, feeds)
    (found,) = factor(model, 1e-6)
    verify(model)
    assert (found.rank, found.features, found.columns) == (12, 80, 96)
    np.testing.assert_allclose(run(model, feeds)[0], before, rtol=1e-3, atol=1e-3)
    assert "w" not in model.graph.initializers


def test_full_rank_is_left_alone(filled, rng):
    model = filled(PRODUCT, w=np.linalg.qr(rng.standard_normal((96, 96)))[0][:80].astype(np.float32))
    (found,) = factor(model, 0.1)
    assert found.rank is None
    assert [node.op_type for node in model.graph] == ["MatMul"]
    small = filled("(float[3,8] x) => (float[3,9] y) <float[8,9] w> { y = MatMul(x, w) }")
    assert not factor(small, 0.5)


def test_data_tell_which_directions_matter(filled, run, rng):
    """Inputs lie in 10 of 80 dimensions: weights of full rank have a product of rank 10."""
    basis = rng.standard_normal((10, 80))
    x = (rng.standard_normal((300, 10)) @ basis).astype(np.float32)
    model = filled(PRODUCT, w=rng.standard_normal((80, 96)).astype(np.float32))
    feeds = {"x": x[:3]}
    (before,) = run(model, feeds)
    (found,) = factor(model, 1e-4, moments={"w": x.T @ x / len(x)})
    assert found.rank is not None and found.rank <= 10
    error = np.square(run(model, feeds)[0] - before).sum() / np.square(before).sum()
    assert error < 1e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: magnitude(m, 1.0), "not between"),
        (lambda m: magnitude(m, 0.5, scope="row"), "scope"),
        (lambda m: magnitude(m, 0.5, block=(0, 1)), "empty"),
        (lambda m: n_of_m(m, 4, 4), "no sparsity"),
        (lambda m: clip(m, 0), "no percentile"),
        (lambda m: cluster(m, 1), "no codebook"),
        (lambda m: factor(m, 0.0), "not between"),
    ],
)
def test_wrong_settings(call, message, filled):
    with pytest.raises(UsageError, match=message):
        call(filled(TEXT))
