"""How tiles are shared among tasks: what the model says against a simulation, and what it chooses."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.backends.kernels import sharing
from optc.backends.kernels.sharing import Product, best_chunk, best_groups, chunks_of, groups_of

products = st.builds(
    Product,
    batch=st.integers(1, 5),
    row_tiles=st.integers(1, 60),
    column_tiles=st.integers(1, 50),
    last=st.sampled_from([1 / 3, 2 / 3, 1.0]),
    work=st.sampled_from([10_000, 500_000, 10**9]),
)


def shares(product, chunk, groups, threads):
    """Return the tiles that each thread gets, one task after the other."""
    group = -(-product.column_tiles // groups)
    tasks = []
    for _, first, begin in itertools.product(
        range(product.batch), range(0, product.row_tiles, chunk), range(0, product.column_tiles, group)
    ):
        rows = min(chunk, product.row_tiles - first)
        columns = min(group, product.column_tiles - begin)
        tasks.append(rows * (columns - (1 - product.last) * (begin + columns == product.column_tiles)))
    each = -(-len(tasks) // threads)
    return [sum(tasks[t * each : (t + 1) * each]) for t in range(threads)]


@settings(deadline=None)
@given(product=products, data=st.data())
def test_the_cost_is_that_of_the_busiest_thread(product, data):
    chunk = data.draw(st.sampled_from(chunks_of(product.row_tiles)))
    groups = data.draw(st.sampled_from(groups_of(product.column_tiles)))
    whole = sum(shares(product, chunk, groups, 1))
    assert whole == pytest.approx(product.batch * product.row_tiles * (product.column_tiles - 1 + product.last))
    even = np.mean([t * max(shares(product, chunk, groups, t)) / whole for t in product.threads])
    # Above it is what reading panels and rows takes: for a task of one tile most.
    assert even <= product.cost(chunk, groups) <= even * 1.25 * (1 + 0.02 / product.last) + 1e-9


@settings(deadline=None)
@given(product=products)
def test_the_best_of_all_is_chosen(product):
    chunk = best_chunk(product, product.row_tiles)
    chosen = product.cost(chunk, best_groups(product, chunk, 1))
    every = itertools.product(chunks_of(product.row_tiles), groups_of(product.column_tiles))
    assert chosen == min(product.cost(*choice) for choice in every)


@pytest.mark.parametrize(
    ("row_tiles", "column_tiles", "last"),
    [(7, 43, 2 / 3), (25, 22, 1 / 3), (25, 6, 1 / 3), (16, 64, 1.0), (392, 2, 1 / 3)],
)
def test_two_threads_have_about_as_much_to_do(row_tiles, column_tiles, last):
    product = Product(1, row_tiles, column_tiles, last, 10**9)
    chunk = best_chunk(product, row_tiles)
    one, two = shares(product, chunk, best_groups(product, chunk, 1), 2)
    assert max(one, two) <= 1.07 * min(one, two)


def test_limits_are_kept():
    product = Product(1, 100, 40, 1.0, 10**9)
    assert best_chunk(product, 7) <= 7
    assert best_groups(product, 50, 9) >= 9
    assert best_chunk(Product(1, 100, 1, 1.0, 10**9), 3) <= 3


def test_little_work_is_one_task():
    small = Product(1, 9, 5, 1.0, sharing.TASK_WORK)
    assert best_chunk(small, 9) == 9
    assert best_groups(small, 9, 1) == 1


def test_groups_are_different():
    for tiles in range(1, 200):
        assert len({-(-tiles // n) for n in groups_of(tiles)}) == len(groups_of(tiles))
