"""Union-find against networkx, common factors against arithmetic, and the choice of units."""

import math

import networkx
import numpy as np
import onnx_ir as oir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optc.errors import UsageError
from optc.passes.prune.analysis import analyse
from optc.passes.prune.factors import common
from optc.passes.prune.importance import Scores
from optc.passes.prune.labels import UnionFind
from optc.passes.prune.select import Structured, choose


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=40), st.integers(1, 5))
def test_union_find_is_connectivity(pairs, rounds):
    sets = UnionFind(20)
    graph = networkx.Graph()
    graph.add_nodes_from(range(20))
    for start in range(0, len(pairs), rounds):
        part = np.array(pairs[start : start + rounds], np.int64).reshape(-1, 2)
        sets.unite(part[:, 0], part[:, 1])
        graph.add_edges_from(part.tolist())
    for component in networkx.connected_components(graph):
        assert set(sets.roots(np.array(sorted(component))).tolist()) == {min(component)}


@given(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=5), st.data())
def test_factors_multiply_to_the_axes(factors, data):
    """Two ways of merging the same factors have common factors again."""

    def merged():
        cuts = sorted(data.draw(st.sets(st.integers(1, len(factors)), max_size=3)) | {len(factors)})
        return [math.prod(factors[a:b]) for a, b in zip([0, *cuts], cuts, strict=False)]

    before, after = merged(), merged()
    parts = common(before, after)
    for axes, found in ((before, parts.before), (after, parts.after)):
        for size, indices in zip(axes, found, strict=True):
            if indices is not None:
                assert math.prod(parts.sizes[i] for i in indices) == size


def test_symbolic_factors():
    n, m = oir.SymbolicDim("n"), oir.SymbolicDim("4*n")
    assert common([n, 8, 4], [n, 2, 16]).before == [[0], [1, 2], [3]]
    assert common([4, n], [m]).after == [[0, 1]]
    assert common([n, 6], [4, oir.SymbolicDim("floor(n/4)"), 6]).before == [None, None]
    assert common([oir.SymbolicDim(None), 6], [6, 2]).after == [None, None]


def chain(filled, sizes, scales):
    """Products of rows, one hidden layer of each size, whose weights have these magnitudes."""
    weights, text, last = {}, "", 4
    for index, (size, scale) in enumerate(zip(sizes, scales, strict=True)):
        weights[f"w{index}"] = np.full((last, size), scale, np.float32) * np.arange(1, size + 1, dtype=np.float32)
        text += f"h{index} = MatMul({f'h{index - 1}' if index else 'x'}, w{index}) "
        last = size
    weights["v"] = np.ones((last, 3), np.float32)
    return filled(f"(float[2,4] x) => (float[2,3] y) {{ {text} y = MatMul(h{len(sizes) - 1}, v) }}", **weights)


def kept(model, how, **options):
    coupling = analyse(model)
    removed = choose(coupling, Scores(coupling, how.criterion, **options), how)
    return [len(family.units) - len(removed[family.key]) for family in coupling.families]


def test_rounding_to_multiples(filled):
    model = chain(filled, [64, 20, 12], [1, 1, 1])
    assert kept(model, Structured(0.5, multiple=1)) == [32, 10, 6]
    assert kept(model, Structured(0.3, multiple=8)) == [48, 16, 8]
    assert kept(model, Structured(0.9, multiple=8)) == [8, 8, 1]


def test_global_ranking_leaves_the_least_share(filled):
    model = chain(filled, [20, 40], [1, 1])
    saliency = {"w0": np.zeros((4, 20)), "w1": np.ones((20, 40)) * np.arange(1, 41)}
    counts = kept(model, Structured(0.5, scope="global", multiple=1, least=0.2), saliency=saliency)
    assert counts[0] == 4
    assert sum(counts) == 30


def test_single_layers_have_their_own_ratio(filled):
    model = chain(filled, [20, 40, 20], [1, 1, 1])
    how = Structured(0.5, multiple=1, layers={"w1": 0, "w*": 0.25})
    # The rows of w1 are units of the family of w0.
    assert kept(model, how) == [20, 40, 15]
    with pytest.raises(UsageError, match="nothing that can be pruned is called 'other'"):
        kept(model, Structured(0.5, layers={"other": 0.1}))


def test_the_least_important_go(filled):
    coupling = analyse(chain(filled, [8], [1]))
    (family,) = coupling.families
    for criterion in ("l1", "l2"):
        removed = choose(coupling, Scores(coupling, criterion), Structured(0.5, criterion=criterion, multiple=1))
        assert removed[family.key].tolist() == family.units[:4].tolist()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ratio": 1.0}, "not between"),
        ({"ratio": -0.1}, "not between"),
        ({"ratio": 0.5, "layers": {"a": 2}}, "not between"),
        ({"ratio": 0.5, "scope": "row"}, "scope"),
        ({"ratio": 0.5, "criterion": "age"}, "importance"),
        ({"ratio": 0.5, "multiple": 0}, "multiple"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(UsageError, match=message):
        Structured(**wrong)
