"""Gradients in two parts are those of one backward pass, wherever a stage begins and ends."""

import pytest
import torch
import training_models as models
from torch import nn

from optc.training.analysis import analyse
from optc.training.backward import Paths, input_gradients, weight_gradients
from optc.training.capture import capture
from optc.training.linearize import linearize
from optc.training.randomness import Clock
from optc.training.stages import build


def both_ways(make):
    """Gradients of inputs and weights of ``make() -> (outputs, inputs, weights)``, at once and in two parts."""
    outputs, inputs, weights = make()
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(o.shape, generator=generator) if o.requires_grad else None for o in outputs]
    flowing = [(o, g) for o, g in zip(outputs, given, strict=True) if g is not None]
    torch.autograd.backward([o for o, _ in flowing], [g for _, g in flowing])
    once = [tensor.grad for tensor in (*inputs, *weights)]
    outputs, inputs, weights = make()
    found, later = input_gradients(outputs, given, inputs, weights)
    assert all(weight.grad is None for weight in weights)
    weight_gradients(later)
    return once, [*found, *(weight.grad for weight in weights)]


def check(make):
    for expected, found in zip(*both_ways(make), strict=True):
        assert (expected is None) == (found is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet", "unet", "gpt", "encoder_decoder"])
def test_every_stage_between_two_cuts(name):
    module, inputs, _, _ = models.build(name, 2)
    program = capture(module, inputs)
    layout = linearize(program, analyse(program))
    legal = [position for position in range(1, len(layout.units)) if layout.legal[position]]
    pairs = [(legal[i], legal[j]) for i in range(0, len(legal), 12) for j in range(i + 1, len(legal), 17)]
    for cuts in pairs:

        def make(cuts=cuts):
            first, second = (
                build(layout, layout.facts, cuts, number, Clock(), device=torch.device("cpu")) for number in (0, 1)
            )
            sent = first(*inputs)
            sent = sent if isinstance(sent, tuple) else (sent,)
            received = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in sent]
            outputs = second(*received)
            return outputs if isinstance(outputs, tuple) else (outputs,), received, list(second.parameters())

        check(make)


def test_weights_that_meet_no_input_and_outputs_that_no_input_reaches():
    def make():
        torch.manual_seed(0)
        table, layer = nn.Embedding(8, 4), nn.Linear(4, 4)
        x = torch.randn(3, 4, requires_grad=True)
        aside = table(torch.arange(3))
        return (layer(x), aside.tanh(), aside * 2), [x], [*table.parameters(), *layer.parameters()]

    check(make)


def test_a_weight_used_twice_in_a_row_and_one_that_is_changed_first():
    def make():
        torch.manual_seed(0)
        shared, scaled = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
        table = nn.Embedding(8, 4)
        x = torch.randn(3, 4, requires_grad=True)
        aside, changed = table(torch.arange(3)), scaled * 2
        y = torch.tanh(x @ shared + aside)
        y = torch.tanh(y @ changed) @ shared + aside
        return (y @ changed, y), [x], [shared, scaled, *table.parameters()]

    check(make)


def test_a_recurrent_layer():
    def make():
        torch.manual_seed(0)
        layer = nn.LSTM(4, 4, num_layers=2)
        x = torch.randn(5, 2, 4, requires_grad=True)
        outputs, (h, c) = layer(x)
        return (outputs, h, c), [x], list(layer.parameters())

    check(make)


def test_what_wants_no_gradient_gets_none():
    frozen = nn.Linear(4, 4).requires_grad_(False)
    x, mask = torch.randn(2, 4, requires_grad=True), torch.ones(2, 4)
    found, later = input_gradients([frozen(x) * mask, mask], [torch.ones(2, 4), None], [mask, x], frozen.parameters())
    weight_gradients(later)
    assert found[0] is None and found[1] is not None and frozen.weight.grad is None
    assert input_gradients([mask], [None], [mask], [])[0] == (None,)


def test_gradients_add_up_over_microbatches():
    layer = nn.Linear(4, 4)
    for _ in range(2):
        x = torch.ones(2, 4, requires_grad=True)
        weight_gradients(input_gradients([layer(x)], [torch.ones(2, 4)], [x], layer.parameters())[1])
    assert torch.equal(layer.weight.grad, torch.full((4, 4), 4.0))


def test_paths_are_kept_while_the_graph_is_the_same_and_found_again_where_it_is_not():
    torch.manual_seed(0)
    first, second, paths = nn.Linear(4, 4), nn.Linear(4, 4), Paths()
    weights = [*first.parameters(), *second.parameters()]
    found = []
    for layers in ((first, second), (first, second), (second, first), (first,)):
        x = torch.randn(2, 4, requires_grad=True)

        def forward(x=x, layers=layers):
            return nn.Sequential(*layers)(x).tanh()

        once = torch.autograd.grad(forward(), (x, *weights), torch.ones(2, 4), allow_unused=True)
        (gradient,), later = input_gradients([forward()], [torch.ones(2, 4)], [x], weights, paths)
        weight_gradients(later)
        for expected, got in zip(once, (gradient, *(weight.grad for weight in weights)), strict=True):
            assert (expected is None) == (got is None)
            if expected is not None:
                torch.testing.assert_close(got, expected)
        for weight in weights:
            weight.grad = None
        found.append(paths.groups)
    assert found[0] is found[1] and found[1] is not found[2] and found[2] is not found[3]


def test_weights_that_do_not_lead_to_each_other_share_a_call():
    queries, keys, values, last = (nn.Linear(4, 4, bias=False) for _ in range(4))
    x = torch.randn(3, 4, requires_grad=True)
    outputs = last(torch.softmax(queries(x) @ keys(x).T, -1) @ values(x))
    weights = [layer.weight for layer in (queries, keys, values, last)]
    _, later = input_gradients([outputs], [torch.ones(3, 4)], [x], weights)
    assert sorted(len(call.weights) for call in later.calls) == [1, 3]
