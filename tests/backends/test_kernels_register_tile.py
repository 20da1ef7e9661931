"""The choice of register tiles, for every kind of machine: it fits the registers and wastes little."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.backends.cpu.target import resolve
from optc.backends.kernels import register_tile

TARGETS = ["nehalem", "sandybridge", "haswell", "skylake-avx512", "znver4", "aarch64", "riscv64"]
sizes = st.integers(1, 3000)


@pytest.mark.parametrize("name", TARGETS)
@settings(deadline=None, max_examples=60)
@given(rows=st.none() | sizes, depth=st.integers(1, 5000), columns=sizes, bits=st.sampled_from([32, 64]))
def test_tiles_fit_the_registers(name, rows, depth, columns, bits):
    target = resolve(name)
    lanes = target.lanes(bits)
    vectors = register_tile.tile_vectors(rows, depth, columns, lanes, target)
    height = register_tile.tile_rows(rows, depth, vectors, target)
    assert 1 <= vectors <= 4
    assert (vectors - 1) * lanes < columns
    assert 1 <= height <= (rows or height)
    product = 0 if target.fuses else 1
    assert height * vectors + vectors + 1 + product <= target.registers


@pytest.mark.parametrize("name", TARGETS)
@settings(deadline=None, max_examples=60)
@given(rows=sizes, depth=st.integers(1, 5000), vectors=st.integers(1, 4))
def test_no_other_height_takes_fewer_cycles(name, rows, depth, vectors):
    target = resolve(name)

    def steps(height):
        return -(-rows // height) * register_tile.cycles(height, vectors, target)

    height = register_tile.tile_rows(rows, depth, vectors, target)
    best = min(steps(h) for h in range(1, register_tile.most_rows(vectors, target) + 1) if h <= rows)
    # Tiles have a cost of their own, which matters where the sums are short.
    assert steps(height) <= best * (1 + 24 / depth)


@pytest.mark.parametrize("name", TARGETS)
def test_large_products_keep_the_ports_busy(name):
    target = resolve(name)
    lanes = target.lanes(32)
    vectors = register_tile.tile_vectors(None, 512, 40 * lanes, lanes, target)
    height = register_tile.tile_rows(None, 512, vectors, target)
    products = height * vectors / register_tile.multiply_adds(target)
    assert register_tile.cycles(height, vectors, target) == products


def test_a_panel_that_is_always_computed_whole_is_not_wider_than_it_pays():
    target = resolve("znver4")
    lanes = target.lanes(32)
    alone = register_tile.tile_vectors(16, 512, 512, lanes, target)
    padded = register_tile.tile_vectors(16, 512, 512, lanes, target, padded=True)
    assert 32 % alone
    assert 32 % padded == 0


def test_tiles_of_rows_that_nothing_divides_are_not_low():
    target = resolve("znver4")
    assert register_tile.tile_rows(197, 3072, 4, target) == register_tile.most_rows(4, target)


def test_halves_of_a_unit_are_one_multiplier():
    assert [resolve(name).multipliers for name in ("znver4", "znver5", "icelake-server", "haswell")] == [1, 2, 2, 2]


@pytest.mark.parametrize(
    ("name", "columns", "lanes"),
    [
        ("znver4", 24, 8),
        ("znver4", 18, 8),
        ("znver4", 8, 8),
        ("znver4", 12, 16),
        ("znver4", 64, 16),
        ("znver4", 200, 16),
        ("skylake-avx512", 24, 16),
        ("haswell", 12, 8),
    ],
)
def test_halves_of_vectors_where_they_are_as_fast_and_filled_better(name, columns, lanes):
    target = resolve(name)
    assert register_tile.column_lanes(columns, 32, target) == lanes


@pytest.mark.parametrize("name", TARGETS)
@settings(deadline=None, max_examples=60)
@given(rows=st.none() | sizes, depth=st.integers(1, 5000), columns=sizes)
def test_a_panel_consists_of_whole_vectors(name, rows, depth, columns):
    target = resolve(name)
    lanes = register_tile.column_lanes(columns, 32, target)
    panel = lanes * register_tile.tile_vectors(rows, depth, columns, lanes, target)
    assert panel % register_tile.panel_lanes(panel, 32, target) == 0
    assert register_tile.panel_lanes(panel, 32, target) >= lanes
