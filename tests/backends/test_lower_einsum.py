"""Einsum against NumPy, and the integer matrix products."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from optc.errors import UnsupportedModelError

F = np.float32


def data(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(F)


def compiled(compile_model, make_model, equation, shapes, dtype=F):
    names = [f"x{i}" for i in range(len(shapes))]
    node = helper.make_node("Einsum", names, ["y"], equation=equation)
    return compile_model(make_model([node], {n: (dtype, s) for n, s in zip(names, shapes, strict=True)}, {"y": dtype}))


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("ij,jk->ik", [(5, 6), (6, 17)]),
        ("ij,jk->ki", [(5, 6), (6, 17)]),
        ("bhsd,bhtd->bhst", [(2, 3, 5, 6), (2, 3, 7, 6)]),
        ("bshd,bthd->bhst", [(2, 5, 3, 6), (2, 7, 3, 6)]),
        ("ij,jk", [(3, 4), (4, 5)]),
        ("ij->ji", [(3, 4)]),
        ("ii->i", [(4, 4)]),
        ("ii", [(4, 4)]),
        ("ij->", [(3, 4)]),
        ("i,j->ij", [(3,), (4,)]),
        ("i,i->", [(3,), (3,)]),
        ("...ij,...jk->...ik", [(2, 3, 4), (2, 4, 5)]),
        ("...ij,jk->...ik", [(2, 7, 3, 4), (4, 5)]),
        ("...ii->...i", [(2, 4, 4)]),
        ("...,...->...", [(3, 1), (1, 4)]),
        ("bij,j,i->b", [(2, 3, 4), (4,), (3,)]),
        ("ij,jk,kl->il", [(2, 3), (3, 4), (4, 5)]),
        ("bij, bjk -> bik", [(2, 3, 4), (1, 4, 5)]),
        ("ABC,C->AB", [(2, 3, 4), (4,)]),
        ("abij,abjk->aik", [(2, 3, 4, 5), (2, 3, 5, 6)]),
    ],
)
def test_equations(compile_model, make_model, equation, shapes):
    arrays = [data(*s, seed=i) for i, s in enumerate(shapes)]
    (y,) = compiled(compile_model, make_model, equation, shapes)(*arrays)
    want = np.einsum(equation.replace(" ", ""), *arrays)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    assert y.shape == want.shape


def test_symbolic(compile_model, make_model):
    run = compiled(compile_model, make_model, "bsd,de->bse", [("b", "s", 6), (6, 9)])
    for b, s in [(1, 1), (2, 19), (0, 2)]:
        x, w = data(b, s, 6), data(6, 9, seed=1)
        np.testing.assert_allclose(run(x, w)[0], np.einsum("bsd,de->bse", x, w), rtol=1e-4, atol=1e-5)


def test_integers(compile_model, make_model):
    a, b = np.arange(6, dtype=np.int64).reshape(2, 3), np.arange(12, dtype=np.int64).reshape(3, 4)
    (y,) = compiled(compile_model, make_model, "ij,jk->ik", [a.shape, b.shape], np.int64)(a, b)
    np.testing.assert_array_equal(y, a @ b)


def test_unequal_extents_of_one_label_are_refused(compile_model, make_model):
    with pytest.raises((UnsupportedModelError, Exception), match=r"fit|[Dd]imension|[Ee]insum"):
        compiled(compile_model, make_model, "ij,jk->ik", [(5, 6), (7, 3)])


@pytest.mark.parametrize("per", ["tensor", "row and column"])
def test_matmul_integer(compile_model, make_model, per):
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 5, 6)).astype(np.uint8), rng.integers(-128, 128, (6, 19)).astype(np.int8)
    whole = per == "tensor"
    az = np.array(3, np.uint8) if whole else np.arange(5, dtype=np.uint8)
    bz = np.array(-4, np.int8) if whole else np.arange(19).astype(np.int8)
    node = helper.make_node("MatMulInteger", ["a", "b", "az", "bz"], ["y"])
    inputs = {"a": (np.uint8, a.shape), "b": (np.int8, b.shape)}
    (y,) = compile_model(make_model([node], inputs, {"y": np.int32}, {"az": az, "bz": bz}))(a, b)
    left = a.astype(np.int64) - (az if whole else az[:, None].astype(np.int64))
    np.testing.assert_array_equal(y, left @ (b.astype(np.int64) - bz))


def test_qlinear_matmul(compile_model, make_model):
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (5, 6)).astype(np.uint8), rng.integers(0, 256, (6, 19)).astype(np.uint8)
    constants = {"as": F(0.02), "az": np.uint8(9), "bs": F(0.03), "bz": np.uint8(120), "ys": F(0.2), "yz": np.uint8(99)}
    node = helper.make_node("QLinearMatMul", ["a", "as", "az", "b", "bs", "bz", "ys", "yz"], ["y"])
    inputs = {"a": (np.uint8, a.shape), "b": (np.uint8, b.shape)}
    model = make_model([node], inputs, {"y": np.uint8}, {k: np.asarray(v) for k, v in constants.items()})
    (y,) = compile_model(model)(a, b)
    total = (a.astype(np.int64) - 9) @ (b.astype(np.int64) - 120)
    exact = np.clip(np.rint(total.astype(F) * (F(0.02) * F(0.03) / F(0.2))) + 99, 0, 255)
    np.testing.assert_array_equal(y, exact)
