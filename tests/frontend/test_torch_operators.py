"""Operators of torch with translations of our own: what is captured computes the same in onnxruntime and compiled."""

import numpy as np
import pytest

import optc
from optc.errors import UnsupportedModelError
from optc.ir.serialize import to_proto

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402 - needs torch

from optc.frontend.torch import capture  # noqa: E402 - needs torch


class Function(torch.nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def check(function, *inputs, tolerance=1e-6, dynamic_shapes=None, sizes=None):
    """Compare onnxruntime's and our results with torch's; returns the compiled model.

    ``sizes`` are inputs of other sizes to compare with.
    """
    onnxruntime = pytest.importorskip("onnxruntime")
    model = capture(Function(function), example_inputs=inputs, dynamic_shapes=dynamic_shapes)
    session = onnxruntime.InferenceSession(to_proto(model).SerializeToString())
    compiled = optc.compile(model, verify=False).model()
    inputs = sizes or inputs
    wanted = function(*inputs)
    arrays = dict(zip([spec.name for spec in compiled.inputs], [x.numpy() for x in inputs], strict=True))
    for found in (session.run(None, arrays), list(compiled.run(arrays).values())):
        for a, b in zip(found, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
            np.testing.assert_allclose(a, b.numpy(), atol=tolerance)
    return compiled, arrays


def kernels(compiled, arrays):
    """Return the names of the kernels that run."""
    return [kernel.name for kernel in compiled.profile(arrays) if kernel.name != "between kernels"]


def operands(*lead, generator):
    """Queries, keys and values of 5 and 6 steps."""
    return [torch.randn(*lead, *shape, generator=generator) for shape in ((5, 8), (6, 8), (6, 7))]


LEADS = [(), (3,), (2, 3), (2, 3, 4), (2, 1, 3, 2)]


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("kind", ["boolean", "additive", "infinite"])
def test_attention_of_any_rank_with_masks(lead, kind):
    generator = torch.Generator().manual_seed(0)
    q, k, v = operands(*lead, generator=generator)
    kept = torch.rand(*lead[-1:], 5, 6, generator=generator) > 0.4
    kept[..., 2, :] = False  # this row has no key: zeros, where the exporter's own gives means or NaN
    if kind == "boolean":
        mask = kept
    elif kind == "infinite":
        mask = torch.zeros(kept.shape).masked_fill(~kept, -torch.inf)
    else:
        mask = torch.randn(*lead, 5, 6, generator=generator)
    compiled, arrays = check(scaled_dot_product_attention, q, k, v, mask)
    if lead:
        assert kernels(compiled, arrays) == ["attention"]


@pytest.mark.parametrize("lead", LEADS)
def test_attention_to_earlier_steps(lead):
    q, k, v = operands(*lead, generator=torch.Generator().manual_seed(0))
    for queries in (q, torch.cat((q, q), dim=-2)):  # fewer and more than there are keys
        check(lambda *x: scaled_dot_product_attention(*x, is_causal=True, scale=0.3), queries, k, v)


@pytest.mark.parametrize("lead", [(2, 4), (2, 3, 4)])
def test_attention_with_shared_keys(lead):
    q, k, v = operands(*lead, generator=torch.Generator().manual_seed(0))
    check(lambda *x: scaled_dot_product_attention(*x, enable_gqa=True), q, k[..., :2, :, :], v[..., :2, :, :])


def test_attention_whose_keys_are_broadcast():
    q, k, v = operands(2, 3, 4, generator=torch.Generator().manual_seed(0))
    check(scaled_dot_product_attention, q, k[:, :1].contiguous(), v[:, :1].contiguous())


def test_attention_of_any_length():
    generator = torch.Generator().manual_seed(0)
    q, other = (torch.randn(batch, 4, length, 8, generator=generator) for batch, length in ((2, 5), (3, 9)))
    dims = {0: torch.export.Dim("batch"), 2: torch.export.Dim("length")}
    compiled, arrays = check(
        lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True),
        *(q, q, q),
        dynamic_shapes=((dims,) * 3,),
        sizes=(other, other, other),
    )
    assert kernels(compiled, arrays) == ["attention"]


@pytest.mark.parametrize("sizes", [4, 5, 12, [4, 4, 4], [1, 4, 7], [12]])
@pytest.mark.parametrize("dynamic", [False, True])
def test_splits_are_no_sequences(sizes, dynamic):
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    shapes = (({0: torch.export.Dim("rows")},),) if dynamic else None
    model = capture(Function(lambda x: x.split(sizes, dim=1)), example_inputs=(x,), dynamic_shapes=shapes)
    assert not {"SplitToSequence", "SequenceAt"} & {node.op_type for node in model.graph}
    check(lambda x: x.split(sizes, dim=1), x, dynamic_shapes=shapes, tolerance=0)


def test_a_split_of_nothing_is_one_part():
    check(lambda x: x.split(4, dim=1)[0] + 1, torch.zeros(3, 0))


def test_a_split_into_parts_that_only_a_run_counts():
    x = torch.randn(6, 4)
    shapes = (({0: 3 * torch.export.Dim("thirds", min=2)},),)
    with pytest.raises(UnsupportedModelError, match="number of parts must be known"):
        check(lambda x: sum(x.split(x.shape[0] // 3)), x, dynamic_shapes=shapes)


def mixture(rows, weights, experts):
    """Multiply each of the sorted rows with its expert's matrix, as mixtures of experts do."""
    counts = torch.nn.functional.one_hot(experts, weights.shape[0]).sum(0)
    return torch.ops.aten._grouped_mm(rows, weights, torch.cumsum(counts, 0, dtype=torch.int32))


@pytest.mark.parametrize("experts", [[0, 0, 1, 3, 3, 3, 3], [2] * 7, [0, 1, 1, 2, 2, 2, 3]])
def test_products_with_the_matrix_of_each_row(experts):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(7, 16, generator=generator).to(torch.bfloat16)
    weights = torch.randn(4, 16, 24, generator=generator).to(torch.bfloat16)
    chosen = torch.tensor(experts)
    wanted = torch.stack([row.float() @ weights[i].float() for row, i in zip(rows, experts, strict=True)])

    def function(chosen):
        return mixture(rows, weights, chosen).float()

    model = capture(Function(function), example_inputs=(torch.arange(7) % 4,))
    compiled = optc.compile(model, verify=False).model()
    (found,) = compiled.run({compiled.inputs[0].name: chosen.numpy()}).values()
    np.testing.assert_allclose(found, wanted.numpy(), atol=0.1)  # bfloat16 has 8 bits, and these are up to 16


@pytest.mark.parametrize(("shape", "dim"), [((7,), 0), ((3, 4, 9), 1), ((3, 4, 9), -1), ((2, 1), 1), ((3, 8), 0)])
def test_running_extremes(shape, dim):
    x = torch.randint(-5, 5, shape, generator=torch.Generator().manual_seed(0)).float()
    check(lambda x: (*x.cummax(dim), *x.cummin(dim)), x, tolerance=0)


@pytest.mark.parametrize("lowest", [0, 1])
def test_all_are_true(lowest):
    x = torch.arange(6).reshape(2, 3) + lowest
    check(lambda x: torch.ops.aten._is_all_true(x > 0), x, tolerance=0)


def test_products_of_transformers():
    pytest.importorskip("transformers.integrations.moe", reason="Transformers is not installed")
    generator = torch.Generator().manual_seed(0)
    rows, weights = torch.randn(7, 16, generator=generator), torch.randn(3, 16, 24, generator=generator)
    ends = torch.tensor([2, 2, 6], dtype=torch.int32)  # the last row belongs to nobody
    check(
        lambda rows, ends: torch.ops.transformers.grouped_mm_fallback(rows, weights, ends), rows, ends, tolerance=1e-5
    )
