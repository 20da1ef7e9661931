"""Stages run one after the other in one process: where they may be cut, and what they compute."""

import copy

import pytest
import torch
import torch.nn.functional as F
import training_models as models
from torch import nn

from optc.errors import UnsupportedModelError
from optc.training.analysis import analyse
from optc.training.capture import capture
from optc.training.costs import measure
from optc.training.linearize import linearize
from optc.training.randomness import Clock
from optc.training.stages import build, restore_outputs


def layout_of(module, *inputs):
    program = capture(module, inputs)
    return linearize(program, analyse(program))


def run(layout, cuts, clock=None, **options):
    """The outputs, and the gradients by name of the mean of the squared outputs."""
    stages = [
        build(layout, layout.facts, cuts, number, clock or Clock(), device=torch.device("cpu"), **options)
        for number in range(len(cuts) + 1)
    ]
    tensors = layout.program.examples
    for stage in stages:
        for given, known in zip(tensors, stage.inputs, strict=True):
            assert (given.shape, given.dtype, given.requires_grad) == (known.shape, known.dtype, known.requires_grad)
        tensors = stage(*tensors)
        tensors = tensors if isinstance(tensors, tuple) else (tensors,)
    output = restore_outputs(layout, tensors)
    models.logits_of(output).float().square().mean().backward()
    gradients = {}
    for stage in stages:
        for name, parameter in stage.body.named_parameters():
            name = layout.program.canonical[name]
            gradients[name] = gradients.get(name, 0) + parameter.grad
    return output, gradients, stages


def reference(module, inputs):
    module = copy.deepcopy(module)
    models.logits_of(module(*inputs)).float().square().mean().backward()
    return module, {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("name", ["mlp", "resnet", "unet", "gpt", "encoder_decoder"])
@pytest.mark.parametrize("recompute", [False, True])
def test_any_legal_cuts_give_the_same_gradients_and_buffers(name, recompute):
    module, inputs, _, _ = models.build(name, 2)
    layout = layout_of(module, *inputs)
    single, expected = reference(module, inputs)
    legal = [position for position in range(1, len(layout.units)) if layout.legal[position]]
    for step in (3, 5):
        cuts = legal[step :: len(legal) // 3][:3]
        _, gradients, stages = run(layout, cuts, recompute=recompute)
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[key], rtol=1e-5, atol=1e-7)
        buffers = dict(single.named_buffers())
        for stage in stages:
            for key, buffer in stage.body.named_buffers():
                torch.testing.assert_close(buffer, buffers[key])


def test_random_numbers_do_not_depend_on_the_cuts_or_on_recomputation():
    torch.manual_seed(0)
    layout = layout_of(models.MLP(dropout=0.5), torch.randn(4, 16))
    one, few = run(layout, [])[1], run(layout, [7, 15], recompute=True)[1]
    for name, gradient in one.items():
        assert torch.equal(gradient, few[name])


def test_every_moment_has_other_random_numbers_and_the_global_generator_stays():
    layout = layout_of(models.MLP(depth=1, dropout=0.5), torch.randn(4, 16))
    state = torch.get_rng_state()
    outputs = [
        run(layout, [], Clock(seed, step, mb))[0] for seed, step, mb in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    assert torch.equal(torch.get_rng_state(), state)
    zeros = {tuple((output == 0).flatten().tolist()) for output in outputs}
    assert len(zeros) == 4


class InPlace(nn.Module):
    """A view is taken before its base is written to, and read long after."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.first(x)
        view = y.view(-1, 4)
        z = self.second(y * 2)
        y.add_(1.0)
        return self.third(z) + view.reshape(x.shape)


def test_memory_is_not_cut_from_what_is_written_to_it():
    torch.manual_seed(0)
    module, x = InPlace(), torch.randn(2, 8)
    layout = layout_of(module, x)
    names = [unit.name for unit in layout.units]
    start, write = names.index("linear"), next(i for i, name in enumerate(names) if name.startswith("add_"))
    assert not any(layout.legal[start + 1 : write + 1])
    _, expected = reference(module, (x,))
    for cut in range(1, len(names)):
        if layout.legal[cut]:
            for key, gradient in run(layout, [cut])[1].items():
                torch.testing.assert_close(gradient, expected[key])


class Filled(nn.Module):
    """Memory that wants gradients only by what is written to it, and a counter that is replaced by itself."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        for layer in self.layers:
            y = torch.zeros_like(x)
            y[:, ::2] = layer(x)[:, ::2]
            x = x + F.gelu(y)
        self.seen += 1
        return x


def test_memory_wants_gradients_for_what_was_written_to_it():
    torch.manual_seed(0)
    module, x = Filled(), torch.randn(2, 8)
    layout = layout_of(module, x)
    _, expected = reference(module, (x,))
    legal = [cut for cut in range(1, len(layout.units)) if layout.legal[cut]]
    assert any(layout.crossing(cut)[-1].name.startswith("zeros_like") for cut in legal)
    for cut in legal:
        found = run(layout, [cut])[1]
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient)


class Counter(nn.Module):
    """A buffer that one layer writes to and a later one reads."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        x = self.first(x)
        self.seen.add_(1.0)
        x = F.gelu(x)
        x = self.second(x)
        return x * self.seen


def test_a_buffer_that_is_written_to_has_one_home():
    layout = layout_of(Counter(), torch.randn(2, 8))
    names = [unit.name for unit in layout.units]
    write, read = next(i for i, n in enumerate(names) if n.startswith("add_")), names.index("mul")
    assert not any(layout.legal[write + 1 : read + 1])
    assert layout.legal[write]


def test_what_depends_on_no_input_is_computed_by_every_stage():
    module, inputs, _, _ = models.build("gpt", 2)
    layout = layout_of(module, *inputs)
    cut = next(p for p in range(len(layout.units) // 2, len(layout.units)) if layout.legal[p])
    assert all(node not in layout.derived for node in layout.crossing(cut))


def test_layers_are_found():
    layout = layout_of(models.MLP(depth=8), torch.randn(2, 16))
    assert [layout.units[i].name for i in layout.layer_starts()] == ["linear", *(f"linear_{i}" for i in range(1, 8))]


def test_costs_leave_buffers_and_generators_as_they_were():
    module, inputs, _, _ = models.build("resnet", 2)
    before = copy.deepcopy(module.state_dict())
    layout = layout_of(module, *inputs)
    state = torch.get_rng_state()
    costs = measure(layout.program, layout.facts)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
    chain = layout.chain(costs)
    assert chain.forward.min() >= 0 and chain.backward_weight.sum() > 0
    convolution = next(i for i, name in enumerate(chain.names) if name == "conv2d_1")
    # A convolution keeps its input: a relu that no operator before it kept, or did.
    assert chain.saved.sum() > 0 and costs.nodes[chain.names[convolution]].flops > 0


class HiddenDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        x = self.layer(x)
        return torch.cond(x.sum() > 0, lambda v: F.dropout(v, 0.5), lambda v: v * 2, (x,))


def test_randomness_inside_of_control_flow_is_refused():
    with pytest.raises(UnsupportedModelError, match="random operators inside of control flow"):
        layout_of(HiddenDropout(), torch.randn(2, 8))


class Positions(nn.Module):
    """Asks for positions on the device of its inputs, which export writes down."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(x) * torch.arange(8, device=x.device)


def test_a_program_runs_on_another_device_than_it_was_captured_on():
    x = torch.randn(2, 8)
    layout = layout_of(Positions(), x)
    assert any(node.kwargs.get("device") == torch.device("cpu") for node in layout.program.graph.nodes)
    stage = build(layout, layout.facts, [], 0, Clock(), device=torch.device("meta"))
    assert stage(x.to("meta")).device.type == "meta"
    assert capture(Positions().to("meta"), x.to("meta")).fingerprint() == layout.program.fingerprint()
