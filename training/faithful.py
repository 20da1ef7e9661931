"""Whether a captured program does what its module does: the same outputs and gradients for the example inputs.

Export follows the operators of torch. What a module does besides (numbers drawn by Python, state kept in Python,
gradients changed by other means) is frozen or lost in the graph, and training would go on with wrong gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from optc.errors import UnsupportedModelError
from optc.training.capture import Program

# Both run the same kernels in the same order: what differs at all differs by much. Relative to the tensor's norm.
TOLERANCE = 1e-3


def check(program: Program, module: torch.nn.Module) -> None:
    """Run both once, forward and backward, on the examples; weights, buffers and random numbers stay as they were.

    UnsupportedModelError names the output or the weights whose gradients differ.
    """
    weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    with _unchanged(module, program):
        expected = _run(module, program.examples, weights)
    with _unchanged(module, program):
        found = _run(program.root, program.examples, weights)
    wrong = [name for name, tensor in expected.items() if not _close(found.get(name), tensor)]
    if wrong or len(found) != len(expected):
        raise UnsupportedModelError(
            f"the graph of {type(module).__name__} does not do what the module does: "
            f"{', '.join(wrong[:5]) or 'the number of outputs'} differs",
            hint="look for random numbers of Python or NumPy, and for state that forward keeps in Python",
        )


def _run(
    model: Callable[..., Any], examples: tuple[torch.Tensor, ...], weights: dict[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """Outputs, and gradients of a sum of them with random weights."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    with torch.enable_grad():
        leaves = pytree.tree_leaves(model(*(tensor.clone() for tensor in examples)))
        outputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        known = {f"output {number}": output.detach().clone() for number, output in enumerate(outputs)}
        roots = [output for output in outputs if output.requires_grad]
        if not roots or not weights:
            return known
        directions = [torch.randn(root.shape, generator=generator).to(root) for root in roots]
        # Not autograd.grad, which reentrant checkpoints refuse.
        torch.autograd.backward(roots, directions)
    named = {f"gradient of {name}": weight.grad for name, weight in weights.items()}
    return known | {name: gradient.to_dense() for name, gradient in named.items() if gradient is not None}


def _close(found: torch.Tensor | None, expected: torch.Tensor) -> bool:
    if found is None or found.shape != expected.shape:
        return found is None and not expected.any()
    kind = torch.complex128 if expected.is_complex() else torch.float64
    a, b = (torch.nan_to_num(tensor.to(kind)) for tensor in (found, expected))
    return bool((a - b).norm() <= TOLERANCE * b.norm())


@contextlib.contextmanager
def _unchanged(module: torch.nn.Module, program: Program) -> Iterator[None]:
    state = [*module.parameters(), *module.buffers()]
    before = [tensor.detach().clone() for tensor in state]
    gradients = [weight.grad for weight in module.parameters()]
    for weight in module.parameters():
        weight.grad = None
    devices = sorted({tensor.device.index or 0 for tensor in program.examples if tensor.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for weight, gradient in zip(module.parameters(), gradients, strict=True):
                weight.grad = gradient
            with torch.no_grad():
                for tensor, kept in zip(state, before, strict=True):
                    tensor.copy_(kept)
